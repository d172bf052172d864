"""Train, validation and test splits without leakage: by user, by time, by bundle, or with cold items.

Owns the rules of division and what of the interactions train may see. Knows nothing of files or models. Groups fall
into parts by a hash of seed and name, so adding data never moves what was there before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, assert_never

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.model import Dataset
from peft_combo.errors import DataError

if TYPE_CHECKING:
    from peft_combo.recipe.model import DataConfig


SplitBy = Literal["user", "bundle", "time", "cold-item"]

# Share of the items that are new in a cold-item split. Every train bundle that holds one is dropped: of baskets of ten,
# two in five at this share.
_NEW_ITEMS = 0.05
# What a part needs to be a part at all: something to learn from, something to measure.
_MINIMUM = {"train": 2, "valid": 1, "test": 1}
_MINUTE, _YEAR = 60.0, 31_536_000.0  # seconds


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of `Dataset.bundles` per part; no row is in two parts.

    Attributes:
        train, valid, test: (n,) int32 ascending rows of the bundles.
        dropped: held-out rows left out because their very item set occurs in train (or, for validation, in test); by
            "cold-item" also train rows that hold a new item.
        train_interactions: (e,) int64 ascending rows of `Dataset.interactions` that a scorer may be fitted on.
        digest: sha256 over the ids of each part, the rows of train_interactions and the parameters.
    """

    train: NDArray[np.int32]
    valid: NDArray[np.int32]
    test: NDArray[np.int32]
    dropped: NDArray[np.int32]
    train_interactions: NDArray[np.int64]
    digest: str


def split(
    dataset: Dataset,
    by: SplitBy = "user",
    valid_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Split:
    """Divide the bundles of `dataset`.

    By "user", all bundles of one group (the owner; a bundle without owner stands alone) go to one part. By "bundle",
    each bundle is placed alone, and users may be on both sides. By "time", the latest bundles are held out: those of
    one moment stay together, so a part may differ from its fraction. By "cold-item", as by "user", and one item in
    twenty is new: no bundle or interaction that train may see holds it, which asks for the answers nobody could count.

    Train may see an interaction unless it gives a held-out bundle away: by "user" and "cold-item", every interaction of
    a held-out user is barred; by "bundle", those of a held-out bundle's basket and those of its owner with its items;
    by "time", those not strictly earlier than the first held-out bundle, and those without a time.

    Args:
        valid_fraction: share meant for validation; 0 leaves it empty.
        test_fraction: share meant for test; 0 leaves it empty.
        seed: another seed, another division; without effect by "time".
    Raises:
        DataError: a part would be too small, or times are missing.
        ValueError: the fractions leave nothing to train on.
    """
    if min(valid_fraction, test_fraction) < 0 or valid_fraction + test_fraction >= 1:
        raise ValueError(f"fractions must be >= 0 and sum to less than 1, not {valid_fraction} and {test_fraction}")
    match by:
        case "user" | "cold-item":
            keys = [f"{seed}:{group}" for group in dataset.bundles.groups]
            in_part = _by_hash(keys, valid_fraction, test_fraction)
        case "bundle":
            keys = [f"{seed}:{bundle_id}" for bundle_id in dataset.bundles.bundle_ids]
            in_part = _by_hash(keys, valid_fraction, test_fraction)
        case "time":
            in_part = _by_time(dataset, valid_fraction, test_fraction)
        case _:
            assert_never(by)
    new_items = np.zeros(len(dataset.catalog), bool)
    if by == "cold-item":
        new_items = _positions([f"{seed}:item:{item_id}" for item_id in dataset.catalog.item_ids]) < _NEW_ITEMS
        holds_new = np.array([bool(new_items[rows].any()) for rows in dataset.bundles.items], bool)
        in_part = np.where((in_part == "train") & holds_new, "dropped", in_part)
    dropped = _find_repeated(dataset, in_part) | (in_part == "dropped")
    parts = {name: np.flatnonzero((in_part == name) & ~dropped).astype(np.int32) for name in _MINIMUM}
    _refuse_small(dataset, by, parts, {"train": 1.0, "valid": valid_fraction, "test": test_fraction})
    # Barred by all that was held out: the owner of a dropped bundle is a held-out user all the same.
    train_interactions = _visible(dataset, by, (in_part != "train") & (in_part != "dropped"), new_items)
    digest = hashlib.sha256(f"peft-combo split 1\n{by} {valid_fraction!r} {test_fraction!r} {seed}\n".encode())
    for name, rows in parts.items():
        digest.update(f"{name} {len(rows)}\n".encode())
        digest.update(
            "\n".join(sorted(dataset.bundles.bundle_ids[row] for row in rows)).encode("utf-8", "surrogatepass")
        )
    digest.update(f"interactions {len(train_interactions)}\n".encode())
    digest.update(train_interactions.astype("<i8").tobytes())
    return Split(
        train=parts["train"],
        valid=parts["valid"],
        test=parts["test"],
        dropped=np.flatnonzero(dropped).astype(np.int32),
        train_interactions=train_interactions,
        digest=digest.hexdigest(),
    )


def split_as(dataset: Dataset, config: DataConfig) -> Split:
    """Divide the bundles as a recipe says; see `split`."""
    return split(dataset, config.split, config.valid_fraction, config.test_fraction, config.split_seed)


def find_parts(groups: Sequence[str], config: DataConfig) -> NDArray[np.str_]:
    """Return the part that the bundles of each group fall into, by a split of users, whatever else is there."""
    keys = [f"{config.split_seed}:{group}" for group in groups]
    return _by_hash(keys, config.valid_fraction, config.test_fraction)


def _by_hash(keys: list[str], valid_fraction: float, test_fraction: float) -> NDArray[np.str_]:
    """Return the part of each key: its sha256 as a number in [0, 1) against the fractions."""
    positions = _positions(keys)
    return np.where(
        positions < test_fraction, "test", np.where(positions < test_fraction + valid_fraction, "valid", "train")
    )


def _positions(keys: list[str]) -> NDArray[np.float64]:
    return np.array(
        [
            int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
            for key in keys
        ],
        dtype=np.float64,
    )


def _by_time(dataset: Dataset, valid_fraction: float, test_fraction: float) -> NDArray[np.str_]:
    times = dataset.bundles.times
    unknown = int(np.isnan(times).sum())
    if unknown:
        raise DataError(
            f"A split by time needs a timestamp on every bundle; {unknown:,} of {len(times):,} bundles of "
            f"{dataset.name!r} have none. Give timestamps in bundle_meta, or set data.split to user or bundle."
        )
    ordered = np.sort(times)
    n_test = round(len(times) * test_fraction)
    n_valid = round(len(times) * valid_fraction)
    if n_test or n_valid:
        _doubt_times(dataset)
    # A part starts at a moment, so bundles of one moment are never on both sides.
    test_start = ordered[len(times) - n_test] if n_test else np.inf
    valid_start = ordered[len(times) - n_test - n_valid] if n_valid else test_start
    return np.where(times >= test_start, "test", np.where(times >= valid_start, "valid", "train"))


def _doubt_times(dataset: Dataset) -> None:
    """Refuse times that cannot be those of bundles or interactions: what lies before what would be chance."""
    bundles, events = dataset.bundles.times, dataset.interactions
    span = float(bundles.max() - bundles.min()) if len(bundles) else _YEAR
    found = f"those of the bundles span {span:,.0f} seconds" if len(bundles) > 1 and span < _MINUTE else ""
    for what, times in (("bundles", bundles), ("interactions", bundles if events is None else events.times)):
        earliest = float(np.nanmin(times)) if (~np.isnan(times)).any() else _YEAR
        if earliest < _YEAR and not found:
            found = f"those of the {what} lie in 1970 (the first is {earliest:,.0f} seconds)"
    if found:
        raise DataError(
            f"A split by time needs times; {found}, in {dataset.name!r}. Write seconds since 1970 or ISO 8601, say "
            "what they are with data.time_format, or set data.split to user or bundle."
        )


def _find_repeated(dataset: Dataset, in_part: NDArray[np.str_]) -> NDArray[np.bool_]:
    """Mark held-out bundles whose item set occurs in train, and validation bundles whose item set occurs in test."""
    item_sets = [frozenset(rows.tolist()) for rows in dataset.bundles.items]
    in_train = {items for items, part in zip(item_sets, in_part, strict=True) if part == "train"}
    in_test = {items for items, part in zip(item_sets, in_part, strict=True) if part == "test"}
    return np.array(
        [
            part != "train" and (items in in_train or (part == "valid" and items in in_test))
            for items, part in zip(item_sets, in_part, strict=True)
        ],
        dtype=bool,
    )


def _refuse_small(
    dataset: Dataset, by: SplitBy, parts: dict[str, NDArray[np.int32]], fractions: dict[str, float]
) -> None:
    short = [name for name, needed in _MINIMUM.items() if fractions[name] > 0 and len(parts[name]) < needed]
    if not short:
        return
    groups = len(set(dataset.bundles.groups))
    found = ", ".join(f"{len(rows):,} for {name}" for name, rows in parts.items())
    # Enough groups that even the smallest wanted part is empty in fewer than one split of a hundred.
    smallest = min(fraction for fraction in fractions.values() if fraction > 0)
    needed = int(np.ceil(np.log(0.01) / np.log1p(-smallest))) if smallest < 1 else 2
    of = f"{groups:,} owners" if by == "user" else "as many moments"
    remedy = f"Give at least about {needed:,} {'owners' if by == 'user' else 'bundles'}, or larger fractions"
    if by == "user" and len(dataset.bundles) > groups:
        remedy += ", or set data.split to bundle"
    elif by == "time":
        remedy += ", or set data.split to bundle where many bundles share one timestamp"
    raise DataError(
        f"{dataset.name!r} has too few bundles to split by {by}: {len(dataset.bundles):,} bundles"
        + (f" of {of}" if by == "user" else "")
        + f" gave {found}; needed are {', '.join(f'{_MINIMUM[name]} for {name}' for name in short)}. {remedy}."
    )


def _visible(
    dataset: Dataset, by: SplitBy, held_out: NDArray[np.bool_], new_items: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return the interactions that give nothing of the held-out bundles away and hold no new item."""
    interactions, bundles = dataset.interactions, dataset.bundles
    if interactions is None:
        return np.empty(0, np.int64)
    held_rows = np.flatnonzero(held_out)
    user_place = {user: place for place, user in enumerate(interactions.user_ids)}
    of_held_basket = (interactions.baskets >= 0) & np.isin(interactions.baskets, bundles.baskets[held_rows])
    match by:
        case "user" | "cold-item":
            owners = {bundles.owners[row] for row in held_rows} | {bundles.groups[row] for row in held_rows}
            barred_users = [user_place[owner] for owner in owners if owner in user_place]
            barred = of_held_basket | np.isin(interactions.users, barred_users)
        case "bundle":
            n_items = len(dataset.catalog)
            taken = [
                user_place[owner] * n_items + bundles.items[row].astype(np.int64)
                for row in held_rows
                if (owner := bundles.owners[row]) in user_place and owner is not None
            ]
            of_owner = interactions.users.astype(np.int64) * n_items + interactions.items
            gives_away = np.isin(of_owner, np.concatenate([np.empty(0, np.int64), *taken])) & (interactions.users >= 0)
            barred = of_held_basket | gives_away
        case "time":
            starts = bundles.times[held_rows]
            first_held = starts.min() if len(starts) else np.inf
            barred = ~(interactions.times < first_held)
        case _:
            assert_never(by)
    return np.flatnonzero(~barred & ~new_items[interactions.items]).astype(np.int64)
