"""Checkpoints: the state of a run, written so that a kill at any moment leaves a whole one, read back exactly.

Owns the files of a checkpoint. Knows nothing of what the tensors mean. A checkpoint holds what learns and what the
optimizer remembers, never the frozen encoder: some hundred kB, not hundreds of MB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_combo.errors import TuningError
from peft_combo.files import stage_folder
from peft_combo.tuning.run_folder import STATE, find_checkpoint, forget_checkpoints, name_checkpoint


@dataclass
class Checkpoint:
    """One moment of a run.

    Attributes:
        tensors: by group (``weights``, ``optimizer``, ``best``), named tensors.
        values: everything else, as JSON.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write into `folder` and drop older checkpoints there.

        Raises:
            TuningError: the disk is full or the folder cannot be written; older checkpoints are still there.
        """
        target = name_checkpoint(folder, self.step)
        state = {"step": self.step, "groups": sorted(self.tensors), "values": self.values}
        try:
            with stage_folder(target, replace=True) as staged:
                for group, tensors in self.tensors.items():
                    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                    save_file(plain, staged.path / f"{group}.safetensors")
                staged.manifest = (STATE, json.dumps(state).encode())
        except (OSError, SafetensorError) as error:
            raise TuningError(
                f"The checkpoint of step {self.step} cannot be written to {folder}: {_explain_reason(error)}. "
                "Free some space or make the folder writable, then go on with --resume from the last one."
            ) from error
        forget_checkpoints(folder, keep=target)
        return target

    @classmethod
    def latest(cls, folder: Path) -> Checkpoint | None:
        """Read the newest whole checkpoint in `folder`; None where there is none.

        Raises:
            TuningError: it is there but cannot be read.
        """
        found = find_checkpoint(folder)
        if found is None:
            return None
        try:
            state = json.loads((found / STATE).read_text())
            tensors = {group: load_file(found / f"{group}.safetensors") for group in state["groups"]}
            return cls(int(state["step"]), tensors, state["values"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TuningError(
                f"The checkpoint {found} cannot be read ({_explain_reason(error)}). Remove it and start anew."
            ) from error


def optimizer_tensors(state: Mapping[int, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Flatten the ``state`` part of an optimizer's state dict to ``"<parameter>.<name>"``."""
    return {
        f"{parameter}.{name}": value
        for parameter, entries in state.items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def optimizer_state(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Undo `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parameter, _, name = key.partition(".")
        state.setdefault(int(parameter), {})[name] = value
    return state


def _explain_reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).splitlines()[0]
