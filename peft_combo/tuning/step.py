"""Training step: forward and backward passes, and the extensions of a recipe around them.

Owns the seam at which adversarial training, R-Drop, weight averaging and text augmentation stand: the loop asks a
`StepExtensions` at four moments and knows none of them by name. `extensions.build_extensions` makes one of a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from torch import Tensor, nn

from peft_combo.tuning.item_encoder import Selection
from peft_combo.tuning.tasks.base import Batch

ChooseTexts: TypeAlias = Callable[[Selection, int], Selection]
"""Before the forward pass: which texts a batch is shown in place of its own, drawn by a seed."""

ComputeLoss: TypeAlias = Callable[[Callable[[int], Tensor], Callable[[Tensor], Tensor], int], Tensor]
"""In the forward pass: the scalar loss, of what predicts with the dropout masks of a seed, the task's loss, a seed."""


class ForwardPass(Protocol):
    """The model that learns, as an extension sees it; `model.TrainingModel` is one."""

    def __call__(self, batch: Batch, seed: int, added: Tensor | None = None) -> Tensor:
        """Return the scalar loss of a batch; `added` goes onto the states that enter the layers that learn."""

    def entering_states(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
        """Return these states, (S, D), and which text each is of, (S,)."""


@dataclass(frozen=True, eq=False)
class Passes:
    """Forward and backward passes of a run.

    Attributes:
        bare: the model itself; its gradients are no other process's business.
        prepared: what is called to learn: `bare`, or what accelerate made of it.
        backward: takes a scalar loss and adds its gradients to the weights.
    """

    bare: ForwardPass
    prepared: nn.Module
    backward: Callable[[Tensor], None]

    def learn(self, batch: Batch, seed: int, added: Tensor | None = None, weight: float = 1.0) -> float:
        """Add the gradients of `weight` times the loss of a batch, and return that much of the loss."""
        loss: Tensor = weight * self.prepared(batch, seed, added)
        self.backward(loss)
        return float(loss.detach())


AddGradients: TypeAlias = Callable[[Passes, Batch, int], float]
"""Around the backward pass: adds the gradients of one micro-batch, and returns its loss."""


class WeightCopy(Protocol):
    """After the step: a second copy of the weights, that may stand in for them in an evaluation."""

    @property
    def count(self) -> int:
        """Points it was made of; 0 while it is none."""

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """Name -> tensor; empty while there is none."""

    def after_step(self, share: float, evaluated: bool) -> None:
        """Take in the weights; `share` of the run is done, and they are `evaluated` now or not."""

    def for_evaluation(self) -> AbstractContextManager[None]:
        """Let the copy stand in for the weights."""

    def keep(self) -> None:
        """Let the copy be the weights from now on."""

    def load(self, mean: Mapping[str, Tensor], count: int) -> None:
        """Go on from a checkpoint."""


class NoWeightCopy:
    """The weights as they are."""

    count = 0

    @property
    def mean(self) -> Mapping[str, Tensor]:
        return {}

    def after_step(self, share: float, evaluated: bool) -> None:
        pass

    def for_evaluation(self) -> AbstractContextManager[None]:
        return nullcontext()

    def keep(self) -> None:
        pass

    def load(self, mean: Mapping[str, Tensor], count: int) -> None:
        pass


def keep_texts(selection: Selection, seed: int) -> Selection:
    """Show every text as it is."""
    return selection


def predict_once(predict: Callable[[int], Tensor], loss: Callable[[Tensor], Tensor], seed: int) -> Tensor:
    """Return the task's loss of one prediction."""
    return loss(predict(seed))


def pass_once(passes: Passes, batch: Batch, seed: int) -> float:
    """Add the gradients of one plain pass."""
    return passes.learn(batch, seed)


@dataclass(frozen=True, eq=False)
class StepExtensions:
    """What stands around a step; as it is made without arguments, a plain forward and backward pass.

    Attributes:
        choose_texts: before the forward pass. compute_loss: in it. add_gradients: around the backward pass.
        weights: after the step, and for evaluation.
    """

    choose_texts: ChooseTexts = keep_texts
    compute_loss: ComputeLoss = predict_once
    add_gradients: AddGradients = pass_once
    weights: WeightCopy = field(default_factory=NoWeightCopy)
