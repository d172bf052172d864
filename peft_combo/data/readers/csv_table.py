"""Reader of CSV and TSV text into Arrow columns of strings, so that no id loses a leading zero.

Owns the dialect (RFC 4180: a quote within quotes is written twice), physical line numbers and what is wrong with a
record. Arrow does the reading; where a text holds quotes, a strict pass makes sure first that they mean what Arrow
takes them for.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.errors import Fault, shorten

# Of one kind of fault in one table so many are spelled out; the rest are counted.
SHOWN_FAULTS = 20
_QUOTES_DOUBLED = 'Write it so: in Spark with option("escape", "\\""), in pandas with doublequote=True.'


class BrokenRecord(Exception):
    """A record of a CSV text does not end: the line it starts on, and why."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def read_csv(text: str, name: str, delimiter: str, faults: list[Fault], notes: list[str]) -> dict[str, Any] | None:
    """Return the columns of a CSV text as Arrow arrays of strings, "" where a cell is empty.

    Columns without a name, as pandas writes its index, and rows of empty cells alone are left out and noted.

    Returns:
        None, with faults, where the text cannot be read.
    """
    records = csv_records(text, delimiter)
    try:
        header = [cell.strip() for cell in next(records, (1, []))[1]]
        first = next(records, None)
    except BrokenRecord as broken:
        faults.append(Fault(f"{name}:{broken.line}", f"cannot be read as CSV: {broken}.", "Check the quotes."))
        return None
    if not _check_header(text, header, name, delimiter, faults):
        return None
    if first is None:
        return _leave_out({place: [] for place in range(len(header))}, header, name, notes)
    if not _check_records(text, header, name, delimiter, faults):
        return None
    return _leave_out(dict(enumerate(_read_arrow(text, len(header), delimiter))), header, name, notes)


def csv_records(text: str, delimiter: str = ",", strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yield the physical line each record starts on, and its cells; blank lines are left out.

    Raises:
        BrokenRecord: a quote is not closed, or where `strict` is set, something else stands where it must not.
    """
    # The limit is of the whole process and its default an accident: a description may hold pictures.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)
    start = 1
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise BrokenRecord(start, str(error)) from error


def record_lines(text: str, delimiter: str) -> NDArray[np.int64]:
    """Return the physical line that each record starts on, without the header and without rows of empty cells."""
    records = csv_records(text, delimiter)
    next(records, None)
    return np.array([line for line, cells in records if any(cell.strip() for cell in cells)], np.int64)


def _check_header(text: str, header: list[str], name: str, delimiter: str, faults: list[Fault]) -> bool:
    if not any(header):
        faults.append(Fault(name, "is empty.", "Its first line must name the columns."))
        return False
    if text[:4].lower() == "sep=":
        problem = f"starts with {shorten(text.splitlines()[0])!r}, which only a spreadsheet understands."
        faults.append(Fault(f"{name}:1", problem, "Take the line out."))
        return False
    if len(header) == 1 and (mark := next((m for m in ";\t|," if m in header[0]), None)):
        problem = f"the columns are separated by {mark!r}, expected {delimiter!r}."
        remedy = "Name it .tsv." if mark == "\t" else f"Save it with {'commas' if delimiter == ',' else 'tabs'}."
        faults.append(Fault(f"{name}:1", problem, remedy))
        return False
    if repeated := sorted({one for one in header if one and header.count(one) > 1}):
        faults.append(Fault(f"{name}:1", f"names {', '.join(map(repr, repeated))} more than once.", "Rename one."))
        return False
    return True


def _check_records(text: str, header: list[str], name: str, delimiter: str, faults: list[Fault]) -> bool:
    """Make sure that every record has the header's columns; else add a fault for each that has not."""
    before = len(faults)
    wrong: list[tuple[int, list[str]]] = []
    broken: BrokenRecord | None = None
    escapes = '\\"' in text
    suspect = False
    try:
        for line, cells in csv_records(text, delimiter, strict=True):
            if len(cells) != len(header):
                wrong.append((line, cells))
            elif escapes:
                suspect = suspect or any('\\"' in cell for cell in cells)
    except BrokenRecord as error:
        broken = error
    escape = _find_escape(text, len(header), delimiter) if escapes and (wrong or broken or suspect) else None
    if escape is not None:
        problem = 'holds \\" ; expected "" for a quote within quotes.'
        faults.append(Fault(f"{name}:{escape}", problem, _QUOTES_DOUBLED))
        return False
    for line, cells in wrong[:SHOWN_FAULTS]:
        remedy = ""
        if len(cells) > len(header):
            escaped = any(cell.endswith("\\") for cell in cells[:-1])
            remedy = "Put text that contains a comma in double quotes"
            remedy += "; a backslash before it is not understood." if escaped else "."
            remedy = remedy if delimiter == "," else "A tab within a cell needs double quotes around the cell."
        faults.append(Fault(f"{name}:{line}", f"has {len(cells)} columns, expected {len(header)}.", remedy))
    if len(wrong) > SHOWN_FAULTS:
        more = len(wrong) - SHOWN_FAULTS
        faults.append(Fault(name, f"{more:,} more rows have another number of columns than the header."))
    if broken is not None:
        remedy = "Check the quotes."
        if "unexpected end" in str(broken):
            remedy = "A double quote is opened and not closed."
        elif "expected after" in str(broken):
            remedy = 'A quote within quotes is written twice: "".'
        faults.append(Fault(f"{name}:{broken.line}", f"cannot be read as CSV: {broken}.", remedy))
    return len(faults) == before


def _find_escape(text: str, columns: int, delimiter: str) -> int | None:
    """Return the first line with an escaped quote where the whole text fits the dialect of backslashes, else None."""
    d = re.escape(delimiter)
    cell = re.compile(rf'(?:"(?:[^"\\]|\\.)*"|(?!")(?:[^{d}\r\n\\]|\\.)*)({d}|\r\n|\n|\r|\Z)', re.DOTALL)
    place = count = 0
    while place < len(text):
        found = cell.match(text, place)
        if found is None:
            return None
        count += 1
        if found[1] != delimiter:
            if count != columns and not (count == 1 and found.end() - place == len(found[1])):  # a blank line
                return None
            count = 0
        place = found.end()
    return text.count("\n", 0, text.index('\\"')) + 1


def _read_arrow(text: str, columns: int, delimiter: str) -> list[Any]:
    """Read records that are known to be sound."""
    import pyarrow as pa
    import pyarrow.csv as arrow_csv

    raw = text.encode()
    names = [str(place) for place in range(columns)]
    table = arrow_csv.read_csv(
        pa.BufferReader(raw),
        # A record has to lie in one block, however long its cells are.
        arrow_csv.ReadOptions(
            column_names=names, skip_rows_after_names=1, block_size=min(max(len(raw), 1 << 20), 2**31 - 1)
        ),
        arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
    )
    return list(table.columns)


def _leave_out(columns: dict[int, Any], header: list[str], name: str, notes: list[str]) -> dict[str, Any]:
    """Drop rows of empty cells and columns without a name."""
    import pyarrow as pa
    import pyarrow.compute as pc

    arrays = [array if isinstance(array, pa.ChunkedArray) else pa.chunked_array([array], pa.string())
              for array in columns.values()]  # fmt: skip
    empty = np.ones(len(arrays[0]), bool)
    for array in arrays:
        if not empty.any():
            break
        empty &= pc.equal(pc.utf8_trim_whitespace(array), "").to_numpy()
    if empty.any():
        notes.append(f"{int(empty.sum()):,} rows of {name} are empty and were left out")
        kept = pa.array(~empty)
        arrays = [array.filter(kept) for array in arrays]
    found = {column: array for column, array in zip(header, arrays, strict=True) if column}
    if len(found) < len(header):
        places = ", ".join(str(place + 1) for place, column in enumerate(header) if not column)
        notes.append(f"{name}: column {places} has no name and was left out")
    return found
