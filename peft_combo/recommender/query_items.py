"""Query items in the catalogue: the items that answer each thing a query names, nearest first.

Owns how what a query names is matched with titles. Knows nothing of scorers or bundles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.labels.tags import Tagger, head_entity
from peft_combo.data.language import is_same_noun
from peft_combo.errors import DataError
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.query import QueryItem
from peft_combo.recommender.text_search import TextSearch, select_largest

# Items whose titles are read for a query item: so many most like its words, and so many most like its name alone.
_READ = 128


@dataclass(frozen=True, eq=False)
class QueryMatch:
    """The items that answer a query item, the likest first, and how like its words every item is (N,).

    Attributes:
        named: whether the items are called as the query item is; where none is, those of its type answer.
    """

    item: QueryItem
    named: bool
    rows: NDArray[np.int64]
    likeness: NDArray[np.float32]


def match_items(
    items: Sequence[QueryItem], tagger: Tagger, search: TextSearch, titles: Sequence[str]
) -> list[QueryMatch]:
    """Find the items that answer each query item by what their titles name; a query item that none answers is left out.

    Args:
        titles: of the N items that are searched.
    """
    if not items:
        return []
    alike = search.score_items([text for item in items for text in (item.text, item.name)])  # (2 W, N)
    matches = []
    for place, item in enumerate(items):
        likeness, by_name = alike[2 * place], alike[2 * place + 1]
        read = np.array(
            list(dict.fromkeys([*select_largest(likeness, _READ), *select_largest(by_name, _READ)])), np.int64
        )
        texts = [titles[row] for row in read]
        heads = [head_entity(title, own) for title, own in zip(texts, tagger(texts), strict=True)]
        typed = np.array([head is not None and head.type == item.type for head in heads])
        named = typed & [head is not None and is_same_noun(head.text, item.name) for head in heads]
        rows = read[named if named.any() else typed]
        if len(rows):
            order = np.argsort(-likeness[rows], kind="stable")
            matches.append(QueryMatch(item, bool(named.any()), rows[order], likeness))
    return matches


def apply_matches(likeness: NDArray[np.float32], matches: Sequence[QueryMatch]) -> NDArray[np.float32]:
    """Put the likeness to a query item in place of that to the whole query, for items that answer one: (N,)."""
    own = np.full_like(likeness, -np.inf)
    for one in matches:
        own[one.rows] = np.maximum(own[one.rows], one.likeness[one.rows])
    return np.where(np.isfinite(own), own, likeness)


def check_count(k: int) -> None:
    """Refuse to return fewer than one."""
    if k < 1:
        raise DataError(f"k: expected at least 1, found {k}.")


def check_query(query: str | None) -> None:
    """Refuse a query without words."""
    if query is not None and not query.strip():
        raise DataError("The query is empty: expected words such as linen dress. Leave it out to go by the rest.")


def add_budget(constraints: Constraints, budget: float | None) -> Constraints:
    """Let the budget of a query count where the constraints have none."""
    return constraints if constraints.budget is not None else replace(constraints, budget=budget)
