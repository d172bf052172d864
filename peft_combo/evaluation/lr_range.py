"""Learning-rate range test: the rate grows step by step until the loss diverges.

Owns the course of the rate and what is read off the losses. The steps are `tuning.loop.Run`'s own; nothing is stored.

Source: Smith 2017, "Cyclical learning rates for training neural networks", section 3.3.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from peft_combo.callbacks import RunCallback
from peft_combo.metrics.charts import Curve, Plane
from peft_combo.recipe.model import Recipe, TrainingConfig
from peft_combo.tuning.loop import Diverged, Run

# The running mean looks back on about ten steps, so of a hundred it lags by a tenth; earlier it is no mean yet.
_MEMORY = 0.9
_SETTLED = 10
# A rise counts where it is so many times what a loss scatters. Of 100 losses that only scatter, the running mean, whose
# own deviation is a quarter of theirs, rises by one and a half times that at most.
_SCATTERS = 4.0
_MOST_EPOCHS = 1000  # the longest run a recipe may ask for; the test ends it long before


@dataclass(frozen=True)
class RateRange:
    """What a range test found.

    Attributes:
        rates, losses: one per step; the last loss may be infinite. smoothed: running means of the losses.
        diverged: step from which the loss was lost, None where it never was.
        steepest: the rate at which the loss falls fastest; None where it never falls.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    diverged: int | None
    steepest: float | None

    @property
    def below_divergence(self) -> float | None:
        """A tenth of the rate at which the loss was lost."""
        return None if self.diverged is None else self.rates[self.diverged] / 10

    def chart(self, title: str) -> Plane:
        """Draw the losses over the rates."""
        places = [("steepest", self.steepest), ("a tenth of divergence", self.below_divergence)]
        return Plane(
            title=title,
            x_label="learning rate, logarithmic",
            y_label="training loss, smoothed",
            curves=(Curve(self.rates, self.losses, faint=True), Curve(self.rates, self.smoothed)),
            places=[(name, rate) for name, rate in places if rate is not None],
        )


def read_range(rates: Sequence[float], losses: Sequence[float]) -> RateRange:
    """Judge the losses of steps whose rate grew geometrically.

    The loss is lost at the first step at which it is no number, or its running mean has risen from its lowest by all
    that it had fallen, and by more than losses scatter. (A multiple of the lowest loss, the usual sign, is never
    reached by a loss over bounded similarities.) The fall is steepest where a line through the running means, over a
    tenth of the steps, has the lowest slope before their minimum.

    Args:
        rates: (n,) > 0, growing. losses: (n,), n >= 1.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    smoothed = _running_means(finite)
    diverged = _lost(finite, smoothed)
    if diverged is None and len(finite) < len(losses):
        diverged = len(finite)
    window = max(5, len(losses) // 10)
    steepest = None
    lowest = int(np.argmin(smoothed)) if len(smoothed) else 0
    slopes = {
        start + window // 2: float(np.polyfit(np.arange(window), smoothed[start : start + window], 1)[0])
        for start in range(lowest + 2 - window)
    }
    if slopes and min(slopes.values()) < 0:
        steepest = rates[min(slopes, key=lambda place: slopes[place])]
    whole = [*smoothed.tolist(), *[math.inf] * (len(losses) - len(finite))]
    return RateRange(tuple(rates), tuple(losses), tuple(whole), diverged, steepest)


def _running_means(losses: Sequence[float]) -> NDArray[np.float64]:
    """Return exponential running means, each corrected for how few losses stand behind it."""
    means = np.empty(len(losses))
    mean = 0.0
    for place, loss in enumerate(losses):
        mean = _MEMORY * mean + (1 - _MEMORY) * loss
        means[place] = mean / (1 - _MEMORY ** (place + 1))
    return means


def _lost(losses: Sequence[float], smoothed: NDArray[np.float64]) -> int | None:
    start = float(np.mean(losses[:_SETTLED])) if losses else 0.0
    for place in range(_SETTLED, len(losses)):
        best = int(np.argmin(smoothed[_SETTLED - 1 : place + 1])) + _SETTLED - 1
        # From step to step and up to the minimum: a course that falls is no scatter, and behind it comes the rise.
        scatter = float(np.std(np.diff(losses[: best + 1]))) / math.sqrt(2)
        rise, fall = float(smoothed[place] - smoothed[best]), start - float(smoothed[best])
        if rise > max(fall, _SCATTERS * scatter):
            return place
    return None


class _Notes(RunCallback):
    """Passes on what is noted of a run, and nothing of its steps: they are those of the test."""

    def __init__(self, inner: RunCallback) -> None:
        self._inner = inner

    def on_note(self, text: str) -> None:
        self._inner.on_note(text)


def lr_range(
    recipe: Recipe, *, low: float = 1e-6, high: float = 1.0, steps: int = 100, callback: RunCallback | None = None
) -> RateRange:
    """Take a recipe's own steps with a learning rate that grows from `low` to `high`, until the loss is lost.

    A head with a rate of its own keeps its proportion to the adapter's.

    Args:
        steps: from 10 to 1000.
    Raises:
        ValueError: low, high or steps are out of range.
        PeftComboError: whatever keeps the recipe from being tuned.
    """
    if not 0 < low < high or not 10 <= steps <= _MOST_EPOCHS:
        raise ValueError(f"expected 0 < low < high and 10 to {_MOST_EPOCHS} steps, found {low}, {high}, {steps}.")
    rates = tuple(float(rate) for rate in np.geomspace(low, high, steps))

    def growing(config: TrainingConfig, step: int, total: int) -> float:
        return rates[min(step, steps - 1)] / config.learning_rate

    callback = callback or RunCallback()
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng():
        training = recipe.training.model_copy(update={"epochs": _MOST_EPOCHS, "trackers": ()})
        probing = recipe.model_copy(update={"training": training, "store": f"{scratch}/adapters"})
        run = Run.prepare(probing, Path(scratch) / "run", callback=_Notes(callback), schedule=growing)
        callback.on_stage("Raising the learning rate", steps)
        while len(losses) < steps and read_range(rates[: len(losses)], losses).diverged is None:
            try:
                losses.append(run.take_step())
            except Diverged:
                losses.append(math.inf)
                break
            callback.on_step_end(len(losses), losses[-1])
        run.close()
    return read_range(rates[: len(losses)], losses)
