"""`data` commands: sources, checks, statistics, downloads, the demo as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_combo.cli.app import DataOption, JsonOption, SetOption, data_app
from peft_combo.cli.output import format_figure, print_faults, print_json, print_line, print_table

if TYPE_CHECKING:
    from peft_combo.recipe.model import DataConfig
    from peft_combo.recipe.task import TaskConfig


TaskOption = Annotated[
    str | None,
    typer.Option("--recipe", "-r", help="Recipe whose task is to learn from it; default every table there is."),
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
    """Say everything that is wrong with a dataset, labels or tags: every fault with file, line and remedy."""
    from peft_combo.data.task_data import check_data

    config, task = _load_task(recipe, data, overrides)
    print_faults("", check_data(config, task), fine="The data can be read; nothing is wrong with it.")


@data_app.command("stats")
def data_stats(
    recipe: TaskOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a dataset, labels or tags in figures, and how they would be split."""
    from peft_combo.data.task_data import describe_data

    found = describe_data(*_load_task(recipe, data, overrides))
    if as_json:
        print_json(found[0] if len(found) == 1 else found)
        return
    for place, figures in enumerate(found):
        if place:
            print_line()
        print_table(
            ("figure", "value"), [(name.replace("_", " "), format_figure(value)) for name, value in figures.items()]
        )


def _load_task(
    recipe: str | None, data: Path | None, overrides: list[str] | None
) -> tuple[DataConfig, TaskConfig | None]:
    """Return the data of a recipe and its task; of no recipe the demo or --data, whatever task it is for."""
    from peft_combo.recipe.files import load_recipe

    loaded = load_recipe(recipe or "lora-fashion", tuple(overrides or ()), data).ready()
    return loaded.data, None if recipe is None else loaded.task


@data_app.command("copy")
def data_copy(
    name: Annotated[str, typer.Argument(help="Name of the source, demo.")],
    folder: Annotated[Path, typer.Argument(help="Folder for its CSV files, new or empty.")],
) -> None:
    """Write the demo out as CSV files: an example of the folder format to look at, change and tune on."""
    from peft_combo.data.readers.demo import copy_demo
    from peft_combo.errors import DataError

    if name != "demo":
        raise DataError(f'Expected demo, found "{name}". Other sources are downloaded: peft-combo data get {name}')
    copy_demo(folder)
    print_line(folder)


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="Name of a downloadable source, of peft-combo data list.")],
    folder: Annotated[Path, typer.Option("--to", help="Folder of downloads.")] = Path("data"),
) -> None:
    """Download a public data set (checksum, cache) and print its folder."""
    from peft_combo.data.readers.download import get

    print_line(get(name, folder))
