"""Matching head: how much a question is like an answer template, by the cosine of their vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_combo.encoder.heads.base import TaskHead, rebuild_head
from peft_combo.recipe.task import MatchingTask


class MatchingHead(TaskHead):
    """A temperature over cosines. It changes no order: what a service answers by cosine alone is what was learned.

    Questions and answers share one encoder with one adapter, so answers are encoded once and kept.
    """

    kind = "matching"

    def __init__(self, dim: int, config: MatchingTask) -> None:
        super().__init__()
        self.dim = dim
        self.config = config
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))

    def forward(self, questions: Tensor, answers: Tensor) -> Tensor:
        """Compare (Q, D) with (A, D) vectors of unit length: (Q, A) logits."""
        logits: Tensor = questions @ answers.T / self.log_temperature.exp()
        return logits

    def spec(self) -> dict[str, Any]:
        return {**self.config.model_dump(mode="json"), "dim": self.dim}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> MatchingHead:
        """Rebuild a stored head, in evaluation mode.

        Raises:
            StoreError: the weights are not those of such a head.
        """
        fields = {key: value for key, value in spec.items() if key != "dim"}
        return rebuild_head(lambda: cls(int(spec["dim"]), MatchingTask.model_validate(fields)), weights)
