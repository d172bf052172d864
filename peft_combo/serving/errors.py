"""Errors of the service: what a caller did wrong or has to wait for, each a kind that a route gives a status.

Owns the kinds and what they carry. Knows nothing of HTTP.
"""

from __future__ import annotations

from typing import ClassVar

from peft_combo.errors import PeftComboError


class ServiceError(PeftComboError):
    """A request that is not answered, with the reason in words.

    Attributes:
        kind: short name of the reason; stays the same between versions.
        status: what HTTP calls it.
    """

    kind: ClassVar[str] = "bad-request"
    status: ClassVar[int] = 400


class BadRequest(ServiceError):
    """The request cannot be answered as it stands; a `DataError` of the recommender is of this kind too."""


class UnknownItem(ServiceError):
    """No item has this id."""

    kind = "unknown-item"
    status = 404


class UnknownAdapter(ServiceError):
    """No alias or version is called so, or none that can do what was asked."""

    kind = "unknown-adapter"
    status = 404


class Conflict(ServiceError):
    """What was asked does not go with what is there: another promotion runs, or aliases are fixed."""

    kind = "conflict"
    status = 409


class CursorExpired(Conflict):
    """A cursor is of another release or another request; the list has to be asked for anew."""

    kind = "cursor-expired"


class RefusedRelease(Conflict):
    """An adapter is damaged, foreign or of another task, so it was not taken into use; what was in use still is."""

    kind = "refused-release"


class TooLarge(ServiceError):
    """More texts, items or characters than the service takes at once."""

    kind = "too-large"
    status = 413


class Overloaded(ServiceError):
    """The queue is full: come back later.

    Attributes:
        retry_after: seconds after which it is worth trying again.
    """

    kind = "overloaded"
    status = 429

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotReady(ServiceError):
    """The service is starting, or is closing."""

    kind = "not-ready"
    status = 503


class TimedOut(ServiceError):
    """An answer took longer than a request may take."""

    kind = "timed-out"
    status = 504
