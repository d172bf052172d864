"""Metrics of a completion table: ranks, fill-in-the-blank, slices, and coverage and diversity of lists.

Owns how the scores of test queries become numbers. Knows nothing of how scorers are fitted or chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from peft_combo import metrics
from peft_combo.data.model import Dataset
from peft_combo.data.queries import Queries
from peft_combo.evaluation.report import CompletionRow, Slice
from peft_combo.recommender.fit_data import FitData
from peft_combo.recommender.fitted_scorers import Fitted, ItemVectors
from peft_combo.recommender.fusion import Fusion
from peft_combo.recommender.model_selection import split_blocks
from peft_combo.recommender.scorer_id import FROZEN, FUSION, PEER, ScorerId
from peft_combo.scoring.base import unit_rows

LIST = 10
COLD, DISTRACTORS = "cold among cold", "among distractors"
_NEAR_DUPLICATE = 0.95


@dataclass(frozen=True, eq=False)
class QueryMetrics:
    """Per scorer, and for the fusion, what became of each test query.

    Attributes:
        ranks: (Q,) of the target, 1 = best. lists: (Q, 10) the first items, -1 where fewer are known.
        fill_ins: (Q,) how far the target is told from three random items; NaN where there are no three.
        among: by protocol, (Q,) rank of the target among fewer items: ``cold among cold`` has the targets that no
            training bundle holds among the items that none holds, NaN for others; ``among distractors`` has every
            target among the items that no bundle holds at all, where the catalogue has ten of them.
    """

    ranks: dict[ScorerId, NDArray[np.float64]]
    among: dict[str, dict[ScorerId, NDArray[np.float64]]]
    lists: dict[ScorerId, NDArray[np.int64]]
    fill_ins: dict[ScorerId, NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class UnseenFirst:
    """A scorer with the items that no training bundle holds before all others: (N,) which these are.

    What it gains over the scorer is no skill. Where a catalogue was put together from its bundles, an item without a
    training bundle has one that is held out, and seen-ness alone gives answers away; see ``cold among cold``.
    """

    scorer: Fitted
    unseen: NDArray[np.bool_]

    def __call__(self, queries: Queries) -> NDArray[np.float32]:
        scores = self.scorer(queries)
        spread = np.nanmax(scores, initial=0) - np.nanmin(scores, initial=0) + 1
        return np.asarray(scores + spread * self.unseen, np.float32)


def measure_queries(
    asks: Mapping[ScorerId, Fitted],
    fusion: Fusion[ScorerId],
    dataset: Dataset,
    test: Queries,
    known: FitData,
    seed: int,
) -> QueryMetrics:
    """Score the test queries, a block at a time; the seed is that of the wrong items of fill-in-the-blank."""
    wrong = draw_wrong_items(dataset, test, seed)
    unseen, unbundled = known.support == 0, find_unbundled(dataset)
    protocols = {COLD: (unseen, unseen)}  # which targets are asked for, among which items
    if unbundled.sum() >= LIST:
        protocols[DISTRACTORS] = (np.ones(len(unbundled), bool), unbundled)
    ranks: dict[ScorerId, list[NDArray[np.float64]]] = {scorer: [] for scorer in (*asks, FUSION)}
    lists: dict[ScorerId, list[NDArray[np.int64]]] = {scorer: [] for scorer in ranks}
    fill_ins: dict[ScorerId, list[NDArray[np.float64]]] = {scorer: [] for scorer in ranks}
    among: dict[str, dict[ScorerId, list[NDArray[np.float64]]]] = {
        name: {scorer: [] for scorer in ranks} for name in protocols
    }
    start = 0
    for part in split_blocks(test):
        scores = {scorer: ask(part) for scorer, ask in asks.items()}
        scores[FUSION] = fusion.combine(scores, known.evidence(part))
        excluded = part.excluded()
        for scorer, values in scores.items():
            ranks[scorer].append(metrics.midranks(values, part.targets, excluded))
            for name, (asked, items) in protocols.items():
                among[name][scorer].append(rank_among(values, part, asked, items))
            lists[scorer].append(_first_items(values, part))
            fill_ins[scorer].append(_fill_in(values, part.targets, wrong[start : start + len(part)]))
        start += len(part)
    return QueryMetrics(
        {scorer: np.concatenate(parts) for scorer, parts in ranks.items()},
        {name: {scorer: np.concatenate(parts) for scorer, parts in found.items()} for name, found in among.items()},
        {scorer: np.concatenate(parts) for scorer, parts in lists.items()},
        {scorer: np.concatenate(parts) for scorer, parts in fill_ins.items()},
    )


def make_rows(
    measured: QueryMetrics,
    settings: Mapping[ScorerId, str],
    valid_ndcg: Mapping[ScorerId, float],
    slices: Mapping[str, NDArray[np.bool_]],
    test: Queries,
    known: FitData,
    seed: int,
) -> tuple[CompletionRow, ...]:
    """Return the table, a row for each scorer; its label is made here."""
    ranks, fill_ins = measured.ranks, measured.fill_ins
    vectors: ItemVectors = known.words if known.frozen is None else unit_rows(known.frozen)
    return tuple(
        CompletionRow(
            name=str(scorer),
            setting=settings[scorer],
            valid_ndcg=valid_ndcg[scorer],
            values=metrics.ranking_metrics(own),
            intervals={
                metric: metrics.bootstrap_interval(metrics.per_query(own, metric), test.groups, seed=seed)
                for metric in ("ndcg@10", "r@10")
            },
            p={
                str(other): _p_value(own, ranks[other], test.groups, seed)
                for other in (PEER, FROZEN)
                if other in ranks and other != scorer
            },
            slices=_slice_row(scorer, ranks, slices, test.groups, seed)
            | _slice_among(scorer, measured.among, test, seed),
            quality=_measure_lists(measured.lists[scorer], known.support, vectors),
            fill_in=None if np.isnan(fill_ins[scorer]).all() else float(np.nanmean(fill_ins[scorer])),
        )
        for scorer, own in ranks.items()
    )


def draw_wrong_items(dataset: Dataset, test: Queries, seed: int) -> NDArray[np.int64]:
    """Draw three wrong items from the target's slot (or leaf), none of its bundle: (Q, 3), -1 where there are not."""
    catalog = dataset.catalog
    kinds: Sequence[str | None] = catalog.slots
    if not any(kinds):
        kinds = [catalog.leaf(row) for row in range(len(catalog))]
    members: dict[str, list[int]] = {}
    for row, kind in enumerate(kinds):
        if kind:
            members.setdefault(kind, []).append(row)
    rng = np.random.default_rng(seed)
    drawn = np.full((len(test), 3), -1, np.int64)
    for place, (target, context) in enumerate(zip(test.targets, test.contexts, strict=True)):
        others = np.setdiff1d(members.get(kinds[target] or "", []), np.append(context, target))
        if len(others) >= 3:
            drawn[place] = rng.choice(others, 3, replace=False)
    return drawn


def find_unbundled(dataset: Dataset) -> NDArray[np.bool_]:
    """Return which items no bundle holds, of whichever part: (N,)."""
    unbundled = np.ones(len(dataset.catalog), bool)
    for items in dataset.bundles.items:
        unbundled[items] = False
    return unbundled


def find_slices(dataset: Dataset, known: FitData, test: Queries) -> dict[str, NDArray[np.bool_]]:
    warm = known.support[test.targets] > 0
    sizes = (test.contexts >= 0).sum(axis=1) + 1
    parts = {"warm target": warm, "cold target": ~warm}
    if known.leaves is not None:
        same = np.concatenate(
            [known.evidence(part).find_same_leaf()[np.arange(len(part)), part.targets] for part in split_blocks(test)]
        )
        what = "leaf" if any(dataset.catalog.categories) else "slot"
        parts |= {f"same-{what}": same, f"cross-{what}": ~same}
    if known.coverage is not None:
        crossing = known.coverage.find_crossing(test.contexts, test.targets)
        parts |= {"same-category": ~crossing, "cross-category": crossing}
    return parts | {"size 2": sizes == 2, "size 3": sizes == 3, "size 4+": sizes >= 4}


def _fill_in(scores: NDArray[np.float32], targets: NDArray[np.int64], wrong: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return 1 where the target is above the wrong items, 1 / ties where level with the best, 0 below; NaN without."""
    values = np.where(np.isnan(scores), -np.inf, scores)
    mine = np.take_along_axis(values, targets[:, None], axis=1)
    others = np.take_along_axis(values, np.maximum(wrong, 0), axis=1)
    found = np.where((others > mine).any(axis=1), 0.0, 1 / (1 + (others == mine).sum(axis=1)))
    return np.where(wrong[:, 0] >= 0, found, np.nan)


def _first_items(scores: NDArray[np.float32], queries: Queries) -> NDArray[np.int64]:
    values = np.where(np.isnan(scores), -np.inf, scores)
    rows, places = np.nonzero(queries.contexts >= 0)
    values[rows, queries.contexts[rows, places]] = -np.inf
    depth = min(LIST, values.shape[1])
    best = np.argpartition(-values, depth - 1, axis=1)[:, :depth]
    return np.where(np.isfinite(np.take_along_axis(values, best, axis=1)), best, -1)


def _slice_row(
    name: ScorerId, ranks: Mapping[ScorerId, NDArray[np.float64]], parts: Mapping[str, NDArray[np.bool_]],
    groups: NDArray[np.str_], seed: int,
) -> dict[str, Slice]:  # fmt: skip
    found = {}
    for part, chosen in parts.items():
        if chosen.any():
            mine = ranks[name][chosen]
            p = None
            if PEER in ranks and name != PEER:
                p = _p_value(mine, ranks[PEER][chosen], groups[chosen], seed)
            found[part] = Slice(
                int(chosen.sum()),
                float(metrics.per_query(mine, "ndcg@10").mean()),
                float(metrics.per_query(mine, "r@10").mean()),
                p,
            )
    return found


def _slice_among(
    name: ScorerId, among: Mapping[str, Mapping[ScorerId, NDArray[np.float64]]], test: Queries, seed: int
) -> dict[str, Slice]:
    """Return how targets are told from fewer items. Knowing which items are warm gains nothing among cold ones."""
    found: dict[str, Slice] = {}
    for protocol, ranks in among.items():
        chosen = ~np.isnan(ranks[name])
        within = {scorer: np.where(chosen, own, 1.0) for scorer, own in ranks.items()}
        found |= _slice_row(name, within, {protocol: chosen}, test.groups, seed)
    return found


def rank_among(
    scores: NDArray[np.float32], queries: Queries, asked: NDArray[np.bool_], items: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Rank each target among some items and itself, the context left out, ties at mid-rank.

    Args:
        scores: (Q, N). asked: (N,) targets that are ranked. items: (N,) what they are ranked among.

    Returns:
        (Q,), 1 = best; NaN where the target is not asked for.
    """
    found = np.full(len(queries), np.nan)
    rows = np.flatnonzero(asked[queries.targets])
    if len(rows):
        place, targets = np.cumsum(items) - 1, queries.targets[rows]
        barred = np.concatenate([queries.contexts[rows], targets[:, None]], axis=1)
        excluded = [place[row[(row >= 0) & items[row]]] for row in barred]
        values = np.concatenate([scores[rows][:, items], scores[rows, targets][:, None]], axis=1)
        found[rows] = metrics.midranks(values, np.full(len(rows), items.sum()), excluded)
    return found


def _p_value(a: NDArray[np.float64], b: NDArray[np.float64], groups: NDArray[np.str_], seed: int) -> float:
    return metrics.paired_permutation(
        metrics.per_query(a, "ndcg@10"), metrics.per_query(b, "ndcg@10"), groups, seed=seed
    )


def _measure_lists(lists: NDArray[np.int64], support: NDArray[np.int64], vectors: ItemVectors) -> dict[str, float]:
    """Measure lists of ten; see `CompletionRow.quality`."""
    shown = lists[lists >= 0]
    if not shown.size:
        return {"coverage": 0.0, "popularity": float("nan"), "diversity": float("nan"), "near-duplicates": float("nan")}
    percentile = 100 * (stats.rankdata(support) - 0.5) / len(support)
    cosines = 0.0
    close = pairs = 0
    for rows in lists:
        members = rows[rows >= 0]
        if len(members) < 2:
            continue
        chosen: Any = vectors[members]
        product = chosen @ chosen.T
        alike = np.asarray(product if isinstance(product, np.ndarray) else product.toarray())
        alike = alike[np.triu_indices(len(members), 1)]
        cosines += float(alike.sum())
        close += int((alike > _NEAR_DUPLICATE).sum())
        pairs += len(alike)
    return {
        "coverage": len(np.unique(shown)) / len(support),
        "popularity": float(percentile[shown].mean()),
        "diversity": 1 - cosines / pairs if pairs else float("nan"),
        "near-duplicates": close / pairs if pairs else float("nan"),
    }
