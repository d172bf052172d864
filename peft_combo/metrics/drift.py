"""Drift between two samples: population stability of a category mix, Kolmogorov-Smirnov distance of numbers.

Both come with the value that samples of these sizes reach by chance, so that few rows raise no alarm.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def population_stability(before: ArrayLike, after: ArrayLike) -> tuple[float, float]:
    """Return the population stability index of two category mixes, and its mean where only chance differs.

    Args:
        before, after: (C,) counts of the same categories; each gets half a count more, so that none is empty.
    Returns:
        sum over categories of (q - p) log(q / p), with 0.1 to 0.25 usually called moderate and above that major; and
        (C - 1) (1 / n + 1 / m), its mean under no drift.
    Raises:
        ValueError: shapes differ, or a side has no count.
    Source: Yurdakul 2018, "Statistical properties of population stability index".
    """
    first, second = (np.asarray(part, np.float64) for part in (before, after))
    if first.ndim != 1 or first.shape != second.shape or not first.sum() or not second.sum():
        raise ValueError(f"before and after must be (C,) counts, some above 0; found {first.shape}, {second.shape}.")
    chance = (len(first) - 1) * (1 / first.sum() + 1 / second.sum())
    p, q = ((part + 0.5) / (part + 0.5).sum() for part in (first, second))
    return float(((q - p) * np.log(q / p)).sum()), float(chance)


def kolmogorov_smirnov(before: ArrayLike, after: ArrayLike) -> tuple[float, float]:
    """Return the largest distance between two empirical distributions, and what chance exceeds once in a hundred.

    Args:
        before, after: (n,) and (m,) numbers.
    Returns:
        the distance, in [0, 1]; and 1.628 sqrt((n + m) / (n m)), the asymptotic bound at 1 %.
    Raises:
        ValueError: a side is empty or holds something not finite.
    Source: Smirnov 1948, "Table for estimating the goodness of fit of empirical distributions".
    """
    first, second = (np.sort(np.asarray(part, np.float64)) for part in (before, after))
    if not first.size or not second.size or not np.all(np.isfinite(np.concatenate([first, second]))):
        raise ValueError(f"before and after must be finite numbers, found {first.size} and {second.size} of them.")
    both: NDArray[np.float64] = np.concatenate([first, second])
    below = [np.searchsorted(side, both, side="right") / len(side) for side in (first, second)]
    bound = 1.628 * np.sqrt((len(first) + len(second)) / (len(first) * len(second)))
    return float(np.abs(below[0] - below[1]).max()), float(bound)
