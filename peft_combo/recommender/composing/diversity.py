"""Diversity of a list of bundles: bundles that repeat each other make way for others nearly as good."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from peft_combo.recommender.composing.objective import Objective, ScoredBundle
from peft_combo.recommender.composing.options import Options


def diversify(ranked: list[ScoredBundle], options: Options, objective: Objective) -> list[ScoredBundle]:
    """Choose k of the ranked bundles by maximal marginal relevance, and without what repeats itself.

    At a diversity d no two of them share more than 1 - d of their added items, and no item is in more than 1 - d of
    them (rounded down), as long as there are other bundles to choose from.
    """
    if options.diversity == 0 or not ranked:
        return ranked[: options.k]
    scores = np.array([one.score for one in ranked])
    width = scores[0] - scores.min()
    scaled = (scores - scores.min()) / width if width > 0 else np.ones(len(scores))
    kept = 1 - options.diversity
    most = max(1, math.floor(kept * options.k))
    chosen, added = [0], [one.added for one in ranked]
    uses = Counter(ranked[0].added)
    likeness, shared = np.zeros(len(ranked)), np.zeros(len(ranked))
    while len(chosen) < min(options.k, len(ranked)):
        last = ranked[chosen[-1]].added
        likeness = np.maximum(likeness, objective.measure_overlaps(added, last))
        shared = np.maximum(shared, [_measure_shared(one.added, last) for one in ranked])
        worth = kept * scaled - options.diversity * likeness
        # What repeats comes behind everything that does not, the least repetitive first.
        worth -= np.where(shared > kept, 10 * shared, 0)
        worth -= [10 * max(0, 1 + max(uses[row] for row in one.added) - most) for one in ranked]
        worth[chosen] = -np.inf
        chosen.append(int(np.argmax(worth)))
        uses.update(ranked[chosen[-1]].added)
    return [ranked[place] for place in chosen]


def _measure_shared(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """The share of the smaller of two sets of rows that is in the other."""
    return len({*one} & {*other}) / min(len(one), len(other))


def limit_repeats(ranked: Sequence[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """Return the first `count` sets, but no item in more than half of them while there are others."""
    most = max(1, count // 2)
    met: Counter[int] = Counter()
    chosen: list[tuple[int, ...]] = []
    spare: list[tuple[int, ...]] = []
    for rows in ranked:
        if len(chosen) == count:
            break
        if all(met[row] < most for row in rows):
            chosen.append(rows)
            met.update(rows)
        else:
            spare.append(rows)
    return [*chosen, *spare[: count - len(chosen)]]
