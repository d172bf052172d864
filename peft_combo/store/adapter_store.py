"""The adapter store: a folder of tuned adapters, versioned per category.

Owns where adapters lie, which of them a reference means, what goes when room is needed, and whether their bytes are
still the ones that were written. Knows files and names; knows nothing of torch, of PEFT or of what the weights mean.

    adapters/
      fashion/v1/  adapter_config.json  adapter_model.safetensors  head.safetensors  README.md  manifest.json
      fashion/v2/  ...
      .aliases/    fashion@prod.json: where an alias points, and where it pointed before
      .taken/      one empty file per version number ever handed out, so that no number is used twice
      .lock        held by whoever moves an alias or takes a version out
      .draft-*     a version that is being written; readers do not see it
      .trash-*     a version that was taken out and is being deleted

A version appears by one rename, after its manifest was written last and everything reached the disk, and goes by one
rename. So whoever sees `manifest.json` sees a complete version, and a writer that dies leaves nothing but a draft or
trash for the next writer to clear. Reading and adding versions take no lock.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from peft_combo.errors import Fault, StoreError
from peft_combo.files import discard, measure_size
from peft_combo.store.aliases import Alias, AliasFolder, make_alias
from peft_combo.store.drafts import Draft, clear_leftovers, find_leftovers, open_draft
from peft_combo.store.integrity import LOCK_WAIT, explain_os_errors, find_folder_problem, hold_lock
from peft_combo.store.lookup import Lookup
from peft_combo.store.manifest import MANIFEST
from peft_combo.store.references import (
    Reference,
    Version,
    check_alias,
    check_category,
    parse_reference,
)
from peft_combo.store.verification import Verification
from peft_combo.store.versions import AdapterRecord, VersionFolders, read_manifest

__all__ = [
    "AdapterRecord",
    "AdapterStore",
    "Alias",
    "Draft",
    "Garbage",
    "Reference",
    "Version",
    "parse_reference",
]

KEPT_VERSIONS = 3
"""How many of the newest versions of a category `AdapterStore.collect` keeps unless told otherwise."""


class Garbage(NamedTuple):
    """What `AdapterStore.collect` takes out: a version (`fashion@v1`), or what a dead writer left, and its bytes."""

    name: str
    bytes: int


class AdapterStore:
    """A folder of adapters: `store.open("fashion")`, `with store.writing("fashion") as draft: ...`.

    Making one touches nothing; the folder is created by the first write. Every method raises `StoreError` with one
    readable text where names, files or the disk do not allow what was asked.

    Args:
        lock_wait: seconds to wait for another process that moves an alias or takes a version out.
    """

    def __init__(self, path: str | Path = "adapters", *, lock_wait: float = LOCK_WAIT) -> None:
        if "\0" in str(path):
            raise StoreError("The path of an adapter store cannot contain a NUL character.")
        self.path = Path(path)
        self._lock_wait = lock_wait
        self._versions = VersionFolders(self.path)
        self._aliases = AliasFolder(self.path)
        self._lookup = Lookup(self.path, self._versions, self._aliases)
        self._verification = Verification(self.path, self._versions, self._aliases)

    def __repr__(self) -> str:
        return f"AdapterStore({str(self.path)!r})"

    # reading

    def open(self, reference: str) -> AdapterRecord:
        """Find one version and check its manifest and every listed file against the bytes on disk.

        Args:
            reference: `fashion` for the latest version, `fashion@v2` for one version, `fashion@prod` for the one an
                alias points to.
        Raises:
            StoreError: no such category, version or alias, or the version is incomplete, altered or from a newer
                format.
        """
        found = self.resolve(reference)
        while True:
            with explain_os_errors(f"read {found}", self.path):
                manifest, faults = self._versions.inspect(*found)
            if manifest is not None and not faults:
                return AdapterRecord(*found, self._versions.folder(*found), manifest)
            # What an alias or a category meant may have been taken out since: then it means another version by now.
            before, found = found, self.resolve(reference)
            if found == before:
                raise self._lookup.explain_unusable(str(found), faults)

    def resolve(self, reference: str) -> Version:
        """Return the version a reference means at this moment, without looking into it.

        Raises:
            StoreError: no such category, version or alias, or the alias points to what is gone.
        """
        with explain_os_errors(f"read {reference}", self.path):
            return self._lookup.resolve(parse_reference(reference))

    def categories(self) -> tuple[str, ...]:
        """Return the categories that have at least one complete version, sorted."""
        with explain_os_errors("read", self.path):
            return self._versions.list_categories()

    def versions(self, category: str) -> tuple[int, ...]:
        """Return the complete versions of a category, oldest first; none for a category that is not stored."""
        check_category(category)
        with explain_os_errors("read", self.path):
            return self._versions.list_complete(category)

    def latest(self, category: str) -> int:
        """Return the newest complete version of a category.

        Raises:
            StoreError: the category is not stored.
        """
        return self.resolve(check_category(category)).version

    # writing

    @contextmanager
    def writing(self, category: str) -> Iterator[Draft]:
        """Give a temporary folder inside the store; `draft.commit(fields)` makes it the next version.

        Leaving the block without a commit, or by an exception, removes the folder. Entering and leaving at once is
        the way to ask early whether the store can be written.

        Raises:
            StoreError: the name is not one, or the disk refuses.
        """
        with open_draft(self._versions, check_category(category)) as draft:
            yield draft

    def remove(self, reference: str, *, all: bool = False) -> tuple[str, ...]:
        """Take one version out (`fashion@v2`), or a whole category (`fashion`, `all=True`), whole or broken.

        The folder is renamed out of sight first, so readers see it entire or not at all. Its numbers stay taken.

        Returns:
            The references that went.
        Raises:
            StoreError: nothing such is stored, an alias points to it, or the form does not say how much is meant.
        """
        wanted = parse_reference(reference)
        category, version = wanted.category, wanted.version
        if wanted.alias is not None:
            raise StoreError(
                f'"{reference}" is an alias, not a version. Remove the alias with: peft-combo adapters unalias '
                f"{reference}; a version is named by its number, as in {category}@v1."
            )
        if version is None and not all:
            raise StoreError(
                f'"{category}" names every version of the category. '
                f"Name one to remove ({category}@v1), or remove all versions with --all (in Python: all=True)."
            )
        if version is not None and all:
            raise StoreError(f'"{reference}" names one version, so it cannot go with --all; name the category alone.')
        with explain_os_errors(f"remove {reference}", self.path):
            self._lookup.list_present(category)  # what is not there is refused before anything is written
            with self._changing():
                present = self._lookup.list_present(category)
                if version is None:
                    gone, target = present, self.path / category
                elif version not in present:
                    raise self._lookup.explain_unknown_version(wanted, present)
                else:
                    if problem := find_folder_problem(self.path, category):
                        raise StoreError(f"Cannot remove {reference}: {self.path / category} {problem}")
                    gone, target = (version,), self._versions.folder(category, version)
                self._refuse_if_pointed_to(reference, category, gone)
                trash = self._versions.take_out(target, category, max(gone))
                if version is not None:
                    with suppress(OSError):  # not empty, or a writer was quicker: either way it stays
                        (self.path / category).rmdir()
            discard(trash)
        return tuple(f"{category}@v{number}" for number in gone)

    def clean(self) -> int:
        """Remove what dead writers and interrupted removals left behind; return how many folders went."""
        with explain_os_errors("clean", self.path):
            return clear_leftovers(self.path)

    def collect(
        self, keep: int = KEPT_VERSIONS, older_than: timedelta | None = None, *, dry_run: bool = False
    ) -> tuple[Garbage, ...]:
        """Take out old versions that nobody needs, and what dead writers left.

        Of each category stay: the `keep` newest versions that open, those an alias points to or would roll back to,
        and those that do not open, which are for `verify` to tell of and for a person to decide on. Each of the rest
        goes by one rename, whole or not at all.

        Args:
            older_than: take out only versions made longer ago than this.
            dry_run: change nothing.
        Returns:
            What went, or would go.
        Raises:
            StoreError: an alias does not read, so that what it points to is not known; nothing goes then.
        """
        if keep < 1:
            raise StoreError(f"gc: expected to keep at least 1 version of each category, found {keep}.")
        with explain_os_errors("collect garbage", self.path):
            left = [(path, Garbage(path.name, measure_size(path))) for path in find_leftovers(self.path)]
            if dry_run:
                return (*(garbage for _, _, garbage in self._garbage(keep, older_than)), *(g for _, g in left))
            old, trash = [], []
            with self._changing():
                for category, version, garbage in self._garbage(keep, older_than):
                    trash.append(self._versions.take_out(self._versions.folder(category, version), category, version))
                    old.append(garbage)
            for path in (*trash, *(path for path, _ in left)):
                discard(path)
        return (*old, *(garbage for _, garbage in left))

    def _garbage(self, keep: int, older_than: timedelta | None) -> Iterator[tuple[str, int, Garbage]]:
        needed = set()
        for alias in self.aliases():
            needed |= {(alias.category, alias.version), (alias.category, alias.before)}
        for category in self.categories():
            if find_folder_problem(self.path, category):
                continue
            sound = 0
            for version in reversed(self._versions.list_complete(category)):
                manifest, faults = self._versions.inspect(category, version)
                if manifest is None or faults:
                    continue
                sound += 1
                young = older_than is not None and datetime.now(UTC) - manifest.created < older_than
                if sound > keep and not young and (category, version) not in needed:
                    size = measure_size(self._versions.folder(category, version))
                    yield category, version, Garbage(f"{category}@v{version}", size)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Let nobody else move an alias or take out a version meanwhile; where there is no store, there is nobody."""
        if not self.path.is_dir():
            yield
            return
        with hold_lock(self.path, self._lock_wait):
            yield

    # aliases

    def alias(self, reference: str, name: str) -> Alias:
        """Let an alias point to a version: `store.alias("fashion@v3", "prod")`; it is made if it is new.

        Args:
            reference: a version, or what means one now: a category for its latest, another alias for its version.
        Raises:
            StoreError: the version is not there or damaged, or the name cannot be an alias.
        """
        category = parse_reference(reference).category
        check_alias(name)
        with explain_os_errors(f"set {category}@{name}", self.path), self._changing():
            version = self.open(reference).version
            alias = self._lookup.read_alias(category, name)
            if alias is not None and alias.version == version:
                return alias
            alias = make_alias(category, name, version) if alias is None else alias.move_to(version)
            self._aliases.write(alias)
        return alias

    def rollback(self, reference: str) -> Alias:
        """Let an alias point to what it pointed to before its last move; see `Alias.before`.

        Raises:
            StoreError: there is no such alias, nothing before, or the version before is gone or damaged.
        """
        with explain_os_errors(f"roll {reference} back", self.path), self._changing():
            alias = self.alias_at(reference)
            before = alias.before
            set_it = f"Set it with: peft-combo adapters alias {alias.category}@vN {alias.name}"
            if before is None:
                raise StoreError(f"{reference} points to v{alias.version} and to nothing before that. {set_it}")
            present = self._versions.list_present(alias.category)
            if before not in present:
                stored = ", ".join(f"v{version}" for version in present)
                raise StoreError(
                    f"{reference} pointed to v{before} before v{alias.version}, and v{before} was removed. "
                    f"Stored: {stored}. {set_it}"
                )
            self.open(f"{alias.category}@v{before}")
            alias = alias.move_to(before, rollback=True)
            self._aliases.write(alias)
        return alias

    def unalias(self, reference: str) -> Alias:
        """Remove an alias and its history; the version it points to stays. Return what it was.

        Raises:
            StoreError: there is no such alias.
        """
        with explain_os_errors(f"remove {reference}", self.path), self._changing():
            alias = self.alias_at(reference)
            self._aliases.drop(alias)
        return alias

    def aliases(self, category: str | None = None) -> tuple[Alias, ...]:
        """Return the aliases of a category, or of the whole store, by name.

        Raises:
            StoreError: one of them does not read.
        """
        if category is not None:
            check_category(category)
        with explain_os_errors("read", self.path):
            found = []
            for name in self._aliases.names(category):
                alias = self._lookup.read_alias(name.category, name.alias or "")
                if alias is not None:  # else it went between the two lines
                    found.append(alias)
            return tuple(found)

    def alias_at(self, reference: str) -> Alias:
        """Return one alias, `fashion@prod`, with its history.

        Raises:
            StoreError: there is no such alias, or it does not read.
        """
        wanted = parse_reference(reference)
        if wanted.alias is None:
            raise StoreError(f'"{reference}" is not an alias. Name one, as in {wanted.category}@prod.')
        with explain_os_errors(f"read {reference}", self.path):
            return self._lookup.find_alias(wanted.category, wanted.alias)

    def _refuse_if_pointed_to(self, reference: str, category: str, gone: tuple[int, ...]) -> None:
        holding = [alias for alias in self.aliases(category) if alias.version in gone or reference == category]
        if holding:
            names = ", ".join(f"{alias.reference} (v{alias.version})" for alias in holding)
            one = holding[0]
            raise StoreError(
                f"Cannot remove {reference}: {names} point{'s' if len(holding) == 1 else ''} to it. Move it first "
                f"(peft-combo adapters alias {category}@vN {one.name}) or remove it "
                f"(peft-combo adapters unalias {one.reference})."
            )

    # checking

    def verify(self, reference: str | None = None) -> list[Fault]:
        """Return everything that is wrong with one version, one category or (None) the whole store.

        More is looked at than `open` needs: files nobody listed, tensors files whose header does not read, folders
        that are not adapters. A category alone means all its versions.

        Raises:
            StoreError: the reference names nothing that is stored.
        """
        with explain_os_errors("verify", self.path):
            if reference is None:
                return self._verification.check_store()
            wanted = parse_reference(reference)
            category = wanted.category
            if wanted.alias is not None:
                return self._verification.check_version(category, self._lookup.follow_alias(category, wanted.alias))
            present = self._lookup.list_present(category)
            if wanted.version is None:
                return self._verification.check_category(category) + self._verification.check_aliases(category)
            if wanted.version not in present:
                raise self._lookup.explain_unknown_version(wanted, present)
            return self._verification.check_version(category, wanted.version)

    # Last, because its name hides the builtin from annotations further down.

    def list(self) -> builtins.list[AdapterRecord]:
        """Return every version whose manifest reads, by category and age, without looking at the weights.

        A version with a broken manifest is left out; `verify` tells what is wrong with it.
        """
        records = []
        with explain_os_errors("read", self.path):
            for category in self.categories():
                for version in self._versions.list_complete(category):
                    folder = self._versions.folder(category, version)
                    if find_folder_problem(self.path, f"{category}/v{version}"):
                        continue
                    manifest, _ = read_manifest(folder / MANIFEST)
                    if manifest is not None and (manifest.category, manifest.version) == (category, version):
                        records.append(AdapterRecord(category, version, folder, manifest))
        return records
