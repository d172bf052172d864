"""Infeasible compositions explained: which constraints bind, what they rule out, and what would help."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.knowledge.clashes import find_minimal_conflict
from peft_combo.errors import DataError
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.composing.options import Options
from peft_combo.recommender.composing.search_space import SearchSpace, SlottedCatalog, build_search_space

_RULES_REMEDY = "Give other items, or change a rule in rules.yaml: with a weight it is a soft one."


def explain_infeasible(
    slotted: SlottedCatalog, context: tuple[int, ...], constraints: Constraints, options: Options
) -> DataError:
    """Find the constraints that bind by lifting them one at a time, then in pairs, and say what would help."""
    space = build_search_space(slotted, context, constraints, options)
    checks = slotted.list_checks(context, constraints)
    names = list(checks)
    names += [f'required slot "{slotted.templates.names[slot]}"' for slot in sorted(space.required)]
    names += [f'forbidden slot "{slotted.templates.names[slot]}"' for slot in sorted(slotted.templates.forbidden)]
    names += ["size"] if constraints.size is not None else []

    def helps(lifted: Iterable[str]) -> bool:
        return build_search_space(slotted, context, constraints, options, frozenset(lifted)).feasible

    binding: list[tuple[str, ...]] = [(name,) for name in names if helps([name])]
    if not binding:
        binding += [pair for pair in itertools.combinations(names, 2) if helps(pair)]
    size = _format_span(len(context) + space.low, len(context) + space.high)
    ruled_out = {name: int(np.count_nonzero(~check)) for name, check in checks.items()}

    def describe(name: str) -> str:
        n = len(slotted.index.catalog)
        return f"{name} (rules out {ruled_out[name]} of {n} items)" if name in ruled_out else name

    rules = [name for name in names if name.startswith("rule ")]
    if rules and helps(rules):
        kept = find_minimal_conflict(names, lambda some: helps(set(names) - set(some)))
        clash = " and ".join(describe(name) for name in kept)
        return DataError(
            f"No bundle of {size} items can be composed: {_explain_lack(slotted, space)}. What clashes: {clash}. "
            f"{_RULES_REMEDY}"
        )
    if ("budget",) in binding and space.cheapest is not None:
        rest = [describe(name) for (name,) in binding if name not in ("budget", "size")]
        also = f" Lifting {' or '.join(rest)} would do as well." if rest else ""
        return DataError(_explain_budget(slotted, constraints, space, size) + also)
    said = f"No bundle of {size} items can be composed: {_explain_lack(slotted, space)}."
    if not binding:
        every = ", ".join(describe(name) for name in names) or "none were given"
        return DataError(f"{said} Not even lifting two constraints would help. Constraints: {every}.")
    ways = "; or ".join(" and ".join(describe(name) for name in way) for way in binding[:5])
    return DataError(f"{said} What binds: {ways}. Lift or loosen it.")


def check_given(slotted: SlottedCatalog, given: Sequence[int]) -> None:
    """Refuse items that break a hard rule among themselves, so that no bundle can hold them.

    Raises:
        DataError: they do; the message names the rule and the items.
    """
    for one in slotted.rules.hard:
        for row in given:
            others = [other for other in given if one.find_conflicts(row)[other]]
            if others:
                titles = " and ".join(f'"{slotted.index.catalog.titles[item]}"' for item in (row, others[0]))
                raise DataError(
                    f'{titles} break the hard rule "{one.rule}", so no bundle can hold both. Give one of them, or '
                    "change the rule in rules.yaml: with a weight it is a soft one."
                )


def keep_rules(slotted: SlottedCatalog, allowed: NDArray[np.bool_], beside: Sequence[int]) -> NDArray[np.bool_]:
    """Return which of the items allowed make a bundle with a set that breaks no hard rule, (N,).

    Raises:
        DataError: the set breaks one, or rules leave nothing of what else is allowed; the message names those that
            clash.
    """
    if not slotted.rules.hard or not beside:
        return allowed
    check_given(slotted, beside)
    checks = slotted.rules.check_last(beside)
    kept: NDArray[np.bool_] = np.logical_and.reduce([allowed, *checks.values()])
    if allowed.any() and not kept.any():
        clash = find_minimal_conflict(
            list(checks), lambda names: bool(np.logical_and.reduce([allowed, *(checks[one] for one in names)]).any())
        )
        raise explain_clash([name.removeprefix('rule "').removesuffix('"') for name in clash])
    return kept


def explain_clash(names: Sequence[str]) -> DataError:
    """Say which rules leave no bundle."""
    told = " and ".join(f'"{name}"' for name in names)
    many = "These rules clash" if len(names) > 1 else "This rule cannot be kept"
    return DataError(f"No bundle with what was given keeps the hard rules. {many}: {told}. {_RULES_REMEDY}")


def _explain_budget(slotted: SlottedCatalog, constraints: Constraints, space: SearchSpace, size: str) -> str:
    cheapest = space.cheapest or []
    cheapest = sorted(cheapest, key=lambda row: slotted.slot_places[slotted.slot_of[row]])
    spent = int(slotted.index.cents[list(space.context)].sum())
    total = spent + int(slotted.index.cents[cheapest].sum())
    terms = [f"context {spent / 100:.2f}"] if space.context else []
    terms += [f"{slotted.name_slot(row)} {slotted.index.cents[row] / 100:.2f}" for row in cheapest]
    smaller = next(
        (low for low in range(space.low - 1, 0, -1) if replace(space, low=low, high=space.high).feasible),
        None,
    )
    fewer = len(space.context) + (smaller or 0)
    return (
        f"Budget {constraints.budget:.2f} allows no bundle of {size} items: the cheapest allowed costs "
        f"{total / 100:.2f} ({' + '.join(terms)}). Raise the budget to {total / 100:.2f}"
        + (f", or ask for {fewer} item{'s' if fewer > 1 else ''}." if smaller else ".")
    )


def _explain_lack(slotted: SlottedCatalog, space: SearchSpace) -> str:
    for slot in sorted(space.required):
        if not len(space.candidates[slot]):
            return f'slot "{slotted.templates.names[slot]}" is required and no allowed item is left in it'
    if len(space.required) > space.high:
        return f"{len(space.required)} required slots are missing and at most {space.high} items may be added"
    if space.cheapest is None:
        room = int((space.room - space.held).sum())
        return f"at least {space.low} items must be added, and the slots and the items allowed give room for {room}"
    return "the allowed items cost more than the budget"


def _format_span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
