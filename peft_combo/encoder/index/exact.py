"""Exact nearest-neighbour search, and what every index shares: the protocol, its checks, and how results are merged.

Sees vectors and row numbers; knows nothing of FAISS, of files, or of what a row stands for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

BLOCK = (256, 8192)
"""Queries and rows compared at a time: a block of scores has 8 MB."""

Excluded = Sequence[ArrayLike]
Found: TypeAlias = "tuple[NDArray[np.int64], NDArray[np.float32]]"
"""Rows (Q, K) and their inner products (Q, K); row -1 with score -inf where there are no more."""


class Index(Protocol):
    """Finds the rows whose vectors have the largest inner product with a query."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        excluded: Excluded | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> Found:
        """Find the best rows for each query. What may not be found is left out before the best are taken.

        Args:
            queries: (Q, D) float32.
            k: at least 1.
            excluded: for each query the rows that may not be found; None where all may.
            allowed: (N,) the rows that may be found, for all queries; None where all may.
        Returns:
            rows (Q, K) int64 and their inner products (Q, K) float32, K = min(k, N): highest first, of equal ones the
            lower row first. Where fewer than K rows are found: row -1 with score -inf.
        Raises:
            ValueError: shapes do not fit, a query is not finite, or k is below 1.
        """
        ...


class ExactIndex:
    """Compares a query with every row, block by block, so that the scores never stand in memory as a whole.

    A score does not depend on the block its row is in, nor on how rows are divided over files: matrix products, whose
    last bits do, only propose, with room for their rounding; what is returned is summed pair by pair.

    Args:
        vectors: (N, D) float32; a mapped file will do.
        block: queries and rows compared at a time.
    """

    def __init__(self, vectors: NDArray[np.float32], block: tuple[int, int] = BLOCK) -> None:
        self.vectors = check_vectors(vectors)
        self._n_queries, self._n_rows = block

    def __len__(self) -> int:
        return len(self.vectors)

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        excluded: Excluded | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> Found:
        """See `Index.search`."""
        queries, pairs = check_queries(self.vectors.shape, queries, k, excluded, allowed)
        k = min(k, len(self))
        if not len(queries) or not len(self):
            return find_nothing(len(queries), k)
        blocks = [
            self._best(queries[block], k, take_queries(pairs, block), allowed)
            for block in slices(len(queries), self._n_queries)
        ]
        return np.concatenate([rows for rows, _ in blocks]), np.concatenate([scores for _, scores in blocks])

    def _best(
        self, queries: NDArray[np.float32], k: int, barred: NDArray[np.int64], allowed: NDArray[np.bool_] | None
    ) -> Found:
        barred = barred[np.argsort(barred[:, 1], kind="stable")]
        found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
        slack = self._bound_rounding(queries)
        # The k-th best of any block is a bound for the k-th best of all: what lies below it is no candidate.
        floor = np.full(len(queries), -np.inf, np.float32)
        for block in slices(len(self), self._n_rows):
            scores = queries @ self.vectors[block].T  # (Q, D) @ (D, R) -> (Q, R)
            first, last = np.searchsorted(barred[:, 1], (block.start, block.stop))
            scores[barred[first:last, 0], barred[first:last, 1] - block.start] = -np.inf
            if allowed is not None:
                scores[:, ~allowed[block]] = -np.inf
            place = scores.shape[1] - k
            if place > 0:
                floor = np.maximum(floor, np.partition(scores, place, axis=1)[:, place] - slack)
            query, row = np.nonzero((scores >= floor[:, None]) & (scores > -np.inf))
            found.append((query, row + block.start, scores[query, row]))
        query, row, score = (np.concatenate(parts) for parts in zip(*found, strict=True))
        good = score >= floor[query]
        query, row = query[good], row[good]
        return rank(query, row, multiply_pairs(queries, self.vectors, query, row), len(queries), k)

    def _bound_rounding(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return how far two float32 sums of the same D products can lie apart, (Q,): Higham 2002, eq. 3.7, twice."""
        bound = 2 * queries.shape[1] * np.finfo(np.float32).eps * self._longest
        return np.asarray(bound * np.sqrt(np.einsum("qd,qd->q", queries, queries)), np.float32)

    @cached_property
    def _longest(self) -> float:
        """The length of the longest vector."""
        blocks = (self.vectors[block] for block in slices(len(self), self._n_rows))
        squares = [np.einsum("rd,rd->r", own, own).max() for own in blocks]
        return float(np.sqrt(max(squares, default=0.0)))


def merge_results(parts: Sequence[Found], k: int) -> Found:
    """Return the best of what several indexes found of their own rows: highest first, of equal ones the lower row.

    Args:
        parts: rows and scores (Q, K) of each, rows numbered through all of them, no row in two.
    """
    rows = np.concatenate([rows for rows, _ in parts], axis=1)
    scores = np.concatenate([scores for _, scores in parts], axis=1)
    query, place = np.nonzero(rows >= 0)
    return rank(query, rows[query, place], scores[query, place], len(rows), min(k, rows.shape[1]))


def multiply_pairs(
    queries: NDArray[np.float32], vectors: NDArray[np.float32], query: NDArray[np.int64], row: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the inner products of (C,) pairs of query and row, each summed by itself: none depends on the others."""
    scores = np.empty(len(row), np.float32)
    for block in slices(len(row), BLOCK[1]):
        scores[block] = np.einsum("cd,cd->c", queries[query[block]], vectors[row[block]])
    return scores


def check_vectors(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (N, D) float32 vectors as a plain array, nothing copied.

    Raises:
        ValueError: they are something else.
    """
    if vectors.ndim != 2 or vectors.dtype != np.float32:
        raise ValueError(f"vectors: expected (N, D) float32, found {vectors.shape} {vectors.dtype}.")
    return vectors.view(np.ndarray)  # slices of a memmap are memmaps, and each of them costs microseconds


def check_queries(
    shape: tuple[int, ...], queries: NDArray[np.float32], k: int, excluded: Excluded | None,
    allowed: NDArray[np.bool_] | None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:  # fmt: skip
    """Return the queries to (N, D) vectors, and the excluded rows as (E, 2) distinct pairs of query and row, by query.

    Raises:
        ValueError: see `Index.search`.
    """
    size, dim = shape
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ValueError(f"queries: expected (Q, {dim}), found {queries.shape}.")
    if k < 1:
        raise ValueError(f"k: expected 1 or more, found {k}.")
    queries = np.ascontiguousarray(queries, np.float32)
    if not np.isfinite(queries).all():
        raise ValueError("queries: expected finite numbers.")
    if allowed is not None and (allowed.shape != (size,) or allowed.dtype != np.bool_):
        raise ValueError(f"allowed: expected ({size},) bool, found {allowed.shape} {allowed.dtype}.")
    if excluded is None:
        return queries, np.empty((0, 2), np.int64)
    if len(excluded) != len(queries):
        raise ValueError(f"excluded: expected rows for each of {len(queries)} queries, found {len(excluded)}.")
    rows = [np.asarray(own, np.int64).reshape(-1) for own in excluded]
    flat = np.concatenate([np.empty(0, np.int64), *rows])
    query = np.repeat(np.arange(len(rows)), [len(own) for own in rows])
    within = (flat >= 0) & (flat < size)
    # One number a pair: it sorts faster than two columns.
    joined = np.unique(query[within] * size + flat[within])
    n_rows = max(size, 1)
    return queries, np.column_stack((joined // n_rows, joined % n_rows)).astype(np.int64)


def take_queries(pairs: NDArray[np.int64], block: slice) -> NDArray[np.int64]:
    """Return the pairs of a block of queries, counted from its start."""
    start, stop = np.searchsorted(pairs[:, 0], (block.start, block.stop))
    counted: NDArray[np.int64] = pairs[start:stop] - np.array([block.start, 0])
    return counted


def divide_pairs(pairs: NDArray[np.int64], n_queries: int) -> list[NDArray[np.int64]]:
    """Return the rows of each query, from (E, 2) pairs of query and row by query."""
    ends = np.searchsorted(pairs[:, 0], np.arange(n_queries + 1))
    return [pairs[start:stop, 1] for start, stop in itertools.pairwise(ends)]


def pad_found(found: Found, width: int) -> Found:
    """Return results (Q, K) widened to `width` columns that found nothing."""
    rows, scores = found
    more = ((0, 0), (0, width - rows.shape[1]))
    return np.pad(rows, more, constant_values=-1), np.pad(scores, more, constant_values=-np.inf)


def find_nothing(n_queries: int, k: int) -> Found:
    """Return results (Q, k) of nothing: row -1 with score -inf."""
    return np.full((n_queries, k), -1, np.int64), np.full((n_queries, k), -np.inf, np.float32)


def slices(count: int, step: int) -> Iterator[slice]:
    """Cut `count` places into slices of `step`."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def rank(query: NDArray[np.int64], row: NDArray[np.int64], score: NDArray[np.float32], n_queries: int, k: int) -> Found:
    """Lay candidates, given as three (C,) arrays, out as rows and scores (Q, k), best first, lower row first."""
    order = np.lexsort((row, -score, query))
    query, row, score = query[order], row[order], score[order]
    place = np.arange(len(query)) - np.searchsorted(query, query)  # within its query
    top = place < k
    rows, scores = find_nothing(n_queries, k)
    rows[query[top], place[top]] = row[top]
    scores[query[top], place[top]] = score[top]
    return rows, scores
