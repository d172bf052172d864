"""What the service's state holds to learn from, as values: bundles people took, and lists with what became of them.

Reads the state and writes nothing. Users leave it as keys only.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from peft_combo.data.use import LoggedList, UseBundle
from peft_combo.serving.state import EventRow, ExposureRow, FeedbackRow, State
from peft_combo.serving.state.item_counts import list_rewards
from peft_combo.serving.state.rows import REWARDING

GAP = 1800.0
"""Seconds between two purchases of one person that still are one bundle."""

_TAKEN = ("basket", "purchase")
_SIZES = range(2, 21)  # of a bundle: one item goes with nothing, and more is a stock-up
_PAGE = 10_000


def gather_bundles(state: State) -> list[UseBundle]:
    """Return what people took together, oldest first: purchases of one sitting, baskets completed from answers."""
    found: dict[str, UseBundle] = {}
    purchases: dict[str, list[EventRow]] = defaultdict(list)
    for event in _read_all(state.events_since):
        if event.kind == "purchase":
            purchases[event.user_key].append(event)
    for user, events in purchases.items():
        sitting: list[EventRow] = []
        for event in sorted(events, key=lambda one: (one.time, one.seq)):
            if sitting and event.time - sitting[-1].time > GAP:
                _add_bundle(found, user, [one.item_id for one in sitting], sitting[-1].time)
                sitting = []
            sitting.append(event)
        _add_bundle(found, user, [one.item_id for one in sitting], sitting[-1].time)
    taken = _group_feedback(state, _TAKEN)
    for exposure in _read_all(state.exposures_since):
        own = [one.item_id for one in taken.get(exposure.request_id, ()) if one.item_id is not None]
        if own and exposure.arm != "shadow":
            _add_bundle(found, exposure.user_key, [*exposure.context, *own], exposure.time)
    return sorted(found.values(), key=lambda one: (one.time, one.bundle_id))


def gather_lists(state: State, alias: str | None = None) -> list[LoggedList]:
    """Return what was shown and what was earned at each place, oldest first; shadows are left out, nobody saw them.

    Args:
        alias: of the adapter that answered, ``fashion@prod``; None for all.
    """
    clicked = _group_feedback(state, REWARDING)
    lists = []
    for exposure in _read_all(state.exposures_since):
        if exposure.arm == "shadow" or alias not in (None, exposure.alias) or not exposure.shown:
            continue
        items = tuple(one.item_id for one in exposure.shown)
        earned = {one.item_id for one in clicked.get(exposure.request_id, ())}
        lists.append(
            LoggedList(
                exposure.request_id,
                exposure.user_key,
                exposure.version,
                exposure.arm,
                tuple(exposure.context),
                items,
                _numbers(exposure, "propensity"),
                _numbers(exposure, "score"),
                list_rewards(items, earned),
                exposure.time,
            )
        )
    return lists


def gather_items(state: State) -> dict[str, Mapping[str, Any]]:
    """Return the items that were put while the service ran and are still there, id -> fields."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in _read_all(state.items_since):
        if row.deleted:
            found.pop(row.item_id, None)
        else:
            found[row.item_id] = row.fields
    return found


def _numbers(exposure: ExposureRow, name: str) -> tuple[float, ...] | None:
    values = [getattr(one, name) for one in exposure.shown]
    return None if any(value is None for value in values) else tuple(map(float, values))


def _group_feedback(state: State, kinds: Iterable[str]) -> dict[str, list[FeedbackRow]]:
    wanted, grouped = set(kinds), defaultdict(list)
    for row in _read_all(state.feedback_since):
        if row.kind in wanted:
            grouped[row.request_id].append(row)
    return grouped


def _read_all(read: Any) -> list[Any]:
    """Read a table of the state page by page, from its beginning."""
    rows: list[Any] = []
    while True:
        page = read(rows[-1].seq if rows else 0, _PAGE)
        rows += page
        if len(page) < _PAGE:
            return rows


def _add_bundle(found: dict[str, UseBundle], user: str | None, items: list[str], time: float) -> None:
    """Add a bundle of a plausible size; the same items of the same person are one, as they were first taken."""
    distinct = tuple(dict.fromkeys(items))
    if len(distinct) in _SIZES:
        name = "\n".join([user or f"visitor {time}", *sorted(distinct)])
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
        found.setdefault(f"use-{digest[:20]}", UseBundle(f"use-{digest[:20]}", user, distinct, time))
