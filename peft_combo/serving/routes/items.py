"""Routes of items: found by words, put, put by the batch, deleted."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Path, Query
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from peft_combo.serving.bodies import BATCH_LINE, AcceptedBody, Id, ItemBody
from peft_combo.serving.call import get_call, reply
from peft_combo.serving.errors import BadRequest
from peft_combo.serving.limits import read_body
from peft_combo.serving.problems import describe_error
from peft_combo.serving.routes.json_route import BODY, check_media_type, describe, make_router

router = make_router("items")
_MOST_LINES = 10_000
_NDJSON = ("application/x-ndjson", "application/jsonl", "application/json-lines", "application/ndjson")
_ItemId = Annotated[Id, Path(description="Id of the item.")]


@router.get("/v1/items", summary="Items by words", response_model=dict[str, Any], **describe("read"))
async def find_items(
    request: Request,
    search: Annotated[str, Query(max_length=1000, description="Words that title or id hold.")] = "",
    limit: Annotated[int, Query(ge=1, le=1000, description="Number of items.")] = 20,
    cursor: Annotated[str | None, Query(max_length=4000, description="The next_cursor of an answer.")] = None,
) -> Response:
    """Items whose title or id holds every word; no encoder is asked."""
    call = get_call(request)
    results, following, total = await call.run(lambda: call.context.service.find_items(search, limit, cursor))
    return reply({"request_id": call.request_id, "results": results, "next_cursor": following, "total": total})


@router.get("/v1/items/{item_id:path}", summary="One item", response_model=dict[str, Any], **describe("read", 404))
async def get_item(item_id: _ItemId, request: Request) -> Response:
    """An item with all its columns."""
    call = get_call(request)
    return reply(await call.run(lambda: call.context.service.get_item(item_id)))


@router.put(
    "/v1/items/{item_id:path}", summary="Put an item", response_model=dict[str, Any], **describe("write", *BODY, 504)
)
async def put_item(body: ItemBody, request: Request, item_id: _ItemId) -> Response:
    """Take an item in, new or changed: it is on the disk and found by its text when this answers."""
    call = get_call(request)
    _check_id(item_id)
    values = {**body.model_dump(exclude_unset=True), "item_id": item_id}
    [outcome] = await call.run(lambda: call.context.service.put_items([values]))
    if not outcome.accepted:
        raise BadRequest(outcome.error or "The item was refused.")
    told = {"request_id": call.request_id, "item_id": item_id, "status": outcome.status, "note": outcome.note}
    return reply(told, 201 if outcome.status == "created" else 200)


@router.post(
    "/v1/items:batch", summary="Put many items", response_model=AcceptedBody,
    **describe("write", *BODY, 504, media={"application/x-ndjson": {"schema": {"type": "string"}}}),
)  # fmt: skip
async def put_batch(request: Request) -> Response:
    """Take items in, a JSON object on each line; a faulty line costs itself and no other."""
    call = get_call(request)
    check_media_type(request, *_NDJSON)
    config = call.context.config
    lines = (await read_body(request, config.batch_bytes, config.body_seconds * 6)).split(b"\n")
    if sum(map(bool, lines)) > _MOST_LINES:
        raise BadRequest(
            f"Expected at most {_MOST_LINES:,} lines, found {sum(map(bool, lines)):,}. Send them in parts."
        )
    values: list[dict[str, Any]] = []
    numbers: list[int] = []
    errors: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values.append(BATCH_LINE.validate_json(line).model_dump(exclude_unset=True))
            numbers.append(number)
        except ValidationError as error:
            errors.append({"line": number, "detail": describe_error(error).detail})
    outcomes = await call.run(lambda: call.context.service.put_items(values), timeout=config.timeout * 10)
    for number, outcome in zip(numbers, outcomes, strict=True):
        if not outcome.accepted:
            errors.append({"line": number, "item_id": outcome.item_id, "detail": outcome.error})
    return call.accept(sum(one.accepted for one in outcomes), sorted(errors, key=lambda one: int(one["line"])))


@router.delete(
    "/v1/items/{item_id:path}", summary="Delete an item", response_model=AcceptedBody, **describe("write", 404)
)
async def delete_item(item_id: _ItemId, request: Request) -> Response:
    """Hide an item for good."""
    call = get_call(request)
    await call.run(lambda: call.context.service.delete_item(item_id))
    return call.accept(1)


def _check_id(item_id: str) -> None:
    if len(item_id) > 200 or not item_id.isprintable():
        raise BadRequest("item_id: expected at most 200 printable characters.")
