"""Binary probability metrics: AUC with bootstrap draws, log-loss, Platt scaling and reliability diagrams."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy.special import expit
from scipy.stats import rankdata

_BINS = 15


def auc(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Return how often a right pair scores above a wrong one, ties for half; 0.5 where either kind is absent.

    Source: Mann and Whitney 1947; Hanley and McNeil 1982.
    """
    positive, negative = int(right.sum()), int((~right).sum())
    if not positive or not negative:
        return 0.5
    return float((rankdata(scores)[right].sum() - positive * (positive + 1) / 2) / (positive * negative))


def auc_draws(
    scores: NDArray[np.float64], right: NDArray[np.bool_], users: NDArray[np.int64], n: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """Return `auc` of `n` samples of whole users, drawn with replacement: (P,), (P,), (P,) whose pairs -> (n,).

    Two scorers asked about the same pairs meet the same samples, so their differences draw an interval.

    Source: Field and Welsh 2007, "Bootstrapping clustered data".
    """
    place = np.unique(scores, return_inverse=True)[1]
    owners = np.unique(users, return_inverse=True)[1]
    count = int(owners.max()) + 1
    rng = np.random.default_rng(seed)
    found = np.full(n, 0.5)
    for draw in range(n):
        times = rng.multinomial(count, np.full(count, 1 / count))[owners].astype(np.float64)
        positive, negative = (np.bincount(place, weights=times * part) for part in (right, ~right))
        total = positive.sum() * negative.sum()
        if total:
            found[draw] = positive @ (np.cumsum(negative) - negative / 2) / total
    return found


def log_losses(logits: NDArray[np.float64], targets: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the binary cross-entropy of each pair in nats: (P,) log-odds and targets in [0, 1] -> (P,)."""
    return np.asarray(np.logaddexp(0, logits) - targets * logits, np.float64)


def platt(scores: NDArray[np.float64], targets: NDArray[np.float32]) -> tuple[float, float]:
    """Fit slope and constant that turn scores into log-odds with the least log-loss.

    Source: Platt 1999, "Probabilistic outputs for support vector machines", without his change of the targets.
    """
    middle, spread = float(scores.mean()), float(scores.std()) or 1.0
    scaled = (scores - middle) / spread

    def loss(at: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = at[0] * scaled + at[1]
        error = expit(logits) - targets
        # A breath of shrinkage keeps the slope finite where scores tell all pairs apart.
        value = log_losses(logits, targets).mean() + 1e-6 * float(at @ at)
        return float(value), np.array([(error * scaled).mean(), error.mean()]) + 2e-6 * at

    slope, constant = optimize.minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B").x
    return float(slope / spread), float(constant - slope * middle / spread)


def reliability(
    confidence: NDArray[np.float64], targets: NDArray[np.float32], bins: int = _BINS
) -> tuple[tuple[float, ...], ...]:
    """Return the bins of the calibration error that hold pairs: from, to, pairs, mean score, mean target.

    Source: Guo et al. 2017, "On calibration of modern neural networks", eq. 1 and 2; bins as in `calibration_error`.
    """
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    rows = []
    for number in np.unique(place):
        own = place == number
        edges = (round(float(number / bins), 3), round(float((number + 1) / bins), 3))
        rows.append((*edges, int(own.sum()), float(confidence[own].mean()), float(targets[own].mean())))
    return tuple(rows)


def by_user(values: NDArray[np.float64], users: NDArray[np.int64]) -> NDArray[np.float64]:
    """Average what each user has, (L,) -> (U,), users ascending."""
    codes = np.unique(users, return_inverse=True)[1]
    return np.asarray(np.bincount(codes, weights=values) / np.bincount(codes), np.float64)
