"""Nearest-neighbour index over item vectors: exact search, and approximate HNSW by FAISS."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, Protocol, assert_never

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peft_combo.encoder.vectors import BLOCK_ROWS
from peft_combo.errors import PeftComboError

IndexKind = Literal["auto", "exact", "hnsw", "ivfpq"]


# --- search -----------------------------------------------------------------------------------------------------------

EXACT_ROWS = 200_000
"""Up to so many rows every one is compared: some 10 ms a query on one core at 384 dimensions."""

HNSW_ROWS = 2_000_000
"""Up to so many rows a graph over the full vectors fits into memory (1.8 kB a row); beyond, vectors are compressed."""

BLOCK = (256, 8192)
"""Queries and rows compared at a time: a block of scores has 8 MB."""

Excluded = Sequence[ArrayLike]


class Index(Protocol):
    """Finds the rows whose vectors have the largest inner product with a query."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def search(
        self, queries: NDArray[np.float32], k: int, excluded: Excluded | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find the best rows for each query.

        Args:
            queries: (Q, D) float32.
            k: at least 1.
            excluded: for each query the rows that may not be found; None where all may.
        Returns:
            rows (Q, K) int64 and their inner products (Q, K) float32, K = min(k, N): highest first, of equal ones the
            lower row first. Where fewer than K rows are found: row -1 with score -inf.
        Raises:
            ValueError: shapes do not fit, a query is not finite, or k is below 1.
        """
        ...


class ExactIndex:
    """Compares a query with every row, block by block, so that the scores never stand in memory as a whole.

    Args:
        vectors: (N, D) float32; a mapped file will do.
        block: queries and rows compared at a time.
    """

    def __init__(self, vectors: NDArray[np.float32], block: tuple[int, int] = BLOCK) -> None:
        self.vectors = _check_vectors(vectors)
        self._n_queries, self._n_rows = block

    def __len__(self) -> int:
        return len(self.vectors)

    def search(
        self, queries: NDArray[np.float32], k: int, excluded: Excluded | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See `Index.search`."""
        queries, pairs = _check_queries(self.vectors, queries, k, excluded)
        k = min(k, len(self))
        if not len(queries) or not len(self):
            return np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        blocks = [
            self._best(
                queries[start : start + self._n_queries], k, _take_queries(pairs, start, start + self._n_queries)
            )
            for start in range(0, len(queries), self._n_queries)
        ]
        return np.concatenate([rows for rows, _ in blocks]), np.concatenate([scores for _, scores in blocks])

    def _best(
        self, queries: NDArray[np.float32], k: int, barred: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        barred = barred[np.argsort(barred[:, 1], kind="stable")]
        found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
        # The k-th best of any block is a bound for the k-th best of all: what lies below it is no candidate.
        floor = np.full(len(queries), -np.inf, np.float32)
        for start in range(0, len(self), self._n_rows):
            scores = queries @ self.vectors[start : start + self._n_rows].T  # (Q, D) @ (D, R) -> (Q, R)
            first, last = np.searchsorted(barred[:, 1], (start, start + scores.shape[1]))
            scores[barred[first:last, 0], barred[first:last, 1] - start] = -np.inf
            place = scores.shape[1] - k
            if place > 0:
                floor = np.maximum(floor, np.partition(scores, place, axis=1)[:, place])
            query, row = np.nonzero((scores >= floor[:, None]) & (scores > -np.inf))
            found.append((query, row + start, scores[query, row]))
        query, row, score = (np.concatenate(parts) for parts in zip(*found, strict=True))
        good = score >= floor[query]
        return _rank(query[good], row[good], score[good], len(queries), k)


class FaissIndex:
    """Looks at a small part of the rows only, so that a million take milliseconds; a few of the best may be missed.

    What the graph or the compressed codes propose is compared again by its true vectors, so scores are exact and the
    order is that of `ExactIndex`. With more than one thread faiss builds a slightly different graph each time.

    Args:
        vectors: (N, D) float32; a mapped file will do, it is read again for the true scores.
        kind: ``hnsw``, a graph over full vectors (Malkov and Yashunin 2016), or ``ivfpq``, inverted lists of
            compressed vectors (Jegou et al. 2011).
        effort: how many rows a search keeps in view (hnsw) or lists it opens (ivfpq); None for a good start.

    Raises:
        PeftComboError: faiss is not installed.
    """

    def __init__(
        self, vectors: NDArray[np.float32], kind: Literal["hnsw", "ivfpq"] = "hnsw", effort: int | None = None
    ) -> None:
        self._faiss = _import_faiss()
        self.vectors = _check_vectors(vectors)
        self.kind: Literal["hnsw", "ivfpq"] = kind
        n_rows, dim = self.vectors.shape
        match kind:
            case "hnsw":
                self._index = self._faiss.IndexHNSWFlat(dim, 32, self._faiss.METRIC_INNER_PRODUCT)
                self._index.hnsw.efConstruction = 120
                self.effort = effort or 128
            case "ivfpq":
                # k-means wants 39 points a centroid, or it complains; so many lists and codes are there enough for.
                lists = max(1, min(round(4 * n_rows**0.5), n_rows // 39))
                bits = max(1, min(8, int(np.log2(max(n_rows // 39, 2)))))
                pieces = next(pieces for pieces in range(max(1, dim // 4), 0, -1) if dim % pieces == 0)
                coarse = self._faiss.IndexFlatIP(dim)
                self._index = self._faiss.IndexIVFPQ(coarse, dim, lists, pieces, bits, self._faiss.METRIC_INNER_PRODUCT)
                self.effort = min(effort or max(16, lists // 16), lists)
                sample = np.random.default_rng(0).permutation(n_rows)[: 64 * max(lists, 2**bits)]
                if n_rows:
                    sample = np.resize(sample, max(len(sample), 39 * 2**bits))  # tiny sets more than once
                    self._index.train(np.ascontiguousarray(self.vectors[np.sort(sample)]))
            case _:
                assert_never(kind)
        for start in range(0, n_rows, BLOCK_ROWS):
            self._index.add(np.ascontiguousarray(self.vectors[start : start + BLOCK_ROWS]))

    def __len__(self) -> int:
        return len(self.vectors)

    def search(
        self, queries: NDArray[np.float32], k: int, excluded: Excluded | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See `Index.search`."""
        queries, pairs = _check_queries(self.vectors, queries, k, excluded)
        k = min(k, len(self))
        if not len(queries) or not len(self):
            return np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        # Enough for every excluded row to be among them; compressed scores need some reserve besides.
        most = int(np.bincount(pairs[:, 0]).max()) if len(pairs) else 0
        wanted = min(len(self), k + most if self.kind == "hnsw" else 4 * k + 64 + most)
        match self.kind:
            case "hnsw":
                parameters = self._faiss.SearchParametersHNSW(efSearch=max(self.effort, 2 * wanted))
            case "ivfpq":
                parameters = self._faiss.SearchParametersIVF(nprobe=self.effort)
            case _:
                assert_never(self.kind)
        _, proposed = self._index.search(queries, wanted, params=parameters)
        results = []
        for start in range(0, len(queries), BLOCK[0]):
            block = slice(start, start + BLOCK[0])
            barred = _take_queries(pairs, start, start + BLOCK[0])
            results.append(self._true_best(queries[block], proposed[block], k, barred))
        return np.concatenate([rows for rows, _ in results]), np.concatenate([scores for _, scores in results])

    def _true_best(
        self, queries: NDArray[np.float32], proposed: NDArray[np.int64], k: int, barred: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        query, place = np.nonzero(proposed >= 0)  # -1 where faiss found no more
        row = proposed[query, place]
        allowed = ~np.isin(query * len(self) + row, barred[:, 0] * len(self) + barred[:, 1])
        query, row = query[allowed], row[allowed]
        score = np.empty(len(row), np.float32)
        for start in range(0, len(row), BLOCK[1]):
            block = slice(start, start + BLOCK[1])
            score[block] = np.einsum("cd,cd->c", queries[query[block]], self.vectors[row[block]])
        return _rank(query, row, score, len(queries), k)


def open_index(
    vectors: NDArray[np.float32],
    kind: IndexKind = "auto",
    *,
    exact_rows: int = EXACT_ROWS,
    hnsw_rows: int = HNSW_ROWS,
) -> Index:
    """Return an index over (N, D) float32 vectors.

    Args:
        kind: ``auto`` compares every row up to `exact_rows`, goes through a graph up to `hnsw_rows`, and beyond that
            through compressed vectors; without faiss it compares every row and says so in a warning.
    Raises:
        PeftComboError: ``hnsw`` or ``ivfpq`` was asked for and faiss is not installed.
    """
    match kind:
        case "exact":
            return ExactIndex(vectors)
        case "hnsw" | "ivfpq":
            return FaissIndex(vectors, kind)
        case "auto":
            if len(vectors) <= exact_rows:
                return ExactIndex(vectors)
            try:
                return FaissIndex(vectors, "hnsw" if len(vectors) <= hnsw_rows else "ivfpq")
            except _FaissMissing as error:
                warnings.warn(f"All {len(vectors)} rows are compared with every query. {error}", stacklevel=2)
                return ExactIndex(vectors)
        case _:
            assert_never(kind)


class _FaissMissing(PeftComboError):
    pass


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as cause:
        raise _FaissMissing(
            "Approximate search needs the package faiss, which is not installed. Install it with: pip install "
            '"peft-combo[faiss]"'
        ) from cause
    return faiss


def _check_vectors(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    if vectors.ndim != 2 or vectors.dtype != np.float32:
        raise ValueError(f"vectors: expected (N, D) float32, found {vectors.shape} {vectors.dtype}.")
    return vectors.view(np.ndarray)  # slices of a memmap are memmaps, and each of them costs microseconds


def _check_queries(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], k: int, excluded: Excluded | None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the queries, and the excluded rows as (E, 2) distinct pairs of query and row, by query."""
    if queries.ndim != 2 or queries.shape[1] != vectors.shape[1]:
        raise ValueError(f"queries: expected (Q, {vectors.shape[1]}), found {queries.shape}.")
    if k < 1:
        raise ValueError(f"k: expected 1 or more, found {k}.")
    queries = np.ascontiguousarray(queries, np.float32)
    if not np.isfinite(queries).all():
        raise ValueError("queries: expected finite numbers.")
    if excluded is None:
        return queries, np.empty((0, 2), np.int64)
    if len(excluded) != len(queries):
        raise ValueError(f"excluded: expected rows for each of {len(queries)} queries, found {len(excluded)}.")
    rows = [np.asarray(own, np.int64).reshape(-1) for own in excluded]
    flat = np.concatenate([np.empty(0, np.int64), *rows])
    query = np.repeat(np.arange(len(rows)), [len(own) for own in rows])
    within = (flat >= 0) & (flat < len(vectors))
    # One number a pair: it sorts faster than two columns.
    joined = np.unique(query[within] * len(vectors) + flat[within])
    n_rows = max(len(vectors), 1)
    return queries, np.column_stack((joined // n_rows, joined % n_rows)).astype(np.int64)


def _take_queries(pairs: NDArray[np.int64], first: int, last: int) -> NDArray[np.int64]:
    """Return the pairs of queries from `first` to before `last`, counted from `first`."""
    start, stop = np.searchsorted(pairs[:, 0], (first, last))
    counted: NDArray[np.int64] = pairs[start:stop] - np.array([first, 0])
    return counted


def _rank(
    query: NDArray[np.int64], row: NDArray[np.int64], score: NDArray[np.float32], n_queries: int, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Lay candidates, given as three (C,) arrays, out as rows and scores (Q, k), best first, lower row first."""
    order = np.lexsort((row, -score, query))
    query, row, score = query[order], row[order], score[order]
    place = np.arange(len(query)) - np.searchsorted(query, query)  # within its query
    top = place < k
    rows = np.full((n_queries, k), -1, np.int64)
    scores = np.full((n_queries, k), -np.inf, np.float32)
    rows[query[top], place[top]] = row[top]
    scores[query[top], place[top]] = score[top]
    return rows, scores
