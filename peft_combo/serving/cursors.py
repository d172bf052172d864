"""Cursors: where a list goes on, bound to the release and the request that it began with.

Owns how a cursor is written and checked. A cursor names the item shown last, and the list is ranked anew: items that
came or went meanwhile shift nothing. Bundles are found by a search that has no rank to go on from: their cursor holds
digests of all that were shown, the search is asked for as many more, and none comes twice. Opaque to callers, and no
secret: it holds nothing they did not send or see.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft_combo.serving.errors import BadRequest, CursorExpired
from peft_combo.serving.requests import ServiceRequest

MOST_BUNDLES = 200
"""So many bundles may be shown page by page; the search for more of them takes longer and longer."""

_DIGITS = 8  # of the digest of a bundle

# What may differ between the pages of one list.
_FREE = {"cursor", "k", "request_id", "id", "explain"}


@dataclass(frozen=True)
class Cursor:
    """Where a list goes on.

    Attributes:
        release: digest of the release that made it. request: digest of what was asked. route: as in "complete".
        after: id of the item shown last; of bundles the digests of all that were shown. shown: how many were shown.
        context: ids of the items that stood for the user when it began, for these change with every event.
    """

    release: str
    request: str
    route: str
    after: str
    shown: int
    context: tuple[str, ...] | None = None

    def encode(self) -> str:
        """Return the cursor as callers get it."""
        values = [self.release, self.request, self.route, self.after, self.shown, self.context]
        return base64.urlsafe_b64encode(json.dumps(values, separators=(",", ":")).encode()).decode()

    @classmethod
    def decode(cls, text: str) -> Cursor:
        """Read what `encode` wrote.

        Raises:
            BadRequest: it is no cursor.
        """
        try:
            values: Any = json.loads(base64.b64decode(text.encode(), altchars=b"-_", validate=True))
            release, request, route, after, shown, context = values
        except (ValueError, TypeError, binascii.Error, RecursionError) as error:
            raise BadRequest("cursor: expected the next_cursor of an answer, found something else.") from error
        texts = [release, request, route, after, *(context or [])] if isinstance(context, list | None) else [None]
        if not all(isinstance(one, str) for one in texts) or type(shown) is not int:
            raise BadRequest("cursor: expected the next_cursor of an answer, found something else.")
        return cls(release, request, route, after, shown, None if context is None else tuple(context))

    def check(self, release: str, request: str, route: str) -> None:
        """Refuse a cursor of another list.

        Raises:
            CursorExpired: it is of another release, which the same request without a cursor is answered by.
            BadRequest: it is of another request.
        """
        if (self.request, self.route) != (request, route):
            raise BadRequest("cursor: it goes with another request. Send the request it came with, or none.")
        if self.release != release:
            raise CursorExpired(
                "The list was made by a release that no longer answers. Send the request again without cursor."
            )


def digest_request(request: ServiceRequest) -> str:
    """Return what tells a request from others whose lists are different."""
    told = request.model_dump(mode="json", exclude=_FREE)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]


def digest_bundle(items: Iterable[str]) -> str:
    """Return what tells a bundle from the few others that are shown with it, whatever the order of its items."""
    told = json.dumps(sorted(items))
    return hashlib.sha256(told.encode()).hexdigest()[:_DIGITS]


def split_digests(after: str) -> list[str]:
    """Return the digests of bundles that a cursor holds.

    Raises:
        BadRequest: it holds something else, or more than may be shown.
    """
    found = [after[start : start + _DIGITS] for start in range(0, len(after), _DIGITS)]
    if len(after) % _DIGITS or len(found) > MOST_BUNDLES:
        raise BadRequest("cursor: expected the next_cursor of an answer, found something else.")
    return found
