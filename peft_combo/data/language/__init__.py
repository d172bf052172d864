"""Languages of product texts and queries: what their words are, which of them say nothing, budgets and nouns.

Owns which language a text is read as, told by its script. Knows nothing of catalogues, scorers or encoders; no torch.

A text is read in its own language, so a catalogue may mix them; an English text is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, assert_never

from peft_combo.data.language import chinese, english, fallback
from peft_combo.data.language.budget import Budget
from peft_combo.data.language.scripts import HAN, detect_script, has_han, is_spaced

__all__ = [
    "HAN",
    "Budget",
    "Language",
    "count_unspaced",
    "detect_language",
    "find_budget",
    "find_next",
    "has_han",
    "is_same_noun",
    "join_words",
    "split_all",
    "split_characters",
    "split_words",
]

Language = Literal["auto", "english", "chinese", "other"]
"""What texts are read as: `auto` goes by the script of each text, the others hold for all."""

_WORDLIKE = re.compile(r"[^\W_]+")
_NEXT = re.compile(f"{english.NEXT}|{chinese.NEXT}", re.IGNORECASE)


def detect_language(text: str) -> Language:
    """Tell the language of a text by its script: chinese for Han alone, other for kana, Hangul, Thai and their kin.

    Everything else is english, which stands for all languages that part words by spaces: their words need no finding.
    """
    match detect_script(text):
        case "han":
            return "chinese"
        case "unspaced":
            return "other"
        case "spaced":
            return "english"
        case script:
            assert_never(script)


@lru_cache(maxsize=1 << 17)  # a fit reads the same texts several times over
def split_words(text: str, language: Language = "auto") -> str:
    """Return a text whose words have spaces between them, so that TF-IDF and its kin can tell them apart.

    Chinese: width and traditional characters folded, promotion left out, units and numbers written one way, words by
    jieba or, without the extra [chinese], runs of two characters. Other: overlapping runs of two characters of scripts
    without spaces. English: as it is.
    """
    match detect_language(text) if language == "auto" else language:
        case "chinese":
            return chinese.split_words(text)
        case "other":
            return fallback.split_words(text)
        case "english" | "auto":
            return text
        case unknown:
            assert_never(unknown)


def split_all(texts: Iterable[str], language: Language = "auto") -> list[str]:
    """Return `split_words` of each text."""
    return [split_words(text, language) for text in texts]


def split_characters(text: str) -> str:
    """Return every run of one to three characters of a text, folded, with spaces between: a view without words."""
    folded = chinese.fold(text)
    runs = _WORDLIKE.findall(folded)
    return " ".join(run[at : at + size] for run in runs for size in (1, 2, 3) for at in range(len(run) - size + 1))


def count_unspaced(texts: Iterable[str], language: Language = "auto") -> int:
    """Count the texts whose words have to be found, since no spaces part them."""
    if language != "auto":
        return 0 if language == "english" else sum(1 for _ in texts)
    return sum(not is_spaced(text) for text in texts)


def find_budget(query: str) -> Budget | None:
    """Find what all of a query may cost, in English ("under $200") or Chinese ("预算三百元以内"); None for nothing."""
    return english.find_budget(query) or chinese.find_budget(query)


def find_next(query: str, start: int, end: int) -> list[re.Match[str]]:
    """Find what parts two things in a stretch of a query: "with", a comma, 配, 和 ..."""
    return list(_NEXT.finditer(query, start, end))


def join_words(words: Iterable[str]) -> str:
    """Join words as a text writes them: with spaces, but none between two Han characters."""
    joined = ""
    for word in words:
        gap = "" if not joined or (HAN.match(joined[-1]) or HAN.match(word[0])) else " "
        joined += gap + word
    return joined


def is_same_noun(name: str, other: str) -> bool:
    """Say whether two names end in the same noun: "ankle boots" and "a boot", 高跟鞋 and 鞋, 跑鞋 and 跑步鞋."""
    if has_han(name) and has_han(other):
        return chinese.is_same_noun(name, other)
    return english.is_same_noun(name, other)
