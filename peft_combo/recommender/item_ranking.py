"""Ranking of single items: who may be shown, in which order, and what comes after an item that was shown last.

Owns how scores of different origin are added up, how rejected items push what is like them down, and how a list goes
on. Knows rows and scores; nothing of outside ids or of how scores were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peft_combo.recommender.explanations import FusedScores
from peft_combo.recommender.scorer_id import FUSION, NOT_LIKE, TEXT_SEARCH
from peft_combo.recommender.text_search import select_largest


@dataclass(frozen=True, eq=False)
class ItemRanking:
    """All items for one request.

    Attributes:
        context: rows that stand for the request; none where a query alone was given.
        fused: scores (N,) and what they are made of. allowed: (N,) which items may be shown.
    """

    context: NDArray[np.int64]
    user: str | None
    fused: FusedScores
    allowed: NDArray[np.bool_]

    def take(self, k: int, after: int | None = None) -> list[int]:
        """Return the k best rows, of equal ones the lower first.

        Args:
            after: a row: only what comes behind it.
        """
        scores = self.fused.scores
        candidates = np.flatnonzero(self.allowed)
        if after is not None:
            own = scores[candidates]
            candidates = candidates[(own < scores[after]) | ((own == scores[after]) & (candidates > after))]
        rows: list[int] = candidates[select_largest(scores[candidates], k)].tolist()
        return rows


def join_scores(fused: FusedScores | None, likeness: NDArray[np.float32] | None) -> FusedScores:
    """Return what a context and a query say together: standard scores added up, or the one that is there."""
    if likeness is None:
        assert fused is not None
        return fused
    if fused is None:
        return FusedScores(likeness, {TEXT_SEARCH: likeness})
    parts = {FUSION: standardize_scores(fused.scores), TEXT_SEARCH: standardize_scores(likeness)}
    total = sum_known(list(parts.values()))
    return FusedScores(total, {name: np.nan_to_num(part) for name, part in parts.items()})


def push_away(fused: FusedScores, vectors: NDArray[np.float32], rejected: NDArray[np.int64]) -> FusedScores:
    """Lower the scores of what is like rejected items.

    An item loses a deviation of the scores for each deviation that its cosine with the nearest rejected item lies above
    the mean of all items; what is less like them than the mean loses nothing.

    Args:
        vectors: (N, D) of length 1. rejected: (R,) rows.
    """
    less = (-float(np.nanstd(fused.scores)) * measure_excess(vectors, rejected)).astype(np.float32)
    return FusedScores(fused.scores + less, {**fused.parts, NOT_LIKE: less})


def measure_excess(vectors: NDArray[np.float32], rejected: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return by how many deviations each item is more like the nearest rejected one than the mean, at least 0: (N,)."""
    alike = (vectors @ vectors[rejected].T).max(axis=1)  # (N, D) @ (D, R) -> (N, R)
    return np.maximum(standardize_scores(alike), 0)


def sum_standard(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32] | None:
    """Add relevances of different origin, each as standard scores; unknown stays unknown only where all are."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return sum_known([standardize_scores(part) for part in parts])


def standardize_scores(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return standard scores (N,); NaN stays NaN."""
    return np.asarray((scores - np.nanmean(scores)) / max(float(np.nanstd(scores)), 1e-9), np.float32)


def sum_known(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Add up (N,) scores; one that is unknown adds nothing, NaN where all are."""
    known = np.any([np.isfinite(part) for part in parts], axis=0)
    total = np.sum([np.nan_to_num(part, nan=0.0) for part in parts], axis=0)
    return np.where(known, total, np.nan).astype(np.float32)
