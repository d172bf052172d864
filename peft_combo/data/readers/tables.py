"""Reader of one table (CSV, Parquet or JSON Lines) into Arrow columns, with every fault in it.

Owns file formats, column mapping, physical line numbers and the turning of cells into ids, numbers and times. Knows
nothing of what a table means. CSV and Parquet go through `datasets`; JSON Lines is read line by line, because there
`datasets` turns ids that look like dates into dates.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.errors import Fault, did_you_mean

SUFFIXES = (".csv", ".parquet", ".jsonl")
# Of one kind of fault in one table so many are spelled out; the rest are counted.
SHOWN_FAULTS = 20
_LATEST_SECOND = 1e11  # year 5138: a larger timestamp is in milliseconds


@dataclass
class Table:
    """The columns of one file under our names, and the faults found in it so far.

    Attributes:
        columns: per column name an Arrow array; CSV cells are strings, other formats keep their types.
        rows: number of rows.
        line_of_row: the physical line of each row where it is known at reading; None for CSV and Parquet.
    """

    file: Path
    columns: dict[str, Any]
    rows: int
    faults: list[Fault] = field(default_factory=list)
    line_of_row: NDArray[np.int64] | None = None

    def __contains__(self, column: object) -> bool:
        return column in self.columns

    def where(self, row: int) -> str:
        """Return "items.csv:12", with the physical line; Parquet has rows instead."""
        if self.file.suffix == ".parquet":
            return f"{self.file.name} row {row + 1}"
        return f"{self.file.name}:{self._lines[row]}"

    def blame(
        self, rows: Sequence[int] | NDArray[np.integer[Any]], problem: str, remedy: str = "", cell: str = ""
    ) -> None:
        """Add a fault per row, the first few in full; `{cell}` in `problem` becomes the cell of that column."""
        for row in rows[:SHOWN_FAULTS]:
            shown = problem.replace("{cell}", repr(self.columns[cell][int(row)].as_py())) if cell else problem
            self.faults.append(Fault(self.where(int(row)), shown, remedy))
        if len(rows) > SHOWN_FAULTS:
            more = len(rows) - SHOWN_FAULTS
            self.faults.append(Fault(self.file.name, f"{more:,} more rows have the fault of the line above."))

    def text(self, column: str) -> Any:
        """Return the column as an Arrow array of trimmed strings; "" where empty. Whole numbers lose no digit."""
        import pyarrow as pa
        import pyarrow.compute as pc

        array = self.columns[column]
        kind = array.type
        if pa.types.is_dictionary(kind):
            array = array.cast(kind.value_type)
            kind = array.type
        if pa.types.is_floating(kind):
            # pandas turns whole numbers into floats where one is missing: 7.0 is the id 7.
            cells = [None if value is None or value != value else _flat(value) for value in array.to_pylist()]
            array = pa.chunked_array([pa.array(cells, pa.string())])
        elif pa.types.is_nested(kind):
            array = pa.chunked_array([pa.array([_flat(value) for value in array.to_pylist()], pa.string())])
        elif not pa.types.is_string(kind):
            array = array.cast(pa.string())
        return pc.fill_null(pc.utf8_trim_whitespace(array), "")

    def strings(self, column: str) -> list[str]:
        """Return `text` as a list; a list of "" where the column is absent."""
        found: list[str] = self.text(column).to_pylist() if column in self else [""] * self.rows
        return found

    def lists(self, column: str, separator: str) -> list[tuple[str, ...]]:
        """Return a tuple per row from list cells, or from strings with `separator` between the parts."""
        import pyarrow as pa

        if column not in self:
            return [()] * self.rows
        kind = self.columns[column].type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            cells: Iterable[list[Any]] = (value or [] for value in self.columns[column].to_pylist())
        else:
            cells = (value.split(separator) for value in self.strings(column))
        return [tuple(part for one in cell if one is not None and (part := str(one).strip())) for cell in cells]

    def codes(self, column: str) -> tuple[NDArray[np.int64], list[str]]:
        """Return each cell's place in the list of distinct values (in order of first appearance), -1 where empty."""
        import pyarrow.compute as pc

        text = self.text(column)
        encoded = pc.if_else(pc.equal(text, ""), None, text).combine_chunks().dictionary_encode()
        codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        return codes, encoded.dictionary.to_pylist()

    def numbers(self, column: str, least: float | None = None) -> NDArray[np.float64]:
        """Return (rows,) floats, NaN where empty; a fault for each cell that is no number or is under `least`."""
        values, unreadable = self._numbers(column)
        self.blame(
            np.flatnonzero(unreadable),
            f"{column} is {{cell}}, not a number.",
            "Write it like 12.50, without currency sign or thousands separator.",
            column,
        )
        if least is not None:
            self.blame(
                np.flatnonzero(values < least), f"{column} is {{cell}}, expected at least {least:g}.", cell=column
            )
        return values

    def times(self, column: str) -> NDArray[np.float64]:
        """Return (rows,) seconds since 1970-01-01 UTC, NaN where empty; a fault for each cell that is no time."""
        import pandas as pd
        import pyarrow as pa

        kind = self.columns[column].type
        if pa.types.is_temporal(kind):
            moments = pd.to_datetime(self.columns[column].to_pandas(), utc=True)
            return _seconds(moments)
        values, unreadable = self._numbers(column)
        if unreadable.any():
            # ISO 8601 for what is no number; a time without zone is UTC.
            rows = np.flatnonzero(unreadable)
            cells = pd.Series(self.text(column).take(pa.array(rows)).to_pylist(), dtype=object)
            values[rows] = _seconds(pd.to_datetime(cells, format="ISO8601", utc=True, errors="coerce"))
            unreadable = unreadable & np.isnan(values)
        self.blame(
            np.flatnonzero(unreadable),
            f"{column} is {{cell}}, not a time.",
            "Write seconds since 1970 or ISO 8601, for example 2024-05-31T18:00:00.",
            column,
        )
        late = np.abs(values) > _LATEST_SECOND
        self.blame(
            np.flatnonzero(late),
            f"{column} is {{cell}}, expected seconds since 1970.",
            "It looks like milliseconds: divide by 1000.",
            column,
        )
        return np.where(late, np.nan, values)

    def _numbers(self, column: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        import pandas as pd
        import pyarrow as pa
        import pyarrow.compute as pc

        array = self.columns[column]
        if pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_decimal(array.type):
            values = array.cast(pa.float64()).to_numpy()
            empty = array.is_null().to_numpy() | np.isnan(values)
        else:
            text = self.text(column)
            empty = pc.equal(text, "").to_numpy()
            try:
                values = pc.if_else(pc.equal(text, ""), None, text).cast(pa.float64()).to_numpy()
            except pa.ArrowInvalid:
                values = pd.to_numeric(pd.Series(text.to_pylist(), dtype=object), errors="coerce").to_numpy(np.float64)
        values = np.array(values, dtype=np.float64)
        unreadable = ~empty & ~np.isfinite(values)
        values[unreadable] = np.nan
        return values, unreadable

    @cached_property
    def _lines(self) -> NDArray[np.int64]:
        """The physical line of each row."""
        if self.line_of_row is not None:
            return self.line_of_row
        plain = np.arange(2, self.rows + 2)
        if self.file.suffix != ".csv":
            return plain
        try:
            starts = [start for start, _ in _csv_records(_decode(self.file))][1:]
        except _BrokenRecord:  # a cell longer than the csv module takes
            return plain
        return np.array(starts) if len(starts) == self.rows else plain


def find_table(folder: Path, name: str, faults: list[Fault]) -> Path | None:
    """Return the file of table `name`, or None; a fault where several suffixes of it exist."""
    present = [folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").is_file()]
    if len(present) > 1:
        faults.append(
            Fault(name, f"{' and '.join(file.name for file in present)} exist; expected one.", "Remove all but one.")
        )
    return present[0] if present else None


def read_table(
    file: Path, mapping: Mapping[str, str], required: Sequence[str], optional: Sequence[str] | None, faults: list[Fault]
) -> Table | None:
    """Read `file` and put its columns under our names.

    Args:
        mapping: our column name to the one in the file, from data.columns.
        required: columns without which the table says nothing.
        optional: further columns to take; None takes all.
        faults: gets what is wrong.
    Returns:
        None where the table cannot be read at all.
    """
    before = len(faults)
    match file.suffix:
        case ".csv":
            table = _read_csv(file, faults)
        case ".parquet":
            table = _read_parquet(file, faults)
        case _:
            table = _read_json_lines(file, faults)
    if table is None:
        return None
    found = tuple(table.columns)
    name = file.stem
    for ours, theirs in mapping.items():
        if theirs not in found:
            faults.append(
                Fault(
                    f"data.columns.{name}.{ours}",
                    f"names the column {theirs!r}, which {file.name} does not have. It has {', '.join(found)}.",
                    did_you_mean(theirs, found),
                )
            )
        if optional is not None and ours not in (*required, *optional):
            known = tuple(dict.fromkeys((*required, *optional)))
            faults.append(
                Fault(
                    f"data.columns.{name}",
                    f"{ours!r} is no column of this table; expected one of {', '.join(known)}.",
                    did_you_mean(ours, known),
                )
            )
    taken = set(mapping.values())
    columns = {ours: table.columns[theirs] for ours, theirs in mapping.items() if theirs in found}
    columns |= {c: array for c, array in table.columns.items() if c not in taken and c not in columns}
    for column in required:
        if column not in columns and column not in mapping:
            likely = did_you_mean(column, found)
            example = likely.split('"')[1] if likely else "its name in the file"
            faults.append(
                Fault(
                    f"{file.name}:1" if file.suffix == ".csv" else file.name,
                    f"has no column {column!r}; it has {', '.join(found) or 'none'}.",
                    f"{likely} Map it in the recipe: data.columns.{name}.{column}: {example}.".strip(),
                )
            )
    if table.rows == 0:
        faults.append(Fault(file.name, "has no rows.", "Add some, or remove the file where it is optional."))
    if len(faults) > before:
        return None
    if optional is not None:
        columns = {column: array for column, array in columns.items() if column in (*required, *optional)}
    return Table(file, columns, table.rows, faults, table.line_of_row)


def _read_csv(file: Path, faults: list[Fault]) -> Table | None:
    """Read a CSV file with every cell a string, so that no id loses a leading zero."""
    import datasets

    text = _decode(file, faults)
    if text is None:
        return None
    records = _csv_records(text)
    try:
        header = [name.strip() for name in next(records, (1, []))[1]]
        first = next(records, None)
    except _BrokenRecord as broken:
        faults.append(Fault(f"{file.name}:{broken.line}", f"cannot be read as CSV: {broken}.", "Check the quotes."))
        return None
    if not header:
        faults.append(Fault(file.name, "is empty.", "Its first line must name the columns."))
        return None
    if len(header) == 1 and (mark := next((m for m in ";\t|" if m in header[0]), None)):
        faults.append(
            Fault(f"{file.name}:1", f"the columns are separated by {mark!r}, expected ','.", "Save it with commas.")
        )
        return None
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        faults.append(Fault(f"{file.name}:1", f"names {', '.join(map(repr, repeated))} more than once.", "Rename one."))
        return None
    if first is None:
        import pyarrow as pa

        return Table(file, {name: pa.chunked_array([[]], pa.string()) for name in header}, 0)
    if len(first[1]) == len(header):
        try:
            with _quiet_datasets() as cache:
                data = datasets.Dataset.from_csv(
                    str(file),
                    features=datasets.Features({name: datasets.Value("string") for name in header}),
                    names=header,
                    header=0,
                    keep_default_na=False,
                    encoding="utf-8-sig",
                    cache_dir=cache,
                    keep_in_memory=True,
                )
        except datasets.exceptions.DatasetGenerationError as error:
            reason: str = str(error.__cause__ or error)
        else:
            # A cell is null only where its row was too short.
            if not any(data.data.column(name).null_count for name in header):
                return Table(file, {name: data.data.column(name) for name in header}, data.num_rows)
            reason = "a row is too short"
    else:
        reason = "the first row has another number of columns than the header"
    _blame_csv(file, text, header, reason, faults)
    return None


def _blame_csv(file: Path, text: str, header: list[str], reason: str, faults: list[Fault]) -> None:
    """Add a fault for each record that does not fit the header."""
    before = len(faults)
    more = 0
    try:
        for line, cells in _csv_records(text, strict=True):
            if len(cells) != len(header):
                if len(faults) - before < SHOWN_FAULTS:
                    remedy = "Put text that contains a comma in double quotes." if len(cells) > len(header) else ""
                    faults.append(
                        Fault(f"{file.name}:{line}", f"has {len(cells)} columns, expected {len(header)}.", remedy)
                    )
                else:
                    more += 1
    except _BrokenRecord as broken:
        remedy = "A double quote is opened and not closed." if "unexpected end" in str(broken) else "Check the quotes."
        faults.append(Fault(f"{file.name}:{broken.line}", f"cannot be read as CSV: {broken}.", remedy))
    if more:
        faults.append(Fault(file.name, f"{more:,} more rows have another number of columns than the header."))
    if len(faults) == before:
        faults.append(Fault(file.name, f"cannot be read as CSV: {reason}."))


def _read_parquet(file: Path, faults: list[Fault]) -> Table | None:
    import datasets
    import pyarrow as pa

    try:
        with _quiet_datasets() as cache:
            data = datasets.Dataset.from_parquet(str(file), cache_dir=cache, keep_in_memory=True)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        faults.append(Fault(file.name, f"cannot be read as Parquet: {reason}", "Write the file again."))
        return None
    return Table(file, {name: data.data.column(name) for name in data.column_names}, data.num_rows)


def _read_json_lines(file: Path, faults: list[Fault]) -> Table | None:
    text = _decode(file, faults)
    if text is None:
        return None
    before = len(faults)
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except ValueError as error:
            problem = f"is not valid JSON: {error}."
        else:
            if isinstance(record, dict):
                records.append(record)
                lines.append(line)
                continue
            problem = f"expected an object in braces, found {type(record).__name__}."
        faults.append(Fault(f"{file.name}:{line}", problem, "Each line holds one object."))
        if len(faults) - before >= SHOWN_FAULTS:
            faults.append(Fault(file.name, f"reading stopped after {SHOWN_FAULTS} broken lines."))
            break
    if len(faults) > before:
        return None
    if not records:
        faults.append(Fault(file.name, "is empty.", "Each line holds one object."))
        return None
    names = dict.fromkeys(name for record in records for name in record)
    columns = {name: _arrow_column([record.get(name) for record in records]) for name in names}
    return Table(file, columns, len(records), line_of_row=np.array(lines, dtype=np.int64))


def _arrow_column(values: list[Any]) -> Any:
    """Return an Arrow array of one type: the values' own where they agree, else strings."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds <= {str} or kinds == {int} or kinds <= {int, float} or kinds == {bool}:
        try:
            return pa.chunked_array([pa.array(values, pa.string() if kinds <= {str} else None)])
        except (pa.ArrowException, OverflowError):
            pass
    if kinds == {list}:
        flat = [None if value is None else [_flat(one) for one in value] for value in values]
        return pa.chunked_array([pa.array(flat, pa.list_(pa.string()))])
    return pa.chunked_array([pa.array([_flat(value) for value in values], pa.string())])


def _flat(value: Any) -> str | None:
    """Return one cell as text: a list's parts with commas, an object as JSON."""
    match value:
        case None:
            return None
        case str():
            return value
        case list():
            return ", ".join(part for one in value if (part := _flat(one)))
        case float() if value.is_integer():
            return str(int(value))
        case _:
            return json.dumps(value, ensure_ascii=False, default=str)


def _decode(file: Path, faults: list[Fault] | None = None) -> Any:
    """Return the text of a UTF-8 file; None, with a fault at the line of the first wrong byte, where it is not."""
    raw = file.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if faults is None:
            raise
        line = raw.count(b"\n", 0, error.start) + 1
        faults.append(
            Fault(
                f"{file.name}:{line}",
                f"is not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start:,}).",
                f"Save it as UTF-8, for example: iconv -f cp1252 -t utf-8 {file.name}.",
            )
        )
        return None


class _BrokenRecord(Exception):
    """A record of a CSV file does not end: the line it starts on, and why."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def _csv_records(text: str, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yield the physical line each record starts on, and its cells; blank lines are left out."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=strict)
    start = 1
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise _BrokenRecord(start, str(error)) from error


def _seconds(moments: Any) -> NDArray[np.float64]:
    import pandas as pd

    since = moments - pd.Timestamp(0, tz="UTC")
    return np.array((since / pd.Timedelta(seconds=1)).to_numpy(np.float64), dtype=np.float64)


@contextmanager
def _quiet_datasets() -> Iterator[str]:
    """Give `datasets` a cache that goes away, and no progress bar of its own; both as before afterwards."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix="peft-combo-") as cache:
            yield cache
    finally:
        if shown:
            datasets.enable_progress_bars()
