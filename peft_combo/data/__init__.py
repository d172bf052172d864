"""Items, interactions and bundles: read from where they lie, checked, described and divided without leaks."""

from __future__ import annotations

from peft_combo.data.assemble import Needs
from peft_combo.data.join import join_datasets
from peft_combo.data.model import CATEGORY_SEPARATOR, Bundles, Catalog, Dataset, Interactions
from peft_combo.data.readers.demo import demo_dataset
from peft_combo.data.readers.download import get
from peft_combo.data.readers.folder import write_items
from peft_combo.data.sources import Source, available, detect_layout, from_tables, open_dataset
from peft_combo.data.splits import Split, split, split_as
from peft_combo.data.stats import describe

__all__ = [
    "CATEGORY_SEPARATOR",
    "Bundles",
    "Catalog",
    "Dataset",
    "Interactions",
    "Needs",
    "Source",
    "Split",
    "available",
    "demo_dataset",
    "describe",
    "detect_layout",
    "from_tables",
    "get",
    "join_datasets",
    "open_dataset",
    "split",
    "split_as",
    "write_items",
]
