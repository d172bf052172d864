"""Available memory: what the machine has, or less where a control group allows less."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_combo import machine
from peft_combo.machine import available_memory, read_control_group_memory

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
