"""Random, popularity and co-occurrence scorers.

Every baseline table needs them, and they are exact under updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, assert_never

import numpy as np
from numpy.typing import NDArray

from peft_combo.machine import row_blocks
from peft_combo.scoring.base import (
    Csr,
    HistoryScorer,
    Learned,
    Vectors,
    binary,
    concatenate,
    mask_missing,
    no_interactions,
    positive,
    scale_rows,
    stack,
    support_of,
    widen,
)

SECONDS_PER_DAY = 86_400.0


@dataclass(eq=False)
class Random(HistoryScorer[Learned]):
    """Uniform scores in [0, 1), the floor of every table.

    The scores depend on the seed and the items of the context only, so a batch scores as its parts do. Never NaN.

    Attributes:
        seed: of the scores, >= 0.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        positive("seed", self.seed, zero=True)

    def _learn(self, history: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> Learned:
        return Learned(history, support_of(history))

    def _score(self, known: Learned, contexts: Csr) -> NDArray[np.float32]:
        scores = np.empty(contexts.shape, np.float32)
        for row, (start, stop) in enumerate(zip(contexts.indptr[:-1], contexts.indptr[1:], strict=True)):
            rng = np.random.default_rng([self.seed, *contexts.indices[start:stop].tolist()])
            scores[row] = rng.random(contexts.shape[1], np.float32)
        return scores


@dataclass(frozen=True)
class Counts(Learned):
    """Attributes:
    counts: (N,) rows that hold each item, older rows counting less where there is a half-life.
    latest: (1,) seconds, the time the counts are as of; NaN without a half-life.
    """

    counts: NDArray[np.float64]
    latest: NDArray[np.float64]


@dataclass(eq=False)
class Popularity(HistoryScorer[Counts]):
    """The number of rows that hold an item, whatever the context; NaN for an item no row holds.

    With a half-life each row counts 2^(-age / half-life), age reckoned from the latest row. An update is exact: it ages
    the old counts to the new latest time.

    Attributes:
        half_life_days: None counts all rows alike; else `times` must be given to fit and update.
    """

    half_life_days: float | None = None
    _learned_type: ClassVar[type[Learned]] = Counts

    def __post_init__(self) -> None:
        if self.half_life_days is not None:
            positive("half_life_days", self.half_life_days)

    def _learn(self, history: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> Counts:
        support = support_of(history)
        if self.half_life_days is None:
            return Counts(history, support, support.astype(np.float64), np.array([np.nan]))
        when = self._require_times(times)
        latest = when.max() if when.size else -np.inf
        return Counts(history, support, self._age(history, when, latest), np.array([latest]))

    def _extend(self, known: Counts, rows: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> Counts:
        history, support = stack(known.history, rows), known.support
        support = _pad(support, rows.shape[1]) + support_of(rows)
        if self.half_life_days is None:
            return Counts(history, support, support.astype(np.float64), known.latest)
        when = self._require_times(times)
        latest = max(float(known.latest[0]), when.max() if when.size else -np.inf)
        older = 0.0 if latest == known.latest[0] else latest - float(known.latest[0])
        counts = _pad(known.counts, rows.shape[1]) * self._share(older) + self._age(rows, when, latest)
        return Counts(history, support, counts, np.array([latest]))

    def _score(self, known: Counts, contexts: Csr) -> NDArray[np.float32]:
        scores = np.tile(known.counts.astype(np.float32), (contexts.shape[0], 1))
        return mask_missing(scores, None, known.support > 0)

    def _age(self, rows: Csr, when: NDArray[np.float64], latest: float) -> NDArray[np.float64]:
        weights = self._share(latest - when) if when.size else when
        per_cell = np.repeat(weights, np.diff(rows.indptr))
        return np.bincount(rows.indices, weights=per_cell, minlength=rows.shape[1]).astype(np.float64)

    def _share(self, age_seconds: Any) -> Any:
        """What is left of a count at this age."""
        assert self.half_life_days is not None
        return np.exp2(-age_seconds / (self.half_life_days * SECONDS_PER_DAY))

    def _require_times(self, times: NDArray[np.float64] | None) -> NDArray[np.float64]:
        if times is None or not np.all(np.isfinite(times)):
            missing = "none was given" if times is None else f"{np.count_nonzero(~np.isfinite(times))} are not"
            raise ValueError(
                f"Popularity(half_life_days={self.half_life_days}) needs a finite time for each row, {missing}. "
                "Leave the half-life out to count all rows alike."
            )
        return times


Measure = Literal["count", "conditional", "lift"]


@dataclass(frozen=True)
class PairCounts(Learned):
    """Attributes:
    pairs: (N, N) float32, rows that hold both items; nothing on the diagonal.
    """

    pairs: Csr


@dataclass(eq=False)
class CoOccurrence(HistoryScorer[PairCounts]):
    """How often an item shares a row with the items of the context, averaged over those that were seen at all.

    - ``count``: rows that hold both.
    - ``conditional``: count / rows with the context item, the confidence P(item | context item).
    - ``lift``: conditional / P(item), so that the merely popular gains nothing; 1 is independence.

    NaN: an item no row holds; every item where no context item was seen. 0 means seen, never together. Rows should be
    baskets or bundles: a row of n items makes n^2 pairs, so for the long rows of users take `ItemKNN`, which prunes.

    Attributes:
        measure: as above.

    Source: Agrawal, Imielinski and Swami 1993 (confidence); Brin et al. 1997 (lift, there "interest").
    """

    measure: Measure = "conditional"
    _learned_type: ClassVar[type[Learned]] = PairCounts

    def __post_init__(self) -> None:
        if self.measure not in ("count", "conditional", "lift"):
            raise ValueError(f'measure must be "count", "conditional" or "lift", found {self.measure!r}.')

    def _learn(self, history: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> PairCounts:
        return PairCounts(history, support_of(history), _pairs(history))

    def _extend(
        self, known: PairCounts, rows: Csr, items: Vectors | None, times: NDArray[np.float64] | None
    ) -> PairCounts:
        width = rows.shape[1]
        nothing = no_interactions(width - known.pairs.shape[0], width)
        pairs: Csr = concatenate([widen(known.pairs, width), nothing], width) + _pairs(rows)
        pairs.sort_indices()
        support = _pad(known.support, width) + support_of(rows)
        return PairCounts(stack(known.history, rows), support, pairs)

    def _score(self, known: PairCounts, contexts: Csr) -> NDArray[np.float32]:
        return score_pairs(known, contexts, self.measure)


def score_pairs(known: PairCounts, contexts: Csr, measure: Measure) -> NDArray[np.float32]:
    """Score all items by how often they share a row with those of each context, as `CoOccurrence` says."""
    seen = known.support > 0
    inside = binary(contexts)
    familiar = (inside @ seen.astype(np.float32)).astype(np.float32)  # (Q,) context items ever seen
    shared = 1 / np.maximum(familiar, 1)
    weights = scale_rows(inside, shared)
    if measure != "count":
        weights.data = weights.data / np.maximum(known.support, 1).astype(np.float32)[weights.indices]
    scores = np.empty(contexts.shape, np.float32)
    for block in row_blocks(*contexts.shape):
        scores[block] = (weights[block] @ known.pairs).toarray()
    match measure:
        case "lift":
            scores *= (known.history.shape[0] / np.maximum(known.support, 1)).astype(np.float32)
        case "count" | "conditional":
            pass
        case _:
            assert_never(measure)
    return mask_missing(scores, familiar > 0, seen)


def _pairs(history: Csr) -> Csr:
    ones = binary(history)
    pairs: Csr = (ones.T.tocsr() @ ones).tocsr()
    pairs.setdiag(0)
    pairs.eliminate_zeros()
    pairs.sort_indices()
    return pairs


def _pad(counts: NDArray[Any], width: int) -> NDArray[Any]:
    return np.pad(counts, (0, width - len(counts)))
