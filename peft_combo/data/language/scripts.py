"""Scripts: which characters are Han, which belong to other scripts that write words without spaces."""

from __future__ import annotations

import re
from typing import Literal

HAN_RANGES = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
HAN = re.compile(f"[{HAN_RANGES}]")
# Kana, Hangul, Thai, Lao, Myanmar, Khmer, Tibetan. Korean has spaces, but its particles stand at the nouns.
UNSPACED_RANGES = (
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f\u1100-\u11ff\uac00-\ud7af"
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u0f00-\u0fff"
)
_UNSPACED = re.compile(f"[{UNSPACED_RANGES}]")

Script = Literal["han", "unspaced", "spaced"]


def has_han(text: str) -> bool:
    """Say whether a text has a Han character."""
    return not text.isascii() and HAN.search(text) is not None


def is_spaced(text: str) -> bool:
    """Say whether spaces part the words of a text."""
    return detect_script(text) == "spaced"


def detect_script(text: str) -> Script:
    """Tell the script that decides how a text's words are found: kana beside Han is Japanese, and so not `han`."""
    if text.isascii():
        return "spaced"
    if _UNSPACED.search(text):
        return "unspaced"
    return "han" if HAN.search(text) else "spaced"
