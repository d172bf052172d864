"""Items, interactions and bundles: read from where they lie, checked, described and divided without leaks."""

from peft_combo.data.assemble import Needs
from peft_combo.data.demo import demo_dataset
from peft_combo.data.fetch import get
from peft_combo.data.folder import write_items
from peft_combo.data.joining import joined
from peft_combo.data.model import CATEGORY_SEPARATOR, Bundles, Catalog, Dataset, Interactions
from peft_combo.data.sources import Source, available, check_source, detect_layout, open_dataset
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
    "check_source",
    "demo_dataset",
    "describe",
    "detect_layout",
    "get",
    "joined",
    "open_dataset",
    "split",
    "split_as",
    "write_items",
]
