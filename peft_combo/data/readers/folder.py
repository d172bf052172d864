"""Reader of data folders: items, bundles, bundle_meta and interactions as CSV, Parquet or JSON Lines.

Owns which columns a table has and what makes them faulty; every fault is reported at once. Knows nothing of file
formats (that is `tables`) or of filters and splits.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.assemble import Found, Needs
from peft_combo.data.model import CATEGORY_SEPARATOR, Bundles, Catalog, Interactions
from peft_combo.data.pictures import Picture, PictureBytes, PictureFile, find_path_problem
from peft_combo.data.readers.cells import Table, holds_bytes
from peft_combo.data.readers.csv_table import SHOWN_FAULTS
from peft_combo.data.readers.forms import TableFiles, find_strays, find_table
from peft_combo.data.readers.look_alikes import explain_look_alike, note_look_alikes
from peft_combo.data.readers.tables import name_columns, read_table
from peft_combo.errors import Fault, did_you_mean
from peft_combo.files import write_text

if TYPE_CHECKING:
    from peft_combo.recipe.model import DataConfig


# Per table: the columns it must have, and those it may have. Items may have any: the rest are attributes.
TABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "items": (("item_id", "title"), None),
    "bundles": (("bundle_id", "item_id"), ("position",)),
    "bundle_meta": (("bundle_id",), ("name", "intent", "user_id", "timestamp", "basket_id")),
    "interactions": (("item_id",), ("user_id", "basket_id", "rating", "quantity", "timestamp")),
}
_OWN_ITEM_COLUMNS = ("item_id", "title", "category", "slot", "price", "description", "image")


def read_folder(folder: Path, config: DataConfig, needs: Needs) -> tuple[Found | None, list[Fault]]:
    """Read every table of `folder` and return what was found and everything that is wrong with it.

    Args:
        needs: the tables that must be there beside items; interactions that are needed must tell whose they are.
    Returns:
        (found, faults); found is None where there are faults.
    """
    faults: list[Fault] = []
    notes: list[str] = []
    before = 0
    files: dict[str, TableFiles | None] = {}
    for name in TABLES:
        files[name] = find_table(folder, name, faults)
        if len(faults) > before:  # it is there, and cannot be told from others: nothing stands in its place
            files.pop(name)
        before = len(faults)
    find_strays(folder, files, ("labels", "tags", "relations", "answers"), faults, notes)
    tables = {name: read_table(where, faults, notes) for name, where in files.items() if where is not None}
    absent = [name for name in TABLES if files.get(name, ...) is None]
    faults += [
        Fault(f"data.columns.{name}", f"there is no {name} table in {folder}.")
        for name in config.columns
        if name in absent
    ]
    return read_tables(folder.resolve().name, str(folder), tables, config, needs, faults, notes, folder)


def read_tables(
    name: str, where: str, tables: Mapping[str, Table | None], config: DataConfig, needs: Needs, faults: list[Fault],
    notes: list[str], folder: Path | None = None,
) -> tuple[Found | None, list[Fault]]:  # fmt: skip
    """Turn tables into what was found, or say everything that is wrong with them; see `read_folder`.

    Args:
        name: of the dataset. where: what messages call the place the tables are in.
        tables: per name; None where one could not be read, of which `faults` say why.
        folder: what paths of pictures start from; None takes pictures as bytes alone.
    """
    named: dict[str, Table] = {}
    for kind, table in tables.items():
        required, optional = TABLES[kind]
        if kind == needs == "interactions":
            required = (*required, "user_id")
        mapping = dict(config.columns.get(kind, {}))  # type: ignore[call-overload]
        ours = None if table is None else name_columns(table, kind, mapping, required, optional)
        if ours is not None:
            named[kind] = ours
    broken = bool(faults)
    if "items" not in tables and not broken:
        faults.append(Fault("items", f"there is no items.csv, items.parquet or items.jsonl in {where}.", "Add one."))
    if "items" not in named:
        return None, faults
    catalog = _items(named["items"], folder)
    bundles: Bundles | None = None
    if "bundles" in named:
        bundles = _bundles(named["bundles"], named.get("bundle_meta"), catalog, config)
    if "bundle_meta" in tables and "bundles" not in named and not broken:
        faults.append(Fault(named["bundle_meta"].name, "describes bundles, but there is no bundles table."))
    interactions: Interactions | None = None
    basket_ids: list[str] = []
    if "interactions" in named:
        interactions, basket_ids = _interactions(named["interactions"], catalog, config)
    if bundles is not None and basket_ids and "basket_id" in named.get("bundle_meta", ()):
        bundles = replace(bundles, baskets=_baskets(named["bundle_meta"], bundles, basket_ids))
    there = ", ".join(table.name for table in named.values())
    if needs == "bundles" and bundles is None and not basket_ids and not broken and not faults:
        faults.append(
            Fault(
                where,
                f"has neither a bundles table nor interactions with a basket_id column; found {there}.",
                "Bundles come from one of the two; only tasks that learn from bundles need them.",
            )
        )
    if needs == "interactions" and interactions is None and not broken:
        faults.append(
            Fault(
                where,
                f"has no interactions table (.csv, .parquet or .jsonl); found {there}.",
                "Add one with user_id and item_id.",
            )
        )
    if faults:
        return None, faults
    origin = next(named[kind].name for kind in ("bundles", "interactions", "items") if kind in named)
    return Found(name, catalog, interactions, basket_ids, bundles, tuple(notes), origin), []


def write_items(catalog: Catalog, file: Path) -> None:
    """Write a catalogue as the items table of a folder, which reads back as the same; unknown cells are empty.

    Raises:
        PeftComboError: the file cannot be written; what was there before stays.
    """
    columns: dict[str, Sequence[str | None]] = {
        "item_id": catalog.item_ids,
        "title": catalog.titles,
        "category": [CATEGORY_SEPARATOR.join(path) for path in catalog.categories],
        "slot": catalog.slots,
        "price": ["" if np.isnan(price) else str(price) for price in catalog.prices],
        "description": catalog.descriptions,
        **catalog.attributes,
    }
    kept = {name: cells for name, cells in columns.items() if name in ("item_id", "title") or any(cells)}
    lines = io.StringIO(newline="")
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(kept)
    writer.writerows(zip(*([cell or "" for cell in cells] for cells in kept.values()), strict=True))
    write_text(file, lines.getvalue())


def _items(table: Table, folder: Path | None) -> Catalog:
    """Read the catalogue; ids that are empty or occur twice are faults, and the first row of an id stands."""
    ids = table.strings("item_id")
    table.doubt_ids("item_id", words=False)
    _blame_ids(table, ids, "item_id")
    note_look_alikes(ids, "item_id", table.name, table.notes)
    table.note_missing_words(name for name in table.columns if name not in ("price", "stock", "image"))
    titles = [" ".join(title.split()) for title in table.strings("title")]
    table.blame([row for row, title in enumerate(titles) if not title], "title is empty.", "Every item needs one.")
    prices = table.numbers("price", least=0.0) if "price" in table else np.full(table.rows, np.nan)
    if "stock" in table:
        table.numbers("stock")
    attributes = {name: table.strings(name) for name in table.columns if name not in _OWN_ITEM_COLUMNS}
    first = list({item_id: row for row, item_id in reversed(list(enumerate(ids)))}.values())[::-1]
    columns: dict[str, Sequence[str]] = {"title": titles, "slot": table.strings("slot")}
    columns["description"] = [" ".join(text.split()) for text in table.strings("description")]
    categories = table.lists("category", CATEGORY_SEPARATOR.strip())
    pictures = _pictures(table, ids, folder)
    return Catalog.build(
        item_ids=[ids[row] for row in first],
        titles=[columns["title"][row] for row in first],
        categories=[categories[row] for row in first],
        slots=[columns["slot"][row] or None for row in first],
        prices=prices[first],
        descriptions=[columns["description"][row] for row in first],
        attributes={name: [values[row] or None for row in first] for name, values in attributes.items()},
        pictures=[pictures[row] for row in first] if pictures else (),
    )


def _pictures(table: Table, ids: Sequence[str], folder: Path | None) -> list[Picture | None]:
    """Read where pictures lie: paths below the folder, or the bytes themselves; none is opened."""
    if "image" not in table:
        return []
    if holds_bytes(table.columns["image"]):
        cells = zip(table.contents("image"), ids, strict=True)
        return [None if content is None else PictureBytes(f"of item {item_id}", content) for content, item_id in cells]
    paths = table.strings("image")
    remedy = "Put the pictures into the data folder and write their paths from there, such as images/7.jpg."
    for problem, wrong in _group_rows((find_path_problem(path), row) for row, path in enumerate(paths) if path):
        table.blame(wrong, f"image is {{cell}}, which {problem}.", remedy, "image")
    if folder is None:
        wrong = [row for row, path in enumerate(paths) if path]
        table.blame(wrong, "image is a path, and a table in memory has no folder.", "Give the bytes of pictures.")
        return []
    return [PictureFile(folder, path) if path else None for path in paths]


def _group_rows(found: Iterable[tuple[str, int]]) -> list[tuple[str, list[int]]]:
    """Gather rows by what is wrong with them; rows with which nothing is ("") are left out."""
    groups: dict[str, list[int]] = {}
    for problem, row in found:
        if problem:
            groups.setdefault(problem, []).append(row)
    return list(groups.items())


def _bundles(table: Table, meta: Table | None, catalog: Catalog, config: DataConfig) -> Bundles:
    """Read the bundles with their names, owners and times."""
    table, notes = table.spread("item_id"), table.notes
    table.doubt_ids("bundle_id")
    codes, bundle_ids = table.codes("bundle_id")
    table.blame(np.flatnonzero(codes < 0), "bundle_id is empty.")
    note_look_alikes(bundle_ids, "bundle_id", table.name, notes)
    items = _read_items(table, catalog, config)
    position = table.numbers("position") if "position" in table else np.zeros(table.rows)
    usable = np.flatnonzero((codes >= 0) & (items >= 0))
    # By bundle, then by position, then by row; lexsort is stable and takes the last key first.
    order = usable[np.lexsort((np.nan_to_num(position[usable], nan=np.inf), codes[usable]))]
    starts = np.searchsorted(codes[order], np.arange(len(bundle_ids) + 1))
    members = [list(dict.fromkeys(items[order[start:end]].tolist())) for start, end in pairwise(starts)]
    repeats = len(order) - sum(map(len, members))
    if repeats:
        notes.append(f"{repeats:,} rows of {table.name} repeat an item within its bundle and were left out")

    names: list[str | None] = [None] * len(bundle_ids)
    intents: list[str | None] = [None] * len(bundle_ids)
    owners: list[str | None] = [None] * len(bundle_ids)
    times = np.full(len(bundle_ids), np.nan)
    if meta is not None:
        meta_ids = meta.strings("bundle_id")
        for column in ("bundle_id", "user_id", "basket_id"):
            if column in meta:
                meta.doubt_ids(column)
        _blame_ids(meta, meta_ids, "bundle_id")
        meta.note_missing_words(("name", "intent"))
        place = {bundle_id: row for row, bundle_id in enumerate(bundle_ids)}
        shown = meta.strings("name" if "name" in meta else "intent")
        asked = meta.strings("intent" if "intent" in meta else "name")
        users = meta.strings("user_id")
        moments = _times(meta, "bundle_meta", config) if "timestamp" in meta else np.full(meta.rows, np.nan)
        strangers = 0
        for row, bundle_id in enumerate(meta_ids):
            if bundle_id not in place:
                strangers += bundle_id != ""
                continue
            at = place[bundle_id]
            names[at] = " ".join(shown[row].split()) or None
            intents[at] = " ".join(asked[row].split()) or names[at]
            owners[at] = users[row] or None
            times[at] = moments[row]
        if strangers == meta.rows:
            meta.faults.append(
                Fault(meta.name, f"none of its bundle ids occurs in {table.name}.", "Are they the same ids?")
            )
        elif strangers:
            notes.append(f"{strangers:,} rows of {meta.name} name bundles without items and were left out")
    return Bundles.build(bundle_ids, members, names, owners, times, intents=intents)


def _baskets(meta: Table, bundles: Bundles, basket_ids: Sequence[str]) -> NDArray[np.int64]:
    """Return the basket each bundle was bought as, (B,) places in `basket_ids`; -1 for none.

    So that a scorer that may not see a held-out bundle does not see its purchase either.
    """
    known = {basket_id: place for place, basket_id in enumerate(basket_ids)}
    given = meta.strings("basket_id")
    strangers = [row for row, basket_id in enumerate(given) if basket_id and basket_id not in known]
    meta.blame(strangers, "basket_id {cell} is not in interactions.", cell="basket_id")
    basket_of = {bundle_id: known.get(one, -1) for bundle_id, one in zip(meta.strings("bundle_id"), given, strict=True)}
    return np.array([basket_of.get(bundle_id, -1) for bundle_id in bundles.bundle_ids], np.int64)


def _times(table: Table, kind: Literal["bundle_meta", "interactions"], config: DataConfig) -> NDArray[np.float64]:
    return table.times("timestamp", config.time_format.get(kind, "auto"), f"--set data.time_format.{kind}")


def _interactions(table: Table, catalog: Catalog, config: DataConfig) -> tuple[Interactions, list[str]]:
    """Read the interactions and the ids of their baskets."""
    table, notes = table.spread("item_id"), table.notes
    for column in ("user_id", "basket_id"):
        if column in table:
            table.doubt_ids(column)
    items = _read_items(table, catalog, config)
    users = table.codes("user_id") if "user_id" in table else None
    baskets, basket_ids = table.codes("basket_id") if "basket_id" in table else (None, [])
    weight = next((name for name in ("rating", "quantity") if name in table), None)
    weights = table.numbers(weight) if weight is not None else np.ones(table.rows)
    times = _times(table, "interactions", config) if "timestamp" in table else None
    if users is not None:
        note_look_alikes(users[1], "user_id", table.name, notes)
    # A quantity of 0 or less is a return or a correction; it says nothing of what goes together.
    taken_back = weights <= 0
    if taken_back.any():
        notes.append(f"{int(taken_back.sum()):,} rows of {table.name} with a {weight} of 0 or less were left out")
    keep = np.flatnonzero((items >= 0) & ~taken_back)
    if not len(keep) and not table.faults:
        table.faults.append(Fault(table.name, f"every {weight} is 0 or less."))
    return (
        Interactions.build(
            user_ids=[] if users is None else users[1],
            users=np.full(len(keep), -1) if users is None else users[0][keep],
            items=items[keep],
            weights=np.nan_to_num(weights[keep], nan=1.0),
            times=None if times is None else times[keep],
            baskets=None if baskets is None else baskets[keep],
        ),
        basket_ids,
    )


def _read_items(table: Table, catalog: Catalog, config: DataConfig) -> NDArray[np.int32]:
    """Return the catalogue row of each row's item; -1 where it is unknown and dropped, or faulty."""
    table.doubt_ids("item_id", words=False)
    codes, ids = table.codes("item_id")
    table.blame(np.flatnonzero(codes < 0), "item_id is empty.")
    row_of = np.array([*(catalog.index.get(item_id, -1) for item_id in ids), -1], dtype=np.int32)
    rows: NDArray[np.int32] = row_of[codes]  # code -1 takes the last place
    unknown = np.flatnonzero((codes >= 0) & (rows < 0))
    _, firsts, counts = np.unique(codes[unknown], return_index=True, return_counts=True)
    if config.unknown_items == "drop" and len(unknown) and (rows >= 0).any():
        what = "one item that is" if len(firsts) == 1 else f"{len(firsts):,} items that are"
        first = ids[codes[unknown[firsts.min()]]]
        table.notes.append(
            f"{len(unknown):,} of {table.rows:,} rows of {table.name} name {what} not in items, such as {first!r}, and "
            "were left out (data.unknown_items: drop)"
        )
        return rows
    by_line = np.argsort(firsts)
    for place in by_line[:SHOWN_FAULTS]:
        item_id = ids[codes[unknown[firsts[place]]]]
        times = f" (in {counts[place]:,} rows)" if counts[place] > 1 else ""
        remedy = _explain_unknown(item_id, catalog) if place in by_line[:5] else ""
        table.faults.append(
            Fault(table.where(int(unknown[firsts[place]])), f"item {item_id!r} is not in items{times}.", remedy)
        )
    if len(firsts) > SHOWN_FAULTS:
        more = len(firsts) - SHOWN_FAULTS
        table.faults.append(Fault(table.name, f"{more:,} more items are not in items."))
    if len(firsts) and config.unknown_items == "refuse" and (rows >= 0).any():
        remedy = "To leave out events of items that left the catalogue: --set data.unknown_items=drop."
        share = f"{len(unknown):,} of {table.rows:,} rows name items that are not in items."
        table.faults.append(Fault(table.name, share, remedy))
    return rows


def _explain_unknown(item_id: str, catalog: Catalog) -> str:
    """Return why an id may be unknown: several ids in one cell, a look-alike, or the nearest one."""
    for separator in ("|", ";", ",", " "):
        parts = [part.strip() for part in item_id.split(separator) if part.strip()]
        if len(parts) > 1 and all(part in catalog.index for part in parts):
            return f"It is a list of {len(parts)} ids parted by {separator!r}: write one row an item."
    if alike := explain_look_alike(item_id, catalog.item_ids):
        return alike
    # Finding the nearest of many ids is slow.
    return did_you_mean(item_id, catalog.item_ids) if len(catalog) <= 20_000 else ""


def _blame_ids(table: Table, ids: Sequence[str], column: str) -> None:
    """Add faults for ids that are empty or occur a second time."""
    table.blame([row for row, one in enumerate(ids) if not one], f"{column} is empty.")
    seen: dict[str, int] = {}
    again: list[Any] = []
    for row, one in enumerate(ids):
        if one and seen.setdefault(one, row) != row:
            again.append(row)
    for row in again[:SHOWN_FAULTS]:
        problem = f"{column} {ids[row]!r} occurs before, at {table.where(seen[ids[row]])}."
        table.faults.append(Fault(table.where(row), problem, "Ids must be distinct."))
    if len(again) > SHOWN_FAULTS:
        table.faults.append(Fault(table.name, f"{len(again) - SHOWN_FAULTS:,} more ids occur before."))
