"""Where the bytes of a picture lie: a file in the data folder, a cell of a table, or a drawing of the demo.

Owns what a path may be, so that no table reaches beyond its folder, and the reading of bytes. Decodes nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

from peft_combo.errors import DataError, Fault, shorten
from peft_combo.files import open_regular

MOST_BYTES = 64 * 2**20
"""Of a file; a photograph of a shop has some 100 kB."""

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:")


class Picture(Protocol):
    """A picture that was not looked at yet."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def key(self) -> str:
        """What the digest of a dataset takes it for, without reading a file."""

    def read(self) -> bytes:
        """Return its bytes as they are stored.

        Raises:
            OSError: they cannot be read. ValueError: they are too many, or the path leads out of the folder.
        """


@dataclass(frozen=True)
class PictureFile:
    """A file below the data folder, by its path there."""

    folder: Path
    path: str

    @property
    def name(self) -> str:
        return self.path

    @property
    def key(self) -> str:
        return self.path

    def read(self) -> bytes:
        # Looked at again: since the table was read, a link may have been put in its place.
        home = self.folder.resolve()
        file = (home / self.path).resolve()
        if not file.is_relative_to(home):
            raise ValueError("leads out of the data folder")
        with open_regular(file) as opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"is larger than {MOST_BYTES // 2**20} MiB")
        return content


@dataclass(frozen=True)
class PictureBytes:
    """A cell of a table that holds the picture itself."""

    name: str
    content: bytes

    @cached_property
    def key(self) -> str:
        return "sha256 " + hashlib.sha256(self.content).hexdigest()

    def read(self) -> bytes:
        return self.content


def find_path_problem(path: str) -> str:
    """Say why a text cannot be the path of a picture in a data folder; "" where it can. No file is looked at."""
    if _URL.match(path) or path.startswith(("//", "\\\\")):
        return "is an address, and pictures are never fetched"
    if "\x00" in path:
        return "has a character that no file name has"
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute() or PureWindowsPath(path).drive:
        return "is not relative to the data folder"
    if ".." in PurePosixPath(path).parts or ".." in PureWindowsPath(path).parts:
        return "leads out of the data folder"
    return ""


def read_pictures(pictures: Sequence[Picture | None], dataset: str) -> list[bytes | None]:
    """Return the bytes of every picture, None for an item without one.

    Args:
        dataset: its name, for messages.
    Raises:
        DataError: a picture cannot be read; the first ones are named.
    """
    contents: list[bytes | None] = []
    faults: list[Fault] = []
    for picture in pictures:
        content = None
        if picture is not None:
            try:
                content = picture.read()
            except (OSError, ValueError) as error:
                faults.append(Fault(shorten(picture.name), f"{explain_failure(error)}."))
        contents.append(content)
    if faults:
        raise DataError.from_faults(f"Pictures of {dataset} cannot be read:", faults, limit=20)
    return contents


def explain_failure(error: Exception) -> str:
    """Return why bytes cannot be had, without a path of this machine."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError):
        return (error.strerror or "cannot be read").lower()
    return str(error)
