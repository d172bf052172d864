"""Rules over a catalogue: what they say of items, which items go together, and which bundles break which rule.

Owns the meaning of rules in rows of items; names that the catalogue does not have are faults of `check_names`. Knows
nothing of scores or of how bundles are searched for.

A rule that excludes or matches is broken by a pair of items, so a bundle that breaks it does so whatever else it holds.
A rule that requires is broken by a lack, which a further item may still meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.knowledge.relations import Relations, Steps, lay_out
from peft_combo.data.knowledge.rules import RULES_FILE, ItemSelector, Rule
from peft_combo.data.model import CATEGORY_SEPARATOR, Catalog
from peft_combo.data.traits import CLASSES, Traits
from peft_combo.errors import Fault, did_you_mean

_KEPT_BYTES = 16 * 2**20  # masks of what goes with an item

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What is told of a catalogue beside its tables.

    Attributes:
        rules: of `rules.yaml`. relations: of `relations.csv`; None where there is none.
    """

    rules: tuple[Rule, ...] = ()
    relations: Relations | None = None


@dataclass(frozen=True, eq=False)
class ItemRule:
    """One rule over N items.

    Attributes:
        when: (N,) the items it is about. target: (N,) those it requires or excludes; all for one that matches.
        steps: the relation from an item of `when` to one of `target`; None where none is asked for.
        codes: (N,) the number of each item's value, -1 for none, of a rule that matches; else None.
    """

    rule: Rule
    when: Mask
    target: Mask
    steps: Steps | None
    codes: NDArray[np.int32] | None

    def find_partners(self, row: int) -> Mask:
        """Which items the target of an item of `when` may be, (N,); never the item itself."""
        found = self.target.copy()
        if self.steps is not None:
            found &= self.steps.reach(row)
        found[row] = False
        return found

    def find_askers(self, row: int) -> Mask:
        """Which items of `when` an item is a target of, (N,); never the item itself."""
        if not self.target[row]:
            return np.zeros(len(self.when), bool)
        found = self.when.copy()
        if self.steps is not None:
            found &= self.steps.reach(row, back=True)
        found[row] = False
        return found

    def find_conflicts(self, row: int) -> Mask:
        """Which items break the rule together with one, whatever else a bundle holds: (N,)."""
        if self.rule.kind == "requires":
            return np.zeros(len(self.when), bool)
        if self.codes is not None:
            if not self.when[row] or self.codes[row] < 0:
                return np.zeros(len(self.when), bool)
            differing: Mask = self.when & (self.codes >= 0) & (self.codes != self.codes[row])
            return differing
        found = self.find_askers(row)
        if self.when[row]:
            found |= self.find_partners(row)
        return found

    def list_unmet(self, rows: Sequence[int]) -> list[int]:
        """Return the items of a bundle whose requirement no other item of it meets."""
        if self.rule.kind != "requires":
            return []
        targets = [row for row in rows if self.target[row]]
        return [
            row
            for row in rows
            if self.when[row]
            and not any(
                other != row and (self.steps is None or self.steps.explain(row, other)) for other in targets
            )
        ]  # fmt: skip

    def is_broken(self, rows: Sequence[int]) -> bool:
        """Whether a bundle breaks the rule."""
        if self.rule.kind == "requires":
            return bool(self.list_unmet(rows))
        if self.codes is not None:
            return len({int(self.codes[row]) for row in rows if self.when[row]} - {-1}) > 1
        return any(self.when[row] and self.find_partners(row)[list(rows)].any() for row in rows)


@dataclass(frozen=True)
class Related:
    """A relation between an item and another; `head` where the item is its head, and the other its tail."""

    relation: str
    other: int
    head: bool


class RuleSet:
    """Rules of one catalogue of N items; safe to share between threads, for it changes nothing."""

    def __init__(self, rules: Sequence[ItemRule], n_items: int, relations: Mapping[str, Steps] | None = None) -> None:
        """Take rules over N items, and the relations between them."""
        self.rules = tuple(rules)
        self.relations = relations or {}
        self.n_items = n_items
        # An item's conflicts are asked for again and again while bundles grow.
        self.find_conflicts = lru_cache(maxsize=max(16, _KEPT_BYTES // max(1, n_items)))(self._find_conflicts)

    @classmethod
    def of(cls, knowledge: Knowledge | None, catalog: Catalog) -> Self:
        """Read the rules of a dataset over its catalogue; names that it does not have stand for no item."""
        if knowledge is None:
            return cls((), len(catalog))
        reader = _Reader(catalog, knowledge.relations)
        return cls([reader.read(rule) for rule in knowledge.rules], len(catalog), reader.steps)

    def __bool__(self) -> bool:
        return bool(self.rules)

    @cached_property
    def hard(self) -> tuple[ItemRule, ...]:
        """Those that no bundle may break."""
        return tuple(one for one in self.rules if one.rule.hard)

    @cached_property
    def soft(self) -> tuple[ItemRule, ...]:
        """Those that a bundle pays for."""
        return tuple(one for one in self.rules if not one.rule.hard)

    @cached_property
    def requiring(self) -> tuple[ItemRule, ...]:
        """The hard ones that require something."""
        return tuple(one for one in self.hard if one.rule.kind == "requires")

    def select(self, names: Iterable[str]) -> RuleSet:
        """Return the rules of these names only."""
        kept = set(names)
        return RuleSet([one for one in self.rules if str(one.rule) in kept], self.n_items, self.relations)

    def _find_conflicts(self, row: int) -> Mask:
        """Which items break a hard rule together with one, whatever else a bundle holds: (N,), not to be changed."""
        found = np.zeros(self.n_items, bool)
        for one in self.hard:
            found |= one.find_conflicts(row)
        found.flags.writeable = False
        return found

    def list_broken(self, rows: Sequence[int]) -> list[ItemRule]:
        """Return the rules that a bundle breaks, soft ones too."""
        return [one for one in self.rules if one.is_broken(rows)]

    def check_beside(self, rows: Sequence[int]) -> dict[str, Mask]:
        """Per hard rule of pairs which items may stand beside a set, by the rule's name: (N,) True where allowed."""
        checks = {}
        for one in self.hard:
            if one.rule.kind != "requires" and len(rows):
                conflicts = np.logical_or.reduce([one.find_conflicts(row) for row in rows])
                if conflicts.any():
                    checks[f'rule "{one.rule}"'] = ~conflicts
        return checks

    def check_last(self, rows: Sequence[int]) -> dict[str, Mask]:
        """Per hard rule which single items complete a set so that it is kept: (N,) True where allowed."""
        checks = self.check_beside(rows)
        for one in self.requiring:
            allowed = np.ones(self.n_items, bool)
            for row in one.list_unmet(rows):
                allowed &= one.find_partners(row)
            met = np.zeros(self.n_items, bool)  # by an item of the set
            for row in rows:
                met |= one.find_askers(row)
            allowed &= ~one.when | met
            checks[f'rule "{one.rule}"'] = allowed
        return checks

    def measure_loss(self, rows: Sequence[int]) -> float:
        """Return the weights of the soft rules that a bundle breaks, added up."""
        return sum((one.rule.weight or 0.0) for one in self.soft if one.is_broken(rows))

    def weigh_conflicts(self, rows: Sequence[int], candidates: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the weights of the soft rules of pairs that each candidate breaks beside a set, (C,)."""
        loss = np.zeros(len(candidates))
        for one in self.soft:
            if one.rule.kind != "requires" and len(rows):
                conflicts = np.logical_or.reduce([one.find_conflicts(row)[candidates] for row in rows])
                loss += (one.rule.weight or 0.0) * conflicts
        return loss

    def list_met(self, row: int, others: Sequence[int]) -> tuple[tuple[str, int], ...]:
        """Return the names of the rules by which an item is required beside others, each with one that requires it."""
        found: list[tuple[str, int]] = []
        for one in self.rules:
            if one.rule.kind == "requires":
                askers = one.find_askers(row)
                found += [(str(one.rule), other) for other in others if askers[other]][:1]
        return tuple(found)

    def list_related(self, row: int, others: Sequence[int]) -> tuple[Related, ...]:
        """Return the relations an item is in with others, of each the first."""
        found = []
        for name, steps in self.relations.items():
            ends = [(other, True) for other in others if steps.explain(row, other)]
            ends += [(other, False) for other in others if steps.explain(other, row)]
            found += [Related(name, other, head) for other, head in ends[:1]]
        return tuple(found)


class _Reader:
    """Turns selectors into masks of items."""

    def __init__(self, catalog: Catalog, relations: Relations | None) -> None:
        self.catalog = catalog
        self.steps = {} if relations is None else lay_out(relations, catalog)

    @cached_property
    def _traits(self) -> Traits:
        return Traits.of(self.catalog)

    def read(self, rule: Rule) -> ItemRule:
        n = len(self.catalog)
        when = np.ones(n, bool) if rule.when is None else self.select(rule.when)
        if rule.matches is not None:
            return ItemRule(rule, when, np.ones(n, bool), None, self.code(rule.matches)[0])
        assert rule.target is not None
        steps = None
        if rule.target.related is not None:
            empty = lay_out(Relations((("", rule.target.related, ""),)), self.catalog)
            steps = (empty | self.steps)[rule.target.related]
        return ItemRule(rule, when, self.select(rule.target), steps, None)

    def select(self, selector: ItemSelector) -> Mask:
        catalog, found = self.catalog, np.ones(len(self.catalog), bool)
        if selector.category is not None:
            wanted = split_path(selector.category)
            found &= np.array([path[: len(wanted)] == wanted for path in catalog.categories], bool)
        if selector.slot is not None:
            found &= np.array([slot == selector.slot for slot in catalog.slots], bool)
        if selector.item is not None:
            found &= np.array([item == selector.item for item in catalog.item_ids], bool)
        for name, value in selector.attributes.items():
            codes, numbers = self.code(name)
            found &= codes == numbers.get(value.casefold(), -2)
        return found

    def code(self, name: str) -> tuple[NDArray[np.int32], Mapping[str, int]]:
        """Return an attribute as numbers, -1 unknown, and the number of each value; case does not count."""
        traits = self._traits
        places = [place for place, own in enumerate(traits.names) if own.casefold() == name.casefold()]
        if places:
            return traits.codes[places[0]], {v.casefold(): code for code, v in enumerate(traits.values[places[0]])}
        columns: Any = next((v for own, v in self.catalog.attributes.items() if own.casefold() == name.casefold()), ())
        numbers: dict[str, int] = {}
        codes = np.full(len(self.catalog), -1, np.int32)
        for row, value in enumerate(columns):
            if value is not None:
                codes[row] = numbers.setdefault(value.casefold(), len(numbers))
        return codes, numbers


def split_path(category: str) -> tuple[str, ...]:
    """Return the names of a category path, "A > B"."""
    return tuple(part.strip() for part in category.split(CATEGORY_SEPARATOR.strip()))


def check_names(knowledge: Knowledge, catalog: Catalog) -> list[Fault]:
    """Return a fault for every name in rules that the catalogue or the relations do not have."""
    faults: list[Fault] = []
    reader = _Reader(catalog, knowledge.relations)
    paths = sorted(
        {CATEGORY_SEPARATOR.join(path[: d + 1]) for path in set(catalog.categories) for d in range(len(path))}
    )
    slots = sorted({slot for slot in catalog.slots if slot})
    relations = () if knowledge.relations is None else knowledge.relations.names

    def blame(where: str, what: str, name: str, known: Sequence[str]) -> None:
        shown = ", ".join(known[:8]) + (f" and {len(known) - 8:,} more" if len(known) > 8 else "")
        hint = did_you_mean(name, known) or (f"Known: {shown}." if known else "There are none.")
        faults.append(Fault(f"{RULES_FILE}: {where}", f"there is no {what} {name!r}.", hint))

    def check_attribute(where: str, name: str) -> bool:
        known = {one.casefold(): one for one in (*catalog.attributes, *CLASSES, *reader._traits.names)}
        if name.casefold() not in known:
            blame(where, "attribute", name, list(known.values()))
        return name.casefold() in known

    for place, rule in enumerate(knowledge.rules):
        if rule.matches is not None:
            check_attribute(f"rules.{place}.matches", rule.matches)
        for key, selector in (("when", rule.when), (rule.kind, rule.target)):
            if selector is None:
                continue
            where = f"rules.{place}.{key}"
            if (
                selector.category is not None
                and (path := CATEGORY_SEPARATOR.join(split_path(selector.category))) not in paths
            ):
                blame(f"{where}.category", "category", path, paths)
            if selector.slot is not None and selector.slot not in slots:
                blame(f"{where}.slot", "slot", selector.slot, slots)
            if selector.item is not None and selector.item not in catalog.index:
                blame(f"{where}.item", "item", selector.item, list(catalog.item_ids[:20_000]))
            if selector.related is not None and selector.related not in relations:
                blame(f"{where}.related", "relation", selector.related, relations)
            for name, value in selector.attributes.items():
                if check_attribute(f"{where}.attributes.{name}", name):
                    numbers = reader.code(name)[1]
                    if value.casefold() not in numbers:
                        blame(f"{where}.attributes.{name}", "value", value, sorted(numbers))
    return faults
