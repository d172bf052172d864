"""What a page asks of the catalogue and the store: items by words, examples to try, versions.

Owns how items and versions are listed. Encodes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from peft_combo.data.model import CATEGORY_SEPARATOR, Catalog, Dataset
from peft_combo.serving.errors import BadRequest
from peft_combo.store.adapter_store import AdapterStore

_EXAMPLES = 6


def find_items(
    dataset: Dataset, is_offered: Callable[[str], bool], words: str, limit: int, cursor: str | None
) -> tuple[list[dict[str, Any]], str | None, int]:
    """Return items whose title or id holds every word, the cursor of what comes next, and how many there are."""
    catalog = dataset.catalog
    start = 0
    if cursor is not None:
        if not cursor.isdigit() or len(cursor) > 12:
            raise BadRequest("cursor: expected the next_cursor of an answer, found something else.")
        start = int(cursor)
    wanted = words.casefold().split()
    rows = [
        row
        for row, (item_id, title) in enumerate(zip(catalog.item_ids, catalog.titles, strict=True))
        if all(word in title.casefold() or word in item_id.casefold() for word in wanted) and is_offered(item_id)
    ]
    shown = [row for row in rows if row >= start]
    following = str(shown[limit]) if len(shown) > limit else None
    return [_tell(catalog, row) for row in shown[:limit]], following, len(rows)


def get_item(dataset: Dataset, item_id: str) -> dict[str, Any]:
    """Return one item with all its columns."""
    catalog = dataset.catalog
    row = catalog.index[item_id]
    fields = {name: values[row] for name, values in catalog.attributes.items() if values[row] is not None}
    if catalog.descriptions[row]:
        fields["description"] = catalog.descriptions[row]
    return {**_tell(catalog, row), "fields": fields}


def list_examples(dataset: Dataset, is_forgotten: Callable[[str], bool]) -> dict[str, Any]:
    """Return users with most events, baskets of training bundles and queries to try."""
    users: list[dict[str, str]] = []
    events = dataset.interactions
    if events is not None and len(events.user_ids):
        counts = np.bincount(events.users[events.users >= 0], minlength=len(events.user_ids))
        for row in np.argsort(-counts, kind="stable")[: 4 * _EXAMPLES].tolist():
            user = events.user_ids[row]
            if counts[row] and len(users) < _EXAMPLES and not is_forgotten(user):
                users.append({"user": user, "label": f"Customer {len(users) + 1}"})
    bundles, catalog = dataset.bundles, dataset.catalog
    baskets: list[dict[str, Any]] = []
    step = max(1, len(bundles) // _EXAMPLES)
    for place in range(0, len(bundles), step):
        rows = bundles.items[place][:2].tolist()
        if len(rows) == 2 and len(baskets) < _EXAMPLES:
            items = [_tell(catalog, row) for row in rows]
            baskets.append({"label": " + ".join(one["title"] for one in items), "items": items})
    named = [name for name in dict.fromkeys(bundles.intents) if name]
    titles = [" ".join(title.split()[:4]) for title in catalog.titles[:: max(1, len(catalog) // _EXAMPLES)]]
    return {"users": users, "baskets": baskets, "queries": (named or titles)[:_EXAMPLES]}


def list_versions(store: AdapterStore, loaded: Collection[str]) -> list[dict[str, Any]]:
    """Return the versions in a store, newest first in each category."""
    pointed: dict[str, list[str]] = {}
    for alias in store.aliases() if store.categories() else ():
        pointed.setdefault(alias.target, []).append(alias.reference)
    return [
        {
            "version": record.reference, "digest": record.digest, "method": record.manifest.method,
            "created": record.manifest.created.isoformat(),
            "bytes": sum(entry.bytes for entry in record.manifest.files.values()),
            "metrics": dict(record.manifest.metrics), "aliases": pointed.get(record.reference, []),
            "loaded": record.reference in loaded, "comparable": record.reference in loaded,
        }
        for record in sorted(store.list(), key=lambda one: (one.category, -one.version))
    ]  # fmt: skip


def _tell(catalog: Catalog, row: int) -> dict[str, Any]:
    price = float(catalog.prices[row])
    return {
        "item_id": catalog.item_ids[row], "title": catalog.titles[row],
        "slot": catalog.slots[row] or catalog.leaf(row),
        "category": CATEGORY_SEPARATOR.join(catalog.categories[row]) or None,
        "price": None if np.isnan(price) else round(price, 2),
    }  # fmt: skip
