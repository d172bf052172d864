"""Scores for when the fusion has none: by likeness of texts, by counts of what bundles held together, by popularity.

Owns plain scores that need no fitting. Each says nothing (None) where it has nothing to go by.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from peft_combo.recommender.explanations import FusedScores
from peft_combo.recommender.fit_state import FitState
from peft_combo.recommender.scorer_id import FROZEN, TOGETHER, TOP


def score_by_texts(state: FitState, context: NDArray[np.int64]) -> FusedScores | None:
    """Score all items by the cosine of their texts with the mean of a context, (S,) rows."""
    vectors = state.known.frozen
    if vectors is None or not len(context):
        return None
    scores = np.array(vectors @ vectors[context].mean(axis=0), np.float32)  # (N, D) @ (D,) -> (N,)
    scores[context] = np.nan
    return FusedScores(scores, {FROZEN: scores})


def score_by_counts(state: FitState, context: NDArray[np.int64]) -> FusedScores | None:
    """Score all items by how many bundles hold them with each item of a context; NaN where none does."""
    if not len(context):
        return None
    history = state.known.history
    beside = np.zeros(history.shape[1], np.float32)
    beside[context] = 1
    holders = history @ beside  # (B, N) @ (N,) -> (B,)
    scores = np.asarray(history.T @ holders, np.float32)
    scores[context] = 0
    if not scores.any():
        return None
    scores[scores == 0] = np.nan
    return FusedScores(scores, {TOGETHER: scores})


def score_by_popularity(state: FitState) -> FusedScores:
    """Score all items by how many bundles hold them and how many users took them."""
    taken = np.asarray((state.known.past > 0).sum(axis=0)).ravel()
    scores = (state.known.support + taken).astype(np.float32)
    return FusedScores(scores, {TOP: scores})
