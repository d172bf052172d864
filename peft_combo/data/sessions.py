"""Sessions, and the bundles that are hidden in them: what a detector of bundles learns from and is measured on.

Owns which sessions belong to which part of a split, and sessions that are made up of bundles where there are none.
Knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.model import Catalog, Dataset
from peft_combo.data.splits import Split
from peft_combo.errors import DataError, shorten

# Made-up sessions: how many bundles one holds, as often as here, and items of no bundle for each of them at most.
_BUNDLES_IN_ONE, _NOISE = (1, 1, 2, 2, 2, 3, 3), 1
# Half of the items and bundles that are added lie in a leaf of what is there: others are told apart too easily.
_NEAR = 0.5


@dataclass(frozen=True, eq=False)
class Sessions:
    """What users looked at or took in one go, and the bundles that people made of it.

    Attributes:
        session_ids: outside ids, distinct.
        items: per session its distinct catalogue rows, in the order given.
        bundle_ids: per session the outside ids of the bundles made of its items; () for none, or where unknown.
        owners: outside id of the user a session belongs to; None where unknown.
    """

    session_ids: tuple[str, ...]
    items: tuple[NDArray[np.int32], ...]
    bundle_ids: tuple[tuple[str, ...], ...]
    owners: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.session_ids)


@dataclass(frozen=True, eq=False)
class LabelledSession:
    """One session whose bundles are known.

    Attributes:
        items: (S,) distinct catalogue rows, at least two. bundles: distinct sets of them, each of two or more.
        group: the user, whom a split may not divide. left_out: groups of the bundles, who must not be counted to find
            them.
    """

    items: NDArray[np.int64]
    bundles: tuple[frozenset[int], ...]
    group: str
    left_out: frozenset[str]

    def find_places(self, bundle: frozenset[int]) -> frozenset[int]:
        """Return where in `items` the rows of a bundle are."""
        return frozenset(np.flatnonzero(np.isin(self.items, list(bundle))).tolist())

    def tell_pairs(self) -> NDArray[np.bool_]:
        """Tell which pairs of items share a bundle: (S, S), False on the diagonal."""
        together = np.zeros((len(self.items), len(self.items)), bool)
        for bundle in self.bundles:
            inside = np.isin(self.items, list(bundle))
            together |= inside[:, None] & inside[None, :]
        np.fill_diagonal(together, False)
        return together


def check_session_items(items: Sequence[str]) -> None:
    """Refuse a session of fewer than two different items, by their outside ids.

    Raises:
        DataError: there are fewer.
    """
    if len(set(items)) < 2:
        raise DataError(
            f"A session needs two different items or more, found {', '.join(map(shorten, items)) or 'none'}. "
            "Give all that was taken together; what goes with one item is asked by items."
        )


def list_sessions(
    dataset: Dataset, parts: Split | None, part: Literal["train", "valid", "test"]
) -> list[LabelledSession]:
    """Return the sessions of a part whose bundles are known and that hold two items of the catalogue or more.

    A session is in "train" where each of its bundles is and its user has none elsewhere, so no session of a held-out
    user is learned from. It is in "valid" or "test" where some of its bundles are and all others were left out by the
    split, which are part of the answer all the same.

    Args:
        parts: None takes every session, whatever `part` says.
    """
    sessions, bundles = dataset.sessions, dataset.bundles
    if sessions is None:
        return []
    row_of = {bundle_id: row for row, bundle_id in enumerate(bundles.bundle_ids)}
    within = asked = set(range(len(bundles)))
    barred: set[str] = set()
    if parts is not None:
        asked = set(getattr(parts, part).tolist())
        within = asked if part == "train" else asked | set(parts.dropped.tolist())
        barred = {bundles.groups[row] for row in range(len(bundles)) if row not in within}
    found = []
    for items, bundle_ids, owner in zip(sessions.items, sessions.bundle_ids, sessions.owners, strict=True):
        rows = [row_of[bundle_id] for bundle_id in bundle_ids if bundle_id in row_of]
        groups = {bundles.groups[row] for row in rows} | ({owner} if owner is not None else set())
        if len(items) < 2 or not within.issuperset(rows) or asked.isdisjoint(rows):
            continue
        if part == "train" and not barred.isdisjoint(groups):
            continue
        inside = set(items.tolist())
        truth = dict.fromkeys(frozenset(bundles.items[row].tolist()) & inside for row in rows)
        kept = tuple(bundle for bundle in truth if len(bundle) > 1)
        if kept:
            group = owner if owner is not None else bundles.groups[rows[0]]
            found.append(LabelledSession(items.astype(np.int64), kept, group, frozenset(groups)))
    return found


def make_up_sessions(
    catalog: Catalog, bundles: Sequence[NDArray[np.int32]], groups: Sequence[str], count: int, seed: int
) -> list[LabelledSession]:
    """Make sessions of known bundles and of items beside them, for a shop that has no sessions.

    One to three bundles each, and up to as many other items; half of what is added lies in a leaf of the first bundle.

    Args:
        bundles: rows of each. groups: of each bundle; a session counts as of the first one's.
    """
    if not len(bundles):
        return []
    rng = np.random.default_rng(seed)
    leaves = catalog.leaf_numbers
    numbers = np.full(len(catalog), -1, np.int64) if leaves is None else leaves
    own_leaves = [np.unique(numbers[rows][numbers[rows] >= 0]) for rows in bundles]
    of_leaf: dict[int, list[int]] = {}
    for place, own in enumerate(own_leaves):
        for leaf in own.tolist():
            of_leaf.setdefault(leaf, []).append(place)
    found = []
    for first in rng.choice(len(bundles), count).tolist():
        chosen = {first}
        for _ in range(int(rng.choice(_BUNDLES_IN_ONE)) - 1):
            near = own_leaves[first].tolist() if rng.random() < _NEAR else []
            among = of_leaf[int(rng.choice(near))] if near else range(len(bundles))
            chosen.add(int(rng.choice(among)))
        members = [frozenset(bundles[place].tolist()) for place in sorted(chosen)]
        items = dict.fromkeys(row for rows in members for row in sorted(rows))
        for _ in range(int(rng.integers(0, _NOISE * len(members) + 1))):
            near = own_leaves[first].tolist() if rng.random() < _NEAR else []
            among_items = np.flatnonzero(numbers == int(rng.choice(near))) if near else np.arange(len(catalog))
            items[int(rng.choice(among_items))] = None
        if len(items) > 1:
            left_out = frozenset(groups[place] for place in chosen)
            rows = np.array(list(items), np.int64)
            found.append(LabelledSession(rows, tuple(dict.fromkeys(members)), groups[first], left_out))
    return found
