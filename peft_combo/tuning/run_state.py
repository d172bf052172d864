"""Early stopping and checkpoint state: what is best so far, and how a run goes to disk and comes back.

Owns early stopping, what a checkpoint of a run holds, when one may be resumed, and the run's log.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from peft_combo.encoder.heads.base import TaskHead
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.errors import RecipeError, TuningError
from peft_combo.files import atomic_file
from peft_combo.recipe.model import Recipe, TrainingConfig
from peft_combo.recipe.parse import parse_recipe
from peft_combo.tuning.checkpoint import Checkpoint, optimizer_state, optimizer_tensors
from peft_combo.tuning.setup import Setup
from peft_combo.tuning.tasks.base import Evaluation

# What a run may change between two stretches: none of it reaches the weights.
_FREE = ("store", "training.checkpoint_every", "training.checkpoint_seconds", "training.trackers")
_WRITING_SHARE = 0.05  # of the time may go into checkpoints that are written by the clock


@dataclass
class Best:
    """The best weights so far, and what validation chose for the head with them."""

    step: int
    value: float
    choice: dict[str, float]
    adapter: dict[str, Tensor]
    values: dict[str, Any]
    head: dict[str, Tensor]


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        due: whether the last step's evaluation is still to be made.
        waited: evaluations without improvement.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    best: Best | None = None
    due: bool = False
    waited: int = 0
    stopped_early: bool = False

    def keep_if_best(self, evaluation: Evaluation, recipe: Recipe, attached: AttachedAdapter, head: TaskHead) -> bool:
        """Keep the weights if they are the best so far, and note when it is time to stop."""
        stopping = recipe.training.early_stopping
        if stopping is None or not attached.is_final(self.step):
            return False
        value = evaluation.values[recipe.metric]
        if self.best is not None and value <= self.best.value:
            self.waited += 1
            self.stopped_early = self.waited >= stopping.patience
            return False
        tensors, extra = attached.state()
        weights = {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}
        self.best = Best(self.step, value, dict(evaluation.choice), tensors, extra, weights)
        self.waited = 0
        return True

    def checkpoint(self, setup: Setup, optimizer: Any) -> Checkpoint:
        """Return all that `restore` needs."""
        recipe, task, weights = setup.recipe, setup.task, setup.extensions.weights
        tensors, values = setup.attached.state()
        groups = {
            "adapter": tensors,
            "head": dict(setup.head.state_dict()),
            "optimizer": optimizer_tensors(optimizer.state_dict()["state"]),
        }
        if weights.mean:
            groups["average"] = dict(weights.mean)
        best: dict[str, Any] | None = None
        if self.best is not None:
            groups |= {"best-adapter": self.best.adapter, "best-head": self.best.head}
            best = {
                "step": self.best.step,
                "value": self.best.value,
                "choice": self.best.choice,
                "values": self.best.values,
            }
        scaler = getattr(optimizer, "scaler", None)
        return Checkpoint(
            self.step,
            groups,
            {
                "recipe": recipe.model_dump(mode="json"),
                "data": task.data["digest"],
                "continued": task.data.get("continued"),
                "adapter": values,
                "best": best,
                "averaged": weights.count,
                "losses": self.losses,
                "due": self.due,
                "waited": self.waited,
                "stopped_early": self.stopped_early,
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
        )

    @classmethod
    def restore(cls, run_folder: Path, setup: Setup, optimizer: Any) -> Self:
        """Put the last checkpoint back into adapter, head, optimizer and the average of weights.

        Returns:
            where the run was; at its first step where nothing is saved, since a job that was killed before its first
            checkpoint is started again as every other is.
        Raises:
            TuningError: the checkpoint cannot be read, or it is of another recipe or other data.
        """
        recipe, task = setup.recipe, setup.task
        checkpoint = Checkpoint.latest(run_folder)
        if checkpoint is None:
            return cls()
        values = checkpoint.values
        then, now = flatten(_complete(values["recipe"])), flatten(recipe.model_dump(mode="json"))
        for told in (then, now):  # null is what the base says of itself
            if told.get("backbone.pooling") == "null":
                told["backbone.pooling"] = setup.backbone.pooling
            if told.get("backbone.text_prefix") == "null":
                told["backbone.text_prefix"] = setup.backbone.text_prefix
        changed = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key) and key not in _FREE]
        if changed:
            shown = ", ".join(f"{key} {then.get(key)} -> {now.get(key)}" for key in changed[:5])
            raise TuningError(
                f"The checkpoint in {run_folder} is of another recipe ({shown}). Resume with the recipe it was made "
                "with, or start anew without --resume."
            )
        if values["data"] != task.data["digest"]:
            raise TuningError(
                f"The data has changed since the checkpoint in {run_folder} (digest {values['data'][:12]}, now "
                f"{task.data['digest'][:12]}). Start anew without --resume."
            )
        if values.get("continued") != task.data.get("continued"):
            raise TuningError(
                f"The checkpoint in {run_folder} goes on from another adapter or replays otherwise. Resume with the "
                "--from and --replay it was made with, or start anew without --resume."
            )
        tensors = checkpoint.tensors
        setup.attached.load_state(tensors["adapter"], values["adapter"])
        setup.head.load_state_dict(tensors["head"])
        state = optimizer.state_dict()
        optimizer.load_state_dict({**state, "state": optimizer_state(tensors["optimizer"])})
        if values["scaler"] is not None and getattr(optimizer, "scaler", None) is not None:
            optimizer.scaler.load_state_dict(values["scaler"])
        if values["averaged"]:
            setup.extensions.weights.load(tensors["average"], values["averaged"])
        best = values["best"]
        return cls(
            checkpoint.step,
            list(values["losses"]),
            None
            if best is None
            else Best(
                best["step"],
                best["value"],
                best["choice"],
                tensors["best-adapter"],
                best["values"],
                tensors["best-head"],
            ),
            values.get("due", False),
            values["waited"],
            values["stopped_early"],
        )


def _complete(recipe: dict[str, Any]) -> dict[str, Any]:
    """Fill in what recipes did not hold when a checkpoint was written."""
    try:
        return parse_recipe(recipe).model_dump(mode="json")
    except RecipeError:
        return recipe


class CheckpointClock:
    """When the next checkpoint is due: by steps or by time, whichever comes first, and no step twice.

    Where writing takes long (full tuning on a slow disk), the time between two grows with it.
    """

    def __init__(self, training: TrainingConfig, step: int) -> None:
        self._training, self._saved = training, step
        self._at = time.monotonic()
        self._took = 0.0

    def is_saved(self, step: int) -> bool:
        """Return whether the state after a step is on the disk."""
        return step == self._saved

    def is_due(self, step: int) -> bool:
        """Return whether to write one after this step."""
        if self.is_saved(step):
            return False
        seconds = max(self._training.checkpoint_seconds, self._took / _WRITING_SHARE)
        return step % self._training.checkpoint_every == 0 or time.monotonic() - self._at >= seconds

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Take that one is written in the block."""
        started = time.monotonic()
        yield
        self._saved, self._at = step, time.monotonic()
        self._took = self._at - started


class RunLog:
    """The run's own record, one JSON object a line; a resumed run drops what came after its checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = b""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if step and path.exists():
                kept = b"".join(line + b"\n" for line in path.read_bytes().splitlines() if _read_step(line) <= step)
            with atomic_file(path) as file:
                file.write(kept)
        except OSError as error:
            raise TuningError(f"The run folder {path.parent} cannot be written: {error.strerror}.") from error

    def add(self, step: int, **values: float) -> None:
        """Write one line."""
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise TuningError(
                f"{self._path} cannot be written: {error.strerror}. Free some space, then go on with --resume."
            ) from error


def _read_step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line, or what a power cut left: the run ended while it wrote


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as dotted keys with printable values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, int | float | str | bool) else json.dumps(value)
    return found
