"""Statistical significance: clustered bootstrap intervals, paired permutation test, Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peft_combo.machine import row_blocks


def holm(ps: Sequence[float]) -> list[float]:
    """Correct p-values for being several: reject where the returned value is at most the level.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    corrected = [0.0] * len(ps)
    highest = 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=lambda one: ps[one])):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[index]))
        corrected[index] = highest
    return corrected


def bootstrap_interval(
    values: ArrayLike, clusters: ArrayLike, n: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval for the mean of `values`, drawing whole clusters with replacement.

    Queries of one user (or bundle) resemble each other, so drawing single queries would promise too narrow an interval.

    Args:
        values: (Q,) a metric per query.
        clusters: (Q,) the user or bundle each query belongs to; any hashable labels of one kind.
        n: resamples.
        seed: of the resampling.
        level: share of resampled means inside the interval, in (0, 1).
    Returns:
        (low, high); both the mean itself where there is a single cluster.
    Raises:
        ValueError: shapes differ, there is no query, a value is not finite, or n or level is out of range.
    Source: Field and Welsh 2007, "Bootstrapping clustered data"; Efron 1979 (percentile interval).
    """
    data, codes = _check_clusters(values, clusters)
    if n < 1 or not 0 < level < 1:
        raise ValueError(f"n must be >= 1 and level in (0, 1), found n={n}, level={level}.")
    sums, sizes = np.bincount(codes, weights=data), np.bincount(codes).astype(np.float64)
    count = len(sums)
    rng = np.random.default_rng(seed)
    means = np.empty(n)
    for block in row_blocks(n, count):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=block.stop - block.start)  # (n, C) times drawn
        means[block] = (drawn @ sums) / (drawn @ sizes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def standard_error(values: ArrayLike, clusters: ArrayLike) -> float:
    """Standard error of the mean of `values`, (Q,), where whole clusters, (Q,), are what is independent.

    Returns:
        The ratio estimator's error; infinite where there is a single cluster.
    Raises:
        ValueError: shapes differ, there is no query, or a value is not finite.
    Source: Cochran 1977, "Sampling techniques", eq. 6.13.
    """
    data, codes = _check_clusters(values, clusters)
    sums = np.bincount(codes, weights=data - data.mean())
    count = len(sums)
    if count < 2:
        return float("inf")
    return float(np.sqrt(count / (count - 1) * np.square(sums).sum()) / len(data))


def paired_permutation(a: ArrayLike, b: ArrayLike, clusters: ArrayLike, n: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value for "a and b are equally good", flipping the sign of each cluster's difference at random.

    Args:
        a: (Q,) a metric per query under one scorer.
        b: (Q,) the same queries under the other.
        clusters: (Q,) what may be exchanged only as a whole: the user or bundle of each query.
        n: random sign flips.
        seed: of the flips.
    Returns:
        p = (1 + flips at least as extreme as what was seen) / (1 + n), so never 0 and 1 where a equals b.
    Raises:
        ValueError: shapes differ, there is no query, a value is not finite, or n < 1.
    Source: Fisher 1935 (sign-flip test); Phipson and Smyth 2010 (the +1).
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a and b must hold the same queries, found shapes {first.shape} and {second.shape}.")
    difference, codes = _check_clusters(first - second, clusters)
    if n < 1:
        raise ValueError(f"n must be >= 1, found {n}.")
    sums = np.bincount(codes, weights=difference)
    # Sums that are equal on paper differ in the last bits by order of addition; those count as "at least as extreme".
    seen = abs(float(sums.sum())) - 1e-9 * float(np.abs(sums).sum())
    rng = np.random.default_rng(seed)
    extreme = 0
    for block in row_blocks(n, len(sums)):
        signs = rng.integers(0, 2, size=(block.stop - block.start, len(sums)), dtype=np.int8) * 2.0 - 1.0
        extreme += int(np.count_nonzero(np.abs(signs @ sums) >= seen))
    return (1 + extreme) / (1 + n)


def _check_clusters(values: ArrayLike, clusters: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    data, labels = np.asarray(values, np.float64), np.asarray(clusters)
    if data.ndim != 1 or data.shape != labels.shape or not data.size:
        raise ValueError(f"values and clusters must be (Q,) with Q >= 1, found {data.shape} and {labels.shape}.")
    if not np.all(np.isfinite(data)):
        raise ValueError("values must be finite.")
    codes = np.unique(labels, return_inverse=True)[1]
    return data, codes.astype(np.int64)
