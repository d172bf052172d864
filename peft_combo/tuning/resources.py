"""Resource measurement: wall-clock time, resident and peak memory of this process, host and GPU."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Do `work`; return its seconds, and the MiB by which the memory it computes in grew meanwhile.

    That is the GPU's where there is one, as its allocator counts, else this process's own.
    """
    if torch.cuda.is_available():
        return _measure_on_gpu(work)
    before = highest = resident_mib()
    done = threading.Event()

    def callback() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, resident_mib())

    watcher = threading.Thread(target=callback, daemon=True)
    watcher.start()
    clock = time.perf_counter()
    try:
        work()
    finally:
        seconds = time.perf_counter() - clock
        done.set()
        watcher.join()
    return seconds, max(highest, resident_mib()) - before


def _measure_on_gpu(work: Callable[[], object]) -> tuple[float, float]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, clock = torch.cuda.memory_allocated(), time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - clock, (torch.cuda.max_memory_allocated() - before) / 2**20


def measure_gpu_workspace(*modules: nn.Module) -> float:
    """Return the MiB that this process holds on the GPU beside the tensors of `modules`: cuBLAS keeps some for good."""
    own = {
        storage.data_ptr(): storage.nbytes()
        for module in modules for tensor in (*module.parameters(), *module.buffers())
        for storage in (tensor.untyped_storage(),) if tensor.is_cuda
    }  # fmt: skip
    return (torch.cuda.memory_allocated() - sum(own.values())) / 2**20


def wait_for_gpu() -> None:
    """Wait until the GPU has done what it was given, so that a clock read next counts it; at once without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def give_back() -> None:
    """Hand the memory that was freed back to the system, where the C library can, so that what is measured is new."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def resident_mib() -> float:
    """Return the MiB of memory this process has now."""
    return float(psutil.Process().memory_info().rss) / 2**20


def peak_mib() -> float:
    """Return the peak memory so far in MiB: of the GPU where there is one, else of this process."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _peak_of_process()


def _peak_of_process() -> float:
    with suppress(OSError, ValueError, StopIteration), open("/proc/self/status", encoding="ascii") as file:
        # Not ru_maxrss where it can be had: that counts what the parent had when it started this process. psutil has
        # the peak on Windows alone.
        return int(next(line for line in file if line.startswith("VmHWM:")).split()[1]) / 2**10
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def duration(seconds: float) -> str:
    """Return seconds the way people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
