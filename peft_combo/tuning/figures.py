"""Figures of a run: what it will do and need, and whether this machine has it.

Owns the plan and how it is put together, whether its figures were estimated before the run (`plan.plan`) or measured on
what the run has loaded (`setup`).
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.machine import available_memory
from peft_combo.recipe.model import Recipe, TrainingConfig
from peft_combo.tuning.resources import duration, resident_mib
from peft_combo.tuning.tasks.base import AnyTask

_FLOAT = 4  # bytes
# Parts of the trained weights' size that stand beside them: a gradient, and the best copy so far.
_BESIDE = 2
_OPTIMIZER_STATE = {"adamw": 2, "sgd": 1, "adafactor": 0}


@dataclass(frozen=True)
class Memory:
    """MiB that one process takes.

    Attributes:
        base: interpreter, libraries and data.
        frozen: the encoder's weights as they are kept; `loading` what they take while they are read.
        trained: adapter and head, each with gradients, optimizer state and the best copy so far.
        step: what a forward pass keeps for the backward pass, for the heaviest micro-batch; on a GPU all that a step
            takes at its peak.
        cached: states of the layers below the adapter, where they are kept in memory, the GPU's where there is one.
        vectors: the whole catalogue, encoded. evaluation: what ranking it takes on top.
        allocator: what passes through the encoder take beyond that and the allocator does not give back; on a GPU the
            workspace of its matrix products.
        gpu: whether weights, states and steps are on a GPU, so that `host` does not hold them.
    """

    base: float
    frozen: float
    loading: float
    trained: float
    step: float
    cached: float
    vectors: float
    evaluation: float
    allocator: float
    gpu: bool = False

    @property
    def host(self) -> float:
        """Peak of the process's own memory."""
        if self.gpu:
            return self.base + max(self.loading, self.vectors)
        held = self.frozen + self.trained + self.cached + self.allocator
        return self.base + max(self.loading, held + max(self.step, self.vectors + self.evaluation))

    @property
    def device(self) -> float:
        """Peak of the GPU's memory; 0 without one."""
        held = self.frozen + self.trained + self.cached + self.allocator
        return held + max(self.step, self.evaluation) if self.gpu else 0.0


@dataclass(frozen=True)
class Disk:
    """MiB on disk: `checkpoints` while it runs (the last and the next), the `adapter` for good, `scratch` where the
    cache of lower layers does not fit into memory, and `vectors` once the catalogue is encoded with the adapter."""

    checkpoints: float
    adapter: float
    scratch: float
    vectors: float


@dataclass(frozen=True)
class Plan:
    """What a run is going to do and need, known before its first step.

    Attributes:
        metric: the validation metric that is watched.
        items: texts, equal ones counted each. examples: of each part, in `unit` (bundles, texts).
        steps: optimizer steps, of which the first `warmup_steps` raise the learning rate.
        evaluations: how often validation is asked.
        seconds: estimate of the whole run, without early stopping.
        notes: what was noticed of the base and the data. advice: what the figures say against the recipe as it stands.
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
    warmup_steps: int
    schedule: str
    evaluations: int
    memory: Memory
    disk: Disk
    seconds: float
    notes: tuple[str, ...]
    advice: tuple[str, ...]

    def line(self) -> str:
        """Return the plan on one line."""
        share = self.adapter_parameters / max(1, self.frozen_parameters + self.adapter_parameters)
        return (
            f"{self.method}: {self.adapter_parameters:,} adapter + {self.head_parameters:,} head parameters train "
            f"({share:.2%} of the encoder beside {self.frozen_parameters:,} frozen), {self.steps:,} steps in "
            f"{self.epochs} epochs over {self.examples['train']:,} {self.unit}, "
            f"about {(self.memory.device or self.memory.host) / 1024:.1f} GiB, about {duration(self.seconds)} "
            f"on {self.processes} x {self.device} ({self.precision})"
        )

    def shortfalls(
        self, recipe: Recipe, run_folder: Path, max_memory_gib: float | None = None, max_minutes: float | None = None
    ) -> tuple[str, ...]:
        """Say what the run would not have enough of, each with a remedy; nothing where it fits.

        Args:
            max_memory_gib: a limit beside what the machine has.
            max_minutes: the longest the run may take.
        """
        found = []
        needed, available = self.memory.host, available_memory()
        if self.memory.gpu:
            free = torch.cuda.mem_get_info()[0] / 2**20
            if self.memory.device > free:
                found.append(_short("GPU memory", self.memory.device, free, self._lower()))
        if available is not None:
            available += resident_mib()  # the run comes after this process, not beside it
            if needed > available:
                found.append(_short("memory", needed, available, self._lower()))
        limited = self.memory.device or needed
        if max_memory_gib is not None and limited > max_memory_gib * 1024:
            found.append(_short("memory under --max-memory-gib", limited, max_memory_gib * 1024, self._lower()))
        wanted: dict[int, tuple[Path, float]] = {}  # by file system, which the places may share
        for place, size in (
            (run_folder, self.disk.checkpoints), (Path(recipe.store), self.disk.adapter),
            (Path(tempfile.gettempdir()), self.disk.scratch),
        ):  # fmt: skip
            near = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.is_dir())
            first, total = wanted.get(near.stat().st_dev, (near, 0.0))
            wanted[near.stat().st_dev] = first, total + size
        for near, total in wanted.values():
            room = shutil.disk_usage(near).free / 2**20
            if total > room:
                found.append(_short(f"disk at {near}", total, room, "Free some space."))
        if max_minutes is not None and self.seconds > max_minutes * 60:
            found.append(
                f"Expected at most {max_minutes:g} minutes (--max-minutes), the estimate is {duration(self.seconds)}. "
                "Lower training.epochs, or adapt fewer layers (adapter.top_layers)."
            )
        return tuple(found)

    def _lower(self) -> str:
        """Name what would lower the largest part of the memory."""
        remedies = {
            "step": "Raise training.accumulation: it divides the batch.",
            "frozen": "Set backbone.quantization to 8bit or 4bit.",
            "trained": "Take a method that trains fewer weights, such as lora.",
            "cached": "Lower training.cache_limit_mib: the rest goes to disk.",
            "evaluation": "Narrow the catalogue (data.category_filter).",
            "vectors": "Narrow the catalogue (data.category_filter).",
        }
        return remedies[max(remedies, key=lambda name: float(getattr(self.memory, name)))]


def _short(what: str, needed: float, there: float, remedy: str) -> str:
    return f"Expected {needed / 1024:.2f} GiB of {what}, found {there / 1024:.2f} GiB. {remedy}"


@dataclass(frozen=True)
class ComputeSetting:
    """Where a run computes, and the parameters it counts there; of `precision` as the recipe or accelerate names it."""

    device: str
    processes: int
    precision: str
    frozen_parameters: int
    head_parameters: int


@dataclass(frozen=True)
class Costs:
    """What was measured or estimated of a run; sizes in MiB.

    Attributes:
        base, frozen, loading, step, vectors, evaluation, allocator: see `Memory`.
        states: those of the layers below the adapter, in memory or on disk.
        seconds: of the whole run.
    """

    base: float
    frozen: float
    loading: float
    step: float
    states: float
    vectors: float
    evaluation: float
    allocator: float
    seconds: float


def build_plan(recipe: Recipe, task: AnyTask, attached: AttachedAdapter, setting: ComputeSetting, costs: Costs) -> Plan:
    """Put a plan together from what was counted and measured: before a run, or on what it has loaded."""
    training = recipe.training
    # AdaLoRA's count of its own ranks is no trained number, though shapes alone say so.
    adapter = sum(p.numel() for name, p in attached.trainable().items() if "ranknum" not in name)
    trained = _FLOAT * (adapter + setting.head_parameters) / 2**20
    optimizer = _OPTIMIZER_STATE[training.optimizer]
    steps = task.per_epoch * training.epochs
    in_memory = costs.states if costs.states <= training.cache_limit_mib else 0.0
    return Plan(
        recipe=recipe.name,
        category=recipe.category,
        method=recipe.adapter.method,
        device=setting.device,
        processes=setting.processes,
        precision={"no": "fp32"}.get(setting.precision, setting.precision)
        + (f", {recipe.backbone.quantization} frozen weights" if recipe.backbone.quantization != "none" else ""),
        task=recipe.task.kind,
        metric=recipe.metric,
        items=len(task.texts),
        unit=task.unit,
        examples=task.examples,
        adapter_parameters=adapter,
        head_parameters=setting.head_parameters,
        frozen_parameters=setting.frozen_parameters,
        epochs=training.epochs,
        steps=steps,
        warmup_steps=math.ceil(training.warmup_fraction * steps),
        schedule=training.schedule,
        evaluations=count_evaluations(training, task.per_epoch),
        memory=Memory(
            base=costs.base, frozen=costs.frozen, loading=costs.loading, trained=(1 + _BESIDE + optimizer) * trained,
            step=costs.step, cached=in_memory, vectors=costs.vectors, evaluation=costs.evaluation,
            allocator=costs.allocator, gpu=setting.device != "cpu",
        ),
        disk=Disk(
            checkpoints=2 * (2 + optimizer) * trained, adapter=trained, scratch=costs.states - in_memory,
            vectors=costs.vectors,
        ),
        seconds=costs.seconds,
        notes=(), advice=(),
    )  # fmt: skip


def count_evaluations(training: TrainingConfig, per_epoch: int) -> int:
    """Return how often a whole run asks validation."""
    return math.ceil(per_epoch * training.epochs / compute_evaluation_interval(training, per_epoch))


def compute_evaluation_interval(training: TrainingConfig, per_epoch: int) -> int:
    """Return the optimizer steps between two evaluations."""
    return max(1, round(training.evaluate_every * per_epoch))
