"""`recipes`: list, show, copy, check, schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_combo.cli.app import JsonOption, SetOption, recipes_app
from peft_combo.cli.complete import complete_recipe
from peft_combo.cli.output import print_faults, print_json, print_line, print_table, print_text


@recipes_app.command("list")
def recipes_list(as_json: JsonOption = False) -> None:
    """List the shipped recipes."""
    from peft_combo.recipe.files import list_recipes

    found = list_recipes()
    if as_json:
        print_json([recipe._asdict() for recipe in found])
    else:
        print_table(("recipe", "category", "method", "what it does"), found)


@recipes_app.command("show")
def recipes_show(
    name: Annotated[
        str, typer.Argument(autocompletion=complete_recipe, help="Name of a shipped recipe, or a YAML file.")
    ],
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Recipe with parents merged and defaults filled in, as JSON.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Print a recipe as it is written, or complete."""
    from peft_combo.recipe.files import load_recipe, read_recipe_text

    if resolved or overrides:
        print_json(load_recipe(name, tuple(overrides or ())).model_dump(mode="json"))
    else:
        print_text(read_recipe_text(name))


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[
        str, typer.Argument(autocompletion=complete_recipe, help="Name of a shipped recipe, or a YAML file.")
    ],
    destination: Annotated[Path, typer.Argument(help="File or folder of the copy.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replacement of what is there.")] = False,
) -> None:
    """Copy a recipe, to make it your own."""
    from peft_combo.recipe.files import copy_recipe

    print_line(copy_recipe(name, destination, force=force))


@recipes_app.command("check")
def recipes_check(
    name: Annotated[
        str, typer.Argument(autocompletion=complete_recipe, help="Name of a shipped recipe, or a YAML file.")
    ],
    overrides: SetOption = None,
) -> None:
    """Say everything that is wrong with a recipe."""
    from peft_combo.recipe.files import check

    print_faults(f"{name}: ", check(name, tuple(overrides or ())), fine=f"{name} is a valid recipe.")


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from peft_combo.recipe.files import build_file_schema

    print_json(build_file_schema())
