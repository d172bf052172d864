"""Text column of a Parquet file: read in blocks, so that a file of any size fits.

Owns nothing but the reading. An empty cell is an empty text: every row keeps its number.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_combo.errors import DataError, did_you_mean, make_printable
from peft_combo.files import literal_path


class TextColumn:
    """Texts of one column of a Parquet file, in its order: ``for texts in TextColumn(file, "title").blocks(10_000)``.

    Attributes:
        path: the file. column: the column. rows: how many texts it has.
    Raises:
        DataError: there is no such file, it is no Parquet file, or has no such column of texts.
    """

    def __init__(self, path: str | Path, column: str = "text") -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.column = literal_path(path), column
        try:
            self.path.stat()  # says in fewer words than Arrow that nothing is there
            with pq.ParquetFile(self.path) as file:
                self.rows = int(file.metadata.num_rows)
                schema = file.schema_arrow
        except (OSError, pa.ArrowException) as error:
            raise self._explain(error) from error
        known = {field.name: field.type for field in schema}
        if column not in known:
            raise DataError(
                f"{self._told} has no column {column!r}. Columns: {', '.join(map(make_printable, known))}. Name one "
                f"with --column. {did_you_mean(column, known)}".rstrip()
            )
        kind: Any = known[column]
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise DataError(
                f"{self._told}: column {column!r} holds {kind}, expected texts. Name another with --column."
            )

    def blocks(self, size: int) -> Iterator[list[str]]:
        """Read the texts, `size` at a time; the last block may be shorter.

        Raises:
            DataError: the file cannot be read on.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        held: list[str] = []
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=size, columns=[self.column]):
                    held += [text or "" for text in batch.column(0).to_pylist()]
                    while len(held) >= size:  # a batch ends where a row group does
                        yield held[:size]
                        held = held[size:]
        except (OSError, pa.ArrowException) as error:
            raise self._explain(error) from error
        if held:
            yield held

    @property
    def _told(self) -> str:
        return make_printable(str(self.path))

    def _explain(self, error: Exception) -> DataError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().split("\n")[0]
        return DataError(f"{self._told} cannot be read as a Parquet file: {reason}")
