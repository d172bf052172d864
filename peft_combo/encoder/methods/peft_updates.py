"""(IA)3, VeRA, LoHa, LoKr, OFT, RandLoRA, LayerNorm tuning: methods that PEFT brings whole.

What is ours here is where they sit in each architecture, and refusing what PEFT would get wrong without saying so.
"""

from __future__ import annotations

from typing import Any, assert_never

import peft
from torch import nn

from peft_combo.encoder.architectures import (
    copy_sharing_weights,
    find_architecture,
    find_layers,
    find_target_modules,
    find_top_modules,
    first_top_layer,
)
from peft_combo.encoder.methods.attached import PeftAdapter, ReplacingAdapter, find_first_layer
from peft_combo.errors import BackboneError
from peft_combo.recipe.adapter import (
    Ia3Adapter,
    LayerNormTuning,
    LohaAdapter,
    LokrAdapter,
    OftAdapter,
    RandloraAdapter,
    VeraAdapter,
)

Update = VeraAdapter | LohaAdapter | LokrAdapter | RandloraAdapter | OftAdapter | Ia3Adapter | LayerNormTuning


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
        case _:
            assert_never(config)


def _ia3_modules(model: nn.Module, top_layers: int | None) -> tuple[list[str], list[str]]:
    """Return what makes keys and values, whose output is scaled, and what leads out of the FFN, whose input is."""
    architecture = find_architecture(model)
    places = range(first_top_layer(model, top_layers), len(find_layers(model)))
    layers = [f"{architecture.layers}.{index}" for index in places]
    outputs = [f"{layer}.{name}" for layer in layers for name in architecture.key_value]
    return outputs, [f"{layer}.{architecture.ffn[-1]}" for layer in layers]


def _blocks_fit(model: nn.Module, targets: list[str], block_size: int) -> None:
    """PEFT would take the next block size that divides, layer by layer, and only warn."""
    for name in targets:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if linear.in_features % block_size:
            divisors = [size for size in range(2, linear.in_features + 1) if linear.in_features % size == 0]
            nearest = min(divisors, key=lambda size: abs(size - block_size))
            raise BackboneError(
                f"adapter.block_size: {block_size} does not divide the width {linear.in_features} of {name}. "
                f"Nearest that does: {nearest}."
            )


def _whole_weights_only(model: nn.Module, config: LohaAdapter | LokrAdapter) -> None:
    if any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        raise BackboneError(
            f"adapter.method: {config.method} takes its shape from the stored weights, and 4bit ones are stored "
            "packed. Set backbone.quantization: 8bit or none, or use lora."
        )
