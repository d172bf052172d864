"""Parsing and validation of recipes: every fault at once, with its place and the nearest valid name; JSON schema."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from peft_combo.errors import RecipeError
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.violations import SchemaReader


def parse_recipe(raw: Mapping[str, object], title: str = "The recipe does not hold together:") -> Recipe:
    """Make a recipe of plain values, as read from YAML, JSON or an adapter's manifest.

    Args:
        raw: the recipe's keys, inheritance and overrides already applied.
        title: first line of the error.
    Raises:
        RecipeError: with every fault, dotted path first, in the order of the fields.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        faults = [_read_schema().explain(details) for details in error.errors(include_url=False)]
    raise RecipeError.from_faults(title, dict.fromkeys(faults))


@lru_cache(maxsize=1)
def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a complete recipe. Shared: copy before changing."""
    return Recipe.model_json_schema()


@lru_cache(maxsize=1)
def list_key_paths() -> tuple[str, ...]:
    """Return every dotted path a recipe may hold, in order of the fields."""
    return _read_schema().list_key_paths()


@lru_cache(maxsize=1)
def _read_schema() -> SchemaReader:
    return SchemaReader(recipe_schema(), "recipe")
