"""Tables of the service's state. Owns what a column is called; knows nothing of what the rows mean."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
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
item_counts = Table(
    "item_counts", metadata,
    Column("item_id", Text, primary_key=True),
    Column("seq", _Long, nullable=False, index=True),
    Column("shown", _Long, nullable=False),
    Column("rewarded", _Long, nullable=False),
)  # fmt: skip
"""How often an item was shown in a list of single items and earned something there; see `item_counts`."""
item_counts_head = Table("item_counts_head", metadata, Column("seq", _Long, nullable=False))
"""The newest sequence number of `item_counts`. Not in `heads`: a worker of the release before, which goes on while the
next one is deployed, would not know the name."""
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
