"""What a run is going to do and need, and the probe that says whether it would learn at all.

Owns the plan and its figures. Nothing here changes a weight.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from peft_combo.architectures import set_training
from peft_combo.backbone import Backbone
from peft_combo.errors import TuningError
from peft_combo.item_encoder import ItemEncoder
from peft_combo.methods import AttachedAdapter
from peft_combo.recipe import Recipe
from peft_combo.tasks.base import AnyTask, TaskHead


@dataclass(frozen=True)
class Plan:
    """What a run is going to do and need, known before its first step.

    Attributes:
        metric: the validation metric that is watched.
        items: texts, equal ones counted each. examples: of each part, in `unit` (bundles, texts).
    """

    recipe: str
    category: str
    method: str
    device: str
    processes: int
    precision: str
    task: str
    metric: str
    items: int
    unit: str
    examples: Mapping[str, int]
    adapter_parameters: int
    head_parameters: int
    frozen_parameters: int
    epochs: int
    steps: int
    cached_mib: float
    memory_mib: float
    seconds: float

    def line(self) -> str:
        """Return the plan on one line."""
        share = self.adapter_parameters / max(1, self.frozen_parameters + self.adapter_parameters)
        return (
            f"{self.method}: {self.adapter_parameters:,} adapter + {self.head_parameters:,} head parameters train "
            f"({share:.2%} of the encoder beside {self.frozen_parameters:,} frozen), {self.steps:,} steps in "
            f"{self.epochs} epochs over {self.examples['train']:,} {self.unit}, "
            f"about {self.memory_mib / 1024:.1f} GiB, about {duration(self.seconds)} "
            f"on {self.processes} x {self.device} ({self.precision})"
        )


def probe(trainee: nn.Module, attached: AttachedAdapter, head: TaskHead, task: AnyTask, recipe: Recipe) -> float:
    """Make sure that every trained tensor gets a gradient, and return the seconds of a forward and backward pass.

    All trained tensors are moved off their start first: a LoRA whose B is zero gives A no gradient, and a method that
    the encoder silently ignores would look just like it.
    """
    trained = {**{f"adapter: {k}": p for k, p in attached.trainable().items()},
               **{f"head: {k}": p for k, p in head.named_parameters() if p.requires_grad}}  # fmt: skip
    start = {name: p.detach().clone() for name, p in trained.items()}
    set_training(attached.inner, attached.cut, False)
    head.eval()
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = task.batch(0, 0, recipe.training.accumulation)
    seconds = 0.0
    for _ in range(2):  # the first pass also pays for memory that the second finds ready
        trainee.zero_grad(set_to_none=True)
        clock = time.perf_counter()
        trainee(batch, recipe.seed).backward()
        seconds = time.perf_counter() - clock
    silent = [name for name, p in trained.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
    trainee.zero_grad(set_to_none=True)
    if silent:
        raise TuningError(
            f"{len(silent)} of {len(trained)} trained tensors get no gradient, so they would be stored untrained: "
            f"{', '.join(silent[:3])}{' ...' if len(silent) > 3 else ''}. The method {recipe.adapter.method} does not "
            f"reach this encoder's output; use another method or other adapter.targets."
        )
    return seconds


def plan_of(
    recipe: Recipe, accelerator: Accelerator, backbone: Backbone, attached: AttachedAdapter, head: TaskHead,
    items: ItemEncoder, task: AnyTask, total: int, seconds: float,
) -> Plan:  # fmt: skip
    """Put the plan together, after the probe: the memory it has seen is the run's."""
    return Plan(
        recipe=recipe.name,
        category=recipe.category,
        method=recipe.adapter.method,
        device=accelerator.device.type,
        processes=accelerator.num_processes,
        precision={"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
        + (f", {backbone.quantization} frozen weights" if backbone.quantization != "none" else ""),
        task=recipe.task.kind,
        metric=recipe.metric,
        items=len(task.texts),
        unit=task.unit,
        examples=task.examples,
        adapter_parameters=sum(p.numel() for p in attached.trainable().values()),
        head_parameters=sum(p.numel() for p in head.parameters() if p.requires_grad),
        frozen_parameters=sum(p.numel() for p in backbone.model.parameters()),
        epochs=recipe.training.epochs,
        steps=total,
        cached_mib=items.cached_bytes / 2**20,
        memory_mib=peak_mib(),  # the probe has gone through a whole step, so the peak so far is that of the run
        seconds=seconds,
    )


def peak_mib() -> float:
    """Return the peak memory so far in MiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return 0.0
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def duration(seconds: float) -> str:
    """Return seconds the way people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
