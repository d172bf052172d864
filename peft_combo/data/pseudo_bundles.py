"""Pseudo-bundles: sets of items bought together so surely that they serve as training bundles (pseudo-labels).

Owns what "together" and "surely" mean. Looks at the interactions train may see and at nothing else of them; of the
held-out bundles it only learns which sets it may not give.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from peft_combo.data.model import Dataset, Interactions
from peft_combo.data.splits import Split
from peft_combo.recipe.task import PseudoBundles

_SECONDS_PER_DAY = 86_400.0
# 95 % of a normal distribution lie within so many standard deviations.
_Z = 1.96
# Items counted against all others at once: their counts are a dense block of this many rows at worst.
_COUNTED_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class Mined:
    """Sets of items, the surest first.

    Attributes:
        items: per set its catalogue rows, ascending.
        confidences: (P,) float32 in (0, 1], how surely each was bought together.
        notes: what they were found in, in words.
    """

    items: tuple[NDArray[np.int32], ...]
    confidences: NDArray[np.float32]
    notes: tuple[str, ...]


def mine(dataset: Dataset, split: Split, config: PseudoBundles) -> Mined:
    """Find the sets of items that were bought together most surely.

    Pairs are counted over baskets, or where none is known over what a user took within `config.window_days`. The
    confidence of a set is the lower 95 % bound of the share of its commonest item's buyings in which the whole set was
    bought, so it holds from every one of its items. A pair must also be bought together more often than by chance. From
    the surest pair on, each grows by the item that leaves it surest while it stays sure enough; pairs inside a set that
    was taken are not taken again.

    No set is a training bundle, which says it already, or holds a whole bundle that validation or test will ask for.

    Source: Omiecinski 2003, "Alternative interest measures for mining associations in databases" (all-confidence);
        Wilson 1927 for the bound; Brin et al. 1997 for lift against chance.
    """
    interactions = dataset.interactions
    none = np.empty(0, np.float32)
    if interactions is None or not len(split.train_interactions):
        return Mined((), none, ("pseudo-bundles: there are no interactions that training may see",))
    seen = interactions.take(split.train_interactions)
    bought = _purchases(seen, config.window_days, len(dataset.catalog))  # (T, N)
    held_out = [dataset.bundles.items[row] for row in (*split.valid, *split.test)]
    known = [dataset.bundles.items[row] for row in split.train]
    items, confidences = _surest(bought, config, held_out, known)
    kept = f"pseudo-bundles: {len(items):,} set{'s' * (len(items) != 1)} of items out of {bought.shape[0]:,} purchases"
    if items:
        kept += f", confidence {min(confidences):.2f} to {max(confidences):.2f}"
    return Mined(tuple(items), np.array(confidences, np.float32), (kept,))


def wilson_lower(successes: ArrayLike, trials: ArrayLike) -> NDArray[np.float64]:
    """Return the lower end of the 95 % interval of a share, 0 where nothing was tried.

    Args:
        successes, trials: of one shape, successes <= trials.
    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    k, n = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
    safe = np.maximum(n, 1)
    share = k / safe
    middle = share + _Z**2 / (2 * safe)
    spread = _Z * np.sqrt(share * (1 - share) / safe + _Z**2 / (4 * safe**2))
    lower: NDArray[np.float64] = np.where(n > 0, np.maximum(0, (middle - spread) / (1 + _Z**2 / safe)), 0.0)
    return lower


def _purchases(seen: Interactions, window_days: float, n_items: int) -> sparse.csr_array[Any, tuple[int, int]]:
    """Return (T, N) with a 1 for every item of every purchase: a basket, or what a user took within the window.

    A window opens with the first event after the last one closed. Events of neither a basket nor a user with a time
    are in no purchase: nobody knows what went with them.
    """
    purchase = np.full(len(seen), -1, np.int64)
    in_basket = seen.baskets >= 0
    _, purchase[in_basket] = np.unique(seen.baskets[in_basket], return_inverse=True)
    count = int(purchase.max(initial=-1)) + 1
    timed = np.flatnonzero(~in_basket & (seen.users >= 0) & ~np.isnan(seen.times))
    order = timed[np.lexsort((seen.times[timed], seen.users[timed]))]
    user, opened = -1, 0.0
    for row in order:
        if seen.users[row] != user or seen.times[row] - opened > window_days * _SECONDS_PER_DAY:
            user, opened = int(seen.users[row]), float(seen.times[row])
            count += 1
        purchase[row] = count - 1
    kept = purchase >= 0
    matrix = sparse.csr_array(
        (np.ones(int(kept.sum()), np.int32), (purchase[kept], seen.items[kept])), shape=(count, n_items)
    )
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _surest(
    bought: sparse.csr_array[Any, tuple[int, int]],
    config: PseudoBundles,
    held_out: Iterable[NDArray[np.int32]],
    known: Iterable[NDArray[np.int32]],
) -> tuple[list[NDArray[np.int32]], list[float]]:
    support = np.asarray(bought.sum(axis=0), np.int64).ravel()  # (N,)
    # By item, the held-out bundles that hold it: a set is barred by the last item that makes one of them whole.
    barring: dict[int, list[frozenset[int]]] = defaultdict(list)
    for rows in held_out:
        for row in rows.tolist():
            barring[row].append(frozenset(rows.tolist()))
    taken = {frozenset(rows.tolist()) for rows in known}
    covered: set[tuple[int, int]] = set()
    by_item = sparse.csc_array(bought)
    items: list[NDArray[np.int32]] = []
    confidences: list[float] = []
    for confidence, left, right in _pairs(bought, support, config):
        if len(items) == config.most:
            break
        if (left, right) in covered or _holds_one(frozenset((left, right)), barring[left]):
            continue
        grown, sure = _grown((left, right), confidence, bought, by_item, support, barring, config)
        covered.update(combinations(grown, 2))
        if frozenset(grown) not in taken:
            taken.add(frozenset(grown))
            items.append(np.array(grown, np.int32))
            confidences.append(sure)
    order = np.argsort(-np.array(confidences), kind="stable")
    return [items[place] for place in order], [confidences[place] for place in order]


def _pairs(
    bought: sparse.csr_array[Any, tuple[int, int]], support: NDArray[np.int64], config: PseudoBundles
) -> list[tuple[float, int, int]]:
    """Return (confidence, row, higher row) of the pairs that are sure enough, the surest first."""
    frequent = np.flatnonzero(support >= config.min_together)
    columns = sparse.csc_array(bought)[:, frequent]
    found: list[tuple[float, int, int]] = []
    for start in range(0, len(frequent), _COUNTED_AT_ONCE):
        counts = sparse.coo_array(columns[:, start : start + _COUNTED_AT_ONCE].T @ columns)
        lefts, rights = frequent[counts.coords[0] + start], frequent[counts.coords[1]]
        enough = (lefts < rights) & (counts.data >= config.min_together)
        left, right, together = lefts[enough], rights[enough], counts.data[enough]
        commoner, rarer = np.maximum(support[left], support[right]), np.minimum(support[left], support[right])
        sure = wilson_lower(together, commoner)
        kept = (sure >= config.min_confidence) & (sure * bought.shape[0] > rarer)
        found.extend(zip(sure[kept].tolist(), left[kept].tolist(), right[kept].tolist(), strict=True))
    return sorted(found, key=lambda pair: (-pair[0], pair[1], pair[2]))


def _grown(
    pair: tuple[int, int],
    confidence: float,
    bought: sparse.csr_array[Any, tuple[int, int]],
    by_item: sparse.csc_array,
    support: NDArray[np.int64],
    barring: dict[int, list[frozenset[int]]],
    config: PseudoBundles,
) -> tuple[tuple[int, ...], float]:
    """Add the item that leaves the set surest, again and again, while it stays sure enough."""

    def buyings(item: int) -> NDArray[np.int32]:
        return by_item.indices[by_item.indptr[item] : by_item.indptr[item + 1]]

    items = set(pair)
    together = np.intersect1d(buyings(pair[0]), buyings(pair[1]), assume_unique=True)  # purchases of the whole set
    while len(items) < config.max_items:
        counts = np.asarray(bought[together].sum(axis=0), np.int64).ravel()  # (N,)
        counts[list(items)] = 0
        others = np.flatnonzero(counts >= config.min_together)
        sure = wilson_lower(counts[others], np.maximum(support[others], support[list(items)].max()))
        fair = (sure >= config.min_confidence) & (
            wilson_lower(counts[others], len(together)) * bought.shape[0] > support[others]
        )
        candidates = sorted(zip(-sure[fair], others[fair].tolist(), strict=True))
        added = next(((one, -s) for s, one in candidates if not _holds_one(items | {one}, barring[one])), None)
        if added is None:
            break
        item, confidence = added[0], float(added[1])
        items.add(item)
        together = np.intersect1d(together, buyings(item), assume_unique=True)
    return tuple(sorted(items)), confidence


def _holds_one(items: frozenset[int] | set[int], bundles: Sequence[frozenset[int]]) -> bool:
    return any(bundle <= items for bundle in bundles)
