"""Routes of the recommender: one body, six questions."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from peft_combo.serving.answers import Answer
from peft_combo.serving.bodies import AnswerBody
from peft_combo.serving.call import Call, get_call
from peft_combo.serving.requests import ServiceRequest
from peft_combo.serving.routes.json_route import ANSWER, describe, make_router

router = make_router("recommend")
_SPEC = describe("read", *ANSWER)
_ANSWER = {**_SPEC, "response_model": AnswerBody}


@router.post("/v1/recommend", summary="Items for a user, items or a query", **_ANSWER)
async def recommend(body: ServiceRequest, request: Request) -> Response:
    """Single items for a user, for items, for a query, or for any of them together."""
    call = get_call(request)
    return await _answer(call, call.context.service.recommend, body)


@router.post("/v1/complete", summary="Items that complete others", **_ANSWER)
async def complete(body: ServiceRequest, request: Request) -> Response:
    """Single items that complete `items`."""
    call = get_call(request)
    return await _answer(call, call.context.service.complete, body)


@router.post("/v1/compose", summary="Bundles", **_ANSWER)
async def compose(body: ServiceRequest, request: Request) -> Response:
    """Bundles that hold `items`, or new ones for a user or a query, within a budget."""
    call = get_call(request)
    return await _answer(call, call.context.service.compose, body)


@router.post("/v1/replace", summary="Items in place of one", **_ANSWER)
async def replace(body: ServiceRequest, request: Request) -> Response:
    """Single items that could take the place of `swap` among `items`, the rest kept."""
    call = get_call(request)
    return await _answer(call, call.context.service.replace, body)


@router.post("/v1/search", summary="Items by their texts", **_ANSWER)
async def search(body: ServiceRequest, request: Request) -> Response:
    """Items whose texts are most like `query`."""
    call = get_call(request)
    return await _answer(call, call.context.service.search, body)


@router.post("/v1/rank", summary="Given bundles, best first", **_ANSWER)
async def rank(body: ServiceRequest, request: Request) -> Response:
    """`bundles` in the order of how well they go with items, user or query."""
    call = get_call(request)
    return await _answer(call, call.context.service.rank, body)


async def _answer(call: Call, ask: Callable[[ServiceRequest], Answer], body: ServiceRequest) -> Response:
    """Answer in a thread of the pool. Who names no id of the request in the body has that of the header."""
    asked = body if body.request_id is not None else body.model_copy(update={"request_id": call.request_id})
    return call.answer(await call.run(lambda: ask(asked)))
