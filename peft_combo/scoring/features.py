"""Counted features of the rating task: item popularity, and nearness to what the user took.

Owns the two numbers that a rating head reads beside the texts. Both are computed from whatever interactions may be seen
where the head is used, and never stored with it: a new item, or a purchase of yesterday, counts without tuning anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.scoring.neighbours import ItemKNN

Taken: TypeAlias = "sparse.csr_array[Any, tuple[int, int]]"
"""(U, N) float32, 1 where the user took the item."""

# Similarities below a hundredth are noise of single users; on Online Retail a tenth of it ranked worse on validation.
_FLOOR = 0.01
_FOLDS = 5


def log_popularity(counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the log of (count + 1) over its mean, (N,) float32: 0 for an item as popular as the mean."""
    smoothed = counts + 1.0
    return np.asarray(np.log(smoothed / smoothed.mean()), np.float32)


def baskets_of(histories: NDArray[np.int64], n_items: int) -> Taken:
    """Return (Q, S) histories, -1 for none, as the rows that scorers take: (Q, N)."""
    rows, places = np.nonzero(histories >= 0)
    columns = histories[rows, places]
    return sparse.csr_array((np.ones(len(rows), np.float32), (rows, columns)), shape=(len(histories), n_items))


@dataclass(frozen=True, eq=False)
class Counted:
    """Attributes:
    log_popularity: (N,) see `log_popularity`.
    neighbours: item-kNN over users; None where the head does not read it.
    """

    log_popularity: NDArray[np.float32]
    neighbours: ItemKNN | None

    @classmethod
    def of(cls, counts: NDArray[np.int64], liked: Taken, nearest: int) -> Counted:
        """Learn from what was taken.

        Args:
            counts: (N,) users that took each item. liked: what they liked of it.
            nearest: of each item so many neighbours; 0 for none.
        """
        return cls(log_popularity(counts), _neighbours(liked, nearest) if nearest else None)

    @classmethod
    def of_events(cls, events: Any, rows: NDArray[np.int64], shape: tuple[int, int], nearest: int) -> Counted:
        """Count some events: of (U, N) users and items, with so many neighbours of each item."""
        return cls.of(np.bincount(events.items[rows], minlength=shape[1]), events.build_liked(rows, shape), nearest)

    def nearness(self, histories: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Return how near every item is to each history, on a log scale: (Q, S) -> (Q, N); None without neighbours."""
        return None if self.neighbours is None else _nearness(self.neighbours, histories, len(self.log_popularity))


class CrossFitted:
    """How near items are to the histories of users that are learned from, as those say who are not the user.

    Counted with a user's own purchases, every item they took is near to the others, and a head would trust a number
    that no new user has. So users fall into five folds, and each is judged by the other four.

    Source: Wolpert 1992, "Stacked generalization".
    """

    def __init__(self, liked: Taken, nearest: int, seed: int) -> None:
        self._n_items = liked.shape[1]
        self._fold = np.random.default_rng(seed).permutation(liked.shape[0]) % _FOLDS
        self._others = [_neighbours(liked[np.flatnonzero(self._fold != fold)], nearest) for fold in range(_FOLDS)]

    def nearness(
        self,
        users: NDArray[np.int64],
        histories: NDArray[np.int64],
        events: NDArray[np.int64],
        candidates: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Return the nearness of single pairs.

        Args:
            users: (B,). histories: (B, S) of them.
            events, candidates: (P,) which of the B is asked about which item.
        Returns:
            (P,) float32.
        """
        found = np.empty(len(events), np.float32)
        fold_of = self._fold[users]
        for fold in np.unique(fold_of):
            chosen = np.flatnonzero(fold_of == fold)
            scores = _nearness(self._others[fold], histories[chosen], self._n_items)
            pairs = np.flatnonzero(fold_of[events] == fold)
            found[pairs] = scores[np.searchsorted(chosen, events[pairs]), candidates[pairs]]
        return found


def _neighbours(liked: Taken, nearest: int) -> ItemKNN:
    return ItemKNN(k=nearest, similarity="tfidf").fit(liked)


def _nearness(neighbours: ItemKNN, histories: NDArray[np.int64], n_items: int) -> NDArray[np.float32]:
    scores = neighbours.score_baskets(baskets_of(histories, n_items))
    return np.asarray(np.log(np.nan_to_num(scores, nan=0.0) + np.float32(_FLOOR)), np.float32)
