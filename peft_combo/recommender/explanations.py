"""Explanations of results: shares of scorers, counts, agreeing attributes, slot rules and query items as evidence.

Owns how rows and scores become the suggestions and recommendations that callers see. Computes no score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.model import Catalog
from peft_combo.recommender.bundle_detection import Detected
from peft_combo.recommender.composing.evidence import Composition, ItemEvidence
from peft_combo.recommender.fitted_scorers import Fitted, FittedScorer
from peft_combo.recommender.query_items import QueryMatch
from peft_combo.recommender.relation_paths import explain_paths
from peft_combo.recommender.results import DetectedBundle, Recommendation, Suggestion
from peft_combo.recommender.scorer_id import ALIKE, ScorerId
from peft_combo.recommender.text_ranking import TextRanker
from peft_combo.scoring.paths import PathRanking


@dataclass(frozen=True, eq=False)
class FusedScores:
    """Fused scores (N,) for one query, and what each scorer gave.

    Attributes:
        whole: every item that any scorer speaks of has a score; else only candidates that were found first have one.
    """

    scores: NDArray[np.float32]
    parts: Mapping[ScorerId, NDArray[np.float32]]
    whole: bool = True

    def shares(self, row: int) -> dict[str, float]:
        """Return what each scorer adds to an item's score, by its label; the sum is the score."""
        shares = {str(scorer): float(part[row]) for scorer, part in self.parts.items()}
        rest = float(self.scores[row]) - sum(shares.values())
        return {**shares, str(ALIKE): rest} if abs(rest) > 1e-4 else shares


def explain_scorers(
    serving: Mapping[ScorerId, Fitted], catalog: Catalog, context: NDArray[np.int64], rows: Sequence[int]
) -> dict[int, dict[str, float]]:
    """Say for each row in words what text ranker and knowledge graph find beside a context, with its share of each."""
    reasons: dict[int, dict[str, float]] = {row: {} for row in rows}
    for fitted in serving.values():
        told: Mapping[int, Mapping[str, float]] = {}
        if isinstance(fitted, TextRanker):
            told = fitted.explain(context, rows)
        elif isinstance(fitted, FittedScorer) and isinstance(fitted.scorer, PathRanking):
            told = explain_paths(fitted.scorer, catalog, context, rows)
        for row, own in told.items():
            reasons[row] |= own
    return reasons


def describe_item(
    catalog: Catalog, row: int, fused: FusedScores, together: dict[str, int], because: dict[str, float],
    reasons: dict[str, float],
) -> Suggestion:  # fmt: skip
    """Return one item that completes a bundle, in the words of callers."""
    price = catalog.prices[row]
    return Suggestion(
        catalog.item_ids[row], catalog.titles[row], catalog.slots[row] or catalog.leaf(row),
        None if np.isnan(price) else float(price), float(fused.scores[row]), fused.shares(row), together, because,
        reasons,
    )  # fmt: skip


def describe_detected(catalog: Catalog, found: Detected) -> DetectedBundle:
    """Return one group of a session's items in the words of callers."""
    rows = list(found.rows)
    price = float(catalog.prices[rows].sum())
    return DetectedBundle(
        tuple(catalog.item_ids[row] for row in rows), tuple(catalog.titles[row] for row in rows),
        tuple(catalog.slots[row] or catalog.leaf(row) or "" for row in rows), found.belongs, found.score,
        None if np.isnan(price) else price,
    )  # fmt: skip


def describe_bundle(
    catalog: Catalog,
    composition: Composition,
    fused: FusedScores | None,
    because: Mapping[int, dict[str, float]],
    matches: Sequence[QueryMatch] = (),
) -> Recommendation:
    """Return one bundle in the words of callers, with the evidence of each added item."""
    evidence = []
    for item in composition.evidence:
        entry = _describe_evidence(catalog, item, matches)
        if fused is not None:
            entry["scorers"] = fused.shares(item.row)
        if item.row in because:
            entry["because"] = because[item.row]
        evidence.append(entry)
    return Recommendation(
        tuple(catalog.item_ids[row] for row in composition.items),
        tuple(catalog.titles[row] for row in composition.items),
        composition.slots,
        tuple(catalog.item_ids[row] for row in composition.added), composition.score, composition.parts,
        tuple(None if np.isnan(price) else round(float(price), 2) for price in catalog.prices[list(composition.items)]),
        None if np.isnan(composition.price) else composition.price, tuple(evidence),
    )  # fmt: skip


def _describe_evidence(catalog: Catalog, item: ItemEvidence, matches: Sequence[QueryMatch]) -> dict[str, Any]:
    entry: dict[str, Any] = {"item": catalog.item_ids[item.row], "slot": item.slot}
    if answered := [one for one in matches if item.row in one.rows]:
        entry["answers"] = [{"wish": one.item.name, "type": one.item.type, "named": one.named} for one in answered]
    if item.partner is not None and item.partner_count:
        entry["together"] = {"with": catalog.item_ids[item.partner], "bundles": item.partner_count}
    if item.shared:
        entry["agrees"] = dict(item.shared)
    if (rule := item.rule) is not None:
        entry["rule"] = {
            "given": rule.given, "slot": rule.slot, "support": rule.support, "of": rule.bundles,
            "confidence": rule.confidence,
        }  # fmt: skip
    if item.related:
        entry["related"] = [
            {"relation": one.relation, "with": catalog.item_ids[one.other], "head": one.head} for one in item.related
        ]
    if item.required:
        entry["required"] = [{"rule": name, "by": catalog.item_ids[other]} for name, other in item.required]
    entry |= {"relevance": item.relevance, "compatibility": item.compatibility, "agreement": item.agreement}
    return entry
