"""Evaluation of text queries: held-out bundles, and their items, found by the words they were meant to answer.

Owns the protocol of that comparison and its table. Sees encoders as views of texts (`recommender.text_search`); knows
nothing of how adapters are tuned or stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.data.language import split_words
from peft_combo.data.model import Dataset
from peft_combo.data.splits import Split
from peft_combo.errors import DataError
from peft_combo.machine import row_blocks
from peft_combo.metrics.report import find_row
from peft_combo.recommender.text_search import (
    FROZEN_ALL,
    FROZEN_TITLE,
    WORDS,
    TextQueries,
    TextSearch,
    View,
    WordView,
    select_weights,
)

PROTOCOL = (
    "The query is the intent of a held-out bundle. Every bundle of the data is a candidate, those that hold the same "
    "items counting as one, ties at mid-rank; R@1, R@10 and MRR rank the one bundle whose intent it is. Items: the "
    "share of its items among the first 10, 20 and 50 of the whole catalogue, ties counting in part. A search "
    "reads texts alone, never which bundles train knows; the weights of the chosen one are chosen on validation "
    "intents. 95 % intervals by bootstrap over groups; p by paired permutation of groups, two-sided, of the difference "
    "to TF-IDF title."
)
BASELINE, BOTH, CHOSEN = "TF-IDF title", "frozen and words", "chosen"
LABELS = {WORDS: "TF-IDF title and category", FROZEN_TITLE: FROZEN_TITLE, FROZEN_ALL: FROZEN_ALL}
DEPTHS = (10, 20, 50)
VALUES = ("r@1", "r@10", "mrr", *(f"items@{depth}" for depth in DEPTHS))
TESTED = ("r@10", "mrr", "items@10")


@dataclass(frozen=True)
class QueryRow:
    """One line of the table.

    Attributes:
        name: what searches. values: by `VALUES`, means over the queries. intervals: 95 %, of each.
        p: by `TESTED`, of the difference to the baseline; empty for the baseline itself.
    """

    name: str
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    p: dict[str, float]


@dataclass(frozen=True)
class QueryReport:
    """What an evaluation of text queries found.

    Attributes:
        counts: queries, their groups, candidates (bundles of distinct item sets), items, validation queries.
        rows: in the order of the table. weights: of the chosen search, by view.
        per_query: by row and value, (Q,); groups: (Q,). For further tests; not part of the JSON.
    """

    dataset: str
    data_digest: str
    split_digest: str
    seed: int
    protocol: str
    counts: dict[str, int]
    rows: tuple[QueryRow, ...]
    weights: dict[str, float]
    notes: tuple[str, ...]
    per_query: Mapping[str, Mapping[str, NDArray[np.float64]]] = field(repr=False, compare=False)
    groups: NDArray[np.str_] = field(repr=False, compare=False)

    def row(self, name: str) -> QueryRow:
        """Return the line of that name; see `find_row`."""
        return find_row(self.rows, name)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the single queries as JSON values."""
        return {
            "dataset": self.dataset,
            "data_digest": self.data_digest,
            "split_digest": self.split_digest,
            "seed": self.seed,
            "protocol": self.protocol,
            "counts": self.counts,
            "rows": [asdict(row) for row in self.rows],
            "weights": self.weights,
            "notes": list(self.notes),
        }


def evaluate_queries(
    dataset: Dataset,
    parts: Split,
    views: Mapping[str, View],
    *,
    rows: NDArray[np.integer[Any]] | None = None,
    seed: int = 0,
) -> QueryReport:
    """Search for the test bundles by their intents, once; weights are chosen on validation intents.

    Args:
        views: of `recommender.text_search.build_views`; adapters must have been tuned on ``parts.train``.
        rows: bundles that are searched for; None takes the test bundles.
        seed: of bootstrap and permutations.
    Raises:
        DataError: no bundle that is searched for has an intent.
    """
    sought = parts.test if rows is None else rows
    check_intents(dataset, sought)
    wanted = TextQueries.of(dataset.bundles, sought)
    notes = [f"{dataset.name}: {note}" for note in dataset.notes]
    valid = TextQueries.of(dataset.bundles, parts.valid, among=np.concatenate([parts.train, parts.valid]))
    if not len(valid):
        notes.append("no validation bundle has an intent: the weights of the views are not chosen but the usual ones")
    chosen = TextSearch.of(views, select_weights(views, valid))
    searches = {
        BASELINE: TextSearch.of(
            {WORDS: WordView.of(dataset.plain, partial(split_words, language=dataset.catalog.language))}
        )
    }
    searches |= {LABELS.get(name, f"tuned {name}"): TextSearch.of(views, {name: 1.0}) for name in views}
    searches |= {BOTH: TextSearch.of(views), CHOSEN: chosen}
    found = {name: _measure(search, wanted, len(dataset.catalog)) for name, search in searches.items()}
    counts = {
        "queries": len(wanted),
        "groups": len(set(wanted.groups.tolist())),
        "candidates": len(wanted.candidates),
        "items": len(dataset.catalog),
        "validation queries": len(valid),
    }
    lines = tuple(_make_row(name, own, found[BASELINE], wanted.groups, seed) for name, own in found.items())
    return QueryReport(
        dataset.name, dataset.digest, parts.digest, seed, PROTOCOL, counts, lines, dict(chosen.weights), tuple(notes),
        found, wanted.groups,
    )  # fmt: skip


def check_intents(dataset: Dataset, rows: NDArray[np.integer[Any]]) -> None:
    """Refuse bundles that none asks for; ask before anything is encoded.

    Raises:
        DataError: no bundle of these rows has an intent.
    """
    if not any(dataset.bundles.intents[row] for row in rows):
        raise DataError(
            f"None of {len(rows):,} test bundles of {dataset.name!r} says what it is for, so there is no query. "
            "Expected an intent in words for each: in a data folder the column intent of bundle_meta "
            "(bundle_id,intent), or name where there are no intents; in BundleRec's layout bundle_intent.csv."
        )


def _measure(search: TextSearch, wanted: TextQueries, n_items: int) -> dict[str, NDArray[np.float64]]:
    """Measure a search query by query: by `VALUES`, (Q,)."""
    pooled = search.pool_bundles(wanted.candidates)
    ranks = np.empty(len(wanted))
    shares = np.empty((len(wanted), len(DEPTHS)))
    for block in row_blocks(len(wanted), max(n_items, len(wanted.candidates))):
        texts = wanted.texts[block]
        ranks[block] = metrics.midranks(search.score_bundles(texts, pooled), wanted.targets[block])
        scores = search.score_items(texts)
        for place, own in zip(range(block.start, block.stop), scores, strict=True):
            shares[place] = _share_found(own, wanted.candidates[wanted.targets[place]])
    found = {name: metrics.per_query(ranks, name) for name in ("r@1", "r@10", "mrr")}
    return found | {f"items@{depth}": shares[:, place] for place, depth in enumerate(DEPTHS)}


def _share_found(scores: NDArray[np.float32], wanted: NDArray[Any]) -> list[float]:
    """Return the share of some rows that are among the first 10, 20 and 50 of (N,) scores.

    Of equals at the edge each has the same chance to be within, so the share is the expected one.
    """
    ordered = np.sort(scores)
    above = len(scores) - np.searchsorted(ordered, scores[wanted], side="right")
    equal = len(scores) - above - np.searchsorted(ordered, scores[wanted], side="left")
    return [float(np.clip((depth - above) / equal, 0, 1).mean()) for depth in DEPTHS]


def _make_row(
    name: str, own: Mapping[str, NDArray[np.float64]], against: Mapping[str, NDArray[np.float64]],
    groups: NDArray[np.str_], seed: int,
) -> QueryRow:  # fmt: skip
    return QueryRow(
        name,
        {value: float(own[value].mean()) for value in VALUES},
        {value: metrics.bootstrap_interval(own[value], groups, seed=seed) for value in VALUES},
        {}
        if own is against
        else {value: metrics.paired_permutation(own[value], against[value], groups, seed=seed) for value in TESTED},
    )
