"""What is done after an answer was given: telling listeners, and the answers of shadows; nobody waits for it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from peft_combo.serving.answers import ShownAnswer

_LOG = logging.getLogger(__name__)
_MOST = 1000  # jobs that may wait; more are dropped and counted


class Afterwards:
    """A thread that does jobs one after the other."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[ShownAnswer], None]] = []
        self.dropped = 0
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(_MOST)
        self._thread = threading.Thread(target=self._run, name="afterwards", daemon=True)
        self._thread.start()

    def do(self, job: Callable[[], None]) -> None:
        """Do a job later, or not at all where too many wait."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self.dropped += 1

    def tell(self, shown: ShownAnswer) -> None:
        """Tell every listener of an answer, now."""
        for listener in self.listeners:
            listener(shown)

    def close(self, timeout: float) -> None:
        """Do what waits, and stop."""
        try:
            self._jobs.put(None, timeout=timeout)
            self._thread.join(timeout)
        except queue.Full:
            _LOG.warning("what was to be done after answers was not done in time")

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                _LOG.exception("what was to be done after an answer failed")
