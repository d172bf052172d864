"""Processes of a run: accelerate's setup, agreement between processes, and Ctrl-C as a request to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from peft_combo.errors import TuningError
from peft_combo.recipe.model import Recipe
from peft_combo.tuning.run_state import flatten


def build_accelerator(recipe: Recipe, run_folder: Path) -> Accelerator:
    """Start accelerate as a recipe asks for it, and its trackers.

    Raises:
        TuningError: a tracker is not installed, or accelerate refuses the configuration.
    """
    # "no" is the recipe's way of not asking, and leaves the choice to `accelerate launch`.
    precision = None if recipe.backbone.precision == "no" else recipe.backbone.precision
    trackers = list(recipe.training.trackers)
    for tracker in trackers:
        try:
            metadata.version(tracker)
        except metadata.PackageNotFoundError:
            raise TuningError(
                f'training.trackers: {tracker} is not installed. Install it with: pip install "peft-combo[{tracker}]"'
            ) from None
    # Without a GPU accelerate joins the processes it launched only where it is told that they compute on the CPU.
    several_on_cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    # accelerate keeps the precision of a process's first run for all others, and refuses another one.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    try:
        accelerator = Accelerator(
            cpu=several_on_cpu,
            mixed_precision=precision,
            gradient_accumulation_steps=recipe.training.accumulation,
            log_with=trackers or None,
            project_dir=str(run_folder) if trackers else None,
        )
    except (ValueError, RuntimeError) as error:
        raise TuningError(f"accelerate cannot start with this configuration: {error}") from error
    if trackers:
        accelerator.init_trackers(recipe.name, config=flatten(recipe.model_dump(mode="json")))
    return accelerator


def ask_any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether any process has the flag, so that all stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.gather(torch.tensor([flag], device=accelerator.device)).any())


@contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a request to stop after the current step; the second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)
