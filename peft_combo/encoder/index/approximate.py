"""Approximate nearest-neighbour search by FAISS: graphs and inverted lists, filtered before the best are taken.

What FAISS proposes is compared again by the true vectors. Knows nothing of how an index is divided over files.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias, assert_never

import numpy as np
from numpy.typing import NDArray

from peft_combo.encoder.index.exact import (
    BLOCK,
    ExactIndex,
    Excluded,
    Found,
    check_queries,
    check_vectors,
    divide_pairs,
    find_nothing,
    multiply_pairs,
    pad_found,
    rank,
    slices,
)
from peft_combo.encoder.vectors import BLOCK_ROWS
from peft_combo.errors import PeftComboError

FaissKind: TypeAlias = Literal["hnsw", "ivf-sq8", "ivfpq"]

FEW_ROWS = 2_000
"""So few allowed rows are gathered and compared one by one, which is exact and takes less than a millisecond."""

# Of fewer rows than one in so many a graph finds its way badly, and comparing them all is sooner done.
_GRAPH_SHARE = 20

# Points that k-means sees for each list; faiss asks for 39 at least and reads no more than 256. More of them changed
# neither recall nor the evenness of lists here, and cost time in proportion.
_POINTS = 64


class FaissIndex:
    """Looks at a small part of the rows only, so that a million take milliseconds; a few of the best may be missed.

    What the graph or the compressed codes propose is compared again by its true vectors, so scores are exact and the
    order is that of `ExactIndex`. With more than one thread faiss builds a slightly different graph each time.

    Args:
        vectors: (N, D) float32; a mapped file will do, it is read again for the true scores.
        kind: ``hnsw``, a graph over full vectors (Malkov and Yashunin 2016); ``ivf-sq8``, inverted lists of vectors in
            8 bits a number; or ``ivfpq``, inverted lists of product-quantised vectors (Jegou et al. 2011).
        effort: how many rows a search keeps in view (hnsw) or lists it opens (ivf-sq8, ivfpq); None for a good start.
        built: an index of faiss over these rows; None builds one.

    Raises:
        PeftComboError: faiss is not installed.
    """

    def __init__(
        self, vectors: NDArray[np.float32], kind: FaissKind = "hnsw", effort: int | None = None, *, built: Any = None
    ) -> None:
        self._faiss = import_faiss()
        self.vectors = check_vectors(vectors)
        self.kind: FaissKind = kind
        if built is None:
            built = train(self.vectors, kind)
            add_rows(built, self.vectors)
        self._index = built
        self.effort = effort or choose_effort(kind, 0 if kind == "hnsw" else int(built.nlist))

    def __len__(self) -> int:
        return len(self.vectors)

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        excluded: Excluded | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> Found:
        """See `Index.search`. The fewer rows are allowed the more lists are opened; few are all compared."""
        queries, pairs = check_queries(self.vectors.shape, queries, k, excluded, allowed)
        k = min(k, len(self))
        if not len(queries) or not len(self):
            return find_nothing(len(queries), k)
        few = max(FEW_ROWS, len(self) // _GRAPH_SHARE) if self.kind == "hnsw" else FEW_ROWS
        there = len(self) if allowed is None else int(np.count_nonzero(allowed))
        if not there:
            return find_nothing(len(queries), k)
        if allowed is not None and there < few:
            return self._compare_few(queries, k, pairs, np.flatnonzero(allowed))
        proposed = self._propose(queries, k, pairs, allowed)
        results = []
        for block in slices(len(queries), BLOCK[0]):
            query, place = np.nonzero(proposed[block] >= 0)  # -1 where faiss found no more
            row = proposed[block][query, place]
            score = multiply_pairs(queries[block], self.vectors, query, row)
            results.append(rank(query, row, score, block.stop - block.start, k))
        rows = np.concatenate([rows for rows, _ in results])
        scores = np.concatenate([scores for _, scores in results])
        # Where what was opened held too few, others there may be are found by looking at all.
        barred = divide_pairs(pairs, len(queries))
        short = [query for query, own in enumerate(barred) if (rows[query] >= 0).sum() < min(k, there - len(own))]
        if short:
            exact = ExactIndex(self.vectors)
            rows[short], scores[short] = exact.search(queries[short], k, [barred[query] for query in short], allowed)
        return rows, scores

    def _compare_few(
        self, queries: NDArray[np.float32], k: int, pairs: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> Found:
        places = [np.searchsorted(rows, own[np.isin(own, rows)]) for own in divide_pairs(pairs, len(queries))]
        found, scores = ExactIndex(self.vectors[rows]).search(queries, k, places)
        return pad_found((np.where(found >= 0, rows[found], -1), scores), k)

    def _propose(
        self, queries: NDArray[np.float32], k: int, pairs: NDArray[np.int64], allowed: NDArray[np.bool_] | None
    ) -> NDArray[np.int64]:
        """Return (Q, W) rows that faiss finds best, W a little above k, none of them barred."""
        # What is quantised needs some reserve for the true order.
        wanted = min(len(self), {"hnsw": k, "ivf-sq8": k + k // 2 + 16, "ivfpq": 4 * k + 64}[self.kind])
        share = 1.0 if allowed is None else np.count_nonzero(allowed) / len(self)
        bits = None if allowed is None else np.packbits(allowed, bitorder="little")
        base = None if bits is None else self._faiss.IDSelectorBitmap(bits)
        proposed = np.empty((len(queries), wanted), np.int64)
        barred = divide_pairs(pairs, len(queries))
        free = np.flatnonzero([not len(own) for own in barred])
        if len(free):
            proposed[free] = self._index.search(queries[free], wanted, params=self._parameters(wanted, share, base))[1]
        for query, own in enumerate(barred):
            if not len(own):
                continue
            batch = self._faiss.IDSelectorBatch(np.ascontiguousarray(own))
            selector = others = self._faiss.IDSelectorNot(batch)
            if base is not None:
                selector = self._faiss.IDSelectorAnd(base, others)
            parameters = self._parameters(wanted, share, selector)
            proposed[query] = self._index.search(queries[query : query + 1], wanted, params=parameters)[1][0]
        return proposed

    def _parameters(self, wanted: int, share: float, selector: Any) -> Any:
        named = {} if selector is None else {"sel": selector}
        match self.kind:
            case "hnsw":
                return self._faiss.SearchParametersHNSW(efSearch=round(max(self.effort, 2 * wanted) / share), **named)
            case "ivf-sq8" | "ivfpq":
                # Opened are lists of four times the rows that are wanted, at least.
                lists = int(self._index.nlist)
                opened = max(self.effort, 4 * wanted * lists / len(self)) / share
                return self._faiss.SearchParametersIVF(nprobe=min(lists, math.ceil(opened)), **named)
            case _:
                assert_never(self.kind)


def train(vectors: NDArray[np.float32], kind: FaissKind, *, rows: int | None = None) -> Any:
    """Return an index of faiss that is ready to take rows and holds none.

    Args:
        vectors: (N, D) float32, of which inverted lists learn their centroids and codes from a sample.
        rows: how many it is to take, which decides on the number of lists; None for N.
    Raises:
        PeftComboError: faiss is not installed.
    """
    faiss = import_faiss()
    own, dim = vectors.shape
    rows = rows or own
    match kind:
        case "hnsw":
            index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = 120
            return index
        case "ivf-sq8":
            lists, bits = max(1, min(round(2 * rows**0.5), own // 39)), 0
            coarse = faiss.IndexFlatIP(dim)
            code = faiss.ScalarQuantizer.QT_8bit
            index = faiss.IndexIVFScalarQuantizer(coarse, dim, lists, code, faiss.METRIC_INNER_PRODUCT)
        case "ivfpq":
            # k-means wants 39 points a centroid, or it complains; so many lists and codes are there enough for.
            lists = max(1, min(round(4 * rows**0.5), own // 39))
            bits = max(1, min(8, int(np.log2(max(own // 39, 2)))))
            pieces = next(pieces for pieces in range(max(1, dim // 4), 0, -1) if dim % pieces == 0)
            coarse = faiss.IndexFlatIP(dim)
            index = faiss.IndexIVFPQ(coarse, dim, lists, pieces, bits, faiss.METRIC_INNER_PRODUCT)
        case _:
            assert_never(kind)
    if own:
        sample = np.random.default_rng(0).permutation(own)[: _POINTS * max(lists, 2**bits)]
        sample = np.resize(sample, max(len(sample), 39 * 2**bits))  # tiny sets more than once
        index.train(np.ascontiguousarray(vectors[np.sort(sample)]))
    return index


def add_rows(index: Any, vectors: NDArray[np.float32]) -> None:
    """Add (N, D) rows to an index of faiss, block by block, so that a mapped file is never read as a whole."""
    for block in slices(len(vectors), BLOCK_ROWS):
        index.add(np.ascontiguousarray(vectors[block]))


def choose_effort(kind: FaissKind, lists: int) -> int:
    """Return a good start for `FaissIndex.effort`: docs/search.md has what it finds and how long it takes."""
    match kind:
        case "hnsw":
            return 128
        case "ivf-sq8":
            return min(lists, max(16, lists // 32))
        case "ivfpq":
            return min(lists, max(16, lists // 16))
        case _:
            assert_never(kind)


class FaissMissing(PeftComboError):
    """The package faiss is not installed."""


def import_faiss() -> Any:
    """Return the module faiss.

    Raises:
        FaissMissing: it is not installed.
    """
    try:
        import faiss
    except ImportError as cause:
        raise FaissMissing(
            "Approximate search needs the package faiss, which is not installed. Install it with: pip install "
            '"peft-combo[faiss]"'
        ) from cause
    return faiss
