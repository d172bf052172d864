"""Agreement of attributes within bundles: for each trait, how much likelier items of one bundle agree than by chance.

Owns the log-likelihood ratios that are learned from training bundles and the scores made of them. Knows nothing of
weights, slots or how bundles are searched for.

For a trait, pi is the probability that two items of one bundle have the same value, both known, and chi the probability
that two items of different bundles do. A pair that agrees counts log(pi / chi), one that does not
log((1 - pi) / (1 - chi)), an unknown value 0. pi backs off to chi: chance counts like `_PAIRS` pairs more, so a trait
that few bundles tell of, or that they do not care about, says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.data.model import Catalog
from peft_combo.data.traits import Traits, name_audience
from peft_combo.recommender.composing.options import Rows

_PAIRS = 20.0


@dataclass(frozen=True, eq=False)
class Agreement:
    """What bundles agree on.

    Attributes:
        traits: of the N items.
        same: (T,) what a pair with equal values counts. other: (T,) what a pair with different values counts.
    """

    traits: Traits
    same: NDArray[np.float64]
    other: NDArray[np.float64]

    @classmethod
    def learn(cls, catalog: Catalog, bundles: Sequence[NDArray[np.integer[Any]]]) -> Self:
        """Count how often items of training bundles agree: per bundle its distinct rows.

        A bundle of m items has m (m - 1) / 2 pairs; each counts 1 / (m - 1), so that large bundles do not outvote all.
        """
        traits = Traits.of(catalog)
        members = [np.asarray(rows, np.int64) for rows in bundles]
        rows = np.concatenate([np.empty(0, np.int64), *members])
        of_bundle = np.repeat(np.arange(len(members)), [len(one) for one in members])
        same, other = np.zeros(len(traits.names)), np.zeros(len(traits.names))
        for place, codes in enumerate(traits.codes):
            known = codes[rows] >= 0
            cells = (of_bundle[known], codes[rows][known])
            ones, shape = np.ones(np.count_nonzero(known)), (len(members), len(traits.values[place]))
            counts = sparse.csr_array(sparse.coo_array((ones, cells), shape=shape))  # (B, V), equal cells added up
            sizes = counts.sum(axis=1)
            agreeing = counts.power(2).sum(axis=1) - sizes
            weight = np.divide(0.5, sizes - 1, out=np.zeros(len(sizes)), where=sizes > 1)
            shares = counts.sum(axis=0) / max(1.0, sizes.sum())
            chance = float(np.square(shares).sum())
            if not 0 < chance < 1:
                continue
            pairs = float((weight * sizes * (sizes - 1)).sum())
            agreed = (float((weight * agreeing).sum()) + _PAIRS * chance) / (pairs + _PAIRS)
            same[place] = np.log(agreed / chance)
            other[place] = np.log((1 - agreed) / (1 - chance))
        return cls(traits, same, other)

    def score_beside(self, sets: Sequence[Iterable[int]], rows: Rows) -> NDArray[np.float64]:
        """Mean over each set of what a pair of a row and an item of the set counts: (S, C); 0 for an empty set."""
        members = [np.array(list(one), np.int64) for one in sets]
        sizes = np.array([len(one) for one in members])
        of_set, held = np.repeat(np.arange(len(members)), sizes), np.concatenate([np.empty(0, np.int64), *members])
        found = np.zeros((len(members), len(rows)))
        for place in np.flatnonzero(self.same - self.other):
            codes = self.traits.codes[place]
            width = len(self.traits.values[place]) + 1  # the last place answers for -1, unknown
            counts = np.zeros((len(members), width))
            np.add.at(counts, (of_set, codes[held]), 1.0)
            known = counts[:, :-1].sum(axis=1, keepdims=True)
            worth = self.other[place] * known + (self.same[place] - self.other[place]) * counts
            worth[:, -1] = 0.0
            found += worth[:, codes[rows]]
        mean: NDArray[np.float64] = found / np.maximum(sizes, 1)[:, None]
        return mean

    def find_shared(self, row: int, others: Iterable[int]) -> tuple[tuple[str, str], ...]:
        """Return the traits on which an item agrees with any of some others, and agreeing counts: (name, value).

        What counts most comes first.
        """
        among = np.array(list(others), np.int64)
        order = [int(place) for place in np.argsort(-self.same, kind="stable") if self.same[place] > 0]
        shared = {
            self.traits.names[place]: self.traits.values[place][self.traits.codes[place, row]]
            for place in order
            if self.traits.codes[place, row] >= 0
            and (self.traits.codes[place, among] == self.traits.codes[place, row]).any()
        }
        return tuple(name_audience(shared).items())
