"""Warm start: a run that starts from a stored adapter instead of from nothing.

Owns what may start from what, and how stored weights get into an adapter that learns: never silently into another one.
An adapter that was pretrained on texts alone (task masked) may start any task; its head stays behind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_in
from torch import Tensor

from peft_combo.encoder.architectures import set_training
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.base import HEAD_FILE, TaskHead
from peft_combo.encoder.methods.attached import CONFIG_FILE, AttachedAdapter
from peft_combo.errors import TuningError
from peft_combo.recipe.adapter import AdapterConfig, LoraAdapter
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import MaskedTask
from peft_combo.store.versions import AdapterRecord

# Fields that say how an adapter is trained, and not what it is.
_TRAINING_ONLY = ("dropout", "plus_ratio", "freeze_a")
# Fields of a head's description that say what its weights mean.
_HEAD_SHAPE = ("kind", "dim", "pooling", "projection", "labels", "tags")
# Equal up to the order of additions; see `tuning.save`.
_SAME = 1e-4
_SAMPLE = 64
# The task whose adapters may start any other.
PRETRAINING = MaskedTask().kind


def recipe_from(recipe: Recipe, record: AdapterRecord) -> Recipe:
    """Return the recipe that goes on from a stored adapter: the given one, its adapter shaped as the stored one is.

    What is stored as plain LoRA though it was not tuned as such (AdaLoRA, PiSSA, a merged or converted one) goes on as
    LoRA of its widest rank; ranks it does not have start at zero, so the start is the stored adapter all the same.

    Raises:
        TuningError: another method, or other shapes; with the settings that would fit.
    """
    manifest, mine = record.manifest, recipe.adapter
    then = manifest.recipe.get("adapter")
    stored: dict[str, Any] = dict(then) if isinstance(then, dict) else {}
    tuned_as_stored = stored.get("method") == manifest.method == "lora" and not stored.get("pissa")
    pissa = isinstance(mine, LoraAdapter) and mine.pissa
    if manifest.stored_as == "lora" and mine.method in ("lora", manifest.method) and (pissa or not tuned_as_stored):
        return recipe.model_copy(update={"adapter": _as_lora(record, mine)})
    if mine.method != manifest.method:
        raise TuningError(
            f"{record.reference} was tuned by {manifest.method}, the recipe {recipe.name} says {mine.method}, and "
            f"weights of one method mean nothing to another. Take a recipe with adapter.method: {manifest.method}."
        )
    now = mine.model_dump(mode="json")
    other = [key for key in now if key not in _TRAINING_ONLY and key in stored and now[key] != stored[key]]
    if other:
        fitting = " ".join(f"--set adapter.{key}={json.dumps(stored[key])}" for key in other)
        found = ", ".join(f"adapter.{key} is {now[key]} here and was {stored[key]}" for key in other)
        raise TuningError(
            f"{record.reference} has another shape than the recipe {recipe.name} asks for: {found}. "
            f"To go on from it: {fitting}"
        )
    return recipe


def _as_lora(record: AdapterRecord, mine: AdapterConfig) -> LoraAdapter:
    """Describe stored LoRA weights as a recipe would: widest rank, scale, and the modules of every layer it touches."""
    config: dict[str, Any] = json.loads(record.read(CONFIG_FILE))
    targets = config["target_modules"]
    names = [targets] if isinstance(targets, str) else list(targets)
    places = [match for name in names if (match := re.fullmatch(r".*\.(\d+)\.(.+?)", name))]
    if len(places) != len(names):
        raise TuningError(
            f"{record.reference} names its modules by a pattern ({names[0]}), so what it sits on is not known. "
            f"Convert it first: peft-combo adapters convert {record.reference}"
        )
    lowest = min(int(place[1]) for place in places)
    rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    patterned = bool(config.get("rank_pattern"))
    training = {key: getattr(mine, key) for key in _TRAINING_ONLY if hasattr(mine, key)}
    return LoraAdapter(
        rank=rank,
        alpha=float(rank if patterned else config["lora_alpha"]),  # a pattern here always scales by one
        targets=tuple(sorted({place[2] for place in places})),
        top_layers=record.manifest.backbone.layers - lowest if lowest else None,
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        **training,
    )


def only_encoder(record: AdapterRecord, kind: str) -> bool:
    """Return whether an adapter starts a task of this kind by its encoder alone: it was pretrained, the task is not."""
    return record.manifest.task.get("kind") == PRETRAINING != kind


def load_start(
    record: AdapterRecord, backbone: Backbone, attached: AttachedAdapter, head: TaskHead, texts: Sequence[str]
) -> dict[str, Tensor] | None:
    """Put the weights of a stored adapter into one that is about to learn; return those of its head.

    Args:
        texts: what both must encode alike.
    Returns:
        None where the adapter was pretrained, so that it has no head for the task.
    Raises:
        TuningError: they are not the weights of such an adapter or head, or do not give the vectors they gave.
        StoreError: they belong to another encoder, or do not read.
    """
    weights = None if only_encoder(record, head.kind) else _head_weights(record, head)
    _load_encoder(record, backbone, attached, texts)
    return weights


def _head_weights(record: AdapterRecord, head: TaskHead) -> dict[str, Tensor]:
    spec = head.spec()
    stored_spec = record.manifest.task
    other = [key for key in _HEAD_SHAPE if spec.get(key) != stored_spec.get(key)]
    if other:
        found = ", ".join(f"task.{key} is {spec.get(key)} here and was {stored_spec.get(key)}" for key in other)
        raise TuningError(f"The head of {record.reference} is another one than the recipe's: {found}.")
    try:
        weights = tensors_in(record.read(HEAD_FILE))
    except SafetensorError as error:
        raise TuningError(f"The head of {record.reference} does not read: {error}.") from error
    shapes = {name: tensor.shape for name, tensor in head.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        raise TuningError(f"The head of {record.reference} has other weights than the recipe's head.")
    return weights


def _load_encoder(record: AdapterRecord, backbone: Backbone, attached: AttachedAdapter, texts: Sequence[str]) -> None:
    loaded = backbone.attach(record)
    shared = {id(tensor) for tensor in (*backbone.model.parameters(), *backbone.model.buffers())}
    stored = {name: p for name, p in loaded.encoder.named_parameters() if id(p) not in shared}
    own = {name: p for name, p in attached.encoder.named_parameters() if id(p) not in shared}
    with torch.no_grad():
        for name, tensor in stored.items():
            if name not in own or not _fill(own[name], name, tensor):
                there = tuple(own[name].shape) if name in own else "nothing"
                raise TuningError(
                    f"{record.reference} does not fit the recipe's adapter: for {name} it has {tuple(tensor.shape)}, "
                    f"the recipe {there}. Take the adapter section of the recipe it was tuned with "
                    f"(peft-combo adapters show {record.reference}); what a network made while training (prefix with "
                    "projection, p-tuning) is stored without that network and cannot go on."
                )
    sample = list(dict.fromkeys(texts))[:_SAMPLE]
    set_training(attached.inner, attached.first_layer, False)
    difference = float(np.abs(backbone.encode(sample, attached) - backbone.encode(sample, loaded)).max())
    if not difference <= _SAME:
        seed = record.manifest.recipe.get("seed")
        raise TuningError(
            f"{record.reference}, put into the recipe's adapter, gives other vectors than it gave (difference "
            f"{difference:.1e}, allowed {_SAME:.0e}): something else than its weights differs, such as a scale or the "
            f"random matrices that come from the seed, which was {seed}. Go on with the recipe it was tuned with."
        )


def _fill(parameter: Tensor, name: str, tensor: Tensor) -> bool:
    """Copy a stored tensor into a parameter, or into its first ranks where it has fewer; False where neither fits."""
    if parameter.shape == tensor.shape:
        parameter.copy_(tensor)
        return True
    if ".lora_A." in name and parameter.shape[1:] == tensor.shape[1:] and len(tensor) < len(parameter):
        parameter[: len(tensor)] = tensor
        return True
    if ".lora_B." in name and parameter.shape[:1] == tensor.shape[:1] and tensor.shape[1] < parameter.shape[1]:
        parameter[:, : tensor.shape[1]] = tensor
        return True
    return False
