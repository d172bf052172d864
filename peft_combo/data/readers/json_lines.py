"""Reader of JSON Lines, or of one JSON array of objects, into Arrow columns.

Owns what a line must be, and how values of several types become one column. Read line by line here, because libraries
turn ids that look like dates into dates.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.readers.csv_table import SHOWN_FAULTS
from peft_combo.errors import Fault, make_printable

# What a catalogue says of an item is not nested deeper, and code that follows it must not run out of stack.
_DEPTH = 50
_HALF = re.compile("[\ud800-\udfff]")


def read_json(
    text: str, name: str, faults: list[Fault], notes: list[str]
) -> tuple[dict[str, Any], NDArray[np.int64] | None] | None:
    """Return the columns of a JSON text, and the physical line of each row (None where it is one array).

    NaN, which Python writes for a missing value, is one. Half a character, left by a text cut in the middle of an
    emoji, is replaced by U+FFFD and noted.

    Returns:
        None, with faults, where the text cannot be read.
    """
    before = len(faults)
    if text.lstrip()[:1] == "[":
        records, lines = _read_array(text, name, faults), None
    else:
        records, lines = _read_lines(text, name, faults)
    if len(faults) > before:
        return None
    if not records:
        faults.append(Fault(name, "is empty.", "Each line holds one object."))
        return None
    broken = _mend_rows(records)
    if broken:
        where = f"line {lines[broken[0]]}" if lines is not None else f"row {broken[0] + 1}"
        notes.append(
            f"{len(broken):,} rows of {name} hold half a character (a text cut within an emoji), the first in {where}; "
            "U+FFFD stands for it"
        )
    names = dict.fromkeys(name for record in records for name in record)
    return {name: _arrow_column([record.get(name) for record in records]) for name in names}, lines


def flat(value: Any) -> str | None:
    """Return one cell as text: a list's parts with commas, an object as JSON; None where it is missing."""
    match value:
        case None:
            return None
        case str():
            return value
        case bytes():
            return value.decode("utf-8")
        case list():
            return ", ".join(part for one in value if (part := flat(one)))
        case float() if value != value:
            return None
        case float() if value.is_integer():
            return str(int(value))
        case _:
            return json.dumps(value, ensure_ascii=False, default=str)


def _read_lines(text: str, name: str, faults: list[Fault]) -> tuple[list[dict[str, Any]], NDArray[np.int64]]:
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    broken = 0
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        found = _parse(content)
        if isinstance(found, dict):
            records.append(found)
            lines.append(line)
            continue
        problem = found if isinstance(found, str) else f"expected an object in braces, found {type(found[0]).__name__}."
        faults.append(Fault(f"{name}:{line}", problem, "Each line holds one object."))
        broken += 1
        if broken >= SHOWN_FAULTS:
            faults.append(Fault(name, f"reading stopped after {SHOWN_FAULTS} broken lines."))
            break
    return records, np.array(lines, np.int64)


def _read_array(text: str, name: str, faults: list[Fault]) -> list[dict[str, Any]]:
    """Read one array of objects, which may go over many lines; where it is none, the lines say what is wrong."""
    found = _parse(text)
    if isinstance(found, str):
        faults.append(Fault(name, found, "Expected one object a line, or one array of objects."))
        return []
    records = found[0] if isinstance(found, tuple) else found
    if isinstance(records, list):
        wrong = [place for place, one in enumerate(records) if not isinstance(one, dict)]
        if not wrong:
            return records
        kind = type(records[wrong[0]]).__name__
        where = Fault(f"{name} row {wrong[0] + 1}", f"expected an object in braces, found {kind}.")
        faults.append(where)
    return []


def _parse(content: str) -> dict[str, Any] | tuple[Any] | str:
    """Return an object, anything else as a tuple of one, or what is wrong."""
    try:
        found = json.loads(content, parse_constant=_constant)
    except RecursionError:
        return "is nested too deeply."
    except ValueError as error:
        return f"is not valid JSON: {make_printable(str(error))}."
    if content.count("[") + content.count("{") > _DEPTH and is_deep(found):
        return "is nested too deeply."
    return found if isinstance(found, dict) else (found,)


def is_deep(value: Any) -> bool:
    """Say whether a value is nested deeper than `_DEPTH`, without going as deep itself."""
    level = [value]
    for _ in range(_DEPTH):
        inner = [one for one in level if isinstance(one, list | dict)]
        level = [each for one in inner for each in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return False
    return True


def _constant(word: str) -> None:
    """Take NaN for a missing value; Infinity is none and no number either."""
    if word != "NaN":
        _refuse(word)


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no value")


def _mend_rows(records: list[dict[str, Any]]) -> list[int]:
    """Replace lone surrogates by U+FFFD, in names and values; return the rows that held some."""
    broken = []
    for row, record in enumerate(records):
        if any(holds_half(key) or holds_half(value) for key, value in record.items()):
            records[row] = {_mend(key): _mend(value) for key, value in record.items()}
            broken.append(row)
    return broken


def holds_half(value: Any) -> bool:
    """Say whether a JSON value holds a lone surrogate, which no text in UTF-8 can."""
    match value:
        case str():
            return not value.isascii() and _HALF.search(value) is not None
        case list():
            return any(map(holds_half, value))
        case dict():
            return any(holds_half(key) or holds_half(one) for key, one in value.items())
        case _:
            return False


def _mend(value: Any) -> Any:
    match value:
        case str():
            return _HALF.sub("\ufffd", value)
        case list():
            return [_mend(one) for one in value]
        case dict():
            return {_mend(key): _mend(one) for key, one in value.items()}
        case _:
            return value


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
        cells = [None if value is None else [flat(one) for one in value] for value in values]
        return pa.chunked_array([pa.array(cells, pa.list_(pa.string()))])
    return pa.chunked_array([pa.array([flat(value) for value in values], pa.string())])
