"""The Typer application, its groups, and the options that several share."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_combo import __version__
from peft_combo.cli.complete import complete_adapter, complete_key, complete_recipe
from peft_combo.cli.extras import require_recipe_extras
from peft_combo.cli.output import print_line, set_quiet

if TYPE_CHECKING:
    from peft_combo.recipe.model import Recipe
    from peft_combo.recommender.workspace import Workspace

app = typer.Typer(
    help="Per-category adapters for BERT-like encoders, and the bundle recommender that swaps them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help and errors hold names in square brackets, which are no markup
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="Recipes: list, show, copy, check, schema.", no_args_is_help=True)
adapters_app = typer.Typer(help="Stored adapters: what there is, aliases, import, export, gc.", no_args_is_help=True)
data_app = typer.Typer(help="Data: list, check, stats, suggest, get.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(adapters_app, name="adapters")
app.add_typer(data_app, name="data")

RecipeOption = Annotated[
    str,
    typer.Option("--recipe", "-r", autocompletion=complete_recipe, help="Name of a shipped recipe, or a YAML file."),
]
AdapterArgument = Annotated[
    str,
    typer.Argument(
        autocompletion=complete_adapter, help="Adapter: fashion (its latest version), fashion@v2 or fashion@prod."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        autocompletion=complete_key,
        help="Override of one key, as in training.epochs=2; may be repeated, the last one counts.",
    ),
]
DataOption = Annotated[Path | None, typer.Option("--data", help="Folder of your data, in place of the recipe's.")]
StoreOption = Annotated[Path, typer.Option("--store", help="Folder of the adapter store.")]
RecipeStoreOption = Annotated[
    Path | None,
    typer.Option("--store", help="Folder of the adapter store; default the recipe's, adapters without one."),
]
CacheOption = Annotated[Path, typer.Option("--cache", help="Folder of the vector cache.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON in place of a table.")]


def load_ready_recipe(name: str, overrides: list[str] | None, data: Path | None, store: Path | None = None) -> Recipe:
    """Load a recipe that can run, under the options of a command; `--store` goes before what the recipe says.

    Raises:
        RecipeError: it does not hold together, or needs data that is not named.
    """
    from peft_combo.recipe.files import load_recipe

    recipe = load_recipe(name, tuple(overrides or ()), data).ready()
    require_recipe_extras(recipe)
    return recipe if store is None else recipe.model_copy(update={"store": str(store)})


def check_data_path(recipe: Recipe) -> None:
    """Refuse data that is not there before torch is loaded.

    Raises:
        DataError: it is not there; see `detect_layout`.
    """
    from peft_combo.files import literal_path

    if recipe.data.path is not None and not literal_path(recipe.data.path).exists():
        from peft_combo.data.sources import detect_layout

        detect_layout(recipe.data.path)


def open_workspace(
    recipe: Recipe, name: str, overrides: list[str] | None, data: Path | None, store: Path | None,
    adapters: Iterable[str], **options: Any,
) -> Workspace:  # fmt: skip
    """Open what a recipe works on; for an adapter that is not stored, give the command that trains it by this recipe.

    Args:
        name, overrides, data, store: as the command was given them.
        options: of `Workspace.of`.
    Raises:
        StoreError: an adapter is not stored. DataError: the recipe's data is not there.
    """
    from peft_combo.errors import StoreError
    from peft_combo.recommender.workspace import Workspace
    from peft_combo.store.lookup import UnknownCategory

    try:
        space = Workspace.of(recipe, adapters=adapters, **options)
    except UnknownCategory as error:
        changes = [*(overrides or ()), *([f"category={error.category}"] if error.category != recipe.category else ())]
        places = [word for option, value in (("--data", data), ("--store", store)) if value for word in (option, value)]
        words = ["peft-combo", "tune", "--recipe", name, *places, *(word for one in changes for word in ("--set", one))]
        raise StoreError(f"{error.problem}\nTrain one with: {shlex.join(map(str, words))}") from error
    check_data_path(recipe)
    return space


def _print_version(asked: bool) -> None:
    if asked:
        print_line(f"peft-combo {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Version, and nothing else."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Traceback beside the message where a command fails, on stderr.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Results and errors only: no notes and no progress on stderr.")
    ] = False,
) -> None:
    set_quiet(quiet)
