"""Early stopping and checkpoint state: what is best so far, and how a run goes to disk and comes back.

Owns early stopping, what a checkpoint of a run holds, when one may be resumed, and the run's log.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from peft_combo.encoder.heads.base import TaskHead
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.errors import TuningError
from peft_combo.recipe.model import Recipe
from peft_combo.tuning.checkpoint import Checkpoint, optimizer_state, optimizer_tensors
from peft_combo.tuning.setup import Setup
from peft_combo.tuning.tasks.base import Evaluation


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
    """Where a run is."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    best: Best | None = None
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
                "waited": self.waited,
                "stopped_early": self.stopped_early,
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
        )

    @classmethod
    def restore(cls, run_folder: Path, setup: Setup, optimizer: Any) -> Self:
        """Put the last checkpoint back into adapter, head, optimizer and the average of weights.

        Raises:
            TuningError: there is none, it cannot be read, or it is of another recipe or other data.
        """
        recipe, task = setup.recipe, setup.task
        checkpoint = Checkpoint.latest(run_folder)
        if checkpoint is None:
            raise TuningError(
                f"No checkpoint in {run_folder} to resume from. Start the run without --resume; checkpoints are "
                f"written every {recipe.training.checkpoint_every} steps and on Ctrl-C."
            )
        values = checkpoint.values
        # Fields that are newer than the checkpoint had the values that are now the defaults.
        stored = Recipe.model_validate(values["recipe"])
        then, now = flatten(stored.model_dump(mode="json")), flatten(recipe.model_dump(mode="json"))
        changed = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key) and key != "store"]
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
            values["waited"],
            values["stopped_early"],
        )


def forget_checkpoints(run_folder: Path) -> None:
    """Drop the checkpoints of a run that is done."""
    for folder in run_folder.glob("step-*"):
        shutil.rmtree(folder, ignore_errors=True)


class RunLog:
    """The run's own record, one JSON object a line; a resumed run drops what came after its checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if step and path.exists():
                kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            path.write_text("".join(f"{line}\n" for line in kept))
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


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line: the run was killed while it wrote


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as dotted keys with printable values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, int | float | str | bool) else json.dumps(value)
    return found
