"""Routes of adapters: what is served, and what moves it. What moves anything needs the scope admin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Path
from starlette.requests import Request
from starlette.responses import Response

from peft_combo.errors import did_you_mean
from peft_combo.serving.answers import AdapterStatus
from peft_combo.serving.bodies import AliasBody, Id, PromoteBody
from peft_combo.serving.call import Call, get_call, reply
from peft_combo.serving.errors import UnknownAdapter
from peft_combo.serving.routes.json_route import BODY, describe, make_router

if TYPE_CHECKING:
    from peft_combo.serving.service import Service

router = make_router("adapters")
_BUILD_SECONDS = 3600.0  # a release encodes a catalogue: minutes on a small machine
_MOVE = {**describe("admin", *BODY, 404, 409, 504), "response_model": dict[str, Any]}


@router.get("/v1/adapters", summary="Aliases and versions", response_model=dict[str, Any], **describe("read"))
async def list_adapters(request: Request) -> Response:
    """Every alias that is served with its arms, and every version that is stored with its figures."""
    call = get_call(request)
    service = call.context.service
    aliases, versions = await call.run(lambda: (service.list_adapters(), service.list_versions()))
    return reply({"request_id": call.request_id, "aliases": [one.to_json() for one in aliases], "versions": versions})


@router.get("/v1/adapters/{alias}", summary="One alias", response_model=dict[str, Any], **describe("read", 404))
async def get_adapter(
    alias: Annotated[Id, Path(description="Alias, as in fashion@prod.")], request: Request
) -> Response:
    """An alias with its arms and the figures of each."""
    call = get_call(request)
    found = {one.alias: one for one in call.context.service.list_adapters()}
    if alias not in found:
        hint = did_you_mean(alias, found) or f"Served: {', '.join(found) or 'none'}."
        raise UnknownAdapter(f"No alias {alias} is served. {hint}")
    return reply(found[alias].to_json())


@router.post("/v1/adapters/load", summary="Serve one more alias", **_MOVE)
async def load(body: AliasBody, request: Request) -> Response:
    """Build and warm the release of an alias, and serve it."""
    return await _move(get_call(request), lambda service, actor: service.load(body.alias, actor=actor))


@router.post("/v1/adapters/promote", summary="Let an alias mean another version", **_MOVE)
async def promote(body: PromoteBody, request: Request) -> Response:
    """Replace adapter, item vectors and index of an alias as one, or give another version a share of the traffic."""
    split = None if body.split is None else {str(name): share for name, share in body.split.items()}

    def act(service: Service, actor: str) -> AdapterStatus:
        return service.promote(body.alias, body.version, split=split, shadow=body.shadow, wait=body.wait, actor=actor)

    return await _move(get_call(request), act, 200 if body.wait else 202)


@router.post("/v1/adapters/rollback", summary="Take the last change of an alias back", **_MOVE)
async def roll_back(body: AliasBody, request: Request) -> Response:
    """End a split or shadow; without one, let the alias mean what it meant before."""
    return await _move(get_call(request), lambda service, actor: service.rollback(body.alias, actor=actor))


@router.post("/v1/adapters/unload", summary="Stop serving an alias", **_MOVE)
async def unload(body: AliasBody, request: Request) -> Response:
    """Stop serving an alias; the last one stays."""
    call = get_call(request)
    service, actor = call.context.service, _name_actor(call)
    await call.run(lambda: service.unload(body.alias, actor=actor))
    return reply({"request_id": call.request_id, "alias": body.alias, "unloaded": True})


async def _move(call: Call, act: Callable[[Service, str], AdapterStatus], code: int = 200) -> Response:
    """Change an alias in a thread of the pool, however long a release takes, and answer how it stands."""
    service, actor = call.context.service, _name_actor(call)
    status = await call.run(lambda: act(service, actor), timeout=_BUILD_SECONDS)
    return reply(status.to_json(), code)


def _name_actor(call: Call) -> str:
    """Return who asked, for the audit log: the name of the key and its id, never the key."""
    return f"{call.caller.name} ({call.caller.key_id})" if call.caller.key_id else call.caller.name
