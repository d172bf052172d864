"""Migrations of the service's state: which schema version this code writes, and the steps that lead to it.

Runs on SQLite and on Postgres.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, select, text

from peft_combo.serving.state import tables
from peft_combo.serving.state.item_counts import count_everything


def migrate(connection: Connection) -> int:
    """Bring the tables to the schema of this code, within the connection's transaction; return the version it had.

    Raises:
        StateError: a newer peft-combo wrote it.
    """
    tables.schema.create(connection, checkfirst=True)
    if connection.dialect.name == "postgresql":  # two workers that start at once
        connection.execute(text("LOCK TABLE schema_version IN EXCLUSIVE MODE"))
    before = connection.execute(select(tables.schema.c.version)).scalar()
    if before is None:
        connection.execute(tables.schema.insert().values(version=0))
    version = before or 0
    if version > VERSION:
        raise tables.StateError(
            f"Expected a state of schema {VERSION} or older, found {version}, written by a newer peft-combo. "
            "Upgrade with: pip install --upgrade peft-combo"
        )
    for number in range(version, VERSION):
        MIGRATIONS[number](connection)
    if version < VERSION:
        connection.execute(tables.schema.update().values(version=VERSION))
    return version


def _create_tables(connection: Connection) -> None:
    """Schema 1: all tables, and an audit log that only grows."""
    tables.metadata.create_all(connection)
    connection.execute(tables.heads.insert(), [{"name": name, "seq": 0} for name in tables.FOLLOWED])
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


def _count_items(connection: Connection) -> None:
    """Schema 2: counters of items, from all that was shown so far."""
    for table in (tables.item_counts, tables.item_counts_head):
        table.create(connection, checkfirst=True)
    count_everything(connection)


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_create_tables, _count_items)
"""One step from each version to the next. A step never changes once it is released; a change of tables adds one."""

VERSION = len(MIGRATIONS)
