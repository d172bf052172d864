"""Routes of behaviour: events, feedback on answers, and people who want to be forgotten."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Path
from starlette.requests import Request
from starlette.responses import Response

from peft_combo.serving.bodies import AcceptedBody, EventsBody, FeedbackBody, Id
from peft_combo.serving.call import Call, get_call, reply
from peft_combo.serving.errors import ServiceError
from peft_combo.serving.routes.json_route import BODY, describe, make_router
from peft_combo.serving.state import ExposureRow, FeedbackRow

router = make_router("events")
_PENDING_SECONDS = 1.0  # an exposure may still be in the journal of the process that answered


class UnknownRequest(ServiceError):
    """No answer was logged under this request id."""

    kind = "unknown-request"
    status = 404


@router.post("/v1/events", summary="What users did", response_model=AcceptedBody, **describe("write", *BODY, 504))
async def add_events(body: EventsBody, request: Request) -> Response:
    """Take events in: they are on the disk and count in recommendations when this answers.

    `accepted` counts what is new: an event whose `event_id` is there already was sent before.
    """
    call = get_call(request)
    values = [one.model_dump(exclude_none=True) for one in body.events]
    return call.accept(await call.run(lambda: call.context.service.add_events(values)))


@router.post(
    "/v1/feedback", summary="What became of an answer", response_model=AcceptedBody, **describe("write", *BODY, 404)
)
async def add_feedback(body: FeedbackBody, request: Request) -> Response:
    """Take in what was done with an answer, joined to it by its request id."""
    call = get_call(request)
    shown = await _find_exposure(call, body.request_id)
    row = FeedbackRow(body.request_id, body.kind, body.item_id, body.value)
    count = await call.run(lambda: call.context.state.add_feedback([row]))
    call.context.monitor.count("peft_combo_feedback_total", shown.alias, shown.arm, body.kind)
    return call.accept(count)


async def _find_exposure(call: Call, request_id: str) -> ExposureRow:
    """Return what was shown under a request id; waits a moment for a journal that has not written it yet."""
    for attempt in range(4):
        found = await call.run(lambda: call.context.state.find_exposures(request_id))
        shown = [row for row in found if row.arm != "shadow"]
        if shown:
            return shown[-1]
        if attempt == 0:
            await call.run(lambda: call.context.journal.flush(_PENDING_SECONDS))
        else:
            await asyncio.sleep(0.1 * attempt)
    raise UnknownRequest("No answer was given under this request_id, or it was not logged.")


@router.delete("/v1/users/{user}", summary="Forget a person", response_model=dict[str, Any], **describe("admin", 504))
async def forget_user(user: Annotated[Id, Path(description="Id of the user.")], request: Request) -> Response:
    """Remove a person from events, exposures, feedback, scorers and caches; the answer says how much that was."""
    call = get_call(request)

    def forget() -> dict[str, int]:
        call.context.journal.flush()
        return dict(call.context.service.forget_user(user))

    return reply({"request_id": call.request_id, "removed": await call.run(forget)})
