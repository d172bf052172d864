"""Weights of the composition objective, fitted on validation: relevance, compatibility, slots.

Owns the choice of the composer's weights on validation. Knows nothing of how bundles are searched for.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.data.queries import Queries
from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.options import ObjectiveWeights
from peft_combo.recommender.fitted_scorers import Fitted
from peft_combo.recommender.model_selection import split_blocks

SLOTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
COMPATIBILITY = (0.0, 0.5, 1.0)
_QUERIES = 500


def fit_weights(
    composer: Composer, valid: Queries, relevance: Fitted, compatibility: Fitted | None, *, seed: int = 0
) -> ObjectiveWeights:
    """Choose how much slots and compatibility count beside relevance, which counts 1.

    Where one item of a bundle is missing, the objective ranks all items for the place; the weights are those with the
    highest NDCG@10 there. Redundancy stays what it is, for how varied a bundle should be is the caller's to say.

    Args:
        composer: with templates of training bundles; its own weights do not matter.
        valid: validation queries; of more than 500 a seeded sample is asked.
        relevance, compatibility: what the composer will be given, fitted on training bundles.
    """
    queries = valid.sample(_QUERIES, seed)
    grid = list(itertools.product(SLOTS, COMPATIBILITY if compatibility is not None else COMPATIBILITY[-1:]))
    found: list[list[NDArray[np.float64]]] = [[] for _ in grid]
    for part in split_blocks(queries):
        own = composer.score_completions(
            [row[row >= 0] for row in part.contexts], relevance(part),
            None if compatibility is None else compatibility(part),
        )  # fmt: skip
        excluded = part.excluded()
        for values, (slots, beside) in zip(found, grid, strict=True):
            scores = own["relevance"] + beside * own["compatibility"] + slots * own["slots"]
            ranks = metrics.midranks(scores.astype(np.float32), part.targets, excluded)
            values.append(metrics.per_query(ranks, "ndcg@10"))
    gains = np.array([np.concatenate(values) for values in found])  # (settings, Q)
    # Of equals the one with the most weight on slots, then on compatibility: order that costs nothing is kept.
    slots, beside = max(zip(gains.mean(axis=1).round(6), grid, strict=True))[1]
    return ObjectiveWeights(slots=slots, compatibility=beside)
