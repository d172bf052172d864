"""Reader of data folders: items, bundles, bundle_meta and interactions as CSV, Parquet or JSON Lines.

Owns which columns a table has and what makes them faulty; every fault is reported at once. Knows nothing of file
formats (that is `tables`) or of filters and splits.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.assemble import Found, Needs
from peft_combo.data.model import CATEGORY_SEPARATOR, Bundles, Catalog, Interactions
from peft_combo.data.readers.tables import SHOWN_FAULTS, Table, find_table, read_table
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
_OWN_ITEM_COLUMNS = ("item_id", "title", "category", "slot", "price", "description")


def read_folder(folder: Path, config: DataConfig, needs: Needs) -> tuple[Found | None, list[Fault]]:
    """Read every table of `folder` and return what was found and everything that is wrong with it.

    Args:
        needs: the tables that must be there beside items; interactions that are needed must tell whose they are.
    Returns:
        (found, faults); found is None where there are faults.
    """
    faults: list[Fault] = []
    tables: dict[str, Table] = {}
    broken = False
    for name, (required, optional) in TABLES.items():
        file = find_table(folder, name, faults)
        if file is None:
            continue
        if name == needs == "interactions":
            required = (*required, "user_id")
        mapping = dict(config.columns.get(name, {}))  # type: ignore[call-overload]
        table = read_table(file, mapping, required, optional, faults)
        broken = broken or table is None
        if table is not None:
            tables[name] = table
    faults.extend(
        Fault(f"data.columns.{name}", f"there is no {name} table in {folder}.")
        for name in config.columns
        if find_table(folder, name, []) is None
    )
    if "items" not in tables and not broken:
        faults.append(Fault("items", f"there is no items.csv, items.parquet or items.jsonl in {folder}.", "Add one."))
    if "items" not in tables:
        return None, faults

    notes: list[str] = []
    catalog = _items(tables["items"])
    bundles = _bundles(tables["bundles"], tables.get("bundle_meta"), catalog, notes) if "bundles" in tables else None
    if "bundle_meta" in tables and "bundles" not in tables and not broken:
        faults.append(Fault(tables["bundle_meta"].file.name, "describes bundles, but there is no bundles table."))
    interactions: Interactions | None = None
    basket_ids: list[str] = []
    if "interactions" in tables:
        interactions, basket_ids = _interactions(tables["interactions"], catalog, notes)
    if bundles is not None and basket_ids and "basket_id" in tables.get("bundle_meta", ()):
        bundles = replace(bundles, baskets=_baskets(tables["bundle_meta"], bundles, basket_ids))
    there = ", ".join(table.file.name for table in tables.values())
    if needs == "bundles" and bundles is None and not basket_ids and not broken and not faults:
        faults.append(
            Fault(
                str(folder),
                f"has neither a bundles table nor interactions with a basket_id column; found {there}.",
                "Bundles come from one of the two; only tasks that learn from bundles need them.",
            )
        )
    if needs == "interactions" and interactions is None and not broken:
        faults.append(
            Fault(
                str(folder),
                f"has no interactions table (.csv, .parquet or .jsonl); found {there}.",
                "Add one with user_id and item_id.",
            )
        )
    if faults:
        return None, faults
    origin = next(tables[name].file.name for name in ("bundles", "interactions", "items") if name in tables)
    return Found(folder.resolve().name, catalog, interactions, basket_ids, bundles, tuple(notes), origin), []


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


def _items(table: Table) -> Catalog:
    """Read the catalogue; ids that are empty or occur twice are faults, and the first row of an id stands."""
    ids = table.strings("item_id")
    _blame_ids(table, ids, "item_id")
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
    return Catalog.build(
        item_ids=[ids[row] for row in first],
        titles=[columns["title"][row] for row in first],
        categories=[categories[row] for row in first],
        slots=[columns["slot"][row] or None for row in first],
        prices=prices[first],
        descriptions=[columns["description"][row] for row in first],
        attributes={name: [values[row] or None for row in first] for name, values in attributes.items()},
    )


def _bundles(table: Table, meta: Table | None, catalog: Catalog, notes: list[str]) -> Bundles:
    """Read the bundles with their names, owners and times."""
    codes, bundle_ids = table.codes("bundle_id")
    table.blame(np.flatnonzero(codes < 0), "bundle_id is empty.")
    items = _read_items(table, catalog)
    position = table.numbers("position") if "position" in table else np.zeros(table.rows)
    usable = np.flatnonzero((codes >= 0) & (items >= 0))
    # By bundle, then by position, then by row; lexsort is stable and takes the last key first.
    order = usable[np.lexsort((np.nan_to_num(position[usable], nan=np.inf), codes[usable]))]
    starts = np.searchsorted(codes[order], np.arange(len(bundle_ids) + 1))
    members = [list(dict.fromkeys(items[order[start:end]].tolist())) for start, end in pairwise(starts)]
    repeats = len(order) - sum(map(len, members))
    if repeats:
        notes.append(f"{repeats:,} rows of {table.file.name} repeat an item within its bundle and were left out")

    names: list[str | None] = [None] * len(bundle_ids)
    owners: list[str | None] = [None] * len(bundle_ids)
    times = np.full(len(bundle_ids), np.nan)
    if meta is not None:
        meta_ids = meta.strings("bundle_id")
        _blame_ids(meta, meta_ids, "bundle_id")
        place = {bundle_id: row for row, bundle_id in enumerate(bundle_ids)}
        shown = meta.strings("name" if "name" in meta else "intent")
        users = meta.strings("user_id")
        moments = meta.times("timestamp") if "timestamp" in meta else np.full(meta.rows, np.nan)
        strangers = 0
        for row, bundle_id in enumerate(meta_ids):
            if bundle_id not in place:
                strangers += bundle_id != ""
                continue
            at = place[bundle_id]
            names[at] = " ".join(shown[row].split()) or None
            owners[at] = users[row] or None
            times[at] = moments[row]
        if strangers == meta.rows:
            meta.faults.append(
                Fault(meta.file.name, f"none of its bundle ids occurs in {table.file.name}.", "Are they the same ids?")
            )
        elif strangers:
            notes.append(f"{strangers:,} rows of {meta.file.name} name bundles without items and were left out")
    return Bundles.build(bundle_ids, members, names, owners, times)


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


def _interactions(table: Table, catalog: Catalog, notes: list[str]) -> tuple[Interactions, list[str]]:
    """Read the interactions and the ids of their baskets."""
    items = _read_items(table, catalog)
    users = table.codes("user_id") if "user_id" in table else None
    baskets, basket_ids = table.codes("basket_id") if "basket_id" in table else (None, [])
    weight = next((name for name in ("rating", "quantity") if name in table), None)
    weights = table.numbers(weight) if weight is not None else np.ones(table.rows)
    times = table.times("timestamp") if "timestamp" in table else None
    # A quantity of 0 or less is a return or a correction; it says nothing of what goes together.
    taken_back = weights <= 0
    if taken_back.any():
        notes.append(f"{int(taken_back.sum()):,} rows of {table.file.name} with a {weight} of 0 or less were left out")
    keep = np.flatnonzero((items >= 0) & ~taken_back)
    if not len(keep) and not table.faults:
        table.faults.append(Fault(table.file.name, f"every {weight} is 0 or less."))
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


def _read_items(table: Table, catalog: Catalog) -> NDArray[np.int32]:
    """Return the catalogue row of each row's item; -1, and a fault, where it is empty or unknown."""
    codes, ids = table.codes("item_id")
    table.blame(np.flatnonzero(codes < 0), "item_id is empty.")
    row_of = np.array([*(catalog.index.get(item_id, -1) for item_id in ids), -1], dtype=np.int32)
    rows: NDArray[np.int32] = row_of[codes]  # code -1 takes the last place
    unknown = np.flatnonzero((codes >= 0) & (rows < 0))
    _, firsts, counts = np.unique(codes[unknown], return_index=True, return_counts=True)
    by_line = np.argsort(firsts)
    for place in by_line[:SHOWN_FAULTS]:
        item_id = ids[codes[unknown[firsts[place]]]]
        times = f" (in {counts[place]:,} rows)" if counts[place] > 1 else ""
        # Finding the nearest of many ids is slow, so only few get a suggestion.
        near = did_you_mean(item_id, catalog.item_ids) if place in by_line[:5] and len(catalog) <= 20_000 else ""
        table.faults.append(
            Fault(table.where(int(unknown[firsts[place]])), f"item {item_id!r} is not in items{times}.", near)
        )
    if len(firsts) > SHOWN_FAULTS:
        more = len(firsts) - SHOWN_FAULTS
        table.faults.append(Fault(table.file.name, f"{more:,} more items are not in items."))
    return rows


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
        table.faults.append(Fault(table.file.name, f"{len(again) - SHOWN_FAULTS:,} more ids occur before."))
