"""Stored versions: where each lies, which numbers are taken, and whether its bytes are the ones that were written.

Owns the layout of a store (`fashion/v2/`, `.taken/fashion@v2`) and the record of one version. Knows nothing of
aliases, and decides nothing: what is wanted and what may go is for the store to know.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peft_combo.errors import Fault, StoreError, did_you_mean, shorten
from peft_combo.files import list_names, move_aside, open_regular, sync_folder
from peft_combo.store.integrity import explain_os_errors, find_file_problem, find_folder_problem
from peft_combo.store.manifest import MANIFEST, MANIFEST_LIMIT, Manifest, parse_manifest
from peft_combo.store.references import CATEGORY, VERSION

_TAKEN = ".taken"


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
            raise StoreError(
                f'Adapter {self.reference} has no file "{shorten(name)}". Stored: {stored}.{prepend_space(hint)}'
            )
        return self.path / name

    def read(self, name: str) -> bytes:
        """Return the bytes of a listed file, checked again against the manifest as they are read.

        Raises:
            StoreError: the manifest does not list the file, or it has changed since.
        """
        path, entry = self.file(name), self.manifest.files[name]
        with explain_os_errors(f"read {name} of {self.reference}", self.path), open_regular(path) as file:
            content = file.read(entry.bytes + 1)
        if len(content) != entry.bytes or hashlib.sha256(content).hexdigest() != entry.sha256:
            raise StoreError(
                describe_unusable(self.reference, self.path, Fault(name, "was altered since it was stored."))
            )
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
        tuned, loaded = shorten(stamp.model), shorten(model)
        raise StoreError(
            f"Adapter {self.reference} was tuned on {tuned} (fingerprint {_shorten_fingerprint(stamp.fingerprint)}), "
            f"the loaded backbone is {loaded} (fingerprint {_shorten_fingerprint(fingerprint)}). Load {tuned}, "
            f"or tune {self.category} again on {loaded}."
        )


class VersionFolders:
    """The folders of the versions in one store. Its methods raise `OSError` where the disk refuses."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def folder(self, category: str, version: int) -> Path:
        """Where a version lies, or would lie."""
        return self.path / category / f"v{version}"

    def list_present(self, category: str) -> tuple[int, ...]:
        """Every number in use by a folder entry, complete or not, ascending."""
        try:
            names = list_names(self.path / category)
        except NotADirectoryError:  # a stray file under the name of a category
            return ()
        return tuple(sorted(int(match[1]) for name in names if (match := VERSION.fullmatch(name))))

    def list_complete(self, category: str) -> tuple[int, ...]:
        """The numbers of the versions that have a manifest, ascending."""
        return tuple(
            version for version in self.list_present(category) if (self.folder(category, version) / MANIFEST).exists()
        )

    def claim_next_number(self, category: str) -> int:
        """Claim a number that nobody has had: making a file is the one step only one process can win.

        A counter that is read, raised and written back hands the same number out twice when two writers and a removal
        interleave. Where the claims are lost, the numbers of what exists still count.
        """
        claims = self._claims()
        taken = [int(match[1]) for name in list_names(claims) if (match := _match_claim(category).fullmatch(name))]
        number = 1 + max((*taken, *self.list_present(category)), default=0)
        while not self.claim_number(category, number):
            number += 1
        return number

    def list_categories(self) -> tuple[str, ...]:
        """The categories that have a complete version, sorted."""
        return tuple(name for name in list_names(self.path) if CATEGORY.fullmatch(name) and self.list_complete(name))

    def claim_number(self, category: str, number: int) -> bool:
        """Claim a number; False where somebody had it already."""
        claims = self._claims()
        try:
            os.close(os.open(claims / f"{category}@v{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        return True

    def _claims(self) -> Path:
        claims = self.path / _TAKEN
        claims.mkdir(exist_ok=True)
        if problem := find_folder_problem(self.path, _TAKEN):
            raise StoreError(f"Cannot hand out a version number in {self.path}/: {claims} {problem}")
        return claims

    def take_out(self, folder: Path, category: str, number: int) -> Path:
        """Rename a folder out of sight, for good; return where it can be deleted."""
        self.claim_number(category, number)  # a version that was copied in by hand never took its number
        trash = move_aside(folder, self.path)
        for parent in (folder.parent, self.path):
            with suppress(OSError):  # after a power cut it may be back, whole, unless its files went first
                sync_folder(parent)
        return trash

    def inspect(self, category: str, version: int) -> tuple[Manifest | None, list[Fault]]:
        """Read a manifest and compare its files with the disk: what `open` refuses and `verify` reports."""
        folder = self.folder(category, version)
        if problem := find_folder_problem(self.path, f"{category}/v{version}"):
            return None, [Fault(folder.name, problem)]
        manifest, faults = read_manifest(folder / MANIFEST)
        if manifest is None:
            return None, faults
        if (manifest.category, manifest.version) != (category, version):
            problem = f"was written as {manifest.reference}."
            faults.append(Fault(MANIFEST, problem, "Give the folder its old name back, or tune again."))
        for name, entry in manifest.files.items():
            if problem := find_file_problem(folder / name, entry):
                faults.append(Fault(name, problem, "Restore it from a copy, or tune again."))
        return manifest, faults


def read_manifest(path: Path) -> tuple[Manifest | None, list[Fault]]:
    """Read a manifest from its file: the manifest, or everything that is wrong with it."""
    remedy = "Restore it from a copy, or remove this version."
    try:
        with open_regular(path) as file:
            return parse_manifest(file.read(MANIFEST_LIMIT + 1))
    except FileNotFoundError:
        return None, [Fault(MANIFEST, "is missing, so this version is incomplete.", remedy)]
    except OSError as error:
        return None, [Fault(MANIFEST, f"cannot be read ({error.strerror or error}).", remedy)]


def _match_claim(category: str) -> re.Pattern[str]:
    return re.compile(f"{category}@{VERSION.pattern}")


def describe_unusable(reference: str, store: Path, fault: Fault) -> str:
    """Say that a version cannot be used, and why."""
    return f"Adapter {reference} in {store}/ cannot be used: {fault}"


def _shorten_fingerprint(fingerprint: str) -> str:
    return shorten(fingerprint if len(fingerprint) <= 12 else fingerprint[:12] + "…")


def prepend_space(text: str) -> str:
    """Return a sentence with a space before it, or nothing where there is none."""
    return f" {text}" if text else ""
