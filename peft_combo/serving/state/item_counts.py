"""Counters of items: how often each was shown in a list of single items, and earned something there.

Owns what counts and how the counters change with the rows they are of, in the same transaction. They hold no person:
of somebody who is forgotten, what they were shown is taken out again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from peft_combo.serving.state import tables
from peft_combo.serving.state.rows import LIST_ROUTES, REWARDING

_CHUNK = 500  # SQLite bounds the variables of a statement
_PAGE = 10_000

Lists = list[tuple[str, tuple[str, ...]]]
"""Lists that were shown: request id, and items in their order."""

Earned = Mapping[str, set[str | None]]
"""Items that earned something, by request id; None stands for an answer as a whole."""


def list_rewards(items: Sequence[str], earned: set[str | None]) -> tuple[float, ...]:
    """Return what a list earned at each place, 0 or 1: what is on the answer as a whole counts once, at its first."""
    return tuple(float(item in earned or (place == 0 and None in earned)) for place, item in enumerate(items))


class Tally:
    """Changes of the counters, to be written at once: `add` and `remove` lists with what was earned on them."""

    def __init__(self) -> None:
        self._shown: Counter[str] = Counter()
        self._rewarded: Counter[str] = Counter()

    def add(self, lists: Lists, earned: Earned) -> Tally:
        """Count lists in."""
        return self._count(lists, earned, 1)

    def remove(self, lists: Lists, earned: Earned) -> Tally:
        """Count lists out."""
        return self._count(lists, earned, -1)

    def write(self, connection: Connection) -> None:
        """Change the counters, within the connection's transaction, which has called `hold_counts` before it read."""
        changed = [item for item in self._shown if self._shown[item] or self._rewarded[item]]
        if not changed:
            return
        head = tables.item_counts_head
        moved = update(head).values(seq=head.c.seq + len(changed)).returning(head.c.seq)
        first = int(connection.execute(moved).scalar_one()) - len(changed) + 1
        table = tables.item_counts
        new = postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)
        sums = {name: table.c[name] + new.excluded[name] for name in ("shown", "rewarded")}
        connection.execute(
            new.on_conflict_do_update(index_elements=["item_id"], set_={**sums, "seq": new.excluded["seq"]}),
            [
                {"item_id": item, "shown": self._shown[item], "rewarded": self._rewarded[item], "seq": first + place}
                for place, item in enumerate(changed)
            ],
        )

    def _count(self, lists: Lists, earned: Earned, sign: int) -> Tally:
        for request_id, items in lists:
            own = earned.get(request_id, set())
            for item, reward in zip(items, list_rewards(items, own), strict=True):
                self._shown[item] += sign
                self._rewarded[item] += sign * int(reward)
        return self


def hold_counts(connection: Connection) -> None:
    """Let no other transaction change counters until this one ends, so that list and feedback see each other."""
    head = tables.item_counts_head
    connection.execute(update(head).values(seq=head.c.seq))


def select_lists(exposures: Iterable[Any]) -> Lists:
    """Return the lists that count, of rows as the table has them: of single items, and seen by somebody."""
    return [
        (row.request_id, tuple(one[0] for one in row.shown))
        for row in exposures
        if row.route in LIST_ROUTES and row.arm != "shadow"
    ]


def read_lists(connection: Connection, request_ids: Iterable[str]) -> Lists:
    """Return the lists of requests that count."""
    table = tables.exposures
    found: Lists = []
    for some in _split(request_ids):
        found += select_lists(connection.execute(select(table).where(table.c.request_id.in_(some))))
    return found


def read_earned(connection: Connection, request_ids: Iterable[str]) -> dict[str, set[str | None]]:
    """Return what earned something on requests."""
    table = tables.feedback
    found: dict[str, set[str | None]] = defaultdict(set)
    for some in _split(request_ids):
        wanted = table.c.request_id.in_(some) & table.c.kind.in_(REWARDING)
        for row in connection.execute(select(table.c.request_id, table.c.item_id).where(wanted)):
            found[row.request_id].add(row.item_id)
    return found


def count_everything(connection: Connection) -> None:
    """Count all exposures of a state that has no counters yet."""
    table, last = tables.exposures, 0
    total = Tally()
    connection.execute(insert(tables.item_counts_head).values(seq=0))
    while rows := connection.execute(
        select(table).where(table.c.seq > last).order_by(table.c.seq).limit(_PAGE)
    ).all():  # fmt: skip
        last = rows[-1].seq
        lists = select_lists(rows)
        total.add(lists, read_earned(connection, [request for request, _ in lists]))
    total.write(connection)


def _split(values: Iterable[str]) -> Iterator[list[str]]:
    distinct = list(dict.fromkeys(values))
    for start in range(0, len(distinct), _CHUNK):
        yield distinct[start : start + _CHUNK]
