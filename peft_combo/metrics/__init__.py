"""Evaluation metrics: NDCG, recall and MRR with ties, F1, AUC, calibration, bootstrap intervals, paired tests, charts.

Knows numbers only: nothing of items, scorers or adapters.
"""

from __future__ import annotations

from peft_combo.metrics.ranking import HEADLINE, Excluded, midranks, per_query, ranking_metrics
from peft_combo.metrics.report import Gain, ResultRow, ResultTable
from peft_combo.metrics.significance import bootstrap_interval, holm, paired_permutation, standard_error

__all__ = [
    "HEADLINE",
    "Excluded",
    "Gain",
    "ResultRow",
    "ResultTable",
    "bootstrap_interval",
    "holm",
    "midranks",
    "paired_permutation",
    "per_query",
    "ranking_metrics",
    "standard_error",
]
