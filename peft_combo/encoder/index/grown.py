"""An index whose rows have changed since it was built: what is new or changed is compared exactly, and merged."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peft_combo.encoder.index.exact import (
    ExactIndex,
    Excluded,
    Found,
    Index,
    check_queries,
    check_vectors,
    divide_pairs,
    merge_results,
    pad_found,
)


class GrownIndex:
    """Searches an index, less the rows that changed, and beside it every row that is new or changed.

    Args:
        base: over the first rows as they were.
        vectors: (N, D) float32, all rows as they are now; N is at least that of `base`.
        changed: rows of `base` whose vectors are others now.

    Attributes:
        changed: these, ascending and each once.
    """

    def __init__(self, base: Index, vectors: NDArray[np.float32], changed: ArrayLike = ()) -> None:
        self.base, self.vectors = base, check_vectors(vectors)
        self._valid = np.ones(len(base), bool)
        self.changed = np.unique(np.asarray(changed, np.int64).reshape(-1))
        self._valid[self.changed] = False
        self._rows = np.concatenate([self.changed, np.arange(len(base), len(vectors))])
        self._beside = ExactIndex(self.vectors[self._rows])

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
        barred = divide_pairs(pairs, len(queries))
        inside = self._valid if allowed is None else self._valid & allowed[: len(self.base)]
        old = self.base.search(queries, k, None if excluded is None else barred, None if inside.all() else inside)
        places = [np.flatnonzero(np.isin(self._rows, rows)) for rows in barred]
        rows, scores = self._beside.search(queries, k, places, None if allowed is None else allowed[self._rows])
        new = (np.where(rows >= 0, self._rows[rows], -1) if len(self._rows) else rows, scores)
        return pad_found(merge_results([old, new], k), min(k, len(self)))
