"""Shell completion: recipes and their keys, stored adapters, aliases, categories, methods, category paths of items.

Reads names of files and folders, recipes, and tables of items where these are small; torch is never imported, and what
cannot be read has no completions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from peft_combo.errors import PeftComboError

if TYPE_CHECKING:
    from peft_combo.recipe.model import Recipe
    from peft_combo.store.adapter_store import AdapterStore

_READ_BYTES = 4 * 2**20  # of a data folder, 50,000 items: 0.3 s; a larger one has no completions
_SAFE = re.compile(r"[\w./-]+")


def complete_recipe(incomplete: str) -> list[str]:
    """Return the shipped recipes, and the YAML files in the working folder."""
    from peft_combo.files import list_shipped_recipes

    own = (str(path) for ending in ("*.yaml", "*.yml") for path in Path().glob(ending))
    return _select([*list_shipped_recipes(), *own], incomplete)


def complete_adapter(context: typer.Context, incomplete: str) -> list[str]:
    """Return what names a stored version: fashion, fashion@v2, fashion@prod."""

    def name_versions(store: AdapterStore) -> Iterator[str]:
        for category in store.categories():
            yield category
            yield from (f"{category}@v{version}" for version in store.versions(category))
        yield from (alias.reference for alias in store.aliases())

    return _read_store(context, name_versions, incomplete)


def complete_alias(context: typer.Context, incomplete: str) -> list[str]:
    """Return the aliases of the store with their category: fashion@prod."""
    return _read_store(context, lambda store: (alias.reference for alias in store.aliases()), incomplete)


def complete_alias_name(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names that aliases have in this store, without category: prod."""
    return _read_store(context, lambda store: (alias.name for alias in store.aliases()), incomplete)


def complete_category(context: typer.Context, incomplete: str) -> list[str]:
    """Return the categories that have a stored adapter."""
    return _read_store(context, lambda store: store.categories(), incomplete)


def complete_method(incomplete: str) -> list[str]:
    """Return the methods of adapters."""
    from peft_combo.recipe.parse import recipe_schema

    return _select(recipe_schema()["properties"]["adapter"]["discriminator"]["mapping"], incomplete)


def complete_key(context: typer.Context, incomplete: str) -> list[str]:
    """Return the keys of the recipe typed before, each with the = that its value stands after: training.epochs=."""
    from peft_combo.recipe.parse import list_key_paths

    paths = list_key_paths()
    groups = {path.partition(".")[0] for path in paths if "." in path}
    names = [path for path in paths if path not in groups]
    with suppress(PeftComboError, OSError):
        recipe = _load_recipe(context)
        if recipe is not None:  # of a union the keys of its own member: those of lora, of the task's kind
            unions = {"adapter": type(recipe.adapter).model_fields, "task": type(recipe.task).model_fields}
            steps = ((path, path.split(".")) for path in names)
            names = [path for path, (group, *rest) in steps if group not in unions or rest[0] in unions[group]]
    return _select((f"{name}=" for name in names), incomplete)


def complete_path(context: typer.Context, incomplete: str) -> list[str]:
    """Return the category paths of the recipe's items, a level at a time: Clothing, then Clothing > Women.

    Of demos and of small folders alone, for a catalogue takes seconds to read.
    """
    from peft_combo.data.model import CATEGORY_SEPARATOR
    from peft_combo.data.sources import open_dataset

    try:
        recipe = _load_recipe(context)
        if recipe is None:
            return []
        if recipe.data.path is not None:
            folder = Path(recipe.data.path)
            small = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) <= _READ_BYTES
        else:
            small = recipe.data.source.startswith("demo")
        paths = open_dataset(recipe.data, "items").catalog.categories if small else ()
    except (PeftComboError, OSError):
        return []
    level = incomplete.count(CATEGORY_SEPARATOR.strip()) + 1
    names = [CATEGORY_SEPARATOR.join(path[:depth]) for path in paths for depth in (level, level + 1)]
    found = _select((name for name in names if name.count(CATEGORY_SEPARATOR) < level), incomplete)
    if found == [incomplete]:
        found = _select(names, incomplete)
    return _drop_unsafe(found)


def _drop_unsafe(names: list[str]) -> list[str]:
    """Drop what Bash, which inserts names as they are, would read as several words or as >, unless a quote is open."""
    if not any(key.endswith("_COMPLETE") and value == "complete_bash" for key, value in os.environ.items()):
        return names
    word = os.environ.get("COMP_WORDS", "").rpartition("\n")[2]  # the one typed last
    return names if word.startswith(("'", '"')) else [name for name in names if _SAFE.fullmatch(name)]


def _load_recipe(context: typer.Context) -> Recipe | None:
    """Load the recipe typed before, under the overrides and the data typed before; None where none was."""
    from peft_combo.recipe.files import load_recipe

    given: dict[str, Any] = context.params
    if not given.get("recipe"):
        return None
    whole = [one for one in given.get("overrides") or () if "=" in one]  # Bash cuts words at =
    return load_recipe(given["recipe"], whole, given.get("data"))


def _read_store(context: typer.Context, name: Any, incomplete: str) -> list[str]:
    from peft_combo.store.adapter_store import AdapterStore

    try:
        return _select(name(AdapterStore(_find_store(context))), incomplete)
    except (PeftComboError, OSError):
        return []


def _find_store(context: typer.Context) -> str | Path:
    """Return the folder of --store where it was typed, else the recipe's where one was, else the usual one."""
    given: dict[str, Any] = context.params
    if given.get("store"):
        return str(given["store"])
    recipe = _load_recipe(context)
    return "adapters" if recipe is None else recipe.store


def _select(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})
