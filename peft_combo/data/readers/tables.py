"""Reader of one table, whatever its format and however many its files, into columns under our names.

Owns column mapping, what is left out because it cannot be read, and the joining of parts. Knows nothing of what a table
means, and of formats only which reader reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.readers.cells import Piece, Table, as_strings, holds_bytes
from peft_combo.data.readers.csv_table import read_csv, record_lines
from peft_combo.data.readers.encodings import decode
from peft_combo.data.readers.forms import FileError, Part, TableFiles, read_bytes
from peft_combo.data.readers.json_lines import read_json
from peft_combo.data.readers.parquet import Unreadable, first_line, read_parquet
from peft_combo.errors import Fault, did_you_mean

_INDEX = "Unnamed: 0"


def read_table(files: TableFiles, faults: list[Fault], notes: list[str]) -> Table | None:
    """Read the files of a table, whatever its columns are called.

    Args:
        faults: gets what is wrong. notes: gets what was left out.
    Returns:
        None where the table cannot be read at all.
    """
    before = len(faults)
    found = [_read_part(part, faults, notes) for part in files.parts]
    read = [one for one in found if one is not None]
    if len(faults) > before:
        return None
    pieces = tuple(piece for _, piece in read)
    columns = _concatenate([part for part, _ in read], [piece.rows for piece in pieces])
    return Table(files.name, columns, sum(piece.rows for piece in pieces), faults, notes, pieces)


def take_table(name: str, given: Any, faults: list[Fault], notes: list[str]) -> Table | None:
    """Take a table that is in memory: a `datasets.Dataset`, a pandas `DataFrame` or an Arrow table.

    Returns:
        None, with a fault, where it is something else or does not go into Arrow.
    """
    import datasets
    import pandas as pd
    import pyarrow as pa

    try:
        match given:
            case datasets.Dataset():
                table = given.with_format("arrow")[:]
            case pd.DataFrame():
                table = pa.Table.from_pandas(given, preserve_index=False)
            case pa.Table():
                table = given
            case _:
                expected = "expected a datasets.Dataset, a pandas.DataFrame or a pyarrow.Table"
                faults.append(Fault(name, f"{expected}, found {type(given).__name__}."))
                return None
    except (pa.ArrowException, TypeError, ValueError, UnicodeError) as error:
        faults.append(Fault(name, f"does not go into Arrow: {first_line(error)}", "Give columns of one type each."))
        return None
    columns = {column: table.column(place) for place, column in enumerate(table.column_names)}
    return Table(name, columns, table.num_rows, faults, notes, (Piece(name, table.num_rows),))


def name_columns(
    table: Table, kind: str, mapping: Mapping[str, str], required: Sequence[str], optional: Sequence[str] | None
) -> Table | None:
    """Put the columns of a table under our names.

    Args:
        kind: what data.columns calls the table.
        mapping: our column name to the one in the file, from data.columns.
        required: columns without which the table says nothing.
        optional: further columns to take; None takes all.
    Returns:
        None, with faults, where it cannot be.
    """
    # pandas names its index so where it was written and read again.
    if _INDEX in table.columns and _INDEX not in mapping.values():
        table = replace(table, columns={name: array for name, array in table.columns.items() if name != _INDEX})
        table.notes.append(f"{table.name}: the column {_INDEX!r} is an index of pandas and was left out")
    faults, found = table.faults, tuple(table.columns)
    before = len(faults)
    for ours, theirs in mapping.items():
        if theirs not in found:
            problem = f"names the column {theirs!r}, which {table.name} does not have. It has {', '.join(found)}."
            faults.append(Fault(f"data.columns.{kind}.{ours}", problem, did_you_mean(theirs, found)))
        if optional is not None and ours not in (*required, *optional):
            known = tuple(dict.fromkeys((*required, *optional)))
            problem = f"{ours!r} is no column of this table; expected one of {', '.join(known)}."
            faults.append(Fault(f"data.columns.{kind}", problem, did_you_mean(ours, known)))
    taken = set(mapping.values())
    columns = {ours: table.columns[theirs] for ours, theirs in mapping.items() if theirs in found}
    columns |= {c: array for c, array in table.columns.items() if c not in taken and c not in columns}
    for column in required:
        if column not in columns and column not in mapping:
            likely = did_you_mean(column, found)
            example = likely.split('"')[1] if likely else "its name in the file"
            problem = f"has no column {column!r}; it has {', '.join(found) or 'none'}."
            remedy = f"{likely} Map it in the recipe: data.columns.{kind}.{column}: {example}.".strip()
            first = table.pieces[0] if table.pieces else None
            at = table.name if first is None or first.header is None else f"{first.label}:{first.header}"
            faults.append(Fault(at, problem, remedy))
    if table.rows == 0:
        faults.append(Fault(table.name, "has no rows.", "Add some, or remove the file where it is optional."))
    if optional is not None:
        columns = {column: array for column, array in columns.items() if column in (*required, *optional)}
    for column, array in list(columns.items()):
        if (kind, column) == ("items", "image") and holds_bytes(array):
            continue
        if (reason := _why_unreadable(array)) is None:
            continue
        if column in required or (optional is not None and column in optional):
            faults.append(Fault(table.name, f"{column} cannot be read: {reason}", "Write it as text or numbers."))
        else:
            del columns[column]
            table.notes.append(f"{table.name}: the column {column!r} cannot be read and was left out: {reason}"[:-1])
    return None if len(faults) > before else replace(table, columns=columns)


def _read_part(part: Part, faults: list[Fault], notes: list[str]) -> tuple[dict[str, Any], Piece] | None:
    """Read one file; None, with faults, where it cannot be."""
    import pyarrow as pa

    lines: Callable[[], NDArray[np.int64]] | None = None
    header = None
    try:
        raw = read_bytes(part)
        if part.format == "parquet":
            columns, rows = read_parquet(raw)
        else:
            decoded = decode(raw, part.label)
            text = decoded.text
            if text is None:
                faults.append(Fault(f"{part.label}:{decoded.line}", decoded.problem, decoded.remedy))
                return None
            if decoded.note:
                notes.append(decoded.note)
            if part.format == "json":
                read = read_json(text, part.label, faults, notes)
                if read is None:
                    return None
                columns, line_of_row = read
                if line_of_row is not None:
                    lines = line_of_row.view
            else:
                delimiter = "\t" if part.format == "tsv" else ","
                found = read_csv(text, part.label, delimiter, faults, notes)
                if found is None:
                    return None
                columns, header = found, 1
                lines = lambda: record_lines(text, delimiter)  # noqa: E731 - the text is kept for faults alone
            rows = len(next(iter(columns.values()))) if columns else 0
    except FileError as error:
        faults.append(Fault(part.label, error.problem, error.remedy))
        return None
    for name, value in part.partition:
        columns.setdefault(name, pa.chunked_array([pa.array([value] * rows, pa.string())]))
    return columns, Piece(part.label, rows, lines, header)


def _concatenate(parts: list[dict[str, Any]], rows: list[int]) -> dict[str, Any]:
    """Put parts one after another; a column that one lacks is empty there, and types that differ become strings."""
    import pyarrow as pa

    if len(parts) == 1:
        return parts[0]
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        arrays = [part.get(name) for part in parts]
        if any(isinstance(array, Unreadable) for array in arrays):
            columns[name] = next(array for array in arrays if isinstance(array, Unreadable))
            continue
        kinds = {array.type for array in arrays if array is not None and not pa.types.is_null(array.type)}
        kind = kinds.pop() if len(kinds) == 1 else pa.string()
        chunks = []
        for array, count in zip(arrays, rows, strict=True):
            if array is None or pa.types.is_null(array.type):
                chunks.append(pa.nulls(count, kind))
            else:
                chunks.extend((array if array.type == kind else as_strings(array)).chunks)
        columns[name] = pa.chunked_array(chunks, kind)
    return columns


def _why_unreadable(array: Any) -> str | None:
    """Return why a column cannot be turned into text, or None where it can."""
    import pyarrow as pa

    if isinstance(array, Unreadable):
        return str(array)
    kind = array.type
    simple = (pa.types.is_string, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_timestamp)
    if any(test(kind) for test in simple):
        return None
    try:
        as_strings(array)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, ArithmeticError, RecursionError) as error:
        return f"{kind}, {first_line(error)}"
    return None
