"""`data`: sources, their faults and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_combo.cli.app import DataOption, JsonOption, RecipeOption, SetOption, data_app
from peft_combo.cli.shown import figure, print_faults, print_json, print_table
from peft_combo.errors import DataError


@data_app.command("list")
def data_list(as_json: JsonOption = False) -> None:
    """List the data sources and what it takes to use each."""
    from peft_combo.data import available

    found = available()
    if as_json:
        print_json([vars(source) for source in found])
    else:
        print_table(("source", "what it is", "how to use it"), [(s.name, s.what, s.use) for s in found])


@data_app.command("check")
def data_check(recipe: RecipeOption = "lora-fashion", data: DataOption = None, overrides: SetOption = None) -> None:
    """Say everything that is wrong with a dataset: every fault with file, line and remedy."""
    from peft_combo.data import check_source
    from peft_combo.recipe_files import load_recipe

    loaded = load_recipe(recipe, tuple(overrides or ()), data).ready()
    print_faults("", check_source(loaded.data), fine="The data can be read; nothing is wrong with it.")


@data_app.command("stats")
def data_stats(
    recipe: RecipeOption = "lora-fashion",
    data: DataOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a dataset in figures, and how it would be split."""
    from peft_combo.data import describe, open_dataset, split_as
    from peft_combo.recipe_files import load_recipe

    loaded = load_recipe(recipe, tuple(overrides or ()), data).ready()
    dataset = open_dataset(loaded.data)
    figures = describe(dataset, loaded.data.text)
    config = loaded.data
    try:
        parts = split_as(dataset, config)
        figures["split"] = {
            "by": config.split, "train": len(parts.train), "valid": len(parts.valid), "test": len(parts.test),
            "dropped": len(parts.dropped), "digest": parts.digest,
        }  # fmt: skip
    except DataError as error:
        figures["split"] = str(error)
    if as_json:
        print_json(figures)
    else:
        print_table(("figure", "value"), [(name.replace("_", " "), figure(value)) for name, value in figures.items()])


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="A downloadable source; see: peft-combo data list")],
    folder: Annotated[Path, typer.Option("--to", help="Where downloads are kept.")] = Path("data"),
) -> None:
    """Download a public data set (checksum, cache) and print its folder."""
    from peft_combo.data import get

    print(get(name, folder))
