"""The service over HTTP: routes around an engine, with one gate that every request passes.

Owns what every answer has, whatever its route: an id, a time, a count, a problem in place of a traceback.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peft_combo import __version__
from peft_combo.serving.answers import ShownAnswer
from peft_combo.serving.auth import Guard
from peft_combo.serving.call import Call, Context, get_call, quote_header
from peft_combo.serving.config import ServiceConfig
from peft_combo.serving.examples import describe_service
from peft_combo.serving.limits import WorkPool
from peft_combo.serving.monitoring import Monitor, watch
from peft_combo.serving.problems import describe_error
from peft_combo.serving.routes import ROUTERS
from peft_combo.serving.routes.health import refresh
from peft_combo.serving.state import ExposureRow, Journal, ShownItem, State

if TYPE_CHECKING:  # the engine loads torch; what answers for it does not
    from peft_combo.serving.service import Service

_CLOSED = 499  # what nginx calls a client that went away before its answer
_WATCH_SECONDS = 1.0
_TURNED_AWAY = {408, 413, 429, 503, 504}  # answers that `peft_combo_rejected_total` counts by kind


def make_context(config: ServiceConfig, service: Service, state: State) -> Context:
    """Return what all calls share, with the journal listening to the engine's answers."""
    monitor = Monitor()
    journal = Journal(state, on_dropped=lambda n: monitor.count("peft_combo_exposures_dropped_total", by=n))
    context = Context(
        config,
        service,
        state,
        journal,
        monitor,
        Guard(config, state),
        WorkPool(config.threads, config.queue, config.timeout),
    )
    service.on_answer(lambda shown: _log_exposure(context, shown))
    return context


def make_app(context: Context) -> FastAPI:
    """Return the application; the engine is open already and is closed with it."""

    @asynccontextmanager
    async def live(_app: FastAPI) -> AsyncIterator[None]:
        stop = watch(lambda: refresh(context), _WATCH_SECONDS)
        try:
            yield
        finally:
            stop()
            context.pool.close()
            context.service.close(context.config.grace)
            context.journal.close()
            context.state.close()

    app = FastAPI(
        title="peft-combo", version=__version__, docs_url=None, redoc_url=None, lifespan=live,
        description="Bundle recommender over hot-swapped adapters.",
    )  # fmt: skip
    for router in ROUTERS:
        app.include_router(router)
    describe_service(app, context.service)
    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(RequestGate, context=context)
    return app


class RequestGate:
    """The outermost layer: gives every request an id, times and counts it, and answers errors as problems."""

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app, self._context = app, context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = scope["call"] = Call.begin(self._context, Headers(scope=scope).get("x-request-id"))
        code = 0

        async def tell(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                _add_headers(message, call)
            await send(message)

        try:
            try:
                await self._app(scope, receive, tell)
            except ClientDisconnect:
                code = _CLOSED
            except Exception as error:
                if code:  # the answer is on its way: the connection ends, which is all that can be said
                    raise
                problem = describe_error(error)
                if problem.kind == "fault":
                    _log_fault(call, error)
                if problem.status in _TURNED_AWAY:
                    self._context.monitor.count("peft_combo_rejected_total", problem.kind)
                await problem.to_response(call.request_id)(scope, receive, tell)
        finally:
            self._context.monitor.observe(call.route, call.category, code or 500, call.took_ms / 1000)
            if self._context.config.access_log:
                _log_access(call, scope["method"], code)


async def _answer_error(request: Request, error: Exception) -> Response:
    """Answer what the framework refuses by itself: a path or method that is not there, a parameter that is wrong."""
    call, scope = get_call(request), request.scope
    paths = [*scope["app"].openapi()["paths"]] if isinstance(error, HTTPException) else ()
    return describe_error(error, scope["path"], paths).to_response(call.request_id)


def _add_headers(message: MutableMapping[str, Any], call: Call) -> None:
    headers = MutableHeaders(raw=message["headers"])
    headers["X-Request-Id"] = quote_header(call.request_id)
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    if "server-timing" not in headers:
        headers["Server-Timing"] = f"total;dur={call.took_ms:.2f}"
    if "content-security-policy" not in headers:
        headers["Content-Security-Policy"] = "default-src 'none'; frame-ancestors 'none'"
        headers["Cache-Control"] = "no-store"


def _log_exposure(context: Context, shown: ShownAnswer) -> None:
    """Hand an answer to the journal, and count it."""
    answer, origin = shown.answer, shown.answer.origin
    items: list[ShownItem] = []
    for result, propensity in zip(answer.results, shown.propensities, strict=False):
        ids = result.get("added") or result.get("items") or [result.get("item_id")]
        items += [ShownItem(str(one), result.get("score"), propensity) for one in ids if one is not None]
    user_key = None if shown.user is None else context.state.identify(shown.user)
    context.journal.offer(
        ExposureRow(
            answer.request_id, user_key, shown.route, origin.alias, origin.version, origin.digest, origin.arm,
            shown.context, items,
        )
    )  # fmt: skip
    context.monitor.count("peft_combo_exposures_total", origin.alias, origin.arm)


def _log_fault(call: Call, error: Exception) -> None:
    """Write where an error came from to stderr; not its text, for that may hold the id of a user."""
    place = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    sys.stderr.write(f"{type(error).__name__} in {call.route}, request {call.request_id}:\n{place}\n")


def _log_access(call: Call, method: str, code: int) -> None:
    """Write a line of a request: the path as it is described, so that no id of a user is in it."""
    sys.stderr.write(f"{method} {call.route} {code} {call.took_ms:.1f} ms {call.request_id} {call.caller.name}\n")
