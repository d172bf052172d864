"""Leave-one-out queries: every item of a held-out bundle asked for once, given the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.data.model import Bundles


@dataclass(frozen=True)
class Queries:
    """Every item of every bundle once the target, the rest of its bundle the query.

    Attributes:
        contexts: (Q, S) catalogue rows, -1 for none.
        targets: (Q,) catalogue rows.
        groups: (Q,) what an interval must draw as a whole: the group of the bundle.
        bundles: (Q,) place of the bundle among those given.
    """

    contexts: NDArray[np.int64]
    targets: NDArray[np.int64]
    groups: NDArray[np.str_]
    bundles: NDArray[np.int64]

    @classmethod
    def leave_one_out(cls, bundles: Sequence[NDArray[np.int32]], groups: Sequence[str]) -> Queries:
        """Make the queries of `bundles`; `groups` names the user (or bundle) each belongs to."""
        width = max((len(rows) for rows in bundles), default=1) - 1
        contexts: list[NDArray[np.int64]] = []
        targets: list[int] = []
        group_of: list[str] = []
        places: list[int] = []
        for place, (rows, group) in enumerate(zip(bundles, groups, strict=True)):
            for index, target in enumerate(rows):
                context = np.full(width, -1, np.int64)
                context[: len(rows) - 1] = np.delete(rows, index)
                contexts.append(context)
                targets.append(int(target))
                group_of.append(group)
                places.append(place)
        return cls(
            np.array(contexts, np.int64).reshape(len(contexts), width), np.array(targets, np.int64), np.array(group_of),
            np.array(places, np.int64),
        )  # fmt: skip

    @classmethod
    def of(cls, bundles: Bundles, rows: NDArray[np.int32]) -> Queries:
        """Make the queries of these rows of `bundles`, grouped by what a split may not divide."""
        return cls.leave_one_out([bundles.items[row] for row in rows], [bundles.groups[row] for row in rows])

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: slice | NDArray[np.int64]) -> Queries:
        """Return some of the queries."""
        return Queries(self.contexts[rows], self.targets[rows], self.groups[rows], self.bundles[rows])

    def sample(self, most: int, seed: int) -> Queries:
        """Return at most so many of the queries, drawn once for a seed."""
        if len(self) <= most:
            return self
        return self.take(np.sort(np.random.default_rng(seed).choice(len(self), most, replace=False)))

    def excluded(self) -> list[NDArray[np.int64]]:
        """Return per query the catalogue rows that are no candidates: its context."""
        return [row[row >= 0] for row in self.contexts]

    def to_csr(self, n_items: int) -> sparse.csr_array[Any, tuple[int, int]]:
        """Return the contexts as (Q, N) float32, the form scorers take."""
        if len(self) == 1:  # one request: asked for by several scorers, so kept, and sorted as they all want it
            kept: sparse.csr_array[Any, tuple[int, int]] | None = vars(self).get("_csr")
            if kept is None or kept.shape[1] != n_items:
                own = np.unique(self.contexts[0])
                own = own[own >= 0]
                ends = np.array([0, len(own)])
                kept = sparse.csr_array((np.ones(len(own), np.float32), own, ends), shape=(1, n_items))
                kept.has_canonical_format = True
                vars(self)["_csr"] = kept
            return kept
        rows, places = np.nonzero(self.contexts >= 0)
        columns = self.contexts[rows, places]
        return sparse.csr_array((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(self), n_items))


def pad_contexts(sets: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Write sets of rows as contexts: (S, longest), -1 behind the end of a smaller one."""
    contexts = np.full((len(sets), max(map(len, sets), default=0)), -1, np.int64)
    for own, rows in zip(contexts, sets, strict=True):
        own[: len(rows)] = rows
    return contexts


def assign_folds(groups: NDArray[Any], folds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw the fold of each query for cross-validation, (Q,) of 0..folds - 1; a group is never on both sides of one."""
    labels = np.unique(groups, return_inverse=True)[1]
    fold_of: NDArray[np.int64] = (rng.permutation(labels.max() + 1) % folds)[labels]
    return fold_of
