"""Aliases and garbage collection: where a name points, what may go, and what two writers and a reader see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_adapter_store import hidden, write
from test_adapter_store_faults import dead_pid

from peft_combo.errors import StoreError
from peft_combo.files import measure_size
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.aliases import Alias, Move, parse_alias
from peft_combo.store.integrity import hold_lock

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


@pytest.fixture
def four(store: AdapterStore) -> AdapterStore:
    for value in range(4):
        write(store, value=float(value))
    return store


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(StoreError) as caught:
        act()
    return str(caught.value)


# --- pointing ---------------------------------------------------------------------------------------------------------


def test_an_alias_opens_as_the_version_it_points_to_until_it_is_moved(four: AdapterStore) -> None:
    alias = four.alias("fashion@v2", "prod")
    assert (alias.reference, alias.target, alias.version, alias.before) == ("fashion@prod", "fashion@v2", 2, None)
    assert four.open("fashion@prod") == four.open("fashion@v2")
    assert four.resolve("fashion@prod") == ("fashion", 2)
    assert four.alias("fashion", "prod").version == 4  # the latest, as it is now
    write(four)
    assert four.open("fashion@prod").version == 4
    assert four.alias("fashion@v3", "staging").version == 3
    assert four.alias("fashion@staging", "prod").version == 3  # where the other points, as it is now
    four.alias("fashion@v1", "staging")
    assert four.open("fashion@prod").version == 3
    assert [(alias.reference, alias.version) for alias in four.aliases()] == [
        ("fashion@prod", 3),
        ("fashion@staging", 1),
    ]
    assert four.verify() == four.verify("fashion") == four.verify("fashion@prod") == []


def test_a_rollback_takes_the_last_move_back_and_the_next_one_the_move_before(four: AdapterStore) -> None:
    for version in (1, 2, 3):
        four.alias(f"fashion@v{version}", "prod")
    assert [four.rollback("fashion@prod").version for _ in range(2)] == [2, 1]
    assert "nothing before that" in refusal(lambda: four.rollback("fashion@prod"))
    assert four.alias("fashion@v4", "prod").before == 1
    assert four.rollback("fashion@prod").version == 1
    moves = four.alias_at("fashion@prod").moves
    assert [(move.version, move.rollback) for move in moves] == [
        (1, False), (2, False), (3, False), (2, True), (1, True), (4, False), (1, True),
    ]  # fmt: skip
    assert all(move.at.tzinfo is not None and datetime.now(UTC) - move.at < timedelta(minutes=5) for move in moves)


def test_pointing_where_it_points_already_is_no_move(four: AdapterStore) -> None:
    four.alias("fashion@v2", "prod")
    assert len(four.alias("fashion@v2", "prod").moves) == 1


def test_the_history_is_cut_at_its_oldest_end_and_rollback_still_works() -> None:
    moves = tuple(Move(version=1 + number % 9, at=datetime.now(UTC)) for number in range(1000))
    alias = Alias(category="fashion", name="prod", moves=moves).move_to(77)
    assert (len(alias.moves), alias.moves[0], alias.before) == (1000, moves[1], moves[-1].version)
    taken_back = Alias(category="fashion", name="prod", moves=(Move(version=5, at=datetime.now(UTC), rollback=True),))
    assert (taken_back.version, taken_back.before) == (5, None)


def test_an_alias_never_points_to_what_is_not_there_or_damaged(four: AdapterStore) -> None:
    assert 'No version "v9"' in refusal(lambda: four.alias("fashion@v9", "prod"))
    assert 'Did you mean "fashion"?' in refusal(lambda: four.alias("fashon", "prod"))
    (four.path / "fashion" / "v3" / "adapter_config.json").write_text("{}")
    assert "was altered" in refusal(lambda: four.alias("fashion@v3", "prod"))
    assert four.aliases() == ()
    four.alias("fashion@v1", "prod")
    four.alias("fashion@v2", "prod")
    four.remove("fashion@v1")
    assert "v1 was removed. Stored: v2, v3, v4." in refusal(lambda: four.rollback("fashion@prod"))
    assert four.open("fashion@prod").version == 2


@pytest.mark.parametrize(
    "name", ["", "v1", "v01", "v", "Prod", "9", "a b", "../x", "a/b", "prod@x", "x" * 65, "é", "."]
)
def test_a_word_that_cannot_be_an_alias_is_refused(four: AdapterStore, name: str) -> None:
    assert "cannot be an alias" in refusal(lambda: four.alias("fashion", name))
    assert not (four.path / ".aliases").exists()


def test_latest_is_no_alias_because_the_category_alone_says_it(four: AdapterStore) -> None:
    assert "the category alone" in refusal(lambda: four.alias("fashion@v1", "latest"))


def test_an_unknown_alias_is_answered_with_the_nearest_one(four: AdapterStore) -> None:
    four.alias("fashion", "prod")
    for act in (four.open, four.rollback, four.unalias, four.verify, four.alias_at):
        text = refusal(lambda act=act: act("fashion@prd"))  # type: ignore[misc]
        assert 'Did you mean "prod"?' in text
        assert "peft-combo adapters alias fashion prd" in text
    assert "No adapter for category" in refusal(lambda: four.open("shoes@prod"))
    for act in (four.rollback, four.unalias):
        assert "is not an alias" in refusal(lambda act=act: act("fashion@v1"))  # type: ignore[misc]


def test_a_version_an_alias_points_to_is_not_removed(four: AdapterStore) -> None:
    four.alias("fashion@v2", "prod")
    for act in (lambda: four.remove("fashion@v2"), lambda: four.remove("fashion", all=True)):
        text = refusal(act)
        assert "fashion@prod (v2) points to it" in text
        assert "adapters alias fashion@vN prod" in text
        assert "adapters unalias fashion@prod" in text
    assert "is an alias, not a version" in refusal(lambda: four.remove("fashion@prod"))
    assert four.versions("fashion") == (1, 2, 3, 4)
    four.alias("fashion@v3", "prod")
    assert four.remove("fashion@v2") == ("fashion@v2",)
    assert four.unalias("fashion@prod").version == 3
    assert len(four.remove("fashion", all=True)) == 3
    assert os.listdir(four.path / ".aliases") == []


def test_an_alias_whose_version_was_deleted_by_hand_is_told_with_the_remedy(four: AdapterStore, tmp_path: Path) -> None:
    four.alias("fashion@v2", "prod")
    (four.path / "fashion" / "v2").rename(tmp_path / "away")
    assert "points to v2, which is not in" in refusal(lambda: four.open("fashion@prod"))
    (fault,) = four.verify("fashion")
    assert (fault.where, fault.remedy) == ("fashion@prod", "Move it with: peft-combo adapters alias fashion prod")
    assert four.alias("fashion@v3", "prod").version == 3
    assert four.verify() == []


NOON = "2026-01-01T12:00:00Z"


def alias_file(**changes: Any) -> bytes:
    fields = {"format": 1, "category": "fashion", "name": "prod", "moves": [{"version": 1, "at": NOON}]}
    return json.dumps({**fields, **changes}).encode()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is not JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"format": 2}', "pip install --upgrade"),
        (alias_file(moves=[]), "moves"),
        (alias_file(moves=[{"version": 0, "at": NOON}]), "moves.0.version"),
        (alias_file(moves=[{"version": 1, "at": NOON.removesuffix("Z")}]), "moves.0.at"),
        (alias_file(category="shoes"), "was written as shoes@prod"),
        (b" " * (2**20 + 1), "larger than"),
    ],
)
def test_an_alias_that_does_not_read_stops_whoever_needs_it_and_nobody_else(
    four: AdapterStore, content: bytes, told: str
) -> None:
    four.alias("fashion@v1", "prod")
    (four.path / ".aliases" / "fashion@prod.json").write_bytes(content)
    acts: list[Callable[[], Any]] = [
        lambda: four.open("fashion@prod"),
        lambda: four.alias("fashion@v2", "prod"),
        lambda: four.rollback("fashion@prod"),
        lambda: four.remove("fashion@v1"),  # it may be what the alias points to
        lambda: four.collect(1),
        four.aliases,
    ]
    for act in acts:
        assert told in refusal(act)
    assert any(told in str(fault) for fault in four.verify())
    assert four.versions("fashion") == (1, 2, 3, 4)
    assert four.open("fashion@v1").version == 1
    assert parse_alias(content, "fashion", "prod")[0] is None


def test_aliases_are_not_followed_out_of_the_store(four: AdapterStore, tmp_path: Path) -> None:
    other = AdapterStore(tmp_path / "other")
    write(other)
    other.alias("fashion@v1", "prod")
    (four.path / ".aliases").symlink_to(other.path / ".aliases")
    assert "leads out of the store" in refusal(lambda: four.open("fashion@prod"))
    assert "leads out of the store" in refusal(lambda: four.alias("fashion@v2", "new"))
    assert os.listdir(other.path / ".aliases") == ["fashion@prod.json"]
    (four.path / ".aliases").unlink()
    (four.path / ".aliases").mkdir()
    (four.path / ".aliases" / "fashion@prod.json").symlink_to(other.path / ".aliases" / "fashion@prod.json")
    assert "it is a link" in refusal(lambda: four.open("fashion@prod"))
    (four.path / ".aliases" / "notes.txt").write_text("x")
    assert ".aliases/notes.txt" in {fault.where for fault in four.verify()}


def test_whoever_waits_too_long_for_the_lock_is_told(four: AdapterStore) -> None:
    four = AdapterStore(four.path, lock_wait=0.05)
    with hold_lock(four.path):
        for act in (lambda: four.alias("fashion", "prod"), lambda: four.remove("fashion@v1"), lambda: four.collect(1)):
            assert "Another process has been changing" in refusal(act)
        assert four.open("fashion").version == 4  # readers and writers of versions do not wait
        assert write(four).version == 5
    assert four.alias("fashion", "prod").version == 5


@pytest.mark.parametrize("step", ["write", "replace", "fsync"])
def test_a_move_the_disk_refuses_leaves_the_alias_where_it_was(
    four: AdapterStore, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    four.alias("fashion@v1", "prod")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "open", full) if step == "write" else (os, step, full)))
        assert "the disk is full" in refusal(lambda: four.alias("fashion@v2", "prod"))
    assert four.open("fashion@prod").version == 1
    assert os.listdir(four.path / ".aliases") == ["fashion@prod.json"]


# --- garbage ----------------------------------------------------------------------------------------------------------


def test_what_goes_is_old_unneeded_and_sound(store: AdapterStore) -> None:
    for _ in range(8):
        write(store)
    write(store, "shoes")
    store.alias("fashion@v1", "canary")
    store.alias("fashion@v2", "prod")
    store.alias("fashion@v3", "prod")  # and would roll back to v2
    (store.path / "fashion" / "v8" / "adapter_config.json").write_text("altered")
    (store.path / "fashion" / "v4" / "manifest.json").write_text("{")
    write(store, "shoes")
    write(store, "shoes")
    (store.path / "shoes" / "v1" / "README.md").write_text("altered")
    told = store.collect(2, dry_run=True)
    assert [garbage.name for garbage in told] == ["fashion@v5"]  # v8 does not open, so v7 and v6 are the newest two
    assert store.versions("fashion") == tuple(range(1, 9))
    size = sum(path.stat().st_size for path in (store.path / "fashion" / "v5").iterdir())
    assert store.collect(2) == told
    assert told[0].bytes == size
    assert store.versions("fashion") == (1, 2, 3, 4, 6, 7, 8)
    assert store.versions("shoes") == (1, 2, 3)
    assert store.collect(2) == ()
    assert hidden(store, ".trash-") == []
    assert write(store).version == 9
    assert "at least 1" in refusal(lambda: store.collect(0))


def test_only_what_is_older_goes(store: AdapterStore) -> None:
    for version in (1, 2, 3):
        path = write(store).path / "manifest.json"
        made = datetime.now(UTC) - timedelta(days=10 * (4 - version))
        path.write_text(json.dumps({**json.loads(path.read_text()), "created": made.isoformat()}))
    assert [garbage.name for garbage in store.collect(1, timedelta(days=25))] == ["fashion@v1"]
    assert store.collect(1, timedelta(days=25)) == ()
    assert [garbage.name for garbage in store.collect(1, timedelta(0))] == ["fashion@v2"]


def test_drafts_of_the_dead_and_trash_go_with_their_size(store: AdapterStore) -> None:
    with store.writing("fashion") as mine:
        draft = mine.path.name.replace(f".{os.getpid()}.", f".{dead_pid()}.")
        for name in (draft, ".trash-00"):
            (store.path / name).mkdir()
            (store.path / name / "head.safetensors").write_bytes(b"x" * 1000)
        assert store.collect(dry_run=True) == ((draft, 1000), (".trash-00", 1000))
        assert set(store.collect()) == {(draft, 1000), (".trash-00", 1000)}
        assert mine.path.exists()


def test_an_absent_store_has_no_garbage_and_is_not_made(store: AdapterStore) -> None:
    assert store.collect() == ()
    assert store.aliases() == ()
    assert not store.path.exists()


# --- at the same time -------------------------------------------------------------------------------------------------

MOVER = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from peft_combo.store.adapter_store import AdapterStore
store = AdapterStore(sys.argv[1])
print("ready", flush=True)
for turn in range(60):
    store.alias(f"fashion@v{{1 + turn % 3}}" if sys.argv[2] == "low" else f"fashion@v{{4 - turn % 2}}", "prod")
    if turn % 5 == 4:
        store.rollback("fashion@prod")
"""


def test_two_processes_move_an_alias_and_a_reader_always_finds_a_whole_version(four: AdapterStore) -> None:
    four.alias("fashion@v1", "prod")
    movers = [
        subprocess.Popen([sys.executable, "-c", MOVER, str(four.path), which], stdout=subprocess.PIPE)
        for which in ("low", "high")
    ]
    seen: set[int] = set()
    while any(mover.poll() is None for mover in movers):
        record = four.open("fashion@prod")
        assert record.read("adapter_model.safetensors")
        seen.add(record.version)
    assert [mover.wait() for mover in movers] == [0, 0]
    for mover in movers:
        assert mover.stdout is not None
        mover.stdout.close()
    assert seen <= {1, 2, 3, 4}
    moves = four.alias_at("fashion@prod").moves
    # No move was lost: every one that changed something is in the history, one after the other.
    assert all(one.version != two.version for one, two in pairwise(moves))
    assert sum(move.rollback for move in moves) >= 20
    assert four.verify() == []


def at_once(*acts: Callable[[threading.Event], None]) -> None:
    """Run each in a thread; the first one says when it is enough. What any of them raises is raised here."""
    done = threading.Event()
    failed: list[BaseException] = []

    def run(act: Callable[[threading.Event], None]) -> None:
        try:
            act(done)
        except BaseException as error:
            failed.append(error)
        finally:
            if act is acts[0] or failed:
                done.set()

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failed:
        raise failed[0]


def test_readers_of_an_alias_only_go_forward_while_versions_are_promoted_and_collected(four: AdapterStore) -> None:
    four.alias("fashion@v4", "prod")

    def promote(_: threading.Event) -> None:
        for _turn in range(15):
            four.alias(write(four).reference, "prod")

    def collect(done: threading.Event) -> None:
        while not done.is_set():
            four.collect(1)

    def read(done: threading.Event) -> None:
        last = 0
        while not done.is_set():
            version = four.open("fashion@prod").version
            assert version >= last
            last = version

    at_once(promote, collect, read, read)
    assert four.open("fashion@prod").version == 19
    four.collect(1)
    assert four.versions("fashion") == (18, 19)  # the newest, and what a rollback goes back to
    assert four.verify() == []


def test_of_a_promotion_and_a_removal_one_is_refused(four: AdapterStore) -> None:
    four.alias("fashion@v4", "prod")
    promoted, removed = {4}, set()

    def promote(_: threading.Event) -> None:
        for _turn in range(15):
            record = write(four)
            with suppress(StoreError):  # it was removed first
                four.alias(record.reference, "prod")
                promoted.add(record.version)
            assert four.open("fashion@prod").version == max(promoted)

    def remove(done: threading.Event) -> None:
        while not done.is_set():
            for version in reversed(four.versions("fashion")):
                with suppress(StoreError):  # the alias points to it
                    four.remove(f"fashion@v{version}")
                    removed.add(version)

    at_once(promote, remove)
    assert promoted | removed >= set(range(1, 20))
    assert max(promoted) not in removed
    assert four.verify() == []


def test_what_went_while_it_was_looked_at_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "left").write_bytes(b"12345")
    assert measure_size(tmp_path / "left") == 5
    assert measure_size(tmp_path / "gone") == 0
