"""Rows of the state as values: items, events, exposures, feedback, deployments, keys, audit entries.

Times are seconds since 1970 (UTC). A `seq` is given by the state; 0 in a row that is still to be written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

EventKind = Literal["view", "purchase", "rating", "rejected"]
FeedbackKind = Literal["click", "basket", "purchase", "rejected", "rating"]
REWARDING: tuple[FeedbackKind, ...] = ("click", "basket", "purchase")
"""Feedback that an item of a list earns something by."""

LIST_ROUTES = ("recommend", "complete")
"""Routes whose lists of single items may be drawn, and count in the counters of items."""

Scope = Literal["read", "write", "admin"]
"""What a key may do: read asks, write gives items, events and feedback, admin moves adapters and forgets people."""

SCOPES: tuple[Scope, ...] = ("read", "write", "admin")


@dataclass(frozen=True)
class ItemRow:
    """An item that was put or deleted while the service ran; the newest word on it.

    Attributes:
        fields: title, category, slot, price and any further columns, as JSON values.
    """

    item_id: str
    fields: Mapping[str, Any]
    deleted: bool = False
    time: float = 0.0
    seq: int = 0


@dataclass(frozen=True)
class EventRow:
    """What a user did with an item.

    Attributes:
        user_key: of `identities`; never the outside id.
        value: of a rating; None for the rest.
        event_id: the client's own id of it; a second one with the same id is no new event.
    """

    user_key: str
    item_id: str
    kind: EventKind
    value: float | None = None
    time: float = 0.0
    event_id: str | None = None
    seq: int = 0


@dataclass(frozen=True)
class ShownItem:
    """One item of an answer, with the probability with which the policy put it there (None: not known)."""

    item_id: str
    score: float | None = None
    propensity: float | None = None


@dataclass(frozen=True)
class ExposureRow:
    """One answer as it was shown, or for the arm `shadow` as it would have been.

    Attributes:
        user_key: of `identities`; None for an unknown visitor.
        route: recommend, complete, compose, ...
        alias: fashion@prod. version: fashion@v3. digest: of the adapter. arm: prod, next or shadow.
        context: ids of the items that were given.
        shown: in order of the answer; items of a bundle one after the other.
    """

    request_id: str
    user_key: str | None
    route: str
    alias: str
    version: str
    digest: str
    arm: str
    context: Sequence[str] = ()
    shown: Sequence[ShownItem] = ()
    time: float = 0.0
    seq: int = 0


class ItemCount(NamedTuple):
    """How often an item was shown in lists of single items, and how often it earned something there."""

    item_id: str
    shown: int
    rewarded: int
    seq: int = 0


@dataclass(frozen=True)
class FeedbackRow:
    """What became of an answer, joined to its exposure by the request id."""

    request_id: str
    kind: FeedbackKind
    item_id: str | None = None
    value: float | None = None
    time: float = 0.0
    seq: int = 0


class DeployedArm(NamedTuple):
    """A share of the traffic of an alias, in per cent, and the version that answers it; a shadow has share 0."""

    version: str
    share: float


@dataclass(frozen=True)
class DeploymentRow:
    """Where an alias pointed from a moment on.

    Attributes:
        arms: by name, prod, next and shadow; none where the alias was unloaded.
        action: promote, split, rollback, load, unload.
    """

    alias: str
    arms: Mapping[str, DeployedArm]
    actor: str
    action: str
    time: float = 0.0
    seq: int = 0


@dataclass(frozen=True)
class Heads:
    """The newest sequence number of each table; one that grew has something new to read."""

    items: int = 0
    events: int = 0
    deployments: int = 0
    forgotten: int = 0
    keys: int = 0


@dataclass(frozen=True)
class Caller:
    """Who asks: the name of a key and what it may do. `key_id` is no secret."""

    name: str
    scopes: frozenset[Scope]
    key_id: str = ""
    per_minute: int | None = None


@dataclass(frozen=True)
class AuditRow:
    """One line of the audit log."""

    actor: str
    action: str
    details: Mapping[str, Any] = field(default_factory=dict)
    time: float = 0.0
    seq: int = 0
