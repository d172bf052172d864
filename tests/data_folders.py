"""Writes small data folders for the tests of the data layer."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from peft_combo.recipe.model import DataConfig

Rows = list[dict[str, Any]]

ITEMS: Rows = [
    {
        "item_id": "007",
        "title": "Linen  shirt",
        "category": "Clothing > Men > Shirts",
        "price": 30.0,
        "brand": "Norvale",
    },
    {"item_id": "85123A", "title": "Chinos, navy", "category": "Clothing > Men > Trousers", "price": 45.5, "brand": ""},
    {"item_id": "12", "title": 'The "good" shoes', "category": "Shoes", "price": None, "brand": "Stridell"},
    {"item_id": "2024-01-02", "title": "Café tote 🛍", "category": "", "price": 20.0, "brand": "Satchmere"},
]
BUNDLES: Rows = [
    {"bundle_id": "b1", "item_id": "85123A", "position": 2},
    {"bundle_id": "b1", "item_id": "007", "position": 1},
    {"bundle_id": "b2", "item_id": "12", "position": 1},
    {"bundle_id": "b2", "item_id": "2024-01-02", "position": 2},
    {"bundle_id": "b2", "item_id": "12", "position": 3},
    {"bundle_id": "b2", "item_id": "007", "position": 4},
]
META: Rows = [
    {"bundle_id": "b2", "name": "Weekend in town", "user_id": "01", "timestamp": "2024-05-31T18:00:00Z"},
    {"bundle_id": "b1", "name": "", "user_id": "", "timestamp": ""},
]
INTERACTIONS: Rows = [
    {"user_id": "01", "basket_id": "9", "item_id": "007", "quantity": 2, "timestamp": 1717178400},
    {"user_id": "01", "basket_id": "9", "item_id": "12", "quantity": 1, "timestamp": 1717178400},
    {"user_id": None, "basket_id": "8", "item_id": "85123A", "quantity": 1, "timestamp": 1717178401.5},
    {"user_id": "02", "basket_id": "8", "item_id": "007", "quantity": -1, "timestamp": 1717178402},
]


def write_csv(file: Path, rows: Rows) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(file: Path, rows: Rows) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def write_parquet(file: Path, rows: Rows) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), file)


WRITERS = {".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}


def write_folder(folder: Path, suffix: str = ".csv", **tables: Rows | None) -> DataConfig:
    """Write the sample tables, each replaced or (None) left out by its keyword; return the config that reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    samples: dict[str, Rows | None] = {
        "items": ITEMS,
        "bundles": BUNDLES,
        "bundle_meta": META,
        "interactions": INTERACTIONS,
        **tables,
    }
    for name, rows in samples.items():
        if rows is not None:
            WRITERS[suffix](folder / f"{name}{suffix}", rows)
    return DataConfig(source="folder", path=str(folder))


def write_text(folder: Path, **files: str) -> DataConfig:
    """Write `name_csv="..."` as name.csv and return the config that reads the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, suffix = name.rsplit("_", 1)
        (folder / f"{stem}.{suffix}").write_text(content, "utf-8")
    return DataConfig(source="folder", path=str(folder))
