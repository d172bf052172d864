"""Reader of the demo: a synthetic fashion shop that comes with the package as a data folder.

Owns where it lies and its numbering. Everything in it is invented by `tools/make_demo.py` of the repository: figures
measured on it say that the machinery works, never that a method is good on real data.
"""

from __future__ import annotations

import io
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from peft_combo.data.assemble import Found, assemble
from peft_combo.data.model import Dataset
from peft_combo.data.readers.folder import read_folder
from peft_combo.errors import DataError
from peft_combo.files import write_text
from peft_combo.recipe.model import DataConfig

_FOLDER = Path(__file__).resolve().parent.parent / "demo"


@lru_cache(maxsize=1)
def read_demo() -> Found:
    """Read the shop: 1,000 items, 400 users, 600 outfits and 12,000 purchases over two years.

    Users and baskets are numbered by their ids, where a folder numbers them as they appear: the digest of the dataset,
    which stored adapters name, depends on it.
    """
    found, faults = read_folder(_FOLDER, DataConfig(source="demo"), "bundles")
    if found is None:
        raise DataError.from_faults("The demo of this installation is damaged; install the package again:", faults)
    interactions, bundles = found.interactions, found.bundles
    assert interactions is not None
    assert bundles is not None
    users, baskets = np.argsort(interactions.user_ids), np.argsort(found.basket_ids)
    # The number of what had none stays -1: the last place answers for it.
    user, basket = np.append(np.argsort(users), -1), np.append(np.argsort(baskets), -1)
    return replace(
        found,
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


def demo_dataset() -> Dataset:
    """Return the shop as a dataset, nothing filtered."""
    return assemble(read_demo(), DataConfig(source="demo"), "bundles")


def copy_demo(folder: Path) -> None:
    """Write the shop as CSV into an empty or new folder: an example of the format, which `--data` reads.

    Raises:
        DataError: something lies in the folder, or it is a file.
    """
    import pyarrow.csv
    import pyarrow.parquet

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"Expected an empty or new folder, but {folder} exists and is not empty. Name another one.")
    for file in sorted(_FOLDER.glob("*.parquet")):
        text = io.BytesIO()
        options = pyarrow.csv.WriteOptions(quoting_style="needed")
        pyarrow.csv.write_csv(pyarrow.parquet.read_table(file), text, options)
        write_text(folder / f"{file.stem}.csv", text.getvalue().decode("utf-8"))
