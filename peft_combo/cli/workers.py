"""Options of commands that hand work to others, `--on`, `--workers`, `--address`; and the executor they mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, assert_never

import typer

from peft_combo.cli.output import ConsoleWatch
from peft_combo.errors import PeftComboError

if TYPE_CHECKING:
    from peft_combo.distributed import Executor

Machines: TypeAlias = Literal["local", "ray"]

OnOption = Annotated[
    Machines | None,
    typer.Option("--on", help="Who does the work: local, processes of this machine; ray, a Ray cluster; default here."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, max=4096,
        help="With --on: number of workers; default one for each GPU, or without GPUs for every four cores.",
    ),
]  # fmt: skip
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", help="With --on ray: cluster, as in auto or host:6379; default one started on this machine."
    ),
]


def refuse_alone(*pairs: tuple[str, bool, str, bool]) -> None:
    """Refuse options that mean nothing without another one."""
    for option, given, needed, there in pairs:
        if given and not there:
            raise PeftComboError(f"{option} means nothing without {needed}. Add {needed}, or drop it.")


@contextmanager
def open_executor(
    on: Machines, workers: int | None, address: str | None, callback: ConsoleWatch, gentle: bool = False
) -> Iterator[Executor]:
    """Open what does the work, and say how many there are; ended with the block.

    Args:
        gentle: see `LocalExecutor`.
    """
    from peft_combo.distributed import LocalExecutor, RayExecutor
    from peft_combo.encoder.loading import count_gpus

    opened: LocalExecutor | RayExecutor
    match on:
        case "local":
            opened = LocalExecutor(workers, gpus=count_gpus(), on_note=callback.on_note, gentle=gentle)
            where = "this machine"
        case "ray":
            callback.on_note("Connecting to Ray ..." if address else "Starting Ray on this machine ...")
            opened = RayExecutor(workers, address, on_note=callback.on_note)
            where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        case _:
            assert_never(on)
    with opened:
        callback.on_note(f"{opened.workers} worker{'s' if opened.workers > 1 else ''} on {where}: {opened.told}.")
        yield opened
