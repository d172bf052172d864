"""Events of users while the service runs: what they did last, and what they are not to be shown again.

Owns a memory of users' latest events in front of the state. Knows keys of users, never their ids.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft_combo.errors import DataError, did_you_mean, shorten
from peft_combo.serving.recent import Recent
from peft_combo.serving.state import EventRow, State

_FIELDS = ("user", "item_id", "kind", "value", "time", "event_id")
_KINDS = ("view", "purchase", "rating", "rejected")

_EVENTS = 200  # of a user: what is older is neither context nor barred
_TAKEN = ("purchase", "rating")
_DISLIKED = 2.0  # a rating up to this rejects


class LiveEvents:
    """The latest events of users, read from the state when a user is first asked for.

    Args:
        most: users kept in memory, those not asked for longest going first.
    """

    def __init__(self, state: State, most: int = 100_000) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._kept: Recent[str, tuple[EventRow, ...]] = Recent(most)
        self.seq = state.head().events
        self.number = 0

    def find(self, user_key: str) -> tuple[EventRow, ...]:
        """Return a user's events, newest first."""
        with self._lock:
            found = self._kept.get(user_key)
            if found is not None:
                return found
            number = self.number
        rows = tuple(self._state.events_of(user_key, _EVENTS))
        with self._lock:
            if number == self.number:  # else somebody did something meanwhile: the next request reads it
                self._kept.put(user_key, rows)
        return rows

    def refresh(self) -> list[EventRow]:
        """Read what is new in the state, from this worker and others; return it, oldest first."""
        rows = self._state.events_since(self.seq)
        if rows:
            with self._lock:
                self.seq = max(self.seq, rows[-1].seq)
                self.number += 1
                self._kept.forget({row.user_key for row in rows})
        return rows

    def forget(self, user_key: str) -> None:
        """Drop what is kept of a user."""
        with self._lock:
            self.number += 1
            self._kept.forget([user_key])


def list_context(events: Sequence[EventRow], most: int) -> list[str]:
    """Return the items a user dealt with last, each once, latest first; rejected ones stand for nothing."""
    barred = set(list_rejected(events))
    return [item for item in dict.fromkeys(row.item_id for row in events) if item not in barred][:most]


def list_seen(events: Sequence[EventRow]) -> list[str]:
    """Return what a user took or rejected; what was only looked at may be shown again."""
    taken = [row.item_id for row in events if row.kind in _TAKEN]
    return list(dict.fromkeys([*taken, *list_rejected(events)]))


def list_rejected(events: Sequence[EventRow]) -> list[str]:
    """Return what a user rejected, or rated badly, and did not take or look at since."""
    latest: dict[str, EventRow] = {}
    for row in events:
        latest.setdefault(row.item_id, row)
    return [
        item
        for item, row in latest.items()
        if row.kind == "rejected" or (row.kind == "rating" and row.value is not None and row.value <= _DISLIKED)
    ]


def check_event(values: Mapping[str, Any], identify: Callable[[str], str]) -> EventRow:
    """Return an event to store.

    Raises:
        DataError: a value is none that it may have.
    """
    unknown = [name for name in values if name not in _FIELDS]
    if unknown:
        raise DataError(f'An event has no field "{shorten(unknown[0])}". {did_you_mean(unknown[0], _FIELDS)}'.rstrip())
    for name in ("user", "item_id"):
        given = values.get(name)
        if not isinstance(given, str) or not given.strip() or len(given) > 200:
            raise DataError(f"{name}: expected a text of 1 to 200 characters, found {shorten(repr(given))}.")
    kind, value, when = values.get("kind"), values.get("value"), values.get("time")
    if kind not in _KINDS:
        hint = did_you_mean(str(kind), _KINDS)
        raise DataError(f"kind: expected {', '.join(_KINDS)}, found {shorten(repr(kind))}. {hint}".rstrip())
    for name, number in (("value", value), ("time", when)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise DataError(f"{name}: expected a number, found {shorten(repr(number))}.")
        if number is not None and not math.isfinite(number):
            raise DataError(f"{name}: expected a finite number, found {number}.")
    if kind == "rating" and (value is None or not 1 <= value <= 5):
        raise DataError(f"value: a rating is from 1 to 5, found {value}.")
    return EventRow(
        identify(values["user"]), values["item_id"], kind, None if value is None else float(value),
        0.0 if when is None else float(when), values.get("event_id"),
    )  # fmt: skip
