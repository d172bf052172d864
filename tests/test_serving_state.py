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
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

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
            for table in ("items", "events", "exposures", "feedback", "deployments", "keys", "audit", "forgotten"):
                connection.execute(text(f"TRUNCATE {table} RESTART IDENTITY"))
            connection.execute(text("UPDATE heads SET seq = 0"))
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
    secret = key.rpartition("_")[2].encode()
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
