"""Options and weights of bundle composition, and the types its callers hand in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peft_combo.errors import DataError

Rows: TypeAlias = "NDArray[np.int64]"
Compatibility: TypeAlias = Callable[[Sequence[Rows], Rows], "NDArray[np.floating[Any]]"]
"""Scores of items beside sets: S sets, each of ascending distinct rows (m,) with m >= 1, and candidate rows (C,), any
order, may repeat -> (S, C), NaN where it cannot say. The score of a row depends on the set and the row only."""
Mode = Literal["complement", "substitute"]


@dataclass(frozen=True)
class Weights:
    """Of the parts of the objective; see the module. `weighing.fit_weights` finds those that bundles ask for."""

    relevance: float = 1.0
    compatibility: float = 1.0
    slots: float = 0.5
    redundancy: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise DataError(f"The weight of {name} must be a number of at least 0, found {value}.")


@dataclass(frozen=True)
class Options:
    """How to search, and what counts as good.

    Attributes:
        k: bundles to return; fewer come back where there are not so many.
        mode: "complement" adds what the template lacks; "substitute" adds items of the slots the context has.
        weights: of the objective; None takes the composer's own.
        diversity: 0 takes the k best; towards 1 the list avoids bundles like those before (maximal marginal relevance,
            Carbonell and Goldstein 1998: (1 - diversity) * score scaled to 0..1 - diversity * greatest likeness).
        near_duplicate: an added item may not have a higher cosine than this with another item of the bundle, nor the
            same title; None switches both off.
        seed: breaks ties; nothing else is random.
        beam: partial bundles kept per step.
        per_slot: items tried per slot and partial bundle.
        shortlist: items per slot the beam looks at, chosen by relevance and by compatibility with the context (with the
            first items taken, where there is neither); under a budget as many again from the cheaper ones. A slot of no
            more items is looked at whole.
        plans: templates tried.
        exact_limit: every possible bundle is looked at where there are at most so many sets of allowed items.
    """

    k: int = 5
    mode: Mode = "complement"
    weights: Weights | None = None
    diversity: float = 0.3
    near_duplicate: float | None = 0.95
    seed: int = 0
    beam: int = 16
    per_slot: int = 12
    shortlist: int = 256
    plans: int = 32
    exact_limit: int = 2_000

    def __post_init__(self) -> None:
        for name in ("k", "beam", "per_slot", "shortlist", "plans"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, found {getattr(self, name)}.")
        if not 0 <= self.diversity <= 1:
            raise DataError(f"diversity must lie in 0..1, found {self.diversity}.")
        if self.mode not in ("complement", "substitute"):
            raise DataError(f'mode must be "complement" or "substitute", found {self.mode!r}.')
        if self.near_duplicate is not None and not -1 <= self.near_duplicate <= 1:
            raise DataError(f"near_duplicate is a cosine and must lie in -1..1, found {self.near_duplicate}.")


@dataclass(frozen=True, eq=False)
class Wished:
    """A part every bundle must have: one of some items.

    Attributes:
        name: what it is called in messages.
        rows: the items that answer, distinct, the one that answers best first.
    """

    name: str
    rows: Rows


@dataclass(frozen=True)
class _Request:
    """What is asked, in masks and numbers.

    Attributes:
        allowed: (N,) True where an item may be added as far as it alone is concerned.
        held: (S,) items of the context per slot.
        shelves: per slot the rows that may be added, cheapest first.
        room: (S,) most items of a slot, context included; never more than there are.
        required: slots that must still be added.
        low, high: fewest and most items to add.
        left: cents that may be spent on them; None without a budget.
    """

    context: tuple[int, ...]
    allowed: NDArray[np.bool_]
    held: NDArray[np.int64]
    shelves: list[Rows]
    room: NDArray[np.int64]
    required: frozenset[int]
    low: int
    high: int
    left: int | None
    cents: NDArray[np.int64]

    @cached_property
    def free(self) -> Counter[int]:
        """Per slot how many items may be added."""
        return Counter({slot: int(n) for slot, n in enumerate(self.room - self.held) if n > 0})

    @property
    def fillable(self) -> bool:
        """Whether there are items enough of the slots asked for, whatever they cost."""
        slots = all(self.free[slot] for slot in self.required) and len(self.required) <= self.high
        return slots and sum(self.free.values()) >= max(1, self.low)

    @cached_property
    def cheapest(self) -> list[int] | None:
        """The cheapest rows that fill the fewest places with all required slots; None if there are not enough.

        Exact: with a most and a least number per slot, taking the cheapest that still may be taken is optimal.
        """
        if not self.fillable:
            return None
        rows = [int(self.shelves[slot][0]) for slot in sorted(self.required)]
        rest = [self.shelves[slot][slot in self.required : count] for slot, count in self.free.items()]
        pool = np.concatenate([np.empty(0, np.int64), *rest])
        missing = max(0, max(1, self.low) - len(rows))
        rows += [int(row) for row in pool[np.argsort(self.cents[pool], kind="stable")[:missing]]]
        return rows

    @property
    def feasible(self) -> bool:
        """Whether a bundle exists; that no two items be alike is not looked at."""
        if self.cheapest is None:
            return False
        return self.left is None or int(self.cents[self.cheapest].sum()) <= self.left

    @cached_property
    def combinations(self) -> int:
        """How many sets of allowed items there are of the sizes asked for, whatever their slots."""
        n = sum(len(self.shelves[slot]) for slot in self.free)
        return sum(math.comb(n, size) for size in range(max(1, self.low), min(self.high, n) + 1))


def _scores(values: ArrayLike, shape: tuple[int, ...], name: str) -> NDArray[np.floating[Any]]:
    scores: NDArray[np.floating[Any]] = np.asarray(values)
    if scores.shape != shape or not np.issubdtype(scores.dtype, np.floating):
        raise ValueError(f"{name} must be {shape} floating point scores, found {scores.shape} {scores.dtype}.")
    return scores


def _among(values: Rows, few: Rows) -> NDArray[np.bool_]:
    """`np.isin` for a handful of numbers, where its sorting is most of the time."""
    among: NDArray[np.bool_] = (values[:, None] == few).any(axis=1)
    return among
