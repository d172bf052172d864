"""Text augmentation: synonyms, attribute words, word dropout and brand masking, from a lexicon."""

from __future__ import annotations

from peft_combo.data.augmentation.lexicon import Lexicon, read_lexicon
from peft_combo.data.augmentation.variants import make_variants

__all__ = [
    "Lexicon",
    "make_variants",
    "read_lexicon",
]
