"""Small linear models behind estimates: logistic and ridge regression on some dozen columns.

Knows numbers only. The columns should be standardized where a penalty is to mean the same for each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Floats = NDArray[np.float64]


def fit_logistic(
    table: NDArray[np.floating[Any]], labels: NDArray[np.bool_], penalty: float = 1.0, counts: Floats | None = None
) -> Floats:
    """Fit a logistic regression by Newton steps, halved where they overshoot.

    Args:
        table: (M, F). labels: (M,). penalty: half of it times the squared weights is added to the summed loss.
        counts: (M,) how much the loss of each row counts; None for 1 each.
    Returns:
        (F + 1,) the constant, which has no penalty, and a weight for each column.
    """
    full = np.column_stack([np.ones(len(table)), table])
    ridge = np.full(full.shape[1], penalty)
    ridge[0] = 0.0
    counts = np.ones(len(table)) if counts is None else counts

    def loss(at: Floats) -> float:
        logits = full @ at
        return float(counts @ (np.logaddexp(0, logits) - labels * logits) + ridge @ at**2 / 2)

    weights = np.zeros(full.shape[1])
    weights[0] = np.log((counts @ labels + 0.5) / (counts @ ~labels + 0.5))
    value = loss(weights)
    for _ in range(50):
        chance = expit(full @ weights)
        slope = full.T @ (counts * (labels - chance)) - ridge * weights
        root = full * np.sqrt(counts * chance * (1 - chance))[:, None]
        curve = root.T @ root + np.diag(ridge)
        step = np.linalg.solve(curve + 1e-9 * np.eye(len(curve)), slope)
        while (lower := loss(weights + step)) > value and np.abs(step).max() > 1e-9:
            step /= 2
        weights, gain, value = weights + step, value - lower, lower
        if gain < 1e-6 * counts.sum() ** 0.5:
            break
    return weights


def fit_ridge(table: Floats, values: Floats, penalty: float = 1.0) -> Floats:
    """Fit a linear regression: (M, F), (M,) -> (F + 1,), the constant first and without penalty."""
    full = np.column_stack([np.ones(len(table)), table])
    ridge = np.full(full.shape[1], penalty)
    ridge[0] = 0.0
    return np.asarray(np.linalg.solve(full.T @ full + np.diag(ridge + 1e-9), full.T @ values), np.float64)


def predict_linear(table: Floats, weights: Floats) -> Floats:
    """Return the constant and the weighted columns: (M, F), (F + 1,) -> (M,); log-odds of a logistic regression."""
    return np.asarray(table @ weights[1:] + weights[0], np.float64)
