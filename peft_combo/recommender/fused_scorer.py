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
from peft_combo.recommender.explanations import FusedScores, explain_scorers
from peft_combo.recommender.fit_state import FitState
from peft_combo.recommender.fitted_scorers import FittedHead, score_beside
from peft_combo.recommender.fusion import make_comparable
from peft_combo.recommender.retrieval import AskedScorers, find_candidates
from peft_combo.recommender.scorer_id import NEXT_BASKET, PICTURES, ScorerId
from peft_combo.recommender.text_ranking import LOOKS_ALIKE
from peft_combo.recommender.user_habits import find_alone


@dataclass(frozen=True, eq=False)
class FusedScorer:
    """Scorers and fusion of a fitted recommender.

    Attributes:
        like: one of the same users and events, of which what users took need not be listed again.
    """

    state: FitState
    like: FusedScorer | None = None

    def score(self, asked: Sequence[tuple[NDArray[np.int64], str | None]]) -> list[FusedScores]:
        """Score all items for each context, (S,) rows, and its user; keep what each scorer gave."""
        queries = _read_asked(asked)
        fused, parts = self.state.fusion.explain(self._score_parts(queries), self.state.known.evidence(queries))
        scores = self._add_neighbours(fused, queries)
        if (habits := self._share_habits(queries, asked)) is not None:
            scores = scores + habits
            parts = {**parts, NEXT_BASKET: parts[NEXT_BASKET] + habits if NEXT_BASKET in parts else habits}
        return [
            FusedScores(own, {scorer: part[place] for scorer, part in parts.items()})
            for place, own in enumerate(scores)
        ]

    def score_best(
        self, asked: Sequence[tuple[NDArray[np.int64], str | None]], depth: int,
        allowed: NDArray[np.bool_] | None = None,
    ) -> list[FusedScores]:  # fmt: skip
        """Score the candidates for the best `depth` items of each context, or all items where that is not possible.

        Args:
            allowed: (N,) which items may be found.
        """
        if not self._retrieves:
            return self.score(asked)
        by_habit = np.zeros(len(asked), bool) if self.state.habits is None else self._find_alone(asked)
        open_ = np.flatnonzero(~by_habit).tolist()
        found: dict[int, FusedScores] = {}
        for place, own in zip(open_, self._ask(_read_asked([asked[place] for place in open_])), strict=True):
            rows = find_candidates(own.all, depth, allowed, asked[place][0])
            if rows is not None:
                fused, parts = own.fuse(self.state.fusion, rows)
                scores = np.full(len(self.state.known.support), np.nan, np.float32)
                scores[rows] = fused
                laid_out = {name: self._lay_out(part, rows) for name, part in parts.items()}
                found[place] = FusedScores(scores, laid_out, False)
        rest = [place for place in range(len(asked)) if place not in found]
        if rest:
            found |= zip(rest, self.score([asked[place] for place in rest]), strict=True)
        return [found[place] for place in range(len(asked))]

    @property
    def _retrieves(self) -> bool:
        # Ranks among all items, as that form has them, need the scores of all.
        return self.state.retrieval is not None and self.state.fusion.form != "normal"

    def _ask(self, queries: Queries) -> list[AskedScorers]:
        assert self.state.retrieval is not None
        if not len(queries):
            return []
        serving = {scorer: self.state.serving[scorer] for scorer in self.state.fusion.needs}
        neighbours = self.state.neighbours if any(queries.groups) else None
        return self.state.retrieval.ask(serving, neighbours, queries, self.state.known.evidence(queries))

    def _lay_out(self, part: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        whole = np.zeros(len(self.state.known.support), np.float32)
        whole[rows] = part
        return whole

    def credit_context(
        self, context: NDArray[np.int64], user: str | None, rows: Sequence[int], scores: NDArray[np.float32]
    ) -> dict[int, dict[int, float]]:
        """Tell what each item of a context adds to the scores of `rows`: all at once, one query without each."""
        rests = np.stack([np.delete(context, place) for place in range(len(context))])
        without = _make_queries(rests, [user] * len(context))
        wanted = np.asarray(rows, np.int64)
        if self._retrieves:
            less = np.stack([own.fuse(self.state.fusion, wanted)[0] for own in self._ask(without)])
        else:
            fused = self.state.fusion.combine(self._score_parts(without), self.state.known.evidence(without))
            less = self._add_neighbours(fused, without)[:, wanted]
        asked = (context, user)
        if (habits := self._share_habits(_make_queries(context[None, :], [user]), [asked])) is not None:
            less = less + habits[:, wanted]  # what does not hang on the context is no item's merit
        return {
            row: {
                item: float(scores[row] - lost)
                for item, lost in zip(context.tolist(), own.tolist(), strict=True)
                if np.isfinite(lost)
            }
            for row, own in zip(rows, less.T, strict=True)
        }

    def explain(
        self, context: NDArray[np.int64], rows: Sequence[int], fused: FusedScores
    ) -> dict[int, dict[str, float]]:
        """Say what speaks for rows beside a context, by texts, relations and pictures: per row the reasons.

        "looks alike" is said where pictures carried it: more than half of what a scorer that reads both added.
        """
        reasons = explain_scorers(self.state.serving, self.state.known.catalog, context, rows)
        if self.state.known.pictures is None or not len(context):
            return reasons
        for scorer, part in fused.parts.items():
            share = np.ones(len(rows), np.float32) if scorer == PICTURES else None
            fitted = self.state.serving.get(scorer)
            if isinstance(fitted, FittedHead):
                share = fitted.measure_looks(context, np.asarray(rows, np.int64))
            for row, own in zip(rows, () if share is None else share.tolist(), strict=False):
                if own > 0.5 and part[row] > 0:
                    told = reasons.setdefault(row, {})
                    told[LOOKS_ALIKE] = told.get(LOOKS_ALIKE, 0.0) + float(part[row]) * min(own, 1.0)
        return reasons

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
        alone = np.flatnonzero(self._find_alone(asked))
        if not len(alone):
            return None
        added = np.zeros((len(queries), len(self.state.known.support)), np.float32)
        own = queries.take(alone)
        added[alone] = habits.share(own, self.state.known.evidence(own), self.state.fusion.form)
        return added

    def _find_alone(self, asked: Sequence[tuple[NDArray[np.int64], str | None]]) -> NDArray[np.bool_]:
        """Tell which requests are of a user alone: (Q,)."""
        return find_alone(asked, self.taken, self.state.known.user_rows)

    @cached_property
    def taken(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The items that each user took, by user, each once and latest first, and where each user's begin."""
        if self.like is not None:
            return self.like.taken
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


def _read_asked(asked: Sequence[tuple[NDArray[np.int64], str | None]]) -> Queries:
    """Return the queries of contexts, (S,) rows, and their users."""
    return _make_queries(pad_contexts([context for context, _ in asked]), [user for _, user in asked])


def _make_queries(contexts: NDArray[np.int64], users: Sequence[str | None]) -> Queries:
    """Return queries of users, None for nobody: (Q, S) rows, -1 for none."""
    none = np.zeros(len(contexts), np.int64)
    return Queries(contexts, none, np.array([user or "" for user in users]), none)
