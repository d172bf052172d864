"""`tune`: what makes adapters."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_combo.cli.app import (
    DataOption,
    JsonOption,
    RecipeOption,
    RecipeStoreOption,
    SetOption,
    app,
    check_data_path,
    load_ready_recipe,
)
from peft_combo.cli.chart_files import write_chart
from peft_combo.cli.complete import complete_adapter, complete_alias_name
from peft_combo.cli.fleet import (
    DepthOption,
    EachCategoryOption,
    FleetOnOption,
    MinBundlesOption,
    SlurmOption,
    list_fleet_pairs,
    refuse_beside_fleet,
    run_fleet,
)
from peft_combo.cli.output import (
    ConsoleWatch,
    console_watch,
    format_metric_name,
    get_rank,
    print_json,
    print_line,
    print_table,
)
from peft_combo.cli.workers import AddressOption, WorkersOption, refuse_alone

if TYPE_CHECKING:
    from peft_combo.metrics.report import ResultRow
    from peft_combo.recipe.model import Recipe
    from peft_combo.tuning.continual import Continuation, Continued, Pretrained
    from peft_combo.tuning.figures import Plan
    from peft_combo.tuning.loop import TuneResult

MaxMemoryOption = Annotated[
    float | None,
    typer.Option("--max-memory-gib", min=0, help="With --dry-run: maximum memory in GiB; default no limit."),
]
MaxMinutesOption = Annotated[
    float | None,
    typer.Option("--max-minutes", min=0, help="With --dry-run: maximum time in minutes; default no limit."),
]
GateGainOption = Annotated[
    float | None,
    typer.Option("--gate-gain", help="Gate: minimum gain in NDCG@10 on new queries, exclusive; default 0."),
]
GatePOption = Annotated[
    float | None, typer.Option("--gate-p", help="Gate: maximum p of the gain's paired test, exclusive; default 0.05.")
]
GateForgettingOption = Annotated[
    float | None,
    typer.Option("--gate-forgetting", help="Gate: maximum loss of NDCG@10 on old queries; default 0.01."),
]
StartOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        autocompletion=complete_adapter,
        help="Adapter to go on from (fashion@prod): same method and shapes, a new version; or, for any task, one that "
        "read texts alone (fashion-text).",
    ),
]
NewDataOption = Annotated[
    Path | None, typer.Option("--new-data", help="With --from: folder of later data, joined with the old by ids.")
]
ReplayOption = Annotated[
    float | None,
    typer.Option("--replay", help="With --new-data: share of training bundles drawn from the old ones; default 0.3."),
]
PromoteOption = Annotated[
    str | None,
    typer.Option(
        "--promote",
        autocompletion=complete_alias_name,
        help="With --from: alias to move to the new version if it passes the gate.",
    ),
]


@app.command(short_help="Tune one category's adapter, with quality before and after.")
def tune(
    recipe: RecipeOption,
    data: DataOption = None,
    overrides: SetOption = None,
    store: RecipeStoreOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continuation from the last checkpoint; a start where none is there.")
    ] = False,
    run_folder: Annotated[
        Path | None,
        typer.Option(
            "--run-folder", help="Folder of checkpoints and loss log; default runs/ and recipe, category and seed."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan only: steps, memory and time; exit code 3 if it does not fit.")
    ] = False,
    max_memory_gib: MaxMemoryOption = None,
    max_minutes: MaxMinutesOption = None,
    start: StartOption = None,
    new_data: NewDataOption = None,
    replay: ReplayOption = None,
    promote: PromoteOption = None,
    gate_gain: GateGainOption = None,
    gate_p: GatePOption = None,
    gate_forgetting: GateForgettingOption = None,
    fail_on_no_promotion: Annotated[
        bool, typer.Option("--fail-on-no-promotion", help="Exit code 4 where --promote left the alias where it was.")
    ] = False,
    each_category: EachCategoryOption = False,
    min_bundles: MinBundlesOption = None,
    depth: DepthOption = None,
    on: FleetOnOption = None,
    workers: WorkersOption = None,
    address: AddressOption = None,
    slurm: SlurmOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tune one category's adapter and store it, with quality before and after.

    With --dry-run nothing is trained or stored. With --from a stored adapter goes on learning: the new version is
    stored, compared with the one it came from on new and old questions, and --promote moves an alias to it only if it
    is better; else the alias stays, and the last line says why. With --each-category there is an adapter for each
    category; what is stored already stays, and a run that was stopped goes on.
    """
    from peft_combo.tuning.run_folder import find_run_folder, name_run_folder

    limits = max_memory_gib is not None or max_minutes is not None
    bounds = {"gain": gate_gain, "p": gate_p, "forgetting": gate_forgetting}
    gate = {name: value for name, value in bounds.items() if value is not None}
    refuse_alone(
        ("--max-memory-gib or --max-minutes", limits, "--dry-run", dry_run),
        ("--new-data", new_data is not None, "--from", start is not None),
        ("--replay", replay is not None, "--new-data", new_data is not None),
        ("--promote", promote is not None, "--from", start is not None),
        ("--gate-...", bool(gate), "--promote", promote is not None),
        ("--fail-on-no-promotion", fail_on_no_promotion, "--promote", promote is not None),
        *list_fleet_pairs(each_category, min_bundles, depth, on, workers, address, slurm),
    )
    loaded = load_ready_recipe(recipe, overrides, data, store)
    if each_category:
        refuse_beside_fleet(dry_run, start, resume)
        check_data_path(loaded)
        run_fleet(loaded, min_bundles, depth, on or "local", workers, address, slurm or (), run_folder, as_json)
        return
    folder = run_folder or (find_run_folder(loaded) if resume else name_run_folder(loaded))
    _check_cheaply(loaded, start, promote, None if dry_run else folder)
    check_data_path(loaded)
    options: dict[str, Any] = {"new_data": new_data} | ({} if replay is None else {"replay": replay})
    with console_watch() as callback:
        if dry_run:
            fits = _print_dry_run(loaded, start, options, folder, max_memory_gib, max_minutes, as_json)
            raise typer.Exit(0 if fits else 3)
        result, continued = _run_tuning(loaded, start, options, promote, gate, resume, folder, callback)
    if not callback.main:
        return
    _print_result(result, continued, loaded, as_json)
    if fail_on_no_promotion and continued is not None and not continued.promoted:
        raise typer.Exit(4)


def _print_result(result: TuneResult, continued: Continued | None, recipe: Recipe, as_json: bool) -> None:
    if as_json:
        print_json(_build_json(result) | ({} if continued is None else {"continued": continued.to_json()}))
        return
    _print_tuned(result, recipe)
    if continued is not None:
        print_continued(continued)


def _run_tuning(
    recipe: Recipe, start: str | None, options: dict[str, Any], promote: str | None, gate: dict[str, float],
    resume: bool, run_folder: Path, callback: ConsoleWatch,
) -> tuple[TuneResult, Continued | None]:  # fmt: skip
    """Tune a recipe, from the start or from a stored adapter; say so and end where it is interrupted.

    Args:
        options: of `continue_tuning`: new data and their replay.
        gate: bounds of the gate that are not the usual ones.
    Returns:
        What was tuned; and how it compares with where it went on from, where that was an adapter of the same task.
    """
    callback.on_note(f"Loading {recipe.backbone.model} ...")
    from peft_combo.tuning.loop import Interrupted, tune

    try:
        if start is None:
            return tune(recipe, resume=resume, run_folder=run_folder, callback=callback), None
        pretrained = _find_pretrained(recipe, start, options, promote)
        if pretrained is not None:
            tuned = tune(
                pretrained.recipe, resume=resume, run_folder=run_folder, callback=callback, task=pretrained.task,
                start=pretrained.start,
            )  # fmt: skip
            return tuned, None
        from peft_combo.tuning.continual import Gate, continue_tuning

        continued = continue_tuning(
            recipe, start, **options, promote=promote, gate=Gate(**gate), resume=resume, run_folder=run_folder,
            callback=callback,
        )  # fmt: skip
        return continued.result, continued
    except Interrupted as error:
        callback.close()
        callback.on_note(str(error))
        raise typer.Exit(error.exit_code) from None


def _check_cheaply(recipe: Recipe, start: str | None, promote: str | None, run_folder: Path | None) -> None:
    """Refuse before torch is loaded: an adapter that is not stored, a store that cannot be written, a folder in use.

    Args:
        run_folder: None where nothing is to be written.
    """
    from peft_combo.files import check_folder_target
    from peft_combo.store.adapter_store import AdapterStore
    from peft_combo.store.references import check_alias
    from peft_combo.tuning.run_folder import check_run_folder

    store = AdapterStore(recipe.store)
    if start is not None:
        store.open(start)
    if promote is not None:
        check_alias(promote)
    if run_folder is not None and get_rank() == 0:
        check_folder_target(store.path)
        check_run_folder(run_folder)


def _find_pretrained(
    recipe: Recipe, start: str, options: dict[str, Any], promote: str | None = None
) -> Pretrained | None:
    """Return the start of a task from a pretrained adapter; None where --from names an adapter of the task."""
    from peft_combo.errors import PeftComboError
    from peft_combo.tuning.continual import start_pretrained

    found = start_pretrained(recipe, start)
    if found is not None and (options["new_data"] is not None or promote is not None):
        raise PeftComboError(
            f"{found.start.reference} was pretrained on texts: there is no old data to join and no earlier version of "
            "the task to compare with. Drop --new-data and --promote."
        )
    return found


def _print_dry_run(
    recipe: Recipe, start: str | None, options: dict[str, Any], run_folder: Path, max_memory_gib: float | None,
    max_minutes: float | None, as_json: bool,
) -> bool:  # fmt: skip
    """Print the plan; return whether the run would fit."""
    from peft_combo.tuning.plan import plan

    task = None
    if start is not None:
        from peft_combo.tuning.continual import continuation

        run: Pretrained | Continuation
        run = _find_pretrained(recipe, start, options) or continuation(recipe, start, **options)
        recipe, task = run.recipe, run.task
    found = plan(recipe, task)
    short = found.shortfalls(recipe, run_folder, max_memory_gib, max_minutes)
    if as_json:
        peaks = {"peak_mib": found.memory.host, "gpu_peak_mib": found.memory.device}
        print_json({**asdict(found), **peaks, "fits": not short, "shortfalls": short})
        return not short
    _print_plan(found)
    for problem in short:
        print_line(f"Does not fit: {problem}")
    if not short:
        print_line("Fits. Nothing was trained or stored.")
    return not short


def _print_plan(plan: Plan) -> None:
    from peft_combo.tuning.resources import duration

    memory, disk = plan.memory, plan.disk
    encoder = plan.frozen_parameters
    examples = ", ".join(f"{count:,} {part}" for part, count in plan.examples.items())
    rows: list[tuple[str, str, str]] = [
        ("adapter", f"{plan.adapter_parameters:,}", f"parameters, {plan.adapter_parameters / encoder:.2%} of frozen"),
        ("head", f"{plan.head_parameters:,}", "parameters"),
        ("frozen", f"{encoder:,}", f"parameters, {plan.precision}"),
        ("data", f"{plan.items:,}", f"texts; {plan.unit}: {examples}"),
        ("steps", f"{plan.steps:,}", f"in {plan.epochs} epochs, the first {plan.warmup_steps:,} of them warm-up, then "
         f"{plan.schedule}; {plan.evaluations:,} evaluations by {plan.metric}"),
        ("memory", _format_mib(memory.host), "at the peak, of which:"),
        ("  libraries and data", _format_mib(memory.base), ""),
        ("  frozen weights", _format_mib(memory.frozen), f"{_format_mib(memory.loading)} while they load"),
        ("  what learns", _format_mib(memory.trained), "adapter and head, gradients, optimizer state, best copy"),
        ("  one step", _format_mib(memory.step), "activations of the heaviest micro-batch, "
         "at the lengths of its texts"),
        ("  lower layers", _format_mib(memory.cached), "states kept below the adapter"),
        ("  allocator", _format_mib(memory.allocator), "what passes through the encoder take beyond that and keep"),
        ("  catalogue", _format_mib(memory.vectors), "vectors; not at the same time as a step"),
        ("  evaluation", _format_mib(memory.evaluation), "block of scores; not at the same time as a step"),
    ]  # fmt: skip
    if memory.gpu:
        base = next(place for place, row in enumerate(rows) if "libraries" in row[0])
        rows.insert(base + 1, ("GPU memory", _format_mib(memory.device), "at the peak, of which:"))
    rows += [
        ("disk", _format_mib(disk.checkpoints), "checkpoints while it runs"),
        ("", _format_mib(disk.adapter), "the adapter"),
        ("", _format_mib(disk.scratch), "lower layers that do not fit into training.cache_limit_mib"),
        ("", _format_mib(disk.vectors), "vectors, once the catalogue is encoded with it"),
        ("time", duration(plan.seconds), f"on {plan.device}, without early stopping"),
    ]
    print_line(f"{plan.recipe}: {plan.method} for {plan.category}")
    print_table(("", "", ""), rows)
    for note in plan.notes:
        print_line(f"Note: {note}")
    for advice in plan.advice:
        print_line(f"Advice: {advice}")


def _format_mib(size: float) -> str:
    return f"{size / 1024:,.2f} GiB" if size >= 1024 else f"{size:,.1f} MiB"


def print_continued(continued: Continued) -> None:
    versions = (continued.start.reference, continued.result.record.reference)
    print_line()
    print_line(f"{versions[1]} went on from {versions[0]}")
    told = []
    for one in (*continued.validation, continued.test):
        gain = one.gain
        told.append(
            (one.questions, f"{one.asked:,}", *(f"{row.values['ndcg@10']:.4f}" for row in (one.before, one.after)),
             f"{gain.value:+.4f}", f"{gain.interval[0]:+.4f} to {gain.interval[1]:+.4f}", f"{gain.p:.4f}")
        )  # fmt: skip
    print_table(("NDCG@10", "questions", *versions, "gain", "95 % interval", "p"), told, numbers=True)
    print_line("The old test questions were asked once, for this report; nothing was chosen by them.")
    print_line(continued.promotion)


def _print_tuned(result: TuneResult, recipe: Recipe) -> None:
    from peft_combo.metrics.charts import draw
    from peft_combo.tuning.resources import duration

    plan, table = result.plan, result.table
    print_line(f"{recipe.category} by {recipe.adapter.method}: {table.asked}")
    columns = list(table.after.values)
    print_table(
        ("", *(told for name in columns for told in _format_headings(name, table.metric))),
        [
            (row.name, *(told for name in columns for told in _format_values(row, name, table.metric)))
            for row in table.rows
        ],
        numbers=True,
    )
    for detail in table.details:
        print_line()
        print_line(detail.title)
        print_table(detail.header, [[_format_cell(value) for value in row] for row in detail.rows], numbers=True)
    gain = table.gain
    verdict = (
        "better than" if gain.interval[0] > 0 else "not clearly better than" if gain.value > 0 else "no better than"
    )
    print_line(
        f"The tuned encoder is {verdict} the frozen one: {format_metric_name(table.metric)} {gain.value:+.4f} "
        f"[{gain.interval[0]:+.4f}, {gain.interval[1]:+.4f}], paired by group, p = {gain.p:.4f}."
    )
    print_line(table.caveat)
    steps = f"{'stopped early, ' if result.stopped_early else ''}best step {result.chosen['best_step']} of {plan.steps}"
    if "strength" in result.chosen:
        steps += f", head at {result.chosen['strength']:.0%} of what it learned"
    spent = f"{duration(result.seconds)}, peak memory {result.peak_mib / 1024:.1f} GiB"
    print_line(f"Stored {result.record.reference} in {result.record.path}, read back and compared ({steps}; {spent}).")
    print_line(f"Loss log: {result.run_folder / 'log.jsonl'}")
    drawn = table.chart(f"{recipe.category} by {recipe.adapter.method}: {format_metric_name(table.metric)}")
    write_chart(lambda path: draw(drawn, path), None, result.run_folder / "quality.html", as_json=False)


def _format_headings(name: str, interval_of: str) -> tuple[str, ...]:
    return (format_metric_name(name), "95 % interval") if name == interval_of else (format_metric_name(name),)


def _format_values(row: ResultRow, name: str, interval_of: str) -> tuple[str, ...]:
    told = _format_cell(row.values.get(name, ""))
    return (told, f"{row.interval[0]:.3f} to {row.interval[1]:.3f}") if name == interval_of else (told,)


def _format_cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _build_json(result: TuneResult) -> dict[str, Any]:
    table = result.table
    return {
        "adapter": result.record.reference,
        "path": str(result.record.path),
        "plan": asdict(result.plan),
        "rows": [{"name": row.name, **row.values, f"{table.metric} interval": row.interval} for row in table.rows],
        "gain": vars(table.gain),
        "questions": table.questions,
        "details": {
            detail.title: [dict(zip(detail.header, row, strict=True)) for row in detail.rows]
            for detail in table.details
        },
        "chosen": result.chosen,
        "stopped_early": result.stopped_early,
        "losses": result.losses,
        "seconds": result.seconds,
        "peak_mib": result.peak_mib,
    }
