"""The adapter store: a folder of tuned adapters, versioned per category.

Owns where adapters lie, what they are called, what their manifest says and whether their bytes are still the ones that
were written. Knows files and names; knows nothing of torch, of PEFT or of what the weights mean.

    adapters/
      fashion/v1/  adapter_config.json  adapter_model.safetensors  head.safetensors  README.md  manifest.json
      fashion/v2/  ...
      .taken/      one empty file per version number ever handed out, so that no number is used twice
      .draft-*     a version that is being written; readers do not see it

A version appears by one rename, after its manifest was written last and everything reached the disk. So whoever sees
`manifest.json` sees a complete version, and a writer that dies leaves nothing but a draft for the next writer to clear.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from peft_combo.errors import Fault, StoreError, did_you_mean, nearest
from peft_combo.manifest import (
    CARD,
    FORMAT,
    MANIFEST,
    MANIFEST_LIMIT,
    BackboneStamp,
    DataStamp,
    FileEntry,
    JsonObject,
    Manifest,
    model_card,
    name_problem,
    parse_manifest,
    said_by_writer,
    shown,
    validated_manifest,
)

__all__ = [
    "AdapterRecord",
    "AdapterStore",
    "BackboneStamp",
    "DataStamp",
    "Draft",
    "Manifest",
    "Reference",
    "model_card",
    "parse_reference",
]

_CATEGORY = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_REFERENCE = re.compile(r"([a-z0-9][a-z0-9_-]{0,63})(?:@([a-z0-9][a-z0-9._-]{0,63}))?")
_VERSION = re.compile(r"v([1-9][0-9]{0,8})")
_TAKEN = ".taken"
_DRAFT = ".draft-"
_TRASH = ".trash-"
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_ABANDONED = 24 * 3600.0  # seconds after which a draft of another machine, whose processes we cannot see, is cleared

_live_drafts: set[str] = set()  # of this process: a draft with our pid that is not here belongs to a dead namesake


class Reference(NamedTuple):
    """A category and the version wanted of it; None is the latest."""

    category: str
    version: int | None


@dataclass(frozen=True)
class AdapterRecord:
    """One stored version. `AdapterStore.open` hands it out after checking every byte."""

    category: str
    version: int
    path: Path
    manifest: Manifest

    @property
    def reference(self) -> str:
        return f"{self.category}@v{self.version}"

    @property
    def digest(self) -> str:
        """Identity of the artefact: sha256 over names, sizes and digests of its files.

        The model card is one of them and states pooling, length and data, so two artefacts that encode differently
        have different digests; whatever was computed with an adapter can be cached under this.
        """
        files = {name: entry.model_dump() for name, entry in self.manifest.files.items()}
        return hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def file(self, name: str) -> Path:
        """Return the path of a listed file.

        Raises:
            StoreError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            hint = did_you_mean(name, self.manifest.files)
            stored = ", ".join(sorted(self.manifest.files))
            raise StoreError(f'Adapter {self.reference} has no file "{shown(name)}". Stored: {stored}.{_spaced(hint)}')
        return self.path / name

    def read(self, name: str) -> bytes:
        """Return the bytes of a listed file, checked again against the manifest as they are read.

        Raises:
            StoreError: the manifest does not list the file, or it has changed since.
        """
        path, entry = self.file(name), self.manifest.files[name]
        with _explained(f"read {name} of {self.reference}", self.path), _open_regular(path) as file:
            content = file.read(entry.bytes + 1)
        if len(content) != entry.bytes or hashlib.sha256(content).hexdigest() != entry.sha256:
            raise StoreError(_unusable(self.reference, self.path, Fault(name, "was altered since it was stored.")))
        return content

    def check_backbone(self, fingerprint: str, model: str) -> None:
        """Refuse an encoder other than the one this adapter was tuned on.

        PEFT loads an adapter onto any base of the same shape without a word, and answers wrongly ever after.

        Raises:
            StoreError: the fingerprints differ.
        """
        stamp = self.manifest.backbone
        if fingerprint == stamp.fingerprint:
            return
        raise StoreError(
            f"Adapter {self.reference} was tuned on {shown(stamp.model)} (fingerprint {_short(stamp.fingerprint)}), "
            f"the loaded backbone is {shown(model)} (fingerprint {_short(fingerprint)}). Load {shown(stamp.model)}, "
            f"or tune {self.category} again on {shown(model)}."
        )


# --- the store --------------------------------------------------------------------------------------------------------


class AdapterStore:
    """A folder of adapters: `store.open("fashion")`, `with store.writing("fashion") as draft: ...`.

    Making one touches nothing; the folder is created by the first write. Every method raises `StoreError` with one
    readable text where names, files or the disk do not allow what was asked.
    """

    def __init__(self, path: str | Path = "adapters") -> None:
        if "\0" in str(path):
            raise StoreError("The path of an adapter store cannot contain a NUL character.")
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"AdapterStore({str(self.path)!r})"

    # reading

    def open(self, reference: str) -> AdapterRecord:
        """Find one version and check its manifest and every listed file against the bytes on disk.

        Args:
            reference: `fashion` for the latest version, `fashion@v2` for one version.
        Raises:
            StoreError: no such category or version, or the version is incomplete, altered or from a newer format.
        """
        category, version = self._find(reference)
        with _explained(f"read {category}@v{version}", self.path):
            manifest, faults = self._inspect(category, version)
        if manifest is None or faults:
            raise self._unusable(f"{category}@v{version}", faults)
        return AdapterRecord(category, version, self._folder(category, version), manifest)

    def categories(self) -> tuple[str, ...]:
        """Return the categories that have at least one complete version, sorted."""
        with _explained("read", self.path):
            return tuple(name for name in _entries(self.path) if _CATEGORY.fullmatch(name) and self._complete(name))

    def versions(self, category: str) -> tuple[int, ...]:
        """Return the complete versions of a category, oldest first; none for a category that is not stored."""
        _check_category(category)
        with _explained("read", self.path):
            return self._complete(category)

    def latest(self, category: str) -> int:
        """Return the newest complete version of a category.

        Raises:
            StoreError: the category is not stored.
        """
        return self._find(_check_category(category))[1]

    # writing

    @contextmanager
    def writing(self, category: str) -> Iterator[Draft]:
        """Give a temporary folder inside the store; `draft.commit(fields)` makes it the next version.

        Leaving the block without a commit, or by an exception, removes the folder. Entering and leaving at once is
        the way to ask early whether the store can be written.

        Raises:
            StoreError: the name is not one, or the disk refuses.
        """
        _check_category(category)
        doing = f"write an adapter for {category}"
        with _explained(doing, self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # someone else's leftovers must not stop this writer
                self._clear_leftovers()
            folder = self.path / f"{_DRAFT}{category}.{_HOST}.{os.getpid()}.{secrets.token_hex(4)}"
            _live_drafts.add(folder.name)
            try:
                folder.mkdir()
            except OSError:
                _live_drafts.discard(folder.name)
                raise
        draft = Draft(self, category, folder)
        try:
            yield draft
        except Exception as error:
            # safetensors wraps the system's error in a type of its own, so its text has to be asked too.
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise _refusal(doing, self.path, error) from error
            if "No space left on device" in str(error) and not isinstance(error, StoreError):
                raise _refusal(doing, self.path, OSError(errno.ENOSPC, "No space left on device")) from error
            raise
        finally:
            draft.closed = True
            if draft.record is None:
                shutil.rmtree(folder, ignore_errors=True)
            _live_drafts.discard(folder.name)

    def remove(self, reference: str, *, all: bool = False) -> tuple[str, ...]:
        """Take one version out (`fashion@v2`), or a whole category (`fashion`, `all=True`), whole or broken.

        The folder is renamed out of sight first, so readers see it entire or not at all. Its numbers stay taken.

        Returns:
            The references that went.
        Raises:
            StoreError: nothing such is stored, or the form does not say how much is meant.
        """
        category, selector = _split(reference)
        if selector is None and not all:
            raise StoreError(
                f'"{category}" names every version of the category. '
                f"Name one to remove ({category}@v1), or remove all versions with --all (in Python: all=True)."
            )
        if selector is not None and all:
            raise StoreError(f'"{reference}" names one version, so it cannot go with --all; name the category alone.')
        with _explained(f"remove {reference}", self.path):
            present = self._present(category)
            if not present:
                raise self._unknown_category(category)
            if selector is None:
                gone, target = present, self.path / category
            else:
                version = _version_number(selector)
                if version is None or version not in present:
                    raise self._unknown_version(category, selector, present)
                if problem := self._outside(category):
                    raise StoreError(f"Cannot remove {reference}: {self.path / category} {problem}")
                gone, target = (version,), self._folder(category, version)
            self._take(category, max(gone))  # a version that was copied in by hand never took its number
            trash = self.path / f"{_TRASH}{secrets.token_hex(8)}"
            os.rename(target, trash)
            _discard(trash)
            if selector is not None:
                with suppress(OSError):  # not empty, or a writer was quicker: either way it stays
                    (self.path / category).rmdir()
        return tuple(f"{category}@v{version}" for version in gone)

    def clean(self) -> int:
        """Remove what dead writers and interrupted removals left behind; return how many folders went."""
        with _explained("clean", self.path):
            return self._clear_leftovers()

    # checking

    def verify(self, reference: str | None = None) -> list[Fault]:
        """Return everything that is wrong with one version, one category or (None) the whole store.

        More is looked at than `open` needs: files nobody listed, tensors files whose header does not read, folders
        that are not adapters. A category alone means all its versions.

        Raises:
            StoreError: the reference names nothing that is stored.
        """
        with _explained("verify", self.path):
            if reference is None:
                return self._verify_store()
            category, selector = _split(reference)
            present = self._present(category)
            if not present:
                raise self._unknown_category(category)
            if selector is None:
                return self._verify_category(category)
            version = _version_number(selector)
            if version is None or version not in present:
                raise self._unknown_version(category, selector, present)
            return self._verify_version(category, version)

    def _verify_store(self) -> list[Fault]:
        faults: list[Fault] = []
        for name in _entries(self.path):
            if name.startswith(".") or name == CARD:
                continue
            if not _CATEGORY.fullmatch(name) or not (self.path / name).is_dir():
                faults.append(Fault(shown(name), "is not the folder of a category.", "Move it out of the store."))
            else:
                faults += self._verify_category(name)
        return faults

    def _verify_category(self, category: str) -> list[Fault]:
        if problem := self._outside(category):
            return [Fault(category, problem)]
        faults: list[Fault] = []
        for name in _entries(self.path / category):
            if name.startswith("."):
                continue
            if match := _VERSION.fullmatch(name):
                faults += self._verify_version(category, int(match[1]))
            else:
                where = f"{category}/{shown(name)}"
                faults.append(Fault(where, "is not a version (v1, v2, ...).", "Move it out of the store."))
        return faults

    def _verify_version(self, category: str, version: int) -> list[Fault]:
        manifest, faults = self._inspect(category, version)
        folder, reference = self._folder(category, version), f"{category}@v{version}"
        if manifest is not None:
            bad = {fault.where for fault in faults}
            for name in manifest.files:
                if name not in bad and (problem := _content_problem(folder / name)):
                    faults.append(Fault(name, problem, "It was stored like this; tune again."))
            for name in _entries(folder):
                if name != MANIFEST and name not in manifest.files:
                    faults.append(Fault(shown(name), "is not listed in the manifest.", "Nobody reads it; delete it."))
        return [Fault(f"{reference}: {fault.where}", fault.problem, fault.remedy) for fault in faults]

    def _inspect(self, category: str, version: int) -> tuple[Manifest | None, list[Fault]]:
        """Read a manifest and compare its files with the disk: what `open` refuses and `verify` reports."""
        folder = self._folder(category, version)
        if problem := self._outside(f"{category}/v{version}"):
            return None, [Fault(folder.name, problem)]
        manifest, faults = _read_manifest(folder / MANIFEST)
        if manifest is None:
            return None, faults
        if (manifest.category, manifest.version) != (category, version):
            problem = f"was written as {manifest.reference}."
            faults.append(Fault(MANIFEST, problem, "Give the folder its old name back, or tune again."))
        for name, entry in manifest.files.items():
            if problem := _file_problem(folder / name, entry):
                faults.append(Fault(name, problem, "Restore it from a copy, or tune again."))
        return manifest, faults

    # names and numbers

    def _find(self, reference: str) -> tuple[str, int]:
        """Turn a reference into a category and a version that is there."""
        category, selector = _split(reference)
        with _explained(f"read {reference}", self.path):
            complete = self._complete(category)
            if selector is None:
                if not complete:
                    raise self._unknown_category(category)
                return category, complete[-1]
            # Asked for by number, an incomplete version is found too, so that the answer says what it lacks.
            present = self._present(category)
            version = _version_number(selector)
            if not present:
                raise self._unknown_category(category)
            if version is None or version not in present:
                raise self._unknown_version(category, selector, complete or present)
            return category, version

    def _folder(self, category: str, version: int) -> Path:
        return self.path / category / f"v{version}"

    def _present(self, category: str) -> tuple[int, ...]:
        """Every number in use by a folder entry, complete or not, ascending."""
        try:
            names = _entries(self.path / category)
        except NotADirectoryError:  # a stray file under the name of a category
            return ()
        return tuple(sorted(int(match[1]) for name in names if (match := _VERSION.fullmatch(name))))

    def _complete(self, category: str) -> tuple[int, ...]:
        return tuple(
            version for version in self._present(category) if (self._folder(category, version) / MANIFEST).exists()
        )

    def _outside(self, relative: str) -> str:
        """Say what is wrong with a folder that is no folder, or that a link takes out of the store."""
        folder = self.path / relative
        try:
            if not folder.resolve(strict=True).is_relative_to(self.path.resolve()):
                return "is a link that leads out of the store."
        except (OSError, RuntimeError):  # RuntimeError: a loop of links, up to Python 3.12
            return "cannot be followed (a broken link, or a loop of links)."
        return "" if folder.is_dir() else "is a file, expected a folder."

    def _next_number(self, category: str) -> int:
        """Claim a number that nobody has had: making a file is the one step only one process can win.

        A counter that is read, raised and written back hands the same number out twice when two writers and a removal
        interleave. Where the claims are lost, the numbers of what exists still count.
        """
        claims = self._claims()
        taken = [int(match[1]) for name in _entries(claims) if (match := _claim(category).fullmatch(name))]
        number = 1 + max((*taken, *self._present(category)), default=0)
        while not self._take(category, number):
            number += 1
        return number

    def _take(self, category: str, number: int) -> bool:
        claims = self._claims()
        try:
            os.close(os.open(claims / f"{category}@v{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        return True

    def _claims(self) -> Path:
        claims = self.path / _TAKEN
        claims.mkdir(exist_ok=True)
        if problem := self._outside(_TAKEN):
            raise StoreError(f"Cannot hand out a version number in {self.path}/: {claims} {problem}")
        return claims

    def _clear_leftovers(self) -> int:
        cleared = 0
        for name in _entries(self.path):
            leftover = self.path / name
            if name.startswith(_TRASH) or (name.startswith(_DRAFT) and _is_stale(leftover)):
                _discard(leftover)
                cleared += not os.path.lexists(leftover)
        return cleared

    # refusals

    def _unknown_category(self, category: str) -> StoreError:
        stored = [name for name in _entries(self.path) if _CATEGORY.fullmatch(name) and self._complete(name)]
        listed = ", ".join(stored) if stored else "nothing yet"
        return StoreError(
            f'No adapter for category "{category}" in {self.path}/. '
            f"Stored: {listed}.{_spaced(did_you_mean(category, stored))}\n"
            f"Train one with: peft-combo tune --recipe lora-{nearest(category, stored) or category}"
        )

    def _unknown_version(self, category: str, selector: str, stored: Iterable[int]) -> StoreError:
        names = [f"v{version}" for version in stored]
        return StoreError(
            f'No version "{selector}" of {category} in {self.path}/. Stored: {", ".join(names)}. '
            f"Name one as {category}@{names[-1]}, or the latest as {category}."
        )

    def _unusable(self, reference: str, faults: list[Fault]) -> StoreError:
        if len(faults) == 1:
            return StoreError(_unusable(reference, self.path, faults[0]), faults)
        return StoreError.from_faults(f"Adapter {reference} in {self.path}/ cannot be used:", faults)

    # Last, because its name hides the builtin from annotations further down.

    def list(self) -> builtins.list[AdapterRecord]:
        """Return every version whose manifest reads, by category and age, without looking at the weights.

        A version with a broken manifest is left out; `verify` tells what is wrong with it.
        """
        records = []
        with _explained("read", self.path):
            for category in self.categories():
                for version in self._complete(category):
                    folder = self._folder(category, version)
                    if self._outside(f"{category}/v{version}"):
                        continue
                    manifest, _ = _read_manifest(folder / MANIFEST)
                    if manifest is not None and (manifest.category, manifest.version) == (category, version):
                        records.append(AdapterRecord(category, version, folder, manifest))
        return records


class Draft:
    """A version being written: put files into `path`, then `commit`.

    Files lie flat in the folder; their names are letters, digits, `.`, `_` and `-`. `README.md` and `manifest.json`
    are the store's own: whatever a library writes under these names is replaced.
    """

    def __init__(self, store: AdapterStore, category: str, path: Path) -> None:
        self.path = path
        self.category = category
        self.record: AdapterRecord | None = None
        self.closed = False
        self._store = store

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
        store, category = self._store, self.category
        with _explained(f"write an adapter for {category}", store.path):
            faults: list[Fault] = []
            entries = _list_draft(self.path, faults)
            said = said_by_writer(fields, category, faults)
            if faults:
                raise StoreError.from_faults(f"The adapter for {category} cannot be stored:", faults)
            for attempt in range(1000):
                version = store._next_number(category)
                manifest = self._seal(said, version, entries)
                folder = store._folder(category, version)
                folder.parent.mkdir(exist_ok=True)
                if attempt == 0 and (problem := store._outside(category)):
                    raise StoreError(f"Cannot write {folder.parent}/: it {problem}")
                try:
                    os.rename(self.path, folder)
                except OSError as error:
                    # Someone put a folder under our number, or removed the emptied category between two lines.
                    lost_race = error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.ENOENT)
                    if lost_race and self.path.is_dir():
                        continue
                    raise
                break
            else:
                raise StoreError(f"Cannot write an adapter for {category} in {store.path}/: no free version number.")
        for parent in (folder.parent, store.path):
            with suppress(OSError):  # the version is complete and visible; only its survival of a power cut is at stake
                _sync(parent)
        self.record = AdapterRecord(category, version, folder, manifest)
        return self.record

    def _seal(self, said: JsonObject, version: int, entries: Mapping[str, FileEntry]) -> Manifest:
        """Write card and manifest for this number and bring all of it to the disk; the manifest is last."""
        values: dict[str, Any] = {
            **said,
            "format": FORMAT,
            "category": self.category,
            "version": version,
            "created": datetime.now(UTC).replace(microsecond=0),
        }
        without_card = validated_manifest({**values, "files": dict(entries)}, self.category)
        card = model_card(without_card).encode()
        _write(self.path / CARD, card)
        listed = {**entries, CARD: FileEntry(sha256=hashlib.sha256(card).hexdigest(), bytes=len(card))}
        manifest = without_card.model_copy(update={"files": dict(sorted(listed.items()))})
        content = json.dumps(manifest.model_dump(mode="json"), indent=1, allow_nan=False).encode() + b"\n"
        if len(content) > MANIFEST_LIMIT:
            fault = Fault(
                MANIFEST, f"would have {len(content)} bytes, the limit is {MANIFEST_LIMIT}.", "Say less in it."
            )
            raise StoreError.from_faults(f"The adapter for {self.category} cannot be stored:", [fault])
        if parse_manifest(content) != (manifest, []):  # what is written must be what a reader gets
            raise StoreError(f"The adapter for {self.category} cannot be stored: its manifest does not read back.")
        for name in entries:
            _publish(self.path / name, mode=self.path.stat().st_mode & 0o666)
        _write(self.path / MANIFEST, content)
        _sync(self.path)
        return manifest


# --- references and names ---------------------------------------------------------------------------------------------


def parse_reference(reference: str) -> Reference:
    """Read `fashion` or `fashion@v2`.

    Raises:
        StoreError: it is neither.
    """
    category, selector = _split(reference)
    if selector is None:
        return Reference(category, None)
    version = _version_number(selector)
    if version is None:
        raise StoreError(f'"{selector}" is not a version. Expected v1, v2, ... as in {category}@v1.')
    return Reference(category, version)


def _split(reference: str) -> tuple[str, str | None]:
    """Category and selector. The selector is a version today; the grammar has room for names such as `prod`."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise StoreError(
            f'"{shown(reference)}" does not name an adapter. Expected a category (fashion) or one of its versions '
            "(fashion@v2), where a category has lower-case letters, digits, _ and -, at most 64."
        )
    return match[1], match[2]


def _check_category(category: str) -> str:
    if not _CATEGORY.fullmatch(category):
        raise StoreError(
            f'"{shown(category)}" cannot be a category. Expected 1 to 64 lower-case letters, digits, _ and -, '
            "beginning with a letter or digit, such as home-kitchen."
        )
    return category


def _version_number(selector: str) -> int | None:
    match = _VERSION.fullmatch(selector)
    return int(match[1]) if match else None


def _claim(category: str) -> re.Pattern[str]:
    return re.compile(f"{category}@{_VERSION.pattern}")


# --- files ------------------------------------------------------------------------------------------------------------


def _read_manifest(path: Path) -> tuple[Manifest | None, list[Fault]]:
    remedy = "Restore it from a copy, or remove this version."
    try:
        with _open_regular(path) as file:
            return parse_manifest(file.read(MANIFEST_LIMIT + 1))
    except FileNotFoundError:
        return None, [Fault(MANIFEST, "is missing, so this version is incomplete.", remedy)]
    except OSError as error:
        return None, [Fault(MANIFEST, f"cannot be read ({error.strerror or error}).", remedy)]


def _entries(folder: Path) -> tuple[str, ...]:
    """Names in a folder, sorted; none where it does not exist."""
    try:
        return tuple(sorted(os.listdir(folder)))
    except FileNotFoundError:
        return ()


def _list_draft(folder: Path, faults: list[Fault]) -> dict[str, FileEntry]:
    """Size and digest of every file a writer put into its draft, the store's own two left out."""
    entries = {}
    for name in _entries(folder):
        path = folder / name
        if name in (CARD, MANIFEST) and path.is_file() and not path.is_symlink():
            path.unlink()
            continue
        problem = name_problem(name)
        if not problem and not stat.S_ISREG(path.lstat().st_mode):
            problem = "is not a plain file; an adapter is a flat folder of files."
        problem = problem or _content_problem(path)
        if problem:
            faults.append(Fault(shown(name), problem))
            continue
        with _open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            entries[name] = FileEntry(sha256=digest, bytes=os.fstat(file.fileno()).st_size)
    if not entries and not faults:
        faults.append(Fault("files", "the draft is empty.", "Write the weights into draft.path before the commit."))
    return entries


def _file_problem(path: Path, entry: FileEntry) -> str:
    """Say how a file differs from what the manifest says of it; empty where it does not."""
    try:
        with _open_regular(path) as file:
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


def _content_problem(path: Path) -> str:
    """Say why a tensors or JSON file does not read; empty where it does. Only headers of tensors are looked at."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            return f"is not a readable safetensors file ({shown(str(error))})."
    elif path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError, OSError) as error:
            return f"is not readable JSON ({shown(str(error))})."
    return ""


def _open_regular(path: Path) -> io.BufferedReader:
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


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _publish(path: Path, mode: int) -> None:
    """Bring a file the writer left to the disk, and give it the mode the folder has.

    safetensors makes its files readable by their owner alone, whatever the umask says; a server under another account
    has to read them too.
    """
    path.chmod(mode)
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
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


def _discard(path: Path) -> None:
    # rmtree opens what it is given, and on a pipe it would wait there for ever.
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _is_stale(draft: Path) -> bool:
    """Whether the process that made a draft is gone."""
    parts = draft.name.removeprefix(_DRAFT).split(".")
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


# --- how refusals read ------------------------------------------------------------------------------------------------

_DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO))


@contextmanager
def _explained(doing: str, store: Path) -> Iterator[None]:
    """Turn what the system says about the store's files into one readable line."""
    try:
        yield
    except OSError as error:
        raise _refusal(doing, store, error) from error


def _refusal(doing: str, store: Path, error: OSError) -> StoreError:
    elsewhere = "or name another store with --set store=FOLDER."
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            said = f"the disk is full. Free some space, {elsewhere}"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            said = f"permission denied ({error.strerror}). Change the permissions, {elsewhere}"
        case errno.EEXIST | errno.ENOTDIR:
            found = error.filename if isinstance(error.filename, str) else store
            said = f"expected a folder, found a file at {shown(str(found))}. Move it away, {elsewhere}"
        case _:
            said = f"{error.strerror or error}. Look after the disk, {elsewhere}"
    return StoreError(f"Cannot {doing} in {shown(str(store))}/: {said}")


def _unusable(reference: str, store: Path, fault: Fault) -> str:
    return f"Adapter {reference} in {store}/ cannot be used: {fault}"


def _short(fingerprint: str) -> str:
    return shown(fingerprint if len(fingerprint) <= 12 else fingerprint[:12] + "…")


def _spaced(text: str) -> str:
    return f" {text}" if text else ""
