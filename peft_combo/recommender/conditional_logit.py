"""Conditional logit over sampled candidates: the solver behind fusion weights and category calibration.

Source: McFadden 1974, "Conditional logit analysis of qualitative choice behavior".
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from peft_combo.machine import row_blocks
from peft_combo.recommender.evidence import Evidence

Key = TypeVar("Key", bound=Hashable)
Scores: TypeAlias = Mapping[Key, "NDArray[np.float32]"]
"""(Q, N) of each scorer, whatever a scorer is told by."""

# How likely an target is taken to come from anywhere. Without it the hopeless queries, most of them where R@10 is
# 0.15, would have the say over weights that only matter near the top (cross-validated NDCG@10 on BundleRec electronics:
# 0.087 without, 0.104 with; on clothing no difference).
DOUBT = 0.01
_TINY = 1e-12
# The softmax is taken over the target, the heads of all scorers' lists and some of the rest. The heads are where
# NDCG@10 is decided; the rest keeps a scorer honest about what nobody puts forward.
_HEAD, _REST = 40, 150


@dataclass(frozen=True)
class SampledCells:
    """The cells the softmax is taken over, query after query, the target first.

    Attributes:
        starts: (Q,) where each query begins. rows, columns: (M,).
    """

    starts: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]

    def select(self, chosen: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
        """Return the cells of chosen queries, (M,) of (Q,), where each query begins among them, and its cells."""
        sizes = np.diff(np.append(self.starts, len(self.rows)))[chosen]
        return chosen[self.rows], np.cumsum(sizes) - sizes, sizes


def sample_cells(
    scores: Collection[NDArray[np.float32]], targets: NDArray[np.int64], evidence: Evidence, rng: np.random.Generator
) -> SampledCells:
    n_queries, n_items = len(targets), len(evidence.item_support)
    depth = min(_HEAD, n_items)
    heads = np.empty((len(scores), n_queries, depth), np.int64)
    for place, part in enumerate(scores):
        for block in row_blocks(n_queries, n_items):
            ordered = np.where(np.isnan(part[block]), np.inf, -part[block])
            heads[place, block] = np.argpartition(ordered, depth - 1, axis=1)[:, :depth]
    columns = []
    for row, target in enumerate(targets):
        drawn = rng.integers(n_items, size=_REST)
        taken = np.append(evidence.contexts[row], target)  # -1 for none does no harm
        columns.append(np.append(target, np.setdiff1d(np.append(heads[:, row], drawn), taken)))
    sizes = np.array([len(part) for part in columns])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    return SampledCells(starts, np.repeat(np.arange(n_queries), sizes), np.concatenate(columns))


def fit_conditional_logit(
    cells: NDArray[np.float32],
    sampled: SampledCells,
    chosen: NDArray[np.bool_],
    precision: NDArray[np.float64],
    bounds: Sequence[tuple[float | None, float | None]],
    centre: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Maximise the mean of ln(share of the target + doubt) under a normal prior; see `Fusion.fit`.

    Args:
        cells: (P, M), per term what it gives each sampled cell.
        chosen: (Q,) the queries to fit on.
        precision, centre: (P,) of the prior, which counts as much as one query.
    Returns:
        (P,) one number per term.
    """
    inside, starts, sizes = sampled.select(chosen)
    kept = cells[:, inside]
    precision = precision / len(sizes)
    targets = kept[:, starts]  # (P, Q)

    def loss(theta: NDArray[np.float64], doubt: float) -> tuple[float, NDArray[np.float64]]:
        logits = theta.astype(np.float32) @ kept  # (P,) @ (P, M)
        share = np.exp(logits - np.repeat(np.maximum.reduceat(logits, starts), sizes))
        share /= np.repeat(np.add.reduceat(share, starts), sizes)
        right = share[starts].astype(np.float64)  # (Q,)
        trust = (right / (right + doubt + _TINY)).astype(np.float32)
        away = theta - centre
        value = -np.log(right + doubt + _TINY).mean() + precision @ away**2 / 2
        slope = (kept @ (share * np.repeat(trust, sizes)) - targets @ trust) / len(sizes)
        return float(value), slope.astype(np.float64) + precision * away

    theta = centre
    for doubt in (0.0, DOUBT):  # the first is convex, and where the second starts from
        theta = optimize.minimize(
            loss, theta, args=(doubt,), jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-7}
        ).x
    return np.asarray(theta, np.float64)
