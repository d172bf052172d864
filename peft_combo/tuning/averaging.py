"""Weight averaging: SWA and EMA of the weights along a run.

Owns what is averaged and when; the weights themselves stay where they are, and the mean is put in for a moment only.
Source: Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization", alg. 1 (swa);
Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging" (ema, with a fixed decay).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peft_combo.recipe.model import Averaging


class WeightAverage:
    """A mean over the weights that learn; a `step.WeightCopy`.

    Args:
        parameters: name -> weight; read at each `add`, and for a while written by `for_evaluation`.

    Attributes:
        count: points in the mean. mean: name -> tensor; empty while there is no point.
    """

    def __init__(self, config: Averaging, parameters: Mapping[str, nn.Parameter]) -> None:
        self._config = config
        self._parameters = parameters
        self.count = 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_step(self, share: float, evaluated: bool) -> None:
        """Take in the weights after an optimizer step, if they count.

        Args:
            share: of the run that is done. evaluated: whether validation is asked after this step.
        """
        if share < self._config.start or (self._config.kind == "swa" and not evaluated):
            return
        self.count += 1
        if not self.mean:
            self.mean = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
            return
        kept = self._config.decay if self._config.kind == "ema" else 1 - 1 / self.count
        for name, parameter in self._parameters.items():
            self.mean[name].lerp_(parameter, 1 - kept)

    @contextmanager
    def for_evaluation(self) -> Iterator[None]:
        """Let the mean stand in for the weights; without a point they stay."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.keep()
        try:
            yield
        finally:
            self._put(kept)

    def keep(self) -> None:
        """Let the mean be the weights from now on, if there is one."""
        if self.mean:
            self._put(self.mean)

    def load(self, mean: Mapping[str, Tensor], count: int) -> None:
        """Go on from a mean of `count` points."""
        self.count = count
        self.mean = {name: mean[name].to(parameter.device) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])
