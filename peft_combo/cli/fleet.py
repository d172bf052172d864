"""Fleet part of `tune`: options of `--each-category`, a line for each category, and the table of all."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from peft_combo.cli.extras import require_extra
from peft_combo.cli.output import console_watch, format_metric_name, print_json, print_line, print_table
from peft_combo.errors import PeftComboError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from peft_combo.cli.output import ConsoleWatch
    from peft_combo.distributed import Executor
    from peft_combo.recipe.model import Recipe
    from peft_combo.tuning.fleet import Member

EachCategoryOption = Annotated[
    bool,
    typer.Option(
        "--each-category", help="An adapter for the whole catalogue and for each category with bundles enough."
    ),
]
MinBundlesOption = Annotated[
    int | None,
    typer.Option(
        "--min-bundles", min=1,
        help="With --each-category: bundles below which a category falls back to its parent's adapter; default 100.",
    ),
]  # fmt: skip
DepthOption = Annotated[
    int | None,
    typer.Option(
        "--depth", min=1,
        help="With --each-category: levels of the category path; default the first that divides the catalogue.",
    ),
]  # fmt: skip
FleetMachines: TypeAlias = Literal["local", "ray", "slurm"]
FleetOnOption = Annotated[
    FleetMachines | None,
    typer.Option("--on", help="With --each-category: who tunes: this machine, a Ray cluster or SLURM; default local."),
]
SlurmOption = Annotated[
    list[str] | None,
    typer.Option("--slurm", help="With --on slurm: parameter of submitit, as in slurm_partition=gpu; may be repeated."),
]


def list_fleet_pairs(
    each: bool, least: int | None, depth: int | None, on: FleetMachines | None, workers: int | None,
    address: str | None, slurm: Sequence[str] | None,
) -> list[tuple[str, bool, str, bool]]:  # fmt: skip
    """Return the options of a fleet with what they need, for `refuse_alone`."""
    needed = "--each-category"
    return [
        ("--min-bundles", least is not None, needed, each),
        ("--depth", depth is not None, needed, each),
        ("--on", on is not None, needed, each),
        ("--workers", workers is not None, needed, each),
        ("--address", address is not None, "--on ray", on == "ray"),
        ("--slurm", bool(slurm), "--on slurm", on == "slurm"),
    ]


def refuse_beside_fleet(dry_run: bool, start: str | None, resume: bool) -> None:
    """Refuse what is for one adapter.

    Raises:
        PeftComboError: see above; or accelerate started this process.
    """
    if dry_run or start is not None:
        given = "--dry-run" if dry_run else "--from"
        raise PeftComboError(f"{given} is for one adapter. Drop it, or --each-category.")
    if resume:
        raise PeftComboError("--each-category goes on by itself where it was stopped. Drop --resume.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PeftComboError("--each-category starts its workers itself. Start it without accelerate launch.")


def run_fleet(
    recipe: Recipe, least: int | None, depth: int | None, on: FleetMachines, workers: int | None, address: str | None,
    slurm: Sequence[str], run_folder: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Tune a fleet and print it; exit code 1 where a category failed."""
    options = _parse_slurm(slurm)
    if on != "local":
        require_extra(on, f"--on {on}")
    folder = run_folder or Path("runs") / f"{recipe.name}.fleet"
    with console_watch() as callback:
        from peft_combo.files import check_folder_target
        from peft_combo.tuning.fleet import FEWEST_BUNDLES, plan_fleet, tune_fleet

        check_folder_target(Path(recipe.store))
        check_folder_target(folder)
        members = plan_fleet(recipe, FEWEST_BUNDLES if least is None else least, depth)
        jobs = sum(member.status == "waiting" for member in members)
        callback.on_note(f"{len(members)} categories, the whole catalogue among them; {jobs} get an adapter.")
        with _open(on, workers, address, options, folder, min(jobs, workers or jobs), callback) as executor:
            callback.on_stage("Tuning the categories", jobs)

            def tell(member: Member) -> None:
                callback.on_note(f"{member.told}: {_tell(member)}")
                if member.status != "falls back":
                    callback.on_advance(1)

            done = tune_fleet(recipe, members, executor, folder, tell)
    if as_json:
        print_json([asdict(member) for member in done])
    else:
        _print_fleet(done, recipe)
    if any(member.status == "failed" for member in done):
        raise typer.Exit(1)


def _open(
    on: FleetMachines, workers: int | None, address: str | None, options: dict[str, Any], folder: Path, jobs: int,
    callback: ConsoleWatch,
) -> AbstractContextManager[Executor]:  # fmt: skip
    if on != "slurm":
        from peft_combo.cli.workers import open_executor

        return open_executor(on, workers, address, callback, gentle=True)
    from peft_combo.distributed import SlurmExecutor

    return SlurmExecutor(folder / "slurm", workers or jobs, options=options, on_note=callback.on_note)


def _parse_slurm(words: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE; whole numbers are numbers."""
    found: dict[str, Any] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key.isidentifier():
            raise PeftComboError(f"--slurm {word}: expected KEY=VALUE, as in slurm_partition=gpu or timeout_min=240.")
        found[key] = int(value) if value.isdigit() else value
    return found


def _tell(member: Member) -> str:
    """Say in a line what became of a category."""
    if member.status == "failed":
        rescue = f"; {member.adapter} serves it" if member.adapter else ""
        return f"failed: {member.reason}{rescue}"
    if member.status == "falls back":
        return f"falls back to {member.adapter or member.parent} ({member.reason})"
    figures = member.figures or {}
    gain = f"{format_metric_name(member.metric)} {figures['before']:.3f} -> {figures['after']:.3f}"
    how = "kept from before" if member.status == "kept" else f"tuned in {member.seconds:.0f} s"
    return f"{member.adapter} {how}, {gain}"


def _print_fleet(members: Sequence[Member], recipe: Recipe) -> None:
    metric = next((member.metric for member in members if member.metric), "ndcg@10")
    print_table(
        ("category", "items", "bundles", "adapter", f"{format_metric_name(metric)} before", "after", "gain",
         "95 % interval", ""),
        [_list_cells(member) for member in members],
        numbers=True,
    )  # fmt: skip
    print_line(
        "before: the frozen encoder, on each category's own validation queries; they differ, so compare within a row."
    )
    adapters = dict.fromkeys(member.adapter.partition("@")[0] for member in members if member.adapter)
    words = [word for name in adapters for word in ("--adapter", name)]
    if words:
        named = shlex.join(["peft-combo", "recommend", "--recipe", recipe.name, *words])
        print_line(f"Each speaks of its own items in: {named} --query TEXT")


def _list_cells(member: Member) -> tuple[str, ...]:
    found = member.figures
    told = {"kept": "kept from before", "tuned": "", "waiting": ""}.get(member.status, member.status)
    if member.reason:
        told = f"{told}: {member.reason.splitlines()[0]}" if told else member.reason.splitlines()[0]
    elif found is not None and found["gain"] < 0:
        told = f"{told}, below the frozen encoder" if told else "below the frozen encoder"
    figures = ("", "", "", "")
    if found is not None:
        interval = f"{found['low']:+.3f} to {found['high']:+.3f}"
        figures = (f"{found['before']:.3f}", f"{found['after']:.3f}", f"{found['gain']:+.3f}", interval)
    return (member.told, f"{member.items:,}", f"{member.bundles:,}", member.adapter or "none", *figures, told)
