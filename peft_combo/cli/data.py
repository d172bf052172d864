"""`data` commands: sources, checks, statistics, downloads, the demo as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_combo.cli.app import DataOption, JsonOption, SetOption, data_app
from peft_combo.cli.complete import complete_recipe
from peft_combo.cli.output import format_figure, print_faults, print_json, print_line, print_table

if TYPE_CHECKING:
    from peft_combo.errors import Fault
    from peft_combo.recipe.model import Recipe


TaskOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        autocompletion=complete_recipe,
        help="Recipe whose task is to learn from it; default every table there is.",
    ),
]


@data_app.command("list")
def data_list(as_json: JsonOption = False) -> None:
    """List the data sources and what it takes to use each."""
    from peft_combo.data.sources import available

    found = available()
    if as_json:
        print_json([vars(source) for source in found])
    else:
        print_table(("source", "what it is", "how to use it"), [(s.name, s.what, s.use) for s in found])


@data_app.command("check")
def data_check(recipe: TaskOption = None, data: DataOption = None, overrides: SetOption = None) -> None:
    """Say everything that is wrong with a dataset, labels or tags: every fault with file, line and remedy.

    With --recipe also what tuning would refuse. What was left out or is doubtful is said too, and how much is left.
    """
    from peft_combo.data.task_data import inspect_data

    loaded = _load(recipe, data, overrides)
    faults, figures = inspect_data(loaded.data, None if recipe is None else loaded.task)
    notes = [note for one in figures for note in one["notes"]]
    if recipe is not None and not faults:
        refused, notes = _build_task(loaded)
        faults += refused
    for one in figures:
        print_line(_summarize(one))
    for note in dict.fromkeys(notes):
        print_line(f"note: {note}")
    fine = "The data can be read; nothing is wrong with it."
    print_faults("", faults, fine=f"{fine[:-1]} but for what the notes say." if notes else fine)


@data_app.command("stats")
def data_stats(
    recipe: TaskOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a dataset, labels or tags in figures, and how they would be split."""
    from peft_combo.data.task_data import describe_data

    loaded = _load(recipe, data, overrides)
    found = describe_data(loaded.data, None if recipe is None else loaded.task)
    if as_json:
        print_json(found[0] if len(found) == 1 else found)
        return
    for place, figures in enumerate(found):
        if place:
            print_line()
        print_table(
            ("figure", "value"), [(name.replace("_", " "), format_figure(value)) for name, value in figures.items()]
        )


def _load(recipe: str | None, data: Path | None, overrides: list[str] | None) -> Recipe:
    """Return a recipe; where none is named, one whose data are the demo or --data, whatever task it is for."""
    from peft_combo.recipe.files import load_recipe

    return load_recipe(recipe or "lora-fashion", tuple(overrides or ()), data).ready()


def _build_task(recipe: Recipe) -> tuple[list[Fault], list[str]]:
    """Make the task as `tune` does: return why it refuses, and what it says of the data."""
    from peft_combo.errors import Fault, PeftComboError
    from peft_combo.tuning.tasks import build_task

    try:
        return [], list(build_task(recipe).notes)
    except PeftComboError as error:
        return list(error.faults) or [Fault(recipe.data.path or recipe.data.source, str(error))], []


def _summarize(figures: dict[str, Any]) -> str:
    """Say in a line how much of what was read is left, and how it would be split."""
    names = ("items", "bundles", "bundle_owners", "interactions", "users", "texts", "classes", "entities")
    counts = ", ".join(f"{figures[name]:,} {name.replace('_', ' ')}" for name in names if figures.get(name))
    divided = figures["split"]
    if isinstance(divided, str):
        return f"{figures['name']}: {counts}; no split: {divided}"
    parts = ", ".join(f"{divided[part]:,} {part}" for part in ("train", "valid", "test", "dropped") if part in divided)
    return f"{figures['name']}: {counts}; by {divided['by']}: {parts}"


@data_app.command("rules")
def data_rules(
    data: DataOption = None,
    overrides: SetOption = None,
    target: Annotated[Path | None, typer.Option("--to", help="File for the rules, in the form of rules.yaml.")] = None,
    min_support: Annotated[
        float, typer.Option("--min-support", help="Least share of bundles that a rule is about and that keep it.")
    ] = 0.01,
    min_confidence: Annotated[
        float, typer.Option("--min-confidence", help="Least share of the bundles a rule is about that keep it.")
    ] = 0.8,
    most: Annotated[int, typer.Option("-k", help="Number of rules at most.")] = 30,
    as_json: JsonOption = False,
) -> None:
    """Propose rules that bundles of the data keep more than by chance, to be pasted into rules.yaml.

    Training bundles are counted. Nothing acts before it stands in rules.yaml beside the data.
    """
    from peft_combo.data.knowledge.mining import describe_mined, mine_rules, to_figures
    from peft_combo.data.knowledge.rules import format_rules
    from peft_combo.data.sources import open_dataset
    from peft_combo.data.splits import split_as
    from peft_combo.files import write_text

    config = _load(None, data, overrides).data
    dataset = open_dataset(config)
    found = mine_rules(
        dataset, split_as(dataset, config).train, min_support=min_support, min_confidence=min_confidence, most=most
    )
    text = format_rules([one.rule for one in found], describe_mined(found))
    if target is not None:
        write_text(target, text)
    if as_json:
        print_json(to_figures(found))
    elif target is None:
        for line in text.splitlines():
            print_line(line)
    else:
        print_line(f"{len(found)} rules in {target}")


@data_app.command("copy")
def data_copy(
    name: Annotated[str, typer.Argument(help="Name of the source: demo, demo-zh or demo-pictures.")],
    folder: Annotated[Path, typer.Argument(help="Folder for its CSV files, new or empty.")],
) -> None:
    """Write the demo out as CSV files: an example of the folder format to look at, change and tune on."""
    from typing import get_args

    from peft_combo.data.readers.demo import Demo, copy_demo
    from peft_combo.errors import DataError

    source: Demo | None = next((one for one in get_args(Demo) if one == name), None)
    if source is None:
        expected = " or ".join(get_args(Demo))
        raise DataError(f'Expected {expected}, found "{name}". See the other sources with: peft-combo data list')
    copy_demo(folder, source)
    print_line(folder)


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="Name of a downloadable source, of peft-combo data list.")],
    folder: Annotated[Path, typer.Option("--to", help="Folder of downloads.")] = Path("data"),
) -> None:
    """Download a public data set (checksum, cache) and print its folder."""
    from peft_combo.data.readers.download import get
    from peft_combo.files import check_folder_target

    print_line(get(name, check_folder_target(folder)))
