"""Evidence for composed bundles: shared attributes, co-occurrence counts and slot frequencies per item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from peft_combo.recommender.composing.options import Rows
from peft_combo.recommender.composing.slots import SlotRule
from peft_combo.scoring.base import SparseRows


@dataclass(frozen=True)
class ItemEvidence:
    """Why an item is in a bundle: only what was counted or computed.

    Attributes:
        row: the item.
        slot: its slot.
        relevance: its share of the bundle's relevance part; the shares of all added items add up to that part.
        compatibility: its share of the compatibility part, likewise.
        partner: the item of the context (of the bundle, where there is no context) most often in one training bundle
            with this one, ties by cosine; None where neither count nor cosine is known or above 0.
        partner_count: the training bundles that hold both.
        partner_similarity: the cosine of both; None without vectors.
        shared: attributes on which it agrees with an item of the context (of the bundle): (name, value).
        rule: the slot rule with the highest confidence from another slot of the bundle to this one.
    """

    row: int
    slot: str
    relevance: float
    compatibility: float
    partner: int | None
    partner_count: int
    partner_similarity: float | None
    shared: tuple[tuple[str, str], ...]
    rule: SlotRule | None


@dataclass(frozen=True)
class Composition:
    """A bundle with its score.

    Attributes:
        items: rows, context included, as training bundles order their slots.
        added: those of `items` that are not of the context.
        score: the objective, the sum of `parts`.
        parts: "relevance", "compatibility", "slots" and "redundancy", weights and signs included.
        slots: the slot of each of `items`.
        price: of all items; NaN where one is unknown.
        evidence: one for each of `added`.
    """

    items: tuple[int, ...]
    added: tuple[int, ...]
    score: float
    parts: dict[str, float]
    slots: tuple[str, ...]
    price: float
    evidence: tuple[ItemEvidence, ...]


def co_counts(history: SparseRows, item: int, context: Sequence[int] | Rows) -> Rows:
    """Count the rows of the history that hold both an item and each item of the context.

    Args:
        history: (B, N) training bundles, no cell stored twice; CSC answers fastest, others are converted first.
        item: a column.
        context: columns (m,).
    Returns:
        (m,) counts.
    """
    columns: Any = sparse.csc_array(history)
    holders = columns.indices[columns.indptr[item] : columns.indptr[item + 1]]
    counts = [
        np.intersect1d(holders, columns.indices[columns.indptr[other] : columns.indptr[other + 1]], True).size
        for other in np.asarray(context, np.int64).tolist()
    ]
    return np.array(counts, np.int64)
