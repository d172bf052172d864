"""Results of the recommender: suggested items, recommended and detected bundles, with scores, shares and evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Suggestion:
    """One item that completes a bundle.

    Attributes:
        score: fused, comparable within one answer only.
        shares: what each scorer adds to the score; their sum is the score.
        together: of the given items those that bundles held together with this one, and how often.
        because: where it was asked for and there are several given items, what each adds: the score less the score
            without it.
        reasons: where it was asked for and the fusion weighs the text ranker or the knowledge graph: what these find in
            it beside the given items, in words, and what that adds to their own scores. "looks alike" is what pictures
            add, to the ranker's score or, by way of other scorers, to this one.
    """

    item_id: str
    title: str
    slot: str | None
    price: float | None
    score: float
    shares: dict[str, float]
    together: dict[str, int]
    because: dict[str, float]
    reasons: dict[str, float]


@dataclass(frozen=True)
class BundleMatch:
    """One bundle that a text search found.

    Attributes:
        bundle_id: outside id; None for a bundle that was given. items, titles: of what it holds. name: None where
            it has none.
        score: of the search (`text_search`), comparable within one answer only.
    """

    bundle_id: str | None
    items: tuple[str, ...]
    titles: tuple[str, ...]
    name: str | None
    score: float


@dataclass(frozen=True)
class Recommendation:
    """One bundle.

    Attributes:
        items: outside ids, what was given included. added: those that are new.
        score: the composer's objective, the sum of `parts`.
        prices: of each item; None where it is unknown. price: of the whole bundle; None where one is unknown.
        evidence: per added item what speaks for it: counts, agreeing attributes, the slot rule with its support and
            confidence, the relations it is in and the rules that require it, what each scorer gives it beside the given
            items, which things of the query it `answers`, and
            where it was asked for, what each other item of the bundle adds to its compatibility (`because`, in cosines
            of the text side). Nothing in it is made up; where nothing was counted the entry is short.
    """

    items: tuple[str, ...]
    titles: tuple[str, ...]
    slots: tuple[str, ...]
    added: tuple[str, ...]
    score: float
    parts: dict[str, float]
    prices: tuple[float | None, ...]
    price: float | None
    evidence: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class DetectedBundle:
    """One bundle found in a session.

    Attributes:
        items: outside ids, in the order they were given.
        belongs: per item the mean probability that it shares a bundle with each other item.
        score: the mean of `belongs`, comparable between sessions.
        price: of the whole bundle; None where a price is unknown.
    """

    items: tuple[str, ...]
    titles: tuple[str, ...]
    slots: tuple[str, ...]
    belongs: tuple[float, ...]
    score: float
    price: float | None
