"""Slot templates: which slots bundles are made of, how probable a combination is, and slot rules.

Owns what slot an item has, how probable a combination of slots is, which combinations are worth filling, and the rules
(support, confidence, lift) behind it. Knows nothing of scores, prices or single items.

Everything is counted from one thing, the whole templates: how many training bundles had which slots. A combination is
as probable as its own count says, backing off to pairs of slots, and these back off up the category path.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.model import CATEGORY_SEPARATOR, Catalog
from peft_combo.errors import DataError, did_you_mean

OTHER = "other"  # the slot of items with neither a slot nor a category that is known
MIN_BUNDLES = 10  # a category makes a slot of its own where at least so many training bundles hold an item of it

Template: TypeAlias = tuple[int, ...]  # slot numbers in ascending order, one for each item

_FRONTIER, _FAN = 12, 6  # growing templates: how many are kept per size, and how many slots each is tried with
_RULE_OF_THREE = 3.0
_REMEMBERED = 100_000  # log-probabilities kept, so that a second request does not compute them again
_PLANS = 1_000  # lists of plans, likewise


@dataclass(frozen=True)
class SlotRule:
    """What training bundles say of one slot beside another.

    Attributes:
        given: the slot that is there.
        slot: the slot that goes with it.
        support: training bundles with both.
        bundles: all training bundles.
        confidence: the share of the bundles with `given` that also have `slot`; not smoothed.
        lift: confidence over the share of all bundles that have `slot`; 1 is independence.
    """

    given: str
    slot: str
    support: int
    bundles: int
    confidence: float
    lift: float


@dataclass(frozen=True, eq=False)
class SlotTemplates:
    """Templates of bundles: learned by `learn`, edited by `with_rules`.

    Attributes:
        names: (S,) the slots; the last one is `OTHER`.
        paths: (S,) the category path behind a slot made from a category; () for a slot named by the catalogue.
        templates: how many training bundles had exactly these slots.
        places: (S,) where in a bundle a slot usually stands, from 0 (first) to 1 (last).
        required: slots every bundle must have.
        optional: slots that may be there or not, as if training bundles had never told.
        forbidden: slots that no added item may have.
    """

    names: tuple[str, ...]
    paths: tuple[tuple[str, ...], ...]
    templates: Mapping[Template, int]
    places: tuple[float, ...]
    required: frozenset[int] = frozenset()
    optional: frozenset[int] = frozenset()
    forbidden: frozenset[int] = frozenset()

    @classmethod
    def learn(
        cls,
        catalog: Catalog,
        bundles: Sequence[NDArray[np.integer[Any]]],
        min_bundles: int = MIN_BUNDLES,
    ) -> Self:
        """Count the templates of training bundles.

        An item has the slot the catalogue gives it. Without one its category is the slot: the leaf if at least
        `min_bundles` training bundles hold an item of it, else the nearest category above that has so many, at last
        the root.

        Args:
            catalog: N items.
            bundles: per bundle its distinct rows, in the order they were given.
            min_bundles: see above.
        Raises:
            DataError: there is no bundle with an item.
        """
        members = [np.asarray(rows, np.int64) for rows in bundles if len(rows)]
        if not members:
            raise DataError("Slot templates are learned from training bundles, found none. Give at least one bundle.")
        names, paths = _slot_names(catalog, members, min_bundles)
        slot_of = _assign(catalog, names, paths)
        templates: Counter[Template] = Counter()
        place_sum, place_count = np.zeros(len(names)), np.zeros(len(names))
        for rows in members:
            slots = slot_of[rows]
            templates[tuple(sorted(slots.tolist()))] += 1
            np.add.at(place_sum, slots, np.arange(len(rows)) / max(1, len(rows) - 1))
            np.add.at(place_count, slots, 1)
        places = np.divide(place_sum, place_count, out=np.ones(len(names)), where=place_count > 0)
        return cls(names, paths, dict(sorted(templates.items())), tuple(places.tolist()))

    def with_rules(
        self,
        required: Iterable[str] | None = None,
        optional: Iterable[str] | None = None,
        forbidden: Iterable[str] | None = None,
    ) -> SlotTemplates:
        """Return the same templates under other rules; None keeps what is set.

        Raises:
            DataError: a slot is not known, or one slot is under two rules.
        """
        edited = replace(
            self,
            required=self.required if required is None else frozenset(self.find_slot(name) for name in required),
            optional=self.optional if optional is None else frozenset(self.find_slot(name) for name in optional),
            forbidden=self.forbidden if forbidden is None else frozenset(self.find_slot(name) for name in forbidden),
        )
        rules = {"required": edited.required, "optional": edited.optional, "forbidden": edited.forbidden}
        for one, other in (("required", "optional"), ("required", "forbidden"), ("optional", "forbidden")):
            if both := rules[one] & rules[other]:
                slot = self.names[min(both)]
                raise DataError(f'Slot "{slot}" is both {one} and {other}. Take it out of one of them.')
        return edited

    def find_slot(self, name: str) -> int:
        """Return the number of a slot by its name, or by the last category of its path where only one ends so.

        Raises:
            DataError: no slot is called so.
        """
        if name in self.names:
            return self.names.index(name)
        ending = [slot for slot, path in enumerate(self.paths) if path and path[-1] == name]
        if len(ending) == 1:
            return ending[0]
        if ending:
            options = ", ".join(f'"{self.names[slot]}"' for slot in ending)
            raise DataError(f'Slot "{name}" could be any of {options}. Write the whole path.')
        shown = ", ".join(self.names[:20]) + (f" and {len(self.names) - 20} more" if len(self.names) > 20 else "")
        leaves = [path[-1] for path in self.paths if path]
        hint = did_you_mean(name, [*self.names, *leaves])
        raise DataError(f'No slot is called "{name}". Slots: {shown}. {hint}'.rstrip())

    def assign_slots(self, catalog: Catalog) -> NDArray[np.int32]:
        """Return the slot number of every item (N,); what training never met falls to a known category, or `OTHER`."""
        return _assign(catalog, self.names, self.paths)

    def log_probability(self, template: Template) -> float:
        """How usual a bundle of these slots is: the natural logarithm of its smoothed probability, at most 0.

        The count of the whole template, interpolated (Witten-Bell) with a model of pairs: the probability of the size,
        times for each slot the geometric mean of its probability given each other slot, times that of its count.
        Optional slots are left out of the template and of all it is compared with. The pair model is a
        pseudo-likelihood, so the values order templates and do not sum to 1.

        Source: Witten and Bell 1991, method C; Besag 1975 (pseudo-likelihood).
        """
        known = self._remembered.get(template)
        if known is None:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            known = self._remembered[template] = self._log_probability(template)
        return known

    @cached_property
    def conditionals(self) -> NDArray[np.float64]:
        """(S, S) log P(column is present | row is present), smoothed and never 0 or 1 in probability.

        P(b) is (count + 1/2) / (bundles + 1). P(b | a) is (count(a, b) + t P(b | above a)) / (count(a) + t) with t the
        number of slots ever seen beside a (Witten-Bell), and "above a" the next category up a's path, at last P(b). A
        category that holds b itself tells nothing on b beside a and is skipped.
        """
        weights = self._weights
        present = self._table > 0  # (T, S)
        beside, alone = self._beside, self.support.astype(np.float64)
        base = (alone + 0.5) / (self.bundles + 1)
        logs = np.empty((len(self.names), len(self.names)))
        above: dict[tuple[str, ...], NDArray[np.float64]] = {(): base}
        for slot, path in enumerate(self.paths):
            for depth in range(1, len(path)):
                if path[:depth] not in above:
                    under = np.array([other[:depth] == path[:depth] for other in self.paths])
                    any_under = present[:, under].any(axis=1)
                    counts = np.where(under, 0, (weights * any_under) @ present)
                    blended = _witten_bell(counts, float(weights @ any_under), above[path[: depth - 1]])
                    above[path[:depth]] = np.where(under, above[path[: depth - 1]], blended)
            logs[slot] = np.log(_witten_bell(beside[slot], float(alone[slot]), above[path[:-1]], but=slot))
        logs.flags.writeable = False
        return logs

    @cached_property
    def support(self) -> NDArray[np.int64]:
        """(S,) the training bundles that have each slot."""
        support: NDArray[np.int64] = np.diagonal(self._beside).astype(np.int64)
        return support

    @cached_property
    def most(self) -> NDArray[np.int64]:
        """(S,) the most items of one slot a bundle may have, at least 1.

        Those of any training bundle with the slot, and more where too few have it to tell: a count that is met over all
        slots is ruled out for one where, if it were as usual there, three bundles at least should have shown it.

        Source: Hanley and Lippman-Hand 1983, the rule of three: no event among n bounds its rate by 3 / n, at 95 %.
        """
        own = np.maximum(1, self._table.max(axis=0)).astype(np.int64)
        # (C + 1,) the share of all slots of all bundles that have at least so many items.
        counts = np.bincount(
            self._table[self._table > 0], np.broadcast_to(self._weights[:, None], self._table.shape)[self._table > 0]
        )
        at_least = counts[::-1].cumsum()[::-1] / counts.sum()
        shown = self.support[:, None] * at_least  # (S, C + 1) bundles that should have shown it
        untold = np.where(shown < _RULE_OF_THREE, np.arange(len(at_least)), 0).max(axis=1)
        most: NDArray[np.int64] = np.maximum(own, np.where(self.support > 0, untold, 1))
        return most

    @cached_property
    def bundles(self) -> int:
        """The number of training bundles."""
        return sum(self.templates.values())

    def find_typical_sizes(self, low: float = 0.05, high: float = 0.95) -> tuple[int, int]:
        """The sizes between these quantiles of the training bundles, both included."""
        sizes = np.repeat([len(template) for template in self.templates], self._weights.astype(np.int64))
        lowest, highest = np.quantile(sizes, [low, high], method="inverted_cdf")
        return int(lowest), int(highest)

    def order_slots(self, slots: Iterable[int]) -> list[int]:
        """Slots as training bundles usually list them."""
        return sorted(slots, key=lambda slot: (self.places[slot], slot))

    def find_rule(self, given: int, slot: int) -> SlotRule | None:
        """What training bundles say of `slot` beside `given` (numbers); None where they never had both."""
        together = int(self._beside[given, slot])
        if together == 0 or given == slot:
            return None
        confidence = together / int(self.support[given])
        return SlotRule(
            given=self.names[given],
            slot=self.names[slot],
            support=together,
            bundles=self.bundles,
            confidence=confidence,
            lift=confidence * self.bundles / int(self.support[slot]),
        )

    def list_plans(
        self, held: Template, room: NDArray[np.int64], sizes: tuple[int, int], limit: int = 32
    ) -> list[tuple[Template, float]]:
        """Find whole templates that hold `held` and more, most probable first.

        Those of training bundles, and those grown from `held` and the required slots a slot at a time.

        Args:
            held: the slots that are there already.
            room: (S,) the most items of each slot the bundle may have, those of `held` included.
            sizes: fewest and most items of the bundle.
            limit: how many to return.
        Returns:
            Pairs of a template and its `log_probability`.
        """
        key = (held, room.tobytes(), sizes, limit)
        known = self._plans.get(key)
        if known is None:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            known = self._plans[key] = self._list_plans(held, room, sizes, limit)
        return list(known)

    def _list_plans(
        self, held: Template, room: NDArray[np.int64], sizes: tuple[int, int], limit: int
    ) -> list[tuple[Template, float]]:
        low, high = max(sizes[0], len(held) + 1), sizes[1]
        counts = np.bincount(np.array(held, np.int64), minlength=len(self.names))
        least = counts.copy()
        for slot in self.required:
            least[slot] = max(1, least[slot])
        if (least > np.maximum(room, counts)).any():
            return []
        found = set(self._find_seen(least, np.maximum(room, counts), low, high)[: 8 * limit])
        frontier = {tuple(np.repeat(np.arange(len(least)), least).tolist())}
        size = int(least.sum())
        while frontier and size <= high:
            if size >= low:
                found |= frontier
            grown = {larger for template in frontier for larger in self._grow(template, room)}
            frontier = set(sorted(grown, key=lambda one: (-self.log_probability(one), one))[:_FRONTIER])
            size += 1
        ranked = sorted((-self.log_probability(template), template) for template in found)
        return [(template, -cost) for cost, template in ranked[:limit]]

    @cached_property
    def _table(self) -> NDArray[np.int32]:
        """(T, S) how many items of each slot each distinct template has."""
        table = np.zeros((len(self.templates), len(self.names)), np.int32)
        for row, template in enumerate(self.templates):
            np.add.at(table[row], list(template), 1)
        return table

    @cached_property
    def _beside(self) -> NDArray[np.float64]:
        """(S, S) training bundles that have both slots; on the diagonal those that have the one."""
        present = (self._table > 0).astype(np.float64)
        return present.T @ (present * self._weights[:, None])  # (S, T) @ (T, S) -> (S, S)

    @cached_property
    def _weights(self) -> NDArray[np.float64]:
        return np.array(list(self.templates.values()), np.float64)

    @cached_property
    def _without_optional(self) -> Counter[Template]:
        """The templates as they are compared: optional slots left out."""
        counts: Counter[Template] = Counter()
        for template, n in self.templates.items():
            counts[tuple(slot for slot in template if slot not in self.optional)] += n
        return counts

    @cached_property
    def _log_sizes(self) -> NDArray[np.float64]:
        """log P(size) for the sizes 0 .. most + 1, half a bundle added to each; beyond, the last one."""
        counts = np.zeros(max(len(template) for template in self._without_optional) + 2)
        for template, n in self._without_optional.items():
            counts[len(template)] += n
        logs: NDArray[np.float64] = np.log((counts + 0.5) / (self.bundles + 0.5 * len(counts)))
        return logs

    @cached_property
    def _log_counts(self) -> tuple[dict[int, float], ...]:
        """Per slot log P(count | present), with one pseudo-bundle spread as 1/2, 1/4, 1/8 ... over the counts."""
        seen: list[Counter[int]] = [Counter() for _ in self.names]
        for template, n in self.templates.items():
            for slot, count in Counter(template).items():
                seen[slot][count] += n
        return tuple(
            {count: math.log((n + 0.5**count) / (total.total() + 1)) for count, n in total.items()} for total in seen
        )

    @cached_property
    def _remembered(self) -> dict[Template, float]:
        return {}

    @cached_property
    def _plans(self) -> dict[tuple[Template, bytes, tuple[int, int], int], list[tuple[Template, float]]]:
        return {}

    def _log_probability(self, template: Template) -> float:
        kept = tuple(slot for slot in template if slot not in self.optional)
        distinct = len(self._without_optional)
        seen = self._without_optional.get(kept, 0)
        backed_off = math.log(distinct) + self._log_pairs(kept)
        total = float(np.logaddexp(math.log(seen), backed_off)) if seen else backed_off
        return min(0.0, total - math.log(self.bundles + distinct))

    def _log_pairs(self, template: Template) -> float:
        logs = float(self._log_sizes[min(len(template), len(self._log_sizes) - 1)])
        counts = Counter(template)
        slots = list(counts)
        if len(slots) == 1:
            logs += math.log((self.support[slots[0]] + 0.5) / (self.bundles + 1))
        elif slots:
            beside = self.conditionals[np.ix_(slots, slots)]
            logs += float(beside.sum() - np.trace(beside)) / (len(slots) - 1)
        return logs + sum(self._log_count(slot, count) for slot, count in counts.items())

    def _log_count(self, slot: int, count: int) -> float:
        known = self._log_counts[slot].get(count)
        return math.log(0.5**count / (int(self.support[slot]) + 1)) if known is None else known

    def _find_seen(self, least: NDArray[np.int64], most: NDArray[np.int64], low: int, high: int) -> list[Template]:
        """Templates of training bundles with at least and at most so many items per slot, the commonest first."""
        sizes = self._table.sum(axis=1)
        fits = (self._table >= least).all(axis=1) & (self._table <= most).all(axis=1) & (sizes >= low) & (sizes <= high)
        rows = np.flatnonzero(fits)
        return [self._listed[row] for row in rows[np.argsort(-self._weights[rows], kind="stable")]]

    @cached_property
    def _listed(self) -> tuple[Template, ...]:
        return tuple(self.templates)

    def _grow(self, template: Template, room: NDArray[np.int64]) -> Iterable[Template]:
        """The template with one slot more, for the few slots that go best with it."""
        counts = np.bincount(np.array(template, np.int64), minlength=len(self.names))
        slots = np.flatnonzero(counts)
        if len(slots):
            fit = self.conditionals[slots].mean(axis=0)
            for slot in slots:
                fit[slot] = self._log_count(int(slot), int(counts[slot]) + 1)
        else:
            fit = np.log(self.support + 0.5)
        fit = np.where(counts < room, fit, -np.inf)
        best = np.argsort(-fit, kind="stable")[:_FAN]
        return (tuple(sorted((*template, int(slot)))) for slot in best if np.isfinite(fit[slot]))


def _slot_names(
    catalog: Catalog, bundles: list[NDArray[np.int64]], min_bundles: int
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return the slots of a catalogue and the category path behind each, `OTHER` last."""
    named = sorted({slot for slot in catalog.slots if slot} - {OTHER})
    held: Counter[tuple[str, ...]] = Counter()
    for rows in bundles:
        paths = [catalog.categories[row] for row in rows.tolist() if not catalog.slots[row]]
        held.update({path[:depth] for path in paths for depth in range(1, len(path) + 1)})
    roots = {catalog.categories[row][:1] for row, slot in enumerate(catalog.slots) if not slot} - {()}
    kept = roots | {path for path, n in held.items() if n >= min_bundles}
    from_categories = {CATEGORY_SEPARATOR.join(path): path for path in sorted(kept)}
    taken = {*named, OTHER}
    added = {name: path for name, path in from_categories.items() if name not in taken}
    return (*named, *added, OTHER), (*((),) * len(named), *added.values(), ())


def _assign(catalog: Catalog, names: Sequence[str], paths: Sequence[tuple[str, ...]]) -> NDArray[np.int32]:
    by_name = {name: slot for slot, name in enumerate(names)}
    other = len(names) - 1

    known: dict[tuple[str, ...], int] = {}

    def by_path(path: tuple[str, ...]) -> int:
        if path not in known:
            above = (by_name.get(CATEGORY_SEPARATOR.join(path[:depth])) for depth in range(len(path), 0, -1))
            known[path] = next((slot for slot in above if slot is not None), other)
        return known[path]

    return np.fromiter(
        (
            by_name[slot] if slot in by_name else by_path(path)
            for slot, path in zip(catalog.slots, catalog.categories, strict=True)
        ),
        np.int32,
        count=len(catalog),
    )


def _witten_bell(
    counts: NDArray[np.float64], total: float, lower: NDArray[np.float64], but: int | None = None
) -> NDArray[np.float64]:
    """Blend (S,) counts out of `total` with the probabilities `lower`, which weigh as much as there are kinds seen."""
    kinds = np.count_nonzero(counts) - (but is not None and counts[but] > 0)
    weight = max(1, int(kinds))
    blended: NDArray[np.float64] = (counts + weight * lower) / (total + weight)
    return blended
