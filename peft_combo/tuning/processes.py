"""Processes of a run: accelerate's setup, agreement between processes, and signals as a request to stop."""

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

# What `accelerate launch` sets -> what it is; it is asked before accelerate, which would need GPUs to say so.
_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a mesh of devices",
}  # fmt: skip
_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


def build_accelerator(recipe: Recipe, run_folder: Path) -> Accelerator:
    """Start accelerate as a recipe asks for it, and its trackers.

    Raises:
        TuningError: a tracker is not installed, or accelerate refuses the configuration, or it divides the weights.
    """
    refuse_sharding()
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


def refuse_sharding() -> None:
    """Refuse what accelerate was told to divide over processes beside the batch.

    Checkpoints, stored adapters and the comparison with the frozen encoder are made of whole tensors, by one process;
    of a shard they would be wrong, and nobody would notice.

    Raises:
        TuningError: the launcher asks for FSDP, DeepSpeed, Megatron-LM or a mesh of devices.
    """
    named = next((name for switch, name in _SHARDING.items() if os.environ.get(switch, "").lower() == "true"), None)
    if named is not None:
        raise TuningError(
            f"This run was launched with {named}, which divides weights or optimizer over processes. Adapters are "
            "stored and resumed from whole tensors: a part of them would be saved as if it were all. Nor is anything "
            "gained, for an adapter's optimizer takes some hundred kilobytes. Launch it data parallel (--multi_gpu, or "
            "recipes/accelerate/ddp.yaml); for an encoder that does not fit: --set backbone.quantization=4bit"
        )


def agree_on_signal(accelerator: Accelerator, number: int) -> int:
    """Return the signal that any process was sent, so that all stop at the same step; 0 where none was."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def is_first_process() -> bool:
    """Return whether this is the only process or the first of those launched; accelerate is not asked, nor started."""
    ranks = (os.environ.get(name) for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


def name_signal(number: int) -> str:
    """Name a signal as people do."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopRequest:
    """What asks a run to stop: Ctrl-C, SIGTERM (a batch system, a container, a spot machine), SIGHUP (a terminal).

    Attributes:
        number: of the first signal; 0 while none came.
    """

    def __init__(self) -> None:
        self.number = 0
        self._at_once = False
        # The launcher hands on what the terminal has sent already, so there a second one says nothing.
        self._launched = "LOCAL_RANK" in os.environ

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: note it; or interrupt, where nothing is to be saved or Ctrl-C comes a second time."""
        again = bool(self.number)
        self.number = self.number or number
        if self._at_once or (again and number == signal.SIGINT and not self._launched):
            self._at_once = False
            raise KeyboardInterrupt

    @contextmanager
    def interrupt(self) -> Iterator[None]:
        """Let a signal interrupt the block with KeyboardInterrupt: for what can be done again from the start."""
        self._at_once = True
        try:
            if self.number:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGHUP into a request; what is ignored, as under nohup, stays so.

    Outside the main thread Python delivers no signals, and there is no request.
    """
    request, previous = StopRequest(), {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in _STOPPING if hasattr(signal, name)):
            handler = signal.getsignal(number)
            if handler is None or (handler == signal.SIG_IGN and number != signal.SIGINT):
                continue
            previous[number] = signal.signal(number, request.take)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
