"""What one micro-batch adds to the gradients: a plain pass, or several over pushed states.

Owns adversarial training. Knows neither tasks nor methods; what a pass is worth is the trainee's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import torch
from torch import Tensor, nn

from peft_combo.recipe.model import Adversarial, TrainingConfig
from peft_combo.tuning.item_encoder import Push
from peft_combo.tuning.model import Trainee, mixed
from peft_combo.tuning.tasks.base import Batch


class Objective:
    """Runs the passes of a micro-batch.

    Args:
        model: what is called with batch, seed and push: `trainee`, or what accelerate made of it.
        backward: takes a scalar loss and adds its gradients to the weights.
    """

    def __init__(
        self, config: TrainingConfig, trainee: Trainee, model: nn.Module, backward: Callable[[Tensor], None]
    ) -> None:
        self._adversarial = config.adversarial
        self._trainee = trainee
        self._model = model
        self._backward = backward

    def add_gradients(self, batch: Batch, seed: int) -> float:
        """Add the gradients of the mean loss over all passes, and return that loss."""
        config = self._adversarial
        if config is None:
            return self._learn(batch, seed, None, 1.0)
        push = self._trainee.pushed(batch, seed)
        match config.kind:
            case "fgm":
                clean = self._learn(batch, seed, push, 0.5)
                _ascend(push, config.epsilon, config.epsilon)
                return clean + self._learn(batch, seed, push, 0.5)
            case "pgd":
                clean = self._learn(batch, seed, None, 0.5)
                _scatter(push, config, mixed(seed, 1))
                for _ in range(config.steps):
                    # The bare trainee: no other process has to know of these gradients.
                    (push.added.grad,) = torch.autograd.grad(self._trainee(batch, seed, push), push.added)
                    _ascend(push, config.step_size * config.epsilon, config.epsilon)
                return clean + self._learn(batch, seed, push, 0.5)
            case "freelb":
                _scatter(push, config, mixed(seed, 1))
                loss = 0.0
                for _ in range(config.steps):
                    loss += self._learn(batch, seed, push, 1 / config.steps)
                    _ascend(push, config.step_size * config.epsilon, config.epsilon)
                return loss
            case _:
                assert_never(config.kind)

    def _learn(self, batch: Batch, seed: int, push: Push | None, weight: float) -> float:
        loss: Tensor = weight * self._model(batch, seed, push)
        self._backward(loss)
        return float(loss.detach())


def passes_of(config: TrainingConfig) -> int:
    """Return how many forward and backward passes a micro-batch takes."""
    if config.adversarial is None:
        return 1
    return {"fgm": 2, "pgd": 2 + config.adversarial.steps, "freelb": config.adversarial.steps}[config.adversarial.kind]


@torch.no_grad()
def _ascend(push: Push, length: float, most: float) -> None:
    """Move each text's part along its gradient; lengths are shares of the length of its states."""
    gradient = push.added.grad
    assert gradient is not None
    along = length * push.sizes / push.lengths(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
    push.added.add_(along[push.text, None] * gradient)
    _shorten(push, most)
    push.added.grad = None


@torch.no_grad()
def _scatter(push: Push, config: Adversarial, seed: int) -> None:
    """Start from somewhere within the ball, drawn evenly in each coordinate. Source: Zhu et al. 2020, alg. 1."""
    generator = torch.Generator(push.added.device).manual_seed(seed)
    push.added.uniform_(-1, 1, generator=generator)
    # A text's part of n numbers has length sqrt(n) at most, so this is the radius.
    numbers = torch.bincount(push.text, minlength=len(push.sizes)) * push.added.shape[1]
    push.added.mul_((config.epsilon * push.sizes / numbers.sqrt())[push.text, None])


@torch.no_grad()
def _shorten(push: Push, most: float) -> None:
    limit = most * push.sizes / push.lengths(push.added).clamp_min(torch.finfo(push.added.dtype).tiny)
    push.added.mul_(limit.clamp_max(1.0)[push.text, None])
