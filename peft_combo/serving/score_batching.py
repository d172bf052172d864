"""Batched scoring: requests that wait for their turn are scored by the one whose turn it is, in one pass.

A pass over the catalogue costs little more for eight contexts than for one: vectors are read once, and the many short
steps of SciPy and NumPy are taken once. Nobody waits for a batch to fill; it is whoever stands in line.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from peft_combo.recommender.explanations import FusedScores
from peft_combo.recommender.recommender import BundleRecommender


@dataclass(eq=False)
class WaitingContext:
    """A context whose scores somebody waits for.

    Attributes:
        recommender: of the release that answers; only contexts of the same one are scored together.
        rows: (S,) of the context. user: as the dataset knows them.
        depth: so many of the best items will do; None where scores of all items are wanted.
        scores: None until they are there.
    """

    recommender: BundleRecommender
    rows: NDArray[np.int64]
    user: str | None
    depth: int | None = None
    scores: FusedScores | None = field(default=None, init=False)


class ScoreBatcher:
    """The contexts of requests in line.

    Args:
        most: contexts in one pass; more would make the first wait for too many others.
    """

    def __init__(self, most: int = 8) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._line: list[WaitingContext] = []

    @contextmanager
    def stand_in_line(self, waiting: WaitingContext) -> Iterator[None]:
        """Let whoever's turn comes score this context too, while the block runs."""
        with self._lock:
            self._line.append(waiting)
        try:
            yield
        finally:
            with self._lock:
                if waiting in self._line:
                    self._line.remove(waiting)

    def score(self, waiting: WaitingContext) -> FusedScores:
        """Return the scores of a context, and score others in line with it; only whose turn it is may call this.

        Raises:
            Exception: what scoring this context raises. That of another one is for its own request to find.
        """
        if waiting.scores is None:
            with self._lock:
                others = [one for one in self._line if one is not waiting and _go_together(one, waiting)]
                batch = [waiting, *others[: self._most - 1]]
                self._line = [one for one in self._line if one not in batch]
            try:
                depth = None if waiting.depth is None else max(one.depth or 0 for one in batch)
                found = waiting.recommender.score_contexts([(one.rows, one.user) for one in batch], depth)
            except Exception:
                if len(batch) == 1:
                    raise
                found = waiting.recommender.score_contexts([(waiting.rows, waiting.user)], waiting.depth)
            for one, scores in zip(batch, found, strict=False):
                one.scores = scores
        assert waiting.scores is not None
        return waiting.scores


def _go_together(one: WaitingContext, other: WaitingContext) -> bool:
    return one.recommender is other.recommender and (one.depth is None) == (other.depth is None)
