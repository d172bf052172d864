"""Processes: one service in one process, or in several that share a socket and the state.

Owns how workers are started, watched and ended. The first is ready before the others start, so that what is fitted and
encoded once is there for them. A worker that dies is started anew.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

from prometheus_client.multiprocess import mark_process_dead

from peft_combo.errors import PeftComboError
from peft_combo.machine import count_usable_cpus
from peft_combo.serving.app import make_app, make_context
from peft_combo.serving.config import ServiceConfig
from peft_combo.serving.connections import bind, make_server
from peft_combo.serving.monitoring import MULTIPROCESS
from peft_combo.serving.state import State

if TYPE_CHECKING:  # the engine loads torch, which a process that only watches workers does not need
    from peft_combo.serving.service import Service

Tell = Callable[[str], None]
OpenEngine: TypeAlias = "Callable[[ServiceConfig, State, Tell], Service]"
WORKER = ("-m", "peft_combo.serving.worker")
_QUICK_DEATH, _LONGEST_PAUSE = 10.0, 30.0  # seconds


def serve(
    config: ServiceConfig, on_note: Tell, on_ready: Callable[[list[str]], None], open_engine: OpenEngine | None = None,
    program: Sequence[str] = WORKER,
) -> None:  # fmt: skip
    """Serve until SIGTERM or SIGINT; what is under way then is answered first.

    Args:
        on_note: told what is noticed. on_ready: told what is served, in lines, once it can be asked.
        open_engine: `Service.open`, to answer in this process; None starts workers, which load what this need not.
        program: of a worker, for Python.
    Raises:
        PeftComboError: something needed is not there, or the address is taken.
    """
    _check_access(config)
    bound = bind(config)
    with bound:
        if open_engine is not None:
            _serve_here(config, open_engine, bound, on_note, on_ready)
        else:
            Supervisor(config, bound, on_note, on_ready, program).run()


def _check_access(config: ServiceConfig) -> None:
    """Refuse to listen where others can call while nobody could, or everybody could move adapters."""
    state = State.open(config.state)
    try:
        has_keys = bool(state.list_keys())
    finally:
        state.close()
    if config.loopback:
        return
    if "admin" in config.open_scopes:
        raise PeftComboError(
            f"--open admin is for loopback: on {config.host} anybody could move adapters. "
            "Make a key with: peft-combo serve keys add NAME --scope admin"
        )
    if not has_keys and not config.open_scopes:
        raise PeftComboError(
            f"On {config.host} every request needs a key, and there is none. "
            "Make one with: peft-combo serve keys add NAME --scope read"
        )


def _serve_here(
    config: ServiceConfig, open_engine: OpenEngine, bound: socket.socket, on_note: Tell,
    on_ready: Callable[[list[str]], None],
) -> None:  # fmt: skip
    state = State.open(config.state)
    try:
        service = open_engine(config, state, on_note)
    except BaseException:
        state.close()
        raise
    context = make_context(config, service, state)
    server = make_server(make_app(context), config, lambda: on_ready(describe(config, service, bound)))
    server.run(sockets=[bound])


def describe(config: ServiceConfig, service: Service, bound: socket.socket) -> list[str]:
    """Return what is served, where, and what is open, in a few lines."""
    kind = "https" if config.tls_cert else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"{kind}://{host}:{bound.getsockname()[1]}/"
    lines = [f"Serving {config.recipe}: the page at {url}, its routes at {url}openapi.json"]
    for status in service.list_adapters():
        arms = ", ".join(
            f"{arm.version}{'' if name == 'prod' and arm.share == 100 else f' ({name}, {arm.share:g} %)'}"
            for name, arm in status.arms.items()
        )
        named = "the encoder without an adapter" if arms == status.alias == "frozen" else arms or "nothing yet"
        lines.append(f"  {status.alias}: {named}")
    needed = [scope for scope in ("read", "write", "admin") if scope not in config.open_scopes]
    opened = ", ".join(scope for scope in ("read", "write", "admin") if scope in config.open_scopes)
    key = f"peft-combo serve keys add NAME --scope {needed[0]}" if needed else ""
    lines.append(
        f"  open without a key: {opened or 'nothing'}" + (f"; {', '.join(needed)} by key: {key}" if needed else "")
    )
    place = config.state if "://" not in config.state else service_place(config.state)
    lines.append(f"  state in {place}, {config.workers} process{'es' if config.workers > 1 else ''}; Ctrl-C ends")
    return lines


def service_place(url: str) -> str:
    """Return a URL without what stands before its host: a user and a password."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


class Supervisor:
    """Starts workers over one socket, starts those that die anew, and ends them all."""

    def __init__(
        self, config: ServiceConfig, bound: socket.socket, on_note: Tell, on_ready: Callable[[list[str]], None],
        program: Sequence[str],
    ) -> None:  # fmt: skip
        self._config, self._bound, self._on_note, self._on_ready = config, bound, on_note, on_ready
        self._program = program
        self._workers: list[_Worker] = []
        self._ending = threading.Event()

    def run(self) -> None:
        """Serve until told to end."""
        before = {number: signal.signal(number, self._end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with tempfile.TemporaryDirectory(prefix="peft-combo-metrics-") as figures:
                try:
                    self._start(figures)
                    self._watch(figures)
                finally:
                    self._stop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start(self, figures: str) -> None:
        first = self._make_worker(figures, self._on_note)
        self._workers.append(first)
        while not first.ready.wait(0.1):
            if self._ending.is_set():
                return
            if first.process.poll() is not None:
                raise PeftComboError(first.error or f"The first worker ended with code {first.process.returncode}.")
        for _ in range(self._config.workers - 1):
            self._workers.append(self._make_worker(figures))
        while not all(one.ready.wait(0.1) or one.process.poll() is not None for one in self._workers):
            if self._ending.is_set():
                return
        self._on_ready(first.lines)

    def _make_worker(self, figures: str, on_note: Tell = lambda note: None, pause: float = 0.0) -> _Worker:
        return _Worker(self._config, self._bound, figures, self._program, on_note, pause)

    def _watch(self, figures: str) -> None:
        while not self._ending.wait(0.2):
            for place, worker in enumerate(self._workers):
                if worker.process.poll() is None or time.monotonic() < worker.pause_until:
                    continue
                if not worker.mourned:
                    worker.mourned = True
                    mark_process_dead(worker.process.pid, figures)  # type: ignore[no-untyped-call]
                    quick = time.monotonic() - worker.started < _QUICK_DEATH
                    pause = min(_LONGEST_PAUSE, max(0.5, 2 * worker.pause)) if quick else 0.0
                    worker.pause, worker.pause_until = pause, time.monotonic() + pause
                    self._on_note(f"A worker ended with code {worker.process.returncode}; another is started.")
                    if pause:
                        continue
                self._workers[place] = self._make_worker(figures, pause=worker.pause)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ending.set()

    def _stop(self) -> None:
        for worker in self._workers:
            with suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + self._config.grace + 5
        for worker in self._workers:
            try:
                worker.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.close()


class _Worker:
    """One process. It gets its settings by a pipe that it also watches: when we die, the pipe ends, and it does."""

    def __init__(
        self, config: ServiceConfig, bound: socket.socket, figures: str, program: Sequence[str], on_note: Tell,
        pause: float,
    ) -> None:  # fmt: skip
        self.ready, self.error, self.lines = threading.Event(), "", [""]
        self.started, self.pause, self.pause_until, self.mourned = time.monotonic(), pause, 0.0, False
        self._on_note = on_note
        self.process = subprocess.Popen(
            [sys.executable, *program, str(bound.fileno())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[bound.fileno()],
            env=_share_threads({**os.environ, MULTIPROCESS: figures}, config.workers), start_new_session=True,
        )  # fmt: skip
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(config.model_dump_json().encode() + b"\n")
            self.process.stdin.flush()
        threading.Thread(target=self._listen, name="worker", daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with suppress(ValueError):
                told: dict[str, Any] = json.loads(line)
                if "note" in told:
                    self._on_note(told["note"])
                elif "error" in told:
                    self.error = told["error"]
                elif "ready" in told:
                    self.lines = told["ready"]
                    self.ready.set()

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _share_threads(environ: dict[str, str], workers: int) -> dict[str, str]:
    """Give each worker its share of the processors; several that use all of them would wait for each other."""
    most = max(1, count_usable_cpus() // workers)
    given = environ.get("OMP_NUM_THREADS", "")
    return {**environ, "OMP_NUM_THREADS": str(min(most, int(given)) if given.isdigit() and int(given) else most)}


def run_worker(descriptor: int, open_engine: OpenEngine) -> int:
    """Be a worker: settings from stdin, news to stdout. Returns the exit code."""
    config = ServiceConfig.model_validate_json(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    news = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what any library prints is no news

    def tell(**news_of: Any) -> None:
        with suppress(OSError):
            news.write(json.dumps(news_of) + "\n")

    bound = socket.socket(fileno=descriptor)
    try:
        _serve_here(config, open_engine, bound, lambda note: tell(note=note), lambda lines: tell(ready=lines))
    except PeftComboError as error:
        tell(error=str(error))
        return 1
    return 0


def _end_with_parent() -> None:
    while os.read(0, 1024):  # not through sys.stdin, whose lock would be held when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)
