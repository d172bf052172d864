"""Encoder: a frozen BERT-like backbone with hot-swapped PEFT adapters and task heads; texts in, vectors out.

Owns loading, quantization, the adapter bank, the vector cache and the nearest-neighbour index.
Knows nothing of training.
"""

# ruff: noqa: E402  (the libraries are imported before whoever imports them)

from __future__ import annotations

from peft_combo.encoder.libraries import import_libraries

import_libraries()

from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank, LiveAdapter
from peft_combo.encoder.heads import load_head
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.encoder.vectors import VectorCache, embed

__all__ = [
    "AdapterBank",
    "AttachedAdapter",
    "Backbone",
    "LiveAdapter",
    "VectorCache",
    "embed",
    "load_head",
]
