"""Text files that appear whole or not at all. Knows nothing of what stands in them."""

from __future__ import annotations

import errno
import io
import os
import secrets
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from peft_combo.errors import PeftComboError

# --- reading ----------------------------------------------------------------------------------------------------------


def entries(folder: Path) -> tuple[str, ...]:
    """Names in a folder, sorted; none where it does not exist."""
    try:
        return tuple(sorted(os.listdir(folder)))
    except FileNotFoundError:
        return ()


def open_regular(path: Path) -> io.BufferedReader:
    """Open a plain file for reading: no link, and no pipe to wait on."""
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)
    return os.fdopen(_regular(path, flags), "rb")


def _regular(path: Path, flags: int) -> int:
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link, expected a plain file", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a plain file", str(path))
    return descriptor


def size_of(path: Path) -> int:
    """Bytes of the files in a folder and below, links not followed; of a file its own; 0 of what went meanwhile."""
    if not path.is_dir() or path.is_symlink():
        try:
            return path.lstat().st_size
        except FileNotFoundError:
            return 0
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):  # someone else is clearing it
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


# --- writing ----------------------------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> None:
    """Write a file and bring it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Put a file in place of what is there, in one step: readers see the old bytes or the new ones.

    Call it under the lock: what a writer that died left of its own attempt is cleared first.
    """
    folder = path.parent
    for name in entries(folder):
        if name.startswith("."):
            discard(folder / name)
    draft = folder / f".{secrets.token_hex(8)}"
    try:
        write(draft, content)
        os.replace(draft, path)
    except OSError:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    sync(folder)


def publish(path: Path, mode: int) -> None:
    """Bring a file the writer left to the disk, and give it the mode the folder has.

    safetensors makes its files readable by their owner alone, whatever the umask says; a server under another account
    has to read them too.
    """
    path.chmod(mode)
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Delete a file, a link or a folder with what is in it; what cannot be deleted stays."""
    # rmtree opens what it is given, and on a pipe it would wait there for ever.
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


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
