"""Logistic regression: the loss is the textbook's, and the fit is its minimum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import sparse
from torch.nn import functional

from peft_combo.tuning.tasks.linear import PENALTIES, Targets, compute_linear_loss, fit_best_linear, fit_linear

rng = np.random.default_rng(0)
FEATURES = rng.normal(size=(60, 5)).astype(np.float32)
SIZE = float(((FEATURES - FEATURES.mean(0)) ** 2).sum(1).mean())
CLASSES = (FEATURES[:, :3] + rng.normal(size=(60, 3))).argmax(1)
ONE = CLASSES[:, None] == np.arange(3)
MANY = FEATURES[:, :4] + rng.normal(size=(60, 4)) > 0.3


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_torchs_own(smoothing: float) -> None:
    logits = torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    ours = compute_linear_loss(logits, Targets.of(ONE, exclusive=True, smoothing=smoothing))
    theirs = functional.cross_entropy(logits, torch.from_numpy(CLASSES), label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)
    weight = torch.tensor([20 / ONE[:, c].sum() for c in range(3)], dtype=torch.float32)
    balanced = compute_linear_loss(logits, Targets.of(ONE, exclusive=True, balanced=True))
    torch.testing.assert_close(balanced, functional.cross_entropy(logits, torch.from_numpy(CLASSES), weight=weight))


def test_the_loss_of_several_classes_is_torchs_own() -> None:
    logits = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    wanted = torch.from_numpy(MANY).float()
    ours = compute_linear_loss(logits, Targets.of(MANY, exclusive=False))
    torch.testing.assert_close(ours, functional.binary_cross_entropy_with_logits(logits, wanted))
    weight = (60 - wanted.sum(0)) / wanted.sum(0)
    balanced = compute_linear_loss(logits, Targets.of(MANY, exclusive=False, balanced=True))
    theirs = functional.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight)
    torch.testing.assert_close(balanced, theirs)


def test_a_loss_worked_by_hand() -> None:
    # Even logits over two classes: log 2, whatever is right.
    targets = Targets.of(np.array([[True, False]]), exclusive=True, smoothing=0.5)
    assert targets.wanted.tolist() == [[0.75, 0.25]]
    assert compute_linear_loss(torch.zeros(1, 2), targets).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("balanced", [True, False])
def test_the_fit_is_where_the_gradient_is_zero(exclusive: bool, balanced: bool) -> None:
    targets = Targets.of(ONE if exclusive else MANY, exclusive=exclusive, balanced=balanced, smoothing=0.1)
    model = fit_linear(FEATURES, targets, 1e-2 / SIZE)
    weight = torch.from_numpy(model.weight).requires_grad_()
    bias = torch.from_numpy(model.bias).requires_grad_()
    loss = compute_linear_loss(torch.from_numpy(FEATURES) @ weight.T + bias, targets) + 5e-3 * (weight**2).sum()
    loss.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert float(weight.grad.abs().max()) < 2e-4
    assert float(bias.grad.abs().max()) < 2e-4


def test_sparse_features_give_the_same() -> None:
    targets = Targets.of(ONE, exclusive=True)
    dense = fit_linear(FEATURES, targets, 1e-2 / SIZE)
    thin = fit_linear(sparse.csr_array(FEATURES), targets, 1e-2 / float((FEATURES**2).sum(1).mean()))
    np.testing.assert_allclose(thin.weight, dense.weight, atol=1e-3)


def test_it_agrees_with_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    theirs = sklearn.LogisticRegression(C=1 / (0.01 * len(CLASSES)), tol=1e-6, max_iter=1000).fit(FEATURES, CLASSES)
    ours = fit_linear(FEATURES, Targets.of(ONE, exclusive=True), 0.01 / SIZE)
    np.testing.assert_allclose(ours.weight, theirs.coef_, atol=2e-3)


def test_the_penalty_is_chosen_by_the_loss_on_held_out_examples() -> None:
    targets = Targets.of(ONE, exclusive=True)
    # Noise as labels: whatever is learned is wrong elsewhere, so the strongest penalty is best.
    noise = Targets.of(np.roll(ONE, 7, axis=0), exclusive=True)
    shy = fit_best_linear(FEATURES, targets, FEATURES, noise)
    np.testing.assert_array_equal(shy.weight, fit_linear(FEATURES, targets, PENALTIES[0]).weight)
    # Held out what was learned from: the weakest.
    bold = fit_best_linear(FEATURES, targets, FEATURES, targets)
    assert (bold.weight**2).sum() > (shy.weight**2).sum()
    weakest = fit_linear(FEATURES, targets, PENALTIES[-1])
    np.testing.assert_allclose(bold.logits(FEATURES), weakest.logits(FEATURES), atol=0.3)


def test_the_scale_of_the_features_does_not_matter() -> None:
    targets = Targets.of(ONE, exclusive=True)
    small, large = fit_linear(FEATURES, targets, 1e-3), fit_linear(FEATURES * 100 + 7, targets, 1e-3)
    np.testing.assert_allclose(large.logits(FEATURES * 100 + 7), small.logits(FEATURES), atol=0.02)
