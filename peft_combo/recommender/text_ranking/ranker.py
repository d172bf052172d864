"""Text ranker: a conditional logit over what text views say of the candidates, fitted on questions of training bundles.

Owns which columns count and how much. None of them reads how often an item occurs in bundles, and no view learns from
bundles, so an item that no bundle holds is judged as any other.

Source: McFadden 1974 (conditional logit); Copas 1988 (contaminated likelihood); Liu 2009, "Learning to rank for
information retrieval" (features within a query).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.queries import Queries, assign_folds
from peft_combo.recommender.conditional_logit import DOUBT, SampledCells, fit_conditional_logit
from peft_combo.recommender.text_ranking.columns import (
    CandidateColumns,
    describe_column,
    gather,
    name_columns,
    standardize_columns,
)
from peft_combo.recommender.text_ranking.views import Floats, TextViews

# Ridge penalties, and columns that may be left out as a whole: cross-validation on training bundles decides.
_PENALTIES = (0.03, 0.1, 0.3)
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "all columns": (),
    "without hubness": ("hubness", "place in its own list"),
    "without categories": ("leaf", "category path", "kinship", "depth", "items of the leaf"),
}
_FOLDS = 3
# Questions that are learned from: their columns are what fitting costs, and each grows with the catalogue.
_QUESTIONS, _FEWEST, _CELLS = 4_000, 1_000, 40_000_000
# Below the candidates, items follow in the order of the sum of all views, this close to each other.
_STEP = 0.01


@dataclass(frozen=True, eq=False)
class TextRanker:
    """Ranks a catalogue by its texts; called with (Q) queries it gives (Q, N) scores, NaN where a context is empty.

    Attributes:
        views: what it reads. columns: (F,) places of those it counts, of `name_columns`.
        centre, spread: (F,) what columns are standardised by. weights: (F,).
        setting: which columns and penalty cross-validation chose.
    """

    views: TextViews
    columns: NDArray[np.int64]
    centre: Floats
    spread: Floats
    weights: Floats
    setting: str

    @classmethod
    def fit(cls, views: TextViews, queries: Queries, seed: int = 0) -> Self:
        """Learn from questions whose answers are known; groups of them are never on both sides of a fold.

        Raises:
            ValueError: no question has its answer among the candidates.
        """
        most = int(min(_QUESTIONS, max(_FEWEST, _CELLS // max(1, len(views.depth)))))
        asked = queries.take(np.flatnonzero((queries.contexts >= 0).any(axis=1))).sample(most, seed)
        questions = _Questions.of([gather(views, row[row >= 0]) for row in asked.contexts], asked)
        if not len(questions.groups):
            raise ValueError("no training question has its answer among the candidates of the text views.")
        names = name_columns(views)
        fold_of = assign_folds(questions.groups, _FOLDS, np.random.default_rng(seed))
        alone = len(np.unique(questions.groups)) == 1  # there is nothing to hold out
        tried: dict[tuple[str, float], float] = {}
        for option, left_out in _OPTIONAL.items():
            chosen = _without(names, left_out)
            for penalty in _PENALTIES:
                values = np.empty(len(fold_of))
                for fold in range(0 if alone else _FOLDS):
                    held = fold_of == fold
                    solved = _solve(questions, chosen, ~held, penalty)
                    values[held] = questions.likelihood(solved, chosen)[held]
                tried[option, penalty] = 0.0 if alone else float(values.mean())
        option, penalty = max(tried, key=tried.__getitem__)
        chosen = _without(names, _OPTIONAL[option])
        solved = _solve(questions, chosen, np.ones(len(fold_of), bool), penalty)
        return cls(views, chosen, *solved, f"{option}, penalty {penalty:g}")

    def __call__(self, queries: Queries) -> Floats:
        scores = np.full((len(queries), len(self.views.depth)), np.nan, np.float32)
        for own, row in zip(scores, queries.contexts, strict=True):
            context = row[row >= 0]
            if len(context):
                found = gather(self.views, context)
                own[:] = self._rank(found)
        return scores

    def explain(self, context: NDArray[np.int64], rows: Sequence[int], most: int = 3) -> dict[int, dict[str, float]]:
        """Say what speaks for items beside a context: per row reasons and what each adds to its score, largest first.

        What a reason adds is told against the mean of the candidates. Items that are no candidates are left out.
        """
        if not len(context):
            return {}
        found = gather(self.views, context)
        cells = standardize_columns(found.columns[:, self.columns], self.centre, self.spread) * self.weights
        cells -= cells.mean(axis=0)
        names = [name_columns(self.views)[column] for column in self.columns]
        told = {}
        for row, adds in zip(found.rows.tolist(), cells, strict=True):
            if row not in rows:
                continue
            reasons: dict[str, float] = {}
            for name, value in zip(names, adds.tolist(), strict=True):
                reason = describe_column(name, self.views, context, row)
                reasons[reason] = reasons.get(reason, 0.0) + value
            ranked = sorted(reasons.items(), key=lambda one: -one[1])
            told[row] = {reason: value for reason, value in ranked[:most] if value > 0}
        return told

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Give what was learned as arrays and JSON-ready values; the views are made anew from the catalogue."""
        arrays: dict[str, NDArray[Any]] = {
            "centre": self.centre, "spread": self.spread, "weights": self.weights,
        }  # fmt: skip
        names = name_columns(self.views)
        return arrays, {"setting": self.setting, "columns": [names[column] for column in self.columns]}

    @classmethod
    def from_state(cls, views: TextViews, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> Self:
        """Rebuild from `state`.

        Raises:
            ValueError: it counts columns that there are not here.
        """
        known = {name: place for place, name in enumerate(name_columns(views))}
        names = [str(name) for name in values["columns"]]
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"a text ranker counts the column {unknown[0]!r}, which is not known here.")
        columns = np.array([known[name] for name in names], np.int64)
        centre, spread, weights = (np.asarray(arrays[name], np.float32) for name in ("centre", "spread", "weights"))
        if any(part.shape != columns.shape for part in (centre, spread, weights)):
            raise ValueError(f"a text ranker of {len(columns)} columns, found {weights.shape} weights.")
        return cls(views, columns, centre, spread, weights, str(values["setting"]))

    def _rank(self, found: CandidateColumns) -> Floats:
        base = np.where(np.isfinite(found.base), found.base, -1 / _STEP)
        if not len(found.rows):
            return np.asarray(base * _STEP, np.float32)
        own = standardize_columns(found.columns[:, self.columns], self.centre, self.spread) @ self.weights
        scores = np.asarray(own.min() - 1 + _STEP * (base - base.max()), np.float32)
        scores[found.rows] = own
        return scores


@dataclass(frozen=True, eq=False)
class _Questions:
    """What is said of the candidates of many questions, the answer of each first.

    Attributes:
        sampled: the candidates. columns: (M, F) of each. groups: (Q,) of the questions.
    """

    sampled: SampledCells
    columns: Floats
    groups: NDArray[np.str_]

    @classmethod
    def of(cls, candidates: Sequence[CandidateColumns], queries: Queries) -> Self:
        """Keep the questions whose answer is among the candidates."""
        kept: list[int] = []
        rows: list[NDArray[np.int64]] = []
        columns: list[Floats] = []
        for row, (one, target) in enumerate(zip(candidates, queries.targets, strict=True)):
            order = np.argsort(one.rows != target, kind="stable")
            if len(order) and one.rows[order[0]] == target:
                kept.append(row)
                rows.append(one.rows[order])
                columns.append(one.columns[order])
        sizes = np.array([len(part) for part in rows], np.int64)
        sampled = SampledCells(
            np.cumsum(sizes) - sizes, np.repeat(np.arange(len(kept)), sizes),
            np.concatenate([np.empty(0, np.int64), *rows]), np.zeros(sizes.sum(), np.float32),
        )  # fmt: skip
        return cls(sampled, np.concatenate(columns) if kept else np.empty((0, 0), np.float32), queries.groups[kept])

    def likelihood(self, solved: tuple[Floats, Floats, Floats], columns: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return ln(share of the answer + doubt) of each question: (Q,)."""
        centre, spread, weights = solved
        logits = standardize_columns(self.columns[:, columns], centre, spread) @ weights
        starts = self.sampled.starts
        peaks = np.maximum.reduceat(logits, starts)
        totals = np.add.reduceat(np.exp(logits - peaks[self.sampled.rows]), starts)
        return np.asarray(np.log(np.exp(logits[starts] - peaks) / totals + DOUBT), np.float64)


def _without(names: Sequence[str], left_out: tuple[str, ...]) -> NDArray[np.int64]:
    return np.flatnonzero([not name.startswith(left_out) if left_out else True for name in names])


def _solve(
    questions: _Questions, columns: NDArray[np.int64], chosen: NDArray[np.bool_], penalty: float
) -> tuple[Floats, Floats, Floats]:
    """Fit the logit to the chosen questions with a ridge penalty; return centre, spread and weights."""
    values = questions.columns[:, columns]
    own = values[chosen[questions.sampled.rows]]
    centre, spread = own.mean(axis=0), own.std(axis=0) + 1e-6
    free = len(columns)
    weights = fit_conditional_logit(
        standardize_columns(values, centre, spread).T, questions.sampled, chosen,
        np.full(free, penalty * chosen.sum()),  # the solver's prior counts as one question
        [(None, None)] * free, np.zeros(free),
    )  # fmt: skip
    return centre.astype(np.float32), spread.astype(np.float32), weights.astype(np.float32)
