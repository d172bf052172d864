"""Adversarial training: FGM, PGD and FreeLB over perturbations of the states that enter the layers that learn.

Knows neither tasks nor methods; what a pass is worth is the model's business.

Source: Miyato et al. 2017 (fgm); Madry et al. 2018 (pgd); Zhu et al. 2020, "FreeLB".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from peft_combo.recipe.model import Adversarial, TrainingConfig
from peft_combo.tuning.seeds import mix_seed
from peft_combo.tuning.step import Passes
from peft_combo.tuning.tasks.base import Batch


@dataclass(frozen=True, eq=False)
class Perturbation:
    """What is added to the states of some texts' tokens where they enter the layers that learn.

    Attributes:
        added: (S, D) float32, without padding; a leaf, so that a backward pass leaves its gradient in it.
        text: (S,) which text each token is of, from 0.
        sizes: (K,) Euclidean length of all states of each text together.
    """

    added: Tensor
    text: Tensor
    sizes: Tensor

    @classmethod
    def around(cls, states: Tensor, text: Tensor) -> Perturbation:
        """Return a perturbation of nothing of (S, D) states, of the texts (S,)."""
        zero = cls(torch.zeros_like(states).requires_grad_(True), text, states.new_zeros(int(text.max()) + 1))
        return cls(zero.added, text, zero.lengths(states))

    def lengths(self, states: Tensor) -> Tensor:
        """Return the Euclidean length of each text's part: (S, D) -> (K,)."""
        return torch.zeros_like(self.sizes).index_add_(0, self.text, states.square().sum(1)).sqrt()


def add_adversarial_gradients(config: Adversarial, passes: Passes, batch: Batch, seed: int) -> float:
    """Add the gradients of the mean loss over all passes, and return that loss; see `step.AddGradients`."""
    found = Perturbation.around(*passes.bare.entering_states(batch, seed))
    match config.kind:
        case "fgm":
            clean = passes.learn(batch, seed, found.added, 0.5)
            _ascend(found, config.epsilon, config.epsilon)
            return clean + passes.learn(batch, seed, found.added, 0.5)
        case "pgd":
            clean = passes.learn(batch, seed, weight=0.5)
            _scatter(found, config, mix_seed(seed, 1))
            for _ in range(config.steps):
                # The bare model: no other process has to know of these gradients.
                (found.added.grad,) = torch.autograd.grad(passes.bare(batch, seed, found.added), found.added)
                _ascend(found, config.step_size * config.epsilon, config.epsilon)
            return clean + passes.learn(batch, seed, found.added, 0.5)
        case "freelb":
            _scatter(found, config, mix_seed(seed, 1))
            loss = 0.0
            for _ in range(config.steps):
                loss += passes.learn(batch, seed, found.added, 1 / config.steps)
                _ascend(found, config.step_size * config.epsilon, config.epsilon)
            return loss
        case _:
            assert_never(config.kind)


def count_passes(config: TrainingConfig) -> int:
    """Return how many forward and backward passes a micro-batch takes."""
    if config.adversarial is None:
        return 1
    return {"fgm": 2, "pgd": 2 + config.adversarial.steps, "freelb": config.adversarial.steps}[config.adversarial.kind]


@torch.no_grad()
def _ascend(perturbation: Perturbation, length: float, most: float) -> None:
    """Move each text's part along its gradient; lengths are shares of the length of its states."""
    gradient = perturbation.added.grad
    assert gradient is not None
    along = length * perturbation.sizes / perturbation.lengths(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
    perturbation.added.add_(along[perturbation.text, None] * gradient)
    _shorten(perturbation, most)
    perturbation.added.grad = None


@torch.no_grad()
def _scatter(perturbation: Perturbation, config: Adversarial, seed: int) -> None:
    """Start from somewhere within the ball, drawn evenly in each coordinate. Source: Zhu et al. 2020, alg. 1."""
    generator = torch.Generator(perturbation.added.device).manual_seed(seed)
    perturbation.added.uniform_(-1, 1, generator=generator)
    # A text's part of n numbers has length sqrt(n) at most, so this is the radius.
    numbers = torch.bincount(perturbation.text, minlength=len(perturbation.sizes)) * perturbation.added.shape[1]
    perturbation.added.mul_((config.epsilon * perturbation.sizes / numbers.sqrt())[perturbation.text, None])


@torch.no_grad()
def _shorten(perturbation: Perturbation, most: float) -> None:
    limit = (
        most
        * perturbation.sizes
        / perturbation.lengths(perturbation.added).clamp_min(torch.finfo(perturbation.added.dtype).tiny)
    )
    perturbation.added.mul_(limit.clamp_max(1.0)[perturbation.text, None])
