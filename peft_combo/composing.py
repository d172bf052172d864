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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from peft_combo.constraints import Constraints, Shelf
from peft_combo.data import Catalog
from peft_combo.errors import DataError
from peft_combo.scoring.base import SparseRows
from peft_combo.slots import SlotRule, SlotTemplates, Template

Rows: TypeAlias = "NDArray[np.int64]"
Compatibility: TypeAlias = Callable[[Sequence[Rows], Rows], "NDArray[np.floating[Any]]"]
"""Scores of items beside sets: S sets, each of ascending distinct rows (m,) with m >= 1, and candidate rows (C,), any
order, may repeat -> (S, C), NaN where it cannot say. The score of a row depends on the set and the row only."""
Mode = Literal["complement", "substitute"]

_PLAUSIBLE = 6.0  # templates e^6 times less probable than the best are filled only where the others yield nothing
_TRIES = 50_000  # steps of the last, exhaustive look for a bundle before we say there is none
_SPARE = 64  # bundles that look collects at most
_SCALE_SAMPLE = 2048  # items the mean and deviation of c are taken over; both are then known to 2 % of the deviation
_SETS_KEPT = 6  # sets of wished items that are completed, at least
_SETS = 256  # sets the scorer is asked about at once


@dataclass(frozen=True)
class Weights:
    """Of the parts of the objective; see the module. `weighing.fit_weights` finds those that bundles ask for."""

    relevance: float = 1.0
    compatibility: float = 1.0
    slots: float = 0.5
    redundancy: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise DataError(f"The weight of {name} must be a number of at least 0, found {value}.")


@dataclass(frozen=True)
class Options:
    """How to search, and what counts as good.

    Attributes:
        k: bundles to return; fewer come back where there are not so many.
        mode: "complement" adds what the template lacks; "substitute" adds items of the slots the context has.
        weights: of the objective; None takes the composer's own.
        diversity: 0 takes the k best; towards 1 the list avoids bundles like those before (maximal marginal relevance,
            Carbonell and Goldstein 1998: (1 - diversity) * score scaled to 0..1 - diversity * greatest likeness).
        near_duplicate: an added item may not have a higher cosine than this with another item of the bundle, nor the
            same title; None switches both off.
        seed: breaks ties; nothing else is random.
        beam: partial bundles kept per step.
        per_slot: items tried per slot and partial bundle.
        shortlist: items per slot the beam looks at, chosen by relevance and by compatibility with the context (with the
            first items taken, where there is neither); under a budget as many again from the cheaper ones. A slot of no
            more items is looked at whole.
        plans: templates tried.
        exact_limit: every possible bundle is looked at where there are at most so many sets of allowed items.
    """

    k: int = 5
    mode: Mode = "complement"
    weights: Weights | None = None
    diversity: float = 0.3
    near_duplicate: float | None = 0.95
    seed: int = 0
    beam: int = 16
    per_slot: int = 12
    shortlist: int = 256
    plans: int = 32
    exact_limit: int = 2_000

    def __post_init__(self) -> None:
        for name in ("k", "beam", "per_slot", "shortlist", "plans"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, found {getattr(self, name)}.")
        if not 0 <= self.diversity <= 1:
            raise DataError(f"diversity must lie in 0..1, found {self.diversity}.")
        if self.mode not in ("complement", "substitute"):
            raise DataError(f'mode must be "complement" or "substitute", found {self.mode!r}.')
        if self.near_duplicate is not None and not -1 <= self.near_duplicate <= 1:
            raise DataError(f"near_duplicate is a cosine and must lie in -1..1, found {self.near_duplicate}.")


@dataclass(frozen=True, eq=False)
class Wished:
    """A part every bundle must have: one of some items.

    Attributes:
        name: what it is called in messages.
        rows: the items that answer, distinct, the one that answers best first.
    """

    name: str
    rows: Rows


@dataclass(frozen=True)
class ItemEvidence:
    """Why an item is in a bundle: only what was counted or computed.

    Attributes:
        row: the item.
        slot: its slot.
        relevance: its share of the bundle's relevance part; the shares of all added items add up to that part.
        compatibility: its share of the compatibility part, likewise.
        partner: the item of the context (of the bundle, where there is no context) most often in one training bundle
            with this one, ties by cosine; None where neither count nor cosine is known or above 0.
        partner_count: the training bundles that hold both.
        partner_similarity: the cosine of both; None without vectors.
        shared: attributes on which it agrees with an item of the context (of the bundle): (name, value).
        rule: the slot rule with the highest confidence from another slot of the bundle to this one.
    """

    row: int
    slot: str
    relevance: float
    compatibility: float
    partner: int | None
    partner_count: int
    partner_similarity: float | None
    shared: tuple[tuple[str, str], ...]
    rule: SlotRule | None


@dataclass(frozen=True)
class Composition:
    """A bundle with its score.

    Attributes:
        items: rows, context included, as training bundles order their slots.
        added: those of `items` that are not of the context.
        score: the objective, the sum of `parts`.
        parts: "relevance", "compatibility", "slots" and "redundancy", weights and signs included.
        slots: the slot of each of `items`.
        price: of all items; NaN where one is unknown.
        evidence: one for each of `added`.
    """

    items: tuple[int, ...]
    added: tuple[int, ...]
    score: float
    parts: dict[str, float]
    slots: tuple[str, ...]
    price: float
    evidence: tuple[ItemEvidence, ...]


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
        """Which items may be added, (N,); `Constraints.allowed_items` without reading the catalogue anew.

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

    def limits(
        self,
        context: Sequence[int] | Rows = (),
        *,
        constraints: Constraints | None = None,
        options: Options | None = None,
    ) -> CompositionLimits:
        """Return what `compose` keeps to, for whoever adds one item after another (`generating.generate`).

        Raises:
            DataError: no bundle meets the constraints; the message names those that bind.
            ValueError: a row does not fit the catalogue.
        """
        wanted, how = constraints or Constraints(), options or Options()
        given = self._distinct(context)
        request = self._request(given, wanted, how)
        if not request.feasible:
            raise self._infeasible(given, wanted, how)
        size = (len(given) + request.low, len(given) + request.high)
        return CompositionLimits(self, given, replace(wanted, size=size), how)

    def objective(
        self,
        items: Sequence[int] | Rows,
        *,
        context: Sequence[int] | Rows = (),
        relevance: ArrayLike | None = None,
        compatibility: Compatibility | None = None,
        options: Options | None = None,
    ) -> dict[str, float]:
        """Return the parts of the objective of one bundle; their sum is its score.

        Raises:
            ValueError: the bundle lacks the context, or has nothing besides.
        """
        (only,) = self.rank([items], context=context, relevance=relevance, compatibility=compatibility, options=options)
        return only.parts

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


@dataclass(frozen=True, eq=False)
class CompositionLimits:
    """The constraints and slots of a request, item by item; `Composer.limits` makes it.

    That no two items be alike is not looked at.
    """

    composer: Composer
    context: tuple[int, ...]
    constraints: Constraints
    options: Options

    def followers(self, added: Sequence[int]) -> NDArray[np.bool_]:
        """Which rows may come after those added, (N,), so that some bundle still keeps every constraint."""
        held = (*self.context, *added)
        assert self.constraints.size is not None
        if len(held) >= self.constraints.size[1]:
            return np.zeros(len(self.composer.catalog), bool)
        return self.composer._request(held, self.constraints, self.options).followers()

    def complete(self, added: Sequence[int]) -> bool:
        """Whether the context with the rows added is a bundle that keeps every constraint."""
        held = [*self.context, *added]
        assert self.constraints.size is not None
        required = self.composer.templates.required if self.options.mode == "complement" else frozenset()
        return len(held) >= self.constraints.size[0] and required <= set(self.composer._slot_of[held].tolist())


def co_counts(history: SparseRows, item: int, context: Sequence[int] | Rows) -> Rows:
    """Count the rows of the history that hold both an item and each item of the context.

    Args:
        history: (B, N) training bundles, no cell stored twice; CSC answers fastest, others are converted first.
        item: a column.
        context: columns (m,).
    Returns:
        (m,) counts.
    """
    columns: Any = sparse.csc_array(history)
    holders = columns.indices[columns.indptr[item] : columns.indptr[item + 1]]
    counts = [
        np.intersect1d(holders, columns.indices[columns.indptr[other] : columns.indptr[other + 1]], True).size
        for other in np.asarray(context, np.int64).tolist()
    ]
    return np.array(counts, np.int64)


@dataclass(frozen=True)
class _Request:
    """What is asked, in masks and numbers.

    Attributes:
        allowed: (N,) True where an item may be added as far as it alone is concerned.
        held: (S,) items of the context per slot.
        shelves: per slot the rows that may be added, cheapest first.
        room: (S,) most items of a slot, context included; never more than there are.
        required: slots that must still be added.
        low, high: fewest and most items to add.
        left: cents that may be spent on them; None without a budget.
    """

    context: tuple[int, ...]
    allowed: NDArray[np.bool_]
    held: NDArray[np.int64]
    shelves: list[Rows]
    room: NDArray[np.int64]
    required: frozenset[int]
    low: int
    high: int
    left: int | None
    cents: NDArray[np.int64]

    @cached_property
    def free(self) -> Counter[int]:
        """Per slot how many items may be added."""
        return Counter({slot: int(n) for slot, n in enumerate(self.room - self.held) if n > 0})

    @property
    def fillable(self) -> bool:
        """Whether there are items enough of the slots asked for, whatever they cost."""
        slots = all(self.free[slot] for slot in self.required) and len(self.required) <= self.high
        return slots and sum(self.free.values()) >= max(1, self.low)

    @cached_property
    def cheapest(self) -> list[int] | None:
        """The cheapest rows that fill the fewest places with all required slots; None if there are not enough.

        Exact: with a most and a least number per slot, taking the cheapest that still may be taken is optimal.
        """
        if not self.fillable:
            return None
        rows = [int(self.shelves[slot][0]) for slot in sorted(self.required)]
        rest = [self.shelves[slot][slot in self.required : count] for slot, count in self.free.items()]
        pool = np.concatenate([np.empty(0, np.int64), *rest])
        missing = max(0, max(1, self.low) - len(rows))
        rows += [int(row) for row in pool[np.argsort(self.cents[pool], kind="stable")[:missing]]]
        return rows

    @property
    def feasible(self) -> bool:
        """Whether a bundle exists; that no two items be alike is not looked at."""
        if self.cheapest is None:
            return False
        return self.left is None or int(self.cents[self.cheapest].sum()) <= self.left

    def followers(self) -> NDArray[np.bool_]:
        """Which rows may be added first, (N,), so that the others can still be had."""
        found = np.zeros(len(self.allowed), bool)
        for slot in self.free:
            rows, held = self.shelves[slot], self.held.copy()
            held[slot] += 1
            rest = replace(self, held=held, required=self.required - {slot}, low=self.low - 1, high=self.high - 1)
            if not rest.required and rest.low <= 0:
                cheapest: list[int] | None = []
            elif self.left is None:
                cheapest = [] if rest.fillable else None
            else:
                cheapest = rest.cheapest
            if cheapest is None:
                continue
            if self.left is not None:
                rows = rows[self._affordable(rows, slot, rest, cheapest)]
            found[rows] = True
        return found

    def _affordable(self, rows: Rows, slot: int, rest: _Request, cheapest: list[int]) -> NDArray[np.bool_]:
        """Tell for which rows of a slot the rest of a bundle can be paid, (len(rows),); exact like `cheapest`."""
        assert self.left is not None
        fits: NDArray[np.bool_] = self.cents[rows] + int(self.cents[cheapest].sum()) <= self.left
        for place in np.flatnonzero(_among(rows, np.array(cheapest, np.int64))):
            # The row is taken itself, so the rest must do without it.
            shelves = [*rest.shelves]
            shelves[slot] = np.delete(rows, place)
            others = replace(rest, shelves=shelves).cheapest
            fits[place] = others is not None and int(self.cents[[rows[place], *others]].sum()) <= self.left
        return fits

    @cached_property
    def combinations(self) -> int:
        """How many sets of allowed items there are of the sizes asked for, whatever their slots."""
        n = sum(len(self.shelves[slot]) for slot in self.free)
        return sum(math.comb(n, size) for size in range(max(1, self.low), min(self.high, n) + 1))


class _Scale:
    """What makes scores comparable between scorers, taken from a sample of them, (S, N); see the module for how."""

    def __init__(self, sample: NDArray[np.floating[Any]]) -> None:
        values = sample.astype(np.float64)
        known = np.isfinite(values)
        count = np.maximum(known.sum(axis=1, keepdims=True), 1)
        self._lowest = np.where(known, values, np.inf).min(axis=1, keepdims=True, initial=np.inf)
        self._lowest[np.isinf(self._lowest)] = 0
        values[~known] = 0
        self._mean = values.sum(axis=1, keepdims=True) / count
        spread = np.sqrt(np.square(values - self._mean).sum(axis=1, keepdims=True, where=known) / count)
        # Equal scores say nothing; their standard deviation is only nearly 0 in floating point.
        alike = spread <= 1e-9 * np.maximum(1.0, np.abs(self._mean))
        self._factor = np.where(alike, 0, 1 / np.where(alike, 1, spread))

    def of(self, scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """(S, C) -> (S, C)."""
        values = scores.astype(np.float64)
        values = np.where(np.isfinite(values), values, self._lowest)
        comparable: NDArray[np.float64] = np.arcsinh((values - self._mean) * self._factor)
        return comparable


@lru_cache(maxsize=4)
def _order(n: int, seed: int) -> Rows:
    """Return the rows' places in a random order, (n,); kept, for requests rarely bring a seed of their own."""
    order = np.random.default_rng(seed).permutation(n)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class _Judged:
    """Added rows with their share of the parts, aligned."""

    added: tuple[int, ...]
    parts: dict[str, float]
    relevance: tuple[float, ...]
    compatibility: tuple[float, ...]

    @property
    def score(self) -> float:
        return math.fsum(self.parts.values())


class _Scene:
    """The objective for one request: what is relevant, what goes with what."""

    def __init__(
        self,
        *,
        relevance: NDArray[np.floating[Any]] | None,
        compatibility: Compatibility | None,
        options: Options,
        weights: Weights,
        templates: SlotTemplates,
        slot_of: NDArray[np.int32],
        vectors: NDArray[np.float32] | None,
        titles: NDArray[np.int64],
        sample: Rows,
    ) -> None:
        self.options = options
        self.weights = weights
        self.slot_of = slot_of
        self.order = _order(len(slot_of), options.seed)
        self._relevance = relevance
        self._compatibility = compatibility
        self._templates = templates
        self._vectors = vectors
        self._titles = titles
        self._sample = sample

    def relevance_of(self, rows: Rows) -> NDArray[np.float64]:
        if self._relevance is None:
            return np.zeros(len(rows))
        comparable: NDArray[np.float64] = self._relevance_scale.of(self._relevance[None, rows])[0]
        return comparable

    @cached_property
    def _relevance_scale(self) -> _Scale:
        assert self._relevance is not None
        return _Scale(self._relevance[None])

    def beside(self, sets: Sequence[Iterable[int]], rows: Rows) -> NDArray[np.float64]:
        """Ask the scorer for items beside sets, (S, C); 0 where there is no scorer or a set is empty."""
        found = np.zeros((len(sets), len(rows)))
        asked = [(place, np.array(sorted(one), np.int64)) for place, one in enumerate(sets) if one]
        if self._compatibility is None or not len(rows):
            return found
        both = np.concatenate([rows, self._sample])
        for start in range(0, len(asked), _SETS):
            places, some = zip(*asked[start : start + _SETS], strict=True)
            scores = _scores(self._compatibility(some, both), (len(some), len(both)), "compatibility")
            found[list(places)] = _Scale(scores[:, len(rows) :]).of(scores[:, : len(rows)])
        return found

    def tells(self, sets: Sequence[Iterable[int]]) -> bool:
        """Whether anything is known of what to put beside these sets."""
        return self._relevance is not None or (self._compatibility is not None and all(sets))

    def judge(self, context: tuple[int, ...], bundles: Sequence[tuple[int, ...]]) -> list[_Judged]:
        """Compute the objective of bundles given by their added rows; each set is asked for once."""
        bundles = [tuple(sorted(added)) for added in bundles]  # one order, so that equal sets get equal sums
        asked: dict[tuple[int, ...], list[int]] = {}
        for added in bundles:
            whole = sorted((*context, *added))
            for row in added:
                asked.setdefault(tuple(other for other in whole if other != row), []).append(row)
        rows = np.unique(np.array([row for added in bundles for row in added], np.int64))
        beside = self.beside(list(asked), rows)
        known = {
            (others, row): float(value)
            for (others, wanted), values in zip(asked.items(), beside, strict=True)
            for row, value in zip(wanted, values[np.searchsorted(rows, wanted)], strict=True)
        }
        return [self._judge(context, added, known) for added in bundles]

    def _judge(
        self, context: tuple[int, ...], added: tuple[int, ...], known: dict[tuple[tuple[int, ...], int], float]
    ) -> _Judged:
        weights, n = self.weights, len(added)
        whole = sorted((*context, *added))
        relevance = weights.relevance / n * self.relevance_of(np.array(added, np.int64))
        beside = [known[tuple(other for other in whole if other != row), row] for row in added]
        compatibility = weights.compatibility / n * np.array(beside)
        return _Judged(
            added=added,
            parts={
                "relevance": math.fsum(relevance),
                "compatibility": math.fsum(compatibility),
                "slots": self._slots(whole),
                "redundancy": -weights.redundancy * self._redundancy(added, whole),
            },
            relevance=tuple(relevance.tolist()),
            compatibility=tuple(compatibility.tolist()),
        )

    def _slots(self, whole: list[int]) -> float:
        if self.options.mode == "substitute":
            return 0.0
        template = tuple(sorted(self.slot_of[whole].tolist()))
        return self.weights.slots * self._templates.log_probability(template)

    def _redundancy(self, added: tuple[int, ...], whole: list[int]) -> float:
        if self._vectors is None or len(whole) < 2:
            return 0.0
        cosines = self._vectors[list(added)] @ self._vectors[whole].T
        cosines[np.array(added)[:, None] == np.array(whole)] = 0
        return float(np.maximum(cosines.max(axis=1), 0).mean())

    def likeness(self, rows: Rows, others: Sequence[int]) -> NDArray[np.float64]:
        """(len(rows),) the greatest cosine of each row with any of the others, at least 0."""
        if self._vectors is None or not others:
            return np.zeros(len(rows))
        cosines = (self._vectors[rows] @ self._vectors[list(others)].T).max(axis=1)
        greatest: NDArray[np.float64] = np.maximum(cosines, 0).astype(np.float64)
        return greatest

    def duplicates(self, rows: Rows, others: Sequence[int]) -> NDArray[np.bool_]:
        """(len(rows),) True where a row is nearly the same as one of the others."""
        limit = self.options.near_duplicate
        if limit is None or not others:
            return np.zeros(len(rows), bool)
        same = _among(self._titles[rows], self._titles[list(others)])
        if self._vectors is not None:
            same |= (self._vectors[rows] @ self._vectors[list(others)].T > limit).any(axis=1)
        return same

    def alike(self, one: tuple[int, ...], other: tuple[int, ...]) -> float:
        """How like two lists of added items are, 0..1: by shared items, and by cosine of the best matches."""
        shared = len(set(one) & set(other)) / len(set(one) | set(other))
        if self._vectors is None:
            return shared
        cosines = np.clip(self._vectors[list(one)] @ self._vectors[list(other)].T, 0, 1)
        return max(shared, float(cosines.max(axis=1).mean() + cosines.max(axis=0).mean()) / 2)

    def tie_break(self, rows: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted(int(self.order[row]) for row in rows))

    def best(self, rows: Rows, scores: NDArray[np.float64], count: int) -> NDArray[np.intp]:
        """Places of the `count` highest scores, best first; equal scores in the order of the seed."""
        if len(rows) > count:
            least = np.partition(scores, len(rows) - count)[len(rows) - count]
            places = np.flatnonzero(scores >= least)
        else:
            places = np.arange(len(rows))
        return places[np.lexsort((self.order[rows[places]], -scores[places]))][:count]


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
    gains = weights.relevance * scene.relevance_of(rows) + weights.compatibility * scene.beside(sets, rows)
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


def _scores(values: ArrayLike, shape: tuple[int, ...], name: str) -> NDArray[np.floating[Any]]:
    scores: NDArray[np.floating[Any]] = np.asarray(values)
    if scores.shape != shape or not np.issubdtype(scores.dtype, np.floating):
        raise ValueError(f"{name} must be {shape} floating point scores, found {scores.shape} {scores.dtype}.")
    return scores


def _among(values: Rows, few: Rows) -> NDArray[np.bool_]:
    """`np.isin` for a handful of numbers, where its sorting is most of the time."""
    among: NDArray[np.bool_] = (values[:, None] == few).any(axis=1)
    return among


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"
