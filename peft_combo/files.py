"""Atomic writes: files and folders that appear whole, on the disk, by one rename, or not at all.

The only writer of the package. Whatever a user would miss is brought to the disk before it gets its name, and the
folder it stands in after. Knows nothing of what stands in a file.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock

from peft_combo.errors import PeftComboError, make_printable

DRAFT, TRASH = ".draft-", ".trash-"
"""How the names begin of what is being written, and of what was taken out of sight; readers pass over both."""

_ATTEMPTS = 5  # another writer may take a name between two of our steps; so often in a row it does not

# --- reading ----------------------------------------------------------------------------------------------------------


def literal_path(name: str | Path) -> Path:
    """Return a path as it is named; ~ at its start is the home folder, unless something is there that is called so."""
    path = Path(name)
    with suppress(RuntimeError, OSError, ValueError):  # ~x of no user x; a name too long, or with a NUL
        if str(name).startswith("~") and not path.exists():
            return path.expanduser()
    return path


def list_names(folder: Path) -> tuple[str, ...]:
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
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link, expected a plain file", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a plain file", str(path))
    return os.fdopen(descriptor, "rb")


def measure_size(path: Path) -> int:
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


# --- what is shipped --------------------------------------------------------------------------------------------------


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def list_shipped_recipes() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(file.stem for file in recipes_folder().glob("*.yaml"))


def cache_folder() -> Path:
    """Return this user's folder of what can be made again: $PEFT_COMBO_CACHE, or peft-combo in the system's own."""
    named = os.environ.get("PEFT_COMBO_CACHE")
    if named:
        return literal_path(named)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache").expanduser()) / "peft-combo"


# --- locking ----------------------------------------------------------------------------------------------------------


@contextmanager
def lock_file(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file: one thread of one process at a time. The system takes it from a process that dies.

    Args:
        wait: seconds to wait for it.
    Raises:
        TimeoutError: somebody else held it all that time.
        OSError: the disk refuses.
    """
    lock = FileLock(path, timeout=wait, poll_interval=0.005)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


# --- asking before a long job -----------------------------------------------------------------------------------------


def check_file_target(path: Path) -> Path:
    """Return a path that a file can be written to: its folder is there or can be made, and takes files.

    Raises:
        PeftComboError: it is a folder, or the disk refuses; nothing is left there.
    """
    with _refuse_target(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder, expected a file", str(path))
        _try_folder(path.parent)
    return path


def check_folder_target(path: Path) -> Path:
    """Return a path that is a folder which takes files, or can become one.

    Raises:
        PeftComboError: it is no folder, or the disk refuses; nothing is left there.
    """
    with _refuse_target(path):
        _try_folder(path)
    return path


@contextmanager
def _refuse_target(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name, reason = make_printable(str(path)), error.strerror or error
        raise PeftComboError(f"{name} cannot be written: {reason}. Name another.") from error


def _try_folder(folder: Path) -> None:
    there = next(one for one in (folder, *folder.parents) if one == one.parent or os.path.lexists(one))
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{make_printable(str(there))} is no folder", str(there))
    with tempfile.TemporaryFile(dir=there):
        pass


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to be written; it takes its name when the block ends, in place of what was there.

    Readers see the old bytes or the new ones. Where the block raises, nothing is left and the old file stays.

    Raises:
        OSError: the disk refuses.
    """
    draft = _name_draft(path)
    try:
        with draft.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as `atomic_file` does, its line ends as they are, and say what went wrong; makes the folder.

    Raises:
        PeftComboError: the folder cannot be written or the disk is full; what was there before stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as stream:
            stream.write(text.encode())
    except OSError as error:
        raise PeftComboError(f"{path} cannot be written: {error.strerror or error}.") from error


@dataclass
class StagedFolder:
    """A folder being written: put files into `path`.

    Attributes:
        manifest: name and content of the file to be written after all others, so that who sees it sees a whole folder.
    """

    path: Path
    manifest: tuple[str, bytes] | None = None


@contextmanager
def stage_folder(
    path: Path, *, replace: bool | Callable[[], bool] = False, missed: bool = True
) -> Iterator[StagedFolder]:
    """Give a temporary folder beside `path` that takes its name when the block ends, or goes where the block raises.

    Args:
        path: the folder to be; its parents are made. An empty folder may be there.
        replace: whether a folder that is there then makes room as a whole; a function is asked at that moment.
        missed: False for a cache: what is checked as it is read, and made again, need not survive a power cut.
    Raises:
        FileExistsError: something is there and stays.
        OSError: the disk refuses.
    """
    staged = StagedFolder(_name_draft(path))
    staged.path.mkdir(parents=True)
    try:
        yield staged
        if missed:
            seal_folder(staged.path, staged.manifest)
        elif staged.manifest is not None:
            (staged.path / staged.manifest[0]).write_bytes(staged.manifest[1])
        _put_in_place(staged.path, path, replace)
    finally:
        shutil.rmtree(staged.path, ignore_errors=True)
    if missed:
        with suppress(OSError):  # whole and visible; only its survival of a power cut is at stake
            sync_folder(path.parent)


def seal_folder(folder: Path, manifest: tuple[str, bytes] | None = None) -> None:
    """Bring every file below a folder to the disk, then the manifest, then the folder's names.

    Files get the mode the folder has: safetensors makes its files readable by their owner alone, whatever the umask
    says; a server under another account has to read them too.
    """
    mode = folder.stat().st_mode & 0o666
    for place, _, names in os.walk(folder, topdown=False):
        for path in (Path(place) / name for name in names):
            path.chmod(mode)
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        if manifest is not None and Path(place) == folder:
            write_through(folder / manifest[0], manifest[1])
        sync_folder(Path(place))


def _put_in_place(draft: Path, path: Path, replace: bool | Callable[[], bool]) -> None:
    for _ in range(_ATTEMPTS):
        if rename_folder(draft, path):
            return
        if not (replace() if callable(replace) else replace):
            break
        try:
            old = move_aside(path)
        except FileNotFoundError:
            continue
        try:
            placed = rename_folder(draft, path)
        except OSError:
            with suppress(OSError):
                os.rename(old, path)
            raise
        discard(old)
        if placed:
            return
    raise FileExistsError(errno.EEXIST, "it is there already", str(path))


def rename_folder(draft: Path, path: Path) -> bool:
    """Give a folder its name; False where something has it already.

    Raises:
        OSError: the disk refuses.
    """
    try:
        os.rename(draft, path)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) and os.path.lexists(path):
            return False
        raise
    return True


def move_aside(path: Path, folder: Path | None = None) -> Path:
    """Rename something out of sight, beside itself or into `folder`; return where it can be deleted."""
    trash = (path.parent if folder is None else folder) / f"{TRASH}{secrets.token_hex(8)}"
    os.rename(path, trash)
    return trash


def _name_draft(path: Path) -> Path:
    return path.with_name(f"{DRAFT}{path.name}.{os.getpid()}.{secrets.token_hex(4)}")


def write_through(path: Path, content: bytes) -> None:
    """Write a file nobody sees yet and bring it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
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
