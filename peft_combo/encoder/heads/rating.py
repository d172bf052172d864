"""Rating head: the log-odds that a user takes an item, from two towers, popularity and neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_combo.encoder.heads.base import TaskHead, rebuild_head
from peft_combo.encoder.heads.completion import BundleHead, project_targets, score_completion
from peft_combo.recipe.task import BundleTask, RatingTask
from peft_combo.scoring.features import Counted


class RatingHead(TaskHead):
    """Log-odds that a user takes an item: their cosine in two towers, what counting says, and a constant.

    The towers are those of the bundle task: one side reads sets of items, the other single ones. Counting tells the
    item's popularity and, where the recipe asks for neighbours, how near it is to what the user took (`Counted`).
    Scores, not the loss, go through a last slope and constant that validation chose.
    """

    kind = "rating"
    slope: Tensor
    shift: Tensor

    def __init__(self, dim: int, config: RatingTask) -> None:
        super().__init__()
        self.dim = dim
        self.config = config
        self.towers = BundleHead(
            dim, BundleTask(pooling=config.pooling, projection=config.projection, temperature=config.temperature)
        )
        # Against an even draw, the log-odds of a user nothing is known of are the log-popularity itself.
        self.popularity = nn.Parameter(torch.ones(()))
        self.neighbours = nn.Parameter(torch.zeros(())) if config.neighbours else None
        self.constant = nn.Parameter(torch.zeros(()))
        self.register_buffer("slope", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    @property
    def weights(self) -> list[nn.Parameter]:
        """The single numbers that weigh text, counts and the constant against each other, as far as they are free."""
        every = (self.towers.log_scale, self.popularity, self.neighbours, self.constant)
        return [weight for weight in every if weight is not None and weight.requires_grad]

    def logits(self, cosines: Tensor, log_popularity: Tensor, nearness: Tensor | None) -> Tensor:
        """Return the log-odds, against one evenly drawn item, of cosines and of counts of like shape."""
        logits = cosines * self.towers.log_scale.exp().clamp(max=100.0) + log_popularity * self.popularity
        if self.neighbours is not None:
            assert nearness is not None
            logits = logits + nearness * self.neighbours
        return logits + self.constant

    @torch.inference_mode()
    def scores(
        self,
        vectors: NDArray[np.float32],
        histories: NDArray[np.int64],
        counted: Counted,
        targets: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Return the calibrated log-odds of every item; `expit` of them is the rating in [0, 1].

        Args:
            vectors: (N, D) items. histories: (Q, S) rows, -1 for none; no history is empty.
            counted: with neighbours where the head reads them. targets: (N, D) of `project_targets`, where at hand.
        Returns:
            (Q, N) float32.
        """
        targets = project_targets(self.towers, vectors) if targets is None else targets
        cosines = score_completion(self.towers, vectors, targets, histories)
        nearness = counted.nearness(histories)
        here = self.constant.device
        logits = self.logits(
            torch.from_numpy(cosines).to(here),
            torch.from_numpy(counted.log_popularity).to(here),
            None if nearness is None else torch.from_numpy(nearness).to(here),
        )
        found: NDArray[np.float32] = (self.slope * logits + self.shift).float().cpu().numpy()
        return found

    def spec(self) -> dict[str, Any]:
        return {**self.config.model_dump(mode="json"), "dim": self.dim}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> RatingHead:
        """Rebuild a stored head, in evaluation mode.

        Raises:
            StoreError: the weights are not those of such a head.
        """
        fields = {key: value for key, value in spec.items() if key != "dim"}
        return rebuild_head(lambda: cls(int(spec["dim"]), RatingTask.model_validate(fields)), weights)
