"""Routes of the recommender: one body, six questions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from starlette.requests import Request
from starlette.responses import Response

from peft_combo.serving.answers import Answer
from peft_combo.serving.bodies import AnswerBody
from peft_combo.serving.call import get_call
from peft_combo.serving.requests import ServiceRequest
from peft_combo.serving.routes.json_route import ANSWER, describe, make_router

if TYPE_CHECKING:  # the engine loads torch
    from peft_combo.serving.service import Service

router = make_router("recommend")

Ask: TypeAlias = "Callable[[Service, ServiceRequest], Answer]"

_QUESTIONS: tuple[tuple[str, Ask, str, str], ...] = (
    (
        "recommend", lambda service, asked: service.recommend(asked), "Items for a user, items or a query",
        "Single items for a user, for items, for a query, or for any of them together.",
    ),
    (
        "complete", lambda service, asked: service.complete(asked), "Items that complete others",
        "Single items that complete `items`.",
    ),
    (
        "compose", lambda service, asked: service.compose(asked), "Bundles",
        "Bundles that hold `items`, or new ones for a user or a query, within a budget.",
    ),
    (
        "replace", lambda service, asked: service.replace(asked), "Items in place of one",
        "Single items that could take the place of `swap` among `items`, the rest kept.",
    ),
    (
        "search", lambda service, asked: service.search(asked), "Items by their texts",
        "Items whose texts are most like `query`.",
    ),
    (
        "rank", lambda service, asked: service.rank(asked), "Given bundles, best first",
        "`bundles` in the order of how well they go with items, user or query.",
    ),
)  # fmt: skip


def _add_route(name: str, ask: Ask, summary: str, description: str) -> None:
    async def answer(body: ServiceRequest, request: Request) -> Response:
        """Answer in a thread of the pool. Who names no id of the request in the body has that of the header."""
        call = get_call(request)
        asked = body if body.request_id is not None else body.model_copy(update={"request_id": call.request_id})
        return call.answer(await call.run(lambda: ask(call.context.service, asked)))

    router.add_api_route(
        f"/v1/{name}", answer, methods=["POST"], name=name, summary=summary, description=description,
        response_model=AnswerBody, **describe("read", *ANSWER),
    )  # fmt: skip


for _question in _QUESTIONS:
    _add_route(*_question)
