"""Conditional logit over sampled candidates: the solver behind fusion weights and category calibration.

Source: McFadden 1974, "Conditional logit analysis of qualitative choice behavior"; Bengio and Senecal 2008, "Adaptive
importance sampling to accelerate training of a neural probabilistic language model" (what drawn cells stand for).
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from peft_combo.machine import one_blas_thread, row_blocks
from peft_combo.recommender.evidence import Evidence

Key = TypeVar("Key", bound=Hashable)
Scores: TypeAlias = Mapping[Key, "NDArray[np.float32]"]
"""(Q, N) of each scorer, whatever a scorer is told by."""

# How likely an target is taken to come from anywhere. Without it the hopeless queries, most of them where R@10 is
# 0.15, would have the say over weights that only matter near the top (cross-validated NDCG@10 on BundleRec electronics:
# 0.087 without, 0.104 with; on clothing no difference).
DOUBT = 0.01
_TINY = 1e-12
# The softmax is taken over the target, the heads of all scorers' lists and some of the rest, each of which stands for
# many. The heads are where NDCG@10 is decided; were they all, a scorer that rarely has the target in its head would
# look as if it spoke against it (Polyvore: the best scorer had no weight, NDCG@10 0.028 where it has 0.045 alone).
_HEAD, _REST = 40, 150


@dataclass(frozen=True)
class SampledCells:
    """The cells the softmax is taken over, query after query, the target first.

    Attributes:
        starts: (Q,) where each query begins. rows, columns: (M,).
        offsets: (M,) ln of how many items a cell stands for: 0 for the target and the heads, more for those drawn from
            the rest, so that the sum over a query's cells estimates that over the whole catalogue.
    """

    starts: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    offsets: NDArray[np.float32]

    def select(self, chosen: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
        """Return the cells of chosen queries, (M,) of (Q,), where each query begins among them, and its cells."""
        sizes = np.diff(np.append(self.starts, len(self.rows)))[chosen]
        return chosen[self.rows], np.cumsum(sizes) - sizes, sizes


def sample_cells(
    scores: Collection[NDArray[np.float32]], targets: NDArray[np.int64], evidence: Evidence, rng: np.random.Generator
) -> SampledCells:
    """Choose the cells of each query: its target, the first items of every scorer, and some drawn from the rest."""
    n_queries, n_items = len(targets), len(evidence.item_support)
    depth = min(_HEAD, n_items)
    heads = np.empty((len(scores), n_queries, depth), np.int64)
    for place, part in enumerate(scores):
        for block in row_blocks(n_queries, n_items):
            ordered = np.where(np.isnan(part[block]), np.inf, -part[block])
            heads[place, block] = np.argpartition(ordered, depth - 1, axis=1)[:, :depth]
    columns, offsets = [], []
    for row, target in enumerate(targets):
        context = evidence.contexts[row]
        head = np.setdiff1d(heads[:, row], np.append(context, target))  # -1 for none does no harm
        drawn = rng.integers(n_items, size=_REST)
        rest = np.setdiff1d(drawn, np.concatenate([head, context, [target]]))
        unseen = n_items - len(head) - 1 - len(np.unique(context[context >= 0]))
        columns.append(np.concatenate([[target], head, rest]))
        weight = np.log(unseen / len(rest)) if len(rest) else 0.0
        offsets.append(np.repeat(np.array([0.0, weight], np.float32), [1 + len(head), len(rest)]))
    sizes = np.array([len(part) for part in columns])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    rows = np.repeat(np.arange(n_queries), sizes)
    return SampledCells(starts, rows, np.concatenate(columns), np.concatenate(offsets))


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
    kept, offsets = cells[:, inside], sampled.offsets[inside]
    precision = precision / len(sizes)
    targets = kept[:, starts]  # (P, Q)

    def loss(theta: NDArray[np.float64], doubt: float) -> tuple[float, NDArray[np.float64]]:
        logits = theta.astype(np.float32) @ kept + offsets  # (P,) @ (P, M)
        share = np.exp(logits - np.repeat(np.maximum.reduceat(logits, starts), sizes))
        share /= np.repeat(np.add.reduceat(share, starts), sizes)
        right = share[starts].astype(np.float64)  # (Q,)
        trust = (right / (right + doubt + _TINY)).astype(np.float32)
        away = theta - centre
        value = -np.log(right + doubt + _TINY).mean() + precision @ away**2 / 2
        slope = (kept @ (share * np.repeat(trust, sizes)) - targets @ trust) / len(sizes)
        return float(value), slope.astype(np.float64) + precision * away

    theta = centre
    with one_blas_thread():
        for doubt in (0.0, DOUBT):  # the first is convex, and where the second starts from
            theta = optimize.minimize(
                loss, theta, args=(doubt,), jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-7}
            ).x
    return np.asarray(theta, np.float64)
