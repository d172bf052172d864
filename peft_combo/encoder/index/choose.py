"""Which index serves how many rows, as measured: docs/search.md has the figures."""

from __future__ import annotations

import warnings
from typing import Literal, assert_never

import numpy as np
from numpy.typing import NDArray

from peft_combo.encoder.index.approximate import FaissIndex, FaissMissing
from peft_combo.encoder.index.exact import ExactIndex, Index

IndexKind = Literal["auto", "exact", "hnsw", "ivf-sq8", "ivfpq"]

EXACT_ROWS = 200_000
"""Up to so many rows every one is compared: some 30 ms a query on one core at 384 dimensions."""

COMPRESSED_ROWS = 50_000_000
"""Beyond so many rows 8 bits a number are 20 GB, and product quantisation takes over."""


def choose_kind(
    rows: int, *, exact_rows: int = EXACT_ROWS, compressed_rows: int = COMPRESSED_ROWS
) -> Literal["exact", "ivf-sq8", "ivfpq"]:
    """Return the kind of index for so many rows.

    Never a graph: it takes 1.8 kB a row, and building one takes an order of magnitude longer than inverted lists; ask
    for it by name where rows are few and queries many.
    """
    if rows <= exact_rows:
        return "exact"
    return "ivf-sq8" if rows <= compressed_rows else "ivfpq"


def open_index(
    vectors: NDArray[np.float32],
    kind: IndexKind = "auto",
    *,
    exact_rows: int = EXACT_ROWS,
    compressed_rows: int = COMPRESSED_ROWS,
) -> Index:
    """Return an index over (N, D) float32 vectors, built in memory.

    Args:
        kind: ``auto`` takes that of `choose_kind`; without faiss it compares every row and says so in a warning.
    Raises:
        PeftComboError: another kind than ``exact`` was asked for and faiss is not installed.
    """
    match kind:
        case "exact":
            return ExactIndex(vectors)
        case "hnsw" | "ivf-sq8" | "ivfpq":
            return FaissIndex(vectors, kind)
        case "auto":
            chosen = choose_kind(len(vectors), exact_rows=exact_rows, compressed_rows=compressed_rows)
            if chosen == "exact":
                return ExactIndex(vectors)
            try:
                return FaissIndex(vectors, chosen)
            except FaissMissing as error:
                warnings.warn(f"All {len(vectors)} rows are compared with every query. {error}", stacklevel=2)
                return ExactIndex(vectors)
        case _:
            assert_never(kind)
