"""Encoding for many requests at once: texts of one adapter go through the encoder together, and are remembered.

Owns the queue before the encoder, who may wait in it and for how long, and the vectors of texts asked for before. Knows
texts and adapters; nothing of items or requests.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from peft_combo.encoder.bank import LiveAdapter
from peft_combo.errors import shorten
from peft_combo.serving.errors import NotReady, Overloaded, TimedOut, TooLarge
from peft_combo.serving.recent import Recent

Floats = NDArray[np.float32]
EncodeBatch = Callable[[Sequence[str], LiveAdapter | None], Floats]

_SLOWEST = 60.0  # seconds that an answer to "come back later" never exceeds


@dataclass(eq=False)
class _Waiting:
    texts: list[str]
    adapter: LiveAdapter | None
    since: float
    future: Future[Floats] = field(default_factory=Future)


@dataclass(frozen=True)
class BatchFigures:
    """Counts since the start, and the queue as it is: texts everywhere, batches aside."""

    queue_depth: int
    queue_limit: int
    batches: int
    batch_texts: int
    cache_hits: int
    cache_misses: int
    rejected: int
    timed_out: int


class EncodeBatcher:
    """Encodes texts in batches: ``batcher.encode(["red dress"], adapter)`` from any number of threads.

    One thread runs the encoder. The oldest request decides which adapter is next and waits at most `wait_ms` for others
    of the same; what comes while a batch is encoded is the next batch, so under load nobody waits in vain.

    Args:
        encode: runs the encoder on B texts with an adapter: (B, D).
        wait_ms: how long the first text waits for others.
        most_texts: texts of a batch. queue_texts: texts that may wait; more are turned away.
        timeout: seconds a request may take, waiting included.
        cached: vectors kept, those unused for longest going first.
        text_chars: longest text.
    """

    def __init__(
        self, encode: EncodeBatch, *, wait_ms: float = 2.0, most_texts: int = 64, queue_texts: int = 1024,
        timeout: float = 10.0, cached: int = 10_000, text_chars: int = 10_000,
    ) -> None:  # fmt: skip
        self._encode, self._wait, self._most = encode, wait_ms / 1e3, most_texts
        self._limit, self._timeout, self._chars = queue_texts, timeout, text_chars
        self._cache = VectorMemory(cached)
        self._changed = threading.Condition()
        self._queue: deque[_Waiting] = deque()
        self._depth = self._batches = self._texts = self._rejected = self._late = 0
        self._rate = 100.0  # texts a second, as lately seen
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
        self._thread.start()

    def encode(self, texts: Sequence[str], adapter: LiveAdapter | None, timeout: float | None = None) -> Floats:
        """Return unit vectors (B, D), from memory where the text was asked for before.

        Raises:
            TooLarge: a text is too long, or there are more than may wait.
            Overloaded: the queue is full. TimedOut: it took too long. NotReady: the service is closing.
        """
        for text in texts:
            if len(text) > self._chars:
                raise TooLarge(f"A text has at most {self._chars:,} characters, found {len(text):,}: {shorten(text)}")
        key = "" if adapter is None else adapter.digest
        found = [self._cache.get((key, text)) for text in texts]
        missing = list(dict.fromkeys(text for text, vector in zip(texts, found, strict=True) if vector is None))
        if missing:
            vectors = self._wait_for(missing, adapter, self._timeout if timeout is None else timeout)
            made = dict(zip(missing, vectors, strict=True))
            for text, vector in made.items():
                self._cache.put((key, text), vector)
            found = [made[text] if vector is None else vector for text, vector in zip(texts, found, strict=True)]
        return np.stack([vector for vector in found if vector is not None]) if found else np.empty((0, 0), np.float32)

    def forget(self, digest: str) -> None:
        """Drop the remembered vectors of an adapter."""
        self._cache.drop(digest)

    def clear(self) -> None:
        """Drop all remembered vectors: somebody's texts are to be forgotten."""
        self._cache.drop(None)

    def measure(self) -> BatchFigures:
        """Return counts and the queue as it is."""
        with self._changed:
            return BatchFigures(
                self._depth, self._limit, self._batches, self._texts, self._cache.hits, self._cache.misses,
                self._rejected, self._late,
            )  # fmt: skip

    def close(self) -> None:
        """Turn away who waits, and stop the thread after its batch."""
        with self._changed:
            self._closing = True
            left, self._queue, self._depth = list(self._queue), deque(), 0
            self._changed.notify_all()
        for one in left:
            if one.future.set_running_or_notify_cancel():
                one.future.set_exception(NotReady("The service is closing."))
        self._thread.join(timeout=30)

    def _wait_for(self, texts: list[str], adapter: LiveAdapter | None, timeout: float) -> Floats:
        if len(texts) > self._limit:
            raise TooLarge(f"At most {self._limit:,} texts are encoded at once, found {len(texts):,}. Send fewer.")
        waiting = _Waiting(texts, adapter, time.monotonic())
        with self._changed:
            if self._closing:
                raise NotReady("The service is closing.")
            if self._depth + len(texts) > self._limit:
                self._rejected += 1
                after = min(max(self._depth / self._rate, 0.1), _SLOWEST)
                raise Overloaded(
                    f"{self._depth:,} texts wait to be encoded, and {self._limit:,} may. Come back in {after:.1f} s.",
                    after,
                )
            self._queue.append(waiting)
            self._depth += len(texts)
            self._changed.notify_all()
        try:
            return waiting.future.result(timeout)
        except FutureTimeout:
            waiting.future.cancel()  # where it still waits, nobody encodes it any more
            with self._changed:
                self._late += 1
            raise TimedOut(f"Encoding took longer than {timeout:g} s.") from None

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            kept = [one for one in batch if one.future.set_running_or_notify_cancel()]
            texts = list(dict.fromkeys(text for one in kept for text in one.texts))
            if not texts:
                continue
            started = time.monotonic()
            try:
                vectors = dict(zip(texts, self._encode(texts, kept[0].adapter), strict=True))
            except BaseException as error:  # whatever it was, who waits is told
                for one in kept:
                    one.future.set_exception(error)
                continue
            for one in kept:
                one.future.set_result(np.stack([vectors[text] for text in one.texts]))
            with self._changed:
                self._batches += 1
                self._texts += len(texts)
                rate = len(texts) / max(time.monotonic() - started, 1e-4)
                self._rate = 0.8 * self._rate + 0.2 * rate

    def _next_batch(self) -> list[_Waiting] | None:
        """Wait for the next batch; None when closing."""
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            while not self._closing:
                first = self._queue[0]
                ready = sum(len(one.texts) for one in self._queue if one.adapter is first.adapter)
                left = first.since + self._wait - time.monotonic()
                if ready >= self._most or left <= 0:
                    break
                self._changed.wait(left)
            if self._closing:
                return None
            taken: list[_Waiting] = []
            kept: deque[_Waiting] = deque()
            size = 0
            for one in self._queue:
                # A request is encoded as a whole; one that is larger than a batch is one of its own.
                if one.adapter is self._queue[0].adapter and (not taken or size + len(one.texts) <= self._most):
                    taken.append(one)
                    size += len(one.texts)
                else:
                    kept.append(one)
            self._queue = kept
            self._depth -= size
            return taken


class VectorMemory:
    """Vectors of texts by (digest of the adapter, text); the ones unused for longest go first."""

    def __init__(self, most: int) -> None:
        self._kept: Recent[tuple[str, str], Floats] = Recent(most)
        self.hits = self.misses = 0

    def get(self, key: tuple[str, str]) -> Floats | None:
        """Return what is kept, (D,)."""
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found

    def put(self, key: tuple[str, str], vector: Floats) -> None:
        """Keep a vector."""
        own = np.array(vector)  # a row of a batch would keep all of it
        own.flags.writeable = False
        self._kept.put(key, own)

    def drop(self, digest: str | None) -> None:
        """Drop the vectors of an adapter, or all."""
        self._kept.forget([key for key, _ in self._kept.list_all() if digest is None or key[0] == digest])
