"""Dry run: what a run is going to do and need, known without loading the encoder's weights.

Owns the estimate; what a plan says is for `figures` to know. Nothing here changes a weight or writes a file.

`plan` makes two twins of the encoder, one layer and two layers of the real width with random weights, and puts the
heaviest batch of the first epoch through both. A layer's cost is the difference, so the whole encoder's follows; what
does not depend on depth (interpreter, data, ranking the catalogue) is measured in place. `tune` has the encoder loaded
anyway and measures on it instead.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from peft_combo.encoder import methods
from peft_combo.encoder.architectures import find_layers, set_dropout
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.loading import Quantization, choose_device
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.recipe.adapter import AdapterConfig, LoraAdapter, ShiraAdapter, TopLayers
from peft_combo.recipe.model import Recipe, TrainingConfig
from peft_combo.tuning.adversarial import count_passes
from peft_combo.tuning.augmentation import build_text_variants
from peft_combo.tuning.extensions import build_extensions
from peft_combo.tuning.figures import ComputeSetting, Costs, Plan, build_plan, count_evaluations
from peft_combo.tuning.item_encoder import ItemEncoder
from peft_combo.tuning.model import TrainingModel, collect_trained_parameters
from peft_combo.tuning.probe import probe
from peft_combo.tuning.resources import give_back, measure, measure_gpu_workspace, resident_mib
from peft_combo.tuning.tasks import build_task
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


def plan(recipe: Recipe, task: AnyTask | None = None) -> Plan:
    """Say what `tune` would do and need, without loading the encoder, training, or leaving a file behind.

    Args:
        task: what `tune` would be given; None reads the recipe's data.
    Raises:
        PeftComboError: whatever would stop the run before its first step: faulty data, an encoder that is not there, a
            method that does not work on it, trained tensors that get no gradient.
    """
    recipe.ready()
    shapes = Backbone.blueprint(recipe.backbone)  # what costs nothing first: a base that is not whole, before the data
    task = build_task(recipe) if task is None else task
    total = task.per_epoch * recipe.training.epochs
    device = choose_device().type
    # What cannot work is refused on shapes alone, which costs nothing however large the encoder is.
    whole = methods.attach(
        shapes.model, _countable(recipe.adapter), max_length=shapes.max_length, total_steps=total,
        seed=recipe.seed, tokenizer=shapes.tokenizer,
    )  # fmt: skip
    # Before the trials, whose heads stand on fewer words: the last head made is the one a task works with.
    head_parameters = sum(p.numel() for p in task.head(shapes, whole.max_length).parameters() if p.requires_grad)
    depths = (1, 2) if shapes.layers > 1 else (1,)
    trials = [_TwinTrial(recipe, task, depth, total, device) for depth in depths]
    vectors = build_stand_in_encoder(task, shapes, whole.max_length)
    vectors_mib = vectors(None).nbytes / 2**20
    head = trials[0].head.eval()
    ranking = measure(lambda: task.evaluate(head, vectors, recipe.metric))
    slower = _slowdown(recipe, task, trials[-1], total, device)
    give_back()

    costs = _estimate(recipe, task, shapes, whole, trials, vectors_mib, ranking, device != "cpu")
    setting = ComputeSetting(
        device=device,
        processes=1,
        precision=recipe.backbone.precision,
        frozen_parameters=sum(p.numel() for p in shapes.model.parameters()),
        head_parameters=head_parameters,
    )
    found = build_plan(recipe, task, whole, setting, costs)
    return replace(found, notes=(*shapes.notes, *task.notes), advice=_advise(recipe, found, slower))


def _slowdown(recipe: Recipe, task: AnyTask, trial: _TwinTrial, total: int, device: str) -> float:
    """Return how many times the step of float32 weights a step of quantised ones takes."""
    if recipe.backbone.quantization == "none":
        return 1.0
    plain = recipe.backbone.model_copy(update={"quantization": "none"})
    twin = _TwinTrial(recipe.model_copy(update={"backbone": plain}), task, trial.layers, total, device)
    return trial.step_seconds / max(twin.step_seconds, 1e-9)


def _estimate(
    recipe: Recipe, task: AnyTask, shapes: Backbone, whole: AttachedAdapter, trials: list[_TwinTrial],
    vectors_mib: float, ranking: tuple[float, float], on_gpu: bool,
) -> Costs:  # fmt: skip
    """Reckon what the whole encoder takes from what twins of one and two layers took.

    Args:
        whole: the adapter on all layers. ranking: seconds and MiB of an evaluation without encoding.
    """
    first, last = trials[0], trials[-1]
    adapted = 0 if whole.first_layer >= len(find_layers(shapes.model)) else shapes.layers - whole.first_layer
    tokens, kept = _count_tokens(recipe, task, shapes, whole.max_length)
    layer_bytes = last.step_bytes - first.step_bytes
    # Seconds are too noisy for differences; the little besides layers is counted with them.
    layer_encode = last.encode_seconds / last.layers
    # The catalogue is encoded below the first adapted layer once, where that is kept, and above it at each evaluation.
    states_mib = 0.0
    if recipe.training.fast_path and recipe.training.cache_limit_mib and whole.first_layer and not task.retokenized:
        states_mib = _FLOAT * kept * shapes.dim / 2**20
    share = tokens / last.tokens
    lower_seconds = (shapes.layers - adapted) * layer_encode
    upper_seconds = adapted * layer_encode
    step_seconds = last.step_seconds * (adapted / last.layers if adapted else 1)
    evaluations = count_evaluations(recipe.training, task.per_epoch)
    if not states_mib:  # the lower layers run for whatever is encoded, in steps too
        step_seconds += lower_seconds * last.batch_tokens / last.tokens
        upper_seconds += lower_seconds
    steps = task.per_epoch * recipe.training.epochs * recipe.training.accumulation
    seconds = steps * step_seconds * count_passes(recipe.training)
    seconds += (evaluations + _OTHER_EVALUATIONS) * (share * upper_seconds + ranking[0])
    seconds += kept / last.tokens * lower_seconds if states_mib else 0.0
    step_mib = (last.step_bytes + (adapted - last.layers) * layer_bytes) / 2**20
    evaluation_mib = ranking[1]
    allocator_mib = last.encode_mib + step_mib * max(0.0, last.step_mib * 2**20 / max(1, last.step_bytes) - 1)
    if on_gpu:  # whose allocator counts what a step and an encoding took, temporary results included
        step_mib = last.step_mib + (adapted - last.layers) * (last.step_mib - first.step_mib)
        evaluation_mib = max(last.encode_mib, evaluation_mib)
        allocator_mib = measure_gpu_workspace(*(part for trial in trials for part in trial.held))
    return Costs(
        base=resident_mib(),
        frozen=count_frozen_bytes(shapes.model, recipe.backbone.quantization) / 2**20,
        loading=count_frozen_bytes(shapes.model, "none") / 2**20,
        step=step_mib,
        states=states_mib,
        vectors=vectors_mib,
        evaluation=evaluation_mib,
        allocator=allocator_mib,
        seconds=seconds,
    )


def _count_tokens(recipe: Recipe, task: AnyTask, shapes: Backbone, max_length: int) -> tuple[int, int]:
    """Return the tokens of the distinct texts, and of those with their other variants."""
    distinct = dict.fromkeys(task.texts)
    tokens = len(shapes.tokenize(list(distinct), max_length).ids)
    variants, _ = build_text_variants(recipe, task)
    further = [text for text in dict.fromkeys(variants or ()) if text not in distinct]
    return tokens, tokens + (len(shapes.tokenize(further, max_length).ids) if further else 0)


def _advise(recipe: Recipe, found: Plan, slower: float) -> tuple[str, ...]:
    """Say what the figures speak against; a step of quantised weights is so many times `slower`."""
    advice = []
    bits = recipe.backbone.quantization
    saved = found.memory.loading - found.memory.frozen
    before = (found.memory.device or found.memory.host) + saved
    if bits != "none" and saved < _WORTH * before:
        advice.append(
            f"{bits} weights save {saved:,.0f} MiB of {before:,.0f} ({saved / before:.0%}), since the frozen weights "
            f"are a small part, and a step takes {slower:.1f} times what float32 takes here. "
            "Set backbone.quantization: none."
        )
    if recipe.backbone.precision == "bf16" and found.device == "cpu":
        advice.append(
            "In bf16 a CPU keeps a kernel with its working memory for every shape of batch it has met; the estimate "
            "holds those of one batch only, so leave a third more room."
        )
    return tuple(advice)


class _TwinTrial:
    """A twin of so many layers, put through one step of the heaviest batch and through encoding texts."""

    def __init__(self, recipe: Recipe, task: AnyTask, layers: int, total: int, device: str) -> None:
        self.layers = layers
        twin = Backbone.twin(recipe.backbone, layers, device)
        attached = methods.attach(
            twin.model, _of_all_layers(recipe.adapter, layers), max_length=twin.max_length, total_steps=total,
            seed=recipe.seed, tokenizer=twin.tokenizer,
        )  # fmt: skip
        set_dropout(attached.inner, recipe.training.encoder_dropout)
        self.head = task.head(twin, attached.max_length).to(device)
        batch = find_heaviest_batch(task, recipe.training)  # after the head: some tasks cut their texts for it
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
        parameters = collect_trained_parameters(attached, self.head)
        extensions = build_extensions(recipe.training, items, parameters, None, task.exclusive)
        model = TrainingModel(task, items, attached, self.head, extensions)
        distinct = list(dict.fromkeys(task.texts))
        sample = distinct[:: max(1, len(distinct) // _SAMPLE)]
        with build_autocast(device, recipe.backbone.precision):
            self.step_seconds, self.step_bytes = probe(model, attached, self.head, batch, recipe)
            give_back()
            _, self.step_mib = measure(lambda: model(batch, recipe.seed).backward())
            model.zero_grad(set_to_none=True)
            give_back()
            self.encode_seconds, self.encode_mib = measure(lambda: twin.encode(sample))
        self.held = (twin.model, attached.encoder, self.head)
        self.tokens = int(twin.tokenize(sample, attached.max_length).lengths.sum())
        self.batch_tokens = int(items.tokens.lengths.sum())
        items.close()


def _countable(adapter: AdapterConfig) -> AdapterConfig:
    """Return a config of as many numbers that can be attached to shapes alone.

    PiSSA would decompose the weights. SHiRA draws cells of them, as many as a LoRA of its rank has numbers.
    """
    if isinstance(adapter, ShiraAdapter):
        return LoraAdapter(rank=adapter.rank, targets=adapter.targets, top_layers=adapter.top_layers)
    return adapter.model_copy(update={"pissa": False}) if isinstance(adapter, LoraAdapter) else adapter


def _of_all_layers(adapter: AdapterConfig, layers: int) -> AdapterConfig:
    """Return the config for an encoder that consists of the adapted layers."""
    if isinstance(adapter, TopLayers):
        return adapter.model_copy(update={"layers": layers})
    return adapter.model_copy(update={"top_layers": None}) if hasattr(adapter, "top_layers") else adapter


def find_heaviest_batch(task: AnyTask, training: TrainingConfig) -> Batch:
    """Return the micro-batch with the most text, in characters, of the first steps."""
    batches: list[Batch] = [task.batch(step, 0, training.accumulation) for step in range(min(task.per_epoch, _BATCHES))]
    return max(batches, key=lambda batch: sum(len(task.texts[item]) for item in set(batch.items.tolist())))


def build_stand_in_encoder(task: AnyTask, backbone: Backbone, max_length: int) -> Encode:
    """Return an encoder that takes no time: as many rows as the real one gives, of unit length, and at random."""
    sizes = backbone.tokenize(task.texts, max_length).lengths if task.per_token else np.ones(len(task.texts), np.int64)

    def encode(items: NDArray[np.int64] | None, *, tokens: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        rows = int(sizes.sum() if items is None else sizes[items].sum())
        vectors = np.random.default_rng(0).standard_normal((rows, backbone.dim), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    return encode


def count_frozen_bytes(model: nn.Module, quantization: Quantization) -> int:
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


def build_autocast(device: str, precision: str) -> AbstractContextManager[object]:
    """Return the context in which a run of this precision computes; float16 needs a scaler to learn in, so not here."""
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()
