"""Relations between items and categories, `relations.csv`, as a knowledge graph over the items.

Owns the table (head, relation, tail), what its names mean in a catalogue, and the walk from items to items along a
relation. A head or tail is an item's id, a category path ("A > B") or the name of one category; a category stands for
every item under it. Knows nothing of rules or scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.data.model import CATEGORY_SEPARATOR, Catalog
from peft_combo.data.readers.csv_table import SHOWN_FAULTS
from peft_combo.data.readers.forms import find_table
from peft_combo.data.readers.tables import name_columns, read_table
from peft_combo.errors import Fault, did_you_mean

RELATIONS_TABLE = "relations"
_COLUMNS = ("head", "relation", "tail")


@dataclass(frozen=True)
class Relations:
    """Triples in the words of the table, distinct, in its order: (head, relation, tail)."""

    triples: tuple[tuple[str, str, str], ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The relations, sorted."""
        return tuple(sorted({relation for _, relation, _ in self.triples}))

    @property
    def digest(self) -> str:
        """sha256 of the triples, whatever their order."""
        return hashlib.sha256(json.dumps(sorted(self.triples)).encode("utf-8", "surrogatepass")).hexdigest()


def read_relations(folder: Path, catalog: Catalog, faults: list[Fault], notes: list[str]) -> Relations | None:
    """Read the table of relations of a folder; None where there is none, or, with faults, where it cannot be used.

    Args:
        catalog: whose items and categories it speaks of.
    """
    before = len(faults)
    files = find_table(folder, RELATIONS_TABLE, faults)
    table = None if files is None else read_table(files, faults, notes)
    named = None if table is None else name_columns(table, RELATIONS_TABLE, {}, _COLUMNS, ())
    if named is None or len(faults) > before:
        return None
    cells = [[" ".join(cell.split()) for cell in named.strings(column)] for column in _COLUMNS]
    for column, own in zip(_COLUMNS, cells, strict=True):
        named.blame([row for row, cell in enumerate(own) if not cell], f"{column} is empty.")
    known = _Names.of(catalog)
    unknown: dict[str, int] = {}
    for row, (head, _, tail) in enumerate(zip(*cells, strict=True)):
        for name in (head, tail):
            if name and name not in known:
                unknown.setdefault(name, row)
    for name, row in list(unknown.items())[:SHOWN_FAULTS]:
        remedy = did_you_mean(name, known.spelled) if len(catalog) <= 20_000 else ""
        faults.append(Fault(named.where(row), f"{name!r} is neither an item's id nor a category.", remedy))
    if len(unknown) > SHOWN_FAULTS:
        faults.append(Fault(named.name, f"{len(unknown) - SHOWN_FAULTS:,} more names are neither."))
    if len(faults) > before:
        return None
    return Relations(tuple(dict.fromkeys((h, r, t) for h, r, t in zip(*cells, strict=True))))


@dataclass(frozen=True, eq=False)
class _Names:
    """What names mean in a catalogue: the items each stands for. An item's id counts before a category's name.

    Attributes:
        items: row of each id. categories: rows under each path and each name of a category.
    """

    items: Mapping[str, int]
    categories: Mapping[str, NDArray[np.int64]]

    @classmethod
    def of(cls, catalog: Catalog) -> Self:
        under: dict[str, list[int]] = {}
        for row, path in enumerate(catalog.categories):
            prefixes = {CATEGORY_SEPARATOR.join(path[: depth + 1]) for depth in range(len(path))}
            for name in prefixes | set(path):
                under.setdefault(name, []).append(row)
        return cls(catalog.index, {name: np.array(rows, np.int64) for name, rows in under.items()})

    def __contains__(self, name: str) -> bool:
        return name in self.items or name in self.categories

    @property
    def spelled(self) -> Iterable[str]:
        return [*self.categories, *self.items]

    def find(self, name: str) -> NDArray[np.int64]:
        """Return the rows a name stands for; none where it is not of the catalogue."""
        if name in self.items:
            return np.array([self.items[name]], np.int64)
        return self.categories.get(name, np.empty(0, np.int64))


@dataclass(frozen=True, eq=False)
class Steps:
    """A relation as a walk from items to items: a head of the item's is chosen, then its tail, then an item under it.

    Attributes:
        names: of the E edges: (head, tail) in the words of the table.
        heads: (N, E) 1 where an edge starts at an item. tails: (E, N) 1 where it ends at one.
    """

    names: tuple[tuple[str, str], ...]
    heads: sparse.csr_array[Any, tuple[int, int]]
    tails: sparse.csr_array[Any, tuple[int, int]]

    @cached_property
    def _backwards(self) -> tuple[Any, Any]:
        return sparse.csr_array(self.tails.T), sparse.csr_array(self.heads.T)

    def reach(self, row: int, *, back: bool = False) -> NDArray[np.bool_]:
        """Which items an item is the head of the relation to, or with `back` the tail: (N,)."""
        first, second = self._backwards if back else (self.heads, self.tails)
        found = np.zeros(first.shape[0], bool)
        edges = first.indices[first.indptr[row] : first.indptr[row + 1]]
        for edge in edges.tolist():
            found[second.indices[second.indptr[edge] : second.indptr[edge + 1]]] = True
        return found

    def explain(self, head: int, tail: int) -> bool:
        """Say whether one item stands in the relation to another."""
        edges = self.heads.indices[self.heads.indptr[head] : self.heads.indptr[head + 1]]
        back = self._backwards[0]
        return bool(np.isin(edges, back.indices[back.indptr[tail] : back.indptr[tail + 1]]).any())


def lay_out(relations: Relations, catalog: Catalog) -> dict[str, Steps]:
    """Lay relations over the items of a catalogue, by name; a name that is not there stands for nothing."""
    names, n = _Names.of(catalog), len(catalog)
    found: dict[str, Steps] = {}
    for relation in relations.names:
        edges = [(head, tail) for head, own, tail in relations.triples if own == relation]
        ends = [(names.find(head), names.find(tail)) for head, tail in edges]
        kept = [place for place, (heads, tails) in enumerate(ends) if len(heads) and len(tails)]
        heads = _make_membership([ends[place][0] for place in kept], n)
        found[relation] = Steps(
            tuple(edges[place] for place in kept), sparse.csr_array(heads.T),
            _make_membership([ends[place][1] for place in kept], n),
        )  # fmt: skip
    return found


def _make_membership(sets: list[NDArray[np.int64]], n: int) -> Any:
    """Return (S, n) float32 with a 1 for each row of each set."""
    indptr = np.concatenate([[0], np.cumsum([len(rows) for rows in sets])]).astype(np.int64)
    indices = np.concatenate([np.empty(0, np.int64), *sets])
    return sparse.csr_array((np.ones(len(indices), np.float32), indices, indptr), shape=(len(sets), n))
