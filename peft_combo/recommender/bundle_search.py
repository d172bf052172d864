"""Search for bundles by words: those of a dataset, or given ones, by how like a query their items are.

Owns how what a search finds becomes bundles with outside ids. Knows nothing of how well items go together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from peft_combo.data.model import Dataset
from peft_combo.errors import DataError
from peft_combo.recommender.results import BundleMatch
from peft_combo.recommender.text_search import TextSearch, find_distinct, select_largest
from peft_combo.scoring.base import Vectors


class BundleSearch:
    """Finds bundles of a dataset, or given ones; those of the dataset are made ready when they are first asked for."""

    def __init__(self, dataset: Dataset, search: TextSearch) -> None:
        self._dataset, self._search = dataset, search

    def find(self, query: str, k: int, bundles: Sequence[Sequence[str]] | None) -> list[BundleMatch]:
        """Return the bundles most like a query; see `BundleRecommender.search_bundles`."""
        catalog, known = self._dataset.catalog, self._dataset.bundles
        distinct, pooled = self._known
        found: list[tuple[str | None, NDArray[Any], str | None]]
        if bundles is None:
            found = [(known.bundle_ids[row], known.items[row], known.names[row]) for row in distinct]
            scores = self._search.score_bundles([query], pooled)[0]
        else:
            if any(not bundle for bundle in bundles):
                raise DataError("Expected bundles with items, found an empty one.")
            given = [self._dataset.find_items(bundle) for bundle in bundles]
            found = [(None, rows, None) for rows in given]
            among = pooled if len(distinct) > 1 else None
            scores = self._search.score_bundles([query], self._search.pool_bundles(given), among)[0]
        matches = []
        for place in select_largest(scores, k):
            bundle_id, rows, name = found[place]
            ids, titles = zip(*((catalog.item_ids[row], catalog.titles[row]) for row in rows), strict=True)
            matches.append(BundleMatch(bundle_id, ids, titles, name, float(scores[place])))
        return matches

    @cached_property
    def _known(self) -> tuple[list[int], Mapping[str, Vectors]]:
        """The rows of the dataset's distinct bundles, and what is searched of each."""
        items = self._dataset.bundles.items
        distinct, _ = find_distinct(items)
        return distinct, self._search.pool_bundles([items[row] for row in distinct])
