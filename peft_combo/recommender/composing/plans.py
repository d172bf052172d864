"""Slot plans: which combinations of slots a search fills, by template probability and by what their items promise."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from peft_combo.recommender.composing.objective import Objective
from peft_combo.recommender.composing.options import Options
from peft_combo.recommender.composing.search_space import SearchSpace, SlottedCatalog
from peft_combo.recommender.composing.slots import Template


def plan_slots(slotted: SlottedCatalog, space: SearchSpace, options: Options) -> list[tuple[Template, float]]:
    """The slots to add, with the log-probability of the whole template; best first."""
    context = Counter({slot: int(n) for slot, n in enumerate(space.held) if n})
    held = tuple(sorted(context.elements()))
    if options.mode == "substitute":
        sizes = range(max(1, space.low), space.high + 1)
        choices = (itertools.combinations_with_replacement(sorted(context), size) for size in sizes)
        every = itertools.islice(itertools.chain.from_iterable(choices), options.plans)
        return [(added, 0.0) for added in every if not Counter(added) - space.free]
    sizes_of_all = (len(held) + space.low, len(held) + space.high)
    plans = slotted.templates.list_plans(held, space.room, sizes_of_all, options.plans)
    cheapest = space.cheapest or []
    fallback = tuple(sorted([*held, *slotted.slot_of[cheapest].tolist()]))
    plans.append((fallback, slotted.templates.log_probability(fallback)))
    return [(tuple(sorted((Counter(whole) - context).elements())), log) for whole, log in dict(plans).items()]


def plan_promising(
    slotted: SlottedCatalog, space: SearchSpace, objective: Objective, gains: Mapping[int, NDArray[np.float64]]
) -> list[tuple[Template, float]]:
    """The slots to add as the items ask for them, with the log-probability of the whole template.

    What is rare may still be what fits best: slots are added one at a time by what the best item of each that is
    not counted yet would add beside the context, and by how probable the template is.

    Args:
        gains: per slot what each candidate adds beside the context, (1, items).
    """
    options, held = objective.options, np.flatnonzero(space.held)
    context = tuple(np.repeat(held, space.held[held]).tolist())
    # (S, high + 1): by slot what its best item adds, its second best and so on; nothing beyond what may be added.
    best = np.full((len(space.held), space.high + 1), -np.inf)
    for slot, values in gains.items():
        most = min(space.high, space.free[slot])
        own = np.sort(values[0][objective.select_best(space.candidates[slot], values[0], most)])[::-1]
        best[slot, : len(own)] = own
    grown: dict[Template, float] = {(): 0.0}  # slots added -> gain of their best items
    found: dict[Template, float] = {}
    for size in range(1, space.high + 1):
        larger: dict[Template, tuple[float, float, float]] = {}
        for slots, gain in grown.items():
            more = best[:, 0].copy()
            for slot, count in Counter(slots).items():
                more[slot] = best[slot, count]
            for slot in np.argsort(-more, kind="stable")[: options.per_slot].tolist():
                added = tuple(sorted((*slots, slot)))
                if np.isfinite(more[slot]) and added not in larger:
                    log = slotted.templates.log_probability(tuple(sorted((*context, *added))))
                    total = gain + float(more[slot])
                    larger[added] = (total / size + objective.weights.slots * log, total, log)
        kept = sorted(larger, key=lambda one: (-larger[one][0], one))[: options.beam]
        grown = {slots: larger[slots][1] for slots in kept}
        if size >= space.low:
            found |= {slots: larger[slots][2] for slots in kept if space.required <= set(slots)}
    return list(found.items())
