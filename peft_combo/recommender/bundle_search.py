"""Search for bundles by words: those of a dataset, or given ones, by how like a query their items are.

Owns how what a search finds becomes bundles with outside ids. Knows nothing of how well items go together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from peft_combo.data.model import Dataset
from peft_combo.errors import DataError
from peft_combo.recommender.results import BundleMatch
from peft_combo.recommender.text_search import TextSearch, select_largest
from peft_combo.scoring.base import Vectors


def find_bundles(
    dataset: Dataset, search: TextSearch, known_bundles: tuple[list[int], Mapping[str, Vectors]], query: str, k: int,
    bundles: Sequence[Sequence[str]] | None,
) -> list[BundleMatch]:  # fmt: skip
    """Return the bundles most like a query; see `BundleRecommender.search_bundles`.

    Args:
        known_bundles: rows of the dataset's distinct bundles, and what is searched of each.
    """
    catalog, known = dataset.catalog, dataset.bundles
    distinct, pooled = known_bundles
    found: list[tuple[str | None, NDArray[Any], str | None]]
    if bundles is None:
        found = [(known.bundle_ids[row], known.items[row], known.names[row]) for row in distinct]
        scores = search.score_bundles([query], pooled)[0]
    else:
        if any(not bundle for bundle in bundles):
            raise DataError("Expected bundles with items, found an empty one.")
        given = [dataset.find_items(bundle) for bundle in bundles]
        found = [(None, rows, None) for rows in given]
        among = pooled if len(distinct) > 1 else None
        scores = search.score_bundles([query], search.pool_bundles(given), among)[0]
    matches = []
    for place in select_largest(scores, k):
        bundle_id, rows, name = found[place]
        ids, titles = zip(*((catalog.item_ids[row], catalog.titles[row]) for row in rows), strict=True)
        matches.append(BundleMatch(bundle_id, ids, titles, name, float(scores[place])))
    return matches
