"""Operations on finished adapters: diff, merge, conversion to LoRA, transfer, import from PEFT, export to ONNX.

Owns what may be computed from finished adapters without training. One module for each operation; each returns a frozen
value, and what it stores is an adapter like any other, whose manifest says what it was made of (``data.derived``).
Knows nothing of the training loop.
"""

from __future__ import annotations

from peft_combo.adapters.convert import MAX_ERROR, Conversion, ConvertError, convert, is_plain_lora
from peft_combo.adapters.deltas import Changes, MergeMethod, combine_changes, read_changes
from peft_combo.adapters.diff import Change, Difference, Predictions, diff
from peft_combo.adapters.merge import Merge, MergeError, merge
from peft_combo.adapters.transfer import Start, Transfer, measure_alignment, transfer
from peft_combo.adapters.validation import ValidationQueries

__all__ = [
    "MAX_ERROR",
    "Change",
    "Changes",
    "Conversion",
    "ConvertError",
    "Difference",
    "Merge",
    "MergeError",
    "MergeMethod",
    "Predictions",
    "Start",
    "Transfer",
    "ValidationQueries",
    "combine_changes",
    "convert",
    "diff",
    "is_plain_lora",
    "measure_alignment",
    "merge",
    "read_changes",
    "transfer",
]
