"""Reference lookup: which stored version `fashion`, `fashion@v2` or `fashion@prod` means now, and why none does.

Owns the way from a reference to a number, and how it reads where there is none. Looks into no version.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from peft_combo.errors import Fault, StoreError, did_you_mean, nearest
from peft_combo.files import list_shipped_recipes
from peft_combo.store.aliases import Alias, AliasFolder
from peft_combo.store.references import Reference, Version
from peft_combo.store.versions import VersionFolders, describe_unusable, prepend_space


class UnknownCategory(StoreError):
    """No adapter of a category is stored.

    Attributes:
        problem: the message without its remedy.
        category: the one to train: the nearest that is stored, else the one that was asked for.
    """

    def __init__(self, problem: str, category: str) -> None:
        super().__init__(f"{problem}\nTrain one with: {write_tune_command(category)}")
        self.problem, self.category = problem, category


class Lookup:
    """Finds versions and aliases in one store. Its methods raise `OSError` where the disk refuses."""

    def __init__(self, path: Path, versions: VersionFolders, aliases: AliasFolder) -> None:
        self._path = path
        self._versions = versions
        self._aliases = aliases

    def resolve(self, wanted: Reference) -> Version:
        """Return the version a reference means at this moment.

        Raises:
            StoreError: no such category, version or alias, or the alias points to what is gone.
        """
        category = wanted.category
        if wanted.alias is not None:
            return Version(category, self.follow_alias(category, wanted.alias))
        complete = self._versions.list_complete(category)
        if wanted.version is None:
            if not complete:
                raise self.explain_unknown_category(category)
            return Version(category, complete[-1])
        # Asked for by number, an incomplete version is found too, so that the answer says what it lacks.
        present = self.list_present(category)
        if wanted.version not in present:
            raise self.explain_unknown_version(wanted, complete or present)
        return Version(category, wanted.version)

    def list_present(self, category: str) -> tuple[int, ...]:
        """Return the numbers in use by a category, whole or broken; a category that is not stored is refused."""
        present = self._versions.list_present(category)
        if not present:
            raise self.explain_unknown_category(category)
        return present

    def follow_alias(self, category: str, name: str) -> int:
        """Return the version an alias points to; one that is gone is refused."""
        version = None
        while True:
            alias = self.find_alias(category, name)
            if alias.version in self._versions.list_present(category):
                return alias.version
            if alias.version == version:
                raise self._explain_dangling(alias)
            version = alias.version  # look again: it may have moved, and the version gone, between the two lines

    def find_alias(self, category: str, name: str) -> Alias:
        """Return an alias; where there is none, that is refused."""
        alias = self.read_alias(category, name)
        if alias is None:
            self.list_present(category)
            raise self._explain_unknown_alias(category, name)
        return alias

    def read_alias(self, category: str, name: str) -> Alias | None:
        """Return an alias, None where there is none; a file that does not read is refused."""
        alias, faults = self._aliases.read(category, name)
        if faults:
            raise StoreError.from_faults(f"An alias in {self._path}/ does not read:", faults)
        return alias

    def explain_unknown_category(self, category: str) -> UnknownCategory:
        stored = self._versions.list_categories()
        listed = f"{', '.join(stored)}." if stored else "nothing yet. Name another store with --store."
        return UnknownCategory(
            f'No adapter for category "{category}" in {self._path}/. '
            f"Stored: {listed}{prepend_space(did_you_mean(category, stored))}",
            nearest(category, stored) or category,
        )

    def explain_unknown_version(self, wanted: Reference, stored: Iterable[int]) -> StoreError:
        category, names = wanted.category, [f"v{version}" for version in stored]
        return StoreError(
            f'No version "v{wanted.version}" of {category} in {self._path}/. Stored: {", ".join(names)}. '
            f"Name one as {category}@{names[-1]}, or the latest as {category}."
        )

    def _explain_unknown_alias(self, category: str, name: str) -> StoreError:
        names = [one.alias or "" for one in self._aliases.names(category)]
        return StoreError(
            f'No alias "{name}" of {category} in {self._path}/. Aliases: {", ".join(names) or "none"}.'
            f"{prepend_space(did_you_mean(name, names))} Set it with: peft-combo adapters alias {category} {name}"
        )

    def _explain_dangling(self, alias: Alias) -> StoreError:
        return StoreError(
            f"{alias.reference} points to v{alias.version}, which is not in {self._path}/. {tell_move(alias)}"
        )

    def explain_unusable(self, reference: str, faults: list[Fault]) -> StoreError:
        if len(faults) == 1:
            return StoreError(describe_unusable(reference, self._path, faults[0]), faults)
        return StoreError.from_faults(f"Adapter {reference} in {self._path}/ cannot be used:", faults)


def write_tune_command(category: str) -> str:
    """Return the command that trains an adapter for a category: by the shipped LoRA recipe that is nearest to it."""
    recipes = {name.removeprefix("lora-"): name for name in list_shipped_recipes() if name.startswith("lora-")}
    close = nearest(category, recipes) or "fashion"
    chosen = f"peft-combo tune --recipe lora-{close}"
    return chosen if close == category else f"{chosen} --set category={category}"


def tell_move(alias: Alias) -> str:
    """Return the command that moves an alias."""
    return f"Move it with: peft-combo adapters alias {alias.category} {alias.name}"


def explain_task(reference: str, found: str, wanted: str) -> StoreError:
    """Return the error of an adapter that was tuned for another task than the one it is asked for."""
    return StoreError(
        f"Adapter {reference} was tuned for {found}; expected one tuned for {wanted}. "
        "See what is stored with: peft-combo adapters list"
    )
