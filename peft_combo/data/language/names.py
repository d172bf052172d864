"""Names of fashion products by kind, in every language that is known: English nouns and Chinese names."""

from __future__ import annotations

from collections.abc import Sequence

from peft_combo.data.language.chinese_words import FASHION
from peft_combo.data.language.english_nouns import FASHION_NOUNS, Nouns
from peft_combo.data.language.scripts import has_han


class Names:
    """A set of names: words with spaces between them, or Chinese without.

    Attributes:
        longest: words of the longest, a Han character being one.
    """

    def __init__(self, nouns: Nouns, chinese: Sequence[str]) -> None:
        self._nouns = nouns
        self._chinese = frozenset(name.casefold() for name in chinese)
        self.longest = max(nouns.longest, *map(len, self._chinese))

    def __contains__(self, name: object) -> bool:
        return name in self._nouns or name in self._chinese


FASHION_NAMES: dict[str, Names] = {kind: Names(nouns, FASHION[kind]) for kind, nouns in FASHION_NOUNS.items()}
"""Entity type -> what its things are called: Clo (clothing), Shoe, Acc (bags, jewellery and other accessories)."""


def join_folded(words: Sequence[str]) -> str:
    """Join words as a name is written: without spaces where one of them is Chinese ("t" and "恤" too)."""
    return ("" if any(map(has_han, words)) else " ").join(words)
