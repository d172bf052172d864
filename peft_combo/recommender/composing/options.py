"""Options and weights of bundle composition, and the types its callers hand in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
class ObjectiveWeights:
    """Of the parts of the objective, see `composer`; `fit_weights` finds those that held-out bundles ask for."""

    relevance: float = 1.0
    compatibility: float = 1.0
    slots: float = 0.5
    agreement: float = 0.5
    redundancy: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise DataError(f"The weight of {name} must be a number of at least 0, found {value}.")


@dataclass(frozen=True)
class ModeWeights:
    """Weights of the objective by what a request goes by: a text, a user, several items, or one item."""

    query: ObjectiveWeights = ObjectiveWeights()
    user: ObjectiveWeights = ObjectiveWeights()
    basket: ObjectiveWeights = ObjectiveWeights()
    item: ObjectiveWeights = ObjectiveWeights()

    def select(self, n_items: int, *, query: bool) -> ObjectiveWeights:
        """Return those of a request that gives so many items, and a text or not; given items come first."""
        if n_items:
            return self.item if n_items == 1 else self.basket
        return self.query if query else self.user


@dataclass(frozen=True)
class Options:
    """How to search, and what counts as good.

    Attributes:
        k: bundles to return; fewer come back where there are not so many.
        mode: "complement" adds what the template lacks; "substitute" adds items of the slots the context has.
        weights: of the objective; None takes the composer's own.
        diversity: 0 takes the k best; towards 1 the list avoids bundles like those before (maximal marginal relevance,
            Carbonell and Goldstein 1998: (1 - diversity) * score scaled to 0..1 - diversity * greatest likeness), and
            two bundles share at most 1 - diversity of their added items, where there are others.
        near_duplicate: an added item may not have a higher cosine than this with another item of the bundle, nor the
            same title; None switches both off. "learned" is 0.95, or what bundles of training ask for that hold such.
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
    weights: ObjectiveWeights | None = None
    diversity: float = 0.5
    near_duplicate: float | Literal["learned"] | None = "learned"
    seed: int = 0
    beam: int = 16
    per_slot: int = 12
    shortlist: int = 128
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
        if isinstance(self.near_duplicate, int | float) and not -1 <= self.near_duplicate <= 1:
            raise DataError(f"near_duplicate is a cosine and must lie in -1..1, found {self.near_duplicate}.")


@dataclass(frozen=True, eq=False)
class OneOf:
    """A part every bundle must have: one of some items.

    Attributes:
        name: what it is called in messages.
        rows: the items that answer, distinct, the one that answers best first.
    """

    name: str
    rows: Rows


def check_scores(values: ArrayLike, shape: tuple[int, ...], name: str) -> NDArray[np.floating[Any]]:
    scores: NDArray[np.floating[Any]] = np.asarray(values)
    if scores.shape != shape or not np.issubdtype(scores.dtype, np.floating):
        raise ValueError(f"{name} must be {shape} floating point scores, found {scores.shape} {scores.dtype}.")
    return scores


def is_among(values: Rows, few: Rows) -> NDArray[np.bool_]:
    """`np.isin` for a handful of numbers, where its sorting is most of the time."""
    among: NDArray[np.bool_] = (values[:, None] == few).any(axis=1)
    return among
