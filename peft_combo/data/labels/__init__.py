"""Labelled texts and BIO tags: read, checked, divided, and which texts to label next."""

from __future__ import annotations

from peft_combo.data.labels.tags import Entity, TaggedTexts, read_tags
from peft_combo.data.labels.texts import LabelledTexts, read_labels, split_texts

__all__ = [
    "Entity",
    "LabelledTexts",
    "TaggedTexts",
    "read_labels",
    "read_tags",
    "split_texts",
]
