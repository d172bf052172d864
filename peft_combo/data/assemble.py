"""Assembly of a dataset from what a reader returned: filters, bundles from baskets, sizes, sampling.

Owns the steps every source shares, in their order. Knows nothing of files or layouts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.language import has_han
from peft_combo.data.language.chinese import has_words as has_chinese_words
from peft_combo.data.model import CATEGORY_SEPARATOR, Bundles, Catalog, Dataset, Interactions
from peft_combo.data.sessions import Sessions
from peft_combo.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from peft_combo.data.knowledge.rule_set import Knowledge
    from peft_combo.recipe.model import DataConfig


Needs = Literal["items", "interactions", "bundles"]
"""What must be there beside the items. What is there is read whoever asks, so that one source is one dataset."""


@dataclass(frozen=True, eq=False)
class Found:
    """What a reader hands over: whole, checked, unfiltered.

    Attributes:
        basket_ids: outside ids of the baskets; `interactions.baskets` holds places in it.
        bundles: made bundles; None where the source has only baskets.
        origin: what to name in messages ("interactions.csv").
        knowledge: rules and relations of its folder; None where it has none.
    """

    name: str
    catalog: Catalog
    interactions: Interactions | None
    basket_ids: Sequence[str]
    bundles: Bundles | None
    notes: tuple[str, ...] = ()
    origin: str = "the data"
    sessions: Sessions | None = None
    knowledge: Knowledge | None = None


def assemble(found: Found, config: DataConfig, needs: Needs) -> Dataset:
    """Apply the filters of `config` and return the dataset; without bundles where there are none and none are needed.

    Raises:
        DataError: the category filter matches nothing, or no usable bundle (or no interaction) is left and it is
            needed.
    """
    return replace(_build_dataset(found, config, needs), knowledge=found.knowledge)


def _build_dataset(found: Found, config: DataConfig, needs: Needs) -> Dataset:
    notes = list(found.notes)
    if config.language != "auto":
        found = replace(found, catalog=replace(found.catalog, language=config.language))
    chinese = sum(map(has_han, found.catalog.titles)) if config.language in ("auto", "chinese") else 0
    if chinese and not has_chinese_words():
        notes.append(
            f"{chinese:,} titles are Chinese, whose words are told by pairs of characters: pip install "
            "'peft-combo[chinese]' finds words"
        )
    if config.category_filter is not None:
        rows = _rows_under(found.catalog, config.category_filter)
        notes.append(f"{len(rows):,} of {len(found.catalog):,} items lie under {config.category_filter!r}")
        found = _restrict(found, rows)

    if config.merge_variants:
        texts = found.catalog.texts(config.text)
        first = {text: row for row, text in reversed(list(enumerate(texts)))}
        rows = np.array(sorted(first.values()), np.int64)
        notes.append(f"{len(texts):,} items merged into {len(rows):,} by their text")
        new_row = np.searchsorted(rows, [first[text] for text in texts]).astype(np.int32)
        found = _list_moved(found, rows, new_row)

    if needs == "interactions" and (found.interactions is None or not len(found.interactions)):
        raise DataError(
            f"{found.name} has no interactions{' of the items that are left' if notes else ''}, and they are what is "
            "learned from. Add an interactions table with user_id and item_id, or loosen the filters."
        )
    from_baskets = config.bundles_from == "baskets" or (config.bundles_from == "auto" and found.bundles is None)
    if needs != "bundles" and not (_has_baskets(found) if from_baskets else found.bundles is not None):
        return Dataset.build(found.name, found.catalog, found.interactions, Bundles.build([], []), notes, config.text)
    if from_baskets:
        if config.min_item_support > 1:
            rows = _filter_supported(found, config.min_item_support)
            notes.append(
                f"{len(rows):,} of {len(found.catalog):,} items occur in {config.min_item_support} baskets or more"
            )
            found = _restrict(found, rows)
        bundles = _from_baskets(found, config.min_bundle_size, config.max_bundle_size, notes)
    elif found.bundles is None:
        raise DataError(
            f"data.bundles_from is bundles, but {found.origin} has none. Add a bundles table, or set it to baskets."
        )
    else:
        bundles = _of_size(found.bundles, config.min_bundle_size, config.max_bundle_size, notes)
    if config.max_bundles is not None and len(bundles) > config.max_bundles:
        notes.append(f"{config.max_bundles:,} of {len(bundles):,} bundles sampled by a hash of their id")
        bundles = _sample(bundles, config.max_bundles)
    if needs == "bundles" and not len(bundles):
        kind = "baskets" if from_baskets else "bundles"
        raise DataError(
            f"{found.origin} has no usable bundle: none of its {kind} has {config.min_bundle_size} to "
            f"{config.max_bundle_size} distinct items of the catalogue. "
            + (f"Also: {'; '.join(notes)}. " if notes else "")
            + "Change data.min_bundle_size or data.max_bundle_size, or loosen the filters."
        )
    return Dataset.build(
        found.name, found.catalog, found.interactions, bundles, notes, config.text, found.sessions
    )  # fmt: skip


def _rows_under(catalog: Catalog, category_filter: str) -> NDArray[np.int64]:
    """Return the rows whose category path starts with the filter's names, however they are cased."""
    wanted = tuple(part.strip().casefold() for part in category_filter.split(CATEGORY_SEPARATOR.strip()))
    folded: dict[tuple[str, ...], bool] = {}
    for path in set(catalog.categories):
        folded[path] = tuple(part.casefold() for part in path[: len(wanted)]) == wanted
    rows = np.flatnonzero([folded[path] for path in catalog.categories])
    if not len(rows):
        known = sorted({CATEGORY_SEPARATOR.join(path[:depth]) for path in folded for depth in range(1, len(path) + 1)})
        top = sorted({path[0] for path in folded if path})
        raise DataError(
            f"No item lies under data.category_filter {category_filter!r}. "
            + (f"Top categories: {', '.join(top[:12])}. " if top else "The items have no categories. ")
            + did_you_mean(category_filter, known)
        )
    return rows


def _restrict(found: Found, rows: NDArray[np.int64]) -> Found:
    """Keep these items, and of interactions and bundles what concerns them."""
    new_row = np.full(len(found.catalog), -1, np.int32)
    new_row[rows] = np.arange(len(rows), dtype=np.int32)
    return _list_moved(found, rows, new_row)


def _list_moved(found: Found, rows: NDArray[np.int64], new_row: NDArray[np.int32]) -> Found:
    """Make `rows` the catalogue; `new_row` says where each old item went, -1 for nowhere."""
    interactions = found.interactions
    if interactions is not None:
        kept = interactions.take(new_row[interactions.items] >= 0)
        present = np.unique(kept.users[kept.users >= 0])
        place = np.full(len(interactions.user_ids) + 1, -1, np.int32)  # the last place answers for -1
        place[present] = np.arange(len(present), dtype=np.int32)
        interactions = replace(
            kept,
            user_ids=tuple(interactions.user_ids[user] for user in present),
            users=place[kept.users],
            items=new_row[kept.items],
        )
    bundles = found.bundles
    if bundles is not None:
        bundles = replace(bundles, items=_move(bundles.items, new_row))
    sessions = found.sessions
    if sessions is not None:
        sessions = replace(sessions, items=_move(sessions.items, new_row))
    return replace(
        found, catalog=found.catalog.take(rows), interactions=interactions, bundles=bundles, sessions=sessions
    )


def _move(sets: Sequence[NDArray[np.int32]], new_row: NDArray[np.int32]) -> tuple[NDArray[np.int32], ...]:
    """Return sets of items at their new rows, without those that went nowhere."""
    return tuple(_distinct(moved[moved >= 0]) for members in sets for moved in [new_row[members]])


def _distinct(rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """Drop repeats and keep the order of first appearance."""
    _, first = np.unique(rows, return_index=True)
    return rows[np.sort(first)]


def _has_baskets(found: Found) -> bool:
    return found.interactions is not None and bool((found.interactions.baskets >= 0).any())


def _basket_items(found: Found) -> NDArray[np.int64]:
    """Return (P, 2) distinct (basket, item) pairs in ascending order."""
    interactions = found.interactions
    if interactions is None or not _has_baskets(found):
        raise DataError(
            f"Bundles are to be made from baskets, but {found.origin} has no basket ids. "
            "Give interactions a basket_id column, or a bundles table."
        )
    return list_basket_items(interactions, len(found.catalog))


def list_basket_items(interactions: Interactions, n_items: int) -> NDArray[np.int64]:
    """Return (P, 2) distinct (basket, item) pairs in ascending order; what has no basket is left out."""
    known = interactions.baskets >= 0
    pairs = np.sort(interactions.baskets[known].astype(np.int64) * n_items + interactions.items[known])
    # np.unique is ten times slower on a million rows
    pairs = pairs[np.concatenate([[True], pairs[1:] != pairs[:-1]])[: len(pairs)]]
    return np.stack([pairs // n_items, pairs % n_items], axis=1)


def _filter_supported(found: Found, least: int) -> NDArray[np.int64]:
    pairs = _basket_items(found)
    return np.flatnonzero(np.bincount(pairs[:, 1], minlength=len(found.catalog)) >= least)


def _from_baskets(found: Found, smallest: int, largest: int, notes: list[str]) -> Bundles:
    """Make a bundle of every basket with a suitable number of distinct items."""
    pairs = _basket_items(found)
    interactions = found.interactions
    assert interactions is not None  # _basket_items has refused it
    baskets, starts, sizes = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    suitable = (sizes >= smallest) & (sizes <= largest)
    notes.append(
        f"{int(suitable.sum()):,} of {len(baskets):,} baskets have {smallest} to {largest} distinct items "
        f"({int((sizes < smallest).sum()):,} are smaller, {int((sizes > largest).sum()):,} larger)"
    )
    # The first row of a basket tells its owner; its earliest time is the bundle's.
    known = np.flatnonzero(interactions.baskets >= 0)
    _, first = np.unique(interactions.baskets[known], return_index=True)
    owners = interactions.users[known[first]]
    times = np.full(len(baskets), np.inf)
    np.fmin.at(times, np.searchsorted(baskets, interactions.baskets[known]), interactions.times[known])
    times[np.isinf(times)] = np.nan
    chosen = np.flatnonzero(suitable)
    return Bundles.build(
        bundle_ids=[found.basket_ids[baskets[row]] for row in chosen],
        items=[pairs[starts[row] : starts[row] + sizes[row], 1].astype(np.int32) for row in chosen],
        owners=[interactions.user_ids[owners[row]] if owners[row] >= 0 else None for row in chosen],
        times=times[chosen],
        baskets=baskets[chosen],
    )


def _of_size(bundles: Bundles, smallest: int, largest: int, notes: list[str]) -> Bundles:
    small, large = bundles.sizes < smallest, bundles.sizes > largest
    for count, problem in ((small.sum(), f"fewer than {smallest}"), (large.sum(), f"more than {largest}")):
        if count:
            notes.append(f"{count:,} of {len(bundles):,} bundles left out: {problem} distinct items")
    return bundles.take(np.flatnonzero(~small & ~large))


def _sample(bundles: Bundles, n: int) -> Bundles:
    """Keep the `n` bundles whose ids hash lowest: which ones does not depend on their order."""
    ranks = [hashlib.sha256(bundle_id.encode("utf-8", "surrogatepass")).digest() for bundle_id in bundles.bundle_ids]
    lowest = sorted(range(len(bundles)), key=ranks.__getitem__)[:n]
    return bundles.take(sorted(lowest))
