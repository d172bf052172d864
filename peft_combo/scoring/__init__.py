"""Scorers: one call from a context to a score for every item.

Counting, neighbours, linear models, text and factors under one protocol, `Scorer`. NumPy and SciPy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.scoring.base import ItemFeatures, Scorer, State
from peft_combo.scoring.factors import ALS
from peft_combo.scoring.linear import CEASE, EASE
from peft_combo.scoring.neighbours import ItemKNN, UserKNN
from peft_combo.scoring.next_basket import TifuKNN
from peft_combo.scoring.out_of_core import CountedKNN, CountedPairs, count_items
from peft_combo.scoring.popularity import CoOccurrence, Popularity, Random
from peft_combo.scoring.text import TextCosine, Tfidf, tfidf_vectors

__all__ = [
    "ALS",
    "CEASE",
    "EASE",
    "CoOccurrence",
    "CountedKNN",
    "CountedPairs",
    "ItemFeatures",
    "ItemKNN",
    "Popularity",
    "Random",
    "Scorer",
    "State",
    "TextCosine",
    "Tfidf",
    "TifuKNN",
    "UserKNN",
    "count_items",
    "load_scorer",
    "tfidf_vectors",
]

_SCORERS = (
    Random,
    Popularity,
    CoOccurrence,
    ItemKNN,
    UserKNN,
    EASE,
    CEASE,
    TextCosine,
    ALS,
    CountedKNN,
    CountedPairs,
    TifuKNN,
)


def load_scorer(arrays: Mapping[str, NDArray[np.generic]], params: Mapping[str, Any]) -> Scorer:
    """Rebuild whichever scorer a saved state is of; the name it gives is looked up among the scorers here only.

    Raises:
        ValueError: no scorer has the name the state gives, or an array is missing.
    """
    for kind in _SCORERS:
        if params.get("scorer") == kind.__name__:
            return kind.from_state(arrays, params)
    known = ", ".join(kind.__name__ for kind in _SCORERS)
    raise ValueError(f"a saved state names its scorer, one of {known}; found {params.get('scorer')!r}.")
