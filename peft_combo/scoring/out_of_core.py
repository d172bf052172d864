"""Counting out of core: item-kNN and co-occurrence of interactions that do not fit in memory, by DuckDB from Parquet.

Owns the self-join of interactions by row (user, basket or bundle), in parts by item, and the scorers it gives. Rows and
items may have any ids; a scorer knows column numbers, and `ItemCounts.items` says whose they are. Needs the extra
``scale``; a scorer that was counted is scored, stored and loaded without.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.errors import PeftComboError
from peft_combo.scoring.base import Csr, HistoryScorer, Learned, Vectors, no_interactions, positive
from peft_combo.scoring.neighbours import ItemKNN, Similar, score_neighbours
from peft_combo.scoring.popularity import CoOccurrence, Measure, PairCounts, score_pairs

_NUMBERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"}
_PARTS = 4096  # most passes over the interactions
_PAIR_BYTES = 64  # what a pair being counted takes of the memory limit, with room to spare


@dataclass(eq=False)
class CountedKNN(HistoryScorer[Similar]):
    """`ItemKNN` whose neighbours were counted out of core: scores baskets the same, knows no rows.

    It has no history, so it scores no known rows and cannot be updated: count anew, or score what somebody did as a
    basket. `fit` on a history in memory is `ItemKNN.fit`.

    Attributes:
        k, similarity, shrinkage: as of `ItemKNN`.
    """

    k: int = 100
    similarity: Literal["cosine", "tfidf"] = "cosine"
    shrinkage: float = 0.0
    _learned_type: ClassVar[type[Learned]] = Similar

    def __post_init__(self) -> None:
        ItemKNN(self.k, self.similarity, self.shrinkage)  # the same bounds

    def _learn(self, history: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> Similar:
        return ItemKNN(self.k, self.similarity, self.shrinkage)._learn(history, items, times)

    def _score(self, known: Similar, contexts: Csr) -> NDArray[np.float32]:
        return score_neighbours(known, contexts)

    def _score_known(self, known: Similar, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return super()._score_known(known, rows) if known.history.nnz else _refuse("score_users", self)

    def _extend(self, known: Similar, rows: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> Similar:
        return super()._extend(known, rows, items, times) if known.history.nnz else _refuse("update", self)


@dataclass(eq=False)
class CountedPairs(HistoryScorer[PairCounts]):
    """`CoOccurrence` whose pairs were counted out of core, the most frequent of each item kept; see `CountedKNN`.

    Attributes:
        measure: as of `CoOccurrence`.
    """

    measure: Measure = "conditional"
    _learned_type: ClassVar[type[Learned]] = PairCounts

    def __post_init__(self) -> None:
        CoOccurrence(self.measure)  # the same choices

    def _learn(self, history: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> PairCounts:
        return CoOccurrence(self.measure)._learn(history, items, times)

    def _score(self, known: PairCounts, contexts: Csr) -> NDArray[np.float32]:
        return score_pairs(known, contexts, self.measure)

    def _score_known(self, known: PairCounts, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return super()._score_known(known, rows) if known.history.nnz else _refuse("score_users", self)

    def _extend(
        self, known: PairCounts, rows: Csr, items: Vectors | None, times: NDArray[np.float64] | None
    ) -> PairCounts:
        return super()._extend(known, rows, items, times) if known.history.nnz else _refuse("update", self)


def _refuse(asked: str, scorer: object) -> NoReturn:
    raise PeftComboError(
        f"{type(scorer).__name__}.{asked}: it was counted out of core and holds no rows. Count anew by count_items, or "
        "score a row as a basket."
    )


@dataclass(frozen=True, eq=False)
class ItemCounts:
    """What was counted.

    Attributes:
        items: (N,) ids of the items; their places are the columns of the scorer.
        scorer: fitted. interactions: distinct pairs of row and item that were read. parts: passes that took.
    """

    items: tuple[Any, ...]
    scorer: CountedKNN | CountedPairs
    interactions: int
    parts: int


@dataclass(frozen=True)
class Columns:
    """Names of the columns: of a row (a user, basket or bundle), of an item, and of a weight; None weighs all alike."""

    row: str = "basket_id"
    item: str = "item_id"
    weight: str | None = None


@dataclass(frozen=True)
class Bounds:
    """What counting may take.

    Attributes:
        memory: bytes of DuckDB; what is larger goes to `temp`. The result, N times k pairs of 12 bytes, comes on top.
        temp: a folder for what does not fit; None takes the system's. threads: of DuckDB.
        longest: of a row with more items only so many are read, drawn by a hash: a row of n makes n^2 pairs, and
            those of the longest rows say the least. None reads all, exactly.
    """

    memory: int = 2 * 2**30
    temp: Path | None = None
    threads: int = 1
    longest: int | None = None

    def __post_init__(self) -> None:
        for name in ("memory", "threads"):
            positive(name, getattr(self, name))
        if self.longest is not None:
            positive("longest", self.longest)


def count_items(
    source: str | Path,
    scorer: CountedKNN | CountedPairs,
    *,
    columns: Columns = Columns(),
    items: Sequence[Any] | None = None,
    top: int = 200,
    bounds: Bounds = Bounds(),
    progress: Callable[[int, int], None] | None = None,
) -> ItemCounts:
    """Count interactions and return the scorer, fitted.

    The result is that of `ItemKNN` or `CoOccurrence` fitted in memory, pairs beyond the k (`top`) best of an item left
    out. Items are divided into parts by their number; for each part the interactions are joined with its own by row,
    summed by pair, and the best of each item kept, so that memory holds one part's pairs, or DuckDB spills them.

    Args:
        source: a Parquet file, or a pattern of several; one line an interaction, duplicates add up.
        scorer: not yet fitted: which counts and how many.
        items: ids in the order of the columns, such as a catalogue's; others are not read. None takes all, in order.
        top: pairs kept for each item by `CountedPairs`; `CountedKNN` keeps its k.
        progress: told parts done and parts there are.
    Raises:
        PeftComboError: duckdb is not installed, or the files cannot be read as asked.
    Source: the top-N item-based recommendation of Deshpande and Karypis 2004, as a relational self-join.
    """
    duckdb = import_duckdb()
    kept = scorer.k if isinstance(scorer, CountedKNN) else top
    with tempfile.TemporaryDirectory(prefix="count-", dir=bounds.temp) as folder:
        try:
            database = duckdb.connect(f"{folder}/counts.duckdb")
            try:
                return _Count(database, folder, scorer, kept, bounds).run(source, columns, items, progress)
            finally:
                database.close()
        except duckdb.Error as error:
            lines = str(error).strip().splitlines()
            raise PeftComboError(
                f"{source} cannot be counted: {lines[0]} Expected Parquet with the columns {columns.row} and "
                f"{columns.item}, more Bounds.memory, or more room in its folder."
            ) from error


def import_duckdb() -> Any:
    """Return the module duckdb.

    Raises:
        PeftComboError: it is not installed.
    """
    try:
        import duckdb
    except ImportError as cause:
        raise PeftComboError(
            "Counting out of core needs the package duckdb, which is not installed. Install it with: pip install "
            '"peft-combo[scale]"'
        ) from cause
    return duckdb


@dataclass(eq=False)
class _Count:
    """One run: tables ``seen`` (row, item, x), ``own`` (item, norm) in a database on disk."""

    database: Any
    folder: str
    scorer: CountedKNN | CountedPairs
    kept: int
    bounds: Bounds
    parts: list[tuple[NDArray[Any], ...]] = field(default_factory=list)

    def run(
        self, source: str | Path, columns: Columns, items: Sequence[Any] | None,
        progress: Callable[[int, int], None] | None,
    ) -> ItemCounts:  # fmt: skip
        self._ask(f"SET memory_limit = '{self.bounds.memory // 2**20}MiB'")
        self._ask(f"SET threads = {self.bounds.threads}")
        self._ask(f"SET temp_directory = '{_quote(self.folder)}/spilled'")
        self._ask("SET preserve_insertion_order = false")
        ids = self._read(source, columns, items)
        rows, support, interactions = self._weigh(len(ids))
        count = self._plan()
        for part in range(count):
            self._count_part(part, count)
            if progress is not None:
                progress(part + 1, count)
        pairs = self._gather(len(ids))
        # As many rows as there were, none of which holds anything: lift asks how many.
        history = no_interactions(rows, len(ids))
        if isinstance(self.scorer, CountedKNN):
            self.scorer._learned = Similar(history, support, pairs)
        else:
            self.scorer._learned = PairCounts(history, support, pairs)
        return ItemCounts(ids, self.scorer, interactions, count)

    def _ask(self, sql: str, *values: Any) -> Any:
        return self.database.execute(sql, list(values)) if values else self.database.execute(sql)

    def _read(self, source: str | Path, columns: Columns, items: Sequence[Any] | None) -> tuple[Any, ...]:
        """Make ``seen``: whole numbers for rows and items, one line for each pair; return the ids of the items."""
        row, item = _name(columns.row), _name(columns.item)
        weight = "1" if columns.weight is None else _name(columns.weight)
        self._ask(f"CREATE VIEW lines AS SELECT * FROM read_parquet('{_quote(source)}')")
        if items is None:
            self._ask(
                f"CREATE TABLE ids AS SELECT {item} AS id, row_number() OVER (ORDER BY {item}) - 1 AS item FROM "
                f"(SELECT DISTINCT {item} FROM lines WHERE {item} IS NOT NULL)"
            )
        else:
            self.database.register("given", {"id": np.array(items), "item": np.arange(len(items))})
            self._ask("CREATE TABLE ids AS SELECT * FROM given")
        kind = self._ask(f"SELECT any_value(typeof({row})) FROM lines").fetchone()[0]
        source_rows = f"SELECT {row} AS row, {item} AS id, {weight} AS x FROM lines"
        if kind not in _NUMBERS:
            self._ask(
                f"CREATE TABLE rows AS SELECT id, row_number() OVER () AS row FROM "
                f"(SELECT DISTINCT {row} AS id FROM lines WHERE {row} IS NOT NULL)"
            )
            source_rows = f"SELECT rows.row, {item} AS id, {weight} AS x FROM lines JOIN rows ON lines.{row} = rows.id"
        # A stored zero is no interaction, as in memory.
        self._ask(
            "CREATE TABLE seen AS SELECT row::BIGINT AS row, item::INTEGER AS item, sum(x)::FLOAT AS x "
            f"FROM ({source_rows}) JOIN ids USING (id) WHERE row IS NOT NULL GROUP BY ALL HAVING sum(x) <> 0"
        )
        if self.bounds.longest is not None:
            self._ask(
                "CREATE OR REPLACE TABLE seen AS SELECT * FROM seen QUALIFY row_number() OVER "
                f"(PARTITION BY row ORDER BY hash(row, item), item) <= {self.bounds.longest}"
            )
        found = self._ask("SELECT id FROM ids ORDER BY item").fetchnumpy()["id"]
        return tuple(np.asarray(found).tolist())

    def _weigh(self, n_items: int) -> tuple[int, NDArray[np.int64], int]:
        """Turn x into what pairs are summed of, and make ``own``; return rows, support and interactions."""
        rows, interactions = self._ask("SELECT count(DISTINCT row), count(*) FROM seen").fetchone()
        counted = self._ask("SELECT item, count(*) AS n FROM seen GROUP BY item").fetchnumpy()
        support = np.zeros(n_items, np.int64)
        support[counted["item"]] = counted["n"]
        if isinstance(self.scorer, CountedPairs):
            self._ask("UPDATE seen SET x = 1")
        elif self.scorer.similarity == "tfidf":
            self._ask(
                "CREATE OR REPLACE TABLE seen AS SELECT row, item, (sqrt(abs(x)) * sign(x) * "
                f"ln({1 + n_items} / (1 + n)))::FLOAT AS x FROM seen JOIN (SELECT row, count(*) AS n FROM seen "
                "GROUP BY row) USING (row)"
            )
        self._ask("CREATE TABLE own AS SELECT item, sqrt(sum(x::DOUBLE * x))::FLOAT AS norm FROM seen GROUP BY item")
        return int(rows), support, int(interactions)

    def _plan(self) -> int:
        """Return in how many parts the pairs of all rows are counted."""
        pairs = self._ask("SELECT sum(n::DOUBLE * n) FROM (SELECT count(*) AS n FROM seen GROUP BY row)").fetchone()[0]
        return int(min(_PARTS, max(1, -(-(pairs or 0.0) * _PAIR_BYTES // self.bounds.memory))))

    def _count_part(self, part: int, count: int) -> None:
        """Count the pairs of the items whose number leaves `part`, and keep the best of each."""
        dots = (
            "SELECT a.item AS item, b.item AS other, sum(a.x::DOUBLE * b.x)::FLOAT AS dot "
            f"FROM (SELECT * FROM seen WHERE item % {count} = {part}) a JOIN seen b ON a.row = b.row "
            "WHERE a.item <> b.item GROUP BY ALL"
        )
        if isinstance(self.scorer, CountedKNN):
            scale = f"(one.norm * two.norm + {self.scorer.shrinkage!r}::FLOAT)"
            scored = (
                f"SELECT dots.item, other, (dot / {scale})::FLOAT AS value FROM ({dots}) dots "
                f"JOIN own one ON one.item = dots.item JOIN own two ON two.item = dots.other WHERE {scale} > 0"
            )
        else:
            scored = f"SELECT item, other, dot AS value FROM ({dots})"
        best = self._ask(
            f"SELECT item, other, value FROM ({scored}) WHERE value <> 0 "
            f"QUALIFY row_number() OVER (PARTITION BY item ORDER BY value DESC, other) <= {self.kept}"
        ).fetchnumpy()
        self.parts.append(tuple(np.asarray(best[name]) for name in ("item", "other", "value")))

    def _gather(self, n_items: int) -> Csr:
        item, other, value = (np.concatenate(own) for own in zip(*self.parts, strict=True))
        self.parts.clear()
        matrix: Csr = sparse.coo_array(
            (value.astype(np.float32), (item.astype(np.int32), other.astype(np.int32))), shape=(n_items, n_items)
        ).tocsr()
        matrix.sort_indices()
        return matrix


def _quote(text: str | Path) -> str:
    return str(text).replace("'", "''")


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'
