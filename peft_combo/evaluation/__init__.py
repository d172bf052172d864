"""Experiments: offline evaluation beside baselines, method comparison, hyperparameter search, learning-rate range.

The only room that sees tuning and the recommender together.
"""

from __future__ import annotations

from peft_combo.evaluation.comparison import compare
from peft_combo.evaluation.completion import evaluate
from peft_combo.evaluation.lr_range import lr_range
from peft_combo.evaluation.search import search
from peft_combo.evaluation.text_queries import evaluate_queries

__all__ = [
    "compare",
    "evaluate",
    "evaluate_queries",
    "lr_range",
    "search",
]
