"""Ray executor: actors of a Ray cluster, each with one GPU or a group of cores, that are handed shares one by one.

Plain actors and not Ray Data: a share is some thousand texts, which its stages and their read tasks would not make
quicker; those tasks wait for ever where actors hold every CPU (https://github.com/ray-project/ray/issues/44687), an
actor that dies ends the job or stops it, and finished blocks could not be reused. Here the one who hands shares out
sees each of them come back, and notices who died.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

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
from peft_combo.errors import PeftComboError
from peft_combo.machine import count_usable_cpus


class _Actor:
    """What runs in a process of the cluster."""

    def __init__(self, cores: int) -> None:
        os.environ["OMP_NUM_THREADS"] = bound_threads(cores)  # before torch is loaded, which reads it then

    def greet(self) -> tuple[str, int]:
        return socket.gethostname(), os.getpid()

    def do(self, name: str, share: Share) -> Reply:
        return call_by_name(name, share)


class _Handle:
    """An actor, and what is awaited of it."""

    def __init__(self, actor: Any, awaited: Any) -> None:
        self.actor, self.awaited = actor, awaited
        self.place: tuple[str, int] | None = None


class RayExecutor(PooledExecutor):
    """Actors of a Ray cluster.

    Args:
        workers: how many; None takes one for each GPU of the cluster, or without one for every four cores.
        address: of a cluster that runs (``auto``, ``host:6379``, ``ray://host:10001``); None starts one on this
            machine, or takes what this process is connected to, and leaves it as it is.
        patience: seconds in which a first worker must have started.
        on_note: told of workers that ended, and of those there is no room for.
    Raises:
        PeftComboError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(
        self, workers: int | None = None, address: str | None = None, *, patience: float = 120.0,
        on_note: Callable[[str], None] = lambda note: None,
    ) -> None:  # fmt: skip
        check_workers(workers)
        self._ray = _import_ray()
        self.patience, self.on_note = patience, on_note
        self._owned = not self._ray.is_initialized()
        if self._owned:
            self._connect(workers, address)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cpus = [float(node.get("CPU", 0)) for node in nodes]
        gpus = int(sum(float(node.get("GPU", 0)) for node in nodes))
        self.size = workers or gpus or max(1, int(sum(cpus) - 1) // CORES_PER_WORKER)
        self._gpus = 1 if gpus else 0
        self._cpus = fit_cores(cpus, self.size)
        self._crew = Crew(self)
        self._handles: list[_Handle] = []

    @property
    def told(self) -> str:
        """What each worker has, in words."""
        return f"each has {'a GPU and ' if self._gpus else ''}{self._cpus} of the cores"

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes of the actors that run; those of other machines too."""
        return tuple(one.place[1] for one in self._handles if one.place is not None)

    def close(self) -> None:
        """End the actors, and a cluster that was started for them."""
        self._crew.close()
        if self._owned:
            self._ray.shutdown()
            self._owned = False

    def _connect(self, workers: int | None, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told that it runs
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray warns will be so
        options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            # As many CPUs as it has, or as workers are asked for, and one more: actors never hold them all.
            options |= {
                "address": "local", "num_cpus": max(count_usable_cpus(), workers or 1) + 1, "include_dashboard": False,
            }  # fmt: skip
        try:
            if address is not None:
                _knock(address)
            self._ray.init(**options)
        except (OSError, RuntimeError, ValueError) as error:
            where = "on this machine" if address is None else f"at {address}"
            raise PeftComboError(
                f"There is no Ray cluster {where}: {str(error).strip().split('. ')[0].rstrip('.')}. "
                "Start one with: ray start --head; or leave --address away, and one is started here."
            ) from error

    # --- the pool ---

    def start(self) -> _Handle:
        """See `WorkerPool`."""
        kind = self._ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, max_task_retries=0)(_Actor)
        actor = kind.remote(self._cpus)
        handle = _Handle(actor, actor.greet.remote())
        self._handles.append(handle)
        return handle

    def send(self, worker: _Handle, name: str, share: Share) -> None:
        """See `WorkerPool`."""
        worker.awaited = worker.actor.do.remote(name, share)

    def hear(self, workers: Sequence[_Handle], seconds: float) -> list[tuple[_Handle, Reply]]:
        """See `WorkerPool`."""
        awaited = {worker.awaited: worker for worker in workers}
        ready, _ = self._ray.wait(list(awaited), num_returns=1, timeout=seconds)
        heard: list[tuple[_Handle, Reply]] = []
        for reference in ready:
            worker = awaited[reference]
            try:
                found = self._ray.get(reference)
            except (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError) as error:
                heard.append((worker, ("died", _explain_death(worker, error))))
                continue
            if worker.place is None:
                worker.place = found
                found = ("ready", found)
            worker.awaited = None  # what it answered may go
            heard.append((worker, found))
        return heard

    def stop(self, worker: _Handle) -> None:
        """See `WorkerPool`."""
        self._ray.kill(worker.actor, no_restart=True)
        self._handles.remove(worker)

    def explain_wait(self) -> str:
        """See `WorkerPool`."""
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        needed, has = f"{self._cpus} CPUs", f"{total.get('CPU', 0):g} CPUs ({free.get('CPU', 0):g} free)"
        if self._gpus:
            needed, has = f"{needed} and 1 GPU", f"{has} and {total.get('GPU', 0):g} GPUs ({free.get('GPU', 0):g} free)"
        return (
            f"Ray started none of {self.size} workers within {self.patience:g} s. Each takes {needed} of one machine; "
            f"the cluster has {has}. Ask for other --workers, wait until something else ends, or add a machine."
        )

    def explain_start(self, reason: str) -> str:
        """See `WorkerPool`."""
        return (
            f"Workers of the Ray cluster end before they begin ({reason}). Is the package installed in this version on "
            "every machine of it, under the same Python?"
        )


def fit_cores(nodes: Sequence[float], workers: int) -> int:
    """Return how many cores each worker can have so that all fit onto the machines and one core stays free; least 1.

    Args:
        nodes: cores of each machine.
    """
    for cores in range(int(max(nodes, default=1)), 1, -1):
        if sum(int(node) // cores for node in nodes) >= workers and sum(nodes) - workers * cores >= 1:
            return cores
    return 1


def _knock(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself asks for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _explain_death(worker: _Handle, error: Exception) -> str:
    host, pid = worker.place or ("", 0)
    who = f"process {pid} on {host}" if pid else "an actor that was starting"
    told = " ".join(str(error).split())
    if "memory" in told.lower() and "OOM killer" not in told:
        return f"{who}, for want of memory"
    return f"{who}, killed or lost with its machine"


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise PeftComboError(
            "Ray is not installed. Install it with: pip install 'peft-combo[ray]'; or take the processes of this "
            "machine: --on local"
        ) from error
    return ray
