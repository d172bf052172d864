"""Shell completion: recipes, stored adapters, aliases, categories and methods, as the word typed so far goes on.

Reads names of files and folders alone; nothing heavy is imported, and what cannot be read has no completions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from peft_combo.errors import PeftComboError

if TYPE_CHECKING:
    from peft_combo.store.adapter_store import AdapterStore


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
    if given.get("recipe"):
        from peft_combo.recipe.files import load_recipe

        return load_recipe(given["recipe"]).store
    return "adapters"


def _select(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted({name for name in names if name.startswith(incomplete)})
