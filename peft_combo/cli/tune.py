"""`tune` and `embed`: what makes adapters and item vectors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_combo.cli.app import CacheOption, DataOption, JsonOption, RecipeOption, SetOption, StoreOption, app
from peft_combo.cli.shown import console_watch, metric_name, print_json, print_table, rank

if TYPE_CHECKING:
    from peft_combo.recipe import Recipe
    from peft_combo.tasks.base import Row
    from peft_combo.tuning import TuneResult


@app.command()
def tune(
    recipe: RecipeOption,
    data: DataOption = None,
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this recipe.")] = False,
    run_folder: Annotated[
        Path | None, typer.Option("--run-folder", help="Checkpoints and loss log; default runs/<recipe>.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tune one category's adapter and store it, with quality before and after."""
    from peft_combo.recipe_files import load_recipe

    loaded = load_recipe(recipe, tuple(overrides or ()), data).ready()
    with console_watch() as watch:
        watch.note(f"Loading {loaded.backbone.model} ...")
        from peft_combo.tuning import Interrupted
        from peft_combo.tuning import tune as run

        try:
            result = run(loaded, resume=resume, run_folder=run_folder, watch=watch)
        except Interrupted as error:
            watch.close()
            if watch.main:
                print(error, file=sys.stderr)
            raise typer.Exit(130) from None
    if not watch.main:
        return
    if as_json:
        print_json(_tune_json(result))
    else:
        _print_tuned(result, loaded)


@app.command()
def embed(
    recipe: RecipeOption,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="fashion or fashion@v2; without it the frozen encoder.")
    ] = None,
    data: DataOption = None,
    overrides: SetOption = None,
    store: StoreOption = Path("adapters"),
    cache: CacheOption = Path("vectors"),
) -> None:
    """Encode a catalogue once; under `accelerate launch` each process takes a share."""
    import os

    from peft_combo.recipe_files import load_recipe

    loaded = load_recipe(recipe, tuple(overrides or ()), data).ready()
    with console_watch() as watch:
        from peft_combo.adapters import AdapterStore
        from peft_combo.backbone import Backbone
        from peft_combo.bank import AdapterBank
        from peft_combo.data import open_dataset
        from peft_combo.vectors import embed as run

        texts = open_dataset(loaded.data).catalog.texts(loaded.data.text)
        backbone = Backbone.of(loaded.backbone)
        process, processes = rank(), int(os.environ.get("WORLD_SIZE", "1"))
        watch.stage("Encoding the catalogue", len(set(texts)) // processes)
        count = run(
            AdapterBank(backbone, AdapterStore(store)), texts, adapter, cache,
            process=process, processes=processes, progress=watch.advance,
        )  # fmt: skip
    if watch.main:
        whose = adapter or "the frozen encoder"
        print(f"{len(texts):,} items of {loaded.name} in {cache} for {whose}; {count:,} encoded now")


def _print_tuned(result: TuneResult, recipe: Recipe) -> None:
    from peft_combo.tuning import duration

    plan, table = result.plan, result.table
    print(f"{recipe.category} by {recipe.adapter.method}: {table.asked}")
    columns = list(table.after.values)
    print_table(
        ("", *(told for name in columns for told in _headings(name, table.metric))),
        [(row.name, *(told for name in columns for told in _figures(row, name, table.metric))) for row in table.rows],
        numbers=True,
    )
    for detail in table.details:
        print(f"\n{detail.title}")
        print_table(detail.header, [[_cell(value) for value in row] for row in detail.rows], numbers=True)
    gain = table.gain
    verdict = (
        "better than" if gain.interval[0] > 0 else "not clearly better than" if gain.value > 0 else "no better than"
    )
    print(
        f"The tuned encoder is {verdict} the frozen one: {metric_name(table.metric)} {gain.value:+.4f} "
        f"[{gain.interval[0]:+.4f}, {gain.interval[1]:+.4f}], paired by group, p = {gain.p:.4f}."
    )
    print(table.caveat)
    steps = f"{'stopped early, ' if result.stopped_early else ''}best step {result.chosen['best_step']} of {plan.steps}"
    if "strength" in result.chosen:
        steps += f", head at {result.chosen['strength']:.0%} of what it learned"
    spent = f"{duration(result.seconds)}, peak memory {result.peak_mib / 1024:.1f} GiB"
    print(f"Stored {result.record.reference} in {result.record.path}, read back and compared ({steps}; {spent}).")
    print(f"Loss log: {result.run_folder / 'log.jsonl'}")


def _headings(name: str, interval_of: str) -> tuple[str, ...]:
    return (metric_name(name), "95 % interval") if name == interval_of else (metric_name(name),)


def _figures(row: Row, name: str, interval_of: str) -> tuple[str, ...]:
    told = _cell(row.values.get(name, ""))
    return (told, f"{row.interval[0]:.3f} to {row.interval[1]:.3f}") if name == interval_of else (told,)


def _cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _tune_json(result: TuneResult) -> dict[str, Any]:
    table = result.table
    return {
        "adapter": result.record.reference,
        "path": str(result.record.path),
        "plan": vars(result.plan),
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
