"""The journal of exposures: written behind the answers, bounded, and honest about what it dropped.

Owns a thread and a queue. Whoever answers a request hands over a row and goes on; rows are written in batches.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from peft_combo.serving.state.rows import ExposureRow
from peft_combo.serving.state.store import State
from peft_combo.serving.state.tables import StateError

_BATCH = 500  # rows of one transaction
_PAUSE = 0.25  # seconds between transactions, so that a quiet service syncs its disk four times a second at most


class Journal:
    """Writes exposures in the background: ``journal.offer(row)`` never waits.

    Attributes:
        written, dropped: rows so far.
    """

    def __init__(
        self, state: State, limit: int = 20_000, on_dropped: Callable[[int], None] = lambda count: None
    ) -> None:
        self._state, self._on_dropped = state, on_dropped
        self._rows: queue.Queue[ExposureRow] = queue.Queue(limit)
        self._closing, self._wake = threading.Event(), threading.Event()
        self.written = self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return self._rows.qsize()

    def offer(self, row: ExposureRow) -> bool:
        """Queue a row; False where the queue is full, and the row is counted as dropped."""
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._drop(1)
            return False
        return True

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until all that was offered so far is written or dropped; False where the time ran out."""
        end = time.monotonic() + timeout
        while self._rows.unfinished_tasks and time.monotonic() < end:
            self._wake.set()
            time.sleep(0.005)
        return not self._rows.unfinished_tasks

    def close(self, timeout: float = 10.0) -> None:
        """Write what is queued and end the thread."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        while not (self._closing.is_set() and self._rows.empty()):
            self._wake.wait(_PAUSE)
            self._wake.clear()
            while batch := self._take():
                self._write(batch)

    def _take(self) -> list[ExposureRow]:
        batch: list[ExposureRow] = []
        while len(batch) < _BATCH:
            try:
                batch.append(self._rows.get_nowait())
            except queue.Empty:
                break
        return batch

    def _write(self, batch: list[ExposureRow]) -> None:
        try:
            self._state.add_exposures(batch)
            self.written += len(batch)
        except StateError:  # a full disk: what was shown is not known, but answers go on
            self._drop(len(batch))
        for _ in batch:
            self._rows.task_done()

    def _drop(self, count: int) -> None:
        self.dropped += count
        self._on_dropped(count)
