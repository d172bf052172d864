"""Classification metrics: F1 from counts, calibration error, bootstrap intervals and paired tests of both.

Owns the formulas. Counts come as one row a question (a text) with, for each class, how often it was rightly given,
given and wanted; every figure is a function of their sums, so an interval resamples rows. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.machine import row_blocks

Counts: TypeAlias = "sparse.csr_array[Any, tuple[int, int]]"
Statistic: TypeAlias = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Turns summed counts (..., C, 3) into one number each, (...)."""


def class_counts(answers: Sequence[Sequence[tuple[int, int, int, int]]], classes: int) -> Counts:
    """Put counts together.

    Args:
        answers: for each question, (class, rightly given, given, wanted) of the classes that play a part in it.
    Returns:
        (Q, 3 C) float64, the three counts of a class side by side.
    """
    rows = [row for row, own in enumerate(answers) for _ in own for _ in range(3)]
    columns = [3 * one[0] + which for own in answers for one in own for which in range(3)]
    values = [float(one[1 + which]) for own in answers for one in own for which in range(3)]
    return sparse.csr_array((values, (rows, columns)), shape=(len(answers), 3 * classes), dtype=np.float64)


def totals(counts: Counts) -> NDArray[np.float64]:
    """Sum the counts over all questions: (C, 3)."""
    return np.asarray(counts.sum(axis=0), np.float64).reshape(-1, 3)


def precision_recall_f1(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Return precision, recall and F1 of each class, (..., C) each; 0 where nothing was given, or nothing wanted."""
    right, given, wanted = sums[..., 0], sums[..., 1], sums[..., 2]
    return _share(right, given), _share(right, wanted), _share(2 * right, given + wanted)


def micro_f1(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """F1 of all classes taken together."""
    return precision_recall_f1(sums.sum(axis=-2, keepdims=True))[2][..., 0]


def macro_f1(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean F1 of the classes that were wanted or given at least once."""
    there = (sums[..., 1] + sums[..., 2]) > 0
    return _share((precision_recall_f1(sums)[2] * there).sum(-1), there.sum(-1).astype(np.float64))


def f1_values(sums: NDArray[np.float64]) -> dict[str, float]:
    """Return precision, recall, F1 of all classes together, and the mean F1 of the classes."""
    precision, recall, f1 = precision_recall_f1(sums.sum(axis=-2, keepdims=True))
    return {
        "precision": float(precision[0]), "recall": float(recall[0]), "f1": float(f1[0]),
        "macro_f1": float(macro_f1(sums)),
    }  # fmt: skip


def interval(counts: Counts, statistic: Statistic, n: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a statistic, drawing questions with replacement.

    Source: Efron 1979.
    """
    return _quantiles(_resample([counts], lambda sums: statistic(sums[0]), n, seed))


def gain_interval(
    before: Counts, after: Counts, statistic: Statistic, n: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the statistic's difference; both sides answer the questions that were drawn."""
    return _quantiles(_resample([before, after], lambda sums: statistic(sums[1]) - statistic(sums[0]), n, seed))


def permute_pairs(before: Counts, after: Counts, statistic: Statistic, n: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value for "both are equally good", exchanging the two answers of each question at random.

    Returns:
        (1 + exchanges with a difference at least as large) / (1 + n).
    Source: approximate randomisation, Noreen 1989; for F1, Yeh 2000, "More accurate tests for the statistical
        significance of result differences".
    """
    first, second = totals(before), totals(after)
    seen = abs(float(statistic(second) - statistic(first))) - 1e-12
    difference = after - before
    changed = np.flatnonzero(np.diff(sparse.csr_array(difference).indptr))  # where both say the same, nothing moves
    rng = np.random.default_rng(seed)
    extreme = 0
    moved = sparse.csr_array(difference)[changed]
    for block in row_blocks(n, max(len(changed), difference.shape[1])):
        exchanged = rng.integers(0, 2, size=(block.stop - block.start, len(changed))).astype(np.float64)
        shift = np.asarray(exchanged @ moved).reshape(-1, *first.shape)  # (n, Q') @ (Q', 3 C)
        drawn = np.abs(statistic(second - shift) - statistic(first + shift))
        extreme += int(np.count_nonzero(drawn >= seen))
    return (1 + extreme) / (1 + n)


def calibration_error(confidence: NDArray[np.floating[Any]], right: NDArray[np.bool_], bins: int = 15) -> float:
    """Expected calibration error: how far confidence is from the share that is right, over equal bins of confidence.

    Args:
        confidence: (Q,) in [0, 1]. right: (Q,) whether the answer held.
    Source: Guo et al. 2017, "On calibration of modern neural networks", eq. 3, with its 15 bins.
    """
    bin_of = np.clip(np.ceil(np.asarray(confidence, np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)
    size = np.bincount(bin_of, minlength=bins)
    filled = size > 0
    mean_confidence = np.bincount(bin_of, weights=confidence, minlength=bins)[filled] / size[filled]
    share_right = np.bincount(bin_of, weights=right, minlength=bins)[filled] / size[filled]
    return float((np.abs(mean_confidence - share_right) * size[filled]).sum() / len(confidence))


def _share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole > 0)


def _resample(
    sides: Sequence[Counts], statistic: Callable[[list[NDArray[np.float64]]], NDArray[np.float64]], n: int, seed: int
) -> NDArray[np.float64]:
    count, width = sides[0].shape
    rng = np.random.default_rng(seed)
    values = np.empty(n)
    for block in row_blocks(n, max(count, width)):
        times = rng.multinomial(count, np.full(count, 1 / count), size=block.stop - block.start).astype(np.float64)
        values[block] = statistic([np.asarray(times @ side).reshape(len(times), -1, 3) for side in sides])
    return values


def _quantiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
