"""What an adapter amounts to in the encoder's own weights, for those that amount to that.

Owns the change each method makes to linear weights, and the plain encoder with the change made. The frozen encoder is
never written to.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from peft_combo.encoder.architectures import copy_sharing_weights
from peft_combo.encoder.methods.attached import NAME, AttachedAdapter, is_quantised, set_parameter
from peft_combo.errors import BackboneError

_ADDITIVE = {"lora", "adalora", "vera", "loha", "lokr", "randlora", "oft", "ia3"}


@torch.no_grad()
def delta_weights(attached: AttachedAdapter) -> dict[str, Tensor]:
    """Return what the adapter adds to the weights of linear layers.

    For DoRA, OFT and (IA)^3 that is the merged weight less the frozen one. (IA)^3 also scales the biases of keys and
    values, which is in `merged` and, being no weight, not here.

    Returns:
        by name of the linear module in the plain encoder, (out, in) float32; nothing for a head alone.
    Raises:
        BackboneError: the method's effect is no change of linear weights.
    """
    if attached.stored_as == "head":
        return {}
    if attached.stored_as not in _ADDITIVE:
        raise BackboneError(
            f"{_describe_method(attached)} changes {_describe_change(attached.stored_as)}, not the weights of linear "
            "layers."
        )
    deltas = {}
    for name, module in attached.inner.named_modules():
        if isinstance(module, BaseTunerLayer):
            frozen = _weight(attached.base.get_submodule(name))
            deltas[name] = _merge_weight(module) - frozen
    return deltas


@torch.no_grad()
def merge_into_base(attached: AttachedAdapter) -> nn.Module:
    """Return a plain encoder that does what the adapter does, with weights of its own where they differ.

    Raises:
        BackboneError: the method adds something no weight can stand for, or the weights are quantised.
    """
    if attached.stored_as in ("prompt_tuning", "p_tuning", "prefix_tuning", "bottleneck"):
        raise BackboneError(
            f"{_describe_method(attached)} cannot be merged: it adds {_describe_change(attached.stored_as)}. "
            "Serve it as an adapter."
        )
    plain = copy_sharing_weights(attached.base)
    if is_quantised(plain):
        raise BackboneError(
            "An adapter cannot be merged into quantised weights without losing bits. Load the encoder with "
            "backbone.quantization: none."
        )
    own: dict[str, Tensor] = {}
    if attached.stored_as == "weights":
        frozen = dict(plain.named_parameters())
        own = {name: p for name, p in attached.encoder.named_parameters() if p is not frozen[name]}
    for name, module in attached.inner.named_modules():
        match module:
            case LNTuningLayer():
                own |= {f"{name}.{leaf}": p for leaf, p in module.ln_tuning_layers[NAME].named_parameters()}
            case TrainableTokensLayer():
                own[f"{name}.weight"] = module.get_merged_weights([NAME])
            case BaseTunerLayer():
                own[f"{name}.weight"] = _merge_weight(module)
                bias = getattr(module.get_base_layer(), "bias", None)
                if isinstance(module, IA3Layer) and not module.is_feedforward and bias is not None:
                    own[f"{name}.bias"] = bias * module.ia3_l[NAME].flatten()
            case _:
                pass
    for name, tensor in own.items():
        set_parameter(plain, name, nn.Parameter(tensor.detach().clone(), requires_grad=False))
    return plain.eval()


def _merge_weight(module: Any) -> Tensor:
    """Return the weight a linear layer would need to do what its tuner does, (O, I) float32."""
    weight = _weight(module.get_base_layer())
    wanted: Tensor
    match module:
        case OFTLayer():
            wanted = weight @ module.get_delta_weight(NAME).float().T  # the inputs are rotated: (O, I) @ (I, I)
        case IA3Layer():
            wanted = weight * module.ia3_l[NAME]  # (O, I) * (O, 1), or * (1, I) where the inputs are scaled
        case lora.Linear() if module.use_dora[NAME]:
            moved = weight + module.get_delta_weight(NAME).float()
            length = module.lora_magnitude_vector[NAME].weight / torch.linalg.norm(moved, dim=1)
            wanted = length.unsqueeze(1) * moved  # Liu et al. 2024, equation 5
        case _:
            wanted = weight + module.get_delta_weight(NAME).float()
    return wanted


def _weight(linear: Any) -> Tensor:
    """Return the frozen weight (O, I) in float32. PEFT's own way leaves an 8-bit layer on a CPU without its scales."""
    weight: Tensor = linear.weight
    if not weight.is_floating_point():
        weight = dequantize_bnb_weight(linear.weight, state=getattr(linear, "state", None))
    return weight.float()


def _describe_method(attached: AttachedAdapter) -> str:
    return f"An adapter stored as {attached.stored_as}"


def _describe_change(stored_as: str) -> str:
    return {
        "prompt_tuning": "positions before the text",
        "p_tuning": "positions before the text",
        "prefix_tuning": "keys and values before the text's own",
        "bottleneck": "layers with a bend in them",
        "ln_tuning": "norms",
        "trainable_tokens": "embeddings",
        "weights": "weights of every kind",
    }[stored_as]
