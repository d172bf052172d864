"""Masked-language-model head: predicts hidden word pieces through the tied input embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_combo.encoder.heads.base import TaskHead, rebuild_head
from peft_combo.recipe.task import MaskedTask


class MaskedHead(TaskHead):
    """BERT's transform of a token's state, and how likely each word is by itself.

    Words are told by the encoder's own word embeddings, which are neither trained nor stored with the head. Its scale
    starts at zero, so what an untrained head says is the bias alone: how often words occur.

    Args:
        dim: width of the states. width: of the word embeddings. vocabulary: how many there are.

    Attributes:
        size: root mean square of the embeddings' components, which are divided by it: as small as they are in many
            encoders, a head would spend its steps on growing.
    """

    kind = "masked"
    size: Tensor

    def __init__(self, dim: int, width: int, vocabulary: int, config: MaskedTask) -> None:
        super().__init__()
        self.dim = dim
        self.config = config
        self.dense = nn.Linear(dim, width)
        nn.init.eye_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)
        self.norm = nn.LayerNorm(width)
        nn.init.zeros_(self.norm.weight)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.register_buffer("size", torch.tensor(1.0))

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        """Say which word it was: (Q, D) states and (V, E) word embeddings -> (Q, V) logits."""
        told = self.norm(functional.gelu(self.dense(states)))
        logits: Tensor = (told / self.size) @ words.T + self.bias  # (Q, E) @ (E, V) -> (Q, V)
        return logits

    def spec(self) -> dict[str, Any]:
        sizes = {"dim": self.dim, "width": self.dense.out_features, "vocabulary": len(self.bias)}
        return {**self.config.model_dump(mode="json"), **sizes}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> MaskedHead:
        """Rebuild a stored head, in evaluation mode.

        Raises:
            StoreError: the weights are not those of such a head.
        """
        fields = {key: value for key, value in spec.items() if key not in ("dim", "width", "vocabulary")}
        return rebuild_head(
            lambda: cls(
                int(spec["dim"]), int(spec["width"]), int(spec["vocabulary"]), MaskedTask.model_validate(fields)
            ),
            weights,
        )
