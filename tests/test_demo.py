"""The shipped shop is what its script makes, reads like any folder, obeys its own rules and hides its style."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from pyarrow import parquet
from typer.testing import CliRunner

from peft_combo.cli import app
from peft_combo.data.language import count_unspaced, has_han
from peft_combo.data.readers.demo import demo_dataset
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import split, split_as
from peft_combo.data.stats import describe
from peft_combo.errors import DataError
from peft_combo.recipe.model import DataConfig

SHIPPED = REPOSITORY / "peft_combo" / "data" / "demo"

# Changes only when the rules or words of tools/make_demo.py change; say so in the changelog, for figures change too.
DIGEST_ZH = "894e1e3999bcfba7676a672773f26c4ffc4a41abda3ff07b8e0d1a4c24cbd0a5"
DIGEST = "d8af0e3f79495e15edc5620cbb52c543e1e168c3dc8565be40f442de15871b81"


def test_digest_is_pinned() -> None:
    assert demo_dataset().digest == DIGEST
    assert open_dataset(DataConfig(source="demo")).digest == DIGEST


@pytest.fixture(scope="module")
def make_tables() -> Iterator[Callable[..., dict[str, dict[str, list[Any]]]]]:
    sys.path.insert(0, str(REPOSITORY / "tools"))
    yield importlib.import_module("make_demo").make_tables
    sys.path.remove(str(REPOSITORY / "tools"))


def test_the_shipped_tables_are_what_the_script_makes(make_tables: Callable[..., Any]) -> None:
    tables = make_tables()
    files = {file.stem: file for file in SHIPPED.glob("*.parquet")}
    assert files.keys() == tables.keys()
    for name, columns in tables.items():
        assert parquet.read_table(files[name]).to_pydict() == columns
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 200_000


def test_the_chinese_shop_is_the_same_shop_in_other_words(make_tables: Callable[..., Any]) -> None:
    tables = make_tables(language="zh")
    folder = SHIPPED.with_name("demo_zh")
    assert {file.stem for file in folder.iterdir()} == {"items", "bundle_meta"}
    for file in folder.iterdir():
        assert parquet.read_table(file).to_pydict() == tables[file.stem]
    demo, chinese = demo_dataset(), demo_dataset("demo-zh")
    assert (chinese.digest, demo.digest) == (DIGEST_ZH, DIGEST)
    assert chinese.catalog.item_ids == demo.catalog.item_ids
    assert [rows.tolist() for rows in chinese.bundles.items] == [rows.tolist() for rows in demo.bundles.items]
    assert chinese.catalog.prices.tolist() == demo.catalog.prices.tolist()
    assert count_unspaced(chinese.catalog.titles) == len(chinese.catalog)
    assert all(has_han(part) for path in chinese.catalog.categories for part in path)


def test_another_seed_is_another_shop(make_tables: Callable[..., Any]) -> None:
    first, other = make_tables(), make_tables(seed=1)
    assert first["items"]["title"] != other["items"]["title"]
    assert len(other["items"]["title"]) == len(first["items"]["title"]) == 1000


def test_a_copy_is_a_data_folder_with_the_same_shop_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert CliRunner().invoke(app, ["data", "copy", "demo", str(folder)]).exit_code == 0
    assert {file.name for file in folder.iterdir()} == {f"{file.stem}.csv" for file in SHIPPED.iterdir()}
    checked = CliRunner().invoke(app, ["data", "check", "--data", str(folder)])
    assert checked.exit_code == 0, checked.output

    demo, copy = (DataConfig(source="demo"), DataConfig(source="folder", path=str(folder)))
    own, read = open_dataset(demo), open_dataset(copy)
    # What is tuned on and measured is the same. The digest is not: a folder numbers users and baskets as they appear.
    assert split_as(read, copy).digest == split_as(own, demo).digest
    assert read.catalog.texts() == own.catalog.texts()
    assert (read.bundles.bundle_ids, read.bundles.groups) == (own.bundles.bundle_ids, own.bundles.groups)
    assert [items.tolist() for items in read.bundles.items] == [items.tolist() for items in own.bundles.items]
    assert read.interactions is not None
    assert own.interactions is not None
    by_id = [read.interactions.user_ids[user] if user >= 0 else None for user in read.interactions.users]
    assert by_id == [own.interactions.user_ids[user] if user >= 0 else None for user in own.interactions.users]


def test_a_copy_never_overwrites_and_only_the_demo_is_copied(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    refused = CliRunner().invoke(app, ["data", "copy", "demo", str(tmp_path)])
    assert isinstance(refused.exception, DataError)
    assert "is not empty" in str(refused.exception)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    other = CliRunner().invoke(app, ["data", "copy", "polyvore", str(tmp_path / "new")])
    assert 'found "polyvore"' in str(other.exception)


def test_shape() -> None:
    figures = describe(demo_dataset())
    assert figures["items"] == 1000
    assert figures["bundles"] == 600
    assert 11_000 < figures["interactions"] < 13_000
    assert figures["users"] == 400
    assert figures["price_known"] == 1.0
    assert figures["items_in_no_bundle"] > 0.1
    assert figures["time_range"][0].startswith("2022-01-01")
    assert figures["time_range"][1].startswith("2023-12-31")


def test_outfits_keep_their_slots_and_gender() -> None:
    demo = demo_dataset()
    for items in demo.bundles.items:
        slots = Counter(demo.catalog.slots[row] for row in items)
        assert max(slots.values()) == 1
        assert slots["shoes"] == 1
        assert ("dress" in slots) != ("top" in slots and "bottom" in slots)
        assert len({demo.catalog.categories[row][1] for row in items}) == 1


def test_style_stays_hidden() -> None:
    catalog = demo_dataset().catalog
    assert set(catalog.attributes) == {"brand", "colour", "fabric", "season", "stock"}
    shown = " ".join(catalog.titles).casefold()
    for style in ("minimal", "boho", "street", "romantic", "workwear"):
        assert style not in shown


def test_titles_of_one_outfit_share_few_words() -> None:
    demo = demo_dataset()
    words = [set(title.casefold().replace(",", "").split()) for title in demo.catalog.titles]
    shared = [
        len(words[a] & words[b]) / min(len(words[a]), len(words[b]))
        for items in demo.bundles.items
        for a in items
        for b in items
        if a < b
    ]
    assert np.mean(shared) < 0.25


def test_brands_tell_style_through_outfits_only() -> None:
    """Brands of one style meet in train outfits far more often than chance: that is what tuning can learn."""
    demo = demo_dataset()
    train = split(demo, "user").train
    brands = demo.catalog.attributes["brand"]
    together = Counter(
        frozenset((brands[a], brands[b]))
        for row in train
        for a in demo.bundles.items[row]
        for b in demo.bundles.items[row]
        if a < b
    )
    same_style = together[frozenset(("Fernmoor", "Mirabon"))] + together[frozenset(("Runmark", "Skarsted"))]
    other_style = together[frozenset(("Fernmoor", "Skarsted"))] + together[frozenset(("Runmark", "Mirabon"))]
    assert same_style >= 5 * max(other_style, 1)


def test_owners_buy_their_outfits() -> None:
    demo = demo_dataset()
    interactions = demo.interactions
    assert interactions is not None
    for row in range(0, 600, 50):
        bought = interactions.baskets == demo.bundles.baskets[row]
        assert set(interactions.items[bought]) == set(demo.bundles.items[row])
        assert {interactions.user_ids[user] for user in interactions.users[bought]} == {demo.bundles.owners[row]}


@pytest.mark.parametrize("by", ["user", "bundle", "time", "cold-item"])
def test_it_can_be_split(by: str) -> None:
    parts = split(demo_dataset(), by)  # type: ignore[arg-type]
    assert len(parts.train) > 300
    assert min(len(parts.valid), len(parts.test)) > 30
