"""Join of two datasets of one shop, an earlier and a later one: items and bundles matched by their ids.

Owns which of two rows stands. Knows nothing of files or splits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from peft_combo.data.model import Bundles, Catalog, Dataset

ValueT = TypeVar("ValueT")


def join_datasets(old: Dataset, new: Dataset) -> tuple[Dataset, int]:
    """Add what `new` brings to `old`.

    An item of both is one item, with the fields it has in `new`. A bundle of both is one bundle; one whose items differ
    keeps those it had, since a question that was asked before must stay the same, and the notes say how many did.
    Interactions are left out: a bundle's questions are made of bundles alone.

    Returns:
        the dataset, and how many bundles are old: they come first, in their order; those only `new` has follow.
    """
    catalog = _items(old.catalog, new.catalog)
    known = {bundle_id: row for row, bundle_id in enumerate(old.bundles.bundle_ids)}
    fresh = [row for row, bundle_id in enumerate(new.bundles.bundle_ids) if bundle_id not in known]
    later = new.bundles.take(fresh)
    moved = [np.array([catalog.index[i] for i in new.catalog.item_ids], np.int32)[rows] for rows in later.items]
    bundles = Bundles.build(
        [*old.bundles.bundle_ids, *later.bundle_ids],
        [*old.bundles.items, *moved],  # old items keep their rows
        [*old.bundles.names, *later.names],
        [*old.bundles.owners, *later.owners],
        np.concatenate([old.bundles.times, later.times]),
        [*old.bundles.groups, *later.groups],
        intents=[*old.bundles.intents, *later.intents],
    )
    changed = 0
    for row, bundle_id in enumerate(new.bundles.bundle_ids):
        if bundle_id in known:
            before = {old.catalog.item_ids[item] for item in old.bundles.items[known[bundle_id]]}
            changed += before != {new.catalog.item_ids[item] for item in new.bundles.items[row]}
    notes = [*old.notes, *(f"{new.name}: {note}" for note in new.notes)]
    if changed:
        notes.append(f"{changed:,} bundles of {new.name} have other items than before under the same id; they stay")
    name = f"{old.name} and {new.name}"
    return Dataset.build(name, catalog, None, bundles, notes, old.text_template), len(old.bundles)


def _items(old: Catalog, new: Catalog) -> Catalog:
    ids = [*old.item_ids, *(item_id for item_id in new.item_ids if item_id not in old.index)]

    def column(of: Callable[[Catalog, int], ValueT]) -> list[ValueT]:
        return [of(new, new.index[item_id]) if item_id in new.index else of(old, old.index[item_id]) for item_id in ids]

    def attribute(name: str) -> list[str | None]:
        def value(catalog: Catalog, row: int) -> str | None:
            return catalog.attributes[name][row] if name in catalog.attributes else None

        return column(value)

    return Catalog.build(
        ids,
        column(lambda catalog, row: catalog.titles[row]),
        column(lambda catalog, row: catalog.categories[row]),
        column(lambda catalog, row: catalog.slots[row]),
        column(lambda catalog, row: float(catalog.prices[row])),
        column(lambda catalog, row: catalog.descriptions[row]),
        {name: attribute(name) for name in {**old.attributes, **new.attributes}},
        column(lambda catalog, row: catalog.pictures[row] if catalog.pictures else None),
    )
