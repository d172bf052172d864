"""Experiments: offline evaluation beside baselines, method comparison, hyperparameter search, learning-rate range.

The only room that sees tuning and the recommender together.
"""

from __future__ import annotations

from peft_combo.evaluation.comparison import compare
from peft_combo.evaluation.completion import evaluate
from peft_combo.evaluation.lr_range import lr_range
from peft_combo.evaluation.search import search

__all__ = [
    "compare",
    "evaluate",
    "lr_range",
    "search",
]
