"""Tables of the service's state, and the migrations that lead to them.

Owns what a column is called and which schema version this code writes. Runs on SQLite and on Postgres; knows nothing of
what the rows mean.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    select,
    text,
)

from peft_combo.errors import PeftComboError

metadata = MetaData()

_Long = BigInteger().with_variant(Integer, "sqlite")

schema = Table("schema_version", metadata, Column("version", Integer, nullable=False))
heads = Table("heads", metadata, Column("name", String(32), primary_key=True), Column("seq", _Long, nullable=False))
"""The newest sequence number of every table that workers follow. A writer takes its numbers from here first, so that
one table has one writer at a time and numbers are committed in their order."""
items = Table(
    "items", metadata,
    Column("item_id", Text, primary_key=True),
    Column("seq", _Long, nullable=False, index=True),
    Column("fields", JSON, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("time", Float, nullable=False),
)  # fmt: skip
events = Table(
    "events", metadata,
    Column("seq", _Long, primary_key=True, autoincrement=False),
    Column("event_id", Text, unique=True),
    Column("user_key", String(64), nullable=False),
    Column("item_id", Text, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("value", Float),
    Column("time", Float, nullable=False),
    Index("ix_events_user", "user_key", "seq"),
)  # fmt: skip
exposures = Table(
    "exposures", metadata,
    Column("seq", _Long, primary_key=True, autoincrement=True),
    Column("request_id", Text, nullable=False, index=True),
    Column("time", Float, nullable=False),
    Column("user_key", String(64), index=True),
    Column("route", String(32), nullable=False),
    Column("alias", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("digest", String(80), nullable=False),
    Column("arm", String(32), nullable=False),
    Column("context", JSON, nullable=False),
    Column("shown", JSON, nullable=False),
)  # fmt: skip
feedback = Table(
    "feedback", metadata,
    Column("seq", _Long, primary_key=True, autoincrement=True),
    Column("request_id", Text, nullable=False, index=True),
    Column("time", Float, nullable=False),
    Column("item_id", Text),
    Column("kind", String(16), nullable=False),
    Column("value", Float),
)  # fmt: skip
deployments = Table(
    "deployments", metadata,
    Column("seq", _Long, primary_key=True, autoincrement=False),
    Column("alias", Text, nullable=False, index=True),
    Column("arms", JSON, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", String(16), nullable=False),
    Column("time", Float, nullable=False),
)  # fmt: skip
keys = Table(
    "keys", metadata,
    Column("key_id", String(16), primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("hash", String(64), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("per_minute", Integer),
    Column("time", Float, nullable=False),
)  # fmt: skip
audit = Table(
    "audit", metadata,
    Column("seq", _Long, primary_key=True, autoincrement=True),
    Column("time", Float, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", String(32), nullable=False),
    Column("details", JSON, nullable=False),
)  # fmt: skip
forgotten = Table(
    "forgotten", metadata,
    Column("seq", _Long, primary_key=True, autoincrement=False),
    Column("user_key", String(64), nullable=False, unique=True),
    Column("time", Float, nullable=False),
)  # fmt: skip

FOLLOWED = ("items", "events", "deployments", "forgotten", "keys")
"""Names in `heads`: what one worker writes and the others have to notice."""


class StateError(PeftComboError):
    """The state cannot be read or written: another schema, no such place, or the machine refuses."""


def migrate(connection: Connection) -> int:
    """Bring the tables to the schema of this code, within the connection's transaction; return the version it had.

    Raises:
        StateError: a newer peft-combo wrote it.
    """
    schema.create(connection, checkfirst=True)
    if connection.dialect.name == "postgresql":  # two workers that start at once
        connection.execute(text("LOCK TABLE schema_version IN EXCLUSIVE MODE"))
    before = connection.execute(select(schema.c.version)).scalar()
    if before is None:
        connection.execute(schema.insert().values(version=0))
    version = before or 0
    if version > VERSION:
        raise StateError(
            f"Expected a state of schema {VERSION} or older, found {version}, written by a newer peft-combo. "
            "Upgrade with: pip install --upgrade peft-combo"
        )
    for number in range(version, VERSION):
        MIGRATIONS[number](connection)
    if version < VERSION:
        connection.execute(schema.update().values(version=VERSION))
    return version


def _create_tables(connection: Connection) -> None:
    """Schema 1: all tables, and an audit log that only grows."""
    metadata.create_all(connection)
    connection.execute(heads.insert(), [{"name": name, "seq": 0} for name in FOLLOWED])
    if connection.dialect.name == "postgresql":
        connection.execute(
            text(
                "CREATE FUNCTION audit_stays() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE EXCEPTION 'the audit log only grows'; END $$"
            )
        )
        connection.execute(
            text(
                "CREATE TRIGGER audit_stays BEFORE UPDATE OR DELETE ON audit "
                "FOR EACH ROW EXECUTE FUNCTION audit_stays()"
            )
        )
        return
    for verb in ("UPDATE", "DELETE"):
        connection.execute(
            text(
                f"CREATE TRIGGER audit_refuses_{verb.lower()} BEFORE {verb} ON audit "
                "BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END"
            )
        )


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_create_tables,)
"""One step from each version to the next. A step never changes once it is released; a change of tables adds one."""

VERSION = len(MIGRATIONS)
