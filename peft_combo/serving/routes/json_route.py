"""The way of a request through a route: host, key, body, call, answer.

FastAPI describes the routes (OpenAPI) from their signatures. Where a route has a JSON body, the way from bytes to model
is one step of pydantic's own parser here, in place of FastAPI's resolver: a quarter of the time, and a strict reading.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from peft_combo.serving.call import get_call
from peft_combo.serving.limits import read_body
from peft_combo.serving.problems import ProblemBody, refuse
from peft_combo.serving.state import Scope

SCOPE = "x-scope"
"""Key in a route's description: what a caller's key has to allow; "none" for those that need none."""

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]
_PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}


class JsonRoute(APIRoute):
    """A route that looks after host, key and body before its function is called."""

    def get_route_handler(self) -> _Handler:
        scope: Scope | None = (self.openapi_extra or {}).get(SCOPE)
        inner = super().get_route_handler() if self.body_field is None else self._read_json()
        path = self.path_format

        async def handle(request: Request) -> Response:
            call = get_call(request)
            call.route = path
            guard = call.context.guard
            guard.check_host(request.headers)
            if scope is not None:
                call.caller = guard.check(request.headers, scope)
            return await inner(request)

        return handle

    def _read_json(self) -> _Handler:
        assert self.body_field is not None
        model: type[BaseModel] = self.body_field.field_info.annotation  # type: ignore[assignment]
        endpoint: Callable[..., Awaitable[Response]] = self.endpoint

        async def handle(request: Request) -> Response:
            check_media_type(request, "application/json")
            config = get_call(request).context.config
            body = await read_body(request, config.body_bytes, config.body_seconds)
            value = model.model_validate_json(body)
            return await endpoint(value, request, **request.path_params)

        return handle


def check_media_type(request: Request, *expected: str) -> None:
    """Refuse a body of another kind: what a page of another origin may send without asking is never one of these."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in expected and not (kind.startswith("application/") and kind.endswith("+json")):
        said = f"Expected Content-Type: {' or '.join(expected)}, found {kind or 'none'}. With curl, use --json."
        raise refuse(415, "unsupported-media-type", said)


def make_router(tag: str) -> APIRouter:
    """Return a router whose routes are of this kind."""
    return APIRouter(route_class=JsonRoute, tags=[tag])


def describe(scope: Scope | None, *statuses: int, media: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the options of a route: its scope, and which problems it may answer with.

    Args:
        statuses: beside those that any route of this scope may answer with.
        media: of the body, where it is none of pydantic's models.
    """
    usual = {400, 421, 422, 429, 500, 503} | ({401, 403} if scope else set()) | set(statuses)
    extra: dict[str, Any] = {SCOPE: scope or "none"}
    if scope is None:
        extra = {"security": []}
    else:
        extra["security"] = [{"key": []}]
    if media is not None:
        extra["requestBody"] = {"content": media, "required": True}
    responses = {status: {"description": _REASONS[status], "content": _PROBLEM} for status in sorted(usual)}
    return {"openapi_extra": extra, "responses": responses}


_REASONS = {
    400: "The request cannot be answered as it stands.", 401: "A key is needed.", 403: "The key has another scope.",
    404: "There is no such thing.", 408: "The body took too long.", 409: "It does not go with what is there.",
    413: "Too large.", 415: "Not JSON.", 421: "Called by another name.", 422: "A field is missing or wrong.",
    429: "Too many requests; see Retry-After.", 500: "A fault of the service.", 503: "Not ready; see Retry-After.",
    504: "It took too long.",
}  # fmt: skip

BODY = (408, 413, 415)
"""What a route with a body may answer with."""

ANSWER = (*BODY, 404, 409, 504)
"""What a route of the recommender may answer with."""

__all__ = ["ANSWER", "BODY", "JsonRoute", "ProblemBody", "check_media_type", "describe", "make_router"]
