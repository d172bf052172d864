"""Rules that clash: which of them together leave no bundle for items they speak of.

Owns the search for a minimal set of conflicting rules: with any of its members left out the others can be kept.
Source: the deletion filter of Chinneck and Dravnieks 1991, "Locating minimal infeasible constraint sets in linear
programs", which needs no more than a test whether a set can be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.knowledge.rule_set import RuleSet

Name = TypeVar("Name")
_MOST_TRIES = 2_000  # bundles looked at before a requirement counts as one that can be met


def find_minimal_conflict(names: Sequence[Name], feasible: Callable[[Collection[Name]], bool]) -> list[Name]:
    """Return a minimal subset that cannot be kept, in its order; an empty list where all can.

    Args:
        feasible: says whether a subset can be kept; a subset of what can be kept can be kept too.
    """
    kept = list(names)
    if feasible(kept):
        return []
    for name in names:
        rest = [other for other in kept if other != name]
        if not feasible(rest):
            kept = rest
    return kept


def find_clashes(rules: RuleSet) -> dict[tuple[str, ...], int]:
    """Return minimal sets of hard rules that no bundle with an item they speak of can keep.

    Looked at is every rule that requires: where no item of its `when` can stand in any bundle, the rules that bar them
    all clash. Items that no rule tells apart are looked at once; after 2,000 bundles a requirement counts as met.

    Returns:
        The names of the rules of each set, to how many items they leave no bundle.
    """
    found: dict[tuple[str, ...], int] = {}
    kinds = _number_kinds(rules)
    for one in rules.requiring:
        items = np.flatnonzero(one.when)
        _, first = np.unique(kinds[items], return_index=True)
        some = items[first].tolist()
        names = [str(other.rule) for other in rules.hard]

        def feasible(kept: Collection[str], some: Sequence[int] = some) -> bool:
            own, tries = rules.select(kept), [0]
            return any(_can_stand(own, [row], kinds, tries) for row in some)

        if some and (clash := find_minimal_conflict(names, feasible)):
            found.setdefault(tuple(clash), len(items))
    return found


def _number_kinds(rules: RuleSet) -> NDArray[np.int64]:
    """Number items so that those which no hard rule tells apart have one number: (N,)."""
    columns: list[NDArray[Any]] = [np.zeros(rules.n_items, np.int64)]
    for one in rules.hard:
        columns += [one.when, one.target]
        if one.codes is not None:
            columns.append(one.codes)
        if one.steps is not None:
            sides = (one.steps.heads, one.steps.tails.T.tocsr())
            for side in sides:
                own = {
                    key: number for number, key in enumerate(sorted({_edges(side, r) for r in range(rules.n_items)}))
                }
                columns.append(np.array([own[_edges(side, row)] for row in range(rules.n_items)]))
    table = np.stack([column.astype(np.int64) for column in columns], axis=1)
    return np.unique(table, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _edges(side: object, row: int) -> tuple[int, ...]:
    indices, indptr = side.indices, side.indptr  # type: ignore[attr-defined]
    return tuple(sorted(indices[indptr[row] : indptr[row + 1]].tolist()))


def _can_stand(rules: RuleSet, rows: list[int], kinds: NDArray[np.int64], tries: list[int]) -> bool:
    """Say whether a set of items, no two of which conflict, is part of a bundle that keeps every hard rule."""
    tries[0] += 1
    if tries[0] > _MOST_TRIES:
        return True
    for one in rules.requiring:
        unmet = one.list_unmet(rows)
        if unmet:
            partners = one.find_partners(unmet[0])
            for row in rows:
                partners &= ~rules.find_conflicts(row)
            partners[rows] = False
            candidates = np.flatnonzero(partners)
            _, first = np.unique(kinds[candidates], return_index=True)
            return any(_can_stand(rules, [*rows, row], kinds, tries) for row in candidates[first].tolist())
    return True
