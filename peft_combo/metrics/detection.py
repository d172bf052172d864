"""Measures of detected sets beside the true ones: hits, coverage and Jaccard.

Knows sets of numbers only. A predicted set is a hit where a true one holds all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class SetMatch:
    """How the sets predicted for one session fit the true ones.

    Attributes:
        precision: share of the predicted sets that are hits; 0 where nothing is predicted.
        recall: share of the true sets that hold a predicted one.
        coverage: per hit, its size over that of the smallest true set that holds it.
        jaccard: mean over the true sets of the Jaccard of each with the predicted set most like it.
        agreement: harmonic mean of `jaccard` and of the same seen from the predicted sets.
    Source: Sun et al. 2022, "Revisiting bundle recommendation" (precision, recall, coverage; as their published code
        counts them); Yang and Leskovec 2013, "Overlapping community detection at scale" (agreement).
    """

    precision: float
    recall: float
    coverage: tuple[float, ...]
    jaccard: float
    agreement: float


def match_sets(predicted: Sequence[frozenset[int]], true: Sequence[frozenset[int]]) -> SetMatch:
    """Measure the sets predicted for one session.

    Raises:
        ValueError: there is no true set, or a set is empty.
    """
    if not true or not all(true) or not all(predicted):
        raise ValueError(f"Expected one true set or more and none empty, found {len(true)} and {len(predicted)}.")
    holders = [min((other for other in true if one <= other), key=len, default=None) for one in predicted]
    hits = [(one, other) for one, other in zip(predicted, holders, strict=True) if other is not None]
    seen = fmean(max((find_jaccard(one, other) for one in predicted), default=0.0) for other in true)
    right = fmean(max(find_jaccard(one, other) for other in true) for one in predicted) if predicted else 0.0
    return SetMatch(
        precision=len(hits) / len(predicted) if predicted else 0.0,
        recall=fmean(any(one <= other for one in predicted) for other in true),
        coverage=tuple(len(one) / len(other) for one, other in hits),
        jaccard=seen,
        agreement=2 * seen * right / (seen + right) if seen + right else 0.0,
    )


def find_jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """Return the shared part of two sets, in [0, 1]."""
    return len(a & b) / len(a | b)
