"""Merging of an adapter into the weights of a plain encoder, for methods that amount to that.

Owns the weight each method stands for. The frozen encoder is never written to.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.hira.layer import HiraLayer
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.miss.layer import MissLayer
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_combo.encoder.architectures import copy_sharing_weights
from peft_combo.encoder.methods.attached import NAME, AttachedAdapter, is_quantised, set_parameter
from peft_combo.errors import BackboneError

# What a method adds that no weight can stand for, by how it is stored.
_ADDED = {
    "prompt_tuning": "positions before the text",
    "p_tuning": "positions before the text",
    "prefix_tuning": "keys and values before the text's own",
    "bottleneck": "layers with a bend in them",
    "lily": "a mixture that differs from token to token",
}


@torch.no_grad()
def merge_into_base(attached: AttachedAdapter) -> nn.Module:
    """Return a plain encoder that does what the adapter does, with weights of its own where they differ.

    Raises:
        BackboneError: the method adds something no weight can stand for, or the weights are quantised.
    """
    if attached.stored_as in _ADDED:
        raise BackboneError(
            f"An adapter stored as {attached.stored_as} cannot be merged: it adds {_ADDED[attached.stored_as]}. "
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
    weight: Tensor = module.get_base_layer().weight.float()
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
        case MissLayer():
            # Gives the whole weight, in spite of its name, and writes into what it is given.
            wanted = module.get_delta_weight_miss(NAME, weight.clone())
        case HiraLayer():
            wanted = weight * (1 + module.get_delta_weight(NAME).float())  # W + W * (B A), element by element
        case _:
            wanted = weight + module.get_delta_weight(NAME).float()
    return wanted
