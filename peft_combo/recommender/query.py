"""Query parsing: the items a text asks for, each with its own words, and a budget.

Owns how a query is taken apart. Knows nothing of catalogues or of who finds the entities.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from peft_combo.data.augmentation.fashion_nouns import pluralize
from peft_combo.data.labels.tags import Entity, Tagger

# Between two things one of these begins the next: "boots for hiking and a wool coat".
_NEXT = re.compile(r"\s*(?:\b(?:with|and|plus|or|also|then)\b|[,;&+])\s*", re.IGNORECASE)
# "under 200", "up to $1,200.50", "at most 80 euros"; not "under 2 kg", for what follows has to end the clause.
_BUDGET = re.compile(
    r"[,;(]?\s*\b(?:(?:for|at|costing)\s+)?"
    r"(?:under|below|up\s+to|at\s+most|less\s+than|no\s+more\s+than|not\s+over|within|max(?:imum)?(?:\s+of)?)"
    r"\s+[$€£]?\s*(?P<amount>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)"
    r"(?:\s*(?:[$€£]|\b(?:dollars?|euros?|pounds?|usd|eur|gbp)\b))?"
    r"(?:\s+(?:in\s+(?:all|total)|together|altogether))?\)?(?=\s*(?:$|[,;.!?]|\b(?:with|and|plus|for|in)\b))",
    re.IGNORECASE,
)


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
    """Take a query apart: what it names, which words belong to which, and a budget ("under 200") where it says one.

    The words before a thing are its own; those between two things are parted at "with", "and" or a comma, and belong to
    the next thing where nothing parts them.
    """
    amount = _BUDGET.search(query)
    budget = None if amount is None else float(amount["amount"].replace(",", ""))
    text = query if amount is None else f"{query[: amount.start()]} {query[amount.end() :]}"
    text = " ".join(text.split())
    found = [one for one in tagger([text])[0] if one.text.strip()]
    items: dict[str, QueryItem] = {}
    for one, (start, end) in zip(found, _split_clauses(text, found), strict=True):
        name = one.text.casefold()
        items.setdefault(name, QueryItem(name, one.type, text[start:end].strip(" ,;.")))
    return ParsedQuery(text, tuple(items.values()), budget)


def is_same_noun(name: str, other: str) -> bool:
    """Say whether two names end in the same noun, in singular or plural: "ankle boots" and "a boot"."""
    one, two = (words.casefold().split()[-1:] for words in (name, other))
    return bool(one and two) and (one == two or pluralize(one[0]) == two[0] or pluralize(two[0]) == one[0])


def _split_clauses(text: str, found: Sequence[Entity]) -> list[tuple[int, int]]:
    """Return from where to where the words of each entity go."""
    starts, ends = [0], []
    for before, after in pairwise(found):
        parted = list(_NEXT.finditer(text, before.end, after.start))
        ends.append(parted[-1].start() if parted else before.end)
        starts.append(parted[-1].end() if parted else before.end)
    return list(zip(starts, [*ends, len(text)], strict=True))[: len(found)]
