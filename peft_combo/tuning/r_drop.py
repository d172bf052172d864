"""R-Drop: two predictions with different dropout masks, and a penalty on their disagreement.

Source: Liang et al. 2021, "R-Drop: regularized dropout for neural networks", eq. 2.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from peft_combo.tuning.seeds import mix_seed


def compute_r_drop_loss(
    weight: float, exclusive: bool, predict: Callable[[int], Tensor], loss: Callable[[Tensor], Tensor], seed: int
) -> Tensor:
    """Return the mean loss of two predictions, and `weight` times what they disagree by; see `step.ComputeLoss`."""
    first = predict(seed)
    loss_of_first = loss(first)
    second = predict(mix_seed(seed, 1))
    return (loss_of_first + loss(second)) / 2 + weight * compute_disagreement(first, second, exclusive)


def compute_disagreement(first: Tensor, second: Tensor, exclusive: bool) -> Tensor:
    """Return the mean over queries of the symmetric Kullback-Leibler divergence of two predictions, in nats.

    Args:
        first, second: (Q, C) log-odds, or (Q,) where each query is a yes or no.
        exclusive: whether a row is one softmax; else each number is a sigmoid of its own, and their divergences add up.
    """
    if exclusive:
        one, two = first.log_softmax(-1), second.log_softmax(-1)
        apart = (one.exp() - two.exp()) * (one - two)
    else:
        apart = (first.sigmoid() - second.sigmoid()) * (first - second)
    return 0.5 * apart.sum() / len(first)
