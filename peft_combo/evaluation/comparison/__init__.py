"""Comparison of methods, values or recipes: each run in a process of its own, paired tests, the best as a recipe."""

from __future__ import annotations

from peft_combo.evaluation.comparison.runs import Stopped, compare
from peft_combo.evaluation.comparison.table import Comparison, Failed, Line, chart
from peft_combo.evaluation.comparison.variants import Over, Variant, over_of, variants_of

__all__ = [
    "Comparison",
    "Failed",
    "Line",
    "Over",
    "Stopped",
    "Variant",
    "chart",
    "compare",
    "over_of",
    "variants_of",
]
