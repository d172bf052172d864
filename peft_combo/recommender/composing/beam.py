"""Beam search: fills slot templates item by item, all partial bundles of a step at once.

Owns the tree of templates, the partial bundles and which of them are kept. Knows nothing of how scores are made; what
an item adds comes from `shortlists`, what a finished bundle is worth from the objective.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from peft_combo.recommender.composing.objective import Objective
from peft_combo.recommender.composing.options import Rows
from peft_combo.recommender.composing.search_space import SearchSpace
from peft_combo.recommender.composing.shortlists import compute_gains, make_shortlists
from peft_combo.recommender.composing.slots import Template

_VARIANTS = 12  # partial bundles that are ranked for each one that is kept


@dataclass(eq=False)
class _Node:
    """A place in the tree of plans: the slots added so far, and what may follow.

    Attributes:
        log_probability: of the template that ends here; -inf where none does.
        best: the greatest log-probability of the templates that end here or below.
        rest: cents that what follows costs at least, for the cheapest plan that goes on or ends here.
    """

    log_probability: float = -math.inf
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


@dataclass(frozen=True, eq=False)
class _Grown:
    """What becomes of the partial bundles of a step with one item more, G of them.

    Attributes:
        states: those that were grown. nodes: the places in the tree that were reached.
        parent: (G,) place in `states`. node: (G,) place in `nodes`. row: (G,) the item.
        gain, likeness: (G,) sums over all added items.
        order: (G,) ties, the same for the same items in whatever order.
    """

    states: Sequence[_Partial]
    nodes: Sequence[_Node]
    parent: Rows
    node: Rows
    row: Rows
    gain: NDArray[np.float64]
    likeness: NDArray[np.float64]
    order: NDArray[np.float64]

    def estimate(self, objective: Objective, log_probability: NDArray[np.float64]) -> NDArray[np.float64]:
        """Estimate the objective, given the log-probability of a template for each of `nodes`; (G,)."""
        weights, n = objective.weights, 1 + len(self.states[0].added)
        own = (self.gain - weights.redundancy * self.likeness) / n
        possible = np.isfinite(log_probability)
        logs = np.where(possible, weights.slots * np.where(possible, log_probability, 0), -np.inf)
        estimate: NDArray[np.float64] = own + logs[self.node]
        return estimate

    def list_added(self, place: int) -> tuple[int, ...]:
        return (*self.states[int(self.parent[place])].added, int(self.row[place]))


def search_beam(
    space: SearchSpace, objective: Objective, plans: Sequence[tuple[Template, float]],
    first: dict[int, NDArray[np.float64]] | None,
) -> list[tuple[int, ...]]:  # fmt: skip
    """Fill templates item by item, asking the scorer anew for every partial bundle that is kept.

    An item is taken at the score it has beside those before it; the best finished bundles, a beam of them, are left to
    the objective, which scores every item beside all others.

    Args:
        first: what each candidate, of shortlists then, adds beside the context, as of `compute_gains`.
    """
    options = objective.options
    states = [_Partial((), _build_tree(space, plans), 0, 0.0, 0.0)]
    finished: list[tuple[float, float, tuple[int, ...], int]] = []
    # Slots whose every item is still looked at.
    wide = set().union(*(slots for slots, _ in plans)) if first is None else set()
    while states:
        sets = [(*space.context, *state.added) for state in states]
        slots = wide | set().union(*(state.node.children for state in states))
        gains = compute_gains(space, objective, sets, sorted(slots)) if first is None else first
        first = None
        if wide and objective.has_scores(sets):
            space, gains = make_shortlists(space, objective, gains)
            wide = set()
        grown = _grow(space, objective, states, sets, gains)
        if grown is None:
            break
        finished += _list_finished(grown, objective, max(options.beam, 3 * options.k))
        states = _keep_beam(grown, space, objective)
    finished.sort(key=lambda one: (-one[0], one[1]))
    kept = limit_variants([(added, node) for *_, added, node in finished], max(options.beam, 3 * options.k), options.k)
    return [finished[place][2] for place in kept]


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


def _grow(
    space: SearchSpace, objective: Objective, states: Sequence[_Partial], sets: Sequence[tuple[int, ...]],
    gains: dict[int, NDArray[np.float64]],
) -> _Grown | None:  # fmt: skip
    """Add to each partial bundle the best items of every slot that may follow; None where nothing can be added.

    Args:
        sets: per partial bundle the rows of the context and those added, as many for each.
        gains: per slot what each candidate adds beside them, (S, candidates).
    """
    wanted = objective.options.per_slot
    looked_at = wanted + 8
    while True:
        found = _select(space, objective, states, gains, looked_at)
        if found is None:
            return None
        parent, nodes, node, row, gain, more = found
        likeness, taken = objective.compare(row, sets, parent)
        # Of the items of one slot for one partial bundle, the best that are not, or nearly, among those held.
        group = parent * len(nodes) + node
        by_group = np.lexsort((objective.break_ties(row) - gain, taken, group))
        starts = np.flatnonzero(np.diff(group[by_group], prepend=-1))
        place = np.arange(len(row)) - np.repeat(starts, np.diff(starts, append=len(row)))
        kept = by_group[(place < wanted) & ~taken[by_group]]
        counts = np.bincount(group[kept], minlength=len(states) * len(nodes))
        if not (more & (counts[group] < wanted)).any():
            break
        looked_at *= 4
    if not len(kept):
        return None
    before = np.array([[state.gain, state.likeness] for state in states])
    ties = np.array([objective.ties[list(state.added)].sum() for state in states])
    parent, row = parent[kept], row[kept]
    return _Grown(
        states, nodes, parent, node[kept], row, before[parent, 0] + gain[kept], before[parent, 1] + likeness[kept],
        ties[parent] + objective.ties[row],
    )  # fmt: skip


def _select(
    space: SearchSpace, objective: Objective, states: Sequence[_Partial], gains: dict[int, NDArray[np.float64]],
    looked_at: int,
) -> tuple[Rows, list[_Node], Rows, Rows, NDArray[np.float64], NDArray[np.bool_]] | None:  # fmt: skip
    """The best affordable items of each slot for each partial bundle that it may follow, alike or not.

    Returns:
        parent, nodes, node, row and gain as in `_Grown`, the gain of the item alone, and whether there are more of the
        slot; None where there is nothing.
    """
    nodes: list[_Node] = []
    parts: list[tuple[Rows, Rows, Rows, NDArray[np.float64], NDArray[np.bool_]]] = []
    spent = np.array([state.cents for state in states])
    for slot in sorted(set().union(*(state.node.children for state in states))):
        members = np.array([place for place, state in enumerate(states) if slot in state.node.children])
        reached = [states[place].node.children[slot] for place in members.tolist()]
        rows, values = space.candidates[slot], gains[slot][members]  # (M, C)
        if not len(rows):
            continue
        number = {id(one): len(nodes) + place for place, one in enumerate({id(one): one for one in reached}.values())}
        nodes += {id(one): one for one in reached}.values()
        keys = values - objective.break_ties(rows)
        if space.left is not None:
            left = space.left - spent[members] - np.array([one.rest for one in reached])
            keys[space.cents[rows] > left[:, None]] = -np.inf
        if len(rows) > looked_at:
            places = np.argpartition(-keys, looked_at - 1, axis=1)[:, :looked_at]
        else:
            places = np.broadcast_to(np.arange(len(rows)), keys.shape)
        chosen = np.isfinite(np.take_along_axis(keys, places, axis=1))
        own = np.array([number[id(one)] for one in reached])
        width, shape = places.shape[1], chosen.shape
        more = np.broadcast_to((chosen.all(axis=1) & (len(rows) > width))[:, None], shape)
        parts.append((
            np.broadcast_to(members[:, None], shape)[chosen], np.broadcast_to(own[:, None], shape)[chosen],
            rows[places][chosen], np.take_along_axis(values, places, axis=1)[chosen], more[chosen],
        ))  # fmt: skip
    if not parts:
        return None
    parent, node, row, gain, more = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return parent, nodes, node, row, gain, more


def _list_finished(grown: _Grown, objective: Objective, count: int) -> list[tuple[float, float, tuple[int, ...], int]]:
    """The best bundles that may end here: estimate, tie, rows and the template's number."""
    estimates = grown.estimate(objective, np.array([node.log_probability for node in grown.nodes]))
    ranked = _rank(grown, estimates, _VARIANTS * count)
    listed = [(grown.list_added(place), id(grown.nodes[int(grown.node[place])])) for place in ranked]
    return [
        (float(estimates[ranked[place]]), float(grown.order[ranked[place]]), *listed[place])
        for place in limit_variants(listed, count, objective.options.k)
    ]


def _keep_beam(grown: _Grown, space: SearchSpace, objective: Objective) -> list[_Partial]:
    """The beam: the best partial bundles that can go on, each set once, none taking more than its share."""
    options = objective.options
    best = np.array([node.best if node.children else -np.inf for node in grown.nodes])
    ranked = _rank(grown, grown.estimate(objective, best), _VARIANTS * options.beam)
    listed = [(grown.list_added(place), id(grown.nodes[int(grown.node[place])])) for place in ranked]
    states = []
    for chosen in limit_variants(listed, options.beam, options.k):
        place = ranked[chosen]
        row, parent = int(grown.row[place]), grown.states[int(grown.parent[place])]
        cents = parent.cents + (int(space.cents[row]) if space.left is not None else 0)
        node = grown.nodes[int(grown.node[place])]
        states.append(
            _Partial((*parent.added, row), node, cents, float(grown.gain[place]), float(grown.likeness[place]))
        )
    return states


def _rank(grown: _Grown, estimates: NDArray[np.float64], most: int) -> list[int]:
    """The first places by estimate, best first, without those that are -inf."""
    places = np.flatnonzero(np.isfinite(estimates))
    if len(places) > most:  # far more than are kept: the rest is not worth sorting
        places = places[np.argpartition(-estimates[places], most - 1)[:most]]
    ranked: list[int] = places[np.lexsort((grown.order[places], -estimates[places]))].tolist()
    return ranked


def limit_variants(ranked: Sequence[tuple[tuple[int, ...], Hashable]], count: int, k: int) -> list[int]:
    """Places of the first `count` distinct sets, no more than half of one template; for a list an item in a quarter.

    What is left over fills up. Without this the beam holds one bundle in sixteen variants.

    Args:
        ranked: rows and template of each. k: how many bundles are asked for.
    """
    per_template = max(1, count // 2)
    per_item = count if k == 1 else max(1, count // 4)
    templates: Counter[Hashable] = Counter()
    items: Counter[int] = Counter()
    seen: set[frozenset[int]] = set()
    chosen: list[int] = []
    spare: list[int] = []
    for place, (rows, template) in enumerate(ranked):
        if len(chosen) == count:
            break
        free = templates[template] < per_template and all(items[row] < per_item for row in rows)
        if free and frozenset(rows) not in seen:
            chosen.append(place)
            templates[template] += 1
            items.update(rows)
            seen.add(frozenset(rows))
        else:
            spare.append(place)
    for place in spare:
        if len(chosen) == count:
            break
        if frozenset(ranked[place][0]) not in seen:
            chosen.append(place)
            seen.add(frozenset(ranked[place][0]))
    return sorted(chosen)
