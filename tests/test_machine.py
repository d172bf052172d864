"""Available memory and processors: what the machine has, or less where a control group allows less."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from peft_combo import __main__, machine
from peft_combo.machine import available_memory, count_usable_cpus, read_control_group_memory

MIB = 2**20


def group(folder: Path, version: int, limit: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
             2: ("memory.max", "memory.current", "inactive_file")}[version]  # fmt: skip
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used * MIB}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache * MIB}\n")


def test_the_tightest_group_counts_and_its_cache_is_no_use(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/batch/job\n")
    group(tmp_path / "cgroup" / "batch" / "job", 2, "max", 700, 0)
    assert read_control_group_memory(tmp_path / "own", tmp_path / "cgroup") is None
    group(tmp_path / "cgroup" / "batch", 2, str(1000 * MIB), 700, 50)
    assert read_control_group_memory(tmp_path / "own", tmp_path / "cgroup") == 350
    group(tmp_path / "cgroup" / "batch" / "job", 2, str(800 * MIB), 700, 0)
    assert read_control_group_memory(tmp_path / "own", tmp_path / "cgroup") == 100
    group(tmp_path / "cgroup" / "batch" / "job", 2, str(600 * MIB), 700, 0)
    assert read_control_group_memory(tmp_path / "own", tmp_path / "cgroup") == 0


def test_groups_of_version_1_and_the_root_of_a_container_are_read(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    # As seen within a container: the path is the host's, the mount shows the container's own group at its root.
    group(tmp_path / "cgroup" / "memory", 1, "9223372036854771712", 300, 100)
    assert read_control_group_memory(tmp_path / "own", tmp_path / "cgroup") is None
    group(tmp_path / "cgroup" / "memory", 1, str(500 * MIB), 300, 100)
    assert read_control_group_memory(tmp_path / "own", tmp_path / "cgroup") == 300


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert read_control_group_memory(tmp_path / "none", tmp_path) is None
    (tmp_path / "own").write_text("not a line of groups\n0::/\n")
    assert read_control_group_memory(tmp_path / "own", tmp_path) is None


def test_available_memory_is_the_less_of_machine_and_group(monkeypatch: pytest.MonkeyPatch) -> None:
    free = available_memory()
    assert free is not None
    assert 10 < free < 2**30
    monkeypatch.setattr(machine, "read_control_group_memory", lambda: 5.0)
    assert available_memory() == 5.0
    monkeypatch.setattr(machine, "read_control_group_memory", lambda: 1e12)
    assert available_memory() == pytest.approx(free, rel=0.5)


def write_quota(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.max").write_text(f"{text}\n")


def test_processors_are_counted_by_affinity_and_by_the_tightest_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    root = tmp_path / "cgroup"
    (tmp_path / "own").write_text("0::/batch/job\n")
    assert count_usable_cpus(tmp_path / "own", root) == 12
    write_quota(root / "batch" / "job", "max 100000")
    assert count_usable_cpus(tmp_path / "own", root) == 12
    write_quota(root / "batch", "600000 100000")
    assert count_usable_cpus(tmp_path / "own", root) == 6
    write_quota(root / "batch" / "job", "150000 100000")
    assert count_usable_cpus(tmp_path / "own", root) == 2, "a part of a processor counts as one"
    write_quota(root / "batch" / "job", "not a quota")
    assert count_usable_cpus(tmp_path / "own", root) == 6
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert count_usable_cpus(tmp_path / "own", root) == 1


def test_quotas_of_version_1_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    (tmp_path / "own").write_text("5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    folder = tmp_path / "cgroup" / "cpu"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    for quota, expected in (("-1", 12), ("250000", 3), ("5000", 1)):
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert count_usable_cpus(tmp_path / "own", tmp_path / "cgroup") == expected


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "3"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_NUM_THREADS": "3"}),
        ({"GOMP_SPINCOUNT": "1000"}, {"OMP_NUM_THREADS": "3"}),
        ({"OMP_NUM_THREADS": "7"}, {"OMP_WAIT_POLICY": "passive"}),
        ({"KMP_BLOCKTIME": "0"}, {}),
    ],
)
def test_the_command_line_settles_threads_unless_the_user_did(
    given: dict[str, str], added: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__main__, "count_usable_cpus", lambda: 3)
    monkeypatch.setattr(__main__.os, "cpu_count", lambda: 8)
    environ = dict(given)
    __main__.settle_threads(environ)
    assert environ == given | added


def test_a_machine_of_ones_own_keeps_the_number_that_torch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__main__, "count_usable_cpus", lambda: 8)
    monkeypatch.setattr(__main__.os, "cpu_count", lambda: 8)
    environ: dict[str, str] = {}
    __main__.settle_threads(environ)
    assert environ == {"OMP_WAIT_POLICY": "passive"}


def test_the_library_leaves_its_host_alone() -> None:
    program = (
        "import os; kept = dict(os.environ)\n"
        "import peft_combo.tuning.loop, peft_combo.cli\n"
        "new = {name for name in os.environ if os.environ[name] != kept.get(name)}\n"
        "print(sorted(name for name in new if name.startswith(('OMP', 'KMP', 'GOMP'))))\n"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "KMP", "GOMP"))}
    environ |= {"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout == "[]\n"
