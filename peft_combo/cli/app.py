"""The Typer application, its groups, and the options that several share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_combo import __version__
from peft_combo.cli.output import print_line

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

RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="Name of a shipped recipe, or a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override of one key, as in training.epochs=2; may be repeated.")
]
DataOption = Annotated[Path | None, typer.Option("--data", help="Folder of your data, in place of the recipe's.")]
StoreOption = Annotated[Path, typer.Option("--store", help="Folder of the adapter store.")]
CacheOption = Annotated[Path, typer.Option("--cache", help="Folder of the vector cache.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON in place of a table.")]


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
) -> None:
    pass
