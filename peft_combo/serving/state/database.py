"""The database below the state: SQLite in a folder, or any server that a URL names.

Owns how a database is opened and what a durable write is. Knows no table's meaning.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from peft_combo.files import sync_folder
from peft_combo.serving.state.migrations import migrate
from peft_combo.serving.state.tables import StateError

_FILE = "state.db"
_BUSY_MS = 10_000  # how long a writer waits for another process that writes
_DRIVER = "Install one with: pip install 'peft-combo[postgres]' and write postgresql+psycopg://user@host/name"


class Database:
    """Transactions over one engine. A write that returned is on the disk: SQLite's WAL is synced at every commit.

    Attributes:
        folder: where the file lies; None for a server.
        name: what to call it in a message: no password in it.
    """

    def __init__(self, engine: Engine, folder: Path | None) -> None:
        self._engine, self.folder = engine, folder
        self.name = str(folder / _FILE) if folder else engine.url.render_as_string(hide_password=True)

    @classmethod
    def open(cls, place: str | Path) -> Database:
        """Open a folder or a URL and bring its tables to this code's schema.

        Raises:
            StateError: it cannot be opened, or a newer peft-combo wrote it.
        """
        if isinstance(place, str) and "://" in place:
            database = cls(_open_url(place), None)
        else:
            folder = Path(place)
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what people did is for its owner alone
                with suppress(FileExistsError):
                    os.close(os.open(folder / _FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                sync_folder(folder.parent)
            except OSError as error:
                raise StateError(
                    f"{folder} cannot hold the state: {error.strerror or error}. Name another with --state."
                ) from error
            database = cls(_open_sqlite(folder / _FILE), folder)
        with database.write() as connection:
            migrate(connection)
        return database

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Give a connection whose changes are all kept, durably, or none of them.

        Raises:
            StateError: the database cannot be reached or the disk is full; nothing was kept.
        """
        with self._explain_refusal("written"), self._engine.connect() as connection:
            connection.execution_options(writes=True)
            with connection.begin():
                yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Give a connection that sees one moment.

        Raises:
            StateError: the database cannot be reached.
        """
        with self._explain_refusal("read"), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _explain_refusal(self, verb: str) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise StateError(f"The state {self.name} cannot be {verb}: {_first_line(error)}.") from error
        except SQLAlchemyError as error:  # no connection left in the pool
            raise StateError(f"The state {self.name} cannot be {verb}: {type(error).__name__}.") from error

    def wipe(self) -> None:
        """Leave nothing of deleted rows in SQLite's log; its file zeroes them by itself (secure_delete)."""
        if self.folder is not None:
            with self._explain_refusal("written"), self._engine.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT")
                connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))

    def close(self) -> None:
        self._engine.dispose()


def _first_line(error: DBAPIError) -> str:
    lines = str(error.orig).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error.orig).__name__


def _open_url(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            raise StateError("Expected a folder for SQLite, found a URL. Name the folder with --state.")
        return create_engine(parsed, pool_pre_ping=True, pool_size=8, max_overflow=16, pool_timeout=10)
    except ModuleNotFoundError as error:
        raise StateError(f"The driver {error.name} is not installed. {_DRIVER}") from error
    except (ArgumentError, NoSuchModuleError) as error:  # the message would repeat the URL, and with it a password
        raise StateError(f"Expected a folder or a database URL as the state, found neither. {_DRIVER}") from error


def _open_sqlite(path: Path) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}", pool_size=8, max_overflow=16, pool_timeout=10,
        connect_args={"timeout": _BUSY_MS / 1000, "check_same_thread": False},
    )  # fmt: skip

    # The driver begins transactions late, at the first write, and a reader that then writes may be refused. Hence it
    # begins none and `_begin` does: https://docs.sqlalchemy.org/en/20/dialects/sqlite.html, "Serializable isolation".
    @event.listens_for(engine, "connect")
    def _settle(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "foreign_keys=ON", f"busy_timeout={_BUSY_MS}",
        ):  # fmt: skip
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        if options.get("isolation_level") != "AUTOCOMMIT":
            connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("writes") else "BEGIN")

    return engine
