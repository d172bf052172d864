"""Columns of one table in Arrow, and the turning of cells into ids, numbers, lists and times.

Owns where a row stands in its files, and which cells are doubted: words for missing values, ids a spreadsheet rounded,
numbers that are dates. Knows nothing of formats, or of what a table means.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.readers.csv_table import SHOWN_FAULTS
from peft_combo.data.readers.json_lines import flat
from peft_combo.data.readers.times import EARLIEST, LATEST, UNITS, convert, recognise
from peft_combo.errors import Fault

# What programs write where a value is missing, and what is no value of any shop. Compared without case.
MISSING_WORDS = ("nan", "null", "none", "<na>", "n/a", "#n/a", "na", "nat", "nil", "\\n", "(null)", "undefined")
# What spreadsheets make of long digits: 8.80123E+12.
_ROUNDED = r"^[0-9]([.,][0-9]+)?E\+[0-9]+$"
_LIST_CELL = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)"|([^,\s\[\]()'"]+)""")
LARGEST = 1e12  # no price, rating, quantity or position is larger
_EXACT = 2.0**53  # above it a float is no whole number's own


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of one part.

    Attributes:
        lines: gives the physical line of each row; None where rows are counted instead.
        header: the physical line that names the columns; None where there is none.
    """

    label: str
    rows: int
    lines: Callable[[], NDArray[np.int64]] | None = None
    header: int | None = None


@dataclass
class Table:
    """The columns of one table under our names, and the faults found in it so far.

    Attributes:
        name: of its file, for messages.
        columns: per column name an Arrow array; CSV cells are strings, other formats keep their types.
        rows: number of rows.
        faults: what is wrong. notes: what is to be said.
        pieces: the files the rows come from, in order.
        origin: (rows,) the row in `pieces` of each row; None where they are the same.
    """

    name: str
    columns: dict[str, Any]
    rows: int
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pieces: tuple[Piece, ...] = ()
    origin: NDArray[np.int64] | None = None

    def __contains__(self, column: object) -> bool:
        return column in self.columns

    def where(self, row: int) -> str:
        """Return "items.csv:12", with the physical line; Parquet has rows instead."""
        row = int(row if self.origin is None else self.origin[row])
        for piece, lines in zip(self.pieces, self._lines, strict=True):
            if row < piece.rows:
                return f"{piece.label} row {row + 1}" if lines is None else f"{piece.label}:{lines[row]}"
            row -= piece.rows
        return f"{self.name} row {row + 1}"

    def blame(
        self, rows: Sequence[int] | NDArray[np.integer[Any]], problem: str, remedy: str = "", cell: str = ""
    ) -> None:
        """Add a fault per row, the first few in full; `{cell}` in `problem` becomes the cell of that column."""
        for row in rows[:SHOWN_FAULTS]:
            shown = problem.replace("{cell}", self._show(cell, int(row))) if cell else problem
            self.faults.append(Fault(self.where(int(row)), shown, remedy))
        if len(rows) > SHOWN_FAULTS:
            more = len(rows) - SHOWN_FAULTS
            self.faults.append(Fault(self.name, f"{more:,} more rows have the fault of the line above."))

    def text(self, column: str) -> Any:
        """Return the column as an Arrow array of trimmed strings; "" where empty. Whole numbers lose no digit."""
        import pyarrow.compute as pc

        return pc.fill_null(pc.utf8_trim_whitespace(as_strings(self.columns[column])), "")

    def strings(self, column: str) -> list[str]:
        """Return `text` as a list; a list of "" where the column is absent."""
        found: list[str] = self.text(column).to_pylist() if column in self else [""] * self.rows
        return found

    def lists(self, column: str, separator: str) -> list[tuple[str, ...]]:
        """Return a tuple per row from list cells, or from strings with `separator` between the parts."""
        if column not in self:
            return [()] * self.rows
        if _is_list(self.columns[column].type):
            cells: Iterable[list[Any]] = (value or [] for value in self.columns[column].to_pylist())
        else:
            cells = (value.split(separator) for value in self.strings(column))
        return [tuple(part for one in cell if (part := (flat(one) or "").strip())) for cell in cells]

    def contents(self, column: str) -> list[bytes | None]:
        """Return the bytes of each cell of a column that `holds_bytes`, None where empty."""
        cells = (cell["bytes"] if isinstance(cell, dict) else cell for cell in self.columns[column].to_pylist())
        return [cell or None for cell in cells]

    def codes(self, column: str) -> tuple[NDArray[np.int64], list[str]]:
        """Return each cell's place in the list of distinct values (in order of first appearance), -1 where empty."""
        import pyarrow.compute as pc

        text = self.text(column)
        encoded = pc.if_else(pc.equal(text, ""), None, text).combine_chunks().dictionary_encode()
        codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        return codes, encoded.dictionary.to_pylist()

    def numbers(self, column: str, least: float = -LARGEST) -> NDArray[np.float64]:
        """Return (rows,) floats, NaN where empty; a fault for each cell that is no number or outside of its range."""
        values, unreadable = self._numbers(column)
        self.blame(
            np.flatnonzero(unreadable),
            f"{column} is {{cell}}, not a number.",
            "Write it like 12.50, without currency sign or thousands separator; leave it empty where it is missing.",
            column,
        )
        for outside, bound in ((values < least, f"at least {least:g}"), (values > LARGEST, f"at most {LARGEST:g}")):
            self.blame(np.flatnonzero(outside), f"{column} is {{cell}}, expected {bound}.", cell=column)
            values = np.where(outside, np.nan, values)
        return values

    def times(self, column: str, written: str = "auto", setting: str = "") -> NDArray[np.float64]:
        """Return (rows,) seconds since 1970-01-01 UTC, NaN where empty; a fault for each cell that is no time.

        Args:
            written: auto; s, ms, us, ns, days or excel; or a format such as %d.%m.%Y.
            setting: what to name in a remedy: the option that sets `written`.
        """
        import pyarrow as pa

        kind = self.columns[column].type
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            return self._in_range(column, _temporal_seconds(self.columns[column]))
        if "%" in written:
            return self._in_range(column, self._parse_formatted(column, written))
        values, unreadable = self._numbers(column)
        if written != "auto":
            seconds = convert(values, written)
            self.blame(np.flatnonzero(unreadable), f"{column} is {{cell}}, not a number of {written}.", "", column)
            return self._in_range(column, seconds)
        found = recognise(values, time.time())
        if found.choices:
            choices = " or ".join(f"{one.words}: {setting}={one.key}" for one in found.choices)
            first = int(np.flatnonzero(found.misfits)[0])
            problem = f"{column} is {self._show(column, first)}; numbers like that could be {choices}."
            remedy = f"Say which, or {setting}=s for seconds since 1970." if "=s" not in choices else "Say which."
            self.faults.append(Fault(self.where(first), problem, remedy))
            return found.seconds
        if found.note:
            self.notes.append(f"{self.name}: {column} {found.note}")
        if found.misfits.any():
            other = recognise(values[found.misfits], time.time()).words
            expected = f"{found.words} as in most rows" if found.words else "seconds from 1970"
            self.blame(
                np.flatnonzero(found.misfits),
                f"{column} is {{cell}}, expected {expected}.",
                f"It looks like {other}." if other else "Leave it empty where it is not known.",
                column,
            )
        seconds = found.seconds
        if unreadable.any():
            # ISO 8601 for what is no number; a time without zone is UTC.
            rows = np.flatnonzero(unreadable)
            seconds = seconds.copy()
            seconds[rows] = _parse_times(self.text(column).take(pa.array(rows)).to_pylist(), "ISO8601")
            unreadable = unreadable & np.isnan(seconds)
        self.blame(
            np.flatnonzero(unreadable),
            f"{column} is {{cell}}, not a time.",
            "Write seconds since 1970 or ISO 8601, for example 2024-05-31T18:00:00"
            + (f"; or name the format: {setting}=%d.%m.%Y." if setting else "."),
            column,
        )
        return self._in_range(column, seconds)

    def doubt_ids(self, column: str, words: bool = True) -> None:
        """Add faults for ids that are none: words for a missing value, digits that were rounded, lists.

        Args:
            words: whether a word such as NULL is doubted; of an item's own id it may be the id.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        array = self.columns[column]
        if pa.types.is_nested(array.type) and not pa.types.is_dictionary(array.type):
            self.faults.append(Fault(self.name, f"{column} holds {array.type}, expected one id a row."))
            return
        if pa.types.is_floating(array.type):
            lost = np.abs(array.cast(pa.float64()).to_numpy()) >= _EXACT
            remedy = "Write ids as strings or whole numbers."
            self.blame(np.flatnonzero(lost), f"{column} is {{cell}}, a float that has lost digits.", remedy, column)
            return
        text = self.text(column)
        if words:
            self.doubt_words(column)
        rounded = pc.match_substring_regex(text, _ROUNDED).to_numpy(zero_copy_only=False)
        remedy = "Export the column as text."
        self.blame(np.flatnonzero(rounded), f"{column} is {{cell}}, digits that a spreadsheet rounded.", remedy, column)
        lost = pc.match_substring(text, "\ufffd").to_numpy(zero_copy_only=False)
        self.blame(np.flatnonzero(lost), f"{column} is {{cell}}, which has lost characters.", "", column)

    def doubt_words(self, column: str) -> None:
        """Add a fault for each cell that holds a word for a missing value, such as NULL, where a name is expected."""
        problem = f"{column} is {{cell}}, a word for a missing value."
        remedy = "Leave the cell empty; all such rows would count as one."
        self.blame(np.flatnonzero(_are_missing_words(self.text(column))), problem, remedy, column)

    def note_missing_words(self, columns: Iterable[str]) -> None:
        """Note words for a missing value that stand in texts, where they are taken for text."""
        for column in columns:
            if column not in self or _is_list(self.columns[column].type):
                continue
            rows = np.flatnonzero(_are_missing_words(self.text(column)))
            if len(rows):
                first = int(rows[0])
                count = "one row" if len(rows) == 1 else f"{len(rows):,} rows"
                self.notes.append(
                    f"{column} is {self._show(column, first)} in {count} of {self.name}, first at "
                    f"{self.where(first)}: taken for text; leave a cell empty where it is missing"
                )

    def spread(self, column: str) -> Table:
        """Return the table with a row for each part of the lists in a column; other columns are repeated.

        Lists of the same lengths in other columns are spread along. In texts, a list is one in brackets.
        """
        import pyarrow as pa

        array = self.columns[column]
        if _is_list(array.type):
            cells = array.to_pylist()
        elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            text = self.text(column)
            if not _any_brackets(text):
                return self
            cells = [_parse_list(cell) if cell.startswith("[") and cell.endswith("]") else [cell]
                     for cell in text.to_pylist()]  # fmt: skip
        else:
            return self
        cells = [[None] if cell is None else cell for cell in cells]
        counts = np.array([len(cell) for cell in cells], np.int64)
        if not counts.all():
            self.notes.append(f"{int((counts == 0).sum()):,} rows of {self.name} hold an empty list and were left out")
        origin = np.repeat(np.arange(self.rows), counts)
        take = pa.array(origin)
        columns = {}
        for name, other in self.columns.items():
            if name == column:
                flattened = [flat(one) for cell in cells for one in cell]
                columns[name] = pa.chunked_array([pa.array(flattened, pa.string())])
            elif _is_list(other.type) and [len(one or ()) for one in other.to_pylist()] == counts.tolist():
                columns[name] = pa.chunked_array([pa.array([one for cell in other.to_pylist() for one in cell or ()])])
            else:
                columns[name] = other.take(take)
        source = origin if self.origin is None else self.origin[origin]
        return replace(self, columns=columns, rows=len(origin), origin=source)

    def _in_range(self, column: str, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        outside = (seconds < EARLIEST) | (seconds >= LATEST)
        problem = f"{column} is {{cell}}, expected a time from 1970 to 2200."
        self.blame(np.flatnonzero(outside), problem, "Leave it empty where it is not known.", column)
        return np.where(outside, np.nan, seconds)

    def _parse_formatted(self, column: str, written: str) -> NDArray[np.float64]:
        text = self.text(column)
        cells = text.to_pylist()
        seconds = _parse_times(cells, written)
        unreadable = np.isnan(seconds) & np.array([cell != "" for cell in cells], bool)
        self.blame(np.flatnonzero(unreadable), f"{column} is {{cell}}, which is not written as {written}.", "", column)
        return seconds

    def _show(self, column: str, row: int) -> str:
        cell = self.columns[column][row]
        try:
            value = cell.as_py()
            return repr(str(value) if hasattr(value, "isoformat") else value)
        except (ValueError, OverflowError, ArithmeticError):
            return f"{cell}"

    def _numbers(self, column: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        import pandas as pd
        import pyarrow as pa
        import pyarrow.compute as pc

        array = self.columns[column]
        if pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_decimal(array.type):
            values = pc.cast(array, pa.float64(), safe=False).to_numpy()
            empty = array.is_null().to_numpy() | np.isnan(values)
        else:
            text = self.text(column)
            empty = pc.equal(text, "").to_numpy()
            try:
                values = pc.if_else(pc.equal(text, ""), None, text).cast(pa.float64()).to_numpy()
            except pa.ArrowInvalid:
                cells = pd.Series(text.to_pylist(), dtype=object)
                values = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64)
        values = np.array(values, dtype=np.float64)
        unreadable = ~empty & ~np.isfinite(values)
        values[unreadable] = np.nan
        return values, unreadable

    @cached_property
    def _lines(self) -> list[NDArray[np.int64] | None]:
        """The physical line of each row, per piece."""
        return [None if piece.lines is None else piece.lines() for piece in self.pieces]


def as_strings(array: Any) -> Any:
    """Return an Arrow array of strings, null where a cell is missing."""
    import pyarrow as pa

    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.cast(kind.value_type)
        kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        array = pa.chunked_array([chunk.storage for chunk in array.chunks], kind.storage_type)
        kind = array.type
    if pa.types.is_string(kind):
        return array
    if pa.types.is_floating(kind) or pa.types.is_nested(kind) or pa.types.is_null(kind):
        # pandas turns whole numbers into floats where one is missing: 7.0 is the id 7.
        return pa.chunked_array([pa.array([flat(value) for value in array.to_pylist()], pa.string())])
    return array.cast(pa.string())


def holds_bytes(array: Any) -> bool:
    """Say whether a column holds bytes: binary cells, or records of `bytes` and `path`, which `datasets` writes."""
    import pyarrow as pa

    kind = getattr(array, "type", None)
    if kind is not None and pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return kind is not None and any(test(kind) for test in tests)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return any(test(kind) for test in tests)


def _are_missing_words(text: Any) -> NDArray[np.bool_]:
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.is_in(pc.utf8_lower(text), pa.array(MISSING_WORDS)).to_numpy(zero_copy_only=False)
    return np.asarray(found, bool)


def _any_brackets(text: Any) -> bool:
    import pyarrow.compute as pc

    return bool(pc.any(pc.starts_with(text, "[")).as_py())


def _parse_list(cell: str) -> list[str]:
    """Return the parts of a list written as JSON or as Python or numpy print it."""
    return [next(filter(None, found), "") for found in _LIST_CELL.findall(cell[1:-1])]


def _temporal_seconds(array: Any) -> NDArray[np.float64]:
    """Return (rows,) seconds of timestamps or dates, NaN where empty; a moment without zone is UTC."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_date32(kind):
        whole, per_second = array.cast(pa.int32()), 1 / 86_400
    elif pa.types.is_date64(kind):
        whole, per_second = array.cast(pa.int64()), 1e3
    else:
        whole, per_second = array.cast(pa.int64()), UNITS[kind.unit]
    seconds = pc.cast(whole, pa.float64(), safe=False).to_numpy() / per_second
    return np.array(seconds, np.float64)


def _parse_times(cells: list[str], written: str) -> NDArray[np.float64]:
    """Return (n,) seconds since 1970, NaN where a text is not written so."""
    import pandas as pd

    moments = pd.to_datetime(pd.Series(cells, dtype=object), format=written, utc=True, errors="coerce")
    stamps = moments.dt.tz_localize(None).to_numpy()
    seconds = stamps.astype(np.int64) / UNITS[np.datetime_data(stamps.dtype)[0]]
    return np.where(np.isnat(stamps), np.nan, seconds)
