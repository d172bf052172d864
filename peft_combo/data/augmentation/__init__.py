"""Text augmentation: synonyms, attribute words, word dropout and brand masking, from a lexicon."""

from __future__ import annotations

from peft_combo.data.augmentation.lexicon import Lexicon, read_lexicon
from peft_combo.data.augmentation.variants import variants

__all__ = [
    "Lexicon",
    "read_lexicon",
    "variants",
]
