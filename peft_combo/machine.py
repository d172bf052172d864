"""This machine: available memory, usable processors, and the block sizes that large matrices are worked through in.

Knows numbers of the machine only; imports nothing of the package.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_CGROUPS = Path("/sys/fs/cgroup")
# Limit, use, and the part of it that is cache nobody has touched lately.
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
_NO_LIMIT = 2**60  # version 1 writes the largest page-aligned number instead of none


@dataclass
class Limits:
    """Bounds on memory, the same for the whole process: lower them on a small machine.

    Attributes:
        block_cells: cells of a dense block of rows. 2^22 float32 are 16 MiB.
        block_products: multiplications in one sparse product; bounds its size to some hundred MB.
        inverted_items: the items whose items-by-items matrix is inverted, float64 and twice: 20,000 take 6.4 GB and
            minutes, 40,000 four times that.
    """

    block_cells: int = 1 << 22
    block_products: int = 20_000_000
    inverted_items: int = 20_000


LIMITS = Limits()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold BLAS to one thread, for many short products in a row.

    NumPy and SciPy each bring a pool of threads that spin while they wait, so alternating between the two, as an
    optimiser in SciPy does with a loss in NumPy, costs more than it saves: twenty times as much on two cores.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


def row_blocks(n_rows: int, width: int) -> Iterator[slice]:
    """Cut `n_rows` rows of `width` cells into slices of at most `LIMITS.block_cells` cells, at least one row each."""
    step = max(1, LIMITS.block_cells // max(1, width))
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def available_memory() -> float | None:
    """Return the MiB of memory a process could still take: the machine's, or less where a control group allows less.

    None where the system does not say.
    """
    try:
        machine = float(psutil.virtual_memory().available) / 2**20
    except (OSError, RuntimeError, NotImplementedError):
        return None
    group = read_control_group_memory()
    return machine if group is None else min(machine, group)


def read_control_group_memory(membership: Path = Path("/proc/self/cgroup"), root: Path = _CGROUPS) -> float | None:
    """Return the MiB that the control groups of this process (a container, a batch job) leave it; None without a limit.

    Page cache that the system would give up counts as left, as it does in ``MemAvailable``.

    Args:
        membership: the groups of a process, as Linux lists them: version 2 and version 1.
        root: where control groups are mounted.
    """
    groups = _list_control_groups("memory", membership, root)
    left = (_left_in(group, *(_CGROUP_V2 if unified else _CGROUP_V1)) for group, unified in groups)
    return min((room for room in left if room is not None), default=None)


def count_usable_cpus(membership: Path = Path("/proc/self/cgroup"), root: Path = _CGROUPS) -> int:
    """Return how many processors this process may keep busy: by its affinity, and by the quota of its control groups.

    A part of a processor counts as one.

    Args:
        membership, root: see `read_control_group_memory`.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (_read_quota(group, unified) for group, unified in _list_control_groups("cpu", membership, root))
    return max(1, min((usable, *(math.ceil(quota) for quota in quotas if quota is not None))))


def _list_control_groups(controller: str, membership: Path, root: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the control groups of a process that have a controller, and whether each is of version 2."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, place in (line for line in lines if len(line) == 3):
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / controller if controllers else root
        # Within a container the path may be the host's, and its mount shows the container's own group at the root.
        own = mount / place.strip("/")
        yield from ((group, not controllers) for group in (own, *own.parents) if group.is_relative_to(mount))


def _read_quota(group: Path, unified: bool) -> float | None:
    try:
        if unified:
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None  # "max" or -1 where there is no limit
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _left_in(group: Path, limit: str, used: str, cache: str) -> float | None:
    try:
        most = int((group / limit).read_text())  # "max" where there is no limit
        taken = int((group / used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, most - taken + int(stat.get(cache, 0))) / 2**20 if most < _NO_LIMIT else None
    except (OSError, ValueError):
        return None
