"""Turns: a lock that lets threads in by the order they came.

Scoring is many short steps under the interpreter's own lock. Threads that score side by side hand it back and forth
between any two steps; taking turns, each is done sooner, and in turn none waits much longer than the others.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """One thread at a time, first come, first served; not to be entered twice by one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # over the next two
        self._waiting: deque[threading.Lock] = deque()
        self._busy = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._busy:
                self._busy = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()  # until the one before hands over

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._busy = False
