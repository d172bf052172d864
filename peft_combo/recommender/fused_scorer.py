"""Fused scores of a fitted recommender for one context, and what each of its items adds to them.

Owns the way from a context and a user to one score per item. Knows rows and outside ids of users; nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.queries import Queries, pad_contexts
from peft_combo.recommender.composing.evidence import Composition
from peft_combo.recommender.explanations import FusedScores
from peft_combo.recommender.fit_state import FitState
from peft_combo.recommender.fitted_scorers import score_beside
from peft_combo.recommender.fusion import make_comparable
from peft_combo.recommender.scorer_id import NEXT_BASKET, ScorerId
from peft_combo.recommender.user_habits import find_alone


@dataclass(frozen=True, eq=False)
class FusedScorer:
    """Scorers and fusion of a fitted recommender."""

    state: FitState

    def score(self, asked: Sequence[tuple[NDArray[np.int64], str | None]]) -> list[FusedScores]:
        """Score all items for each context, (S,) rows, and its user; keep what each scorer gave."""
        queries = _make_queries(pad_contexts([context for context, _ in asked]), [user for _, user in asked])
        fused, parts = self.state.fusion.explain(self._score_parts(queries), self.state.known.evidence(queries))
        scores = self._add_neighbours(fused, queries)
        if (habits := self._share_habits(queries, asked)) is not None:
            scores = scores + habits
            parts = {**parts, NEXT_BASKET: parts[NEXT_BASKET] + habits if NEXT_BASKET in parts else habits}
        return [
            FusedScores(own, {scorer: part[place] for scorer, part in parts.items()})
            for place, own in enumerate(scores)
        ]

    def credit_context(
        self, context: NDArray[np.int64], user: str | None, rows: Sequence[int], scores: NDArray[np.float32]
    ) -> dict[int, dict[int, float]]:
        """Tell what each item of a context adds to the scores of `rows`: all at once, one query without each."""
        rests = np.stack([np.delete(context, place) for place in range(len(context))])
        without = _make_queries(rests, [user] * len(context))
        fused = self.state.fusion.combine(self._score_parts(without), self.state.known.evidence(without))
        less = self._add_neighbours(fused, without)
        asked = (context, user)
        if (habits := self._share_habits(_make_queries(context[None, :], [user]), [asked])) is not None:
            less = less + habits  # what does not hang on the context is no item's merit
        return {
            row: {
                item: float(scores[row] - less[place, row])
                for place, item in enumerate(context.tolist())
                if np.isfinite(less[place, row])
            }
            for row in rows
        }

    def score_beside(self, sets: Sequence[NDArray[np.int64]], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Score rows beside sets of items by the text side: S sets, (C,) rows -> (S, C)."""
        return score_beside(self.state.text_side, sets, rows)

    def credit_members(self, one: Composition) -> dict[int, dict[int, float]]:
        """Tell what each item of a bundle adds to how well an added one goes with the rest: the loss without it."""
        sets: list[NDArray[np.int64]] = []
        for row in one.added:
            rest = np.array([other for other in one.items if other != row], np.int64)
            sets += [rest, *(np.delete(rest, place) for place in range(len(rest)))]
        scores = self.score_beside(sets, np.array(one.added, np.int64))  # (A (1 + R), A)
        step = len(one.items)
        credits = {}
        for place, row in enumerate(one.added):
            whole, *less = scores[place * step : (place + 1) * step, place]
            others = [other for other in one.items if other != row]
            credits[row] = {other: float(whole - part) for other, part in zip(others, less, strict=True)}
        return credits

    def _score_parts(self, queries: Queries) -> dict[ScorerId, NDArray[np.float32]]:
        return {scorer: self.state.serving[scorer](queries) for scorer in self.state.fusion.needs}

    def _share_habits(
        self, queries: Queries, asked: Sequence[tuple[NDArray[np.int64], str | None]]
    ) -> NDArray[np.float32] | None:
        """Return what habits add to each query of a user alone, (Q, N), 0 for others; None where they are not asked."""
        habits = self.state.habits
        if habits is None:
            return None
        alone = np.flatnonzero(find_alone(asked, self._taken, self.state.known.user_rows))
        if not len(alone):
            return None
        added = np.zeros((len(queries), len(self.state.known.support)), np.float32)
        own = queries.take(alone)
        added[alone] = habits.share(own, self.state.known.evidence(own), self.state.fusion.form)
        return added

    @cached_property
    def _taken(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        interactions, size = self.state.known.interactions, len(self.state.known.support)
        assert interactions is not None
        return interactions.list_taken(size)

    def _add_neighbours(self, scores: NDArray[np.float32], queries: Queries) -> NDArray[np.float32]:
        """Add what users alike took to fused scores (Q, N), where the fusion could not weigh that itself."""
        if self.state.neighbours is None or not any(queries.groups):
            return scores
        evidence = self.state.known.evidence(queries)
        neighbours, has_score = make_comparable(self.state.neighbours(queries), evidence, self.state.fusion.form)
        # Not a weight that was fitted: as much as any one scorer. What neighbours cannot say changes nothing.
        return np.where(has_score, scores + neighbours, scores).astype(np.float32)


def _make_queries(contexts: NDArray[np.int64], users: Sequence[str | None]) -> Queries:
    """Return queries of users, None for nobody: (Q, S) rows, -1 for none."""
    none = np.zeros(len(contexts), np.int64)
    return Queries(contexts, none, np.array([user or "" for user in users]), none)
