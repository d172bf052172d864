"""Routes that tell how the service is: live, ready, metrics, status; and what to try."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from peft_combo import __version__
from peft_combo.serving.answers import EngineFigures, Swap
from peft_combo.serving.call import Context, get_call, reply
from peft_combo.serving.errors import NotReady
from peft_combo.serving.routes.json_route import describe, make_router

router = make_router("health")


@router.get("/health/live", summary="Whether the process lives", response_model=dict[str, Any], **describe(None))
async def live(request: Request) -> Response:
    """Whether the process answers."""
    return reply({"status": "live"})


@router.get("/health/ready", summary="Whether to send requests here", response_model=dict[str, Any], **describe(None))
async def ready(request: Request) -> Response:
    """Whether every alias answered its warm-up request."""
    if not get_call(request).context.service.ready:
        raise NotReady("The service is starting or ending.")
    return reply({"status": "ready"})


@router.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse, **describe("read"))
async def metrics(request: Request) -> Response:
    """The figures of all processes, in Prometheus' text format."""
    context = get_call(request).context
    refresh(context)
    text, kind = context.monitor.scrape()
    return Response(text, headers={"Content-Type": kind})


@router.get("/v1/examples", summary="What to try", response_model=dict[str, Any], **describe("read"))
async def examples(request: Request) -> Response:
    """Users, baskets and queries of this catalogue."""
    call = get_call(request)
    return reply(await call.run(call.context.service.list_examples))


@router.get("/v1/status", summary="How the service is", response_model=dict[str, Any], **describe("read"))
async def status(request: Request) -> Response:
    """Latency by route, queue, caches, arms, drift and the last changes of aliases."""
    call = get_call(request)
    return reply(await call.run(lambda: _describe(call.context)))


def refresh(context: Context) -> None:
    """Take the engine's figures over into the metrics."""
    service = context.service
    context.monitor.update(service.measure(), service.list_adapters(), service.ready, context.pool.depth)


def _describe(context: Context) -> dict[str, Any]:
    refresh(context)
    service, summary = context.service, context.monitor.summarize()
    figures: EngineFigures = service.measure()
    aliases = service.list_adapters()
    arms = [
        {
            "alias": one.alias, "arm": name, "version": arm.version, "share": arm.share, "requests": arm.requests,
            "mean_ms": arm.mean_ms, **summary["arms"].get((one.alias, name), {"exposures": 0, "feedback": 0}),
        }
        for one in aliases
        for name, arm in one.arms.items()
    ]  # fmt: skip
    return {
        "ready": service.ready, "uptime_s": round(time.time() - context.monitor.started, 1), "version": __version__,
        "open": "read" in context.config.open_scopes, "open_scopes": sorted(context.config.open_scopes),
        "workers": context.config.workers, "routes": summary["routes"],
        "release": {one.alias: one.arms["prod"].release for one in aliases if "prod" in one.arms},
        "queue": {"depth": figures.queue_depth, "limit": figures.queue_limit},
        "batch": {"mean": figures.batch_texts / figures.batches if figures.batches else None},
        "cache": {"hits": figures.cache_hits, "misses": figures.cache_misses},
        "rejected": dict(figures.rejected), "answered_by": dict(figures.answered_by),
        "fallbacks": summary["fallbacks"], "arms": arms,
        "drift": [{"of": name, "value": value, "limit": None} for name, value in figures.drift.items()],
        "swaps": [_describe_swap(one) for one in figures.swaps[:20]],
        "memory": {"adapters": sum(figures.adapter_bytes.values())},
        "items": {
            "catalogue": figures.catalogue, "upserted": figures.upserted, "deleted": figures.deleted,
        },
        "journal": {
            "waiting": len(context.journal), "written": context.journal.written, "dropped": context.journal.dropped,
        },
    }  # fmt: skip


def _describe_swap(swap: Swap) -> dict[str, Any]:
    told = asdict(swap)
    told["time"] = datetime.fromtimestamp(swap.time, UTC).isoformat(timespec="seconds")
    return {**told, "from": told.pop("before"), "to": told.pop("after"), "took_ms": swap.swap_ms}
