"""Openings: whole bundles to be composed from one of their items, and what of them was met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.queries import Queries
from peft_combo.errors import DataError
from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.composing.options import Compatibility, Options


@dataclass(frozen=True, eq=False)
class Openings:
    """Bundles to compose.

    Attributes:
        given: (B,) the item of each bundle that is told. wanted: the others, ascending. groups: (B,) their groups.
    """

    given: NDArray[np.int64]
    wanted: tuple[NDArray[np.int64], ...]
    groups: NDArray[np.str_]

    @classmethod
    def of(cls, queries: Queries, seed: int) -> Openings:
        """Put together the bundles that queries are of, and draw what is told of each."""
        rng = np.random.default_rng(seed)
        given, wanted = [], []
        _, first = np.unique(queries.bundles, return_index=True)
        for place in first:
            context = queries.contexts[place]
            rows = np.sort(np.append(context[context >= 0], queries.targets[place]))
            given.append(int(rng.choice(rows)))
            wanted.append(rows[rows != given[-1]])
        return cls(np.array(given, np.int64), tuple(wanted), queries.groups[first])

    def __len__(self) -> int:
        return len(self.given)

    @property
    def queries(self) -> Queries:
        """What completes the given item alone; the answers are not told."""
        none = np.zeros(len(self), np.int64)
        return Queries(self.given[:, None], none, self.groups, none)

    def take(self, rows: NDArray[np.int64]) -> Openings:
        """Return some of the bundles."""
        return Openings(self.given[rows], tuple(self.wanted[row] for row in rows.tolist()), self.groups[rows])


def compose_openings(
    openings: Openings,
    composer: Composer,
    scores: NDArray[np.float32],
    compatibility: Compatibility | None,
    options: Options,
) -> list[tuple[int, ...]]:
    """Compose each bundle from its given item, of the size it has: the rows added, () where there is no room for one.

    Args:
        scores: (B, N) the relevance of all items beside each given one.
    """
    found: list[tuple[int, ...]] = []
    for given, wanted, relevance in zip(openings.given.tolist(), openings.wanted, scores, strict=True):
        size = 1 + len(wanted)
        try:
            best = composer.compose(
                [given], relevance=relevance, compatibility=compatibility, constraints=Constraints(size=(size, size)),
                options=options,
            )  # fmt: skip
            found.append(best[0].added)
        except DataError:  # the catalogue or its slots have no room for such a bundle, so nothing is right
            found.append(())
    return found


def measure_recall(composed: Sequence[tuple[int, ...]], openings: Openings) -> NDArray[np.float64]:
    """Return the share of the wanted items of each bundle that were met, (B,)."""
    pairs = zip(composed, openings.wanted, strict=True)
    return np.array([len({*added} & {*wanted.tolist()}) / len(wanted) for added, wanted in pairs])
