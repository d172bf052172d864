"""Files and folders appear whole or not at all, and what was there before stays where writing fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from peft_combo.errors import PeftComboError
from peft_combo.files import (
    atomic_file,
    check_file_target,
    check_folder_target,
    lock_file,
    stage_folder,
    write_text,
)


def test_a_file_takes_its_name_at_the_end_or_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_file(path) as file:
        file.write(b"old")
        assert not path.exists()
    assert path.read_bytes() == b"old"

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_text_is_written_as_it_is_and_a_refusal_names_the_file(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "é\r\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "é\r\n".encode()
    with pytest.raises(PeftComboError, match=r"a\.txt/b cannot be written"):
        write_text(tmp_path / "new" / "a.txt" / "b", "x")


def test_a_folder_appears_with_its_manifest_written_after_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle))
    )
    with stage_folder(tmp_path / "made" / "out") as staged:
        (staged.path / "sub").mkdir()
        for name in ("b.txt", "sub/c.txt"):
            (staged.path / name).write_bytes(b"x")
            (staged.path / name).chmod(0o600)
        staged.manifest = ("a.json", b"{}")
    out = tmp_path / "made" / "out"
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*")) == [
        "a.json",
        "b.txt",
        "sub",
        "sub/c.txt",
    ]
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*.txt")} == {out.stat().st_mode & 0o666}
    names = [name.removeprefix(f"{staged.path}/") for name in synced]
    assert sorted(names[:3]) == ["b.txt", "sub", "sub/c.txt"]
    assert names[3:] == ["a.json", str(staged.path), str(out.parent)]
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_is_there_is_replaced_whole_or_stays(tmp_path: Path, replace: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with stage_folder(out) as staged:  # an empty one is nobody's
        (staged.path / "old").write_bytes(b"")
    try:
        with stage_folder(out, replace=replace) as staged:
            (staged.path / "new").write_bytes(b"")
    except FileExistsError:
        assert not replace
    assert os.listdir(out) == (["new"] if replace else ["old"])
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("step", ["fsync", "second rename"])
def test_where_the_disk_refuses_the_old_folder_stays_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    out = tmp_path / "out"
    with stage_folder(out) as staged:
        (staged.path / "old").write_bytes(b"")
    real = os.rename
    renamed: list[Any] = []

    def full(*arguments: Any) -> None:
        renamed.append(arguments)
        if step == "fsync" or len(renamed) == 3:  # refused as it is taken, the old one aside, then this
            raise OSError(28, "No space left on device")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync" if step == "fsync" else "rename", full)
        with pytest.raises(OSError, match="No space left"), stage_folder(out, replace=True) as staged:
            (staged.path / "new").write_bytes(b"")
    assert os.listdir(out) == ["old"]
    assert os.listdir(tmp_path) == ["out"]


def test_whether_a_folder_makes_room_is_asked_when_it_is_due(tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked: list[bool] = []

    def quicker_writer_is_whole() -> bool:
        asked.append(True)
        return False

    def write() -> None:
        with stage_folder(out, replace=quicker_writer_is_whole):
            assert asked == []
            out.mkdir()
            (out / "theirs").write_bytes(b"")

    with pytest.raises(FileExistsError):
        write()
    assert (asked, os.listdir(out), os.listdir(tmp_path)) == ([True], ["theirs"], ["out"])


@pytest.mark.parametrize("name", ["a.txt", "new/a.txt", "new/deep/er/a.txt", "old.txt", "link.txt"])
def test_what_can_be_written_is_not_refused_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "old.txt")
    assert check_file_target(tmp_path / name) == tmp_path / name
    assert check_folder_target(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert sorted(os.listdir(tmp_path)) == ["link.txt", "old.txt"]
    assert (tmp_path / "old.txt").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("folder", "it is a folder, expected a file"),
        ("old.txt/a.txt", "old.txt is no folder"),
        ("old.txt/new/a.txt", "old.txt is no folder"),
        ("x" * 300 + "/" + "y" * 300, "too long"),
    ],
)
def test_a_target_that_cannot_be_is_refused_with_the_reason(name: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.txt").write_text("old")
    with pytest.raises(PeftComboError, match=rf"cannot be written: .*{told}"):
        check_file_target(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["folder", "old.txt"]


def test_a_folder_that_takes_no_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(PeftComboError, match="cannot be written: Permission denied"):
        check_file_target(tmp_path / "a.txt")
    with pytest.raises(PeftComboError, match="cannot be written: Permission denied"):
        check_folder_target(tmp_path)


def test_a_lock_is_held_once_and_given_back(tmp_path: Path) -> None:
    with lock_file(tmp_path / "lock"), pytest.raises(TimeoutError), lock_file(tmp_path / "lock"):
        pass
    with lock_file(tmp_path / "lock"):
        pass
