"""Connections: the server below the application, in one process.

Owns uvicorn's settings, and the clock on a client that begins a request and does not go on with it.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from peft_combo.errors import PeftComboError
from peft_combo.serving.config import ServiceConfig
from peft_combo.serving.problems import Problem

_HEADER_SECONDS = 15.0
_KEEP_ALIVE_SECONDS = 30
_BACKLOG = 2048


def bind(config: ServiceConfig) -> socket.socket:
    """Return a socket bound to the address, before anything slow is loaded.

    Raises:
        PeftComboError: the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise PeftComboError(
            f"{config.host}:{config.port} cannot be listened on: {reason}. Name another with --host and --port."
        ) from error
    bound.set_inheritable(True)
    return bound


class PatientProtocol(HttpToolsProtocol):
    """HTTP that closes a connection whose request has not told its headers after some seconds.

    Beyond the most connections it answers in the service's own form, in place of uvicorn's plain text.
    """

    _clock: asyncio.TimerHandle | None = None

    def __init__(self, *values: Any, **more: Any) -> None:
        super().__init__(*values, **more)
        self._served, self._most, self.limit_concurrency = self.app, self.limit_concurrency, None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wind()

    def data_received(self, data: bytes) -> None:
        cycle: Any = self.cycle  # None before the first request
        if self._clock is None and (cycle is None or cycle.response_complete):
            self._wind()
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._stop()
        full = self._most is not None and max(len(self.connections), len(self.tasks)) >= self._most
        self.app = _turn_away if full else self._served
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wind(self) -> None:
        self._clock = self.loop.call_later(_HEADER_SECONDS, self._end)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _end(self) -> None:
        self._clock = None
        if not self.transport.is_closing():
            self.transport.close()


async def _turn_away(scope: Any, receive: Any, send: Any) -> None:
    """Answer that there are too many connections; of this one no more requests are taken."""
    problem = Problem(
        503, "overloaded", "There are as many connections as the service takes. Try again later, or keep fewer open.",
        headers={"Retry-After": "1", "Connection": "close"},
    )  # fmt: skip
    await problem.to_response(uuid.uuid4().hex)(scope, receive, send)


class GracefulServer(uvicorn.Server):
    """Ends by SIGTERM or SIGINT once what is under way is answered; a second signal does not wait."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals, and give them back unanswered: ending when told to is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.handle_exit(number, frame)


def make_server(app: FastAPI, config: ServiceConfig, on_started: Callable[[], None] = lambda: None) -> GracefulServer:
    """Return a server for an application; ``server.run(sockets=[bound])`` answers until it is told to end."""
    settings = uvicorn.Config(
        app, http=PatientProtocol, ws="none", lifespan="on", log_config=None, log_level="warning", access_log=False,
        proxy_headers=False, server_header=False, backlog=_BACKLOG, limit_concurrency=config.connections,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=max(1, round(config.grace)),
        ssl_certfile=None if config.tls_cert is None else str(config.tls_cert),
        ssl_keyfile=None if config.tls_key is None else str(config.tls_key),
    )  # fmt: skip
    return GracefulServer(settings, on_started)
