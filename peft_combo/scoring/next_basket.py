"""Next-basket scorer: what a user takes again and again, and what users with such habits take.

Owns how habits become scores. Knows rows of weighted counts only: how old purchases lose weight is the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.machine import row_blocks
from peft_combo.scoring.base import (
    Csr,
    HistoryScorer,
    Learned,
    Vectors,
    lengths,
    mask_missing,
    positive,
    support_of,
    unpack_history,
)
from peft_combo.scoring.neighbours import keep_nearest


@dataclass(frozen=True)
class Habits(Learned):
    """Attributes:
    by_item: (N, R) the history transposed. norms: (R,) Euclidean length of each row.
    """

    by_item: Csr
    norms: NDArray[np.float32]


@dataclass(eq=False)
class TifuKNN(HistoryScorer[Habits]):
    """A user's own frequencies beside those of users with the like: score = own x_i + sum_j cos(x, x_j) x_ji / k.

    The sum runs over the k rows j most like x by the cosine; a known row is no neighbour of its own. x holds how often
    a user took each item, older times counting less where the caller lets them. What is taken again and what is taken
    for the first time are told from one another by nothing else than x.

    NaN: an item no row holds; every item where that is so of the whole context. An update appends rows and is exact.

    Attributes:
        k: rows taken as neighbours, >= 1.
        own: weight of the user's own frequencies, >= 0.
    Source: Hu et al. 2020, "Modeling personalized item frequency information for next-basket recommendation"
    (TIFU-kNN), with neighbours weighted by their cosine.
    """

    k: int = 100
    own: float = 0.1
    _learned_type: ClassVar[type[Learned]] = Habits
    _saved: ClassVar[tuple[str, ...] | None] = ("history",)  # the rest is quicker made than read

    def __post_init__(self) -> None:
        positive("k", self.k)
        positive("own", self.own, zero=True)

    def _learn(self, history: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> Habits:
        return Habits(history, support_of(history), history.T.tocsr(), lengths(history))

    def _restore(self, arrays: Mapping[str, NDArray[Any]]) -> Habits:
        return self._learn(unpack_history(arrays), None, None)

    def _score(self, known: Habits, contexts: Csr) -> NDArray[np.float32]:
        return self._predict(known, contexts, None)

    def _score_known(self, known: Habits, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._predict(known, known.history[rows], rows)

    def _predict(self, known: Habits, contexts: Csr, own: NDArray[np.int64] | None) -> NDArray[np.float32]:
        seen = known.support > 0
        met = np.bincount(
            np.repeat(np.arange(contexts.shape[0]), np.diff(contexts.indptr)), weights=seen[contexts.indices],
            minlength=contexts.shape[0],
        )  # fmt: skip
        scores = np.empty(contexts.shape, np.float32)
        for block in row_blocks(contexts.shape[0], sum(known.history.shape)):
            asked = contexts[block]
            alike = (asked @ known.by_item).toarray()  # (q, N) @ (N, R) -> (q, R)
            scale = lengths(asked)[:, None] * known.norms[None, :]
            alike = np.divide(alike, scale, out=np.zeros_like(alike), where=scale > 0)
            alike[alike <= 0] = -np.inf
            if own is not None:
                alike[np.arange(len(alike)), own[block]] = -np.inf
            near = keep_nearest(alike, self.k) / np.float32(self.k)
            habits = near @ known.history + np.float32(self.own) * asked  # (q, R) @ (R, N)
            scores[block] = sparse.csr_array(habits).toarray()
        return mask_missing(scores, met > 0, seen)
