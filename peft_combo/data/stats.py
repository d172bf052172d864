"""Dataset statistics: counts, densities, lengths and shares of missing values.

Owns the figures of `data stats`. Knows nothing of how they are printed.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.model import CATEGORY_SEPARATOR, Dataset


def describe(dataset: Dataset) -> dict[str, Any]:
    """Return the figures of a dataset as plain values that go into JSON."""
    catalog, interactions, bundles = dataset.catalog, dataset.interactions, dataset.bundles
    texts = dataset.texts
    words = np.array([len(text.split()) for text in texts])
    n_items = len(catalog)
    bundled = np.bincount(np.concatenate([np.empty(0, np.int32), *bundles.items]), minlength=n_items)
    taken = np.zeros(n_items, np.int64) if interactions is None else np.bincount(interactions.items, minlength=n_items)
    owners = [owner for owner in bundles.owners if owner is not None]
    item_sets = Counter(frozenset(items.tolist()) for items in bundles.items)
    priced = catalog.prices[~np.isnan(catalog.prices)]
    times = bundles.times if interactions is None else np.concatenate([bundles.times, interactions.times])
    return {
        "name": dataset.name,
        "digest": dataset.digest,
        "items": n_items,
        "words_per_text": quantiles(words),
        "items_sharing_their_text": n_items - sum(count == 1 for count in Counter(texts).values()),
        "items_with_category": sum(path != () for path in catalog.categories),
        "top_categories": dict(_top_categories(dataset)),
        "slots": dict(Counter(slot for slot in catalog.slots if slot is not None).most_common(20)),
        "price_known": _share(len(priced), n_items),
        "prices": quantiles(priced),
        "attributes": {
            name: _share(sum(value is not None for value in values), n_items)
            for name, values in catalog.attributes.items()
        },
        "items_with_picture": sum(picture is not None for picture in catalog.pictures),
        "bundles": len(bundles),
        "items_per_bundle": quantiles(bundles.sizes),
        "bundle_sizes": {str(size): count for size, count in sorted(Counter(bundles.sizes.tolist()).items())},
        "bundles_repeating_an_item_set": len(bundles) - len(item_sets),
        "bundles_with_name": sum(name is not None for name in bundles.names),
        "bundle_owners": len(set(owners)),
        "bundles_per_owner": quantiles(np.array(list(Counter(owners).values()))),
        "items_in_no_bundle": _share(int((bundled == 0).sum()), n_items),
        "items_in_one_bundle": _share(int((bundled == 1).sum()), n_items),
        "interactions": 0 if interactions is None else len(interactions),
        "users": 0 if interactions is None else len(interactions.user_ids),
        "items_without_interaction": _share(int((taken == 0).sum()), n_items),
        "time_range": _range(times),
        "notes": list(dataset.notes),
    }


def _top_categories(dataset: Dataset) -> list[tuple[str, int]]:
    """Return the ten largest categories, at the shallowest depth that tells more than one apart."""
    paths = [path for path in dataset.catalog.categories if path]
    depth = 1
    while paths and depth < max(map(len, paths)) and len({path[:depth] for path in paths}) == 1:
        depth += 1
    return Counter(CATEGORY_SEPARATOR.join(path[:depth]) for path in paths).most_common(10)


def quantiles(values: NDArray[Any]) -> dict[str, float]:
    """Return the least, the mean, the middle, the 95th percentile and the greatest of some numbers; nothing of none."""
    if not len(values):
        return {}
    p50, p95 = np.percentile(values, [50, 95])
    figures = {"min": values.min(), "mean": values.mean(dtype=np.float64), "p50": p50, "p95": p95, "max": values.max()}
    return {name: round(float(figure), 2) for name, figure in figures.items()}


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _range(times: NDArray[np.float64]) -> list[str]:
    """Return the first and the last moment as ISO 8601, or nothing where no time is known."""
    known = times[~np.isnan(times)]
    if not len(known):
        return []
    return [datetime.fromtimestamp(float(at), UTC).isoformat(timespec="seconds") for at in (known.min(), known.max())]
