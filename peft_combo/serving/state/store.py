"""The service's state: what was acknowledged and has to be there after a crash.

Owns items, events, exposures, feedback, deployments, keys and the audit log as transactions over `database`. Every
method that writes returns when the write is on the disk. Knows nothing of recommenders or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from sqlalchemy import ColumnElement, Connection, Row, Table, delete, func, insert, literal, select, update
from sqlalchemy.dialects import postgresql, sqlite

from peft_combo.errors import did_you_mean
from peft_combo.serving.state import tables
from peft_combo.serving.state.database import Database
from peft_combo.serving.state.identities import Identities
from peft_combo.serving.state.item_counts import Tally, hold_counts, read_earned, read_lists, select_lists
from peft_combo.serving.state.keys import make_key, match_secret, parse_key
from peft_combo.serving.state.rows import (
    REWARDING,
    AuditRow,
    Caller,
    DeployedArm,
    DeploymentRow,
    EventRow,
    ExposureRow,
    FeedbackRow,
    Heads,
    ItemCount,
    ItemRow,
    Scope,
    ShownItem,
)
from peft_combo.serving.state.tables import StateError


class State:
    """Reads and writes the state; safe to share between threads, and between processes by the same place.

    Attributes:
        name: folder or URL, without a password, for messages.
    """

    def __init__(self, database: Database, identities: Identities) -> None:
        self._database, self._identities = database, identities
        self.name = database.name

    @classmethod
    def open(cls, place: str | Path) -> Self:
        """Open the state in a folder (SQLite) or at a URL (``postgresql+psycopg://...``), made or migrated if need be.

        Raises:
            StateError: it cannot be opened, was written by a newer peft-combo, or the secret of user ids is missing.
        """
        database = Database.open(place)
        return cls(database, Identities.open(database.folder))

    def close(self) -> None:
        self._database.close()

    def identify(self, user_id: str) -> str:
        """Return the key under which a user's rows are stored; see `Identities`."""
        return self._identities.identify(user_id)

    def head(self) -> Heads:
        """Return the newest sequence numbers: one small query, to be asked several times a second."""
        with self._database.read() as connection:
            rows = connection.execute(select(tables.heads.c.name, tables.heads.c.seq)).all()
        return Heads(**{row.name: row.seq for row in rows})

    # --- items

    def put_items(self, rows: Sequence[ItemRow]) -> int:
        """Write items, deleted ones too, each in place of what was known of it; return the last sequence number."""
        if not rows:
            return self.head().items
        rows = list({row.item_id: row for row in rows}.values())  # of one item given twice the last word counts
        with self._database.write() as connection:
            last = _advance(connection, "items", len(rows))
            values = [
                {
                    "item_id": row.item_id, "fields": dict(row.fields), "deleted": row.deleted,
                    "time": row.time or time.time(), "seq": last - len(rows) + place,
                }
                for place, row in enumerate(rows, 1)
            ]  # fmt: skip
            statement = _insert(connection, tables.items)
            new = {name: statement.excluded[name] for name in ("seq", "fields", "deleted", "time")}
            connection.execute(statement.on_conflict_do_update(index_elements=["item_id"], set_=new), values)
        return last

    def items_since(self, seq: int = 0, limit: int | None = None) -> list[ItemRow]:
        """Return items changed after a sequence number, oldest change first; all, or at most `limit`."""
        rows = self._since(tables.items, seq, limit)
        return [ItemRow(row.item_id, row.fields, row.deleted, row.time, row.seq) for row in rows]

    # --- events

    def add_events(self, rows: Sequence[EventRow]) -> int:
        """Write events; return how many were new: an `event_id` that is there already is none."""
        if not rows:
            return 0
        with self._database.write() as connection:
            named = {row.event_id: row for row in rows if row.event_id is not None}
            there = _find_events(connection, list(named))
            fresh = [row for row in rows if row.event_id is None or named.get(row.event_id) is row]
            fresh = [row for row in fresh if row.event_id not in there]
            if not fresh:
                return 0
            first = _advance(connection, "events", len(fresh)) - len(fresh) + 1
            now = time.time()
            connection.execute(
                insert(tables.events),
                [{**asdict(row), "time": row.time or now, "seq": first + place} for place, row in enumerate(fresh)],
            )
        return len(fresh)

    def events_since(self, seq: int = 0, limit: int | None = None) -> list[EventRow]:
        """Return events after a sequence number, oldest first; all, or at most `limit`."""
        return [_make_event(row) for row in self._since(tables.events, seq, limit)]

    def events_of(self, user_key: str, limit: int = 1000) -> list[EventRow]:
        """Return a user's events, newest first, at most `limit`."""
        table = tables.events
        statement = select(table).where(table.c.user_key == user_key).order_by(table.c.seq.desc()).limit(limit)
        with self._database.read() as connection:
            return [_make_event(row) for row in connection.execute(statement).all()]

    # --- exposures and feedback

    def add_exposures(self, rows: Sequence[ExposureRow]) -> None:
        """Write exposures, all in one transaction; requests hand them to a `Journal`, which does not wait."""
        if not rows:
            return
        now = time.time()
        values = [_drop_seq({**asdict(row), "context": list(row.context), "time": row.time or now}) for row in rows]
        for value in values:
            value["shown"] = [[one["item_id"], one["score"], one["propensity"]] for one in value["shown"]]
        with self._database.write() as connection:
            # An answer that was under way while its user was forgotten leaves no trace of them.
            given = {value["user_key"] for value in values} - {None}
            table = tables.forgotten
            gone = set(connection.execute(select(table.c.user_key).where(table.c.user_key.in_(given))).scalars())
            kept = [value for value in values if value["user_key"] not in gone]
            if kept:
                hold_counts(connection)
                connection.execute(insert(tables.exposures), kept)
                lists = select_lists(SimpleNamespace(**value) for value in kept)
                # Of a request id that is used again there may be feedback already.
                Tally().add(lists, read_earned(connection, [request for request, _ in lists])).write(connection)

    def exposures_since(self, seq: int = 0, limit: int | None = None) -> list[ExposureRow]:
        """Return exposures after a sequence number, oldest first; all, or at most `limit`."""
        return [_make_exposure(row) for row in self._since(tables.exposures, seq, limit)]

    def find_exposures(self, request_id: str) -> list[ExposureRow]:
        """Return what was shown under a request id, oldest first; shadows too."""
        table = tables.exposures
        statement = select(table).where(table.c.request_id == request_id).order_by(table.c.seq)
        with self._database.read() as connection:
            return [_make_exposure(row) for row in connection.execute(statement).all()]

    def add_feedback(self, rows: Sequence[FeedbackRow]) -> int:
        """Write feedback; return how many rows."""
        if rows:
            now = time.time()
            requests = [row.request_id for row in rows if row.kind in REWARDING]
            with self._database.write() as connection:
                if requests:
                    hold_counts(connection)
                lists, before = read_lists(connection, requests), read_earned(connection, requests)
                values = [_drop_seq({**asdict(row), "time": row.time or now}) for row in rows]
                connection.execute(insert(tables.feedback), values)
                Tally().remove(lists, before).add(lists, read_earned(connection, requests)).write(connection)
        return len(rows)

    def feedback_since(self, seq: int = 0, limit: int | None = None) -> list[FeedbackRow]:
        """Return feedback after a sequence number, oldest first; all, or at most `limit`."""
        rows = self._since(tables.feedback, seq, limit)
        return [FeedbackRow(row.request_id, row.kind, row.item_id, row.value, row.time, row.seq) for row in rows]

    def item_counts_since(self, seq: int = 0, limit: int | None = None) -> list[ItemCount]:
        """Return counters of items that changed after a sequence number, oldest change first; at most `limit`."""
        rows = self._since(tables.item_counts, seq, limit)
        return [ItemCount(row.item_id, row.shown, row.rewarded, row.seq) for row in rows]

    # --- deployments

    def put_deployment(
        self, alias: str, arms: Mapping[str, tuple[str, float]], actor: str, action: str = "promote"
    ) -> int:
        """Write where an alias points from now on, with its line in the audit log; return the sequence number.

        Args:
            arms: by name; none for an alias that is unloaded.
            actor: name of the key that asked for it.
        """
        plain = {name: list(arm) for name, arm in arms.items()}
        now = time.time()
        with self._database.write() as connection:
            seq = _advance(connection, "deployments", 1)
            connection.execute(
                insert(tables.deployments).values(
                    seq=seq, alias=alias, arms=plain, actor=actor, action=action, time=now
                )
            )
            _note(connection, actor, action, {"alias": alias, "arms": plain})
        return seq

    def deployments(self) -> dict[str, dict[str, DeployedArm]]:
        """Return the arms of every alias that is deployed, by name."""
        table = tables.deployments
        newest = select(func.max(table.c.seq)).group_by(table.c.alias)
        with self._database.read() as connection:
            rows = connection.execute(select(table).where(table.c.seq.in_(newest))).all()
        return {row.alias: dict(_make_deployment(row).arms) for row in rows if row.arms}

    def deployments_since(self, seq: int = 0, limit: int | None = None) -> list[DeploymentRow]:
        """Return deployments after a sequence number, oldest first: with 0 the whole history."""
        return [_make_deployment(row) for row in self._since(tables.deployments, seq, limit)]

    # --- people who asked to be forgotten

    def forget(self, user_key: str, actor: str = "nobody") -> dict[str, int]:
        """Delete a user's events, exposures and the feedback on them; return how many of each.

        The key stays in `forgotten_since`, so that whoever holds data of the user, such as a catalogue with
        interactions that is read anew at the next start, leaves them out.
        """
        counts: dict[str, int] = {}
        events, exposures, feedback = tables.events, tables.exposures, tables.feedback
        theirs = select(exposures.c.request_id).where(exposures.c.user_key == user_key)
        with self._database.write() as connection:
            hold_counts(connection)
            requests = connection.execute(theirs).scalars().all()
            tally = Tally().remove(read_lists(connection, requests), read_earned(connection, requests))
            counts["feedback"] = connection.execute(delete(feedback).where(feedback.c.request_id.in_(theirs))).rowcount
            counts["exposures"] = connection.execute(delete(exposures).where(exposures.c.user_key == user_key)).rowcount
            counts["events"] = connection.execute(delete(events).where(events.c.user_key == user_key)).rowcount
            tally.add(read_lists(connection, requests), {}).write(connection)
            seq = _advance(connection, "forgotten", 1)
            statement = _insert(connection, tables.forgotten).values(seq=seq, user_key=user_key, time=time.time())
            connection.execute(
                statement.on_conflict_do_update(index_elements=["user_key"], set_={"seq": statement.excluded.seq})
            )
            _note(connection, actor, "forget", counts)
        self._database.wipe()
        return counts

    def forgotten_since(self, seq: int = 0, limit: int | None = None) -> list[tuple[int, str]]:
        """Return sequence number and user key of who was forgotten after a sequence number."""
        return [(row.seq, row.user_key) for row in self._since(tables.forgotten, seq, limit)]

    # --- keys

    def add_key(
        self, name: str, scopes: Iterable[Scope], per_minute: int | None = None, actor: str = "command line"
    ) -> str:
        """Store a new API key by its hash; return the key, which nobody can show again.

        Args:
            per_minute: requests a minute; None for the service's own limit.
        Raises:
            StateError: there is a key of that name.
        """
        key_id, stored, key = make_key()
        told = sorted(set(scopes))
        with self._database.write() as connection:
            if connection.execute(select(literal(1)).where(tables.keys.c.name == name)).first():
                raise StateError(
                    f'There is a key "{name}" already. Remove it with: peft-combo serve keys remove {name}'
                )
            connection.execute(
                insert(tables.keys).values(
                    key_id=key_id, name=name, hash=stored, scopes=told, per_minute=per_minute, time=time.time()
                )
            )
            _advance(connection, "keys", 1)
            _note(connection, actor, "add key", {"name": name, "key_id": key_id, "scopes": told})
        return key

    def list_keys(self) -> list[Caller]:
        """Return all keys, oldest first: names, ids and scopes."""
        with self._database.read() as connection:
            rows = connection.execute(select(tables.keys).order_by(tables.keys.c.time)).all()
        return [_make_caller(row) for row in rows]

    def remove_key(self, name: str, actor: str = "command line") -> None:
        """Delete a key; it opens nothing from now on, in other workers within their polling interval.

        Raises:
            StateError: there is no key of that name.
        """
        with self._database.write() as connection:
            if not connection.execute(delete(tables.keys).where(tables.keys.c.name == name)).rowcount:
                names = connection.execute(select(tables.keys.c.name)).scalars().all()
                hint = did_you_mean(name, names) or f"Keys: {', '.join(sorted(names)) or 'none'}."
                raise StateError(f'No key is called "{name}". {hint}')
            _advance(connection, "keys", 1)
            _note(connection, actor, "remove key", {"name": name})

    def check_key(self, key: str) -> Caller | None:
        """Return whose key this is, or None; the comparison takes the same time either way."""
        parsed = parse_key(key)
        if parsed is None:
            return None
        key_id, secret = parsed
        with self._database.read() as connection:
            row = connection.execute(select(tables.keys).where(tables.keys.c.key_id == key_id)).first()
        return _make_caller(row) if match_secret(secret, None if row is None else row.hash) and row else None

    # --- audit

    def audit(self, actor: str, action: str, details: Mapping[str, Any] | None = None) -> None:
        """Add a line to the audit log, which the database lets nobody change. No outside user id belongs in it."""
        with self._database.write() as connection:
            _note(connection, actor, action, details or {})

    def audit_log(self, seq: int = 0, limit: int | None = None) -> list[AuditRow]:
        """Return lines of the audit log after a sequence number, oldest first."""
        rows = self._since(tables.audit, seq, limit)
        return [AuditRow(row.actor, row.action, row.details, row.time, row.seq) for row in rows]

    def _since(self, table: Table, seq: int, limit: int | None) -> Sequence[Row[Any]]:
        statement = select(table).where(table.c.seq > seq).order_by(table.c.seq).limit(limit)
        with self._database.read() as connection:
            return connection.execute(statement).all()


def _advance(connection: Connection, name: str, by: int) -> int:
    """Take `by` sequence numbers of a table and return the last; whoever else writes to it waits from here on."""
    table = tables.heads
    statement = update(table).where(table.c.name == name).values(seq=table.c.seq + by).returning(table.c.seq)
    return int(connection.execute(statement).scalar_one())


def _insert(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """Return an insert that may say what to do with what is there; both dialects spell it alike."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


def _note(connection: Connection, actor: str, action: str, details: Mapping[str, Any]) -> None:
    connection.execute(insert(tables.audit).values(time=time.time(), actor=actor, action=action, details=dict(details)))


def _find_events(connection: Connection, event_ids: Sequence[str]) -> set[str | None]:
    found: set[str | None] = set()
    for start in range(0, len(event_ids), 500):  # SQLite bounds the variables of a statement
        chosen: ColumnElement[bool] = tables.events.c.event_id.in_(event_ids[start : start + 500])
        found |= set(connection.execute(select(tables.events.c.event_id).where(chosen)).scalars())
    return found


def _drop_seq(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "seq"}


def _make_event(row: Row[Any]) -> EventRow:
    return EventRow(row.user_key, row.item_id, row.kind, row.value, row.time, row.event_id, row.seq)


def _make_exposure(row: Row[Any]) -> ExposureRow:
    return ExposureRow(
        row.request_id, row.user_key, row.route, row.alias, row.version, row.digest, row.arm, tuple(row.context),
        tuple(ShownItem(*one) for one in row.shown), row.time, row.seq,
    )  # fmt: skip


def _make_deployment(row: Row[Any]) -> DeploymentRow:
    arms = {name: DeployedArm(version, share) for name, (version, share) in row.arms.items()}
    return DeploymentRow(row.alias, arms, row.actor, row.action, row.time, row.seq)


def _make_caller(row: Row[Any]) -> Caller:
    return Caller(row.name, frozenset(row.scopes), row.key_id, row.per_minute)
