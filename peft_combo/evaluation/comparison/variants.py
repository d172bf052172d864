"""Variants of a comparison: recipes that differ in a method, in values of a key, or as recipes.

Owns how words become variants and what is kept equal between them. Knows nothing of running one.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from peft_combo.errors import PeftComboError, RecipeError, did_you_mean
from peft_combo.recipe.adapter import AdapterConfig
from peft_combo.recipe.files import load_recipe
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.parse import parse_recipe

METHODS: dict[str, Any] = {
    config.model_fields["method"].default: config for config in get_args(get_args(AdapterConfig)[0])
}
# What another recipe takes over from the first, so that nobody gets more passes or other batches.
_BUDGET = ("epochs", "batch_size", "accumulation", "evaluate_every", "early_stopping")


@dataclass(frozen=True)
class Variant:
    """One recipe of a comparison, under the words that tell it from the others."""

    label: str
    recipe: Recipe


@dataclass(frozen=True)
class Over:
    """A key of the recipe and the values it takes, each as `--set` would take it."""

    key: str
    values: tuple[str, ...]


def over_of(text: str) -> Over:
    """Read ``adapter.rank=4,8,16``; a comma within brackets or quotes does not divide.

    Raises:
        RecipeError: it has no key, or no value.
    """
    key, equals, values = text.partition("=")
    found = tuple(value.strip() for value in re.findall(r"""(?:\[[^\]]*\]|"[^"]*"|'[^']*'|[^,])+""", values))
    if not equals or not key.strip() or not all(found) or not found:
        raise RecipeError(f"--over {text}: expected KEY=VALUE,VALUE,..., as in adapter.rank=4,8,16.")
    return Over(key.strip(), found)


def variants_of(
    recipe: str,
    *,
    methods: Sequence[str] = (),
    over: Sequence[Over] = (),
    others: Sequence[str] = (),
    overrides: Sequence[str] = (),
    data: str | None = None,
) -> tuple[Variant, ...]:
    """Make every combination of recipes, methods and values.

    A method other than the recipe's own starts from that method's defaults and its own learning rate, since a rate
    that suits a low-rank update ruins an encoder that is tuned as a whole; layers and modules to adapt are the recipe's
    where the method has such a choice. Another recipe gets the data and the budget (epochs, batches, early stopping) of
    the first.

    Args:
        recipe: name or file, as `load_recipe` takes it; `others` beside it.
        overrides: as `--set` takes them, for all; also the learning rate is for all if it is named here.
        data: folder of the data, for all.
    Raises:
        RecipeError: a variant does not hold together.
        PeftComboError: there is nothing to compare, or two variants are the same.
    """
    found: list[Variant] = []
    values = itertools.product(*([f"{one.key}={value}" for value in one.values] for one in over))
    for name, method, settings in itertools.product((recipe, *others), methods or (None,), values):
        words = [name] if others else []
        words += [method] if method is not None else []
        label = ", ".join((*words, *settings)) or name
        try:
            made = _make_recipe(name, method, (*overrides, *settings), data)
            if name != recipe:
                made = _with_budget_of(load_recipe(recipe, (*overrides, *settings), data), made)
        except RecipeError as error:
            raise RecipeError(f"{label}: {error}", error.faults) from error
        found.append(Variant(label, made.ready()))
    _all_different(found)
    return tuple(found)


def _make_recipe(name: str, method: str | None, overrides: Sequence[str], data: str | None) -> Recipe:
    base = load_recipe(name, (), data)
    return load_recipe(name, (*_instead(base, method), *overrides), data)


def _instead(base: Recipe, method: str | None) -> list[str]:
    """Return the overrides that put a method's defaults in place of the recipe's adapter."""
    if method is None or method == base.adapter.method:
        return []
    if method not in METHODS:
        raise RecipeError(f'No method "{method}". Known: {", ".join(METHODS)}. {did_you_mean(method, METHODS)}'.strip())
    config = METHODS[method]
    changes = [f"adapter.method={method}", f"training.learning_rate={config.default_learning_rate!r}"]
    targets = getattr(base.adapter, "targets", None)
    if targets is not None and "targets" in config.model_fields:
        changes.append(f"adapter.targets={targets if isinstance(targets, str) else json.dumps(list(targets))}")
    depth = getattr(base.adapter, "top_layers", getattr(base.adapter, "layers", None))
    if depth is not None:
        changes += [f"adapter.{field}={depth}" for field in ("top_layers", "layers") if field in config.model_fields]
    return changes


def _with_budget_of(first: Recipe, other: Recipe) -> Recipe:
    if other.task.kind != first.task.kind:
        raise RecipeError(
            f"expected a recipe of task.kind {first.task.kind}, as the first one is, found {other.task.kind}; they "
            "are not measured by the same."
        )
    raw, model = other.model_dump(mode="json"), first.model_dump(mode="json")
    raw["data"] = model["data"]
    raw["training"] |= {key: model["training"][key] for key in _BUDGET}
    return parse_recipe(raw)


def _all_different(variants: Sequence[Variant]) -> None:
    if len(variants) < 2:
        raise PeftComboError(
            "There is nothing to compare: expected two or more variants. Name methods (--method lora --method prefix), "
            "values of a key (--over adapter.rank=4,8), or further recipes."
        )
    seen: dict[str, str] = {}
    for variant in variants:
        digest = variant.recipe.model_copy(update={"name": "", "category": ""}).digest()
        if digest in seen:
            raise PeftComboError(f'"{seen[digest]}" and "{variant.label}" are the same recipe; leave one out.')
        seen[digest] = variant.label
