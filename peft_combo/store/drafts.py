"""Draft versions: written in a temporary folder and published by one atomic rename.

Owns the temporary folder, what may be in it, how it becomes the next version by one rename, and what a writer that died
left behind.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peft_combo.errors import Fault, StoreError, shorten
from peft_combo.files import (
    DRAFT,
    TRASH,
    discard,
    list_names,
    open_regular,
    rename_folder,
    seal_folder,
    sync_folder,
    write_through,
)
from peft_combo.store.integrity import (
    DISK_ERRORS,
    describe_os_error,
    explain_os_errors,
    find_content_problem,
    find_folder_problem,
)
from peft_combo.store.manifest import (
    CARD,
    FORMAT,
    MANIFEST,
    MANIFEST_LIMIT,
    FileEntry,
    JsonObject,
    Manifest,
    check_fields,
    find_name_problem,
    parse_manifest,
    validate_manifest,
)
from peft_combo.store.model_card import render_model_card
from peft_combo.store.versions import AdapterRecord, VersionFolders

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_ABANDONED = 24 * 3600.0  # seconds after which a draft of another machine, whose processes we cannot see, is cleared

_live_drafts: set[str] = set()  # of this process: a draft with our pid that is not here belongs to a dead namesake


@contextmanager
def open_draft(folders: VersionFolders, category: str) -> Iterator[Draft]:
    """Give a temporary folder inside the store; `draft.commit(fields)` makes it the next version.

    Leaving the block without a commit, or by an exception, removes the folder. Entering and leaving at once is
    the way to ask early whether the store can be written.

    Raises:
        StoreError: the name is not one, or the disk refuses.
    """
    doing = f"write an adapter for {category}"
    with explain_os_errors(doing, folders.path):
        folders.path.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # someone else's leftovers must not stop this writer
            clear_leftovers(folders.path)
        folder = folders.path / f"{DRAFT}{category}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}"
        _live_drafts.add(folder.name)
        try:
            folder.mkdir()
        except OSError:
            _live_drafts.discard(folder.name)
            raise
    draft = Draft(folders, category, folder)
    try:
        yield draft
    except Exception as error:
        # safetensors wraps the system's error in a type of its own, so its text has to be asked too.
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise describe_os_error(doing, folders.path, error) from error
        if "No space left on device" in str(error) and not isinstance(error, StoreError):
            raise describe_os_error(doing, folders.path, OSError(errno.ENOSPC, "No space left on device")) from error
        raise
    finally:
        draft.closed = True
        if draft.record is None:
            shutil.rmtree(folder, ignore_errors=True)
        _live_drafts.discard(folder.name)


class Draft:
    """A version being written: put files into `path`, then `commit`.

    Files lie flat in the folder; their names are letters, digits, `.`, `_` and `-`. `README.md` and `manifest.json`
    are the store's own: whatever a library writes under these names is replaced.
    """

    def __init__(self, folders: VersionFolders, category: str, path: Path) -> None:
        self.path = path
        self.category = category
        self.record: AdapterRecord | None = None
        self.closed = False
        self._folders = folders

    def commit(self, fields: Mapping[str, Any]) -> AdapterRecord:
        """Make the draft the next version of its category.

        Args:
            fields: the `Manifest` fields `method, stored_as, task, backbone, recipe, data, metrics, versions`. Plain
                values, numpy scalars and pydantic models; a number that is not finite is stored as null, because JSON
                has no word for it. Format, version, time and file list are the store's to say.
        Raises:
            StoreError: a field or file is missing or not allowed, or the disk refuses; nothing is visible then.
        """
        if self.record is not None:
            raise StoreError(f"This draft is stored already, as {self.record.reference}. Open another with writing().")
        if self.closed:
            raise StoreError("This draft is closed: commit inside the `with store.writing(...)` block.")
        folders, category = self._folders, self.category
        with explain_os_errors(f"write an adapter for {category}", folders.path):
            faults: list[Fault] = []
            listed = _list_draft(self.path, faults)
            said = check_fields(fields, category, faults)
            if faults:
                raise StoreError.from_faults(f"The adapter for {category} cannot be stored:", faults)
            for attempt in range(1000):
                version = folders.claim_next_number(category)
                manifest = self._seal(said, version, listed)
                folder = folders.folder(category, version)
                folder.parent.mkdir(exist_ok=True)
                if attempt == 0 and (problem := find_folder_problem(folders.path, category)):
                    raise StoreError(f"Cannot write {folder.parent}/: it {problem}")
                try:
                    placed = rename_folder(self.path, folder)  # False: someone put a folder under our number
                except FileNotFoundError:  # someone removed the emptied category between two lines
                    if not self.path.is_dir():
                        raise
                    continue
                if placed:
                    break
            else:
                raise StoreError(f"Cannot write an adapter for {category} in {folders.path}/: no free version number.")
        for parent in (folder.parent, folders.path):
            with suppress(OSError):  # the version is complete and visible; only its survival of a power cut is at stake
                sync_folder(parent)
        self.record = AdapterRecord(category, version, folder, manifest)
        return self.record

    def _seal(self, said: JsonObject, version: int, written: Mapping[str, FileEntry]) -> Manifest:
        """Write card and manifest for this number and bring all of it to the disk; the manifest is last."""
        values: dict[str, Any] = {
            **said,
            "format": FORMAT,
            "category": self.category,
            "version": version,
            "created": datetime.now(UTC).replace(microsecond=0),
        }
        without_card = validate_manifest({**values, "files": dict(written)}, self.category)
        card = render_model_card(without_card).encode()
        write_through(self.path / CARD, card)
        listed = {**written, CARD: FileEntry(sha256=hashlib.sha256(card).hexdigest(), bytes=len(card))}
        manifest = without_card.model_copy(update={"files": dict(sorted(listed.items()))})
        content = json.dumps(manifest.model_dump(mode="json"), indent=1, allow_nan=False).encode() + b"\n"
        if len(content) > MANIFEST_LIMIT:
            fault = Fault(
                MANIFEST, f"would have {len(content)} bytes, the limit is {MANIFEST_LIMIT}.", "Say less in it."
            )
            raise StoreError.from_faults(f"The adapter for {self.category} cannot be stored:", [fault])
        if parse_manifest(content) != (manifest, []):  # what is written must be what a reader gets
            raise StoreError(f"The adapter for {self.category} cannot be stored: its manifest does not read back.")
        seal_folder(self.path, (MANIFEST, content))
        return manifest


def _list_draft(folder: Path, faults: list[Fault]) -> dict[str, FileEntry]:
    """Size and digest of every file a writer put into its draft, the store's own two left out."""
    listed = {}
    for name in list_names(folder):
        path = folder / name
        if name in (CARD, MANIFEST) and path.is_file() and not path.is_symlink():
            path.unlink()
            continue
        problem = find_name_problem(name)
        if not problem and not stat.S_ISREG(path.lstat().st_mode):
            problem = "is not a plain file; an adapter is a flat folder of files."
        problem = problem or find_content_problem(path)
        if problem:
            faults.append(Fault(shorten(name), problem))
            continue
        with open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            listed[name] = FileEntry(sha256=digest, bytes=os.fstat(file.fileno()).st_size)
    if not listed and not faults:
        faults.append(Fault("files", "the draft is empty.", "Write the weights into draft.path before the commit."))
    return listed


def find_leftovers(store: Path) -> list[Path]:
    """Return what dead writers and interrupted removals left in a store."""
    found = (store / name for name in list_names(store))
    return [p for p in found if p.name.startswith(TRASH) or (p.name.startswith(DRAFT) and _is_stale(p))]


def clear_leftovers(store: Path) -> int:
    """Delete them; return how many went."""
    cleared = 0
    for leftover in find_leftovers(store):
        discard(leftover)
        cleared += not os.path.lexists(leftover)
    return cleared


def _is_stale(draft: Path) -> bool:
    """Whether the process that made a draft is gone."""
    parts = draft.name.removeprefix(DRAFT).split(".")
    if len(parts) == 4 and parts[1] == _HOST and parts[2].isascii() and parts[2].isdigit() and os.name != "nt":
        pid = int(parts[2][:9])
        if pid == os.getpid():
            return draft.name not in _live_drafts
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # alive, and not ours
            return False
        return False
    with suppress(OSError):
        return time.time() - draft.lstat().st_mtime > _ABANDONED
    return False
