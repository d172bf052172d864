"""Leakage checks: an adapter tuned on other data, another split or other users is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_combo.store.manifest import Manifest

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_combo.data.model import CATEGORY_SEPARATOR, Dataset
from peft_combo.data.splits import Split, split_as
from peft_combo.errors import DataError
from peft_combo.recipe.model import DataConfig
from peft_combo.recipe.parse import parse_recipe


def split_problem(manifest: Manifest, parts: Split, config: DataConfig) -> str:
    """Say why an adapter must not be measured on these test bundles; "" where it never saw them.

    One tuned on the very split did not. One tuned on a category of the same data, or on it and later data, did not
    either, where the rule, the fractions and the seed of its split were the same: users and bundles fall into parts by
    a hash of their names. What
    an imported one saw is not known, which is no reason to refuse it.
    """
    stamp, then = manifest.data, manifest.recipe.get("data")
    if stamp.split_digest == parts.digest or manifest.imported is not None:
        return ""
    rule = ("source", "path", "split", "valid_fraction", "test_fraction", "split_seed")
    now = config.model_dump(mode="json")
    narrowed = bool(_find_claimed(manifest.recipe)) or "continued" in (stamp.model_extra or {})
    same = isinstance(then, dict) and all(then.get(key) == now[key] for key in rule)
    if narrowed and same and config.split != "time":
        return ""
    return (
        f"Adapter {manifest.reference} was tuned on another split of {stamp.name} ({stamp.split_digest[:12]}, here "
        f"{parts.digest[:12]}), so it may have learned from these test bundles. Evaluate it with the data and the "
        "recipe it was tuned with."
    )


def _find_claimed(recipe: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Return the category paths a recipe narrows its data to, in lower case."""
    data = recipe.get("data")
    if not isinstance(data, Mapping):
        return ()
    paths: list[tuple[str, ...]] = [(str(name).casefold(),) for name in data.get("departments") or ()]
    if narrowed := data.get("category_filter"):
        paths.append(tuple(part.strip().casefold() for part in str(narrowed).split(CATEGORY_SEPARATOR.strip())))
    return tuple(paths)


def rating_problem(manifest: Manifest, dataset: Dataset, parts: Split) -> str:
    """Say why a rating adapter must not be measured on these test bundles; "" where it saw none of their owners.

    A split by user puts a user into the same part for bundles and for ratings, by a hash of seed and name: so where the
    adapter's rule gives these very parts, it was trained on training users and chosen by validation users. By time,
    what it was trained on must lie before the first validation bundle, what it was chosen by before the first of test.
    """
    rule = parse_recipe(manifest.recipe, f"The recipe of {manifest.reference} cannot be read:").data
    told = f"Rating adapter {manifest.reference} may have learned from these test bundles"
    if rule.split == "user":
        try:
            same = split_as(dataset, rule).digest == parts.digest
        except DataError:  # these bundles cannot even be divided so
            same = False
        remedy = "Tune it with the split that is evaluated: data.split, split_seed, valid_fraction and test_fraction."
        return "" if same else f"{told}: it was tuned on users of another split. {remedy}"
    times, until = dataset.bundles.times, (manifest.data.model_extra or {}).get("until")
    held = np.concatenate([times[parts.valid], times[parts.test]])
    first = {"train": held.min(initial=np.inf), "valid": times[parts.test].min(initial=np.inf)}
    if isinstance(until, dict) and all(until[name] < start for name, start in first.items()):
        return ""
    return (
        f"{told}: it has seen what was taken after the first of them. Tune it with data.split: time and larger "
        "data.valid_fraction and data.test_fraction, so that training ends before the first validation bundle and "
        "validation before the first test bundle."
    )
