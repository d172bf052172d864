"""Aliases: names such as `prod` that point to a version of a category, and remember where they pointed before.

Owns what an alias is, how its file reads and where it lies: `.aliases/fashion@prod.json` in the store. It moves by one
rename, so a reader sees where it points or where it pointed. Whether a version is there is for the store to know.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from peft_combo.errors import Fault, StoreError, shorten
from peft_combo.files import atomic_file, discard, list_names, open_regular, sync_folder
from peft_combo.store.integrity import find_folder_problem
from peft_combo.store.manifest import list_faults, parse_json_object
from peft_combo.store.references import ALIAS, CATEGORY, Reference

FORMAT = 1
"""The form of an alias file this code writes, and the newest it reads."""

FOLDER = ".aliases"
_LIMIT = 2**20  # bytes of an alias file; with its history at its longest it has a tenth of that
_MOVES = 1000  # what the history keeps


class _AliasModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Move(_AliasModel):
    """One change of an alias: where to, when (UTC), and whether it took an earlier one back."""

    version: Annotated[int, Field(strict=True, ge=1, lt=10**9)]
    at: AwareDatetime
    rollback: bool = False


class Alias(_AliasModel):
    """A name for a version. `AdapterStore.alias` and `rollback` return where it has moved to.

    Attributes:
        moves: every change, oldest first, at most the last 1000; the last says where it points.
    """

    format: Annotated[int, Field(strict=True, ge=1)] = FORMAT
    category: Annotated[str, Field(pattern=rf"\A{CATEGORY.pattern}\z")]
    name: Annotated[str, Field(max_length=64)]
    moves: Annotated[tuple[Move, ...], Field(min_length=1)]

    @property
    def reference(self) -> str:
        return f"{self.category}@{self.name}"

    @property
    def version(self) -> int:
        return self.moves[-1].version

    @property
    def target(self) -> str:
        return f"{self.category}@v{self.version}"

    @property
    def before(self) -> int | None:
        """The version a rollback goes back to; None where there is nothing before.

        A rollback takes the last move back, so a second one goes a step further: after v1, v2, v3 and one rollback the
        alias points to v2, and v1 is before that.
        """
        standing: list[int] = []
        for move in self.moves:
            if move.rollback and standing:
                standing.pop()
            if not standing or standing[-1] != move.version:
                standing.append(move.version)
        return standing[-2] if len(standing) > 1 else None

    def move_to(self, version: int, rollback: bool = False) -> Alias:
        """Return the alias after one more move, now."""
        return self.model_copy(update={"moves": (*self.moves, _make_move(version, rollback))[-_MOVES:]})


def make_alias(category: str, name: str, version: int) -> Alias:
    """Return an alias that points to its first version, now."""
    return Alias(category=category, name=name, moves=(_make_move(version, False),))


def _make_move(version: int, rollback: bool) -> Move:
    return Move(version=version, at=datetime.now(UTC).replace(microsecond=0), rollback=rollback)


def parse_alias(content: bytes, category: str, name: str) -> tuple[Alias | None, list[Fault]]:
    """Read the bytes of an alias file: the alias, or everything that is wrong with it."""
    where = f"{category}@{name}"
    remedy = f"Delete {FOLDER}/{where}.json and set the alias again."
    raw, faults = parse_json_object(content, where, _LIMIT, remedy)
    if raw is None:
        return None, faults
    written = raw.get("format")
    if type(written) is int and written > FORMAT:
        problem = f"has format {shorten(str(written))}, written by a newer peft-combo; this one reads up to {FORMAT}."
        return None, [Fault(where, problem, "Upgrade with: pip install --upgrade peft-combo")]
    try:
        alias = Alias.model_validate(raw)
    except ValidationError as error:
        return None, [Fault(f"{where}: {f.where}", f.problem, remedy) for f in list_faults(error)]
    if (alias.category, alias.name) != (category, name):
        return None, [Fault(where, f"was written as {shorten(alias.reference)}.", remedy)]
    return alias, []


class AliasFolder:
    """The alias files of one store. Reading takes no lock; whoever writes holds the store's."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._path = store / FOLDER

    def read(self, category: str, name: str) -> tuple[Alias | None, list[Fault]]:
        """Return an alias, or what is wrong with its file; (None, []) where there is no such alias."""
        try:
            with open_regular(self._file(category, name)) as file:
                content = file.read(_LIMIT + 1)
        except FileNotFoundError:
            return None, []
        except OSError as error:
            problem = f"cannot be read ({error.strerror or error})."
            return None, [Fault(f"{category}@{name}", problem, f"Look after {FOLDER} in the store.")]
        if problem := find_folder_problem(self._store, FOLDER):
            return None, [Fault(f"{category}@{name}", f"cannot be read: {FOLDER} {problem}", "Move it away.")]
        return parse_alias(content, category, name)

    def names(self, category: str | None = None) -> tuple[Reference, ...]:
        """Return the aliases that have a file, of one category or of all."""
        found = (_parse_file_name(file) for file in list_names(self._path))
        return tuple(alias for alias in found if alias is not None and category in (None, alias.category))

    def strays(self) -> tuple[str, ...]:
        """Return what lies among the alias files and is none."""
        return tuple(
            name for name in list_names(self._path) if not name.startswith(".") and _parse_file_name(name) is None
        )

    def write(self, alias: Alias) -> None:
        """Put an alias in place of what it was; what a writer that died left of its own attempt is cleared first.

        Raises:
            StoreError: a link leads out of the store.
            OSError: the disk refuses; the alias is as it was.
        """
        self._path.mkdir(exist_ok=True)
        if problem := find_folder_problem(self._store, FOLDER):
            raise StoreError(f"Cannot set {alias.reference}: {self._path} {problem}")
        content = json.dumps(alias.model_dump(mode="json"), indent=1).encode() + b"\n"
        for name in list_names(self._path):
            if name.startswith("."):
                discard(self._path / name)
        with atomic_file(self._file(alias.category, alias.name)) as file:
            file.write(content)
        sync_folder(self._store)

    def drop(self, alias: Alias) -> None:
        """Delete an alias.

        Raises:
            OSError: the disk refuses.
        """
        self._file(alias.category, alias.name).unlink()
        sync_folder(self._path)

    def _file(self, category: str, name: str) -> Path:
        return self._path / f"{category}@{name}.json"


def _parse_file_name(file: str) -> Reference | None:
    category, _, name = file.removesuffix(".json").partition("@")
    named = file.endswith(".json") and CATEGORY.fullmatch(category) and ALIAS.fullmatch(name)
    return Reference(category, alias=name) if named else None
