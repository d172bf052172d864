"""Run folder: where the checkpoints and the loss log of a run lie, and that one run at a time has them.

Owns the folder's name, its lock and how a checkpoint in it is found. Knows nothing of torch or of what a checkpoint
holds, so that a folder in use is told before anything heavy is loaded.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from peft_combo.errors import TuningError, make_printable
from peft_combo.files import DRAFT, TRASH, check_folder_target, discard, lock_file
from peft_combo.recipe.model import Recipe

STATE = "state.json"
"""The file of a checkpoint that is written last: a folder without it is none."""

LOG = "log.jsonl"
_PREFIX = "step-"
_LOCK, _OWNER = ".lock", "owner.json"


def name_run_folder(recipe: Recipe) -> Path:
    """Return the folder of a run that is given none: one for each recipe, category and seed.

    ``runs/lora-fashion`` where the recipe's name ends in its category and the seed is 0; else what differs stands
    behind a dot, which no name holds: ``runs/lora-fashion.shoes``, ``runs/lora-fashion.shoes.seed3``.
    """
    parts = [recipe.name]
    if recipe.seed or not f"-{recipe.name}".endswith(f"-{recipe.category}"):
        parts.append(recipe.category)
    if recipe.seed:
        parts.append(f"seed{recipe.seed}")
    return Path("runs") / ".".join(parts)


def find_run_folder(recipe: Recipe) -> Path:
    """Return the folder to resume a run in that is given none.

    It is `name_run_folder`'s; or the one that is named after the recipe alone, as all were once, where a checkpoint of
    this category and seed lies there and none in the other.
    """
    folder, former = name_run_folder(recipe), Path("runs") / recipe.name
    if former == folder or find_checkpoint(folder) is not None:
        return folder
    found = find_checkpoint(former)
    if found is None:
        return folder
    with suppress(OSError, ValueError, KeyError, TypeError):
        made = json.loads((found / STATE).read_text())["values"]["recipe"]
        if (made["category"], made["seed"]) == (recipe.category, recipe.seed):
            return former
    return folder


@contextmanager
def hold_run_folder(folder: Path) -> Iterator[None]:
    """Keep every other run out of a folder; the system takes the lock from a process that dies.

    Raises:
        TuningError: another run has it, or it cannot be written.
    """
    owner = {"process": os.getpid(), "host": socket.gethostname()}
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock_file(folder / _LOCK))
            (folder / _OWNER).write_text(json.dumps(owner))
        except TimeoutError as error:
            raise _explain_use(folder) from error
        except OSError as error:
            raise TuningError(
                f"The run folder {make_printable(str(folder))} cannot be written: {error.strerror or error}. Name "
                "another with --run-folder."
            ) from error
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / _OWNER).unlink(missing_ok=True)


def check_run_folder(folder: Path) -> None:
    """Refuse a folder that another run has, or that cannot be written, before anything heavy is loaded.

    Raises:
        TuningError: see `hold_run_folder`. PeftComboError: it cannot be written; nothing is left there.
    """
    check_folder_target(folder)
    if (folder / _LOCK).exists():
        with hold_run_folder(folder):
            pass


def _explain_use(folder: Path) -> TuningError:
    by = "another process"
    with suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads((folder / _OWNER).read_text())
        by = f"process {int(owner['process'])} on {make_printable(str(owner['host']))}"
    return TuningError(
        f"The run folder {make_printable(str(folder))} is in use by {by}. Wait for that run, or name another folder "
        "with --run-folder."
    )


def name_checkpoint(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return folder / f"{_PREFIX}{step:08d}"


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in a run folder; None where there is none."""
    found = sorted(file.parent for file in folder.glob(f"{_PREFIX}*/{STATE}")) if folder.is_dir() else []
    return found[-1] if found else None


def forget_checkpoints(folder: Path, keep: Path | None = None) -> None:
    """Drop the checkpoints of a run, and what a killed one left of them; `keep` stays."""
    for path in folder.iterdir():
        if path != keep and path.name.startswith((_PREFIX, f"{DRAFT}{_PREFIX}", TRASH)):
            discard(path)
