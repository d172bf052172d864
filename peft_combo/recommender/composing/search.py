"""Search for bundles: exhaustive where there are few sets of items, else by a beam over shortlists."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from peft_combo.recommender.composing.beam import search_beam
from peft_combo.recommender.composing.objective import Objective
from peft_combo.recommender.composing.plans import plan_promising, plan_slots
from peft_combo.recommender.composing.search_space import SearchSpace, SlottedCatalog
from peft_combo.recommender.composing.shortlists import compute_gains, make_shortlists

_PLAUSIBLE = 6.0  # templates e^6 times less probable than the best are filled only where the others yield nothing
_TRIES = 50_000  # steps of the last, exhaustive look for a bundle before we say there is none
_SPARE = 64  # bundles that look collects at most


def search_bundles(slotted: SlottedCatalog, space: SearchSpace, objective: Objective) -> list[tuple[int, ...]]:
    """Return added rows of bundles that keep every constraint; all of them where they are few."""
    if space.combinations <= objective.options.exact_limit:
        return list(_enumerate_bundles(space, objective))
    plans = plan_slots(slotted, space, objective.options)
    likely = [plan for plan in plans if plan[1] >= plans[0][1] - _PLAUSIBLE]
    first = None
    if objective.options.mode == "complement" and objective.has_scores([space.context]):
        first = compute_gains(space, objective, [space.context], sorted(space.free))
        space, first = make_shortlists(space, objective, first)
        likely = list(dict([*likely, *plan_promising(slotted, space, objective, first)]).items())
    found = search_beam(space, objective, likely, first)
    if not found and len(plans) > len(likely):
        found = search_beam(space, objective, plans, first)
    return found or list(itertools.islice(_enumerate_bundles(space, objective, _TRIES), _SPARE))


def _enumerate_bundles(space: SearchSpace, objective: Objective, tries: int | None = None) -> Iterator[tuple[int, ...]]:
    """Every set of rows that keeps all constraints, cheapest items first; gives up after so many tries."""
    pool = np.concatenate([np.empty(0, np.int64), *(space.candidates[slot] for slot in space.free)])
    pool = pool[np.lexsort((objective.order[pool], space.cents[pool]))]
    prices = space.cents[pool] if space.left is not None else np.zeros(len(pool), np.int64)
    budget = math.inf if space.left is None else space.left
    slots = objective.slot_of[pool].tolist()
    steps = itertools.count()

    def deeper(start: int, added: tuple[int, ...], used: Counter[int], spent: int) -> Iterator[tuple[int, ...]]:
        missing = len(space.required - set(used))
        if len(added) >= max(1, space.low) and not missing:
            yield added
        if len(added) == space.high:
            return
        to_come = max(1, space.low - len(added), missing)
        for place in range(start, len(pool)):
            if tries is not None and next(steps) >= tries:
                return
            if spent + to_come * int(prices[place]) > budget:
                return
            slot, row = slots[place], int(pool[place])
            needed = slot in space.required and slot not in used
            if used[slot] >= space.free[slot] or (missing - needed > space.high - len(added) - 1):
                continue
            if objective.find_duplicates(pool[place : place + 1], (*space.context, *added))[0]:
                continue
            yield from deeper(place + 1, (*added, row), used + Counter([slot]), spent + int(prices[place]))

    return deeper(0, (), Counter(), 0)
