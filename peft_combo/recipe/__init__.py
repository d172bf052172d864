"""Recipes: everything one tuning run needs, as a typed, frozen, YAML-serialisable value.

Owns fields, defaults, faults and the files recipes are read from. Knows nothing of torch or of data that is read.
"""

from __future__ import annotations

from peft_combo.recipe.files import list_recipes, load_recipe, write_recipe
from peft_combo.recipe.model import DataConfig, Recipe
from peft_combo.recipe.parse import parse_recipe, recipe_schema

__all__ = [
    "DataConfig",
    "Recipe",
    "list_recipes",
    "load_recipe",
    "parse_recipe",
    "recipe_schema",
    "write_recipe",
]
