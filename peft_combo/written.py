"""Text files that appear whole or not at all. Knows nothing of what stands in them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from peft_combo.errors import PeftComboError


def replace_text(path: Path, text: str) -> None:
    """Write UTF-8 text beside `path`, bring it to the disk, and put it in place by one rename; line ends stay.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Do as `replace_text`, and say what went wrong.

    Raises:
        PeftComboError: the folder cannot be written or the disk is full; what was there before stays.
    """
    try:
        replace_text(path, text)
    except OSError as error:
        raise PeftComboError(f"{path} cannot be written: {error.strerror or error}.") from error
