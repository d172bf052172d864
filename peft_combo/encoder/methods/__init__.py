"""PEFT methods: how each adapter is put into an encoder, trained, checkpointed, saved and loaded.

Owns everything that differs between the methods, one module to a family, and is the only package that imports peft.
Each adapter sits in an encoder copy of its own that shares the frozen weights (`copy_sharing_weights`), so there is no
active adapter to set, and nothing one adapter does reaches another. Knows nothing of tasks, stores or the
training loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_never

import peft
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from peft_combo.encoder.architectures import copy_sharing_weights, find_layers
from peft_combo.encoder.methods.attached import (
    CONFIG_FILE,
    NAME,
    WEIGHTS_FILE,
    AttachedAdapter,
    ParameterGroup,
    PeftAdapter,
    read_peft_state,
    silence_peft,
)
from peft_combo.encoder.methods.base_weights import TUNED_WEIGHTS_FILE, attach_weights, load_weights
from peft_combo.encoder.methods.bottleneck import attach_bottleneck, load_bottleneck
from peft_combo.encoder.methods.low_rank import Lora, attach_adalora, attach_lora
from peft_combo.encoder.methods.merge_weights import merge_into_base
from peft_combo.encoder.methods.peft_updates import attach_update, check_cells
from peft_combo.encoder.methods.prompts import attach_prompt, is_prompt_method
from peft_combo.encoder.methods.trainable_tokens import TrainableTokens, attach_tokens
from peft_combo.errors import StoreError
from peft_combo.recipe.adapter import (
    AdaloraAdapter,
    AdapterConfig,
    BitfitTuning,
    BottleneckAdapter,
    C3aAdapter,
    FullTuning,
    HeadOnly,
    HiraAdapter,
    Ia3Adapter,
    LayerNormTuning,
    LilyAdapter,
    LohaAdapter,
    LokrAdapter,
    LoraAdapter,
    MissAdapter,
    OftAdapter,
    PrefixAdapter,
    PromptAdapter,
    PTuningAdapter,
    RandloraAdapter,
    ShiraAdapter,
    TokensAdapter,
    TopLayers,
    VeraAdapter,
)

__all__ = [
    "CONFIG_FILE",
    "TUNED_WEIGHTS_FILE",
    "WEIGHTS_FILE",
    "AttachedAdapter",
    "ParameterGroup",
    "attach",
    "load",
    "merge_into_base",
]


def attach(
    model: nn.Module, config: AdapterConfig, *, max_length: int, total_steps: int, seed: int, tokenizer: Any = None
) -> AttachedAdapter:
    """Put a new, untrained adapter into a copy of `model` that shares its weights.

    Args:
        model: a frozen encoder; left as it is.
        max_length: the backbone's cap on tokens; prompts lower it where virtual tokens need the positions.
        total_steps: optimizer steps of the run; AdaLoRA's schedule is laid over them.
        seed: for the initial weights.
        tokenizer: the encoder's; needed by ``tokens`` alone.
    Raises:
        BackboneError: the method does not work on this architecture or these weights, a word is not a token, or a
            schedule does not fit the steps.
    """
    with torch.random.fork_rng(devices=[]), silence_peft():
        torch.manual_seed(seed)
        match config:
            case LoraAdapter():
                return attach_lora(model, config, max_length)
            case AdaloraAdapter():
                return attach_adalora(model, config, max_length, total_steps)
            case (
                VeraAdapter() | LohaAdapter() | LokrAdapter() | RandloraAdapter() | OftAdapter() | MissAdapter()
                | HiraAdapter() | ShiraAdapter() | C3aAdapter() | LilyAdapter() | Ia3Adapter() | LayerNormTuning()
            ):  # fmt: skip
                return attach_update(model, config, max_length, seed)
            case PromptAdapter() | PTuningAdapter() | PrefixAdapter():
                return attach_prompt(model, config, max_length)
            case TokensAdapter():
                return attach_tokens(model, config, max_length, tokenizer)
            case BottleneckAdapter():
                return attach_bottleneck(model, config, max_length)
            case BitfitTuning() | TopLayers() | FullTuning():
                return attach_weights(model, config, max_length)
            case HeadOnly():
                return _head_only(model, max_length)
            case _:
                assert_never(config)


def load(model: nn.Module, folder: Path, stored_as: str, max_length: int) -> AttachedAdapter:
    """Put a saved adapter into a copy of `model` that shares its weights, ready to encode.

    Args:
        folder: holds the files that `AttachedAdapter.save` wrote, or those of a plain PEFT adapter.
        stored_as: what the manifest says the files are.
    Raises:
        StoreError: the files do not fit the encoder, or are not what they are said to be.
    """
    try:
        match stored_as:
            case "head":
                attached = _head_only(model, max_length)
            case "weights":
                attached = load_weights(model, folder, max_length)
            case "bottleneck":
                attached = load_bottleneck(model, folder, max_length)
            case _:
                attached = _load_peft(model, folder, stored_as, max_length)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StoreError(f"The adapter in {folder} does not fit the encoder: {reason}") from error
    attached.encoder.eval().requires_grad_(False)
    return attached


def _load_peft(model: nn.Module, folder: Path, stored_as: str, max_length: int) -> AttachedAdapter:
    encoder = copy_sharing_weights(model)
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        written = set(file.keys())
    with silence_peft():
        wrapped = peft.PeftModel.from_pretrained(encoder, str(folder), is_trainable=False)
    kind = wrapped.peft_config[NAME].peft_type.value.lower()
    if kind != stored_as:
        raise ValueError(f"it is said to be {stored_as} and is {kind}")
    # PEFT drops tensors it finds no place for and only warns of those it misses.
    wanted = set(read_peft_state(wrapped))
    if written != wanted:
        raise ValueError(f"its tensors are not those the encoder takes, for example {min(written ^ wanted)}")
    check_cells(wrapped)
    if wrapped.peft_config[NAME].is_prompt_learning:
        return is_prompt_method(model, wrapped, max_length)
    match kind:
        case "lora":
            return Lora(model, wrapped, first_layer=0, max_length=max_length)
        case "trainable_tokens":
            return TrainableTokens(model, wrapped, max_length=max_length)
        case _:
            return PeftAdapter(model, wrapped, first_layer=0, max_length=max_length)


def _head_only(model: nn.Module, max_length: int) -> AttachedAdapter:
    encoder = copy_sharing_weights(model)
    depth = len(find_layers(encoder))
    return AttachedAdapter(model, encoder, encoder, first_layer=depth, max_length=max_length, stored_as="head")
