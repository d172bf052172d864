"""Scripts without spaces and without a dictionary here: overlapping runs of two characters stand for words.

Source: Kwok 1997, "Comparing representations in Chinese information retrieval": bigrams rank about as well as words.
"""

from __future__ import annotations

import re
import unicodedata

from peft_combo.data.language.scripts import HAN_RANGES, UNSPACED_RANGES

_RUN = re.compile(f"[{HAN_RANGES}{UNSPACED_RANGES}]+")


def split_words(text: str) -> str:
    """Return a text, its width folded, with every run of such scripts as overlapping pairs of characters."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return " ".join(_RUN.sub(lambda run: f" {split_pairs(run.group())} ", folded).split())


def split_pairs(run: str) -> str:
    """Return the overlapping pairs of a run with spaces between; a run of one character is itself."""
    return " ".join(run[at : at + 2] for at in range(max(1, len(run) - 1)))
