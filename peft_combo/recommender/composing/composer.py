"""Composes bundles: completes a partial one, makes new ones, ranks given ones, and says from what evidence.

Owns the objective of a bundle, the search, and the error that names the constraint which cannot be met. Knows rows of
the catalogue and scores of all items; nothing of who made the scores, of models, files or requests.

The objective of a bundle B, of which C was given and A = B without C is added, is the sum of four parts:

    relevance       weight * mean over i in A of r(i)              r: one score per item for the user, basket or query
    compatibility   weight * mean over i in A of c(i | B - i)      c: scores given a set; every item against all others
    slots           weight * log P(slots of B)                     `SlotTemplates.log_probability`; 0 for substitutes
    redundancy     -weight * mean over i in A of max cosine(i, j)  over the other items j of B; no less than 0

r and c are made comparable first: z-scores over the items the scorer knows, all of them for r and a fixed sample of the
catalogue for c (all where there are at most `sample`), then arcsinh, which is linear near 0 and logarithmic in the
tails, so that one huge score cannot outweigh all else. Items the scorer cannot speak of (NaN or infinite) get the
lowest known score. Nothing depends on the order in which items were added.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from peft_combo.data.model import Catalog
from peft_combo.errors import DataError
from peft_combo.recommender.composing.constraints import Constraints, Shelf
from peft_combo.recommender.composing.evidence import Composition, ItemEvidence, co_counts
from peft_combo.recommender.composing.objective import _Judged, _Scale, _Scene
from peft_combo.recommender.composing.options import Compatibility, Options, Rows, Weights, Wished, _Request, _scores
from peft_combo.recommender.composing.search import _beam, _each_in_half, _every, _gains, _shortlisted, _spread
from peft_combo.recommender.composing.slots import SlotTemplates, Template
from peft_combo.scoring.base import SparseRows

_PLAUSIBLE = 6.0  # templates e^6 times less probable than the best are filled only where the others yield nothing
_TRIES = 50_000  # steps of the last, exhaustive look for a bundle before we say there is none
_SPARE = 64  # bundles that look collects at most
_SCALE_SAMPLE = 2048  # items the mean and deviation of c are taken over; both are then known to 2 % of the deviation
_SETS_KEPT = 6  # sets of wished items that are completed, at least


class Composer:
    """Composes and ranks bundles of one catalogue; safe to share between threads, for it changes nothing.

    Args:
        catalog: N items.
        templates: what bundles look like.
        vectors: (N, D) float32 of length 1, for likeness between items; None knows of equal titles only.
        history: (B, N) training bundles, for counts in the evidence.
        weights: of the objective, where a request names none.
        sample: items that the mean and deviation of the compatibility term are taken over.
    Raises:
        ValueError: vectors or history are not of N items.
    """

    def __init__(
        self,
        catalog: Catalog,
        templates: SlotTemplates,
        *,
        vectors: NDArray[np.float32] | None = None,
        history: SparseRows | None = None,
        weights: Weights = Weights(),
        sample: int = _SCALE_SAMPLE,
    ) -> None:
        if vectors is not None and (vectors.ndim != 2 or len(vectors) != len(catalog)):
            raise ValueError(f"vectors must be ({len(catalog)}, D), found {vectors.shape}.")
        self.catalog = catalog
        self.templates = templates
        self.vectors = vectors
        self.weights = weights
        self._history: Any = None if history is None else sparse.csc_array(history)
        if self._history is not None and self._history.shape[1] != len(catalog):
            raise ValueError(f"history must have {len(catalog)} columns, found {self._history.shape[1]}.")
        self._shelf = Shelf(catalog)
        self._slot_of = templates.slots_of(catalog)
        by_slot_and_price = np.lexsort((self._shelf.cents, self._slot_of))
        ends = np.searchsorted(self._slot_of[by_slot_and_price], np.arange(len(templates.names) + 1))
        self._sample = np.sort(np.random.default_rng(0).permutation(len(catalog))[:sample])
        # Per slot its rows, cheapest first, so that whatever a budget still allows is a head of the list.
        self._rows_of = [by_slot_and_price[start:stop] for start, stop in itertools.pairwise(ends.tolist())]

    def with_templates(self, templates: SlotTemplates) -> Composer:
        """Return a composer of the same catalogue under templates of the same slots, as `with_rules` gives them.

        What was made of the catalogue is shared, so this costs nothing.

        Raises:
            ValueError: the templates have other slots.
        """
        if (templates.names, templates.paths) != (self.templates.names, self.templates.paths):
            raise ValueError(f"templates must have the slots {self.templates.names}, found {templates.names}.")
        other = copy.copy(self)
        other.templates = templates
        return other

    def allowed_items(self, constraints: Constraints) -> NDArray[np.bool_]:
        """Which items may be added, (N,).

        Raises:
            DataError: the catalogue has no such attribute, value or category.
            ValueError: a row to exclude is not of the catalogue.
        """
        checks = self._shelf.checks(constraints)
        allowed: NDArray[np.bool_] = np.logical_and.reduce([np.ones(len(self.catalog), bool), *checks.values()])
        return allowed

    def compose(
        self,
        context: Sequence[int] | Rows = (),
        *,
        wished: Sequence[Wished] = (),
        relevance: ArrayLike | None = None,
        compatibility: Compatibility | None = None,
        constraints: Constraints | None = None,
        options: Options | None = None,
    ) -> list[Composition]:
        """Complete the context, or make bundles from nothing, best first.

        Exhaustive where there are few enough sets of allowed items (`Options.exact_limit`); else a beam search through
        the most probable templates, over a shortlist of the items of each slot (`Options.shortlist`), whose finished
        bundles are scored anew with the objective.

        Args:
            context: distinct rows that every bundle keeps; may be empty.
            wished: of each every bundle has exactly one item, beside the context. First sets of one item for each are
                found, then each of the best sets is completed. Not for substitutes.
            relevance: (N,) scores, higher is better; None for none.
            compatibility: scores of items beside sets, asked for once a step; None for none.
            constraints: hard; all bundles keep to them.
            options: see there.
        Returns:
            At most k compositions of distinct item sets. Where `diversity` is above 0 their order is that of the
            choice, and only the first is sure to have the highest score.
        Raises:
            DataError: no bundle meets the constraints; the message names those that bind.
            ValueError: a row or a shape does not fit the catalogue.
        """
        wanted, how = constraints or Constraints(), options or Options()
        given = self._distinct(context)
        scene = self._scene(relevance, compatibility, how)
        if wished:
            found = self._around(given, wished, wanted, scene)
        else:
            request = self._request(given, wanted, how)
            if not request.feasible:
                raise self._infeasible(given, wanted, how)
            found = self._search(request, scene)
        if not found:
            raise DataError(
                f"No bundle was found in which no two items are alike (near_duplicate {how.near_duplicate}), though "
                "the other constraints leave enough items. Raise near_duplicate, or ask for fewer items."
            )
        ranked = sorted(scene.judge(given, found), key=lambda one: (-one.score, scene.tie_break(one.added)))
        return [self._composition(given, one, scene) for one in _spread(ranked, how, scene)]

    def rank(
        self,
        bundles: Sequence[Sequence[int] | NDArray[np.integer[Any]]],
        *,
        context: Sequence[int] | Rows = (),
        relevance: ArrayLike | None = None,
        compatibility: Compatibility | None = None,
        constraints: Constraints | None = None,
        options: Options | None = None,
    ) -> list[Composition]:
        """Score given bundles with the same objective, best first; equal ones stay in the order given.

        Args:
            bundles: each distinct rows with the context among them and at least one more.
            constraints: bundles that break one, lack a required slot or add a forbidden one are left out; None keeps
                all bundles.
        Raises:
            ValueError: a bundle lacks the context, or has nothing besides.
        """
        how = options or Options()
        given = self._distinct(context)
        added = []
        for bundle in bundles:
            rows = self._distinct(bundle)
            if not set(given) < set(rows):
                raise ValueError(f"Every bundle must hold the context {given} and more, found {rows}.")
            added.append(tuple(row for row in rows if row not in given))
        if constraints is not None:
            request = self._request(given, constraints, how)
            added = [rows for rows in added if self._keeps(request, rows, constraints.size)]
        scene = self._scene(relevance, compatibility, how)
        ranked = sorted(scene.judge(given, added), key=lambda one: -one.score)
        return [self._composition(given, one, scene) for one in ranked]

    def completions(
        self, contexts: Sequence[Rows], relevance: NDArray[np.floating[Any]], beside: NDArray[np.floating[Any]] | None
    ) -> dict[str, NDArray[np.float64]]:
        """Return the parts of the objective, unweighed, of each context with any one item more.

        Args:
            contexts: Q arrays of distinct rows.
            relevance, beside: (Q, N) scores; None for none.
        Returns:
            "relevance", "compatibility" and "slots", (Q, N) each. Redundancy is no question of what fits.
        """
        zero = np.zeros((len(contexts), 1))
        logs = np.empty((len(contexts), len(self.catalog)))
        for place, rows in enumerate(contexts):
            held = self._slot_of[rows].tolist()
            of_slot = [
                self.templates.log_probability(tuple(sorted((*held, slot))))
                for slot in range(len(self.templates.names))
            ]
            logs[place] = np.array(of_slot)[self._slot_of]
        return {
            "relevance": _Scale(relevance).of(relevance),
            "compatibility": zero if beside is None else _Scale(beside[:, self._sample]).of(beside),
            "slots": logs,
        }

    def _distinct(self, rows: Sequence[int] | NDArray[np.integer[Any]]) -> tuple[int, ...]:
        found = tuple(int(row) for row in rows)
        if len(set(found)) != len(found):
            raise ValueError(f"rows must be distinct, found {list(found)}.")
        if found and not 0 <= min(found) <= max(found) < len(self.catalog):
            raise ValueError(f"rows must lie in 0..{len(self.catalog) - 1}, found {list(found)}.")
        return found

    def _scene(self, relevance: ArrayLike | None, compatibility: Compatibility | None, options: Options) -> _Scene:
        n = len(self.catalog)
        return _Scene(
            weights=options.weights or self.weights,
            relevance=None if relevance is None else _scores(relevance, (n,), "relevance"),
            compatibility=compatibility,
            options=options,
            templates=self.templates,
            slot_of=self._slot_of,
            vectors=self.vectors,
            titles=self._shelf.titles,
            sample=self._sample,
        )

    def _request(
        self,
        context: tuple[int, ...],
        constraints: Constraints,
        options: Options,
        without: frozenset[str] = frozenset(),
    ) -> _Request:
        """Turn what is asked into masks and numbers, leaving out the constraints named in `without`."""
        n_slots = len(self.templates.names)
        held = np.bincount(self._slot_of[list(context)], minlength=n_slots)
        checks = {name: check for name, check in self._shelf.checks(constraints).items() if name not in without}
        allowed = np.logical_and.reduce([np.ones(len(self.catalog), bool), *checks.values()])
        allowed[list(context)] = False
        required = {slot for slot in self.templates.required if f'required slot "{self._name(slot)}"' not in without}
        forbidden = {slot for slot in self.templates.forbidden if f'forbidden slot "{self._name(slot)}"' not in without}
        if forbidden:
            allowed &= ~np.isin(self._slot_of, list(forbidden))
        for row in context:
            if (slot := int(self._slot_of[row])) in forbidden:
                raise DataError(
                    f'"{self.catalog.titles[row]}" is in slot "{self._name(slot)}", which is forbidden. '
                    "Take it out of the context, or allow the slot."
                )
        low, high = self._sizes(len(context), constraints, options)
        if "size" in without:
            low, high = len(context) + 1, len(self.catalog)
        if options.mode == "substitute":
            if not context:
                raise DataError("There is nothing to substitute: the context is empty. Give at least one item.")
            room, required = np.where(held > 0, held + high, 0), set()
        else:
            room = np.maximum(self.templates.most, held)
        shelves = [
            rows[allowed[rows]] if room[slot] > held[slot] else rows[:0] for slot, rows in enumerate(self._rows_of)
        ]
        room = np.minimum(room, held + [len(rows) for rows in shelves])
        return _Request(
            context=context,
            allowed=allowed,
            held=held,
            shelves=shelves,
            room=room,
            required=frozenset(slot for slot in required if held[slot] == 0),
            low=low - len(context),
            high=high - len(context),
            left=self._left(context, constraints, without),
            cents=self._shelf.cents,
        )

    def _sizes(self, held: int, constraints: Constraints, options: Options) -> tuple[int, int]:
        """The fewest and most items of the whole bundle, at least one of them added."""
        if constraints.size is None:
            low, high = (held + 1, held + 1) if options.mode == "substitute" else self.templates.typical_sizes()
            return max(low, held + 1), max(high, held + 1)
        if constraints.size[1] <= held:
            raise DataError(
                f"A bundle of at most {constraints.size[1]} items was asked for, and the context has {held} already. "
                f"Ask for a size of at least {held + 1}, or give fewer items."
            )
        return max(constraints.size[0], held + 1), constraints.size[1]

    def _left(self, context: tuple[int, ...], constraints: Constraints, without: frozenset[str]) -> int | None:
        """The cents of the budget the context leaves; None without a budget."""
        if constraints.budget is None or "budget" in without:
            return None
        spent = 0
        for row in context:
            if self._shelf.cents[row] < 0:
                raise DataError(
                    f'The price of "{self.catalog.titles[row]}" in the context is not known, so a budget cannot be '
                    "kept. Give its price, or drop the budget."
                )
            spent += int(self._shelf.cents[row])
        return math.floor(constraints.budget * 100 + 1e-6) - spent

    def _name(self, slot: int) -> str:
        return self.templates.names[slot]

    def _search(self, request: _Request, scene: _Scene) -> list[tuple[int, ...]]:
        """Return added rows of bundles that keep every constraint; all of them where they are few."""
        if request.combinations <= scene.options.exact_limit:
            return list(_every(request, scene))
        plans = self._plans(request, scene.options)
        likely = [plan for plan in plans if plan[1] >= plans[0][1] - _PLAUSIBLE]
        first = None
        if scene.options.mode == "complement" and scene.tells([request.context]):
            first = _gains(request, scene, [request.context], sorted(request.free))
            request, first = _shortlisted(request, scene, first)
            likely = list(dict([*likely, *self._promising(request, scene, first)]).items())
        found = _beam(request, scene, likely, first)
        if not found and len(plans) > len(likely):
            found = _beam(request, scene, plans, first)
        return found or list(itertools.islice(_every(request, scene, _TRIES), _SPARE))

    def _around(
        self, context: tuple[int, ...], wished: Sequence[Wished], constraints: Constraints, scene: _Scene
    ) -> list[tuple[int, ...]]:
        """Find bundles that hold one item for each wish, and besides none that would answer one."""
        how = scene.options
        if how.mode == "substitute":
            raise DataError("Substitutes replace what is there; they cannot answer wishes. Ask for complements.")
        least = len(context) + len(wished)
        if constraints.size is not None and constraints.size[1] < least:
            names = ", ".join(one.name for one in wished)
            raise DataError(
                f"A bundle of at most {constraints.size[1]} items was asked for, and {names} beside the context make "
                f"{least}. Ask for a size of at least {least}, or for less."
            )
        sets = self._answering(self._request(context, replace(constraints, size=None), how), wished, scene)
        answers = np.concatenate([one.rows for one in wished]).tolist()
        rest = replace(constraints, exclude_items=(*constraints.exclude_items, *answers))
        low, high = constraints.size or self.templates.typical_sizes()
        found: list[tuple[int, ...]] = []
        bare: list[tuple[int, ...]] = []
        for added in sets:
            whole = (*context, *added)
            if self.templates.required <= set(self._slot_of[list(whole)].tolist()):
                (found if low <= least <= high else bare).append(added)
            if constraints.size is None or constraints.size[1] > least:
                request = self._request(whole, rest, how)
                found += [(*added, *more) for more in self._search(request, scene)] if request.feasible else []
        if not found and constraints.size is None:
            found = bare  # nothing can be added to them, and they are all that was asked for
        if not found:
            raise self._infeasible((*context, *sets[0]), rest, how)
        return found

    def _answering(self, request: _Request, wished: Sequence[Wished], scene: _Scene) -> list[tuple[int, ...]]:
        """Return the best sets of one allowed item for each wish, no two of them alike, within the budget."""
        how, cents = scene.options, self._shelf.cents
        shelves = [one.rows[request.allowed[one.rows]] for one in wished]
        for one, rows in zip(wished, shelves, strict=True):
            if not len(rows):
                raise DataError(
                    f"None of the {len(one.rows):,} items that answer {one.name!r} is allowed. Loosen the constraints, "
                    "or do not ask for it."
                )
        lowest = [int(cents[rows].min()) for rows in shelves]
        if request.left is not None and sum(lowest) > request.left:
            terms = " + ".join(f"{one.name} {price / 100:.2f}" for one, price in zip(wished, lowest, strict=True))
            raise DataError(
                f"The budget leaves {request.left / 100:.2f}, and the cheapest of what was asked for cost "
                f"{sum(lowest) / 100:.2f} ({terms}). Raise it to at least {sum(lowest) / 100:.2f} beside the context."
            )
        sets: list[tuple[int, ...]] = [()]
        for place, rows in enumerate(shelves):
            cheap = rows[np.argsort(cents[rows], kind="stable")[: how.per_slot if request.left is not None else 0]]
            tried = np.array(list(dict.fromkeys([*rows[: how.per_slot].tolist(), *cheap.tolist()])), np.int64)
            left = math.inf if request.left is None else request.left - sum(lowest[place + 1 :])
            grown = [
                (*held, int(row))
                for held in sets
                for row, alike in zip(tried, scene.duplicates(tried, (*request.context, *held)), strict=True)
                if row not in held and not alike and (request.left is None or int(cents[[*held, row]].sum()) <= left)
            ]
            likes = {held: float(scene.relevance_of(np.array(held, np.int64)).sum()) for held in grown}
            grown.sort(key=lambda held: (-likes[held], scene.tie_break(held)))
            sets = _each_in_half(grown, 4 * how.beam)
        if not sets:
            raise DataError(
                f"No two items that answer {' and '.join(one.name for one in wished)} go together: they are the same, "
                "alike, or cost too much. Raise near_duplicate or the budget."
            )
        judged = sorted(scene.judge(request.context, sets), key=lambda one: (-one.score, scene.tie_break(one.added)))
        return _each_in_half([one.added for one in judged], max(how.k, _SETS_KEPT))

    def _plans(self, request: _Request, options: Options) -> list[tuple[Template, float]]:
        """The slots to add, with the log-probability of the whole template; best first."""
        context = Counter({slot: int(n) for slot, n in enumerate(request.held) if n})
        held = tuple(sorted(context.elements()))
        if options.mode == "substitute":
            sizes = range(max(1, request.low), request.high + 1)
            choices = (itertools.combinations_with_replacement(sorted(context), size) for size in sizes)
            every = itertools.islice(itertools.chain.from_iterable(choices), options.plans)
            return [(added, 0.0) for added in every if not Counter(added) - request.free]
        sizes_of_all = (len(held) + request.low, len(held) + request.high)
        plans = self.templates.plans(held, request.room, sizes_of_all, options.plans)
        cheapest = request.cheapest or []
        fallback = tuple(sorted([*held, *self._slot_of[cheapest].tolist()]))
        plans.append((fallback, self.templates.log_probability(fallback)))
        return [(tuple(sorted((Counter(whole) - context).elements())), log) for whole, log in dict(plans).items()]

    def _promising(
        self, request: _Request, scene: _Scene, gains: Mapping[int, NDArray[np.float64]]
    ) -> list[tuple[Template, float]]:
        """The slots to add as the items ask for them, with the log-probability of the whole template.

        What is rare may still be what fits best: slots are added one at a time by what the best item of each that is
        not counted yet would add beside the context, and by how probable the template is.

        Args:
            gains: per slot what each item of its shelf adds beside the context, (1, items).
        """
        how, held = scene.options, np.flatnonzero(request.held)
        context = tuple(np.repeat(held, request.held[held]).tolist())
        # (S, high + 1): by slot what its best item adds, its second best and so on; nothing beyond what may be added.
        best = np.full((len(request.held), request.high + 1), -np.inf)
        for slot, values in gains.items():
            most = min(request.high, request.free[slot])
            own = np.sort(values[0][scene.best(request.shelves[slot], values[0], most)])[::-1]
            best[slot, : len(own)] = own
        grown: dict[Template, float] = {(): 0.0}  # slots added -> gain of their best items
        found: dict[Template, float] = {}
        for size in range(1, request.high + 1):
            larger: dict[Template, tuple[float, float, float]] = {}
            for slots, gain in grown.items():
                more = best[:, 0].copy()
                for slot, count in Counter(slots).items():
                    more[slot] = best[slot, count]
                for slot in np.argsort(-more, kind="stable")[: how.per_slot].tolist():
                    added = tuple(sorted((*slots, slot)))
                    if np.isfinite(more[slot]) and added not in larger:
                        log = self.templates.log_probability(tuple(sorted((*context, *added))))
                        total = gain + float(more[slot])
                        larger[added] = (total / size + scene.weights.slots * log, total, log)
            kept = sorted(larger, key=lambda one: (-larger[one][0], one))[: how.beam]
            grown = {slots: larger[slots][1] for slots in kept}
            if size >= request.low:
                found |= {slots: larger[slots][2] for slots in kept if request.required <= set(slots)}
        return list(found.items())

    def _keeps(self, request: _Request, added: tuple[int, ...], size: tuple[int, int] | None) -> bool:
        n = len(request.context) + len(added)
        fits = size is None or size[0] <= n <= size[1]
        paid = request.left is None or int(self._shelf.cents[list(added)].sum()) <= request.left
        slots = set(self._slot_of[list(added)].tolist())
        return fits and paid and bool(request.allowed[list(added)].all()) and request.required <= slots

    def _composition(self, context: tuple[int, ...], judged: _Judged, scene: _Scene) -> Composition:
        place = {slot: rank for rank, slot in enumerate(self.templates.in_order(range(len(self.templates.names))))}
        items = sorted((*context, *judged.added), key=lambda row: (place[int(self._slot_of[row])], row))
        cents = self._shelf.cents[items]
        shares = {row: (judged.relevance[i], judged.compatibility[i]) for i, row in enumerate(judged.added)}
        added = tuple(row for row in items if row in shares)
        return Composition(
            items=tuple(items),
            added=added,
            score=judged.score,
            parts=judged.parts,
            slots=tuple(self._name(int(self._slot_of[row])) for row in items),
            price=float("nan") if (cents < 0).any() else int(cents.sum()) / 100,
            evidence=tuple(self._evidence(row, context, items, *shares[row]) for row in added),
        )

    def _evidence(
        self, row: int, context: tuple[int, ...], items: list[int], relevance: float, compatibility: float
    ) -> ItemEvidence:
        others = np.array([other for other in (context or items) if other != row], np.int64)
        slot = int(self._slot_of[row])
        counts = np.zeros(len(others), np.int64) if self._history is None else co_counts(self._history, row, others)
        cosines = None if self.vectors is None else self.vectors[others] @ self.vectors[row]
        best = max(range(len(others)), key=lambda i: (counts[i], 0 if cosines is None else cosines[i]), default=None)
        if best is not None and counts[best] == 0 and (cosines is None or cosines[best] <= 0):
            best = None
        given = {int(self._slot_of[other]) for other in items if other != row} - {slot}
        rules = [rule for other in sorted(given) if (rule := self.templates.rule(other, slot)) is not None]
        return ItemEvidence(
            row=row,
            slot=self._name(slot),
            relevance=relevance,
            compatibility=compatibility,
            partner=None if best is None else int(others[best]),
            partner_count=0 if best is None else int(counts[best]),
            partner_similarity=None if best is None or cosines is None else float(cosines[best]),
            shared=self._shared(row, others),
            rule=max(rules, key=lambda rule: (rule.confidence, rule.support), default=None),
        )

    def _shared(self, row: int, others: Rows) -> tuple[tuple[str, str], ...]:
        agreed = []
        for name, values in self.catalog.attributes.items():
            value = values[row]
            if name != "stock" and value is not None and any(values[other] == value for other in others.tolist()):
                agreed.append((name, value))
        return tuple(agreed)

    def _infeasible(self, context: tuple[int, ...], constraints: Constraints, options: Options) -> DataError:
        """Find the constraints that bind by lifting them one at a time, then in pairs, and say what would help."""
        request = self._request(context, constraints, options)
        checks = self._shelf.checks(constraints)
        names = list(checks)
        names += [f'required slot "{self._name(slot)}"' for slot in sorted(request.required)]
        names += [f'forbidden slot "{self._name(slot)}"' for slot in sorted(self.templates.forbidden)]
        names += ["size"] if constraints.size is not None else []

        def helps(lifted: Iterable[str]) -> bool:
            return self._request(context, constraints, options, frozenset(lifted)).feasible

        binding: list[tuple[str, ...]] = [(name,) for name in names if helps([name])]
        if not binding:
            binding += [pair for pair in itertools.combinations(names, 2) if helps(pair)]
        size = _span(len(context) + request.low, len(context) + request.high)
        ruled_out = {name: int(np.count_nonzero(~check)) for name, check in checks.items()}

        def described(name: str) -> str:
            return f"{name} (rules out {ruled_out[name]} of {len(self.catalog)} items)" if name in ruled_out else name

        if ("budget",) in binding and request.cheapest is not None:
            rest = [described(name) for (name,) in binding if name not in ("budget", "size")]
            also = f" Lifting {' or '.join(rest)} would do as well." if rest else ""
            return DataError(self._over_budget(constraints, request, size) + also)
        said = f"No bundle of {size} items can be composed: {self._lack(request)}."
        if not binding:
            every = ", ".join(described(name) for name in names) or "none were given"
            return DataError(f"{said} Not even lifting two constraints would help. Constraints: {every}.")
        ways = "; or ".join(" and ".join(described(name) for name in way) for way in binding[:5])
        return DataError(f"{said} What binds: {ways}. Lift or loosen it.")

    def _over_budget(self, constraints: Constraints, request: _Request, size: str) -> str:
        cheapest = request.cheapest or []
        order = {slot: place for place, slot in enumerate(self.templates.in_order(range(len(self.templates.names))))}
        cheapest = sorted(cheapest, key=lambda row: order[int(self._slot_of[row])])
        spent = int(self._shelf.cents[list(request.context)].sum())
        total = spent + int(self._shelf.cents[cheapest].sum())
        terms = [f"context {spent / 100:.2f}"] if request.context else []
        terms += [f"{self._name(int(self._slot_of[row]))} {self._shelf.cents[row] / 100:.2f}" for row in cheapest]
        smaller = next(
            (low for low in range(request.low - 1, 0, -1) if replace(request, low=low, high=request.high).feasible),
            None,
        )
        fewer = len(request.context) + (smaller or 0)
        return (
            f"Budget {constraints.budget:.2f} allows no bundle of {size} items: the cheapest allowed costs "
            f"{total / 100:.2f} ({' + '.join(terms)}). Raise the budget to {total / 100:.2f}"
            + (f", or ask for {fewer} item{'s' if fewer > 1 else ''}." if smaller else ".")
        )

    def _lack(self, request: _Request) -> str:
        for slot in sorted(request.required):
            if not len(request.shelves[slot]):
                return f'slot "{self._name(slot)}" is required and no allowed item is left in it'
        if len(request.required) > request.high:
            return f"{len(request.required)} required slots are missing and at most {request.high} items may be added"
        if request.cheapest is None:
            room = int((request.room - request.held).sum())
            return (
                f"at least {request.low} items must be added, and the slots and the items allowed give room for {room}"
            )
        return "the allowed items cost more than the budget"


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
