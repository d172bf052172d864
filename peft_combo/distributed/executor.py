"""Executor: a function over shares of work, each done once by one of several workers.

Owns the order of things whoever the workers are: a share goes to a worker that has none, a share whose worker died goes
to another one, and one that has cost several workers is given up. What a worker is, `local` and `ray_actors` know.
"""

from __future__ import annotations

import importlib
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeAlias

from peft_combo.errors import PeftComboError

BLOCKS_PER_WORKER = 4
"""Blocks cut for each worker at least: with fewer, the last one of a slow worker is what all wait for."""

CORES_PER_WORKER = 4
"""What one encoder keeps busy well; more cores are better used by another worker."""

_WORKERS_PER_SHARE = 3  # a share that so many workers died of is what they died of
_STARTS = 3  # workers in a row that ended before they were ready, after which no other is started
_POLL_SECONDS = 1.0

Share: TypeAlias = Any
"""Texts, numbers, arrays of numbers, and lists and dictionaries of them."""

Reply: TypeAlias = tuple[Literal["ready", "done", "refused", "failed", "died"], Any]
"""What came of a worker: that it is ready; what a function returned, what a user can put right, or a traceback; or how
it ended."""


@dataclass(frozen=True)
class LostShare:
    """A share that is given up, in place of its result: every worker that had it died."""

    reason: str


class Executor(Protocol):
    """Workers that do shares: ``for number, result in executor.map_shares(function, shares)``."""

    @property
    def workers(self) -> int:
        """How many shares are done at the same time, at most."""

    def map_shares(
        self, function: Callable[[Share], Any], shares: Iterable[Share]
    ) -> Iterator[tuple[int, Any | LostShare]]:
        """Call a function on every share, and yield results as they come, each with the number of its share.

        Args:
            function: of a module that workers can import; it travels as its name. What it keeps in its module, such
                as a loaded encoder, its worker finds again at the next share.
            shares: read one by one, as workers become free.
        Raises:
            PeftComboError: raised by the function, with its message; or no worker could be started.
            RuntimeError: the function raised something else; the worker's traceback is the message.
        """

    def close(self) -> None:
        """End the workers."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def cut_blocks(count: int, workers: int, most: int) -> list[slice]:
    """Cut rows into blocks of equal size: several for each worker, none of more than `most` rows.

    Args:
        count: rows there are. workers: who do them. most: rows of a block.
    """
    size = max(1, min(most, -(-count // (BLOCKS_PER_WORKER * workers))))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


# --- functions by name ------------------------------------------------------------------------------------------------


def name_function(function: Callable[[Share], Any]) -> str:
    """Return the name a function travels under.

    Raises:
        ValueError: another process would not find it.
    """
    module, name = function.__module__, function.__qualname__
    if module == "__main__" or "<" in name:
        raise ValueError(f"function: expected one at the top of a module that can be imported, found {module}.{name}.")
    return f"{module}:{name}"


def call_by_name(name: str, share: Share) -> Reply:
    """Call a function on a share, in the process of a worker; what it raises becomes words."""
    try:
        module, _, path = name.partition(":")
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        return "done", found(share)
    except PeftComboError as error:
        return "refused", str(error)
    except Exception:
        return "failed", traceback.format_exc()


def check_workers(workers: int | None) -> None:
    """Refuse a number of workers below 1.

    Raises:
        ValueError: see above.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected 1 or more, found {workers}.")


def bound_threads(cores: int) -> str:
    """Return the threads of a worker: its cores, or fewer where OMP_NUM_THREADS allows fewer."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return str(min(cores, int(asked)) if asked.isdigit() and int(asked) else cores)


# --- the loop ---------------------------------------------------------------------------------------------------------


class WorkerPool(Protocol):
    """Workers of one kind: how one is started, asked, heard and ended. A handle is the pool's own affair."""

    size: int
    patience: float
    on_note: Callable[[str], None]

    def start(self) -> Any:
        """Begin to start a worker, and return its handle; it says "ready" when it is."""

    def send(self, worker: Any, name: str, share: Share) -> None:
        """Hand a share to a worker that has none."""

    def hear(self, workers: Sequence[Any], seconds: float) -> list[tuple[Any, Reply]]:
        """Return what workers said, having waited so long for a word of any."""

    def stop(self, worker: Any) -> None:
        """End a worker at once, whatever it does."""

    def explain_wait(self) -> str:
        """Say why no worker could be started, and what to do."""

    def explain_start(self, reason: str) -> str:
        """Say that workers ended before they were ready, and what to do."""


@dataclass
class Crew:
    """The workers of a pool over their life: starting, free, or with a share; they stay from call to call."""

    pool: WorkerPool
    starting: list[Any] = field(default_factory=list)
    free: list[Any] = field(default_factory=list)
    busy: dict[Any, int] = field(default_factory=dict)  # with the number of its share
    stillborn: int = 0  # workers in a row that ended before they were ready

    def map_shares(self, name: str, shares: Iterable[Share]) -> Iterator[tuple[int, Any | LostShare]]:
        """See `Executor.map_shares`."""
        try:
            yield from self._map(name, enumerate(shares))
        finally:  # who stops listening does not want the rest
            for worker in list(self.busy):
                del self.busy[worker]
                self.pool.stop(worker)

    def close(self) -> None:
        """End all workers."""
        for worker in (*self.starting, *self.free, *self.busy):
            self.pool.stop(worker)
        self.starting, self.free, self.busy = [], [], {}

    def _map(self, name: str, coming: Iterator[tuple[int, Share]]) -> Iterator[tuple[int, Any | LostShare]]:
        again: deque[tuple[int, Share]] = deque()
        held: dict[int, Share] = {}
        died: dict[int, int] = {}  # share -> workers that died of it
        upcoming = next(coming, None)
        since, waiting = time.monotonic(), True
        while again or held or upcoming is not None:
            while len(self.starting) + len(self.free) + len(self.busy) < min(
                self.pool.size, len(again) + len(held) + (self.pool.size if upcoming is not None else 0)
            ):
                self.starting.append(self.pool.start())
            while self.free and (again or upcoming is not None):
                number, share = again.popleft() if again else upcoming  # type: ignore[misc]
                if upcoming is not None and number == upcoming[0]:
                    upcoming = next(coming, None)
                worker = self.free.pop()
                held[number], self.busy[worker] = share, number
                self.pool.send(worker, name, share)
            for worker, (kind, value) in self.pool.hear((*self.starting, *self.busy), _POLL_SECONDS):
                if kind == "ready":
                    self.starting.remove(worker)
                    self.free.append(worker)
                    self.stillborn = 0
                elif worker in self.starting:
                    self._bury(worker, value)
                else:
                    number = self.busy.pop(worker)
                    share = held.pop(number)
                    if kind != "died":
                        self.free.append(worker)
                        yield number, open_reply(kind, value)
                        continue
                    self.pool.stop(worker)
                    died[number] = died.get(number, 0) + 1
                    if died[number] == _WORKERS_PER_SHARE:
                        yield number, LostShare(f"{_WORKERS_PER_SHARE} workers in turn ended over it, the last {value}")
                    else:
                        self.pool.on_note(f"A worker ended ({value}); what it had is done again by another.")
                        again.append((number, share))
            if waiting and time.monotonic() - since > self.pool.patience and self.starting:
                waiting = False
                if not self.busy and not self.free:
                    raise PeftComboError(self.pool.explain_wait())
                running = len(self.busy) + len(self.free)
                self.pool.on_note(f"{running} of {self.pool.size} workers run; there is no room for the others yet.")

    def _bury(self, worker: Any, reason: str) -> None:
        self.starting.remove(worker)
        self.pool.stop(worker)
        self.stillborn += 1
        if self.stillborn == _STARTS:
            self.stillborn = 0
            raise PeftComboError(self.pool.explain_start(reason))


def open_reply(kind: str, value: Any) -> Any:
    """Return what a function returned; raise what it raised.

    Raises:
        PeftComboError, RuntimeError: see `Executor.map_shares`.
    """
    if kind == "refused":
        raise PeftComboError(value)
    if kind == "failed":
        raise RuntimeError(f"In a worker:\n{value}")
    return value


class PooledExecutor(Executor):
    """An executor over a pool of workers that it is itself; sets `size` and `_crew` when it is made."""

    size: int
    _crew: Crew

    @property
    def workers(self) -> int:
        """How many workers there are at most."""
        return self.size

    def map_shares(
        self, function: Callable[[Share], Any], shares: Iterable[Share]
    ) -> Iterator[tuple[int, Any | LostShare]]:
        """See `Executor.map_shares`."""
        return self._crew.map_shares(name_function(function), shares)
