"""Reader of the demo: a synthetic fashion shop that comes with the package as a data folder, in English and Chinese.

Owns where it lies and its numbering. Everything in it is invented by `tools/make_demo.py` of the repository: figures
measured on it say that the machinery works, never that a method is good on real data. A second shop, demo-pictures, is
invented by `tools/make_demo_pictures.py`: its table names drawings in the place of paths.
"""

from __future__ import annotations

import io
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from peft_combo.data.assemble import Found, assemble
from peft_combo.data.model import Dataset
from peft_combo.data.pictures import DrawnPicture
from peft_combo.data.readers.folder import TABLES, read_tables
from peft_combo.data.readers.forms import find_table
from peft_combo.data.readers.tables import read_table
from peft_combo.errors import DataError, Fault
from peft_combo.files import atomic_file, write_text
from peft_combo.recipe.model import DataConfig

Demo = Literal["demo", "demo-zh", "demo-pictures"]

_FOLDER = Path(__file__).resolve().parent.parent / "demo"
_FOLDER_ZH, _FOLDER_PICTURES = _FOLDER.with_name("demo_zh"), _FOLDER.with_name("demo_pictures")
_IMAGES = "images"  # folder of the drawings in a copy


@lru_cache(maxsize=3)
def read_demo(source: Demo = "demo") -> Found:
    """Read the shop: 1,000 items, 400 users, 600 outfits and 12,000 purchases over two years.

    In Chinese it is the same shop with other words: its items and the names of its outfits lie in a folder of their
    own, bundles and purchases are those of the English one. With pictures it is another shop of the same size.

    Users and baskets are numbered by their ids, where a folder numbers them as they appear: the digest of the dataset,
    which stored adapters name, depends on it.
    """
    config = DataConfig(source=source)
    faults: list[Fault] = []
    notes: list[str] = []
    files = {name: find_table(_find_folder(source, name), name, faults) for name in TABLES}
    tables = {name: read_table(where, faults, notes) for name, where in files.items() if where is not None}
    drawn = tables["items"].columns.pop("image", None) if tables["items"] is not None else None
    found, faults = read_tables(source, source, tables, config, "bundles", faults, notes)
    if found is None:
        raise DataError.from_faults("The demo of this installation is damaged; install the package again:", faults)
    interactions, bundles = found.interactions, found.bundles
    assert interactions is not None
    assert bundles is not None
    users, baskets = np.argsort(interactions.user_ids), np.argsort(found.basket_ids)
    # The number of what had none stays -1: the last place answers for it.
    user, basket = np.append(np.argsort(users), -1), np.append(np.argsort(baskets), -1)
    pictures = () if drawn is None else tuple(map(DrawnPicture.parse, drawn.to_pylist()))
    return replace(
        found,
        catalog=replace(found.catalog, pictures=pictures),
        interactions=replace(
            interactions,
            user_ids=tuple(interactions.user_ids[row] for row in users),
            users=user[interactions.users].astype(np.int32),
            baskets=basket[interactions.baskets],
        ),
        bundles=replace(bundles, baskets=basket[bundles.baskets]),
        basket_ids=[found.basket_ids[row] for row in baskets],
        notes=("synthetic shop, seed 0",),
        origin="the data",
    )


def _find_folder(source: Demo, table: str) -> Path:
    """Return the folder a table of a shop lies in: the Chinese one has its own words, and rows in common."""
    if source == "demo-pictures":
        return _FOLDER_PICTURES
    return _FOLDER_ZH if source == "demo-zh" and (_FOLDER_ZH / f"{table}.parquet").is_file() else _FOLDER


def demo_dataset(source: Demo = "demo") -> Dataset:
    """Return the shop as a dataset, nothing filtered."""
    return assemble(read_demo(source), DataConfig(source=source), "bundles")


def copy_demo(folder: Path, source: Demo = "demo") -> None:
    """Write the shop as CSV into an empty or new folder: an example of the format, which `--data` reads.

    Pictures are drawn and written as PNG files, of which the items table has the paths.

    Raises:
        DataError: something lies in the folder, or it is a file; or pictures are to be drawn without Pillow.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"Expected an empty or new folder, but {folder} exists and is not empty. Name another one.")
    for name in sorted(one.stem for one in _FOLDER.glob("*.parquet")):
        file = _find_folder(source, name) / f"{name}.parquet"
        text = io.BytesIO()
        options = pyarrow.csv.WriteOptions(quoting_style="needed")
        table = pyarrow.parquet.read_table(file)
        if "image" in table.column_names:
            paths = [f"{_IMAGES}/{item_id}.png" for item_id in table["item_id"].to_pylist()]
            (folder / _IMAGES).mkdir(parents=True, exist_ok=True)
            for path, drawn in zip(paths, table["image"].to_pylist(), strict=True):
                with atomic_file(folder / path) as image:
                    image.write(DrawnPicture.parse(drawn).read())
            table = table.set_column(table.column_names.index("image"), "image", pa.array(paths))
        pyarrow.csv.write_csv(table, text, options)
        write_text(folder / f"{file.stem}.csv", text.getvalue().decode("utf-8"))
