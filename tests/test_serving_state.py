"""The service's state: what was acknowledged is there, once, in order, and no user's id; on SQLite and Postgres."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

from peft_combo.serving.recent import Recent
from peft_combo.serving.state import (
    EventRow,
    ExposureRow,
    FeedbackRow,
    ItemRow,
    Journal,
    ShownItem,
    State,
    StateError,
)

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Postgres of our own, behind a socket in a temporary folder."""
    if not POSTGRES:
        pytest.skip("no Postgres is installed (apt-get install postgresql)")
    pytest.importorskip("psycopg")
    programs = POSTGRES[-1].parent
    folder = tmp_path_factory.mktemp("postgres", numbered=True)
    owner: dict[str, object] = {}
    if os.geteuid() == 0:  # Postgres does not run as root
        names = {one.pw_name for one in pwd.getpwall()}
        owner = {"user": "postgres" if "postgres" in names else "nobody"}
        for one in (folder, *folder.parents):
            if one == Path("/tmp"):
                break
            os.chmod(one, 0o755)
        shutil.chown(folder, str(owner["user"]))
    data = folder / "data"
    subprocess.run(
        [programs / "initdb", "-D", data, "-A", "trust", "-U", "tester", "--no-sync"],
        check=True, capture_output=True, cwd=folder, **owner,
    )  # type: ignore[call-overload]  # fmt: skip
    server = subprocess.Popen(
        [programs / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses="],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, **owner,
    )  # type: ignore[call-overload]  # fmt: skip
    try:
        url = f"postgresql+psycopg://tester@/postgres?host={folder}"
        for _ in range(100):
            if (folder / ".s.PGSQL.5432").exists():
                break
            time.sleep(0.1)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)


@pytest.fixture(params=["sqlite", "postgres"])
def state(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    monkeypatch.setenv("PEFT_COMBO_SECRET", "a secret of the tests")
    if request.param == "sqlite":
        opened = State.open(tmp_path / "state")
    else:
        url = request.getfixturevalue("postgres")
        opened = State.open(url)
        from sqlalchemy import create_engine, text

        engine = create_engine(url)
        with engine.begin() as connection:  # an empty one for each test
            for table in ("items", "events", "exposures", "feedback", "deployments", "keys", "audit", "forgotten",
                          "item_counts"):  # fmt: skip
                connection.execute(text(f"TRUNCATE {table} RESTART IDENTITY"))
            connection.execute(text("UPDATE heads SET seq = 0"))
            connection.execute(text("UPDATE item_counts_head SET seq = 0"))
        engine.dispose()
    yield opened
    opened.close()


def test_the_last_word_on_an_item_counts_and_others_see_what_changed(state: State) -> None:
    assert (
        state.put_items([ItemRow("a", {"title": "x"}), ItemRow("b", {"title": "y"}), ItemRow("a", {"title": "z"})]) == 2
    )
    seen = state.head()
    assert state.put_items([ItemRow("b", {}, deleted=True)]) == 3
    assert [(row.item_id, row.fields, row.deleted) for row in state.items_since()] == [
        ("a", {"title": "z"}, False), ("b", {}, True),
    ]  # fmt: skip
    assert state.head() != seen
    assert [row.item_id for row in state.items_since(seen.items)] == ["b"]


def test_an_event_that_is_sent_again_counts_once(state: State) -> None:
    key = state.identify("u1")
    sent = [EventRow(key, "a", "view", event_id="e1"), EventRow(key, "b", "rating", 4.0), EventRow(key, "a", "view")]
    assert state.add_events(sent) == 3
    assert state.add_events([sent[0], EventRow(key, "c", "purchase", event_id="e2")]) == 1
    assert [row.item_id for row in state.events_of(key)] == ["c", "a", "b", "a"]
    assert [row.seq for row in state.events_since(2)] == [3, 4]


def test_exposures_and_feedback_are_joined_by_the_request(state: State) -> None:
    journal = Journal(state)
    shown = (ShownItem("b", 0.5, 1.0), ShownItem("c", 0.25, 0.9))
    row = ExposureRow("r1", None, "complete", "fashion@prod", "fashion@v1", "d", "prod", ("a",), shown)
    assert journal.offer(row)
    journal.close()
    [found] = state.find_exposures("r1")
    assert (found.context, found.shown, found.arm) == (("a",), shown, "prod")
    state.add_feedback([FeedbackRow("r1", "click", "b")])
    assert [one.request_id for one in state.feedback_since()] == ["r1"]


def _count(state: State) -> dict[str, tuple[int, int]]:
    return {row.item_id: (row.shown, row.rewarded) for row in state.item_counts_since()}


def _list(request: str, *items: str, user: str | None = None, **more: str) -> ExposureRow:
    shown = tuple(ShownItem(item, 0.5, 0.5) for item in items)
    row = ExposureRow(request, user, "complete", "fashion@prod", "fashion@v1", "d", "prod", ("z",), shown)
    return replace(row, **more)  # type: ignore[arg-type]


def test_counters_of_items_follow_what_was_shown_earned_and_forgotten(state: State) -> None:
    key = state.identify("u1")
    state.add_feedback([FeedbackRow("r1", "click", "b")])  # before its list is written, which lags behind
    state.add_exposures([_list("r1", "a", "b"), _list("r2", "b", "c", user=key)])
    state.add_exposures([_list("r3", "a", arm="shadow"), _list("r4", "a", route="compose")])  # unseen; no list
    assert _count(state) == {"a": (1, 0), "b": (2, 1), "c": (1, 0)}
    seen = state.item_counts_since()[-1].seq
    # An item earns once in a list; what it was not shown in, or was rejected in, earns it nothing.
    state.add_feedback([FeedbackRow("r1", "purchase", "b"), FeedbackRow("r1", "rejected", "a")])
    state.add_feedback([FeedbackRow("r1", "click", "z"), FeedbackRow("r9", "click", "a")])
    assert state.item_counts_since(seen) == []
    state.add_feedback([FeedbackRow("r2", "basket", "c"), FeedbackRow("r2", "purchase")])  # the answer as a whole
    assert _count(state) == {"a": (1, 0), "b": (2, 2), "c": (1, 1)}
    assert {row.item_id for row in state.item_counts_since(seen)} == {"b", "c"}
    state.forget(key)
    assert _count(state) == {"a": (1, 0), "b": (1, 1), "c": (0, 0)}


def test_counters_are_those_of_the_rows_whoever_writes_at_once(state: State) -> None:
    rng = np.random.default_rng(0)
    lists = [_list(f"r{n}", *rng.permutation(list("abcdef"))[:3], user=f"u{n % 4}") for n in range(40)]
    said = [FeedbackRow(f"r{n}", "click", str(rng.choice(list("abcdef")))) for n in rng.integers(0, 40, 60)]
    writes: list[Callable[[], object]] = [partial(state.add_exposures, lists[n : n + 4]) for n in range(0, 40, 4)]
    writes += [partial(state.add_feedback, said[n : n + 6]) for n in range(0, 60, 6)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(writes[n]) for n in rng.permutation(len(writes))]:
            done.result()
    state.forget("u2")
    expected = {item: [0, 0] for item in "abcdef"}
    for row in lists:
        for one in row.shown if row.user_key != "u2" else ():
            expected[one.item_id][0] += 1
            expected[one.item_id][1] += any(f.request_id == row.request_id and f.item_id == one.item_id for f in said)
    assert _count(state) == {item: tuple(counts) for item, counts in expected.items()}


def test_a_state_of_the_schema_before_gets_its_counters(tmp_path: Path) -> None:
    state = State.open(tmp_path)
    state.add_exposures([_list("r1", "a", "b"), _list("r2", "b")])
    state.add_feedback([FeedbackRow("r2", "click", "b")])
    before = _count(state)
    state.close()
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.executescript(
            "DROP TABLE item_counts; DROP TABLE item_counts_head; UPDATE schema_version SET version=1"
        )
    connection.close()
    state = State.open(tmp_path)
    assert _count(state) == before == {"a": (1, 0), "b": (2, 1)}
    state.add_exposures([_list("r3", "a")])
    assert _count(state)["a"] == (2, 0)
    state.close()


def test_deployments_keep_their_history_and_the_newest_counts(state: State) -> None:
    state.put_deployment("fashion@prod", {"prod": ("fashion@v1", 100.0)}, "ops")
    state.put_deployment("fashion@prod", {"prod": ("fashion@v1", 90.0), "next": ("fashion@v2", 10.0)}, "ops")
    state.put_deployment("food@prod", {}, "ops", "unload")
    assert state.deployments() == {"fashion@prod": {"prod": ("fashion@v1", 90.0), "next": ("fashion@v2", 10.0)}}
    assert [row.action for row in state.deployments_since()] == ["promote", "promote", "unload"]
    assert [row.action for row in state.audit_log()] == ["promote", "promote", "unload"]


def test_the_audit_log_only_grows(state: State) -> None:
    from sqlalchemy import text

    state.audit("ops", "promote")
    for statement in ("DELETE FROM audit", "UPDATE audit SET actor = 'nobody'"):
        with pytest.raises(StateError, match="only grows"), state._database.write() as connection:
            connection.execute(text(statement))
    assert [row.actor for row in state.audit_log()] == ["ops"]


def test_a_key_opens_until_it_is_removed_and_is_nowhere_to_be_read(state: State, tmp_path: Path) -> None:
    key = state.add_key("web", ["read"])
    caller = state.check_key(key)
    assert caller is not None
    assert (caller.name, caller.scopes) == ("web", {"read"})
    assert state.check_key(key[:-1] + ("A" if key[-1] != "A" else "B")) is None
    assert state.check_key("pc_" + "0" * 12 + "_" + "x" * 43) is None
    with pytest.raises(StateError, match="already"):
        state.add_key("web", ["read"])
    with pytest.raises(StateError, match='Did you mean "web"'):
        state.remove_key("wep")
    secret = key.split("_", 2)[2].encode()
    assert not any(secret in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    state.remove_key("web")
    assert state.check_key(key) is None


def test_a_forgotten_person_is_in_no_table_and_no_file(state: State, tmp_path: Path) -> None:
    user, key = "customer-4711-jane", state.identify("customer-4711-jane")
    other = state.identify("someone else")
    state.add_events([EventRow(key, "a", "view"), EventRow(other, "a", "view")])
    row = ExposureRow("r1", key, "complete", "f@prod", "f@v1", "d", "prod")
    state.add_exposures([row])
    state.add_feedback([FeedbackRow("r1", "click")])
    assert state.forget(key) == {"feedback": 1, "exposures": 1, "events": 1}
    state.add_exposures([row])  # an answer that was under way
    assert state.events_of(key) == []
    assert state.find_exposures("r1") == []
    assert len(state.events_of(other)) == 1
    assert [user_key for _, user_key in state.forgotten_since()] == [key]
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        assert user.encode() not in file.read_bytes()


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    State.open(tmp_path).close()
    with sqlite3.connect(tmp_path / "state.db") as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    connection.close()
    with pytest.raises(StateError, match=r"found 99, written by a newer peft-combo\. Upgrade"):
        State.open(tmp_path)


def test_the_secret_is_the_owners_alone(tmp_path: Path) -> None:
    State.open(tmp_path).close()
    secret = tmp_path / "secret"
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
    secret.chmod(0o644)
    with pytest.raises(StateError, match="chmod 600"):
        State.open(tmp_path)


def test_a_url_without_a_secret_or_driver_is_refused_without_showing_a_password() -> None:
    for url in ("postgresql+psycopg://me:hunter2@localhost/x", "nonsense://me:hunter2@localhost/x", "://hunter2"):
        with pytest.raises(StateError) as refused:
            State.open(url)
        assert "hunter2" not in str(refused.value)


def test_a_full_journal_drops_and_counts(tmp_path: Path) -> None:
    state = State.open(tmp_path)
    dropped: list[int] = []
    journal = Journal(state, limit=1, on_dropped=dropped.append)
    row = ExposureRow("r", None, "complete", "f@prod", "f@v1", "d", "prod")
    taken = sum(journal.offer(row) for _ in range(50))
    journal.close()
    assert taken + journal.dropped == 50
    assert sum(dropped) == journal.dropped > 0
    assert len(state.find_exposures("r")) == taken
    state.close()


def test_what_a_killed_process_was_told_is_there(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom peft_combo.serving.state import EventRow, State\n"
        f"state = State.open({str(tmp_path)!r})\n"
        "for number in range(100000):\n"
        "    state.add_events([EventRow('k', str(number), 'view')])\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 20:
                process.kill()
                break
        told = [20, *map(int, process.stdout.read().split())]
    state = State.open(tmp_path)
    stored = {int(row.item_id) for row in state.events_since()}
    state.close()
    assert stored >= set(range(told[-1] + 1))


def test_what_was_asked_for_last_is_kept() -> None:
    kept: Recent[str, int] = Recent(2)
    assert kept.put("a", 1) == []
    assert kept.put("b", 2) == []
    assert kept.get("a") == 1
    assert kept.put("c", 3) == [2]
    assert kept.get("b") is None
    assert kept.get_or_make("a", lambda: 9) == 1
    assert kept.get_or_make("d", lambda: 4) == 4
    kept.forget(["d", "nobody"])
    assert kept.list_all() == [("a", 1)]
    assert Recent(0).put("x", 1) == [1]
