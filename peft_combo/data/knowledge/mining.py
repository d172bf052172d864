"""Rules mined from bundles: what bundles with one kind of item hold or avoid more than chance, proposed for rules.yaml.

Owns the kinds of items that rules may speak of, the counts behind a rule and the test that it is more than luck. Which
rules act is for who pastes them.

Every pair of kinds is counted, as Apriori (Agrawal and Srikant 1994) does with itemsets of two: support is the share of
bundles with both, confidence that of those with the first which have the second, lift confidence over what chance
gives. For two kinds chance is independence of bundles: Fisher's exact test. Whether items of a bundle match in an
attribute is compared with items drawn at random (as `composing.agreement` counts them), by a binomial test over
bundles. Rules are kept where the test survives Bonferroni's correction for all pairs and attributes that were counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats

from peft_combo.data.knowledge.rules import ItemSelector, Rule
from peft_combo.data.model import CATEGORY_SEPARATOR, Catalog, Dataset
from peft_combo.data.traits import Traits
from peft_combo.errors import DataError

_SOFT = 1.0  # weight of a proposed rule that not every bundle keeps, or that is not sure
_SURE = 0.95  # lower bound from which a rule that every bundle keeps is proposed as a hard one
_MOST_KINDS = 2_000  # the most frequent are counted; pairs grow with the square

Kind = tuple[Literal["category", "slot", "attribute", "item"], str, str]


@dataclass(frozen=True)
class MinedRule:
    """A rule with what was counted for it.

    Attributes:
        rule: hard where every bundle keeps it that it is about and these are enough to be sure, else soft.
        bundles: that the rule is about. kept: of them that keep it.
        support: share of all bundles that are about it and keep it.
        confidence: kept / bundles. low, high: Wilson 1927 interval of it, 95 %.
        chance: the share that chance gives. lift: confidence over it. p: of the test, times the number of tests.
    """

    rule: Rule
    bundles: int
    kept: int
    support: float
    confidence: float
    low: float
    high: float
    chance: float
    lift: float
    p: float


def mine_rules(
    dataset: Dataset, rows: Sequence[int] | NDArray[np.integer[Any]] | None = None, *, min_support: float = 0.01,
    min_confidence: float = 0.8, most: int = 30, level: float = 0.05,
) -> list[MinedRule]:  # fmt: skip
    """Propose rules that bundles keep, the surest first.

    Args:
        rows: bundles that are counted, for example those of training; None for all.
        min_support: least share of bundles a rule is kept in and about; of one that excludes, least share it is about.
        min_confidence: least share of the bundles it is about that keep a rule.
        most: at most so many. level: of all tests together.
    Raises:
        DataError: there are no bundles to count.
    """
    members = [dataset.bundles.items[int(row)] for row in (range(len(dataset.bundles)) if rows is None else rows)]
    members = [own for own in members if len(own) > 1]
    if not members:
        raise DataError(f"{dataset.name!r} has no bundle of two items or more, and rules are counted in these.")
    least = max(2, int(np.ceil(min_support * len(members))))
    traits = Traits.of(dataset.catalog)
    counted, tests = _count_pairs(_list_kinds(dataset.catalog, traits, members, least), least, min_confidence)
    counted += _count_matches(traits, members, least)
    tests += len(traits.names)
    rules = []
    for one in counted:
        confidence, p = one.kept / one.bundles, min(1.0, one.p * tests)
        if p < level and confidence >= min_confidence:
            low, high = wilson_interval(one.kept, one.bundles)
            sure = one.kept == one.bundles and low >= _SURE
            rule = one.rule if sure else one.rule.model_copy(update={"weight": _SOFT})
            support = one.kept / len(members)
            lift = confidence / one.chance
            rules.append(MinedRule(rule, one.bundles, one.kept, support, confidence, low, high, one.chance, lift, p))
    order = {"matches": 0, "requires": 1, "excludes": 2}
    # What is surely above chance by most: nearly every bundle excludes what is rare, and that says little.
    rules.sort(key=lambda one: (one.chance - one.low, order[one.rule.kind], str(one.rule)))
    return _drop_implied(rules)[:most]


def wilson_interval(hits: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a share (Wilson 1927)."""
    found = stats.binomtest(hits, of).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def _list_kinds(catalog: Catalog, traits: Traits, members: Sequence[NDArray[Any]], least: int) -> _Kinds:
    """Return the kinds of items that enough bundles hold, the most frequent of many."""
    kinds: dict[Kind, list[int]] = {}
    for row, path in enumerate(catalog.categories):
        for depth in range(len(path)):
            kinds.setdefault(("category", "", CATEGORY_SEPARATOR.join(path[: depth + 1])), []).append(row)
    for row, slot in enumerate(catalog.slots):
        if slot:
            kinds.setdefault(("slot", "", slot), []).append(row)
    for place, name in enumerate(traits.names):
        if name.startswith("category level"):
            continue
        for row in np.flatnonzero(traits.codes[place] >= 0).tolist():
            kinds.setdefault(("attribute", name, traits.values[place][traits.codes[place, row]]), []).append(row)
    held = np.bincount(np.concatenate(members), minlength=len(catalog))
    for row in np.flatnonzero(held >= least).tolist():
        kinds[("item", "", catalog.item_ids[row])] = [row]
    names = list(kinds)
    of_kind: Any = sparse.csr_array(
        (
            np.ones(sum(map(len, kinds.values())), np.int32),
            (np.concatenate(list(kinds.values())), np.repeat(np.arange(len(names)), list(map(len, kinds.values())))),
        ),
        shape=(len(catalog), len(names)),
    )  # fmt: skip
    owner = np.repeat(np.arange(len(members)), [len(own) for own in members])
    cells = (np.ones(len(owner), np.int32), (owner, np.concatenate(members)))
    counts: Any = sparse.csr_array(cells, shape=(len(members), len(catalog))) @ of_kind
    holders = np.asarray((counts > 0).sum(axis=0)).ravel()
    kept = np.flatnonzero(holders >= least)
    kept = np.sort(kept[np.argsort(-holders[kept], kind="stable")[:_MOST_KINDS]])
    own = of_kind[:, kept]
    return _Kinds(
        [names[place] for place in kept.tolist()], (counts[:, kept] > 0).toarray().astype(np.float64),
        (own.T @ own).toarray() > 0,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Kinds:
    """Kinds of items that rules may speak of: K names, (B, K) which bundles hold one, (K, K) which share an item."""

    names: list[Kind]
    present: NDArray[np.float64]
    overlap: NDArray[np.bool_]


@dataclass(frozen=True)
class _Counted:
    """A rule with its counts, the share that chance gives, and the p-value of one test."""

    rule: Rule
    bundles: int
    kept: int
    chance: float
    p: float


def _count_pairs(kinds: _Kinds, least: int, min_confidence: float) -> tuple[list[_Counted], int]:
    """Count every ordered pair of kinds: bundles with the first that hold, or lack, the second beside it.

    Kinds that share an item are no pair: one item would meet, or break, such a rule by itself.

    Returns:
        Those that enough bundles keep, more than by chance, and how many pairs were counted.
    """
    n = len(kinds.present)
    both = kinds.present.T @ kinds.present
    holders = np.diag(both)
    pairs = ~kinds.overlap & (holders[:, None] >= least)
    found: list[_Counted] = []
    for held in (True, False):
        table = both if held else holders[:, None] - both
        chance = np.broadcast_to(holders / n if held else 1 - holders / n, both.shape)
        share = table / np.maximum(holders[:, None], 1)
        worth = pairs & (share >= min_confidence) & (share > chance)
        worth &= both >= least if held else np.triu(np.ones_like(worth))  # "a excludes b" is "b excludes a"
        first, second = np.nonzero(worth)
        x, size, other = both[first, second], holders[first], holders[second]
        tail = stats.hypergeom.sf(x - 1, n, other, size) if held else stats.hypergeom.cdf(x, n, other, size)
        p = np.atleast_1d(tail)
        for place, (one, two) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            target = _select(kinds.names[two])
            rule = Rule(
                when=_select(kinds.names[one]), requires=target if held else None, excludes=None if held else target
            )
            found.append(
                _Counted(rule, int(size[place]), int(table[one, two]), float(chance[one, two]), float(p[place]))
            )
    return found, int(np.count_nonzero(pairs)) * 2


def _count_matches(traits: Traits, members: Sequence[NDArray[Any]], least: int) -> list[_Counted]:
    """Count bundles whose items have one value of an attribute, of those where two or more are known."""
    found: list[_Counted] = []
    rng = np.random.default_rng(0)
    items = np.concatenate(members)
    for place, name in enumerate(traits.names):
        if name.startswith("category level"):
            continue
        codes = traits.codes[place]
        known = [own for own in (codes[rows][codes[rows] >= 0] for rows in members) if len(own) > 1]
        if len(known) < least:
            continue
        kept = sum(len(set(own.tolist())) == 1 for own in known)
        # Chance: as many values for each bundle, drawn from those of all bundles.
        pool = codes[items][codes[items] >= 0]
        drawn = [np.ptp(rng.choice(pool, (50, len(own))), axis=1) == 0 for own in known]
        chance = float(np.mean(drawn))
        if kept < least or kept / len(known) <= chance:
            continue
        p = float(stats.binomtest(kept, len(known), min(max(chance, 1e-12), 1.0), alternative="greater").pvalue)
        found.append(_Counted(Rule(matches=name), len(known), kept, max(chance, 1e-12), p))
    return found


def _select(kind: Kind) -> ItemSelector:
    what, name, value = kind
    if what == "attribute":
        return ItemSelector(attributes={name: value})
    return ItemSelector(**{what: value})  # type: ignore[arg-type]


def _drop_implied(rules: Sequence[MinedRule]) -> list[MinedRule]:
    """Leave out a rule that says no more than one before it: of the same kind, about a category below and what it was.

    That a category is excluded says that those below it are, and a requirement of one below says that it is.
    """
    kept: list[MinedRule] = []
    for one in rules:
        same = [other for other in kept if other.rule.kind == one.rule.kind]
        if not any(
            _lies_under(one.rule.when, other.rule.when) and _lies_under(one.rule.target, other.rule.target)
            for other in same
        ):
            kept.append(one)
    return kept


def _lies_under(below: ItemSelector | None, above: ItemSelector | None) -> bool:
    """Say whether one selector is another, or a category below its category."""
    if below is None or above is None or below.category is None or above.category is None:
        return below == above and below is not None
    return f"{below.category}{CATEGORY_SEPARATOR}".startswith(f"{above.category}{CATEGORY_SEPARATOR}")


def describe_mined(found: Sequence[MinedRule]) -> list[str]:
    """Say in a line what was counted for each rule."""
    return [
        f"{one.kept:,} of {one.bundles:,} bundles keep it: {one.confidence:.1%} ({one.low:.1%} to {one.high:.1%}), "
        f"by chance {one.chance:.1%}, support {one.support:.1%}, lift {one.lift:.2f}, p {one.p:.2g}"
        for one in found
    ]  # fmt: skip


def to_figures(found: Sequence[MinedRule]) -> list[Mapping[str, Any]]:
    """Return mined rules as plain values that go into JSON."""
    return [
        {**{key: value for key, value in vars(one).items() if key != "rule"},
         "rule": one.rule.model_dump(exclude_none=True, exclude_defaults=True)}
        for one in found
    ]  # fmt: skip
