"""Beam search over slot templates, shortlists, exhaustive search for small cases, and diversification."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from peft_combo.recommender.composing.objective import _Judged, _Scene
from peft_combo.recommender.composing.options import Options, Rows, Weights, _among, _Request
from peft_combo.recommender.composing.slots import Template


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

    def estimate(self, log_probability: float, weights: Weights) -> float:
        own = (self.gain - weights.redundancy * self.likeness) / len(self.added)
        return own + weights.slots * log_probability


def _beam(
    request: _Request, scene: _Scene, plans: Sequence[tuple[Template, float]],
    first: dict[int, NDArray[np.float64]] | None,
) -> list[tuple[int, ...]]:  # fmt: skip
    """Fill templates item by item, asking the scorer anew for every partial bundle that is kept.

    An item is taken at the score it has beside those before it; the best finished bundles, a beam of them, are left to
    the objective, which scores every item beside all others.

    Args:
        first: what each item of the shelves, which are shortlists then, adds beside the context, as of `_gains`.
    """
    how = scene.options
    states = [_Partial((), _tree(request, plans), 0, 0.0, 0.0)]
    finished: list[tuple[float, _Partial]] = []
    # Slots whose every item is still looked at.
    wide = set().union(*(slots for slots, _ in plans)) if first is None else set()
    while states:
        sets = [(*request.context, *state.added) for state in states]
        slots = wide | set().union(*(state.node.children for state in states))
        gains = _gains(request, scene, sets, sorted(slots)) if first is None else first
        first = None
        if wide and scene.tells(sets):
            request, gains = _shortlisted(request, scene, gains)
            wide = set()
        grown: list[_Partial] = []
        for place, (state, held) in enumerate(zip(states, sets, strict=True)):
            own = {slot: gains[slot][place] for slot in state.node.children}
            grown += _extensions(request, scene, state, held, own)
        ends = [(state, state.node.log_probability) for state in grown]
        finished += [(state.estimate(log, scene.weights), state) for state, log in ends if log is not None]
        states = _kept([state for state in grown if state.node.children], scene)
    finished.sort(key=lambda one: (-one[0], scene.tie_break(one[1].added)))
    return [state.added for _, state in _varied(finished, max(how.beam, 3 * how.k), how)]


def _gains(
    request: _Request, scene: _Scene, sets: Sequence[tuple[int, ...]], slots: Sequence[int]
) -> dict[int, NDArray[np.float64]]:
    """Per slot what each item of its shelf would add beside each set: (S, items of the shelf)."""
    weights, shelves = scene.weights, [request.shelves[slot] for slot in slots]
    rows = np.concatenate([np.empty(0, np.int64), *shelves])
    gains = scene.weighted_relevance(rows) + weights.compatibility * scene.beside(sets, rows)
    ends = np.cumsum([len(shelf) for shelf in shelves])[:-1]
    return dict(zip(slots, np.split(gains, ends, axis=1), strict=True))


def _shortlisted(
    request: _Request, scene: _Scene, gains: dict[int, NDArray[np.float64]]
) -> tuple[_Request, dict[int, NDArray[np.float64]]]:
    """Keep of each shelf the items that add most beside any of the sets, and what they add."""
    shelves, limit = list(request.shelves), scene.options.shortlist
    for slot, values in gains.items():
        rows = request.shelves[slot]
        if len(rows) <= limit:
            continue
        best, kept = values.max(axis=0), np.zeros(len(rows), bool)
        kept[scene.best(rows, best, limit)] = True
        # What a bundle can spend on the slot is not known yet, so the best of the cheaper half, quarter ... come too;
        # of the last part all.
        stop = len(rows) // 2 if request.left is not None else 0
        while stop:
            share = max(limit // 8, 1)
            kept[scene.best(rows[:stop], best[:stop], share)] = True
            stop = 0 if stop <= share else stop // 2
        shelves[slot] = rows[kept]
        gains[slot] = values[:, kept]
    return replace(request, shelves=shelves), gains


def _tree(request: _Request, plans: Sequence[tuple[Template, float]]) -> _Node:
    """Share the beginnings of plans: the slots of most plans come first, equal ones next to each other."""
    common = Counter(slot for slots, _ in plans for slot in set(slots))
    root = _Node()
    for slots, log in plans:
        path = sorted(slots, key=lambda slot: (-common[slot], slot))
        prices = _lowest_prices(request, path)
        node = root
        for depth in range(len(path) + 1):
            node.best = max(node.best, log)
            node.rest = min(node.rest, sum(prices[depth:]))
            if depth < len(path):
                node = node.children.setdefault(path[depth], _Node())
        node.log_probability = log
    return root


def _lowest_prices(request: _Request, path: list[int]) -> list[int]:
    """For each slot of the path its cheapest item, dearer from the second of one slot on (counted from the end)."""
    if request.left is None:
        return [0] * len(path)
    met: Counter[int] = Counter()
    prices = []
    for slot in reversed(path):
        prices.append(int(request.cents[request.shelves[slot][met[slot]]]))
        met[slot] += 1
    return prices[::-1]


def _extensions(
    request: _Request, scene: _Scene, state: _Partial, held: tuple[int, ...], gains: dict[int, NDArray[np.float64]]
) -> Iterator[_Partial]:
    """The partial bundle with one item more, for the best items of every slot that may follow.

    Args:
        held: the rows of the context and those added.
        gains: per such slot what each item of the shelf adds beside them.
    """
    for slot, node in state.node.children.items():
        rows, own = request.shelves[slot], gains[slot]
        if request.left is not None:
            affordable = request.left - state.cents - int(node.rest)
            rows = rows[: np.searchsorted(request.cents[rows], affordable, side="right")]
        if not len(rows):
            continue
        places = _distinct_best(scene, rows, own[: len(rows)], held)
        likeness = scene.likeness(rows[places], held)
        for place, like in zip(places.tolist(), likeness.tolist(), strict=True):
            row = int(rows[place])
            cents = state.cents + (int(request.cents[row]) if request.left is not None else 0)
            yield _Partial((*state.added, row), node, cents, state.gain + float(own[place]), state.likeness + like)


def _distinct_best(scene: _Scene, rows: Rows, gains: NDArray[np.float64], held: tuple[int, ...]) -> NDArray[np.intp]:
    """Places of the best items that are not, or nearly, among those held; more are looked at only as needed."""
    wanted = scene.options.per_slot
    looked_at = 2 * wanted
    while True:
        places = scene.best(rows, gains, looked_at)
        taken = _among(rows[places], np.array(held, np.int64)) | scene.duplicates(rows[places], held)
        if len(places) == len(rows) or np.count_nonzero(~taken) >= wanted:
            return places[~taken][:wanted]
        looked_at *= 4


def _kept(states: list[_Partial], scene: _Scene) -> list[_Partial]:
    """The beam: the best partial bundles, each set once, no template and no first item taking more than its share."""
    how = scene.options
    ranked = [
        (state.estimate(state.node.best, scene.weights), state)
        for state in {(frozenset(state.added), id(state.node)): state for state in states}.values()
    ]
    ranked.sort(key=lambda one: (-one[0], scene.tie_break(one[1].added)))
    return [state for _, state in _varied(ranked, how.beam, how)]


def _varied(ranked: list[tuple[float, _Partial]], count: int, how: Options) -> list[tuple[float, _Partial]]:
    """The first `count`, but no more than half of one template and, for a list, a quarter that begin with one item.

    What is left over fills up. Without this the beam holds one bundle in sixteen variants.
    """
    per_node = max(1, count // 2)
    per_first = count if how.k == 1 else max(1, count // 4)
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


def _each_in_half(ranked: Sequence[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
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


def _every(request: _Request, scene: _Scene, tries: int | None = None) -> Iterator[tuple[int, ...]]:
    """Every set of rows that keeps all constraints, cheapest items first; gives up after so many tries."""
    pool = np.concatenate([np.empty(0, np.int64), *(request.shelves[slot] for slot in request.free)])
    pool = pool[np.lexsort((scene.order[pool], request.cents[pool]))]
    prices = request.cents[pool] if request.left is not None else np.zeros(len(pool), np.int64)
    budget = math.inf if request.left is None else request.left
    slots = scene.slot_of[pool].tolist()
    steps = itertools.count()

    def deeper(start: int, added: tuple[int, ...], used: Counter[int], spent: int) -> Iterator[tuple[int, ...]]:
        missing = len(request.required - set(used))
        if len(added) >= max(1, request.low) and not missing:
            yield added
        if len(added) == request.high:
            return
        to_come = max(1, request.low - len(added), missing)
        for place in range(start, len(pool)):
            if tries is not None and next(steps) >= tries:
                return
            if spent + to_come * int(prices[place]) > budget:
                return
            slot, row = slots[place], int(pool[place])
            needed = slot in request.required and slot not in used
            if used[slot] >= request.free[slot] or (missing - needed > request.high - len(added) - 1):
                continue
            if scene.duplicates(pool[place : place + 1], (*request.context, *added))[0]:
                continue
            yield from deeper(place + 1, (*added, row), used + Counter([slot]), spent + int(prices[place]))

    return deeper(0, (), Counter(), 0)


def _spread(ranked: list[_Judged], how: Options, scene: _Scene) -> list[_Judged]:
    """Choose k of the ranked bundles by maximal marginal relevance."""
    if how.diversity == 0 or not ranked:
        return ranked[: how.k]
    scores = np.array([one.score for one in ranked])
    width = scores[0] - scores.min()
    scaled = (scores - scores.min()) / width if width > 0 else np.ones(len(scores))
    chosen = [0]
    likeness = np.zeros(len(ranked))
    while len(chosen) < min(how.k, len(ranked)):
        last = ranked[chosen[-1]].added
        likeness = np.maximum(likeness, [scene.alike(one.added, last) for one in ranked])
        worth = (1 - how.diversity) * scaled - how.diversity * likeness
        worth[chosen] = -np.inf
        chosen.append(int(np.argmax(worth)))
    return [ranked[place] for place in chosen]
