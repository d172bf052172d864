"""What a run is going to do and need: known before its first step, and without loading the encoder's weights.

Owns the plan, its figures and the probe that says whether a run would learn at all. Nothing here changes a weight or
writes a file.

`plan` makes two twins of the encoder, one layer and two layers of the real width with random weights, and puts the
heaviest batch of the first epoch through both. A layer's cost is the difference, so the whole encoder's follows; what
does not depend on depth (interpreter, data, ranking the catalogue) is measured in place. `tune` has the encoder loaded
anyway and measures on it instead.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from peft_combo.encoder import methods
from peft_combo.encoder.architectures import layers_of, set_dropout
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.base import TaskHead
from peft_combo.encoder.loading import Quantization
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.machine import available_memory
from peft_combo.recipe.adapter import AdapterConfig, LoraAdapter, TopLayers
from peft_combo.recipe.model import Recipe, TrainingConfig
from peft_combo.tuning.adversarial import passes_of
from peft_combo.tuning.augmentation import wordings_of
from peft_combo.tuning.item_encoder import ItemEncoder
from peft_combo.tuning.model import Trainee
from peft_combo.tuning.probe import probe
from peft_combo.tuning.resources import duration, give_back, measured, resident_mib
from peft_combo.tuning.tasks import task_of
from peft_combo.tuning.tasks.base import AnyTask, Batch, Encode

_FLOAT = 4  # bytes
# Batches looked at for the heaviest: memory has to hold it, whenever it comes.
_BATCHES = 32
# Texts that a twin encodes, taken evenly from the catalogue so that all lengths are among them.
_SAMPLE = 512
# A quantisation that saves less than this share of the whole is not worth slower steps and rounded weights.
_WORTH = 0.2
# Evaluations beside those of the schedule: of the frozen encoder, of the untrained adapter, of the result.
_OTHER_EVALUATIONS = 3
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
        step: what a forward pass keeps for the backward pass, for the heaviest micro-batch.
        cached: states of the layers below the adapter, where they are kept in memory.
        vectors: the whole catalogue, encoded. evaluation: what ranking it takes on top.
        allocator: what passes through the encoder take beyond that and the allocator does not give back.
        gpu: whether weights and steps are on a GPU, so that `host` does not hold them.
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
            return self.base + self.cached + max(self.loading, self.vectors + self.evaluation)
        held = self.frozen + self.trained + self.cached + self.allocator
        return self.base + max(self.loading, held + max(self.step, self.vectors + self.evaluation))

    @property
    def device(self) -> float:
        """Peak of the GPU's memory; 0 without one."""
        return self.frozen + self.trained + self.step + self.allocator if self.gpu else 0.0


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
        advice: what the figures say against the recipe as it stands.
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
            max_memory_gib, max_minutes: limits beside what the machine has.
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


# --- before anything is loaded ----------------------------------------------------------------------------------------


def plan(recipe: Recipe, task: AnyTask | None = None) -> Plan:
    """Say what `tune` would do and need, without loading the encoder, training, or leaving a file behind.

    Args:
        task: what `tune` would be given; None reads the recipe's data.
    Raises:
        PeftComboError: whatever would stop the run before its first step: faulty data, an encoder that is not there, a
            method that does not work on it, trained tensors that get no gradient.
    """
    recipe.ready()
    task = task_of(recipe) if task is None else task
    total = task.per_epoch * recipe.training.epochs
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # What cannot work is refused on shapes alone, which costs nothing however large the encoder is.
    shapes = Backbone.blueprint(recipe.backbone)
    whole = methods.attach(
        shapes.model, _countable(recipe.adapter), max_length=shapes.max_length, total_steps=total,
        seed=recipe.seed, tokenizer=shapes.tokenizer,
    )  # fmt: skip
    adapted = 0 if whole.cut >= len(layers_of(shapes.model)) else shapes.layers - whole.cut
    distinct = dict.fromkeys(task.texts)
    tokens = shapes.tokenize(list(distinct), whole.max_length)
    wordings, _ = wordings_of(recipe, task)
    others = dict.fromkeys(text for own in (() if wordings is None else wordings.texts) for text in own)
    further = [text for text in others if text not in distinct]
    kept = len(tokens.ids) + (len(shapes.tokenize(further, whole.max_length).ids) if further else 0)
    depths = (1, 2) if shapes.layers > 1 else (1,)
    trials = [_Trial(recipe, task, depth, total, device) for depth in depths]
    first, last = trials[0], trials[-1]
    layer_bytes = last.step_bytes - first.step_bytes
    # Seconds are too noisy for differences; the little besides layers is counted with them.
    layer_encode = last.encode_seconds / len(depths)
    head = first.head.eval()

    vectors = stand_in_vectors(task, shapes, whole.max_length)
    vectors_mib = vectors(None).nbytes / 2**20
    ranking_seconds, ranking_mib = measured(lambda: task.evaluate(head, vectors, recipe.metric))
    bits = recipe.backbone.quantization
    slower = 1.0
    if bits != "none":
        plain = recipe.backbone.model_copy(update={"quantization": "none"})
        twin = _Trial(recipe.model_copy(update={"backbone": plain}), task, depths[-1], total, device)
        slower = last.step_seconds / max(twin.step_seconds, 1e-9)
        del twin
    del trials, first
    give_back()

    # The catalogue is encoded below the cut once, where that is kept, and above it for every evaluation.
    states_mib = 0.0
    if recipe.training.fast_path and recipe.training.cache_limit_mib and whole.cut and not task.retokenized:
        states_mib = _FLOAT * kept * shapes.dim / 2**20
    share = len(tokens.ids) / last.tokens
    lower_seconds = (shapes.layers - adapted) * layer_encode
    upper_seconds = adapted * layer_encode
    step_seconds = last.step_seconds * (adapted / len(depths) if adapted else 1)
    evaluations = evaluations_of(recipe.training, task.per_epoch)
    if not states_mib:  # the lower layers run for whatever is encoded, in steps too
        step_seconds += lower_seconds * last.batch_tokens / last.tokens
        upper_seconds += lower_seconds
    seconds = total * recipe.training.accumulation * step_seconds * passes_of(recipe.training)
    seconds += (evaluations + _OTHER_EVALUATIONS) * (share * upper_seconds + ranking_seconds)
    seconds += kept / last.tokens * lower_seconds if states_mib else 0.0
    step_mib = (last.step_bytes + (adapted - len(depths)) * layer_bytes) / 2**20
    weights = {form: frozen_bytes(shapes.model, form) / 2**20 for form in ("none", bits)}
    found = assembled(
        recipe, task, whole, head,
        device=device, processes=1, precision=recipe.backbone.precision,
        frozen_parameters=sum(p.numel() for p in shapes.model.parameters()), total=total, base=resident_mib(),
        frozen=weights[bits], loading=weights["none"],
        step=step_mib, states=states_mib, vectors=vectors_mib, evaluation=ranking_mib,
        allocator=last.encode_mib + step_mib * max(0.0, last.step_mib * 2**20 / max(1, last.step_bytes) - 1),
        seconds=seconds,
    )  # fmt: skip
    advice = []
    saved = weights["none"] - weights[bits]
    before = (found.memory.device or found.memory.host) + saved
    if bits != "none" and saved < _WORTH * before:
        advice.append(
            f"{bits} weights save {saved:,.0f} MiB of {before:,.0f} ({saved / before:.0%}), since the frozen weights "
            f"are a small part, and a step takes {slower:.1f} times what float32 takes here. "
            "Set backbone.quantization: none."
        )
    if recipe.backbone.precision == "bf16" and device == "cpu":
        advice.append(
            "In bf16 a CPU keeps a kernel with its working memory for every shape of batch it has met; the estimate "
            "holds those of one batch only, so leave a third more room."
        )
    return replace(found, advice=tuple(advice))


class _Trial:
    """A twin of so many layers, put through one step of the heaviest batch and through encoding texts."""

    def __init__(self, recipe: Recipe, task: AnyTask, layers: int, total: int, device: str) -> None:
        twin = Backbone.twin(recipe.backbone, layers, device)
        attached = methods.attach(
            twin.model, _of_all_layers(recipe.adapter, layers), max_length=twin.max_length, total_steps=total,
            seed=recipe.seed, tokenizer=twin.tokenizer,
        )  # fmt: skip
        set_dropout(attached.inner, recipe.training.encoder_dropout)
        self.head = task.head(twin, attached.max_length).to(device)
        batch = heaviest_batch(task, recipe.training)  # after the head: some tasks cut their texts for it
        own = {int(item) for item in batch.items}
        texts = [text if number in own else "" for number, text in enumerate(task.texts)]
        items = ItemEncoder(
            twin,
            attached,
            texts,
            per_token=task.per_token,
            retokenized=task.retokenized,
            fast=recipe.training.fast_path,
        )  # fmt: skip
        trainee = Trainee(task, items, attached, self.head, recipe.training.r_drop)
        distinct = list(dict.fromkeys(task.texts))
        sample = distinct[:: max(1, len(distinct) // _SAMPLE)]
        with autocast_of(device, recipe.backbone.precision):
            self.step_seconds, self.step_bytes = probe(trainee, attached, self.head, batch, recipe)
            give_back()
            _, self.step_mib = measured(lambda: trainee(batch, recipe.seed).backward())
            trainee.zero_grad(set_to_none=True)
            give_back()
            self.encode_seconds, self.encode_mib = measured(lambda: twin.encode(sample))
        self.tokens = int(twin.tokenize(sample, attached.max_length).lengths.sum())
        self.batch_tokens = int(items.tokens.lengths.sum())
        items.close()


def _countable(adapter: AdapterConfig) -> AdapterConfig:
    """Return a config of the same shapes that can be attached to shapes alone; PiSSA would decompose the weights."""
    return adapter.model_copy(update={"pissa": False}) if isinstance(adapter, LoraAdapter) else adapter


def _of_all_layers(adapter: AdapterConfig, layers: int) -> AdapterConfig:
    """Return the config for an encoder that consists of the adapted layers."""
    if isinstance(adapter, TopLayers):
        return adapter.model_copy(update={"layers": layers})
    return adapter.model_copy(update={"top_layers": None}) if hasattr(adapter, "top_layers") else adapter


# --- what both ways of planning share ---------------------------------------------------------------------------------


def assembled(
    recipe: Recipe, task: AnyTask, attached: AttachedAdapter, head: TaskHead, *, device: str, processes: int,
    precision: str, frozen_parameters: int, total: int, base: float, frozen: float, loading: float, step: float,
    states: float, vectors: float, evaluation: float, allocator: float, seconds: float,
) -> Plan:  # fmt: skip
    """Put a plan together from what was counted and measured; sizes in MiB, `states` those of the lower layers."""
    training = recipe.training
    # AdaLoRA's count of its own ranks is no trained number, though shapes alone say so.
    adapter = sum(p.numel() for name, p in attached.trainable().items() if "ranknum" not in name)
    learning = sum(p.numel() for p in head.parameters() if p.requires_grad)
    trained = _FLOAT * (adapter + learning) / 2**20
    optimizer = _OPTIMIZER_STATE[training.optimizer]
    in_memory = states if states <= training.cache_limit_mib else 0.0
    return Plan(
        recipe=recipe.name,
        category=recipe.category,
        method=recipe.adapter.method,
        device=device,
        processes=processes,
        precision={"no": "fp32"}.get(precision, precision)
        + (f", {recipe.backbone.quantization} frozen weights" if recipe.backbone.quantization != "none" else ""),
        task=recipe.task.kind,
        metric=recipe.metric,
        items=len(task.texts),
        unit=task.unit,
        examples=task.examples,
        adapter_parameters=adapter,
        head_parameters=learning,
        frozen_parameters=frozen_parameters,
        epochs=training.epochs,
        steps=total,
        warmup_steps=math.ceil(training.warmup_fraction * total),
        schedule=training.schedule,
        evaluations=evaluations_of(training, task.per_epoch),
        memory=Memory(
            base=base, frozen=frozen, loading=loading, trained=(1 + _BESIDE + optimizer) * trained, step=step,
            cached=in_memory, vectors=vectors, evaluation=evaluation, allocator=allocator, gpu=device != "cpu",
        ),
        disk=Disk(
            checkpoints=2 * (2 + optimizer) * trained, adapter=trained, scratch=states - in_memory, vectors=vectors,
        ),
        seconds=seconds,
        advice=(),
    )  # fmt: skip


def evaluations_of(training: TrainingConfig, per_epoch: int) -> int:
    """Return how often a whole run asks validation."""
    return math.ceil(per_epoch * training.epochs / evaluation_interval(training, per_epoch))


def evaluation_interval(training: TrainingConfig, per_epoch: int) -> int:
    """Return the optimizer steps between two evaluations."""
    return max(1, round(training.evaluate_every * per_epoch))


def heaviest_batch(task: AnyTask, training: TrainingConfig) -> Batch:
    """Return the micro-batch with the most text, in characters, of the first steps."""
    batches: list[Batch] = [task.batch(step, 0, training.accumulation) for step in range(min(task.per_epoch, _BATCHES))]
    return max(batches, key=lambda batch: sum(len(task.texts[item]) for item in set(batch.items.tolist())))


def stand_in_vectors(task: AnyTask, backbone: Backbone, max_length: int) -> Encode:
    """Return an encoder that takes no time: as many rows as the real one gives, of unit length, and at random."""
    sizes = backbone.tokenize(task.texts, max_length).lengths if task.per_token else np.ones(len(task.texts), np.int64)

    def encode(items: NDArray[np.int64] | None, *, tokens: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        rows = int(sizes.sum() if items is None else sizes[items].sum())
        vectors = np.random.default_rng(0).standard_normal((rows, backbone.dim), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    return encode


def frozen_bytes(model: nn.Module, quantization: Quantization) -> int:
    """Return the bytes of an encoder's weights, in float32 or as bitsandbytes packs those of its linear layers.

    8bit keeps a byte a weight and a float32 scale a row; 4bit half a byte a weight and a float32 scale a block of 64.
    """
    packed = 0.0
    linear = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    if quantization != "none":
        for weight in linear.values():
            scales = weight.shape[0] if quantization == "8bit" else weight.numel() / 64
            packed += weight.numel() * (1 if quantization == "8bit" else 0.5) + _FLOAT * scales
    else:
        packed = _FLOAT * sum(weight.numel() for weight in linear.values())
    others = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in linear}
    return int(packed) + sum(t.numel() * t.element_size() for t in others.values())


def autocast_of(device: str, precision: str) -> AbstractContextManager[object]:
    """Return the context in which a run of this precision computes; float16 needs a scaler to learn in, so not here."""
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()
