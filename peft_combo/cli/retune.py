"""`retune`: learns from use, promotes on a win, rolls back a regression; made to be run by a clock."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from peft_combo.cli.complete import complete_alias_name
from peft_combo.cli.output import ConsoleWatch, console_watch, print_json, print_line
from peft_combo.cli.tune import GateForgettingOption, GateGainOption, GatePOption, print_continued
from peft_combo.errors import DataError, PeftComboError

if TYPE_CHECKING:
    from peft_combo.data.use import UseBundle
    from peft_combo.evaluation.retune import Retuned, RetuneRule, Use
    from peft_combo.recipe.model import Recipe
    from peft_combo.serving.state import State

_ACTOR = "retune"


@app.command(short_help="Look after an alias once: roll back, or learn from use.")
def retune(
    recipe: RecipeOption,
    alias: Annotated[
        str,
        typer.Option(
            "--alias", autocompletion=complete_alias_name, help="Alias of the recipe's category to look after."
        ),
    ] = "prod",
    state: Annotated[
        str | None,
        typer.Option("--state", envvar="PEFT_COMBO_STATE", help="State of the service, a folder or a database URL."),
    ] = None,
    new_data: Annotated[
        Path | None, typer.Option("--new-data", help="Folder of later data, in place of the service's state.")
    ] = None,
    run_folder: Annotated[
        Path | None,
        typer.Option("--run-folder", help="Folder of journal and runs; default runs/retune, category and alias."),
    ] = None,
    fewest: Annotated[
        int, typer.Option("--min-new", min=1, help="Number of new bundles without which nothing is tuned.")
    ] = 50,
    only_on_drift: Annotated[
        bool, typer.Option("--only-on-drift", help="Nothing tuned where no comparison of old and new shows drift.")
    ] = False,
    replay: Annotated[
        float, typer.Option("--replay", help="Share of training bundles drawn from the recipe's own data.")
    ] = 0.3,
    gate_gain: GateGainOption = None,
    gate_p: GatePOption = None,
    gate_forgetting: GateForgettingOption = None,
    fail_on_no_promotion: Annotated[
        bool, typer.Option("--fail-on-no-promotion", help="Exit code 4 where it tuned and the alias stayed.")
    ] = False,
    data: DataOption = None,
    overrides: SetOption = None,
    store: RecipeStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look after an alias once: roll back where feedback shows a regression, else learn from new use.

    Takes what the service's users put together since the last time, checks drift, goes on tuning from the version in
    use, compares the two on held-out new and old bundles, and moves the alias on a win. Run it by cron: a second one
    waits for nothing and ends, one that was stopped goes on.
    """
    if (state is None) == (new_data is None):
        raise DataError("Expected --state of the service, or --new-data with a folder of later data; one of the two.")
    loaded = load_ready_recipe(recipe, overrides, data, store)
    check_data_path(loaded)
    bounds = {"gain": gate_gain, "p": gate_p, "forgetting": gate_forgetting}
    from peft_combo.store.adapter_store import AdapterStore

    AdapterStore(loaded.store).alias_at(f"{loaded.category}@{alias}")  # refused before torch is loaded
    folder = run_folder or Path("runs") / f"retune-{loaded.category}-{alias}"
    opened = None if state is None else open_state(state)
    try:
        with console_watch() as callback:
            from peft_combo.evaluation.retune import RetuneRule
            from peft_combo.tuning.continual import Gate

            gate = Gate(**{name: value for name, value in bounds.items() if value is not None})
            if opened is not None:
                gather: Callable[[], Use] = partial(_gather_use, opened, loaded, alias, folder, callback)
            else:
                assert new_data is not None
                gather = partial(_read_use, loaded, new_data)
            rule = RetuneRule(fewest, only_on_drift, replay, gate)
            done = _run_retuning(loaded, alias, gather, folder, rule, callback)
        if opened is not None:
            _tell_service(opened, loaded, alias, done)
    finally:
        if opened is not None:
            opened.close()
    if as_json:
        print_json(done.to_json())
    else:
        _print_retuned(done)
    if fail_on_no_promotion and done.outcome == "not promoted":
        raise typer.Exit(4)


def _run_retuning(
    recipe: Recipe, alias: str, gather: Callable[[], Use], folder: Path, rule: RetuneRule, callback: ConsoleWatch
) -> Retuned:
    """Retune; say so and end where it is interrupted."""
    from peft_combo.evaluation.retune import retune as run
    from peft_combo.tuning.loop import Interrupted

    try:
        return run(recipe, alias, gather, folder, rule=rule, callback=callback)
    except Interrupted as error:
        callback.close()
        callback.on_note(str(error))
        raise typer.Exit(error.exit_code) from None


def open_state(place: str) -> State:
    """Open the state of a service.

    Raises:
        PeftComboError: the extra is not installed, or there is no such state.
    """
    if find_spec("sqlalchemy") is None:
        raise PeftComboError(
            "The state of a service needs SQLAlchemy, which is not installed. Install it with: pip install "
            "'peft-combo[serve]'"
        )
    from peft_combo.files import literal_path
    from peft_combo.serving.state import State

    if "://" not in place and not literal_path(place).is_dir():
        raise DataError(
            f"There is no state of a service in {place}. Name the folder or URL that the service keeps its state in."
        )
    return State.open(place)


def _gather_use(state: State, recipe: Recipe, alias: str, folder: Path, callback: ConsoleWatch) -> Use:
    """Write what the service's users took together as a data folder, and read what they were shown."""
    from peft_combo.data.sources import open_dataset
    from peft_combo.data.use import write_bundles
    from peft_combo.evaluation.retune import Use
    from peft_combo.serving.learning import gather_bundles, gather_items, gather_lists

    dataset = open_dataset(recipe.data)
    known = {state.identify(owner): owner for owner in set(dataset.bundles.owners) if owner is not None}
    bundles = gather_bundles(state)
    kept, notes = write_bundles(folder / "gathered", bundles, dataset.catalog, gather_items(state), known, recipe.data)
    callback.on_note(f"{len(bundles):,} bundles of use, {len(kept):,} of them to learn from")
    for note in notes:
        callback.on_note(f"Note: {note}")
    return Use(folder / "gathered", kept, gather_lists(state, f"{recipe.category}@{alias}"))


def _read_use(recipe: Recipe, new_data: Path) -> Use:
    """Read a folder of later data; a bundle without a time is as new as the newest file there."""
    import numpy as np

    from peft_combo.data.sources import open_dataset
    from peft_combo.data.use import UseBundle
    from peft_combo.evaluation.retune import Use
    from peft_combo.files import literal_path

    later = open_dataset(recipe.data.model_copy(update={"source": "folder", "path": str(new_data)}))
    newest = max(path.stat().st_mtime for path in literal_path(new_data).iterdir() if path.is_file())
    bundles, ids = later.bundles, later.catalog.item_ids
    found: list[UseBundle] = [
        UseBundle(name, owner, tuple(ids[row] for row in rows), newest if np.isnan(when) else float(when))
        for name, owner, rows, when in zip(
            bundles.bundle_ids, bundles.owners, bundles.items, bundles.times, strict=True
        )
    ]
    return Use(new_data, found)


def _tell_service(state: State, recipe: Recipe, alias: str, done: Retuned) -> None:
    """Let a service that is told what to serve (`--adapters told`) follow the alias."""
    from peft_combo.serving.state import DeployedArm
    from peft_combo.store.adapter_store import AdapterStore

    if done.outcome in ("promoted", "rolled back"):
        reference = f"{recipe.category}@{alias}"
        version = AdapterStore(recipe.store).alias_at(reference).target
        action = "promote" if done.outcome == "promoted" else "rollback"
        state.put_deployment(reference, {"prod": DeployedArm(version, 100.0)}, _ACTOR, action)


def _print_retuned(done: Retuned) -> None:
    from peft_combo.evaluation.retune import describe_regression

    if done.regression is not None and done.outcome != "rolled back":
        print_line(describe_regression(done.regression))
    for one in done.drift:
        print_line(str(one))
    if done.continued is not None:
        print_continued(done.continued)
    else:
        print_line(done.told)
