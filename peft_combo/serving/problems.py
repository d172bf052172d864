"""Problems: what is answered in place of an answer, in one shape everywhere.

Owns the form of RFC 9457 (application/problem+json) and which error becomes which status. Knows no route.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import Response

from peft_combo.errors import PeftComboError, did_you_mean, make_printable, nearest, shorten
from peft_combo.recipe.fields import format_value
from peft_combo.serving.errors import ServiceError
from peft_combo.serving.state.tables import StateError

MEDIA_TYPE = "application/problem+json"
_SUGGESTION = re.compile(r'Did you mean "([^"]+)"\?')
_MOST_ERRORS = 20
_TITLES = {
    "bad-request": "The request cannot be answered as it stands",
    "invalid-body": "The body does not have the expected fields",
    "unauthorized": "A key is needed",
    "forbidden": "The key does not allow this",
    "not-found": "There is no such path",
    "method-not-allowed": "The path has other methods",
    "timeout": "The body took too long to arrive",
    "too-large": "More than the service takes at once",
    "unsupported-media-type": "The body is not JSON",
    "misdirected": "The service is not called by this name",
    "rate-limited": "Too many requests for this key",
    "overloaded": "Too many requests at once",
    "timed-out": "The answer took too long",
    "not-ready": "The service is not ready",
    "unknown-item": "There is no such item",
    "unknown-adapter": "There is no such adapter",
    "unknown-request": "There is no such request",
    "conflict": "It does not go with what is there",
    "cursor-expired": "The list has to be asked for anew",
    "refused-release": "The version was refused, what was in use still is",
    "fault": "A fault of the service",
    "state-unavailable": "The state cannot be read or written",
}


class ProblemBody(BaseModel):
    """A problem as it is sent (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="urn:peft-combo:problem: and the kind.")
    title: str = Field(description="The kind in words.")
    status: int = Field(description="HTTP status.")
    detail: str = Field(description="Expected, found, remedy.")
    request_id: str = Field(description="Id of the request.")
    did_you_mean: str | None = Field(default=None, description="The nearest valid name, where one is near.")
    errors: list[dict[str, str]] = Field(default=[], description="Per field: pointer (RFC 6901) and detail.")


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        kind: short name, the same between versions. errors: pointer and detail of single fields.
        headers: further ones, such as Retry-After.
    """

    status: int
    kind: str
    detail: str
    suggestion: str | None = None
    errors: Sequence[Mapping[str, str]] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_response(self, request_id: str) -> Response:
        """Return the answer that tells of it."""
        suggestion = self.suggestion
        if suggestion is None and (found := _SUGGESTION.search(self.detail)):
            suggestion = found[1]
        title = _TITLES.get(self.kind, self.kind.replace("-", " ").capitalize())
        body: dict[str, Any] = {
            "type": f"urn:peft-combo:problem:{self.kind}", "title": title, "status": self.status,
            "detail": self.detail, "request_id": request_id,
        }  # fmt: skip
        if suggestion is not None:
            body["did_you_mean"] = suggestion
        if self.errors:
            body["errors"] = list(self.errors)
        return Response(_to_bytes(body), self.status, dict(self.headers), MEDIA_TYPE)


class Refusal(Exception):
    """A problem on its way to whoever asked; raised by what stands before a route."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


def refuse(status: int, kind: str, detail: str, **headers: str) -> Refusal:
    """Return a refusal to raise; headers by name with _ for -: ``retry_after="2"``."""
    named = {name.replace("_", "-").title(): value for name, value in headers.items()}
    return Refusal(Problem(status, kind, detail, headers=named))


def describe_error(error: Exception, path: str = "", paths: Sequence[str] = ()) -> Problem:
    """Return the problem that an error is for whoever asked; one that is none of theirs is a fault of ours.

    Args:
        path: that was asked for. paths: of all routes, to name the nearest.
    """
    match error:
        case Refusal():
            return error.problem
        case ServiceError():
            wait = getattr(error, "retry_after", 1.0 if error.status == 503 else None)
            headers = {} if wait is None else {"Retry-After": str(max(1, math.ceil(wait)))}
            return Problem(error.status, error.kind, str(error), headers=headers)
        case StateError():
            return Problem(503, "state-unavailable", str(error), headers={"Retry-After": "5"})
        case PeftComboError():
            return Problem(400, "bad-request", str(error))
        case ValidationError():
            return _describe_validation(error.errors(include_url=False, include_context=False), error.title)
        case RequestValidationError():
            return _describe_validation(error.errors(), "")
        case HTTPException():
            return _describe_http(error, path, paths)
        case TimeoutError():
            return Problem(504, "timed-out", "The answer took longer than a request may take. Try again.")
        case _:
            detail = "This is a fault of the service, not of the request; its log has more under the request id."
            return Problem(500, "fault", detail)


def _describe_validation(errors: Sequence[Any], model: str) -> Problem:
    """Name each wrong field by its JSON pointer; of an unknown one the nearest that exists."""
    from peft_combo.serving.bodies import list_fields

    told: list[dict[str, str]] = []
    suggestion = None
    for one in errors[:_MOST_ERRORS]:
        place = [str(part) for part in one["loc"] if part not in ("body", "query", "path")]
        pointer = "".join(f"/{part.replace('~', '~0').replace('/', '~1')}" for part in place)
        found = one.get("input")
        detail = f"{one['msg']}, found {format_value(found)}."
        if one["type"] == "extra_forbidden":
            names = list_fields(model)
            suggestion = suggestion or nearest(place[-1], names)
            hint = did_you_mean(place[-1], names) or f"Fields: {', '.join(names)}."
            detail = f"There is no such field. {hint}"
        elif one["type"] in ("json_invalid", "missing"):
            detail = f"{one['msg']}."
        told.append({"pointer": make_printable(shorten(pointer, 200)), "detail": make_printable(detail)})
    first = told[0] if told else {"pointer": "", "detail": "It cannot be read."}
    return Problem(422, "invalid-body", f"{first['pointer'] or 'body'}: {first['detail']}", suggestion, told)


def _describe_http(error: HTTPException, path: str, paths: Sequence[str]) -> Problem:
    headers = dict(error.headers or {})
    if error.status_code == 404:
        close = nearest(path, paths)
        hint = f'Did you mean "{close}"?' if close else "The paths are listed in /openapi.json."
        return Problem(404, "not-found", f"There is no path {make_printable(shorten(path))}. {hint}")
    if error.status_code == 405:
        allowed = next((value for name, value in headers.items() if name.lower() == "allow"), "another method")
        return Problem(405, "method-not-allowed", f"Expected {allowed}.", headers=headers)
    return Problem(error.status_code, "bad-request", str(error.detail), headers=headers)


def _to_bytes(body: Mapping[str, Any]) -> bytes:
    """JSON as bytes; half characters of a path or value, which UTF-8 has no bytes for, are replaced."""
    try:
        return to_json(body)
    except ValueError:
        clean = {
            name: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
            for name, value in body.items() if name != "errors"
        }  # fmt: skip
        return to_json(clean)
