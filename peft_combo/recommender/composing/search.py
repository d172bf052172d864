"""Beam search over slot templates, shortlists, exhaustive search for small cases, and diversification."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from peft_combo.recommender.composing.objective import Objective, ScoredBundle
from peft_combo.recommender.composing.options import ObjectiveWeights, Options, Rows, is_among
from peft_combo.recommender.composing.plans import plan_promising, plan_slots
from peft_combo.recommender.composing.search_space import SearchSpace, SlottedCatalog
from peft_combo.recommender.composing.slots import Template

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
        first = _compute_gains(space, objective, [space.context], sorted(space.free))
        space, first = _make_shortlists(space, objective, first)
        likely = list(dict([*likely, *plan_promising(slotted, space, objective, first)]).items())
    found = _search_beam(space, objective, likely, first)
    if not found and len(plans) > len(likely):
        found = _search_beam(space, objective, plans, first)
    return found or list(itertools.islice(_enumerate_bundles(space, objective, _TRIES), _SPARE))


@dataclass(eq=False)
class _Node:
    """A place in the tree of plans: the slots added so far, and what may follow.

    Attributes:
        log_probability: of the template that ends here; None where none does.
        best: the greatest log-probability of the templates that end here or below.
        rest: cents that what follows costs at least, for the cheapest plan that goes on or ends here.
    """

    log_probability: float | None = None
    best: float = -math.inf
    rest: float = math.inf
    children: dict[int, _Node] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Partial:
    """A partial bundle: rows added so far, what they cost, and sums over them of gain and of likeness."""

    added: tuple[int, ...]
    node: _Node
    cents: int
    gain: float
    likeness: float

    def estimate(self, log_probability: float, weights: ObjectiveWeights) -> float:
        own = (self.gain - weights.redundancy * self.likeness) / len(self.added)
        return own + weights.slots * log_probability


def _search_beam(
    space: SearchSpace, objective: Objective, plans: Sequence[tuple[Template, float]],
    first: dict[int, NDArray[np.float64]] | None,
) -> list[tuple[int, ...]]:  # fmt: skip
    """Fill templates item by item, asking the scorer anew for every partial bundle that is kept.

    An item is taken at the score it has beside those before it; the best finished bundles, a beam of them, are left to
    the objective, which scores every item beside all others.

    Args:
        first: what each candidate, of shortlists then, adds beside the context, as of `_compute_gains`.
    """
    options = objective.options
    states = [_Partial((), _build_tree(space, plans), 0, 0.0, 0.0)]
    finished: list[tuple[float, _Partial]] = []
    # Slots whose every item is still looked at.
    wide = set().union(*(slots for slots, _ in plans)) if first is None else set()
    while states:
        sets = [(*space.context, *state.added) for state in states]
        slots = wide | set().union(*(state.node.children for state in states))
        gains = _compute_gains(space, objective, sets, sorted(slots)) if first is None else first
        first = None
        if wide and objective.has_scores(sets):
            space, gains = _make_shortlists(space, objective, gains)
            wide = set()
        grown: list[_Partial] = []
        for place, (state, held) in enumerate(zip(states, sets, strict=True)):
            own = {slot: gains[slot][place] for slot in state.node.children}
            grown += _extend(space, objective, state, held, own)
        ends = [(state, state.node.log_probability) for state in grown]
        finished += [(state.estimate(log, objective.weights), state) for state, log in ends if log is not None]
        states = _keep_beam([state for state in grown if state.node.children], objective)
    finished.sort(key=lambda one: (-one[0], objective.make_tie_key(one[1].added)))
    return [state.added for _, state in _limit_variants(finished, max(options.beam, 3 * options.k), options)]


def _compute_gains(
    space: SearchSpace, objective: Objective, sets: Sequence[tuple[int, ...]], slots: Sequence[int]
) -> dict[int, NDArray[np.float64]]:
    """Per slot what each candidate would add beside each set: (S, candidates)."""
    candidates = [space.candidates[slot] for slot in slots]
    rows = np.concatenate([np.empty(0, np.int64), *candidates])
    gains = objective.weigh_relevance(rows) + objective.weigh_beside(sets, rows)
    ends = np.cumsum([len(shelf) for shelf in candidates])[:-1]
    return dict(zip(slots, np.split(gains, ends, axis=1), strict=True))


def _make_shortlists(
    space: SearchSpace, objective: Objective, gains: dict[int, NDArray[np.float64]]
) -> tuple[SearchSpace, dict[int, NDArray[np.float64]]]:
    """Keep of each slot the candidates that add most beside any of the sets, and what they add."""
    candidates, limit = list(space.candidates), objective.options.shortlist
    for slot, values in gains.items():
        rows = space.candidates[slot]
        if len(rows) <= limit:
            continue
        best, kept = values.max(axis=0), np.zeros(len(rows), bool)
        kept[objective.select_best(rows, best, limit)] = True
        # What a bundle can spend on the slot is not known yet, so the best of the cheaper half, quarter ... come too;
        # of the last part all.
        stop = len(rows) // 2 if space.left is not None else 0
        while stop:
            share = max(limit // 8, 1)
            kept[objective.select_best(rows[:stop], best[:stop], share)] = True
            stop = 0 if stop <= share else stop // 2
        candidates[slot] = rows[kept]
        gains[slot] = values[:, kept]
    return replace(space, candidates=candidates), gains


def _build_tree(space: SearchSpace, plans: Sequence[tuple[Template, float]]) -> _Node:
    """Share the beginnings of plans: the slots of most plans come first, equal ones next to each other."""
    common = Counter(slot for slots, _ in plans for slot in set(slots))
    root = _Node()
    for slots, log in plans:
        path = sorted(slots, key=lambda slot: (-common[slot], slot))
        prices = _find_lowest_prices(space, path)
        node = root
        for depth in range(len(path) + 1):
            node.best = max(node.best, log)
            node.rest = min(node.rest, sum(prices[depth:]))
            if depth < len(path):
                node = node.children.setdefault(path[depth], _Node())
        node.log_probability = log
    return root


def _find_lowest_prices(space: SearchSpace, path: list[int]) -> list[int]:
    """For each slot of the path its cheapest item, dearer from the second of one slot on (counted from the end)."""
    if space.left is None:
        return [0] * len(path)
    met: Counter[int] = Counter()
    prices = []
    for slot in reversed(path):
        prices.append(int(space.cents[space.candidates[slot][met[slot]]]))
        met[slot] += 1
    return prices[::-1]


def _extend(
    space: SearchSpace,
    objective: Objective,
    state: _Partial,
    held: tuple[int, ...],
    gains: dict[int, NDArray[np.float64]],
) -> Iterator[_Partial]:
    """The partial bundle with one item more, for the best items of every slot that may follow.

    Args:
        held: the rows of the context and those added.
        gains: per such slot what each candidate adds beside them.
    """
    for slot, node in state.node.children.items():
        rows, own = space.candidates[slot], gains[slot]
        if space.left is not None:
            affordable = space.left - state.cents - int(node.rest)
            rows = rows[: np.searchsorted(space.cents[rows], affordable, side="right")]
        if not len(rows):
            continue
        places = _select_distinct(objective, rows, own[: len(rows)], held)
        likeness = objective.measure_likeness(rows[places], held)
        for place, like in zip(places.tolist(), likeness.tolist(), strict=True):
            row = int(rows[place])
            cents = state.cents + (int(space.cents[row]) if space.left is not None else 0)
            yield _Partial((*state.added, row), node, cents, state.gain + float(own[place]), state.likeness + like)


def _select_distinct(
    objective: Objective, rows: Rows, gains: NDArray[np.float64], held: tuple[int, ...]
) -> NDArray[np.intp]:
    """Places of the best items that are not, or nearly, among those held; more are looked at only as needed."""
    wanted = objective.options.per_slot
    looked_at = 2 * wanted
    while True:
        places = objective.select_best(rows, gains, looked_at)
        taken = is_among(rows[places], np.array(held, np.int64)) | objective.find_duplicates(rows[places], held)
        if len(places) == len(rows) or np.count_nonzero(~taken) >= wanted:
            return places[~taken][:wanted]
        looked_at *= 4


def _keep_beam(states: list[_Partial], objective: Objective) -> list[_Partial]:
    """The beam: the best partial bundles, each set once, no template and no first item taking more than its share."""
    options = objective.options
    ranked = [
        (state.estimate(state.node.best, objective.weights), state)
        for state in {(frozenset(state.added), id(state.node)): state for state in states}.values()
    ]
    ranked.sort(key=lambda one: (-one[0], objective.make_tie_key(one[1].added)))
    return [state for _, state in _limit_variants(ranked, options.beam, options)]


def _limit_variants(ranked: list[tuple[float, _Partial]], count: int, options: Options) -> list[tuple[float, _Partial]]:
    """The first `count`, but no more than half of one template and, for a list, a quarter that begin with one item.

    What is left over fills up. Without this the beam holds one bundle in sixteen variants.
    """
    per_node = max(1, count // 2)
    per_first = count if options.k == 1 else max(1, count // 4)
    nodes: Counter[int] = Counter()
    firsts: Counter[int] = Counter()
    seen: set[frozenset[int]] = set()
    chosen: list[tuple[float, _Partial]] = []
    spare: list[tuple[float, _Partial]] = []
    for one in ranked:
        node, first, items = id(one[1].node), one[1].added[0], frozenset(one[1].added)
        if len(chosen) == count:
            break
        if nodes[node] < per_node and firsts[first] < per_first and items not in seen:
            chosen.append(one)
            nodes[node] += 1
            firsts[first] += 1
            seen.add(items)
        else:
            spare.append(one)
    for one in spare[: 4 * count]:
        if len(chosen) < count and frozenset(one[1].added) not in seen:
            chosen.append(one)
            seen.add(frozenset(one[1].added))
    return sorted(chosen, key=lambda one: -one[0])


def limit_repeats(ranked: Sequence[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """Return the first `count` sets, but no item in more than half of them while there are others."""
    most = max(1, count // 2)
    met: Counter[int] = Counter()
    chosen: list[tuple[int, ...]] = []
    spare: list[tuple[int, ...]] = []
    for rows in ranked:
        if len(chosen) == count:
            break
        if all(met[row] < most for row in rows):
            chosen.append(rows)
            met.update(rows)
        else:
            spare.append(rows)
    return [*chosen, *spare[: count - len(chosen)]]


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


def diversify(ranked: list[ScoredBundle], options: Options, objective: Objective) -> list[ScoredBundle]:
    """Choose k of the ranked bundles by maximal marginal relevance."""
    if options.diversity == 0 or not ranked:
        return ranked[: options.k]
    scores = np.array([one.score for one in ranked])
    width = scores[0] - scores.min()
    scaled = (scores - scores.min()) / width if width > 0 else np.ones(len(scores))
    chosen = [0]
    likeness = np.zeros(len(ranked))
    while len(chosen) < min(options.k, len(ranked)):
        last = ranked[chosen[-1]].added
        likeness = np.maximum(likeness, [objective.measure_overlap(one.added, last) for one in ranked])
        worth = (1 - options.diversity) * scaled - options.diversity * likeness
        worth[chosen] = -np.inf
        chosen.append(int(np.argmax(worth)))
    return [ranked[place] for place in chosen]
