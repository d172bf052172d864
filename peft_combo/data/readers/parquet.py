"""Reader of Parquet into Arrow columns.

Owns what can go wrong in the file itself. What its types mean is for whoever reads a column.
"""

from __future__ import annotations

from typing import Any

from peft_combo.data.readers.forms import FileError
from peft_combo.errors import shorten


def read_parquet(raw: bytes) -> tuple[dict[str, Any], int]:
    """Return the columns of a Parquet file as Arrow arrays, and how many rows they have.

    Columns are decoded one by one, so that one which cannot be costs only itself: it is None.

    Raises:
        FileError: the bytes are no Parquet, or broken.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if raw.startswith(b"version https://git-lfs"):
        raise FileError("is a pointer of Git LFS, not the file itself.", "Fetch it with: git lfs pull.")
    try:
        file = pq.ParquetFile(pa.BufferReader(raw))
        names, rows = file.schema_arrow.names, int(file.metadata.num_rows)
    except Exception as error:  # what is damaged fails anywhere in the library
        raise FileError(f"cannot be read as Parquet: {first_line(error)}", "Write the file again.") from error
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise FileError(f"names {', '.join(map(repr, repeated))} more than once.", "Rename one.")
    columns: dict[str, Any] = {}
    for name in names:
        try:
            table = file.read([name])
            array = table.column(name)
            array.validate(full=True)
        except Exception as error:
            columns[name] = Unreadable(first_line(error))
        else:
            if len(array) != rows:
                raise FileError(f"is damaged: {name!r} has {len(array):,} rows of {rows:,}.", "Write the file again.")
            columns[name] = array
    return {name: array for name, array in columns.items() if not name.startswith("__index_level_")}, rows


class Unreadable(str):
    """Stands for a column that cannot be read: why."""


def first_line(error: BaseException) -> str:
    """Return what a library says, in one line that ends in a full stop."""
    return f"{shorten(' '.join(str(error).split()), 200).rstrip('.')}."
