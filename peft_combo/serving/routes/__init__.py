"""Routes: paths of the service, each a few lines between a body and a call of the engine.

Own paths, scopes and status codes. Know nothing of how an answer is found.
"""

from __future__ import annotations

from fastapi import APIRouter

from peft_combo.serving.routes import adapters, encode, events, health, items, page, recommend

ROUTERS: tuple[APIRouter, ...] = (
    recommend.router, encode.router, items.router, events.router, adapters.router, health.router, page.router,
)  # fmt: skip
"""All of them, in the order of the description."""

__all__ = ["ROUTERS"]
