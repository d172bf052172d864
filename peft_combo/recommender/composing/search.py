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
_STARTS = 6  # items that meet a requirement of the context a search goes on from
_SPARE = 64  # bundles that look collects at most


def search_bundles(slotted: SlottedCatalog, space: SearchSpace, objective: Objective) -> list[tuple[int, ...]]:
    """Return added rows of bundles that keep every constraint and hard rule; all of them where they are few.

    Rules of pairs are kept as items are added. What a rule requires of the context is added first. Of the bundles found
    then, those in which an added item lacks what it requires are left out, and where there were such, it is searched
    once more without the items that ask for what the context lacks.
    """
    rules = objective.rules
    if not rules.requiring:
        return _search(slotted, space, objective)
    found: dict[tuple[int, ...], None] = {}
    for own in _meet_requirements(space, objective, _STARTS):
        added = own.context[len(space.context) :]
        if added and own.low <= 0 and not own.required:
            found[added] = None
        if own.high < 1 or not own.feasible:
            continue
        more = _search(slotted, own, objective)
        whole = [one for one in more if not any(r.list_unmet((*own.context, *one)) for r in rules.requiring)]
        if len(whole) < len(more):
            asking = np.zeros(rules.n_items, bool)
            for rule in rules.requiring:
                met = np.logical_or.reduce([np.zeros(rules.n_items, bool), *map(rule.find_askers, own.context)])
                asking |= rule.when & ~met
            quiet = own.bar(asking)
            whole += _search(slotted, quiet, objective) if quiet.feasible else []
        found |= dict.fromkeys(tuple(sorted((*added, *one))) for one in whole)
    return list(found)


def _meet_requirements(space: SearchSpace, objective: Objective, starts: int) -> list[SearchSpace]:
    """Return spaces whose context lacks nothing that a rule requires: this one, or with the best items that are."""
    context = space.context
    unmet = ((rule, row) for rule in objective.rules.requiring for row in rule.list_unmet(context))
    first = next(unmet, None)
    if first is None:
        return [space]
    free = np.array([space.free[slot] > 0 for slot in range(len(space.held))])
    rows = np.flatnonzero(first[0].find_partners(first[1]) & space.allowed)
    rows = rows[free[objective.slot_of[rows]]]
    if space.left is not None:
        rows = rows[space.cents[rows] <= space.left]
    rows = rows[~objective.find_duplicates(rows, context)]
    if space.high < 1 or not len(rows):
        return []
    gains = objective.weigh_relevance(rows) + objective.weigh_beside([context], rows)[0]
    best = rows[objective.select_best(rows, gains, starts)].tolist()
    grown = [space.add(row, int(objective.slot_of[row])) for row in best]
    return [own for one in grown for own in _meet_requirements(one, objective, max(1, starts // 3))]


def _search(slotted: SlottedCatalog, space: SearchSpace, objective: Objective) -> list[tuple[int, ...]]:
    """Return added rows of bundles that keep every constraint and every hard rule of pairs."""
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
