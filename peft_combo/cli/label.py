"""`data suggest`: what is most worth labelling, and a file to label it in."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from peft_combo.cli.app import (
    DataOption,
    JsonOption,
    RecipeStoreOption,
    SetOption,
    data_app,
    load_ready_recipe,
    open_workspace,
)
from peft_combo.cli.complete import complete_adapter, complete_recipe
from peft_combo.cli.output import ConsoleWatch, console_watch, print_json, print_line, print_table
from peft_combo.errors import DataError, RecipeError

if TYPE_CHECKING:
    from peft_combo.encoder.bank import LiveAdapter
    from peft_combo.recommender.workspace import Workspace
    from peft_combo.tuning.active_learning import LabelSuggestion


@data_app.command("suggest")
def data_suggest(
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe", "-r", autocompletion=complete_recipe, help="Recipe of the data and the task to label for."
        ),
    ],
    adapter: Annotated[
        str,
        typer.Option(
            "--adapter", autocompletion=complete_adapter, help="Adapter of that task whose uncertainty decides."
        ),
    ],
    data: DataOption = None,
    what: Annotated[
        Literal["bundles", "titles"] | None,
        typer.Option("--what", help="Kind of what to label; default that of the adapter's task."),
    ] = None,
    count: Annotated[int, typer.Option("-n", min=1, max=100_000, help="Number of suggestions.")] = 20,
    target: Annotated[
        Path | None, typer.Option("--to", help="File to label them in: .csv or .jsonl (tags: .jsonl).")
    ] = None,
    overrides: SetOption = None,
    store: RecipeStoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Suggest what is most worth labelling: where an adapter is least sure, and nothing twice."""
    from peft_combo.data.labels.annotation import check_label_file, write_to_label

    loaded = load_ready_recipe(recipe, overrides, data, store)
    space = open_workspace(loaded, recipe, overrides, data, store, [adapter], needs="items")
    kind = str(space.records[0].manifest.task.get("kind"))
    if kind != loaded.task.kind:
        raise RecipeError(
            f'Adapter {adapter} was tuned for {kind}, recipe "{loaded.name}" is for {loaded.task.kind}; expected one '
            "task. Give the recipe that the adapter was tuned with."
        )
    fitting = {"bundle": "bundles", "classification": "titles", "tagging": "titles"}.get(kind)
    if fitting is None or what not in (None, fitting):
        remedy = f"Leave --what out, or set it to {fitting}." if fitting else "Use a bundle, class or tag adapter."
        raise DataError(f"An adapter for {kind} cannot say which {what or 'texts'} to label. {remedy}")
    if target is not None:
        check_label_file(target, lists=kind == "tagging")
    with console_watch() as callback:
        choose = _suggest_bundles if fitting == "bundles" else _suggest_titles
        found = choose(space, space.bank.get(adapter), count, callback)
    if as_json:
        print_json([asdict(one) for one in found])
    else:
        _print_suggested(found, fitting)
    if target is not None:
        write_to_label(target, [row for one in found for row in one.rows])
        if not as_json:
            print_line(f"{len(found):,} to label in {target}. {_HOW[kind]}")
            print_line(f"Check them with: peft-combo data check --recipe {shlex.quote(recipe)} --data FOLDER")


def _print_suggested(found: Sequence[LabelSuggestion], fitting: str) -> None:
    guessed = fitting == "titles"
    print_table(
        ("", "unsure", *(("text", "guess") if guessed else ("items",))),
        [
            (place, f"{one.uncertainty:.2f}", one.shown, *((one.guess,) if guessed else ()))
            for place, one in enumerate(found, start=1)
        ],
    )


_HOW = {
    "classification": "Fill in the column label.",
    "tagging": "Put the spans right.",
    "bundle": "Take out what does not go together, and add the rest to your bundles.",
}


def _suggest_titles(space: Workspace, live: LiveAdapter, count: int, callback: ConsoleWatch) -> list[LabelSuggestion]:
    from peft_combo.data.labels.annotation import find_unlabelled
    from peft_combo.recipe.task import ClassificationTask, TaggingTask
    from peft_combo.tuning.active_learning import suggest_texts

    recipe = space.recipe
    assert isinstance(recipe.task, ClassificationTask | TaggingTask)
    pool = find_unlabelled(recipe.data, recipe.task)
    callback.on_note(f"{pool.name}: {len(pool.texts):,} texts wait for a label, {pool.labelled:,} have one")
    callback.on_stage("Reading", len(pool.texts))
    return suggest_texts(space.backbone, live, pool.texts, count, recipe.seed, callback.on_advance)


def _suggest_bundles(space: Workspace, live: LiveAdapter, count: int, callback: ConsoleWatch) -> list[LabelSuggestion]:
    from peft_combo.data.pseudo_bundles import Mined, mine
    from peft_combo.recipe.task import BundleTask, PseudoBundles
    from peft_combo.tuning.active_learning import suggest_bundles

    recipe, dataset = space.recipe, space.dataset
    assert isinstance(recipe.task, BundleTask)
    mined: Mined | None = None
    if dataset.interactions is not None:
        try:
            parts = space.split
        except DataError:  # without enough bundles to divide, the adapter's own pairs are what there is
            callback.on_note("too few bundles to divide: what was bought together is not looked at")
        else:
            mined = mine(dataset, parts, recipe.task.pseudo_bundles or PseudoBundles())
            callback.on_note(mined.notes[0])
    callback.on_stage("Encoding", len(dataset.catalog))
    sets = () if mined is None else mined.items
    return suggest_bundles(space.backbone, live, dataset, sets, count, recipe.seed, callback.on_advance)
