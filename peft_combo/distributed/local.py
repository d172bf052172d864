"""Local executor: processes of this machine, each with its part of the cores and a GPU of its own where there are some.

A process is started anew (spawn), so it inherits neither threads nor locks. It ends with the process that started it,
however that ends: its end of the pipe closes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from peft_combo.distributed.executor import (
    CORES_PER_WORKER,
    Crew,
    PooledExecutor,
    Reply,
    Share,
    bound_threads,
    call_by_name,
    check_workers,
)
from peft_combo.machine import count_usable_cpus

_FAREWELL_SECONDS = 30.0  # for a tuning run to write its checkpoint


@dataclass(eq=False)
class _Process:
    process: SpawnProcess
    pipe: Connection
    place: int


class LocalExecutor(PooledExecutor):
    """Processes of this machine.

    Args:
        workers: how many; None takes one for each GPU, or without one for every four cores.
        gpus: GPUs of this machine; they are dealt out one by one. A worker without one sees none.
        patience: seconds a first worker may take to start.
        on_note: told of workers that ended.
        gentle: let workers that are ended finish what SIGTERM makes them do, as a tuning run writes its checkpoint.
    """

    def __init__(
        self, workers: int | None = None, *, gpus: int = 0, patience: float = 120.0,
        on_note: Callable[[str], None] = lambda note: None, gentle: bool = False,
    ) -> None:  # fmt: skip
        check_workers(workers)
        cpus = count_usable_cpus()
        self.size = workers or gpus or max(1, cpus // CORES_PER_WORKER)
        self.patience, self.on_note = patience, on_note
        self._gpus, self._gentle = gpus, gentle
        self._threads = max(1, cpus // self.size)
        self._crew = Crew(self)
        self._places = set(range(self.size))
        self._processes: dict[int, _Process] = {}

    @property
    def told(self) -> str:
        """What each worker has, in words."""
        gpu = "a GPU" if self._gpus >= self.size else "a part of a GPU" if self._gpus else ""
        return f"each has {gpu or f'{self._threads} of the cores'}"

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that run."""
        return tuple(one.process.pid for one in self._processes.values() if one.process.pid is not None)

    def close(self) -> None:
        """End the processes."""
        for one in self._processes.values():
            if self._gentle:
                one.process.terminate()  # all at once, then each is waited for
        self._crew.close()

    # --- the pool ---

    def start(self) -> _Process:
        """See `WorkerPool`."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        place = min(self._places)
        self._places.remove(place)
        environment = {"OMP_NUM_THREADS": bound_threads(self._threads)}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = _list_visible(self._gpus)[place % self._gpus]
        process = context.Process(target=_work, args=(theirs, environment), daemon=True)
        process.start()
        theirs.close()  # theirs alone, so that the pipe ends with them
        self._processes[place] = _Process(process, ours, place)
        return self._processes[place]

    def send(self, worker: _Process, name: str, share: Share) -> None:
        """See `WorkerPool`."""
        with suppress(OSError):  # it died meanwhile, and is heard to
            worker.pipe.send((name, share))

    def hear(self, workers: Sequence[_Process], seconds: float) -> list[tuple[_Process, Reply]]:
        """See `WorkerPool`."""
        pipes = {worker.pipe: worker for worker in workers}
        heard: list[tuple[_Process, Reply]] = []
        for pipe in wait(list(pipes), seconds):
            worker = pipes[pipe]  # type: ignore[index]
            try:
                heard.append((worker, worker.pipe.recv()))
            except (EOFError, OSError):
                worker.process.join()
                heard.append((worker, ("died", _explain_exit(worker.process.exitcode))))
        return heard

    def stop(self, worker: _Process) -> None:
        """See `WorkerPool`."""
        worker.pipe.close()
        worker.process.terminate()
        worker.process.join(_FAREWELL_SECONDS if self._gentle else 1.0)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.process.close()
        del self._processes[worker.place]
        self._places.add(worker.place)

    def explain_wait(self) -> str:
        """See `WorkerPool`."""
        return f"No worker process started within {self.patience:g} s. The machine may be short of memory: --workers 1."

    def explain_start(self, reason: str) -> str:
        """See `WorkerPool`."""
        return (
            f"Worker processes end before they begin ({reason}); what they said stands above. In a program of your "
            'own, put what it does below: if __name__ == "__main__":'
        )


def _list_visible(gpus: int) -> list[str]:
    """Return the GPUs this process may use, by the names a child's CUDA_VISIBLE_DEVICES takes."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible if len(visible) == gpus else [str(number) for number in range(gpus)]


def _explain_exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"ended by {name}" + ("; if it was not you, the memory may have run out" if name == "SIGKILL" else "")


def _work(pipe: Connection, environment: dict[str, str]) -> None:
    """Do shares until nobody asks any more; in the process of a worker."""
    # Before torch is loaded, which reads it then.
    os.environ.update(environment)
    # Ctrl-C in a terminal goes to all its processes: who started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pipe.send(("ready", os.getpid()))
        while True:
            name, share = pipe.recv()
            pipe.send(call_by_name(name, share))
    except (EOFError, OSError):  # the other end is gone
        return
