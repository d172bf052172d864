"""Columns of item pairs within one session: how alike two items are, beside how alike the session's items are.

Owns what a detector of bundles reads of a pair. Reads texts, categories and vectors by the text views, and how often
bundles held both.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats

from peft_combo.recommender.text_ranking.views import Floats, TextViews

# Views that a pair is also told by within its session: the others are told by its likeness and the session's mean.
_WITHIN = ("words", "words and category", "joint", "encoder", "kinship")


@dataclass(frozen=True, eq=False)
class PairReader:
    """What is known of items, asked pair by pair.

    Attributes:
        views: of the catalogue. members: (B, N) CSC, the bundles that may be counted. groups: (B,) of each.
    """

    views: TextViews
    members: Any
    groups: NDArray[np.str_]

    @classmethod
    def of(cls, views: TextViews, history: Any, groups: Sequence[str]) -> Self:
        """Take (B, N) bundles and the user (or bundle) of each."""
        return cls(views, sparse.csc_array(history), np.array(groups, np.str_))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns, in order."""
        alike = (*self.views.sparse.names, "kinship", *self.views.dense)
        within = [name for name in alike if name in _WITHIN]
        return (
            *alike, *(f"{name}, session" for name in alike),
            *(f"{name}, {how}" for name in within for how in ("both to the rest", "gap", "rank", "profile")),
            "bundles with both", "items of the session",
        )  # fmt: skip

    def read(self, items: NDArray[np.int64], left_out: Collection[str] = ()) -> Floats:
        """Return the columns of every pair of a session's items, in the order of ``np.triu_indices(S, 1)``: (P, F).

        Args:
            items: (S,) distinct rows of the catalogue, at least two.
            left_out: groups whose bundles are not counted: those that the session's own are of.
        """
        alike = self._compare(items)
        pairs = np.triu_indices(len(items), 1)
        columns = [values[pairs] for values in alike.values()]
        columns += [np.full(len(pairs[0]), values[pairs].mean()) for values in alike.values()]
        for name, values in alike.items():
            if name in _WITHIN:
                columns += _place_within(values, pairs)
        columns.append(np.log1p(self._count_together(items, left_out)[pairs]))
        columns.append(np.full(len(pairs[0]), np.log(len(items))))
        return np.stack(columns, axis=1).astype(np.float32)

    def _compare(self, items: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Return how alike each view finds the items, the mean of both ways: per name (S, S)."""
        alike = self.views.compare(items, items)
        both = {name: values.astype(np.float64) for name, values in alike.items()}
        return {name: (values + values.T) / 2 for name, values in both.items()}

    def _count_together(self, items: NDArray[np.int64], left_out: Collection[str]) -> NDArray[np.float64]:
        counted = ~np.isin(self.groups, list(left_out)) if left_out else np.ones(len(self.groups), bool)
        own = self.members[:, items].toarray()[counted].astype(np.float64)  # (B, S)
        found: NDArray[np.float64] = own.T @ own
        return found


def _place_within(
    alike: NDArray[np.float64], pairs: tuple[NDArray[np.intp], NDArray[np.intp]]
) -> list[NDArray[np.float64]]:
    """Return columns of each pair: its items' mean to the rest, its gap to their best, its rank, their profiles."""
    others = alike.copy()
    np.fill_diagonal(others, np.nan)
    mean, best = np.nanmean(others, axis=1), np.nanmax(others, axis=1)
    left, right = pairs
    values = alike[pairs]
    profile = alike.copy()
    np.fill_diagonal(profile, 1.0)
    profile /= np.linalg.norm(profile, axis=1, keepdims=True)
    return [
        (mean[left] + mean[right]) / 2,
        values - (best[left] + best[right]) / 2,
        (stats.rankdata(values) - 0.5) / len(values),
        (profile @ profile.T)[pairs],
    ]
