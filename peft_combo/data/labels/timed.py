"""Texts or labels with the time of each: what a watch over opinion reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.readers.forms import table_at
from peft_combo.data.readers.tables import name_columns, read_table
from peft_combo.errors import DataError, Fault
from peft_combo.files import literal_path


@dataclass(frozen=True, eq=False)
class TimedCells:
    """Texts or labels, and (M,) when each was written, seconds since 1970-01-01 UTC."""

    cells: tuple[str, ...]
    times: NDArray[np.float64]


def read_timed(file: Path, column: Literal["text", "label"]) -> TimedCells:
    """Read a table with a column and a timestamp, as CSV, Parquet or JSON Lines.

    Raises:
        DataError: it is not there, or has faults; all of them are in the message.
    """
    path = literal_path(file)
    faults: list[Fault] = []
    if not path.exists():
        raise DataError(f"Expected a table of {column} and timestamp; there is no {file}.")
    files = table_at(path, "labels", faults)
    read = None if files is None else read_table(files, faults, [])
    table = None if read is None else name_columns(read, "labels", {}, (column, "timestamp"), ())
    if table is not None:
        cells, times = table.strings(column), table.times("timestamp")
        for name, missing in ((column, [not cell for cell in cells]), ("timestamp", np.isnan(times))):
            table.blame(np.flatnonzero(missing), f"{name} is empty.", "Write it, or drop the row.")
    if faults or table is None:
        raise DataError.from_faults(f"The texts in {file} cannot be watched:", faults)
    return TimedCells(tuple(cells), times)
