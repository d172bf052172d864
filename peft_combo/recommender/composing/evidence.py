"""Evidence for composed bundles: shared attributes, co-occurrence counts and slot frequencies per item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.data.knowledge.rule_set import Related
from peft_combo.data.model import Catalog
from peft_combo.recommender.composing.agreement import Agreement
from peft_combo.recommender.composing.objective import ScoredBundle
from peft_combo.recommender.composing.options import Rows
from peft_combo.recommender.composing.search_space import SlottedCatalog
from peft_combo.recommender.composing.slots import SlotRule
from peft_combo.scoring.base import SparseRows


@dataclass(frozen=True)
class ItemEvidence:
    """Why an item is in a bundle: only what was counted or computed.

    Attributes:
        row: the item.
        slot: its slot.
        relevance: its share of the bundle's relevance part; the shares of all added items add up to that part.
        compatibility, agreement: its shares of these parts, likewise.
        partner: the item of the context (of the bundle, where there is no context) most often in one training bundle
            with this one, ties by cosine; None where neither count nor cosine is known or above 0.
        partner_count: the training bundles that hold both.
        partner_similarity: the cosine of both; None without vectors.
        shared: traits on which it agrees with an item of the context (of the bundle): (name, value). Where it was
            learned what bundles agree on those that count for it, the most telling first; else equal attributes.
        rule: the slot rule with the highest confidence from another slot of the bundle to this one.
        related: relations between it and an item of the context (of the bundle).
        required: names of the rules that require it, each with the item of the bundle that does.
    """

    row: int
    slot: str
    relevance: float
    compatibility: float
    agreement: float
    partner: int | None
    partner_count: int
    partner_similarity: float | None
    shared: tuple[tuple[str, str], ...]
    rule: SlotRule | None
    related: tuple[Related, ...] = ()
    required: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Composition:
    """A bundle with its score.

    Attributes:
        items: rows, context included, as training bundles order their slots.
        added: those of `items` that are not of the context.
        score: the objective, the sum of `parts`.
        parts: "relevance", "compatibility", "slots", "agreement" and "redundancy", weights and signs included.
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


@dataclass(frozen=True, eq=False)
class EvidenceSource:
    """What the evidence of a bundle is taken from.

    Attributes:
        vectors: (N, D) for likeness between items; None knows none.
        history: (B, N) training bundles in columns; None counts none.
        agreement: what bundles agree on; None where it was not learned.
    """

    slotted: SlottedCatalog
    vectors: NDArray[np.float32] | None
    history: Any
    agreement: Agreement | None = None

    def describe(self, context: tuple[int, ...], scored: ScoredBundle) -> Composition:
        """Return a scored bundle with the evidence of each added item."""
        slotted = self.slotted
        items = sorted((*context, *scored.added), key=lambda row: (slotted.slot_places[slotted.slot_of[row]], row))
        cents = slotted.index.cents[items]
        shares = dict(
            zip(scored.added, zip(scored.relevance, scored.compatibility, scored.agreement, strict=True), strict=True)
        )
        added = tuple(row for row in items if row in shares)
        return Composition(
            items=tuple(items),
            added=added,
            score=scored.score,
            parts=scored.parts,
            slots=tuple(slotted.name_slot(row) for row in items),
            price=float("nan") if (cents < 0).any() else int(cents.sum()) / 100,
            evidence=tuple(self._find_evidence(row, context, items, shares[row]) for row in added),
        )

    def _find_evidence(
        self, row: int, context: tuple[int, ...], items: list[int], shares: tuple[float, float, float]
    ) -> ItemEvidence:
        slotted, agreement = self.slotted, self.agreement
        others = np.array([other for other in (context or items) if other != row], np.int64)
        slot = int(slotted.slot_of[row])
        counts = np.zeros(len(others), np.int64) if self.history is None else count_together(self.history, row, others)
        cosines = None if self.vectors is None else self.vectors[others] @ self.vectors[row]
        best = max(range(len(others)), key=lambda i: (counts[i], 0 if cosines is None else cosines[i]), default=None)
        if best is not None and counts[best] == 0 and (cosines is None or cosines[best] <= 0):
            best = None
        given = {int(slotted.slot_of[other]) for other in items if other != row} - {slot}
        rules = [rule for other in sorted(given) if (rule := slotted.templates.find_rule(other, slot)) is not None]
        return ItemEvidence(
            row=row,
            slot=slotted.templates.names[slot],
            relevance=shares[0],
            compatibility=shares[1],
            agreement=shares[2],
            partner=None if best is None else int(others[best]),
            partner_count=0 if best is None else int(counts[best]),
            partner_similarity=None if best is None or cosines is None else float(cosines[best]),
            shared=_find_shared(slotted.index.catalog, row, others)
            if agreement is None
            else agreement.find_shared(row, others.tolist()),
            rule=max(rules, key=lambda rule: (rule.confidence, rule.support), default=None),
            related=slotted.rules.list_related(row, others.tolist()),
            required=slotted.rules.list_met(row, [other for other in items if other != row]),
        )


def count_together(history: SparseRows, item: int, context: Sequence[int] | Rows) -> Rows:
    """Count the rows of the history that hold both an item and each item of the context.

    Args:
        history: (B, N) training bundles, no cell stored twice; CSC answers fastest, others are converted first.
        item: a column.
        context: columns (m,).
    Returns:
        (m,) counts.
    """
    columns: Any = history if isinstance(history, sparse.csc_array) else sparse.csc_array(history)
    starts, rows = columns.indptr, columns.indices
    holders = set(rows[starts[item] : starts[item + 1]].tolist())
    counts = [
        len(holders.intersection(rows[starts[other] : starts[other + 1]].tolist())) if holders else 0
        for other in np.asarray(context, np.int64).tolist()
    ]
    return np.array(counts, np.int64)


def _find_shared(catalog: Catalog, row: int, others: Rows) -> tuple[tuple[str, str], ...]:
    agreed = []
    for name, values in catalog.attributes.items():
        value = values[row]
        if name != "stock" and value is not None and any(values[other] == value for other in others.tolist()):
            agreed.append((name, value))
    return tuple(agreed)
