"""Arithmetic on stored adapters: compared, merged, converted to plain LoRA, tried as a start for a new category.

Owns what may be computed from finished adapters without training. One module for each operation; each returns a frozen
value, and what it stores is an adapter like any other, whose manifest says what it was made of (``data.derived``).
Knows nothing of the training loop.
"""

from __future__ import annotations

from peft_combo.adapters.convert import MAX_ERROR, Conversion, ConvertError, convert, is_plain_lora
from peft_combo.adapters.deltas import Changes, MergeMethod, changes_of, combined
from peft_combo.adapters.diff import Change, Difference, Predictions, diff
from peft_combo.adapters.merge import Merge, MergeError, merge
from peft_combo.adapters.transfer import Start, Transfer, alignment, transfer
from peft_combo.adapters.validation import Exam

__all__ = [
    "MAX_ERROR",
    "Change",
    "Changes",
    "Conversion",
    "ConvertError",
    "Difference",
    "Exam",
    "Merge",
    "MergeError",
    "MergeMethod",
    "Predictions",
    "Start",
    "Transfer",
    "alignment",
    "changes_of",
    "combined",
    "convert",
    "diff",
    "is_plain_lora",
    "merge",
    "transfer",
]
