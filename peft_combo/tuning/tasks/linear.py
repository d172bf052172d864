"""Logistic regression over given features: the baselines of a task, and what its head starts from.

Owns the loss, the same for numpy here and for torch in training, and its minimum. Convex, so no seed plays a part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, sparse
from scipy.special import expit, log_softmax
from torch import Tensor
from torch.nn import functional

Features: TypeAlias = "NDArray[np.float32] | sparse.csr_array[Any, tuple[int, int]]"

# Penalties that are tried, strongest first: each start is the end of the one before.
PENALTIES = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)


@dataclass(frozen=True)
class Targets:
    """What a linear model is to say of N examples.

    Attributes:
        wanted: (N, C) float32 in [0, 1]; rows sum to 1 where one class is right, any values where several may be.
        weights: (N, C) float32; of each term of the loss, one value a row where one class is right.
        exclusive: one class is right (softmax), or each stands for itself (sigmoid).
    """

    wanted: NDArray[np.float32]
    weights: NDArray[np.float32]
    exclusive: bool

    @classmethod
    def of(
        cls, right: NDArray[np.bool_], *, exclusive: bool, smoothing: float = 0.0, balanced: bool = False
    ) -> Targets:
        """Make the targets of (N, C) right classes.

        Args:
            smoothing: this share of each target is spread over all classes. Szegedy et al. 2016, section 7.
            balanced: weigh a class by N / (C N_c); where several may be right, its right examples by wrong / right.
        """
        n, classes = right.shape
        hot = right.astype(np.float32)
        often = np.maximum(right.sum(0), 1)
        if exclusive:
            wanted = hot * (1 - smoothing) + smoothing / classes
            share = n / (classes * often) if balanced else np.ones(classes)
            weights = np.repeat((hot @ share.astype(np.float32))[:, None], classes, axis=1)
        else:
            wanted = hot * (1 - smoothing) + smoothing / 2
            share = (n - often) / often if balanced else np.ones(classes)
            weights = np.where(right, share, 1.0).astype(np.float32)
        return cls(wanted, weights.astype(np.float32), exclusive)

    def take(self, rows: NDArray[np.int64]) -> Targets:
        """Return those of some examples."""
        return Targets(self.wanted[rows], self.weights[rows], self.exclusive)


def compute_linear_loss(logits: Tensor, targets: Targets) -> Tensor:
    """Weighted cross-entropy of (N, C) logits, a scalar: softmax over the classes, or sigmoid of each."""
    wanted = torch.from_numpy(targets.wanted).to(logits.device)
    weights = torch.from_numpy(targets.weights).to(logits.device)
    logits = logits.float()
    if targets.exclusive:
        terms = -(wanted * logits.log_softmax(-1)).sum(-1)
        return (terms * weights[:, 0]).sum() / weights[:, 0].sum()
    return functional.binary_cross_entropy_with_logits(logits, wanted, weight=weights)


@dataclass(frozen=True)
class LinearModel:
    """Attributes:
    weight: (C, D) float32. bias: (C,) float32.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def logits(self, features: Features) -> NDArray[np.float32]:
        """Score features, (N, D) -> (N, C)."""
        scored: NDArray[np.float32] = np.asarray(features @ self.weight.T + self.bias, np.float32)
        return scored


def fit_linear(features: Features, targets: Targets, penalty: float, start: LinearModel | None = None) -> LinearModel:
    """Minimise `compute_linear_loss` plus ``penalty / 2 * s`` times the squared norm of the weights by L-BFGS.

    The biases bear no penalty.

    Args:
        features: (N, D); s is the mean squared length of their rows (dense ones centred), so that their scale is none.
        start: where to begin; only the time depends on it.
    """
    # States of an encoder lie far from the origin, which makes the slope steep along one line: centred, a third fewer
    # steps will do. The bias takes up the difference, and it is not penalised: the minimum is the same.
    centre = np.zeros(features.shape[1], np.float32)
    if isinstance(features, np.ndarray):
        centre = features.mean(0)
        features = features - centre
    penalty *= float((features**2).sum()) / features.shape[0]
    dim = features.shape[1]
    classes = targets.wanted.shape[1]
    wanted = targets.wanted.astype(np.float64)
    scale = targets.weights / (targets.weights[:, :1].sum() if targets.exclusive else targets.weights.size)

    def value_and_gradient(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight, bias = flat[: classes * dim].reshape(classes, dim), flat[classes * dim :]
        logits = np.asarray(features @ weight.T.astype(np.float32), np.float64) + bias
        if targets.exclusive:
            log_share = log_softmax(logits, axis=1)
            value = -float((wanted * log_share * scale).sum())
            residual = (np.exp(log_share) - wanted) * scale
        else:
            value = float(((np.logaddexp(0, logits) - wanted * logits) * scale).sum())
            residual = (expit(logits) - wanted) * scale
        by_feature = np.asarray(features.T @ residual.astype(np.float32), np.float64).T  # (D, N) @ (N, C) -> (C, D)
        value += 0.5 * penalty * float((weight**2).sum())
        return value, np.concatenate([(by_feature + penalty * weight).ravel(), residual.sum(0)])

    first = np.zeros(classes * dim + classes)
    if start is not None:
        first = np.concatenate([start.weight.ravel(), start.bias + start.weight @ centre]).astype(np.float64)
    found = optimize.minimize(
        value_and_gradient,
        first,
        jac=True,
        method="L-BFGS-B",
        # Far enough that what starts from the minimum does not depend on how the features were rounded.
        options={"maxiter": 500, "maxcor": 20, "ftol": 1e-10, "gtol": 1e-6},
    )
    weight = np.asarray(found.x[: classes * dim], np.float32).reshape(classes, dim)
    return LinearModel(weight, np.asarray(found.x[classes * dim :] - weight @ centre, np.float32))


def fit_best_linear(
    features: Features, targets: Targets, held_features: Features, held_targets: Targets
) -> LinearModel:
    """Fit with weaker and weaker penalties while the loss on held-out examples falls; return the last that lowered it.

    Chosen by loss and not by the metric: over some hundred examples a metric is too coarse, and a start whose training
    loss is all but zero would leave tuning nothing to learn from.
    """
    best = (np.inf, LinearModel(np.empty((0, 0), np.float32), np.empty(0, np.float32)))
    model: LinearModel | None = None
    for penalty in PENALTIES:
        model = fit_linear(features, targets, penalty, model)
        loss = float(compute_linear_loss(torch.from_numpy(model.logits(held_features)), held_targets))
        if loss >= best[0]:
            break
        best = (loss, model)
    return best[1]
