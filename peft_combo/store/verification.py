"""Store verification: everything that is wrong with stored files, more than opening a version looks at.

Owns what is checked: manifests, digests, headers of tensors files, files nobody listed, folders that are not adapters,
aliases that lead nowhere. Changes nothing.
"""

from __future__ import annotations

from pathlib import Path

from peft_combo.errors import Fault, shorten
from peft_combo.files import list_names
from peft_combo.store.aliases import FOLDER as ALIASES
from peft_combo.store.aliases import AliasFolder
from peft_combo.store.integrity import find_content_problem, find_folder_problem
from peft_combo.store.lookup import tell_move
from peft_combo.store.manifest import CARD, MANIFEST
from peft_combo.store.references import CATEGORY, VERSION
from peft_combo.store.versions import VersionFolders


class Verification:
    """Checks one store. Its methods return faults, and raise `OSError` where the disk refuses."""

    def __init__(self, path: Path, versions: VersionFolders, aliases: AliasFolder) -> None:
        self._path = path
        self._versions = versions
        self._aliases = aliases

    def check_store(self) -> list[Fault]:
        faults: list[Fault] = []
        for name in list_names(self._path):
            if name.startswith(".") or name == CARD:
                continue
            if not CATEGORY.fullmatch(name) or not (self._path / name).is_dir():
                faults.append(Fault(shorten(name), "is not the folder of a category.", "Move it out of the store."))
            else:
                faults += self.check_category(name)
        strays = (f"{ALIASES}/{shorten(name)}" for name in self._aliases.strays())
        faults += [Fault(where, "is not an alias.", "Nobody reads it; delete it.") for where in strays]
        return faults + self.check_aliases(None)

    def check_category(self, category: str) -> list[Fault]:
        if problem := find_folder_problem(self._path, category):
            return [Fault(category, problem)]
        faults: list[Fault] = []
        for name in list_names(self._path / category):
            if name.startswith("."):
                continue
            if match := VERSION.fullmatch(name):
                faults += self.check_version(category, int(match[1]))
            else:
                where = f"{category}/{shorten(name)}"
                faults.append(Fault(where, "is not a version (v1, v2, ...).", "Move it out of the store."))
        return faults

    def check_aliases(self, category: str | None) -> list[Fault]:
        faults: list[Fault] = []
        for name in self._aliases.names(category):
            alias, found = self._aliases.read(name.category, name.alias or "")
            faults += found
            if alias is not None and alias.version not in self._versions.list_present(alias.category):
                faults.append(
                    Fault(alias.reference, f"points to v{alias.version}, which is not there.", tell_move(alias))
                )
        return faults

    def check_version(self, category: str, version: int) -> list[Fault]:
        manifest, faults = self._versions.inspect(category, version)
        folder, reference = self._versions.folder(category, version), f"{category}@v{version}"
        if manifest is not None:
            bad = {fault.where for fault in faults}
            for name in manifest.files:
                if name not in bad and (problem := find_content_problem(folder / name)):
                    faults.append(Fault(name, problem, "It was stored like this; tune again."))
            for name in list_names(folder):
                if name != MANIFEST and name not in manifest.files:
                    faults.append(Fault(shorten(name), "is not listed in the manifest.", "Nobody reads it; delete it."))
        return [Fault(f"{reference}: {fault.where}", fault.problem, fault.remedy) for fault in faults]
