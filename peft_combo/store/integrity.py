"""Integrity checks of stored files: sha256, readable headers, no links out of the store; and the store's lock.

Owns what is refused on the disk, the lock, and how the system's refusals read. Knows nothing of categories, versions or
manifests' meaning.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from peft_combo.errors import StoreError, make_printable, shorten
from peft_combo.files import lock_file, open_regular
from peft_combo.store.manifest import FileEntry

DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO))

_LOCK = ".lock"
LOCK_WAIT = 30.0
"""Seconds; what is done under the lock takes milliseconds, so whoever holds it longer is stuck."""


def find_folder_problem(root: Path, relative: str) -> str:
    """Say what is wrong with a folder that is no folder, or that a link takes out of `root`; empty where it is fine."""
    folder = root / relative
    try:
        if not folder.resolve(strict=True).is_relative_to(root.resolve()):
            return "is a link that leads out of the store."
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, up to Python 3.12
        return "cannot be followed (a broken link, or a loop of links)."
    return "" if folder.is_dir() else "is a file, expected a folder."


def find_file_problem(path: Path, entry: FileEntry) -> str:
    """Say how a file differs from what the manifest says of it; empty where it does not."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.bytes:
                return f"was altered: expected {entry.bytes} bytes, found {size}."
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                return "was altered: its sha256 is not the one in the manifest."
    except FileNotFoundError:
        return "is missing."
    except OSError as error:
        return f"cannot be read ({error.strerror or error})."
    return ""


def find_content_problem(path: Path) -> str:
    """Say why a tensors or JSON file does not read; empty where it does. Only headers of tensors are looked at."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            return f"is not a readable safetensors file ({shorten(str(error))})."
    elif path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError, OSError) as error:
            return f"is not readable JSON ({shorten(str(error))})."
    return ""


@contextmanager
def hold_lock(store: Path, wait: float = LOCK_WAIT) -> Iterator[None]:
    """Hold the store's lock: one thread of one process at a time. The system takes it from a process that dies.

    Raises:
        StoreError: somebody else held it for `wait` seconds.
    """
    with ExitStack() as held:
        try:
            held.enter_context(lock_file(store / _LOCK, wait))
        except TimeoutError as error:
            raise StoreError(
                f"Another process has been changing {make_printable(str(store))}/ for {wait:g} seconds. Try again when "
                "it is done; if it is stuck, end it."
            ) from error
        yield


# --- how refusals read ------------------------------------------------------------------------------------------------


@contextmanager
def explain_os_errors(doing: str, store: Path) -> Iterator[None]:
    """Turn what the system says about the store's files into one readable line.

    Raises:
        StoreError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        raise describe_os_error(doing, store, error) from error


def describe_os_error(doing: str, store: Path, error: OSError) -> StoreError:
    """Return the readable form of the system's refusal."""
    elsewhere = "or name another store with --store FOLDER."
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            said = f"the disk is full. Free some space, {elsewhere}"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            said = f"permission denied ({error.strerror}). Change the permissions, {elsewhere}"
        case errno.EEXIST | errno.ENOTDIR:
            found = error.filename if isinstance(error.filename, str) else store
            said = f"expected a folder, found a file at {make_printable(str(found))}. Move it away, {elsewhere}"
        case _:
            said = f"{error.strerror or error}. Look after the disk, {elsewhere}"
    return StoreError(f"Cannot {doing} in {make_printable(str(store))}/: {said}")
