"""What a store of adapters does when files, disks, processes or people go wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_adapter_store import FIELDS, hidden, write

from peft_combo.errors import StoreError
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.manifest import FORMAT, Manifest, parse_manifest
from peft_combo.store.model_card import render_model_card

ROOT = Path(__file__).resolve().parent.parent
TENSORS = (8).to_bytes(8, "little") + b"{}      "  # the smallest safetensors file there is


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(StoreError) as caught:
        act()
    return str(caught.value)


def commit(store: AdapterStore, fields: dict[str, Any] | None = None, **files: bytes) -> None:
    """Write one version whose files are given by name, `__` standing for the dot."""
    with store.writing("fashion") as draft:
        for name, content in (files or {"head__safetensors": TENSORS}).items():
            (draft.path / name.replace("__", ".")).write_bytes(content)
        draft.commit(FIELDS if fields is None else fields)


# --- asking for what is not there -------------------------------------------------------------------------------------


def test_an_unknown_category_is_answered_with_what_is_stored_and_how_to_train(store: AdapterStore) -> None:
    write(store, "electronics")
    write(store, "fashion")
    assert refusal(lambda: store.open("fashon")) == (
        f'No adapter for category "fashon" in {store.path}/. Stored: electronics, fashion. Did you mean "fashion"?\n'
        "Train one with: peft-combo tune --recipe lora-fashion"
    )
    assert refusal(lambda: store.latest("fashon")) == refusal(lambda: store.remove("fashon", all=True))


def test_an_empty_store_says_so(store: AdapterStore) -> None:
    assert "Stored: nothing yet." in refusal(lambda: store.open("fashion"))


def test_an_unknown_version_is_answered_with_the_stored_ones(store: AdapterStore) -> None:
    write(store)
    write(store)
    for act in (store.open, store.verify, store.remove):
        text = refusal(lambda act=act: act("fashion@v3"))  # type: ignore[misc]
        assert 'No version "v3" of fashion' in text
        assert "Stored: v1, v2." in text
    assert 'No alias "prod" of fashion' in refusal(lambda: store.open("fashion@prod"))


def test_only_listed_files_are_handed_out(store: AdapterStore) -> None:
    record = write(store)
    (record.path / "extra.json").write_text("{}")
    for name in ("extra.json", "manifest.json", "../../secret", "/etc/passwd", "", "."):
        assert "has no file" in refusal(lambda name=name: record.file(name))  # type: ignore[misc]
    assert 'Did you mean "adapter_config.json"?' in refusal(lambda: record.read("adapter_confg.json"))


# --- files that changed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "README.md"])
def test_an_altered_or_missing_file_is_refused_by_name(store: AdapterStore, name: str) -> None:
    path = write(store).path / name
    content = path.read_bytes()
    for changed, problem in (
        (content[:-1] + bytes([content[-1] ^ 1]), "sha256"),
        (content[:-1], f"expected {len(content)} bytes, found {len(content) - 1}"),
        (content + b"x", f"found {len(content) + 1}"),
    ):
        path.write_bytes(changed)
        text = refusal(lambda: store.open("fashion"))
        assert text.startswith(f"Adapter fashion@v1 in {store.path}/ cannot be used: {name}: was altered")
        assert problem in text
        assert [fault.where for fault in store.verify()] == [f"fashion@v1: {name}"]
    path.unlink()
    assert f"{name}: is missing." in refusal(lambda: store.open("fashion"))


def test_all_faults_are_reported_at_once(store: AdapterStore) -> None:
    one, two = write(store), write(store)
    write(store)
    (one.path / "adapter_config.json").unlink()
    (one.path / "adapter_model.safetensors").write_bytes(b"")
    (one.path / "notes.txt").write_text("x")
    (two.path / "manifest.json").write_text("{")
    (store.path / "fashion" / "old").mkdir()
    (store.path / "Some Folder").mkdir()
    (store.path / "file.txt").write_text("x")
    (store.path / "README.md").write_text("what this folder is")
    assert {fault.where for fault in store.verify()} == {
        "fashion@v1: adapter_config.json",
        "fashion@v1: adapter_model.safetensors",
        "fashion@v1: notes.txt",
        "fashion@v2: manifest.json",
        "fashion/old",
        "Some Folder",
        "file.txt",
    }
    assert len(store.verify("fashion@v1")) == 3
    assert store.verify("fashion@v3") == []
    assert len(store.verify("fashion")) == 5
    error = refusal(lambda: store.open("fashion@v1"))
    assert len(error.splitlines()) == 3  # a title and the two faults that matter to a reader
    assert [record.version for record in store.list()] == [1, 3]


def test_a_file_nobody_listed_is_a_fault_but_no_reason_to_refuse(store: AdapterStore) -> None:
    (write(store).path / ".DS_Store").write_bytes(b"x")
    assert store.open("fashion").version == 1
    assert [fault.where for fault in store.verify()] == ["fashion@v1: .DS_Store"]


def test_bytes_are_checked_again_when_they_are_read(store: AdapterStore) -> None:
    record = write(store)
    (record.path / "adapter_config.json").write_text('{"peft_type": "EVIL"}')
    assert "was altered since it was stored" in refusal(lambda: record.read("adapter_config.json"))
    (record.path / "adapter_config.json").unlink()
    assert "Cannot read adapter_config.json of fashion@v1" in refusal(lambda: record.read("adapter_config.json"))


def test_a_version_without_its_manifest_is_not_there_yet(store: AdapterStore) -> None:
    write(store)
    newer = write(store)
    (newer.path / "manifest.json").unlink()  # what a copy in progress looks like
    assert store.versions("fashion") == (1,)
    assert store.open("fashion").version == 1
    assert "incomplete" in refusal(lambda: store.open("fashion@v2"))
    assert [fault.where for fault in store.verify()] == ["fashion@v2: manifest.json"]
    assert write(store).version == 3
    assert store.remove("fashion@v2") == ("fashion@v2",)
    assert store.verify() == []


def test_a_renamed_folder_is_noticed(store: AdapterStore) -> None:
    write(store)
    (store.path / "fashion").rename(store.path / "shoes")
    assert "was written as fashion@v1" in refusal(lambda: store.open("shoes"))


# --- manifests from elsewhere -----------------------------------------------------------------------------------------


def edited(store: AdapterStore, **changes: Any) -> None:
    path = store.path / "fashion" / "v1" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


def test_a_newer_format_asks_for_an_upgrade(store: AdapterStore) -> None:
    write(store)
    edited(store, format=FORMAT + 1, something="new")
    text = refusal(lambda: store.open("fashion"))
    assert "has format 2" in text
    assert "Upgrade with: pip install --upgrade peft-combo" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": "1"}, "manifest.json: format"),
        ({"format": 0}, "manifest.json: format"),
        ({"backbone": {"model": "x"}}, "manifest.json: backbone.fingerprint"),
        ({"metod": "lora"}, "manifest.json: metod"),
        ({"created": "yesterday"}, "manifest.json: created"),
        ({"version": True}, "manifest.json: version"),
        ({"version": 2}, "was written as fashion@v2"),
        ({"files": {"a.json": {"sha256": "zz", "bytes": 1}}}, "manifest.json: files.a.json.sha256"),
        ({"files": {"a.json": {"sha256": "a" * 64, "bytes": -1}}}, "manifest.json: files.a.json.bytes"),
    ],
)
def test_a_broken_manifest_names_the_field(store: AdapterStore, changes: dict[str, Any], expected: str) -> None:
    write(store)
    edited(store, **changes)
    assert expected in refusal(lambda: store.open("fashion"))
    assert any(expected in str(fault) for fault in store.verify())


@pytest.mark.parametrize(
    "name",
    ["../v2/head.safetensors", "/etc/passwd", "a/b", "a\\b", "..", ".", "", ".hidden", "manifest.json", "a\0b", "a\nb",
     "ü.json", "adapter_model.bin", "head.PT", "weights.pkl", "x" * 129],
)  # fmt: skip
def test_a_name_that_is_no_plain_file_name_is_refused(store: AdapterStore, name: str) -> None:
    write(store)
    edited(store, files={name: {"sha256": "a" * 64, "bytes": 1}})
    text = refusal(lambda: store.open("fashion"))
    assert "manifest.json: files" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": ' * 100_000, "is not JSON"),
        (b'{"format": NaN}', "NaN is not a JSON number"),
        (b'{"format": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b" " * (4 * 2**20 + 1), "is larger than"),
    ],
)
def test_a_manifest_that_is_none_is_refused(store: AdapterStore, content: bytes, expected: str) -> None:
    path = write(store).path / "manifest.json"
    path.write_bytes(content)
    assert expected in refusal(lambda: store.open("fashion"))


def test_links_are_not_followed_out_of_the_store(store: AdapterStore, tmp_path: Path) -> None:
    other = AdapterStore(tmp_path / "elsewhere")
    outside = write(other)
    store.path.mkdir()
    (store.path / "fashion").symlink_to(other.path / "fashion")
    for act in (store.open, store.remove):
        assert "leads out of the store" in refusal(lambda act=act: act("fashion@v1"))  # type: ignore[misc]
    assert "leads out of the store" in refusal(lambda: commit(store))
    assert "leads out of the store" in str(store.verify())
    assert store.list() == []
    store.remove("fashion", all=True)  # takes the link away, not what it leads to
    assert os.listdir(outside.path.parent) == ["v1"]
    assert other.verify() == []


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_listed_file_has_to_be_a_plain_file(store: AdapterStore, tmp_path: Path, kind: str) -> None:
    path = write(store).path / "adapter_config.json"
    (tmp_path / "copy").write_bytes(path.read_bytes())
    path.unlink()
    if kind == "link":
        path.symlink_to(tmp_path / "copy")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    assert "cannot be read (it is" in refusal(lambda: store.open("fashion"))


def test_removing_what_is_no_folder_neither_waits_nor_follows(store: AdapterStore, tmp_path: Path) -> None:
    write(store)
    (tmp_path / "outside").mkdir()
    os.mkfifo(store.path / "fashion" / "v2")
    (store.path / "fashion" / "v3").symlink_to(tmp_path / "outside")
    store.remove("fashion@v2")
    store.remove("fashion@v3")
    assert (tmp_path / "outside").exists()
    assert hidden(store, ".trash-") == []
    assert store.versions("fashion") == (1,)


def test_the_record_of_numbers_is_not_kept_outside_the_store(store: AdapterStore, tmp_path: Path) -> None:
    store.path.mkdir()
    (tmp_path / "outside").mkdir()
    (store.path / ".taken").symlink_to(tmp_path / "outside")
    assert "leads out of the store" in refusal(lambda: commit(store))
    assert os.listdir(tmp_path / "outside") == []


# --- what a writer may not store --------------------------------------------------------------------------------------


def test_all_missing_and_unknown_fields_are_named_and_nothing_is_stored(store: AdapterStore) -> None:
    text = refusal(lambda: commit(store, {"method": "lora", "metrcs": {}, "version": 7, "category": "shoes"}))
    for expected in (
        "The adapter for fashion cannot be stored:",
        'metrcs: is not a field of the manifest. Did you mean "metrics"?',
        "version: is for the store to say.",
        "category: the draft is for fashion, the fields say 'shoes'.",
        "stored_as: is missing.",
        "versions: is missing.",
    ):
        assert expected in text
    assert store.categories() == ()
    assert hidden(store, ".draft-") == []


def test_a_value_json_cannot_hold_is_named(store: AdapterStore) -> None:
    fields = {**FIELDS, "metrics": {"after": {"r@10": [1, {"x": object()}]}}}
    assert "metrics.after.r@10.1.x: expected a value JSON can hold, found object." in refusal(
        lambda: commit(store, fields)
    )


def test_a_writer_that_forgot_a_field_can_add_it_and_commit_again(store: AdapterStore) -> None:
    with store.writing("fashion") as draft:
        (draft.path / "head.safetensors").write_bytes(TENSORS)
        refusal(lambda: draft.commit({}))
        assert draft.commit(FIELDS).version == 1
    assert store.verify() == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"adapter_model__bin": b"x"}, "adapter_model.bin: may hold a pickle, which runs code when it is read"),
        ({"head__pt": b"x"}, "may hold a pickle"),
        ({"head__safetensors": b"x"}, "is not a readable safetensors file"),
        ({"head__safetensors": TENSORS[:-1]}, "is not a readable safetensors file"),
        ({"adapter_config__json": b"{"}, "is not readable JSON"),
        ({".hidden": b"x"}, "is not a file name here"),
        ({"README__md": b"only a card"}, "the draft is empty"),
    ],
)
def test_files_that_do_not_belong_are_refused(store: AdapterStore, files: dict[str, bytes], expected: str) -> None:
    assert expected in refusal(lambda: commit(store, **files))
    assert os.listdir(store.path) == []


def test_folders_and_links_in_a_draft_are_refused(store: AdapterStore, tmp_path: Path) -> None:
    with store.writing("fashion") as draft:
        (draft.path / "checkpoint").mkdir()
        (draft.path / "head.safetensors").symlink_to(tmp_path)
        text = refusal(lambda: draft.commit(FIELDS))
    assert "checkpoint: is not a plain file" in text
    assert "head.safetensors: is not a plain file" in text


def test_a_name_that_cannot_be_a_category_is_refused_before_anything_is_made(store: AdapterStore) -> None:
    for wrong in ("", "Fashion", "a b", "../x", "/tmp/x", ".x", "fashion@v1", "x" * 65, "a\n", "é"):
        with pytest.raises(StoreError, match="cannot be a category"), store.writing(wrong):
            pass
    assert not store.path.exists()


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "the disk is full. Free some space, or name another store with --store FOLDER."),
        (errno.EROFS, "permission denied (Read-only file system). Change the permissions, or name another store"),
        (errno.EIO, "Input/output error. Look after the disk"),
    ],
)
def test_whichever_step_the_disk_refuses_nothing_half_written_is_seen(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch, number: int, expected: str
) -> None:
    """Let every system call of a commit fail in turn, until a commit is reached in which none does."""
    write(store)
    refused = 0
    for failing in range(1, 200):
        calls = 0

        def step(real: Callable[..., Any], failing: int = failing) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == failing:
                    raise OSError(number, os.strerror(number), str(args[0]))
                return real(*args, **kwargs)

            return call

        before = store.versions("fashion")
        with store.writing("fashion") as draft, monkeypatch.context() as patch:
            (draft.path / "head.safetensors").write_bytes(TENSORS)
            for name in ("fsync", "rename", "mkdir", "open", "listdir", "chmod"):
                patch.setattr(os, name, step(getattr(os, name)))
            said = ""
            try:
                record = draft.commit(FIELDS)
            except StoreError as error:
                said = str(error)
        assert hidden(store, ".draft-") == []
        assert store.verify() == []
        if draft.record is None:
            refused += 1
            assert store.versions("fashion") == before
            assert said.startswith(f"Cannot write an adapter for fashion in {store.path}/: ")
            assert expected in said
            assert "\n" not in said
        elif calls < failing:
            break
    assert refused >= 8
    assert store.open("fashion") == record


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_a_disk_that_fills_up_while_the_writer_writes_is_explained(store: AdapterStore) -> None:
    def fill() -> None:
        with store.writing("fashion"), open("/dev/full", "wb", buffering=0) as full:
            full.write(b"weights")

    assert "the disk is full" in refusal(fill)
    assert os.listdir(store.path) == []


def test_a_full_disk_is_recognised_through_the_error_of_a_library(store: AdapterStore) -> None:
    def fill() -> None:
        with store.writing("fashion"):
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    assert "the disk is full" in refusal(fill)


def test_a_store_that_cannot_be_written_says_so_on_entry(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.path.mkdir()

    def read_only(path: Any, *rest: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", read_only)
    text = refusal(lambda: commit(store))
    assert text == (
        f"Cannot write an adapter for fashion in {store.path}/: permission denied (Permission denied). "
        "Change the permissions, or name another store with --store FOLDER."
    )


def test_a_store_that_is_a_file_is_explained_by_every_method(tmp_path: Path) -> None:
    (tmp_path / "adapters").write_text("I am a file")
    store = AdapterStore(tmp_path / "adapters")
    acts: list[Callable[[], Any]] = [
        lambda: commit(store),
        lambda: store.open("fashion"),
        lambda: store.remove("fashion", all=True),
        store.list,
        store.categories,
        store.verify,
        store.clean,
    ]
    for act in acts:
        assert "expected a folder, found a file at" in refusal(act)
    assert (tmp_path / "adapters").read_text() == "I am a file"


@pytest.mark.parametrize("folder", ["short", "long-" * 30])
def test_a_file_under_the_name_of_a_category_is_explained(tmp_path: Path, folder: str) -> None:
    store = AdapterStore(tmp_path / folder)
    store.path.mkdir()
    (store.path / "fashion").write_text("I am a file")
    assert f"found a file at {store.path}/fashion" in refusal(lambda: commit(store))
    assert "No adapter for category" in refusal(lambda: store.open("fashion"))
    assert [fault.where for fault in store.verify()] == ["fashion"]


def test_a_path_no_file_can_have_is_refused() -> None:
    assert "NUL" in refusal(lambda: AdapterStore("a\0b"))


# --- processes --------------------------------------------------------------------------------------------------------

WRITER = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_adapter_store_faults import FIELDS, TENSORS
from peft_combo.store.adapter_store import AdapterStore
store, count, remove = AdapterStore(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "remove"
print("ready", flush=True)
for i in range(count):
    with store.writing("fashion") as draft:
        for name in ("a.txt", "b.txt", "c.txt"):
            (draft.path / name).write_bytes(b"weights" * 20_000)
        record = draft.commit(FIELDS)
    print(record.version, flush=True)
    if remove:
        store.remove(record.reference)
"""


def start(store: AdapterStore, count: int, then: str = "keep") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(store.path), str(count), then]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_writers_at_the_same_time_all_succeed_and_share_no_number(store: AdapterStore) -> None:
    """Two keep what they write and one takes the latest away again, which is how a counter would be fooled."""
    writers = [start(store, 12), start(store, 12), start(store, 12, "remove")]
    said = [writer.communicate(timeout=120)[0].split()[1:] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    numbers = [int(number) for lines in said for number in lines]
    assert sorted(numbers) == list(range(1, 37))
    assert store.versions("fashion") == tuple(sorted(int(n) for n in said[0] + said[1]))
    assert store.verify() == []


def test_a_writer_killed_at_any_moment_leaves_a_store_without_faults(store: AdapterStore) -> None:
    rng = random.Random(0)
    for i in range(5):
        writer = start(store, 10_000, "remove" if i % 2 else "keep")
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.02, 0.4))
        writer.kill()
        writer.communicate()
        assert store.verify() == []
        if store.categories():
            assert store.open("fashion").version == store.latest("fashion")
    store.clean()
    assert hidden(store, ".draft-") + hidden(store, ".trash-") == []
    last = store.versions("fashion")
    assert write(store).version > max(last, default=0)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_next_write_clears_the_drafts_of_the_dead_and_only_those(store: AdapterStore) -> None:
    with store.writing("fashion") as mine:
        stem, host, _, token = mine.path.name.split(".")[1:][0:1] + mine.path.name.split(".")[2:]
        names = {
            "dead": f".{stem}.{host}.{dead_pid()}.{token}",
            "alive": f".{stem}.{host}.{os.getppid()}.{token}",
            "namesake": f".{stem}.{host}.{os.getpid()}.00000000",  # our pid, from before a restart
            "elsewhere": f".{stem}.00000000.1.{token}",
            "elsewhere, old": f".{stem}.00000000.2.{token}",
            "odd": ".draft-",
            "trash": ".trash-00",
        }
        for name in names.values():
            (store.path / name).mkdir()
            (store.path / name / "head.safetensors").write_bytes(b"half")
        old = time.time() - 2 * 24 * 3600
        os.utime(store.path / names["elsewhere, old"], (old, old))
        write(store)
        left = {key for key, name in names.items() if (store.path / name).exists()}
        assert left == {"alive", "elsewhere", "odd"}
        assert mine.path.exists()
    assert store.verify() == []


# --- anything at all --------------------------------------------------------------------------------------------------

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
HOSTILE = st.sampled_from(
    ["..", ".", "", "/", "a/b", "../outside", "fashion/../../outside", "/etc/passwd", "fashion@v1/../..", "~",
     "fashion@v", "fashion@v1\0", "fashion@-1", "\ud800", "fashion@v99999999999999999999", "con",
     "fashion@v1@v1", "v1", ".taken"]
)  # fmt: skip


@pytest.fixture(scope="module")
def pristine() -> Iterator[Path]:
    """A store of two versions beside a folder that must not be reached: it would open, were it looked into."""
    with tempfile.TemporaryDirectory() as root:
        store = AdapterStore(Path(root) / "store")
        write(store)
        write(store)
        shutil.copytree(store.path, Path(root) / "outside")
        yield Path(root)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@FUZZ
@given(reference=st.text(max_size=80) | HOSTILE | st.from_regex(r"[a-z]{1,8}@v[0-9]{1,12}"))
def test_no_reference_leads_out_of_the_store(pristine: Path, reference: str) -> None:
    store = AdapterStore(pristine / "store")
    before = contents(pristine)
    with suppress(StoreError):
        record = store.open(reference)
        assert record.reference in ("fashion@v1", "fashion@v2")
        assert record.path.resolve().is_relative_to(store.path.resolve())
    with suppress(StoreError):
        assert store.versions(reference) == ((1, 2) if reference == "fashion" else ())
    for act in (store.verify, store.latest):
        with suppress(StoreError):
            act(reference)
            assert reference in ("fashion", "fashion@v1", "fashion@v2")
    if not reference.startswith("fashion"):
        for everything in (False, True):
            with pytest.raises(StoreError):
                store.remove(reference, all=everything)
    assert contents(pristine) == before


@FUZZ
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_make_a_manifest_or_a_fault(content: bytes) -> None:
    manifest, faults = parse_manifest(content)
    assert (manifest is None) == bool(faults)
    assert all("\n" not in str(fault) for fault in faults)


@FUZZ
@given(data=st.data())
def test_a_manifest_with_anything_in_it_never_leads_out(pristine: Path, data: st.DataObject) -> None:
    raw = json.loads((pristine / "store" / "fashion" / "v1" / "manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        target: Any = raw
        key = data.draw(st.sampled_from(sorted(raw)))
        if isinstance(raw[key], dict) and raw[key] and data.draw(st.booleans()):
            target = raw[key]
            key = data.draw(st.sampled_from(sorted(target)) | HOSTILE | st.text(max_size=8))
        if data.draw(st.booleans()):
            target[key] = data.draw(JSON)
        else:
            target.pop(key, None)
            target[data.draw(HOSTILE | st.text(max_size=8))] = data.draw(
                JSON | st.just({"sha256": "a" * 64, "bytes": 1})
            )
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(pristine, root, dirs_exist_ok=True)
        store = AdapterStore(Path(root) / "store")
        (store.path / "fashion" / "v1" / "manifest.json").write_text(json.dumps(raw))
        store.list()
        store.verify()
        with suppress(StoreError):
            record = store.open("fashion@v1")
            assert isinstance(render_model_card(record.manifest), str)
            assert all(record.file(name).parent == record.path for name in record.manifest.files)
            assert store.verify("fashion@v1") == [] or set(os.listdir(record.path)) - set(record.manifest.files)
        with suppress(StoreError):
            store.remove("fashion", all=True)
        assert contents(Path(root) / "outside") == contents(pristine / "outside")


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["write", "delete", "link", "folder", "pipe", "flip"]),
        st.sampled_from(
            ["fashion", "fashion/v1", "fashion/v2", "fashion/v3", "fashion/v2/manifest.json", ".taken", ".draft-x",
             "shoes", "fashion/v2/adapter_model.safetensors", "fashion/v2/extra", "fashion/v1/README.md",
             "shoes/v1", "\udcff"]
        ),
        st.binary(max_size=20),
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


def change(root: Path, kind: str, name: str, content: bytes) -> None:
    path = root / "store" / name
    with suppress(OSError):
        if kind == "flip":
            if not path.is_file():  # reading a pipe would wait for ever
                return
            old = bytearray(path.read_bytes())
            old[len(content) % len(old)] ^= 1
            path.write_bytes(old)
            return
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
        if kind == "write":
            path.write_bytes(content)
        elif kind == "link":
            path.symlink_to(root / "outside" / "fashion")
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)


@FUZZ
@given(changes=CHANGES)
def test_whatever_lies_in_the_folder_only_true_bytes_come_out_and_nothing_outside_is_touched(
    pristine: Path, changes: list[tuple[str, str, bytes]]
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        shutil.copytree(pristine, root, dirs_exist_ok=True)
        for kind, name, content in changes:
            change(root, kind, name, content)
        outside = contents(root / "outside")  # as it is now: a change may itself have gone through a link
        store = AdapterStore(root / "store")
        for reference in ("fashion", "fashion@v1", "fashion@v2", "shoes"):
            with suppress(StoreError):
                record = store.open(reference)
                assert record.path.resolve().is_relative_to(store.path.resolve())
                for name, entry in record.manifest.files.items():
                    assert hashlib.sha256(record.read(name)).hexdigest() == entry.sha256
        acts: list[Callable[[], Any]] = [
            store.list,
            store.verify,
            store.categories,
            lambda: commit(store),
            lambda: store.remove("fashion@v2"),
            lambda: store.remove("fashion", all=True),
            store.clean,
        ]
        for act in acts:
            with suppress(StoreError):
                act()
        assert contents(root / "outside") == outside


@FUZZ
@given(fields=st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=8), JSON, max_size=3))
def test_whatever_a_writer_says_is_stored_and_reads_back_or_is_refused(fields: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as root:
        store = AdapterStore(Path(root))
        try:
            commit(store, {**FIELDS, **fields})
        except StoreError:
            assert store.categories() == ()
        else:
            record = store.open("fashion")
            assert record.read("README.md").decode() == render_model_card(record.manifest)
            assert Manifest.model_validate_json((record.path / "manifest.json").read_bytes()) == record.manifest
        assert store.verify() == []
        assert hidden(store, ".draft-") == []
