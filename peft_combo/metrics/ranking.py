"""Ranking metrics: NDCG, recall, hit rate and MRR with ties at mid-rank.

Owns ranks with honest ties, the ranking metrics over them, and intervals and tests that respect clusters. Knows numbers
only: nothing of items, scorers or models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from peft_combo.machine import row_blocks

Excluded: TypeAlias = "Sequence[NDArray[Any]] | NDArray[np.bool_] | sparse.sparray | sparse.spmatrix"

HEADLINE = ("r@1", "r@5", "r@10", "r@20", "ndcg@10", "mrr")

_METRIC = re.compile(r"(r|hr|ndcg)@([1-9][0-9]*)|mrr")


def midranks(
    scores: NDArray[np.floating[Any]], targets: ArrayLike, excluded: Excluded | None = None
) -> NDArray[np.float64]:
    """Rank one target per query among all items that are not excluded.

    Equal scores share the middle of the places they fill, (first + last) / 2, so a scorer that says the same of every
    item earns the rank of a coin toss and not the first place. NaN ("cannot say") counts as equal to NaN and lies below
    every number, minus infinity included.

    Args:
        scores: (Q, N), higher is better.
        targets: (Q,) columns, one right answer per query.
        excluded: per query the columns that are no candidates, as a rule its context: Q index arrays, or a (Q, N) bool
            mask, or a (Q, N) sparse matrix whose non-zero entries are excluded. None excludes nothing.
    Returns:
        (Q,) float64, 1 = best; a multiple of one half.
    Raises:
        ValueError: the shapes do not fit, a column is out of range, or a target is excluded from its own query.
    Source: mid-ranks as in Kendall 1945, "The treatment of ties in ranking problems".
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be (Q, N), found {scores.ndim} dimension(s).")
    n_queries, n_items = scores.shape
    columns = _indices(targets, "targets", n_items)
    if columns.shape != (n_queries,):
        raise ValueError(f"targets must be ({n_queries},), one per row of scores, found {columns.shape}.")
    out_rows, out_columns = _list_excluded(excluded, n_queries, n_items)
    clash = np.flatnonzero(out_columns == columns[out_rows])
    if clash.size:
        row = int(out_rows[clash[0]])
        raise ValueError(f"the target of query {row} (column {columns[row]}) is excluded from that query.")

    better = np.empty(n_queries, np.int64)
    equal = np.empty(n_queries, np.int64)  # the target itself included
    for block in row_blocks(n_queries, n_items):
        mine = np.take_along_axis(scores[block], columns[block, None], axis=1)  # (q, 1)
        better[block], equal[block] = _counts(scores[block], mine)

    if out_rows.size:
        # Excluded cells are few: take back what they added instead of masking a copy of the scores.
        there, mine = scores[out_rows, out_columns], scores[out_rows, columns[out_rows]]
        lost = np.isnan(mine)
        with np.errstate(invalid="ignore"):
            was_better = np.where(lost, ~np.isnan(there), there > mine)
            was_equal = np.where(lost, np.isnan(there), there == mine)
        better -= np.bincount(out_rows[was_better], minlength=n_queries)
        equal -= np.bincount(out_rows[was_equal], minlength=n_queries)
    return better + (equal + 1) / 2  # the places better+1 .. better+equal, their middle


def per_query(ranks: ArrayLike, metric: str) -> NDArray[np.float64]:
    """Turn each rank into the value of one metric, for a query with a single right answer.

    - ``r@k`` and ``hr@k``: 1 where rank <= k, else 0. With one right answer recall and hit rate are the same number.
    - ``ndcg@k``: 1 / log2(1 + rank) where rank <= k, else 0; the ideal gain of one right answer is 1, so DCG is NDCG.
    - ``mrr``: 1 / rank, over the whole ranking.

    A mid-rank enters as it is: a tie over places 1 and 2 (rank 1.5) misses r@1 and earns 1 / log2(2.5) of NDCG.

    Args:
        ranks: (Q,), 1 = best, from `midranks`.
        metric: one of the names above, k >= 1.
    Returns:
        (Q,) float64 in [0, 1].
    Raises:
        ValueError: the metric is unknown, or a rank is below 1 or not finite.
    Source: Järvelin and Kekäläinen 2002 (DCG with log2); Voorhees 1999 (MRR).
    """
    found = _METRIC.fullmatch(metric)
    if found is None:
        raise ValueError(f'No metric "{metric}". Known: r@k, hr@k, ndcg@k with a whole k >= 1 (as in r@10), and mrr.')
    values = np.asarray(ranks, np.float64)
    if values.ndim != 1 or not np.all(np.isfinite(values)) or np.any(values < 1):
        raise ValueError("ranks must be one-dimensional, finite and >= 1; NaN scores already have a rank in midranks.")
    if metric == "mrr":
        return 1 / values
    inside = values <= int(found[2])
    return np.where(inside, 1 / np.log2(1 + values), 0.0) if found[1] == "ndcg" else inside.astype(np.float64)


def ranking_metrics(ranks: ArrayLike) -> dict[str, float]:
    """Average every headline metric over the queries.

    Args:
        ranks: (Q,), Q >= 1, from `midranks`.
    Returns:
        ``{"r@1", "r@5", "r@10", "r@20", "ndcg@10", "mrr"}``, each the mean of `per_query`.
    Raises:
        ValueError: there is no query, or a rank is not one.
    """
    values = np.asarray(ranks, np.float64)
    if values.size == 0:
        raise ValueError("there is no query to average over.")
    return {name: float(per_query(values, name).mean()) for name in HEADLINE}


def _counts(scores: NDArray[Any], mine: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count the items above and level with the target, per row; `mine` is (q, 1)."""
    with np.errstate(invalid="ignore"):
        better = np.count_nonzero(scores > mine, axis=1)
        equal = np.count_nonzero(scores == mine, axis=1)
    lost = np.flatnonzero(np.isnan(mine[:, 0]))
    if lost.size:
        missing = np.count_nonzero(np.isnan(scores[lost]), axis=1)
        better[lost], equal[lost] = scores.shape[1] - missing, missing
    return better, equal


def _list_excluded(
    excluded: Excluded | None, n_queries: int, n_items: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bring every accepted form to distinct (row, column) pairs."""
    if excluded is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if isinstance(excluded, np.ndarray | sparse.sparray | sparse.spmatrix):
        whole: Any = excluded  # the stubs of coo_array know no union of dense and sparse
        stored = sparse.coo_array(whole)
        if stored.shape != (n_queries, n_items):
            raise ValueError(f"excluded must be ({n_queries}, {n_items}) like scores, found {stored.shape}.")
        rows, columns = (axis.astype(np.int64) for axis in stored.nonzero())
    else:
        if len(excluded) != n_queries:
            raise ValueError(f"excluded must hold {n_queries} index arrays, one per query, found {len(excluded)}.")
        rows = np.repeat(np.arange(n_queries), [len(row) for row in excluded])
        joined = np.concatenate([np.asarray(row) for row in excluded]) if rows.size else np.empty(0, np.int64)
        columns = _indices(joined, "excluded", n_items)
    cells = np.unique(rows * n_items + columns)
    return cells // max(1, n_items), cells % max(1, n_items)


def _indices(values: ArrayLike, name: str, n_items: int) -> NDArray[np.int64]:
    found = np.asarray(values)
    if found.size and not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"{name} must be whole numbers, found {found.dtype}; a bool mask must be (Q, N).")
    found = found.astype(np.int64)
    if found.size and (found.min() < 0 or found.max() >= n_items):
        raise ValueError(f"{name} must lie in 0..{n_items - 1}, found {found.min()}..{found.max()}.")
    return found
