"""Shortlists: what each candidate of a slot would add to a bundle, and the few of them a search goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from peft_combo.recommender.composing.objective import Objective
from peft_combo.recommender.composing.search_space import SearchSpace


def compute_gains(
    space: SearchSpace, objective: Objective, sets: Sequence[tuple[int, ...]], slots: Sequence[int]
) -> dict[int, NDArray[np.float64]]:
    """Per slot what each candidate would add beside each set: (S, candidates)."""
    candidates = [space.candidates[slot] for slot in slots]
    rows = np.concatenate([np.empty(0, np.int64), *candidates])
    gains = objective.weigh_relevance(rows) + objective.weigh_beside(sets, rows)
    ends = np.cumsum([len(shelf) for shelf in candidates])[:-1]
    return dict(zip(slots, np.split(gains, ends, axis=1), strict=True))


def make_shortlists(
    space: SearchSpace, objective: Objective, gains: dict[int, NDArray[np.float64]]
) -> tuple[SearchSpace, dict[int, NDArray[np.float64]]]:
    """Keep of each slot the candidates that add most beside any of the sets, and what they add."""
    candidates, limit = list(space.candidates), objective.options.shortlist
    for slot, values in gains.items():
        rows = space.candidates[slot]
        if len(rows) <= limit:
            continue
        best, kept = values.max(axis=0), np.zeros(len(rows), bool)
        kept[objective.select_best(rows, best, limit)] = True
        # What a bundle can spend on the slot is not known yet, so the best of the cheaper half, quarter ... come too;
        # of the last part all.
        stop = len(rows) // 2 if space.left is not None else 0
        while stop:
            share = max(limit // 8, 1)
            kept[objective.select_best(rows[:stop], best[:stop], share)] = True
            stop = 0 if stop <= share else stop // 2
        candidates[slot] = rows[kept]
        gains[slot] = values[:, kept]
    return replace(space, candidates=candidates), gains
