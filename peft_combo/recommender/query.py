"""Query parsing: the items a text asks for, each with its own words, and a budget.

Owns how a query is taken apart. Knows nothing of catalogues or of who finds the entities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from peft_combo.data.labels.tags import Entity, Tagger
from peft_combo.data.language import find_budget, find_next


@dataclass(frozen=True)
class QueryItem:
    """One thing a query asks for.

    Attributes:
        name: the thing itself, as the query names it ("ankle boots").
        type: the type of entity ("Shoe").
        text: what the query says of it, the name included ("black leather ankle boots").
    """

    name: str
    type: str
    text: str


@dataclass(frozen=True)
class ParsedQuery:
    """A query taken apart.

    Attributes:
        text: the query without the words on money.
        items: what it names, in order; each name once.
        budget: what all of it may cost; None where nothing is said.
    """

    text: str
    items: tuple[QueryItem, ...]
    budget: float | None

    def __str__(self) -> str:
        told = [f"{item.name} ({item.type})" for item in self.items]
        told += [] if self.budget is None else [f"budget {self.budget:g}"]
        return ", ".join(told) or "no thing that a tag names"


def parse_query(query: str, tagger: Tagger) -> ParsedQuery:
    """Take a query apart: what it names, which words belong to which, and a budget where it says one ("under 200",
    "预算三百元以内").

    The words before a thing are its own; those between two things are parted at "with", "and", a comma or 配, and
    belong to the next thing where nothing parts them.
    """
    budget = find_budget(query)
    text = query if budget is None else f"{query[: budget.start]} {query[budget.stop :]}"
    text = " ".join(text.split())
    found = [one for one in tagger([text])[0] if one.text.strip()]
    items: dict[str, QueryItem] = {}
    for one, (start, end) in zip(found, _split_clauses(text, found), strict=True):
        name = one.text.casefold()
        items.setdefault(name, QueryItem(name, one.type, text[start:end].strip(" ,;.，；。、")))
    return ParsedQuery(text, tuple(items.values()), None if budget is None else budget.amount)


def _split_clauses(text: str, found: Sequence[Entity]) -> list[tuple[int, int]]:
    """Return from where to where the words of each entity go."""
    starts, ends = [0], []
    for before, after in pairwise(found):
        parted = find_next(text, before.end, after.start)
        ends.append(parted[-1].start() if parted else before.end)
        starts.append(parted[-1].end() if parted else before.end)
    return list(zip(starts, [*ends, len(text)], strict=True))[: len(found)]
