"""Drift of what a shop is used for, against what its adapter learned from: category mix, baskets as vectors, scores.

Owns which samples are compared and from where on a difference counts. Says it in words; what follows is the caller's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.model import Dataset
from peft_combo.data.use import LoggedList, UseBundle
from peft_combo.metrics.drift import kolmogorov_smirnov, population_stability

STABILITY = 0.25
"""Population stability from which a change is called major."""

DISTANCE = 0.1
"""Kolmogorov-Smirnov distance below which a change is too small to act on, however many rows show it."""

_FEWEST = 30  # of each side; with fewer nothing is said


@dataclass(frozen=True)
class DriftCheck:
    """One comparison of before and now.

    Attributes:
        of: what is compared. value, limit: the statistic, and from where on it counts as drift: the greater of the
            threshold and what chance reaches.
        before, now: sizes of the samples.
    """

    of: str
    value: float
    limit: float
    before: int
    now: int

    @property
    def drifted(self) -> bool:
        return self.value > self.limit

    def __str__(self) -> str:
        verdict = "drift" if self.drifted else "no drift"
        return (
            f"{self.of}: {verdict}, {self.value:.3f} and {self.limit:.3f} is the limit ({self.before:,} before, "
            f"{self.now:,} now)"
        )


def check_drift(
    dataset: Dataset, learned: NDArray[np.int32], recent: Sequence[UseBundle], vectors: NDArray[np.float32] | None,
    lists: Sequence[LoggedList] = (), since: float = 0.0,
) -> tuple[DriftCheck, ...]:  # fmt: skip
    """Compare recent use with what was learned from.

    Args:
        dataset: the recipe's. learned: rows of its bundles that the adapter learned from.
        recent: bundles since then; items that the dataset does not know are counted as a category of their own.
        vectors: (N, D) of its items under the adapter in use; None leaves baskets out.
        lists: what was shown. since: time of the last tuning, which parts them into before and now.
    Returns:
        a check for each comparison with at least 30 on both sides.
    """
    index = dataset.catalog.index
    then = [dataset.bundles.items[row] for row in learned]
    now = [[index.get(item, -1) for item in one.items] for one in recent]
    checks = []
    if min(len(then), len(now)) >= _FEWEST:
        value, chance = population_stability(*_count_categories(dataset, then, now))
        checks.append(DriftCheck("category mix", value, max(STABILITY, 3 * chance), len(then), len(now)))
        if vectors is not None:
            baskets = [_place_baskets(vectors, part) for part in (then, now)]
            centre = baskets[0].mean(0)
            if len(baskets[1]) >= _FEWEST:
                checks.append(_compare("basket vectors", *(part @ centre for part in baskets)))
    scores = [
        np.array([one.scores[0] for one in lists if one.scores and (one.time > since) == later]) for later in (0, 1)
    ]
    if min(map(len, scores)) >= _FEWEST:
        checks.append(_compare("scores of what is shown first", *scores))
    return tuple(checks)


def _compare(of: str, before: NDArray[np.float64], now: NDArray[np.float64]) -> DriftCheck:
    value, chance = kolmogorov_smirnov(before, now)
    return DriftCheck(of, value, max(DISTANCE, chance), len(before), len(now))


def _count_categories(
    dataset: Dataset, then: Sequence[NDArray[np.int32]], now: Sequence[list[int]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Count items by category leaf, the nineteen most frequent, all others as one; unknown items as one."""
    names = [dataset.catalog.leaf(row) or "none" for row in range(len(dataset.catalog))] + ["new items"]
    sides = [Counter(names[row] for rows in part for row in rows) for part in (then, now)]
    frequent = [name for name, _ in (sides[0] + sides[1]).most_common(19)]
    counted = [[side[name] for name in frequent] for side in sides]
    rest = [side.total() - sum(own) for side, own in zip(sides, counted, strict=True)]
    return np.array([*counted[0], rest[0]], np.float64), np.array([*counted[1], rest[1]], np.float64)


def _place_baskets(
    vectors: NDArray[np.float32], baskets: Sequence[NDArray[np.int32] | list[int]]
) -> NDArray[np.float64]:
    """Return the mean vector of each basket's known items, (B, D) of unit length."""
    means = [vectors[[row for row in rows if row >= 0]].mean(0) for rows in baskets if any(row >= 0 for row in rows)]
    found = np.array(means, np.float64).reshape(len(means), vectors.shape[1])
    lengths: NDArray[np.float64] = np.linalg.norm(found, axis=1, keepdims=True)
    scaled: NDArray[np.float64] = found / np.maximum(lengths, 1e-12)
    return scaled
