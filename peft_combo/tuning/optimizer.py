"""Learning-rate schedule and optimizer: parameter groups, layer-wise decay, gradual unfreezing.

Owns the groups of weights, their peak rates, the course of the rate and who waits at the start. Knows no task and
takes no step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, assert_never

import torch
from torch import nn

from peft_combo.encoder.architectures import find_layer_number
from peft_combo.encoder.heads.base import TaskHead
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.errors import TuningError
from peft_combo.recipe.model import Freezing, TrainingConfig

Schedule: TypeAlias = Callable[[TrainingConfig, int, int], float]
"""Turns the recipe's section, an optimizer step from 0 and their total into the share of the peak learning rate."""


@dataclass(frozen=True, eq=False)
class Group:
    """Weights that are moved alike.

    Attributes:
        rate: their peak learning rate. decay: their weight decay.
        waits: share of the run for which they stay as they are.
    """

    parameters: list[nn.Parameter]
    rate: float
    decay: float
    waits: float = 0.0

    def rate_at(self, factor: float, step: int, total: int) -> float:
        """Return the learning rate of optimizer step `step`, of the schedule's share `factor`; 0 while they wait."""
        return 0.0 if step < self.waits * total else self.rate * factor


def build_parameter_groups(config: TrainingConfig, attached: AttachedAdapter, head: TaskHead) -> list[Group]:
    """Divide what learns; a head's vectors and scalars are not decayed.

    What is in no layer (prompts, the embeddings of tokens) learns at the full rate, and gradual freezing passes it by.

    Raises:
        TuningError: nothing would learn, or layers are to join one by one and only one learns.
    """
    groups = [group for group in _adapter_groups(config, attached) if group.parameters]
    head_rate = config.head_learning_rate if config.head_learning_rate is not None else config.learning_rate
    learning = [p for p in head.parameters() if p.requires_grad]
    for decayed in (True, False):
        own = [p for p in learning if (p.ndim >= 2) == decayed]
        if own:
            groups.append(Group(own, head_rate, config.weight_decay if decayed else 0.0))
    if not groups:
        raise TuningError(
            "Nothing would learn: the method trains no weights and the head has none. Set task.projection: linear or "
            "use another adapter.method."
        )
    return groups


def _adapter_groups(config: TrainingConfig, attached: AttachedAdapter) -> list[Group]:
    layer_of = {id(p): find_layer_number(attached.inner, name) for name, p in attached.trainable().items()}
    layers = sorted({layer for layer in layer_of.values() if layer is not None}, reverse=True)  # the top one first
    freezing = config.freezing
    if freezing is not None and freezing.schedule == "gradual" and len(layers) < 2:
        raise TuningError(
            f"training.freezing: gradual lets layers join one by one, and {len(layers)} of this encoder learns. Raise "
            "adapter.top_layers, or take schedule: head-first."
        )
    groups = []
    for group in attached.groups():
        decay = config.weight_decay if group.decayed else 0.0
        for place, layer in enumerate([*layers, None]):
            own = [p for p in group.parameters if layer_of[id(p)] == layer]
            depth = 0 if layer is None else layers[0] - layer
            rate = config.learning_rate * group.rate * config.layer_decay**depth
            groups.append(Group(own, rate, decay, _waits(freezing, None if layer is None else place, len(layers))))
    return groups


def _waits(freezing: Freezing | None, place: int | None, layers: int) -> float:
    """Return for which share of the run a layer waits: the top one is number 0, what is in no layer None."""
    if freezing is None:
        return 0.0
    match freezing.schedule:
        case "head-first":
            return freezing.share
        case "gradual":
            return 0.0 if place is None else freezing.share * place / (layers - 1)
        case _:
            assert_never(freezing.schedule)


def build_optimizer(config: TrainingConfig, groups: list[Group]) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over these groups."""
    own: list[dict[str, Any]] = [
        {"params": group.parameters, "lr": group.rate, "weight_decay": group.decay} for group in groups
    ]
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(own)
        case "sgd":
            return torch.optim.SGD(own, momentum=config.momentum)
        case "adafactor":
            return torch.optim.Adafactor(own)
        case _:
            assert_never(config.optimizer)


def learning_rate_factor(config: TrainingConfig, step: int, total: int) -> float:
    """Return the share of the peak learning rate at optimizer step `step`, counted from 0."""
    warmup = config.warmup_fraction * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    course = (step - warmup) / max(1.0, total - warmup)
    match config.schedule:
        case "linear":
            return 1 - course
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * course))
        case "constant":
            return 1.0
        case _:
            assert_never(config.schedule)
