"""Classification head: softmax or per-label sigmoid over pooled vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, softmax
from torch import Tensor, nn

from peft_combo.encoder.heads.base import TaskHead, rebuild_head
from peft_combo.recipe.task import ClassificationTask


class ClassificationHead(TaskHead):
    """A linear layer over the vector of a text, scaled so that its components are of size 1."""

    kind = "classification"
    threshold: Tensor

    def __init__(self, dim: int, labels: Sequence[str], config: ClassificationTask) -> None:
        super().__init__()
        self.dim = dim
        self.labels = tuple(labels)
        self.config = config
        self.linear = nn.Linear(dim, len(self.labels))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.dropout = nn.Dropout(config.head_dropout)
        self.register_buffer("threshold", torch.tensor(0.5))

    def forward(self, vectors: Tensor) -> Tensor:
        """Score (B, D) vectors of unit length: (B, C) logits."""
        logits: Tensor = self.linear(self.dropout(vectors * self.dim**0.5))
        return logits

    @torch.inference_mode()
    def probabilities(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return how likely each class is: (N, D) -> (N, C), rows that sum to 1 where one class is right."""
        logits = self(torch.from_numpy(vectors).to(self.linear.weight.device)).float().cpu().numpy()
        return _probabilities(logits, not self.config.multi_label)

    def classes(self, probabilities: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Tell which classes are given: (N, C); one a row, or all from the head's threshold on."""
        return _choose_classes(probabilities, not self.config.multi_label, float(self.threshold))

    def spec(self) -> dict[str, Any]:
        return {**self.config.model_dump(mode="json"), "dim": self.dim, "classes": list(self.labels)}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ClassificationHead:
        """Rebuild a stored head, in evaluation mode.

        Raises:
            StoreError: the weights are not those of such a head.
        """
        fields = {key: value for key, value in spec.items() if key not in ("dim", "classes")}
        return rebuild_head(
            lambda: cls(
                int(spec["dim"]), [str(one) for one in spec["classes"]], ClassificationTask.model_validate(fields)
            ),
            weights,
        )


def _probabilities(logits: NDArray[np.float32], exclusive: bool) -> NDArray[np.float32]:
    probabilities: NDArray[np.float32] = softmax(logits, axis=1) if exclusive else expit(logits)
    return probabilities


def _choose_classes(probabilities: NDArray[np.float32], exclusive: bool, threshold: float) -> NDArray[np.bool_]:
    if not exclusive:
        return probabilities >= threshold
    best = probabilities.argmax(1)
    given: NDArray[np.bool_] = best[:, None] == np.arange(probabilities.shape[1])
    return given
