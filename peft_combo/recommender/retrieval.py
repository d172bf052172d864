"""Retrieval before scoring: the best items of each scorer are found first, and the fusion scores these alone.

Owns which scorers are given an index, and the fused scores of some rows, which are those that scoring all items gives:
a query's scores are made comparable by their moments over all items, and these are had without the scores. An item that
is among the best of no scorer is not scored; docs/search.md says how seldom that changes an answer. Knows rows; nothing
of requests.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.queries import Queries
from peft_combo.encoder.index import import_faiss
from peft_combo.recommender.evidence import Evidence, Gates
from peft_combo.recommender.fitted_scorers import Fitted
from peft_combo.recommender.fusion import Fusion, damp, invert_spread, sum_parts
from peft_combo.recommender.item_index import ItemIndex
from peft_combo.recommender.query_scores import QueryScores, ask_scorer, list_vectors
from peft_combo.recommender.scorer_id import ScorerId

RETRIEVAL_ROWS = 50_000
"""From so many items on it pays to find candidates first: below, scoring all of them takes some 10 ms on one core."""

# So many of the best items of each scorer are candidates, more where more are asked for; of so few allowed items, all.
_BEST, _ALL = 256, 2_000
# Deeper than this a list is scored as a whole.
_DEEPEST = 1_000


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Indexes over the vectors of scorers.

    Attributes:
        indexes: of each scorer whose scores are inner products.
    """

    indexes: Mapping[ScorerId, ItemIndex]

    @classmethod
    def build(cls, serving: Mapping[ScorerId, Fitted], home: Path | None) -> Self:
        """Build an index for each scorer that has vectors, or open those that were kept.

        Args:
            home: a folder to keep them in; None keeps them in memory.
        Raises:
            FaissMissing: faiss is not installed.
        """
        import_faiss()
        vectors = {scorer: own for scorer, fitted in serving.items() if (own := list_vectors(fitted)) is not None}
        return cls({scorer: ItemIndex.build(own, home, exact_rows=0) for scorer, own in vectors.items()})

    def grow(self, serving: Mapping[ScorerId, Fitted], changed: Collection[int]) -> Retrieval:
        """Return it for scorers of a longer catalogue of which some rows have changed."""
        indexes = dict(self.indexes)
        for scorer, index in self.indexes.items():
            vectors = list_vectors(serving[scorer])
            if vectors is not None and vectors is not index.vectors:
                indexes[scorer] = index.grow(vectors, changed)
        return Retrieval(indexes)

    def ask(
        self, serving: Mapping[ScorerId, Fitted], neighbours: Fitted | None, queries: Queries, evidence: Evidence
    ) -> list[AskedScorers]:
        """Ask scorers about queries.

        Args:
            neighbours: see `AskedScorers.beside`.
        """
        asked = {scorer: ask_scorer(one, queries, self.indexes.get(scorer)) for scorer, one in serving.items()}
        beside = None if neighbours is None else ask_scorer(neighbours, queries, None)
        return [
            AskedScorers(
                {scorer: own[place] for scorer, own in asked.items()},
                None if beside is None else beside[place],
                evidence.take(slice(place, place + 1)),
            )
            for place in range(len(queries))
        ]


@dataclass(frozen=True, eq=False)
class AskedScorers:
    """What scorers say of one query.

    Attributes:
        scorers: those a fusion needs.
        beside: one that is added with the weight 1 where it has a score, and is no part of what scorers add.
        evidence: of the query.
    """

    scorers: Mapping[ScorerId, QueryScores]
    beside: QueryScores | None
    evidence: Evidence

    @property
    def all(self) -> list[QueryScores]:
        """Whose best items are candidates."""
        return [*self.scorers.values(), *([] if self.beside is None else [self.beside])]

    def fuse(
        self, fusion: Fusion[ScorerId], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], dict[ScorerId, NDArray[np.float32]]]:
        """Return the fused scores of rows and what each scorer adds: see `Fusion.explain`.

        Args:
            rows: (C,), none of the context.
        Returns:
            (C,) NaN where no scorer has a score, and per scorer (C,).
        """
        gates = Gates(self.evidence, rows)
        parts: dict[ScorerId, tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}
        for name in fusion.needs:
            asked = self.scorers[name]
            values, has_score = _compare(asked, rows, fusion)
            first = _compare_best(asked, fusion) if "margin" in fusion.weights.get(name, ()) else values
            values = (values * fusion.sum_gates(name, gates, first[None]))[0]
            if (silence := fusion.silence.get(name)) and asked.moments.count:
                values = np.where(has_score, values, np.float32(silence))
            parts[name] = values, has_score
        total = sum_parts((len(rows),), parts.values())
        if self.beside is not None:
            values, has_score = _compare(self.beside, rows, fusion)
            total = np.where(has_score, total + values, total)
        return total, {name: values for name, (values, _) in parts.items()}


def find_candidates(
    asked: Sequence[QueryScores], depth: int, allowed: NDArray[np.bool_] | None, context: NDArray[np.int64]
) -> NDArray[np.int64] | None:
    """Return rows among which the best `depth` of a query are looked for, ascending; None where all items are.

    Args:
        asked: what scorers say of it. allowed: (N,) which items may be found. context: rows that are no candidates.
    """
    if allowed is not None and np.count_nonzero(allowed) <= _ALL:
        return np.setdiff1d(np.flatnonzero(allowed), context)
    if depth > _DEEPEST:
        return None
    found = [one.find_best(max(_BEST, 2 * depth), allowed) for one in asked]
    rows = np.unique(np.concatenate([np.empty(0, np.int64), *found]))
    return rows if len(rows) >= depth else None


def _compare(
    asked: QueryScores, rows: NDArray[np.int64], fusion: Fusion[ScorerId]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Bring scores of rows to the scale of the fusion; see `make_comparable`."""
    scores, moments = asked.score(rows), asked.moments
    has_score = np.isfinite(scores)
    scale = invert_spread(moments.mean, moments.deviation)
    values = np.where(has_score, (scores - np.float32(moments.mean)) * scale, np.float32(0))
    return (damp(values) if fusion.form == "damped" else values), has_score


def _compare_best(asked: QueryScores, fusion: Fusion[ScorerId]) -> NDArray[np.float32]:
    """Return the comparable scores of the first ten of a scorer, and 0 for what it has no score for."""
    best = asked.find_best(10)
    return np.pad(_compare(asked, best, fusion)[0], (0, 10 - len(best)))
