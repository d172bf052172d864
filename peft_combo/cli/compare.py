"""`compare`, `search` and `lr-range`: which method, which values, which learning rate."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_combo.cli.app import DataOption, JsonOption, RecipeOption, SetOption, app, check_data_path, load_ready_recipe
from peft_combo.cli.chart_files import PLOT_HELP, write_chart
from peft_combo.cli.complete import complete_key, complete_method, complete_recipe
from peft_combo.cli.extras import require_extra
from peft_combo.cli.output import console_watch, format_metric_name, print_error, print_json, print_line, print_table
from peft_combo.cli.workers import AddressOption, OnOption, WorkersOption, open_executor, refuse_alone
from peft_combo.errors import PeftComboError

if TYPE_CHECKING:
    from peft_combo.evaluation.comparison.table import Comparison
    from peft_combo.evaluation.lr_range import RateRange
    from peft_combo.evaluation.search import Search
    from peft_combo.recipe.model import Recipe


PlotOption = Annotated[Path | None, typer.Option("--plot", help=PLOT_HELP)]
ToOption = Annotated[Path | None, typer.Option("--to", help="File to write the best one to as a recipe: winner.yaml.")]


@app.command(short_help="Tune methods, values or recipes on the same data, and test.")
def compare(
    recipe: RecipeOption,
    others: Annotated[
        list[str] | None,
        typer.Argument(
            autocompletion=complete_recipe,
            metavar="[OTHER_RECIPE]...",
            help="Further recipes, on the first one's data.",
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method", autocompletion=complete_method, help="Method in place of the recipe's own; may be repeated."
        ),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            "--over",
            autocompletion=complete_key,
            help="Values of a key, as in adapter.rank=4,8,16; may be repeated.",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds of every variant, with commas between.")] = "0,1,2",
    data: DataOption = None,
    overrides: SetOption = None,
    plot: PlotOption = None,
    to: ToOption = None,
    folder: Annotated[
        Path, typer.Option("--folder", help="Folder of results and adapters, where the same command goes on.")
    ] = Path("runs/compare"),
    as_json: JsonOption = False,
) -> None:
    """Tune methods, values or recipes on the same data and budget, and say which differences are more than luck."""
    from peft_combo.files import check_folder_target
    from peft_combo.metrics.charts import check_ending, draw
    from peft_combo.recipe.files import check_destination, load_recipe, write_recipe

    numbers = _parse_seeds(seeds)
    for name in (recipe, *(others or ())):
        load_recipe(name, (), data)
    check_folder_target(folder)
    if plot is not None:
        check_ending(plot)
    if to is not None:
        check_destination(to)
    with console_watch() as callback:
        from peft_combo.evaluation.comparison.runs import Stopped
        from peft_combo.evaluation.comparison.runs import compare as run
        from peft_combo.evaluation.comparison.table import chart
        from peft_combo.evaluation.comparison.variants import over_of, variants_of

        variants = variants_of(
            recipe, methods=methods or (), over=[over_of(one) for one in over or ()], others=others or (),
            overrides=overrides or (), data=None if data is None else str(data),
        )  # fmt: skip
        try:
            found = run(variants, numbers, folder, callback)
        except Stopped as error:
            callback.close()
            print_error(error)
            raise typer.Exit(error.exit_code) from None
    if as_json:
        print_json(found.to_json())
    else:
        _print_comparison(found)
    write_chart(lambda path: draw(chart(found), path), plot, folder / "chart.html", as_json)
    if to is not None:
        quality = f"{format_metric_name(found.metric)} {found.best.value:.4f} on validation"
        told = f"{quality}, seeds {', '.join(map(str, numbers))}"
        write_recipe(
            found.recipes[found.best.label],
            to,
            (f"The best of {len(found.lines)} variants of {recipe}: {found.best.label} ({told}).", "",
             f"Run:  peft-combo tune --recipe {shlex.quote(str(to))}"),
        )  # fmt: skip


@app.command(short_help="Search for the best values of some keys with Optuna.")
def search(
    recipe: RecipeOption,
    over: Annotated[
        list[str],
        typer.Option(
            "--over",
            autocompletion=complete_key,
            help="Values of a key: 4,8,16, or a span, 1..3 or 1e-4..1e-2:log; may be repeated.",
        ),
    ],
    trials: Annotated[
        int, typer.Option("--trials", min=1, max=10_000, help="Number of trials, with earlier ones.")
    ] = 20,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the proposals.")] = 0,
    data: DataOption = None,
    overrides: SetOption = None,
    to: ToOption = None,
    folder: Annotated[Path, typer.Option("--folder", help="Folder of the study, where it goes on.")] = Path(
        "runs/search"
    ),
    on: OnOption = None,
    workers: WorkersOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search for the best values of some keys with Optuna, cutting off trials that fall behind.

    With --on trials run side by side, by workers that see the one study file.
    """
    from peft_combo.files import check_folder_target
    from peft_combo.recipe.files import check_destination, write_recipe

    refuse_alone(
        ("--workers", workers is not None, "--on", on is not None),
        ("--address", address is not None, "--on ray", on == "ray"),
    )
    require_extra("search", "A search")
    check_data_path(load_ready_recipe(recipe, overrides, data))
    check_folder_target(folder)
    if to is not None:
        check_destination(to)
    with console_watch() as callback, ExitStack() as opened:
        from peft_combo.evaluation.search import axis_of
        from peft_combo.evaluation.search import search as run
        from peft_combo.tuning.loop import Interrupted

        axes = [axis_of(one) for one in over]
        executor = None if on is None else opened.enter_context(open_executor(on, workers, address, callback))
        try:
            found = run(
                recipe, axes, trials=trials, overrides=overrides or (), data=None if data is None else str(data),
                seed=seed, folder=folder, callback=callback, executor=executor,
            )  # fmt: skip
        except Interrupted as error:
            callback.close()
            print_error(error)
            raise typer.Exit(error.exit_code) from None
    if found.best is None or found.recipe is None:
        reason = found.trials[-1].reason or "all were cut off"
        raise PeftComboError(f"None of the {len(found.trials)} trials came to an end; the last: {reason}")
    if as_json:
        print_json(found.to_json())
    else:
        _print_search(found)
    if to is not None:
        told = f"{format_metric_name(found.metric)} {found.best.value:.4f} on validation"
        what = f"The best of {len(found.trials)} trials over {recipe}: {' '.join(found.best.settings)} ({told})."
        write_recipe(found.recipe, to, (what, "", f"Run:  peft-combo tune --recipe {shlex.quote(str(to))}"))


@app.command("lr-range", short_help="Find the learning rate that a recipe bears.")
def lr_range(
    recipe: RecipeOption,
    low: Annotated[float, typer.Option("--from", min=1e-12, max=1, help="Learning rate of the first step.")] = 1e-6,
    high: Annotated[float, typer.Option("--to", min=1e-12, max=100, help="Learning rate of the last step.")] = 1.0,
    steps: Annotated[int, typer.Option("--steps", min=10, max=1000, help="Number of steps between them.")] = 100,
    data: DataOption = None,
    overrides: SetOption = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Raise the learning rate step by step until the loss runs away, and suggest one; stores nothing."""
    from peft_combo.metrics.charts import check_ending, draw
    from peft_combo.tuning.run_folder import name_run_folder

    if low >= high:
        raise PeftComboError(f"--from and --to: expected a rate that grows, found {low:g} to {high:g}.")
    if plot is not None:
        check_ending(plot)
    loaded = load_ready_recipe(recipe, overrides, data)
    check_data_path(loaded)
    with console_watch() as callback:
        from dataclasses import asdict

        from peft_combo.evaluation.lr_range import lr_range as run

        found = run(loaded, low=low, high=high, steps=steps, callback=callback)
    if as_json:
        print_json({**asdict(found), "below_divergence": found.below_divergence})
    else:
        _print_range(found, loaded, steps)
    drawn = found.chart(f"{loaded.name}: training loss while the learning rate grows")
    write_chart(lambda path: draw(drawn, path), plot, name_run_folder(loaded) / "lr-range.html", as_json)


def _print_range(found: RateRange, recipe: Recipe, steps: int) -> None:
    print_line(f"{recipe.name}: {len(found.losses)} of {steps} steps, from {found.rates[0]:g} to {found.rates[-1]:.2g}")
    if found.steepest is None:
        print_line("The loss never fell; raise --to or --steps.")
    else:
        print_line(f"The loss falls fastest at {found.steepest:.2g}.")
    if found.diverged is None or found.below_divergence is None:
        print_line(f"It did not run away up to {found.rates[-1]:.2g}; raise --to to see where it does.")
    else:
        rate = found.rates[found.diverged]
        print_line(f"It is lost at {rate:.2g}; a tenth of that, {found.below_divergence:.2g}, is the most to try.")
    print_line(f"The recipe has {recipe.training.learning_rate:g}. Change it with: --set training.learning_rate=RATE")


def _parse_seeds(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) < 2**32 for word in words) or len({*words}) < len(words):
        raise PeftComboError(f"--seeds: expected different whole numbers from 0, as in 0,1,2; found {text}.")
    return [int(word) for word in words]


def _print_comparison(found: Comparison) -> None:
    from peft_combo.evaluation.comparison.table import PROTOCOL

    seeds = ", ".join(map(str, found.seeds))
    print_line(f"{found.asked}; seed{'s' if len(found.seeds) > 1 else ''} {seeds}")
    print_table(
        ("", format_metric_name(found.metric), "95 % interval", "spread", "gain", "p: best", "parameters", "stored MiB",
         "minutes", "peak MiB", "1 text ms", "32 texts ms", "load ms"),
        [line.cells() for line in found.lines],
        numbers=True,
    )  # fmt: skip
    for one in found.failed:
        print_line(f"{one.label}: failed: {one.reason}")
    best = f"Best: {found.best.label}."
    if found.cheapest is not None and found.cheapest != found.best.label:
        best += f" Cheapest of those not significantly worse: {found.cheapest}."
    print_line(
        f"{best} gain: over the frozen encoder. parameters: the adapter's; the head's come on top. ms: median, and in "
        "brackets how many times the frozen encoder's."
    )
    print_line(f"{PROTOCOL} Times on {found.machine}.")


def _print_search(found: Search) -> None:
    assert found.best is not None
    keys = [setting.partition("=")[0] for setting in found.best.settings]
    print_table(
        ("trial", *keys, format_metric_name(found.metric), "evaluations", "seconds", ""),
        [
            (
                str(trial.number),
                *(setting.partition("=")[2] for setting in trial.settings),
                "" if trial.value is None else f"{trial.value:.4f}",
                str(trial.evaluations),
                f"{trial.seconds:.0f}",
                {"complete": "best" if trial is found.best else "", "pruned": "cut off"}.get(trial.state, trial.reason),
            )
            for trial in found.trials
        ],
        numbers=True,
    )
    if found.importance:
        told = ", ".join(f"{key} {share:.0%}" for key, share in found.importance.items())
        print_line(f"What made the difference between complete trials: {told}.")
    print_line(
        f"Best: {' '.join(found.best.settings)}. Validation chose it, so its figure is flattered. Study: {found.study}"
    )
