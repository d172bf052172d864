"""Files of a table: CSV, TSV, Parquet or JSON, compressed or not, one file or a folder of parts as Spark writes them.

Owns which names are tables, what lies beside them unread, and the bytes of a file. Every name is taken as it is: none
is a pattern, an address or an archive member. Knows nothing of columns.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from peft_combo.errors import Fault, make_printable, nearest

FORMATS = {
    ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
READ = ".csv, .tsv, .parquet, .jsonl or .json, also compressed (.gz, .bz2, .xz, .zst) or as a folder of parts"
# What other formats and archives end in: told where they stand in a table's place.
_OTHER_ENDINGS = (
    ".xlsx", ".xls", ".ods", ".txt", ".dat", ".tab", ".feather", ".arrow", ".orc", ".avro", ".zip", ".tar", ".7z",
    ".rar", ".pkl", ".pickle", ".h5", ".hdf", ".sqlite", ".db", ".xml", ".yaml", ".yml", ".dta", ".sas7bdat", ".rds",
)  # fmt: skip
# Formats of tables whose folder holds files that no longer count, and where that is written.
_LEDGERS = {"_delta_log": "Delta", ".hoodie": "Hudi", "metadata": "Iceberg"}
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class Part:
    """One file of a table.

    Attributes:
        label: what messages call it, with "/": ``bundles.parquet/part-0.parquet``.
        format: csv, tsv, parquet or json.
        compression: gzip, bz2, xz, zstd or none.
        partition: columns that stand in the names of its folders (Hive), with the cell; None where it is empty.
    """

    path: Path
    label: str
    format: str
    compression: str
    partition: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True)
class TableFiles:
    """Where a table stands: its kind (items, bundles, ...), its name for messages, and its parts, all of one format."""

    kind: str
    name: str
    parts: tuple[Part, ...]


class FileError(Exception):
    """A file cannot be read; `problem` and `remedy` are those of a fault."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


def split_name(name: str) -> tuple[str, str, str] | None:
    """Return stem, format and compression of a table's file name, however it is cased; None for any other file."""
    stem, ending = os.path.splitext(name)
    compression = COMPRESSIONS.get(ending.lower(), "none")
    if compression != "none":
        stem, ending = os.path.splitext(stem)
    kind = FORMATS.get(ending.lower())
    return None if kind is None else (stem, kind, compression)


def find_table(folder: Path, name: str, faults: list[Fault]) -> TableFiles | None:
    """Return where table `name` stands in `folder`, or None; a fault where it stands there several times."""
    present = [entry for entry in _entries(folder) if _stands_for(entry, name)]
    if len(present) > 1:
        names = " and ".join(f"{one.name}/" if one.is_dir() else one.name for one in present)
        faults.append(Fault(name, f"{names} exist; expected one.", "Remove all but one."))
    return table_at(present[0], name, faults) if present else None


def table_at(path: Path, kind: str, faults: list[Fault]) -> TableFiles | None:
    """Return the table of a kind that one file or folder of parts is; None, with a fault, where it is none."""
    name = make_printable(path.name)
    if not path.is_dir():
        split = split_name(path.name)
        if split is None:
            faults.append(Fault(name, "is no table.", f"Expected {READ}."))
            return None
        return TableFiles(kind, name, (Part(path, name, split[1], split[2]),))
    for ledger, product in _LEDGERS.items():
        if (path / ledger).is_dir():
            faults.append(
                Fault(
                    f"{name}/",
                    f"is a table of {product}: which of its files count is written in {ledger}.",
                    "Write it out as plain Parquet, and give that.",
                )
            )
            return None
    parts, others = _parts_below(path, name)
    if not parts:
        held = f"holds {', '.join(others[:5])}" if others else "is empty"
        faults.append(Fault(f"{name}/", f"{held}; expected the parts of a table.", f"A part is {READ}."))
    elif others:
        faults.append(
            Fault(
                f"{name}/",
                f"holds beside its parts {', '.join(others[:5])}, which cannot be read.",
                f"A part is {READ}; what starts with _ or . is left out.",
            )
        )
    elif len({part.format for part in parts}) > 1:
        formats = ", ".join(sorted({part.format for part in parts}))
        faults.append(Fault(f"{name}/", f"holds parts of several formats: {formats}.", "Keep those of one."))
    else:
        return TableFiles(kind, name, tuple(parts))
    return None


def holds_table(folder: Path, names: Iterable[str]) -> bool:
    """Say whether a folder holds one of the tables, in any form."""
    return any(_stands_for(entry, name) for entry in _entries(folder) for name in names)


def find_strays(
    folder: Path, tables: Mapping[str, TableFiles | None], known: Iterable[str], faults: list[Fault], notes: list[str]
) -> None:
    """Tell what lies beside the tables and is not read: a fault where it seems to be a table that is not there.

    Args:
        tables: of every table's name where it stands; None where it does not.
        known: names of tables that others read.
    """
    absent = [name for name, files in tables.items() if files is None]
    unread = []
    for entry in _entries(folder):
        if any(_stands_for(entry, name) for name in (*tables, *known)):
            continue
        shown = make_printable(entry.name) + ("/" if entry.is_dir() else "")
        stem = entry.name.split(".")[0].lower().replace("-", "_").replace(" ", "_")
        split = split_name(entry.name)
        if entry.is_dir() and split is None:
            continue
        endings = [ending for ending in _OTHER_ENDINGS if entry.name.lower().endswith(ending)]
        meant = stem if stem in tables else nearest(stem, tables, cutoff=0.8)
        if split is None and not (endings and stem in tables):
            continue
        if meant in absent:
            problem = f"is not read; expected {meant}.csv (or {READ})."
            remedy = f"Save it as {meant}.csv." if split is None else f"Rename it to {meant}{''.join(entry.suffixes)}"
            remedy = remedy if split is None else f"{remedy}, or move it out of the folder."
            faults.append(Fault(shown, problem, remedy))
        else:
            unread.append(shown)
    if unread:
        notes.append(f"not read, since no table is called so: {', '.join(unread)}")


def read_bytes(part: Part) -> bytes:
    """Return the bytes of a part, unpacked.

    Raises:
        FileError: it cannot be read or unpacked.
    """
    try:
        raw = part.path.read_bytes()
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror or error}.") from error
    compression = "gzip" if raw.startswith(b"\x1f\x8b") else part.compression
    if compression == "none":
        return raw
    try:
        return _unpack(raw, compression)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise FileError(f"cannot be unpacked as {compression}: {reason}.", "Write the file again.") from error


def _unpack(raw: bytes, compression: str) -> bytes:
    import bz2
    import gzip
    import lzma

    import pyarrow as pa

    match compression:
        case "gzip":
            return gzip.decompress(raw)
        case "bz2":
            return bz2.decompress(raw)
        case "xz":
            try:
                return lzma.decompress(raw)
            except lzma.LZMAError as error:
                raise ValueError(str(error)) from error
        case _:
            with pa.CompressedInputStream(pa.BufferReader(raw), compression) as stream:
                return bytes(stream.read())


def _entries(folder: Path) -> list[Path]:
    """Return what lies in a folder in the order of its names, but for what is hidden; nothing where it is not there."""
    try:
        return sorted(one for one in folder.iterdir() if not one.name.startswith((".", "_")))
    except OSError:
        return []


def _stands_for(entry: Path, name: str) -> bool:
    split = split_name(entry.name)
    if entry.is_dir():
        if split is not None:
            return split[0].lower() == name
        # A folder without ending may be anything, such as pictures: it is a table where it holds parts.
        return entry.name.lower() == name and bool(_parts_below(entry, entry.name)[0])
    return split is not None and split[0].lower() == name and entry.is_file()


def _parts_below(folder: Path, name: str) -> tuple[list[Part], list[str]]:
    """Return the parts in a folder and below it, in the order of their names, and the files that are none."""
    parts: list[Part] = []
    others: list[str] = []
    for below, folders, files in os.walk(folder):
        folders[:] = sorted(one for one in folders if not one.startswith((".", "_")))
        inner = Path(below).relative_to(folder)
        partition = tuple(
            (key, None if value == _NO_VALUE else unquote(value))
            for key, sign, value in (piece.partition("=") for piece in inner.parts)
            if sign
        )
        for file in sorted(one for one in files if not one.startswith((".", "_"))):
            split = split_name(file)
            label = make_printable((Path(name) / inner / file).as_posix())
            if split is None:
                others.append(label)
            else:
                parts.append(Part(Path(below) / file, label, split[1], split[2], partition))
    return parts, others
