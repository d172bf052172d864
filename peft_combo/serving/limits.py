"""Limits: bodies, threads, queues and calls a minute, each refused in words once it is reached.

Owns what stands between a flood and the engine. Knows no route.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from peft_combo.serving.errors import Overloaded, TimedOut
from peft_combo.serving.problems import refuse

ResultT = TypeVar("ResultT")
_USUAL_SECONDS = 0.01  # what an answer takes before any was measured
_SMOOTHING = 0.05  # weight of the newest answer in the mean
_MOST_BUCKETS = 10_000


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """Return a request's body.

    Raises:
        Refusal: it is longer than `limit` bytes (413), or took longer than `seconds` to arrive (408).
    """
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > limit:
        raise _refuse_size(limit)
    message = await _receive(request, seconds)
    body: bytes = message.get("body", b"")
    if not message.get("more_body"):
        if len(body) > limit:
            raise _refuse_size(limit)
        return body
    chunks, size, end = [body], len(body), time.monotonic() + seconds
    while message.get("more_body"):
        message = await _receive(request, end - time.monotonic())
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise _refuse_size(limit)
    return b"".join(chunks)


async def _receive(request: Request, seconds: float) -> dict[str, Any]:
    try:
        async with asyncio.timeout(seconds):
            message = await request.receive()
    except TimeoutError as error:
        raise refuse(408, "timeout", "The body took too long to arrive.", connection="close") from error
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return dict(message)


def _refuse_size(limit: int) -> Exception:
    return refuse(413, "too-large", f"Expected a body of at most {limit:,} bytes, found a longer one.")


class WorkPool:
    """Runs the engine's calls in a bounded number of threads, with a bounded number waiting.

    Attributes:
        limit: calls that may be under way or wait. depth: those that do.
    """

    def __init__(self, threads: int, limit: int, timeout: float) -> None:
        self.limit, self.depth = limit, 0
        self._threads, self._timeout, self._mean = threads, timeout, _USUAL_SECONDS
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="answer")

    async def run(self, function: Callable[[], ResultT], timeout: float | None = None) -> ResultT:
        """Return what a call returns, from a thread.

        Args:
            timeout: seconds, in place of the pool's.
        Raises:
            Overloaded: as many as may wait do. TimedOut: it took too long; the thread goes on with it, and its place
                is free when it is done.
        """
        if self.depth >= self.limit:
            wait = self.depth * self._mean / self._threads
            raise Overloaded(f"{self.depth} requests are under way or wait, which is the most. Try again later.", wait)
        loop = asyncio.get_running_loop()
        self.depth += 1
        started = loop.time()
        future = loop.run_in_executor(self._executor, function)
        future.add_done_callback(lambda _: self._end(loop.time() - started))
        try:
            async with asyncio.timeout(self._timeout if timeout is None else timeout):
                return await asyncio.shield(future)
        except TimeoutError as error:
            if future.done() and not future.cancelled() and future.exception() is error:
                raise
            future.add_done_callback(lambda done: done.cancelled() or done.exception())  # it is read by nobody else
            raise TimedOut("The answer took longer than a request may take. Ask for less, or try again.") from error

    def _end(self, seconds: float) -> None:
        self.depth -= 1
        self._mean += _SMOOTHING * (seconds - self._mean)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


class RateLimit:
    """A token bucket for each caller: `per_minute` in the long run, a tenth of that at once."""

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, caller: str, per_minute: int) -> float:
        """Count a call; return 0, or the seconds to wait where there were too many."""
        rate = per_minute / 60 / self._workers
        most = max(1.0, rate * 6)
        now = time.monotonic()
        tokens, then = self._buckets.get(caller, (most, now))
        tokens = min(most, tokens + (now - then) * rate)
        if tokens < 1:
            self._buckets[caller] = (tokens, now)
            return (1 - tokens) / rate
        if len(self._buckets) > _MOST_BUCKETS:
            self._buckets.clear()
        self._buckets[caller] = (tokens - 1, now)
        return 0.0
