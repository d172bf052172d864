"""Search space of a composition: the items allowed in each slot, room, sizes and the money that is left.

Owns how a catalogue lies in slots, and how constraints and rules of slots become masks and numbers. Knows nothing of
scores or of how bundles are searched for.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.knowledge.rule_set import RuleSet
from peft_combo.data.model import Catalog
from peft_combo.errors import DataError
from peft_combo.recommender.composing.constraints import CatalogIndex, Constraints
from peft_combo.recommender.composing.options import Options, Rows
from peft_combo.recommender.composing.slots import SlotTemplates


@dataclass(frozen=True, eq=False)
class SlottedCatalog:
    """A catalogue under slot templates.

    Attributes:
        slot_of: (N,) the slot of each item.
        rows_of: per slot its rows, cheapest first, so that whatever a budget still allows is a head of the list.
        rules: of bundles of the catalogue.
    """

    index: CatalogIndex
    templates: SlotTemplates
    slot_of: NDArray[np.int32]
    rows_of: tuple[Rows, ...]
    rules: RuleSet

    @classmethod
    def of(
        cls, catalog: Catalog, templates: SlotTemplates, hidden: NDArray[np.bool_] | None = None,
        rules: RuleSet | None = None,
    ) -> SlottedCatalog:  # fmt: skip
        """Lay out a catalogue; `hidden` (N,) items may never be added."""
        index, slot_of = CatalogIndex(catalog, hidden), templates.assign_slots(catalog)
        by_slot_and_price = np.lexsort((index.cents, slot_of))
        ends = np.searchsorted(slot_of[by_slot_and_price], np.arange(len(templates.names) + 1))
        rows_of = tuple(by_slot_and_price[start:stop] for start, stop in itertools.pairwise(ends.tolist()))
        return cls(index, templates, slot_of, rows_of, RuleSet((), len(catalog)) if rules is None else rules)

    def with_templates(self, templates: SlotTemplates) -> SlottedCatalog:
        """Return the same under other templates of the same slots.

        Raises:
            ValueError: the templates have other slots.
        """
        if (templates.names, templates.paths) != (self.templates.names, self.templates.paths):
            raise ValueError(f"templates must have the slots {self.templates.names}, found {templates.names}.")
        return replace(self, templates=templates)

    def name_slot(self, row: int) -> str:
        """Return the name of the slot an item is in."""
        return self.templates.names[int(self.slot_of[row])]

    def list_checks(self, context: tuple[int, ...], constraints: Constraints) -> dict[str, NDArray[np.bool_]]:
        """Per constraint and per hard rule that the context touches: (N,) True where it allows an item."""
        return self.index.check(constraints) | self.rules.check_beside(context)

    @cached_property
    def slot_places(self) -> NDArray[np.int64]:
        """(S,) the place of each slot in the order that training bundles usually list them."""
        return np.argsort(np.array(self.templates.order_slots(range(len(self.templates.names))), np.int64))


@dataclass(frozen=True)
class SearchSpace:
    """What may be added to a context, in masks and numbers.

    Attributes:
        allowed: (N,) True where an item may be added as far as it alone is concerned.
        held: (S,) items of the context per slot.
        candidates: per slot the rows that may be added, cheapest first.
        room: (S,) most items of a slot, context included; never more than there are.
        required: slots that must still be added.
        low, high: fewest and most items to add.
        left: cents that may be spent on them; None without a budget.
    """

    context: tuple[int, ...]
    allowed: NDArray[np.bool_]
    held: NDArray[np.int64]
    candidates: list[Rows]
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

    def add(self, row: int, slot: int) -> SearchSpace:
        """Return the space that is left when an item of a slot is taken into the context."""
        held = self.held.copy()
        held[slot] += 1
        taken = np.zeros(len(self.allowed), bool)
        taken[row] = True
        left = None if self.left is None else self.left - int(self.cents[row])
        own = replace(
            self, context=(*self.context, row), held=held, required=self.required - {slot}, low=self.low - 1,
            high=self.high - 1, left=left,
        )  # fmt: skip
        return own.bar(taken)

    def bar(self, barred: NDArray[np.bool_]) -> SearchSpace:
        """Return the space without some items, (N,) True for each of them."""
        candidates = [
            rows[~barred[rows]] if self.room[slot] > self.held[slot] else rows[:0]
            for slot, rows in enumerate(self.candidates)
        ]
        room = np.minimum(self.room, self.held + [len(rows) for rows in candidates])
        return replace(self, allowed=self.allowed & ~barred, candidates=candidates, room=room)

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
        rows = [int(self.candidates[slot][0]) for slot in sorted(self.required)]
        rest = [self.candidates[slot][slot in self.required : count] for slot, count in self.free.items()]
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
        n = sum(len(self.candidates[slot]) for slot in self.free)
        return sum(math.comb(n, size) for size in range(max(1, self.low), min(self.high, n) + 1))


def build_search_space(
    slotted: SlottedCatalog,
    context: tuple[int, ...],
    constraints: Constraints,
    options: Options,
    without: frozenset[str] = frozenset(),
) -> SearchSpace:
    """Turn constraints and rules of slots into masks and numbers, leaving out the constraints named in `without`.

    Raises:
        DataError: the context itself breaks a constraint, or there is nothing to substitute.
    """
    n_slots = len(slotted.templates.names)
    held = np.bincount(slotted.slot_of[list(context)], minlength=n_slots)
    every = slotted.list_checks(context, constraints)
    checks = {name: check for name, check in every.items() if name not in without}
    allowed = np.logical_and.reduce([np.ones(len(slotted.index.catalog), bool), *checks.values()])
    allowed[list(context)] = False
    names = slotted.templates.names
    required = {slot for slot in slotted.templates.required if f'required slot "{names[slot]}"' not in without}
    forbidden = {slot for slot in slotted.templates.forbidden if f'forbidden slot "{names[slot]}"' not in without}
    if forbidden:
        allowed &= ~np.isin(slotted.slot_of, list(forbidden))
    for row in context:
        if (slot := int(slotted.slot_of[row])) in forbidden:
            raise DataError(
                f'"{slotted.index.catalog.titles[row]}" is in slot "{names[slot]}", which is forbidden. '
                "Take it out of the context, or allow the slot."
            )
    low, high = _find_sizes(slotted, len(context), constraints, options)
    if "size" in without:
        low, high = len(context) + 1, len(slotted.index.catalog)
    if options.mode == "substitute":
        if not context:
            raise DataError("There is nothing to substitute: the context is empty. Give at least one item.")
        room, required = np.where(held > 0, held + high, 0), set()
    else:
        room = np.maximum(slotted.templates.most, held)
    candidates = [
        rows[allowed[rows]] if room[slot] > held[slot] else rows[:0] for slot, rows in enumerate(slotted.rows_of)
    ]
    room = np.minimum(room, held + [len(rows) for rows in candidates])
    return SearchSpace(
        context=context,
        allowed=allowed,
        held=held,
        candidates=candidates,
        room=room,
        required=frozenset(slot for slot in required if held[slot] == 0),
        low=low - len(context),
        high=high - len(context),
        left=find_budget(slotted, context, constraints, without),
        cents=slotted.index.cents,
    )


def _find_sizes(slotted: SlottedCatalog, held: int, constraints: Constraints, options: Options) -> tuple[int, int]:
    """The fewest and most items of the whole bundle, at least one of them added."""
    if constraints.size is None:
        low, high = (held + 1, held + 1) if options.mode == "substitute" else slotted.templates.find_typical_sizes()
        return max(low, held + 1), max(high, held + 1)
    if constraints.size[1] <= held:
        raise DataError(
            f"A bundle of at most {constraints.size[1]} items was asked for, and the context has {held} already. "
            f"Ask for a size of at least {held + 1}, or give fewer items."
        )
    return max(constraints.size[0], held + 1), constraints.size[1]


def find_budget(
    slotted: SlottedCatalog, context: tuple[int, ...], constraints: Constraints, without: frozenset[str] = frozenset()
) -> int | None:
    """The cents of the budget the context leaves; None without a budget."""
    if constraints.budget is None or "budget" in without:
        return None
    spent = 0
    for row in context:
        if slotted.index.cents[row] < 0:
            raise DataError(
                f'The price of "{slotted.index.catalog.titles[row]}" in the context is not known, so a budget cannot '
                "be kept. Give its price, or drop the budget."
            )
        spent += int(slotted.index.cents[row])
    return math.floor(constraints.budget * 100 + 1e-6) - spent
