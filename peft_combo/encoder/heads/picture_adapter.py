"""Adapter of a vision encoder: LoRA on the linear layers of its top block, or a bottleneck on its pooled features.

Owns what learns of the pictures, as a value that is stored and loaded with the head it was tuned with. A transformer
has linear layers that attend and mix, so LoRA reaches what it does with a picture; a convolutional network has none
below its pooling, so there the adapter stands behind it and can only weigh anew what the frozen network saw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from peft_combo.encoder.architectures import copy_sharing_weights
from peft_combo.errors import StoreError


class PictureAdapter(nn.Module):
    """A small change of a frozen vision encoder; as it is made, none at all.

    Attributes:
        kind: lora or bottleneck. dim: width of the encoder's vectors. rank: of the updates, or width of the bottleneck.
        layers: the linear modules that LoRA updates; none for a bottleneck.
    Source: Hu et al. 2021, "LoRA"; Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP".
    """

    def __init__(self, dim: int, rank: int, layers: Sequence[tuple[str, int, int]] = ()) -> None:
        """Make an untrained adapter.

        Args:
            layers: name, outputs and inputs of each linear module to update; none makes a bottleneck.
        """
        super().__init__()
        self.kind: Literal["lora", "bottleneck"] = "lora" if layers else "bottleneck"
        self.dim, self.rank, self.layers = dim, rank, tuple(layers)
        self.right = nn.ParameterList([nn.Parameter(torch.empty(rank, inputs)) for _, _, inputs in layers])
        self.left = nn.ParameterList([nn.Parameter(torch.zeros(outputs, rank)) for _, outputs, _ in layers])
        for matrix in self.right:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self.down: nn.Linear | None = None if layers else nn.Linear(dim, rank)
        self.up: nn.Linear | None = None if layers else nn.Linear(rank, dim, bias=False)
        if self.up is not None:
            nn.init.zeros_(self.up.weight)

    @classmethod
    def suit(cls, model: nn.Module, dim: int, rank: int) -> PictureAdapter:
        """Make the untrained adapter that a vision encoder can take."""
        return cls(dim, rank, _find_top_linear(model))

    def spec(self) -> dict[str, Any]:
        """Return what `from_spec` needs besides the weights."""
        return {"dim": self.dim, "rank": self.rank, "layers": [list(layer) for layer in self.layers]}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> PictureAdapter:
        """Make the adapter that `spec` described, untrained."""
        layers = [(str(name), int(outputs), int(inputs)) for name, outputs, inputs in spec["layers"]]
        return cls(int(spec["dim"]), int(spec["rank"]), layers)

    def encode(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Encode prepared pictures with gradients for this adapter: (B, 3, H, W) -> (B, D), not of unit length.

        The model's weights are exchanged while it runs, so one thread at a time may do so; `merge_into` serves many.
        """
        updates = self._updates(model)
        features: Tensor = functional_call(model, updates, (pixels,)) if updates else model(pixels)
        return self.shift(features)

    def shift(self, features: Tensor) -> Tensor:
        """Move (B, D) pooled features by the bottleneck; LoRA has moved them before."""
        if self.down is None or self.up is None:
            return features
        moved: Tensor = self.up(functional.gelu(self.down(functional.normalize(features, dim=-1))))
        return features + moved

    def merge_into(self, model: nn.Module) -> nn.Module:
        """Return a copy of a vision encoder with the updates in its weights; it shares all others.

        Raises:
            StoreError: it has no such layers.
        """
        if self.kind == "bottleneck":
            return model
        twin = copy_sharing_weights(model)
        try:
            for name, weight in self._updates(model).items():
                module = twin.get_submodule(name.removesuffix(".weight"))
                module.weight = nn.Parameter(weight.detach(), requires_grad=False)
        except (AttributeError, RuntimeError) as error:
            raise StoreError(f"The stored adapter of pictures does not fit the vision encoder: {error}") from error
        return twin

    def _updates(self, model: nn.Module) -> dict[str, Tensor]:
        scale = 2.0  # alpha is twice the rank, as for texts
        return {
            f"{name}.weight": model.get_submodule(name).weight + scale * left @ right
            for (name, _, _), left, right in zip(self.layers, self.left, self.right, strict=True)
        }


def _find_top_linear(model: nn.Module) -> list[tuple[str, int, int]]:
    """Name the linear modules of the last block of the longest stack that has any, with their outputs and inputs."""
    stacks = [
        (len(module), f"{name}.{len(module) - 1}", module[-1])
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    found = [
        (size, [(f"{path}.{name}", one.out_features, one.in_features)
                for name, one in block.named_modules() if isinstance(one, nn.Linear)])
        for size, path, block in stacks
    ]  # fmt: skip
    return max((pair for pair in found if pair[1]), key=lambda pair: pair[0], default=(0, []))[1]
