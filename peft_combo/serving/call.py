"""One call over HTTP: what is known of it while it is answered, and how an answer becomes bytes.

Owns `Context`, what all calls share, and `Call`, what belongs to one. Knows no path.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from peft_combo.serving.answers import Answer, Origin
from peft_combo.serving.auth import ANYBODY, Guard
from peft_combo.serving.config import ServiceConfig
from peft_combo.serving.limits import WorkPool
from peft_combo.serving.monitoring import Monitor
from peft_combo.serving.state import Caller, Journal, State

if TYPE_CHECKING:  # the engine loads torch; what answers for it does not
    from peft_combo.serving.service import Service

ResultT = TypeVar("ResultT")
_GIVEN_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,200}")


@dataclass
class Context:
    """What all calls of a process share."""

    config: ServiceConfig
    service: Service
    state: State
    journal: Journal
    monitor: Monitor
    guard: Guard
    pool: WorkPool


@dataclass
class Call:
    """One call.

    Attributes:
        request_id: of the header X-Request-Id, or made up; a body may name another.
        route: the path as it is described, never as it was called: it may hold the id of a user.
        category: of the adapter that answered; "" before one has. caller: who asks.
    """

    context: Context
    request_id: str
    route: str = "unknown"
    category: str = ""
    caller: Caller = ANYBODY
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def begin(cls, context: Context, given: str | None) -> Call:
        """Start a call; an id that is given is taken where it is one that any log can hold."""
        fine = given is not None and _GIVEN_ID.fullmatch(given)
        return cls(context, given if fine and given else make_request_id())

    @property
    def took_ms(self) -> float:
        return 1000 * (time.perf_counter() - self.started)

    async def run(self, function: Callable[[], ResultT], timeout: float | None = None) -> ResultT:
        """Run a call of the engine in the pool."""
        return await self.context.pool.run(function, timeout)

    def answer(self, answer: Answer) -> Response:
        """Return an answer of the recommender as it is sent, its origin in headers too."""
        self.request_id = answer.request_id
        self.category = answer.origin.alias.partition("@")[0]
        if answer.origin.fallbacks:
            self.context.monitor.count("peft_combo_fallbacks_total", answer.origin.answered_by)
        timing = ", ".join(f"{stage};dur={ms:.2f}" for stage, ms in answer.timing.items())
        total = f"total;dur={answer.took_ms:.2f}"
        headers = {**_describe_origin(answer.origin), "Server-Timing": f"{timing}, {total}" if timing else total}
        return reply(answer.to_json(), headers=headers)

    def results(self, results: object, origin: Origin) -> Response:
        """Return results of the encoder as they are sent."""
        self.category = origin.alias.partition("@")[0]
        body = {
            "request_id": self.request_id, "results": results, "took_ms": round(self.took_ms, 3), "origin": origin,
        }  # fmt: skip
        return reply(body, headers=_describe_origin(origin))

    def accept(self, count: int, errors: list[dict[str, Any]] | None = None, status: int = 200) -> Response:
        """Return how many of what was given were taken in."""
        body: dict[str, Any] = {"request_id": self.request_id, "accepted": count, "errors": errors or []}
        return reply(body, status)


def make_request_id() -> str:
    """Return a new id of a request: 128 random bits in hexadecimal digits."""
    return secrets.token_hex(16)


def get_call(request: Request) -> Call:
    """Return the call that a request belongs to."""
    call: Call = request.scope["call"]
    return call


def reply(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return JSON; a number that JSON has no word for becomes null."""
    return Response(to_json(body, inf_nan_mode="null"), status, dict(headers or {}), "application/json")


def quote_header(text: str) -> str:
    """Return a text as a header can hold it: what is not printable ASCII percent-encoded."""
    return text if text.isascii() and text.isprintable() else quote(text.encode("utf-8", "replace"), safe=" @:/.,;=+-")


def _describe_origin(origin: Origin) -> dict[str, str]:
    return {
        "X-Adapter-Version": quote_header(origin.version),
        "X-Adapter-Digest": quote_header(origin.digest),
        "X-Answered-By": origin.answered_by,
        "X-Arm": origin.arm,
    }
