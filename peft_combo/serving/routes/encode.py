"""Routes of the encoder by itself: embeddings in OpenAI's shape, tags, classes, templates, ratings."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from peft_combo.serving.bodies import ClassifyBody, EmbeddingsBody, MatchBody, RateBody, ResultsBody, TextsBody
from peft_combo.serving.call import get_call, quote_header, reply
from peft_combo.serving.errors import BadRequest
from peft_combo.serving.routes.json_route import ANSWER, describe, make_router

router = make_router("encode")
_ENCODE = describe("read", *ANSWER)


@router.post("/v1/embeddings", summary="Embeddings, in OpenAI's shape", response_model=dict[str, Any], **_ENCODE)
async def embeddings(body: EmbeddingsBody, request: Request) -> Response:
    """Unit vectors of texts under the adapter that `model` names, such as fashion@prod."""
    call = get_call(request)
    service = call.context.service
    texts = [body.input] if isinstance(body.input, str) else body.input

    def encode() -> Any:
        return service.embed(texts, body.model), service.count_tokens(texts)

    (vectors, origin), tokens = await call.run(encode)
    if body.dimensions not in (None, vectors.shape[1]):
        raise BadRequest(f"dimensions: expected {vectors.shape[1]}, which this encoder has, found {body.dimensions}.")
    call.category = origin.alias.partition("@")[0]
    data = [
        {"object": "embedding", "index": place, "embedding": one}
        for place, one in enumerate(_write_vectors(vectors, body.encoding_format))
    ]
    told = {
        "object": "list", "data": data, "model": body.model or origin.alias,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }  # fmt: skip
    return reply(
        told,
        headers={
            "X-Adapter-Version": quote_header(origin.version),
            "X-Adapter-Digest": quote_header(origin.digest),
            "X-Arm": origin.arm,
        },
    )


def _write_vectors(vectors: Any, form: str) -> list[Any]:
    if form == "float":
        rows: list[Any] = vectors.tolist()
        return rows
    return [base64.b64encode(np.ascontiguousarray(row, "<f4").tobytes()).decode() for row in vectors]


@router.get("/v1/models", summary="What `model` may name", response_model=dict[str, Any], **describe("read"))
async def models(request: Request) -> Response:
    """The aliases that are served, in OpenAI's shape."""
    call = get_call(request)
    found = call.context.service.list_adapters()
    data = [{"id": one.alias, "object": "model", "created": 0, "owned_by": "peft-combo"} for one in found]
    return reply({"object": "list", "data": data})


@router.post("/v1/tag", summary="Entities of texts", response_model=ResultsBody, **_ENCODE)
async def tag(body: TextsBody, request: Request) -> Response:
    """The entities of each text; without a tagging adapter those of the lexicon."""
    call = get_call(request)
    return call.results(*await call.run(lambda: call.context.service.tag(body.texts, body.adapter)))


@router.post("/v1/classify", summary="Classes of texts", response_model=ResultsBody, **_ENCODE)
async def classify(body: ClassifyBody, request: Request) -> Response:
    """The classes of each text, likeliest first."""
    call = get_call(request)
    return call.results(*await call.run(lambda: call.context.service.classify(body.texts, body.adapter)))


@router.post("/v1/match", summary="Answer templates for a text", response_model=ResultsBody, **_ENCODE)
async def match(body: MatchBody, request: Request) -> Response:
    """The templates that fit a text best, as in customer service."""
    call = get_call(request)
    service = call.context.service
    return call.results(*await call.run(lambda: service.match(body.text, body.templates, body.adapter, body.k)))


@router.post("/v1/rate", summary="How likely items are taken", response_model=ResultsBody, **_ENCODE)
async def rate(body: RateBody, request: Request) -> Response:
    """How likely a user, or somebody who liked some items, is to take others."""
    call = get_call(request)

    def ask() -> Any:
        return call.context.service.rate(body.adapter, user=body.user, liked=body.liked, items=body.items, k=body.k)

    return call.results(*await call.run(ask))
