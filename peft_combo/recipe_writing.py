"""A recipe as a file of its own: complete, readable, and equal to what it was made of.

Owns the YAML that is written; how YAML is read is `recipe_files`'.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_combo.errors import RecipeError
from peft_combo.recipe import Recipe
from peft_combo.recipe_files import load_recipe
from peft_combo.written import write_text


def free_destination(path: Path) -> Path:
    """Return a path that `write_recipe` may write to; ask before a long job, not after it.

    Raises:
        RecipeError: it does not end in .yaml, or is taken.
    """
    if path.suffix != ".yaml":
        raise RecipeError(f"Expected a destination that ends in .yaml, found {path}. Try {path.with_suffix('.yaml')}")
    if path.exists():
        raise RecipeError(f"{path} exists already. Choose another name, or remove it first.")
    return path


def write_recipe(recipe: Recipe, path: Path, header: Sequence[str] = ()) -> Recipe:
    """Write every key of a recipe, under the name of its file, and read it back.

    Args:
        header: comment lines that open the file.
    Returns:
        the recipe as `load_recipe` reads it from there: equal but for the name.
    Raises:
        RecipeError: see `free_destination`. PeftComboError: it cannot be written.
    """
    free_destination(path)
    name = re.sub(r"[^a-z0-9_-]+", "-", path.stem.lower()).strip("-_")[:64] or recipe.name
    named = recipe.model_copy(update={"name": name})
    lines = [f"# {line}".rstrip() for line in header] + _lines(named.model_dump(mode="json"))
    write_text(path, "\n".join(lines) + "\n")
    return load_recipe(path)


def _lines(values: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in values.items():
        # Column names are a user's own and may hold anything; every JSON text is a quoted YAML one.
        written = key if re.fullmatch(r"[A-Za-z_][\w-]*", key) else json.dumps(key, ensure_ascii=False)
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{written}:", *_lines(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}{written}: {json.dumps(value, ensure_ascii=False)}")
    return lines
