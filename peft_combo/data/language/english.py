"""English: what parts the things of a query, the words on a budget, and singular and plural."""

from __future__ import annotations

import re

from peft_combo.data.language.budget import Budget
from peft_combo.data.language.english_nouns import pluralize

# Between two things one of these begins the next: "boots for hiking and a wool coat".
NEXT = r"\s*(?:\b(?:with|and|plus|or|also|then)\b|[,;&+])\s*"
# "under 200", "up to $1,200.50", "at most 80 euros"; not "under 2 kg", for what follows has to end the clause.
_BUDGET = re.compile(
    r"[,;(]?\s*\b(?:(?:for|at|costing)\s+)?"
    r"(?:under|below|up\s+to|at\s+most|less\s+than|no\s+more\s+than|not\s+over|within|max(?:imum)?(?:\s+of)?)"
    r"\s+[$€£¥￥]?\s*(?P<amount>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)"
    r"(?:\s*(?:[$€£¥￥]|\b(?:dollars?|euros?|pounds?|yuan|usd|eur|gbp|rmb|cny)\b))?"
    r"(?:\s+(?:in\s+(?:all|total)|together|altogether))?\)?(?=\s*(?:$|[,;.!?]|\b(?:with|and|plus|for|in)\b))",
    re.IGNORECASE,
)


def find_budget(query: str) -> Budget | None:
    """Find "under 200" and its like."""
    found = _BUDGET.search(query)
    return None if found is None else Budget(float(found["amount"].replace(",", "")), found.start(), found.end())


def is_same_noun(name: str, other: str) -> bool:
    """Say whether the last words of two names are one noun, in singular or plural."""
    one, two = (words.casefold().split()[-1:] for words in (name, other))
    return bool(one and two) and (one == two or pluralize(one[0]) == two[0] or pluralize(two[0]) == one[0])
