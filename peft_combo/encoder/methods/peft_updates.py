"""VeRA, LoHa, LoKr, RandLoRA, OFT, MiSS, HiRA, SHiRA, C3A, Lily, (IA)3, LayerNorm tuning: what PEFT brings whole.

What is ours here is where they sit in each architecture, and refusing what PEFT would get wrong without saying so.
"""

from __future__ import annotations

import math
from typing import Any, assert_never

import peft
import torch
from peft.tuners.shira.layer import ShiraLayer
from torch import nn

from peft_combo.encoder.architectures import (
    copy_sharing_weights,
    find_architecture,
    find_layers,
    find_target_modules,
    find_top_modules,
    first_top_layer,
)
from peft_combo.encoder.methods.attached import PeftAdapter, ReplacingAdapter, find_first_layer, is_quantised
from peft_combo.errors import BackboneError
from peft_combo.recipe.adapter import (
    C3aAdapter,
    HiraAdapter,
    Ia3Adapter,
    LayerNormTuning,
    LilyAdapter,
    LohaAdapter,
    LokrAdapter,
    MissAdapter,
    OftAdapter,
    RandloraAdapter,
    ShiraAdapter,
    VeraAdapter,
)

Update = (
    VeraAdapter | LohaAdapter | LokrAdapter | RandloraAdapter | OftAdapter | MissAdapter | HiraAdapter | ShiraAdapter
    | C3aAdapter | LilyAdapter | Ia3Adapter | LayerNormTuning
)  # fmt: skip


def attach_update(model: nn.Module, config: Update, max_length: int, seed: int) -> PeftAdapter:
    """Put one of these adapters into a copy of `model`.

    Args:
        seed: for VeRA's and RandLoRA's random matrices, which PEFT draws apart from everything else.
    Raises:
        BackboneError: the method does not fit these weights.
    """
    encoder = copy_sharing_weights(model)
    wrapped = peft.get_peft_model(encoder, _peft_config(encoder, config, seed))
    kind = ReplacingAdapter if isinstance(config, Ia3Adapter | LayerNormTuning) else PeftAdapter
    return kind(model, wrapped, first_layer=find_first_layer(encoder, config.top_layers), max_length=max_length)


def check_cells(wrapped: nn.Module) -> None:
    """Make sure that the cells SHiRA trained lie within the weights: torch would read beside them without a word.

    Raises:
        ValueError: they do not.
    """
    for name, module in wrapped.named_modules():
        if isinstance(module, ShiraLayer):
            for cells in module.shira_indices.values():
                shape = (module.out_features, module.in_features)
                ends = torch.tensor(shape, device=cells.device)[:, None]
                if cells.shape[0] != 2 or bool((cells < 0).any() or (cells >= ends).any()):
                    raise ValueError(
                        f"cells of {name} lie outside its {module.out_features} x {module.in_features} weight"
                    )


def _peft_config(model: nn.Module, config: Update, seed: int) -> Any:
    common: dict[str, Any] = {"task_type": "FEATURE_EXTRACTION"}
    match config:
        case Ia3Adapter():
            keys_and_values, inside = _ia3_modules(model, config.top_layers)
            return peft.IA3Config(
                **common, target_modules=[*keys_and_values, *inside], feedforward_modules=inside
            )  # fmt: skip
        case LayerNormTuning():
            reached = find_top_modules(model, config.top_layers)
            norms = [name for name, module in reached.items() if isinstance(module, nn.LayerNorm)]
            return peft.LNTuningConfig(**common, target_modules=norms)
        case _:
            common["target_modules"] = find_target_modules(model, config.targets, config.top_layers)
    match config:
        case VeraAdapter():
            return peft.VeraConfig(
                **common, r=config.rank, d_initial=config.initial_scale, vera_dropout=config.dropout,
                projection_prng_key=seed,
            )  # fmt: skip
        case LohaAdapter():
            _whole_weights_only(model, config)
            return peft.LoHaConfig(**common, r=config.rank, alpha=config.alpha)
        case LokrAdapter():
            _whole_weights_only(model, config)
            return peft.LoKrConfig(**common, r=config.rank, alpha=config.alpha, decompose_factor=config.factor or -1)
        case RandloraAdapter():
            return peft.RandLoraConfig(
                **common, r=config.rank, randlora_alpha=config.alpha, randlora_dropout=config.dropout,
                projection_prng_key=seed,
            )  # fmt: skip
        case OftAdapter():
            _blocks_fit(model, common["target_modules"], config.block_size)
            # Without the Neumann series: a truncated one is a rotation only while it is small.
            return peft.OFTConfig(**common, r=0, oft_block_size=config.block_size, use_cayley_neumann=False)
        case MissAdapter():
            return peft.MissConfig(**common, r=config.rank, miss_dropout=config.dropout)
        case HiraAdapter():
            return peft.HiraConfig(**common, r=config.rank, hira_dropout=config.dropout)
        case ShiraAdapter():
            return peft.ShiraConfig(**common, r=config.rank, random_seed=seed)
        case C3aAdapter():
            if is_quantised(model):
                raise BackboneError(
                    "adapter.method: c3a adds to the output of the frozen layer in place, which quantised layers do "
                    "not bear. Set backbone.quantization: none, or use lora."
                )
            _blocks_fit(model, common["target_modules"], config.block_size, outputs=True)
            return peft.C3AConfig(**common, block_size=config.block_size, init_weights=True)
        case LilyAdapter():
            return peft.LilyConfig(**common, r=config.rank, stride_A=config.layers_per_a, num_B=config.shared_b)
        case _:
            assert_never(config)


def _ia3_modules(model: nn.Module, top_layers: int | None) -> tuple[list[str], list[str]]:
    """Return what makes keys and values, whose output is scaled, and what leads out of the FFN, whose input is."""
    architecture = find_architecture(model)
    places = range(first_top_layer(model, top_layers), len(find_layers(model)))
    layers = [f"{architecture.layers}.{index}" for index in places]
    outputs = [f"{layer}.{name}" for layer in layers for name in architecture.key_value]
    return outputs, [f"{layer}.{architecture.ffn[-1]}" for layer in layers]


def _blocks_fit(model: nn.Module, targets: list[str], block_size: int, *, outputs: bool = False) -> None:
    """PEFT would take the next block size that divides, layer by layer, and only warn; or fail in the first step."""
    for name in targets:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        width = math.gcd(linear.in_features, linear.out_features) if outputs else linear.in_features
        if width % block_size:
            divisors = [size for size in range(2, width + 1) if width % size == 0]
            nearest = min(divisors, key=lambda size: abs(size - block_size))
            raise BackboneError(
                f"adapter.block_size: {block_size} does not divide the width {width} of {name}. "
                f"Nearest that does: {nearest}."
            )


def _whole_weights_only(model: nn.Module, config: LohaAdapter | LokrAdapter) -> None:
    if any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        raise BackboneError(
            f"adapter.method: {config.method} takes its shape from the stored weights, and 4bit ones are stored "
            "packed. Set backbone.quantization: 8bit or none, or use lora."
        )
