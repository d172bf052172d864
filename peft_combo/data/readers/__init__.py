"""Readers of CSV, Parquet and JSON Lines folders, of public data sets and of the demo catalogue."""

from __future__ import annotations

from peft_combo.data.readers.demo import demo_dataset
from peft_combo.data.readers.download import get
from peft_combo.data.readers.folder import write_items

__all__ = [
    "demo_dataset",
    "get",
    "write_items",
]
