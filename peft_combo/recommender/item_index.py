"""Item index: the items nearest to a vector, and how all items compare with it on the whole, without scoring them all.

Owns when a catalogue is large enough for one, and where it is kept: beside the vectors in their cache, so that it goes
with them. Knows vectors and row numbers; nothing of texts or scorers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from peft_combo.encoder import index as indexes
from peft_combo.encoder.index import GrownIndex, Index, ShardedIndex, build_index, choose_kind, open_index
from peft_combo.errors import StoreError
from peft_combo.files import lock_file
from peft_combo.machine import row_blocks

Floats: TypeAlias = NDArray[np.float32]

_SHARD_ROWS = 2_000_000  # of an index in files: 0.8 GB each at 384 dimensions
_PATIENCE = 3600.0  # seconds that a process waits for another that builds the same index
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ItemIndex:
    """An index over the vectors of items, and the moments of these.

    Attributes:
        vectors: (N, D). index: over them.
        mean: (D,) their mean. second: (D, D) the mean of x x'.
    """

    vectors: Floats
    index: Index
    mean: NDArray[np.float64]
    second: NDArray[np.float64]

    @classmethod
    def build(cls, vectors: Floats, home: Path | None = None, *, exact_rows: int | None = None) -> ItemIndex:
        """Build an index, or open the one that was kept of these vectors.

        Args:
            vectors: (N, D); a mapped file will do. home: a folder to keep it in; None keeps it in memory.
            exact_rows: up to so many rows every one is compared; None for `EXACT_ROWS`.
        """
        dim = vectors.shape[1]
        total, second = np.zeros(dim, np.float64), np.zeros((dim, dim), np.float64)
        for block in row_blocks(len(vectors), dim):
            own = np.asarray(vectors[block])
            total += own.sum(axis=0, dtype=np.float64)
            second += own.T @ own
        rows = max(len(vectors), 1)
        limit = indexes.EXACT_ROWS if exact_rows is None else exact_rows
        return cls(vectors, _open(vectors, home, limit), total / rows, second / rows)

    def describe(self, query: Floats) -> tuple[float, float]:
        """Return mean and standard deviation of the inner products of all items with a query (D,)."""
        wide = query.astype(np.float64)
        mean = float(wide @ self.mean)
        return mean, max(float(wide @ self.second @ wide) - mean**2, 0.0) ** 0.5

    def grow(self, vectors: Floats, changed: Collection[int]) -> ItemIndex:
        """Return the index of a longer catalogue of which some rows have changed; those are compared exactly.

        Args:
            vectors: (N', D), N' >= N. changed: rows of the first N whose vectors are others than here.
        """
        base, moved = self.index, {*changed}
        if isinstance(base, GrownIndex):  # one over another would cost a search more each time
            moved |= {*base.changed.tolist()}
            base = base.base
        rows = np.array(sorted(changed), np.int64)
        old, new = self.vectors[rows], np.concatenate([vectors[rows], vectors[len(self.vectors) :]])
        total, count = self.mean * len(self.vectors), max(len(vectors), 1)
        total += new.sum(axis=0, dtype=np.float64) - old.sum(axis=0, dtype=np.float64)
        second = self.second * len(self.vectors) + new.T @ new - old.T @ old
        return ItemIndex(vectors, GrownIndex(base, vectors, sorted(moved)), total / count, second / count)


def is_large(rows: int) -> bool:
    """Tell whether so many items are worth an index: below, comparing with all of them takes some 10 ms."""
    return rows > indexes.EXACT_ROWS


def find_home(vectors: Floats) -> Path | None:
    """Return the folder of the vector cache that vectors are mapped from; None where they are in memory."""
    return Path(vectors.filename).parent if isinstance(vectors, np.memmap) and vectors.filename is not None else None


def _open(vectors: Floats, home: Path | None, exact_rows: int) -> Index:
    kind = choose_kind(len(vectors), exact_rows=exact_rows)
    if home is None or kind == "exact":
        return open_index(vectors, exact_rows=exact_rows)
    shards = np.array_split(vectors, -(-len(vectors) // _SHARD_ROWS))
    digest = hashlib.sha256()
    for shard in shards:
        for block in row_blocks(len(shard), shard.shape[1]):
            digest.update(np.ascontiguousarray(shard[block], "<f4").data)
    folder = home / f"index-{digest.hexdigest()[:16]}"
    try:
        with lock_file(home / "index.lock", _PATIENCE):
            try:
                kept = ShardedIndex.open(folder, shards, source=digest.hexdigest(), check_vectors=False)
            except StoreError:
                kept = None
            if kept is None or kept.degraded or kept.manifest.kind != kind:
                build_index(folder, shards, kind, source=digest.hexdigest())
                kept = ShardedIndex.open(folder, shards, source=digest.hexdigest(), check_vectors=False)
            return kept
    except (OSError, StoreError) as error:  # a cache that cannot be written to, or somebody else's lock
        _LOG.warning("the index of %d items cannot be kept in %s: %s", len(vectors), home, error)
        return open_index(vectors, exact_rows=exact_rows)
