"""Bundles around query items: one item for each thing that was named, then the rest of the bundle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from peft_combo.errors import DataError
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.composing.diversity import limit_repeats
from peft_combo.recommender.composing.feasibility import explain_infeasible
from peft_combo.recommender.composing.objective import Objective
from peft_combo.recommender.composing.options import OneOf
from peft_combo.recommender.composing.search import search_bundles
from peft_combo.recommender.composing.search_space import SearchSpace, SlottedCatalog, build_search_space

_SETS_KEPT = 6  # sets of named items that are completed, at least


def search_around(
    slotted: SlottedCatalog,
    context: tuple[int, ...],
    one_of: Sequence[OneOf],
    constraints: Constraints,
    objective: Objective,
) -> list[tuple[int, ...]]:
    """Find bundles that hold one item for each query item, and besides none that would answer one."""
    options = objective.options
    if options.mode == "substitute":
        raise DataError("Substitutes replace what is there; they cannot answer a query. Ask for complements.")
    least = len(context) + len(one_of)
    if constraints.size is not None and constraints.size[1] < least:
        names = ", ".join(one.name for one in one_of)
        raise DataError(
            f"A bundle of at most {constraints.size[1]} items was asked for, and {names} beside the context make "
            f"{least}. Ask for a size of at least {least}, or for less."
        )
    space = build_search_space(slotted, context, replace(constraints, size=None), options)
    sets = _choose_sets(slotted, space, one_of, objective)
    answers = np.concatenate([one.rows for one in one_of]).tolist()
    rest = replace(constraints, exclude_items=(*constraints.exclude_items, *answers))
    low, high = constraints.size or slotted.templates.find_typical_sizes()
    found: list[tuple[int, ...]] = []
    bare: list[tuple[int, ...]] = []
    for added in sets:
        whole = (*context, *added)
        if slotted.templates.required <= set(slotted.slot_of[list(whole)].tolist()):
            (found if low <= least <= high else bare).append(added)
        if constraints.size is None or constraints.size[1] > least:
            space = build_search_space(slotted, whole, rest, options)
            if space.feasible:
                found += [(*added, *more) for more in search_bundles(slotted, space, objective)]
    found = [one for one in found if not _lacks(objective, (*context, *one))]
    if not found and constraints.size is None:
        # Nothing can be added to them, and they are all that was asked for.
        found = [one for one in bare if not _lacks(objective, (*context, *one))]
    if not found:
        raise explain_infeasible(slotted, (*context, *sets[0]), rest, options)
    return found


def _lacks(objective: Objective, rows: Sequence[int]) -> bool:
    """Say whether a bundle lacks what a hard rule requires."""
    return any(rule.list_unmet(rows) for rule in objective.rules.requiring)


def _choose_sets(
    slotted: SlottedCatalog, space: SearchSpace, one_of: Sequence[OneOf], objective: Objective
) -> list[tuple[int, ...]]:
    """Return the best sets of one allowed item for each query item, no two of them alike, within the budget."""
    options, cents = objective.options, slotted.index.cents
    candidates = [one.rows[space.allowed[one.rows]] for one in one_of]
    for one, rows in zip(one_of, candidates, strict=True):
        if not len(rows):
            raise DataError(
                f"None of the {len(one.rows):,} items that answer {one.name!r} is allowed. Loosen the constraints, "
                "or do not ask for it."
            )
    lowest = [int(cents[rows].min()) for rows in candidates]
    if space.left is not None and sum(lowest) > space.left:
        terms = " + ".join(f"{one.name} {price / 100:.2f}" for one, price in zip(one_of, lowest, strict=True))
        raise DataError(
            f"The budget leaves {space.left / 100:.2f}, and the cheapest of what was asked for cost "
            f"{sum(lowest) / 100:.2f} ({terms}). Raise it to at least {sum(lowest) / 100:.2f} beside the context."
        )
    sets: list[tuple[int, ...]] = [()]
    for place, rows in enumerate(candidates):
        cheap = rows[np.argsort(cents[rows], kind="stable")[: options.per_slot if space.left is not None else 0]]
        tried = np.array(list(dict.fromkeys([*rows[: options.per_slot].tolist(), *cheap.tolist()])), np.int64)
        left = math.inf if space.left is None else space.left - sum(lowest[place + 1 :])
        grown = [
            (*held, int(row))
            for held in sets
            for row, alike in zip(tried, objective.find_duplicates(tried, (*space.context, *held)), strict=True)
            if row not in held and not alike and (space.left is None or int(cents[[*held, row]].sum()) <= left)
        ]
        likes = {held: float(objective.score_relevance(np.array(held, np.int64)).sum()) for held in grown}
        grown.sort(key=lambda held: (-likes[held], objective.make_tie_key(held)))
        sets = limit_repeats(grown, 4 * options.beam)
    if not sets:
        raise DataError(
            f"No two items that answer {' and '.join(one.name for one in one_of)} go together: they are the same, "
            "alike, or cost too much. Raise near_duplicate or the budget."
        )
    judged = sorted(
        objective.score_bundles(space.context, sets), key=lambda one: (-one.score, objective.make_tie_key(one.added))
    )
    return limit_repeats([one.added for one in judged], max(options.k, _SETS_KEPT))
