"""Objective of a bundle: relevance, compatibility, slot prior, agreement of attributes and redundancy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.recommender.composing.agreement import Agreement
from peft_combo.recommender.composing.options import (
    Compatibility,
    ObjectiveWeights,
    Options,
    Rows,
    check_scores,
    is_among,
)
from peft_combo.recommender.composing.search_space import SlottedCatalog

_TIE = 1e-9  # far below what tells two scores apart
_SETS = 256  # sets the scorer is asked about at once


class ScoreScale:
    """What makes scores comparable between scorers, taken from a sample of them, (S, N); see `composer` for how."""

    def __init__(self, sample: NDArray[np.floating[Any]]) -> None:
        values = sample.astype(np.float64)
        known = np.isfinite(values)
        if known.all() and values.size:
            self._lowest = values.min(axis=1, keepdims=True)
            self._mean = values.mean(axis=1, keepdims=True)
            self._set_factor(values.std(axis=1, keepdims=True))
            return
        count = np.maximum(known.sum(axis=1, keepdims=True), 1)
        self._lowest = np.where(known, values, np.inf).min(axis=1, keepdims=True, initial=np.inf)
        self._lowest[np.isinf(self._lowest)] = 0
        values[~known] = 0
        self._mean = values.sum(axis=1, keepdims=True) / count
        spread = np.sqrt(np.square(values - self._mean).sum(axis=1, keepdims=True, where=known) / count)
        self._set_factor(spread)

    def _set_factor(self, spread: NDArray[np.float64]) -> None:
        # Equal scores say nothing; their standard deviation is only nearly 0 in floating point.
        alike = spread <= 1e-9 * np.maximum(1.0, np.abs(self._mean))
        self._factor = np.where(alike, 0, 1 / np.where(alike, 1, spread))

    def apply(self, scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """(S, C) -> (S, C)."""
        values = scores.astype(np.float64)
        values = np.where(np.isfinite(values), values, self._lowest)
        comparable: NDArray[np.float64] = np.arcsinh((values - self._mean) * self._factor)
        return comparable


@lru_cache(maxsize=4)
def _draw_order(n: int, seed: int) -> tuple[Rows, NDArray[np.float64]]:
    """Return the rows' places in a random order and numbers whose sums tell sets of rows apart, (n,) each.

    Kept, for requests rarely bring a seed of their own.
    """
    rng = np.random.default_rng(seed)
    order, ties = rng.permutation(n), rng.random(n)
    order.flags.writeable = ties.flags.writeable = False
    return order, ties


@dataclass(frozen=True)
class ScoredBundle:
    """Added rows with their share of the parts, aligned."""

    added: tuple[int, ...]
    parts: dict[str, float]
    relevance: tuple[float, ...]
    compatibility: tuple[float, ...]
    agreement: tuple[float, ...]

    @property
    def score(self) -> float:
        return math.fsum(self.parts.values())


class Objective:
    """The objective for one request: what is relevant, what goes with what."""

    def __init__(
        self,
        *,
        relevance: NDArray[np.floating[Any]] | None,
        compatibility: Compatibility | None,
        options: Options,
        weights: ObjectiveWeights,
        slotted: SlottedCatalog,
        agreement: Agreement | None,
        near_duplicate: float | None,
        vectors: NDArray[np.float32] | None,
        sample: Rows,
    ) -> None:
        self.options = options
        self.weights = weights
        self.near_duplicate = near_duplicate
        self.slot_of = slotted.slot_of
        self.rules = slotted.rules
        self.order, self.ties = _draw_order(len(slotted.slot_of), options.seed)
        self._relevance = relevance
        self._compatibility = compatibility
        self._templates = slotted.templates
        self._agreement = agreement
        self._vectors = vectors
        self._titles = slotted.index.titles
        self._sample = sample

    def score_relevance(self, rows: Rows) -> NDArray[np.float64]:
        if self._relevance is None:
            return np.zeros(len(rows))
        comparable: NDArray[np.float64] = self._relevance_scale.apply(self._relevance[None, rows])[0]
        return comparable

    def weigh_relevance(self, rows: Rows, of: int = 1) -> NDArray[np.float64]:
        """What relevance adds to the objective of a bundle of so many added items, (len(rows),)."""
        weight = self.weights.relevance / of
        return weight * self.score_relevance(rows) if weight else np.zeros(len(rows))

    @cached_property
    def _relevance_scale(self) -> ScoreScale:
        assert self._relevance is not None
        return ScoreScale(self._relevance[None])

    def score_beside(self, sets: Sequence[Iterable[int]], rows: Rows) -> NDArray[np.float64]:
        """Ask the scorer for items beside sets, (S, C); 0 where there is no scorer or a set is empty.

        A scorer whose weight is 0 is not asked either: every use of what it says is times that weight.
        """
        found = np.zeros((len(sets), len(rows)))
        if self._compatibility is None or self.weights.compatibility == 0 or not len(rows):
            return found
        nonempty = [(place, np.array(sorted(one), np.int64)) for place, one in enumerate(sets) if one]
        both = np.concatenate([rows, self._sample])
        for start in range(0, len(nonempty), _SETS):
            places, some = zip(*nonempty[start : start + _SETS], strict=True)
            scores = check_scores(self._compatibility(some, both), (len(some), len(both)), "compatibility")
            found[list(places)] = ScoreScale(scores[:, len(rows) :]).apply(scores[:, : len(rows)])
        return found

    def weigh_beside(self, sets: Sequence[Iterable[int]], rows: Rows) -> NDArray[np.float64]:
        """What compatibility and agreement with sets add to the objective of a bundle of one added item, (S, C)."""
        weights = self.weights
        gains = weights.compatibility * self.score_beside(sets, rows)
        gains = gains + weights.agreement * self.score_agreement(sets, rows)
        return gains - [self.rules.weigh_conflicts(list(one), rows) for one in sets] if self.rules.soft else gains

    def score_agreement(self, sets: Sequence[Iterable[int]], rows: Rows) -> NDArray[np.float64]:
        """How far rows agree with sets on what bundles agree on, (S, C); 0 where nothing was learned of it."""
        if self._agreement is None or self.weights.agreement == 0:
            return np.zeros((len(sets), len(rows)))
        return self._agreement.score_beside(sets, rows)

    def has_scores(self, sets: Sequence[Iterable[int]]) -> bool:
        """Whether anything is known of what to put beside these sets."""
        return self._relevance is not None or (self._compatibility is not None and all(sets))

    def score_bundles(self, context: tuple[int, ...], bundles: Sequence[tuple[int, ...]]) -> list[ScoredBundle]:
        """Compute the objective of bundles given by their added rows; each set is asked for once."""
        bundles = [tuple(sorted(added)) for added in bundles]  # one order, so that equal sets get equal sums
        rows_of_set: dict[tuple[int, ...], list[int]] = {}
        for added in bundles:
            whole = sorted((*context, *added))
            for row in added:
                rows_of_set.setdefault(tuple(other for other in whole if other != row), []).append(row)
        rows = np.unique(np.array([row for added in bundles for row in added], np.int64))
        sets = list(rows_of_set)
        beside, agreeing = self.score_beside(sets, rows), self.score_agreement(sets, rows)
        known = {
            (others, row): (float(beside[place, at]), float(agreeing[place, at]))
            for place, (others, wanted) in enumerate(rows_of_set.items())
            for row, at in zip(wanted, np.searchsorted(rows, wanted).tolist(), strict=True)
        }
        return [self._score_bundle(context, added, known) for added in bundles]

    def _score_bundle(
        self, context: tuple[int, ...], added: tuple[int, ...],
        known: dict[tuple[tuple[int, ...], int], tuple[float, float]],
    ) -> ScoredBundle:  # fmt: skip
        weights, n = self.weights, len(added)
        whole = sorted((*context, *added))
        relevance = self.weigh_relevance(np.array(added, np.int64), n)
        beside = [known[tuple(other for other in whole if other != row), row] for row in added]
        compatibility, agreement = (np.array([weights.compatibility, weights.agreement]) / n * np.array(beside)).T
        parts = {
            "relevance": math.fsum(relevance),
            "compatibility": math.fsum(compatibility),
            "slots": self._score_slots(whole),
            "agreement": math.fsum(agreement),
            "redundancy": -weights.redundancy * self._measure_redundancy(added, whole),
        }
        if self.rules.soft:
            parts["rules"] = -self.rules.measure_loss(whole)
        return ScoredBundle(
            added=added,
            parts=parts,
            relevance=tuple(relevance.tolist()),
            compatibility=tuple(compatibility.tolist()),
            agreement=tuple(agreement.tolist()),
        )

    def _score_slots(self, whole: list[int]) -> float:
        if self.options.mode == "substitute":
            return 0.0
        template = tuple(sorted(self.slot_of[whole].tolist()))
        return self.weights.slots * self._templates.log_probability(template)

    def _measure_redundancy(self, added: tuple[int, ...], whole: list[int]) -> float:
        if self._vectors is None or len(whole) < 2:
            return 0.0
        cosines = self._vectors[list(added)] @ self._vectors[whole].T
        cosines[np.array(added)[:, None] == np.array(whole)] = 0
        return float(np.maximum(cosines.max(axis=1), 0).mean())

    def find_duplicates(self, rows: Rows, others: Sequence[int]) -> NDArray[np.bool_]:
        """(len(rows),) True where a row may not stand beside the others: nearly the same as one, or by a hard rule."""
        limit, barred = self.near_duplicate, np.zeros(len(rows), bool)
        if self.rules.hard:
            for other in others:
                barred |= self.rules.find_conflicts(other)[rows]
        if limit is None or not others:
            return barred
        same = barred | is_among(self._titles[rows], self._titles[list(others)])
        if self._vectors is not None:
            same |= (self._vectors[rows] @ self._vectors[list(others)].T > limit).any(axis=1)
        return same

    def measure_overlaps(self, bundles: Sequence[tuple[int, ...]], chosen: tuple[int, ...]) -> NDArray[np.float64]:
        """How like lists of added items are to one, 0..1: by shared items, as much by cosine of the best matches."""
        shared = np.array([len({*one} & {*chosen}) / len({*one} | {*chosen}) for one in bundles])
        if self._vectors is None:
            return shared
        rows = np.concatenate(bundles)
        cosines = np.clip(self._vectors[rows] @ self._vectors[list(chosen)].T, 0, 1)  # (R, D) @ (D, A) -> (R, A)
        starts = np.cumsum([0, *map(len, bundles[:-1])])
        sizes = np.array([len(one) for one in bundles])
        forth = np.add.reduceat(cosines.max(axis=1), starts) / sizes
        back = np.maximum.reduceat(cosines, starts, axis=0).mean(axis=1)
        likeness: NDArray[np.float64] = (shared + (forth + back) / 2) / 2
        return likeness

    def compare(
        self, rows: Rows, sets: Sequence[tuple[int, ...]], of_set: Rows
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Compare rows with the members of sets of one size, each row with those of the set that is named for it.

        Args:
            rows: (G,). sets: S of them. of_set: (G,) places in `sets`.
        Returns:
            (G,) the greatest cosine, at least 0, and (G,) whether the row is, or nearly is, among the set, or may not
            stand beside one of it by a hard rule.
        """
        held = np.array(sets, np.int64).reshape(len(sets), -1)
        if not held.size:
            return np.zeros(len(rows)), np.zeros(len(rows), bool)
        limit = self.near_duplicate
        beside = held[of_set]  # (G, M)
        taken = (beside == rows[:, None]).any(axis=1)
        if limit is not None:
            taken |= (self._titles[beside] == self._titles[rows][:, None]).any(axis=1)
        own, of_row = np.unique(rows, return_inverse=True)
        others, of_held = np.unique(held, return_inverse=True)
        if self.rules.hard:
            conflicts = np.stack([self.rules.find_conflicts(other)[own] for other in others.tolist()])  # (H, R)
            taken |= conflicts[of_held.reshape(held.shape)[of_set], of_row[:, None]].any(axis=1)
        if self._vectors is None:
            return np.zeros(len(rows)), taken
        cosines = self._vectors[own] @ self._vectors[others].T  # (R, D) @ (D, H) -> (R, H)
        greatest = cosines[of_row[:, None], of_held.reshape(held.shape)[of_set]].max(axis=1)
        if limit is not None:
            taken |= greatest > limit
        return np.maximum(greatest, 0).astype(np.float64), taken

    def break_ties(self, rows: Rows) -> NDArray[np.float64]:
        """What to take from scores of rows so that equal ones come in the order of the seed: (len(rows),), tiny."""
        return np.asarray(self.order[rows] * (_TIE / max(1, len(self.order))), np.float64)

    def make_tie_key(self, rows: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted(int(self.order[row]) for row in rows))

    def select_best(self, rows: Rows, scores: NDArray[np.float64], count: int) -> NDArray[np.intp]:
        """Places of the `count` highest scores, best first; equal scores in the order of the seed."""
        if len(rows) > count:
            least = np.partition(scores, len(rows) - count)[len(rows) - count]
            places = np.flatnonzero(scores >= least)
        else:
            places = np.arange(len(rows))
        return places[np.lexsort((self.order[rows[places]], -scores[places]))][:count]
