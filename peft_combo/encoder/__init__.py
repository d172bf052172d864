"""Encoder: a frozen BERT-like backbone with hot-swapped PEFT adapters and task heads; texts in, vectors out.

Owns loading, quantization, the adapter bank, the vector cache and the nearest-neighbour index.
Knows nothing of training.
"""

from __future__ import annotations

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
