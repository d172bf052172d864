"""Faulty input is told all at once, with file, physical line and remedy."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from data_folders import BUNDLES, ITEMS, write_folder, write_text

from peft_combo.data.sources import open_dataset
from peft_combo.errors import DataError
from peft_combo.recipe.model import DataConfig

GOOD_ITEMS = "item_id,title,price\na,Shirt,10\nb,Jeans,20\nc,Shoes,30\n"
GOOD_BUNDLES = "bundle_id,item_id\n1,a\n1,b\n2,b\n2,c\n"


def told(config: DataConfig) -> str:
    """Return the message of the refusal, after checking that it lists faults."""
    with pytest.raises(DataError) as refusal:
        open_dataset(config)
    assert all(str(fault) in str(refusal.value) for fault in refusal.value.faults)
    return str(refusal.value)


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    message = told(
        write_text(
            tmp_path,
            items_csv="item_id,title,price,stock\na,Shirt,ten,1\nb,,20,few\na,Again,5,1\n,Nameless,-1,1\n",
            bundles_csv="bundle_id,item_id\n1,a\n1,zebra\n,b\n2,\n",
            bundle_meta_csv="bundle_id,timestamp\n1,yesterday\n1,5\n",
            interactions_csv="item_id,user_id,timestamp\na,u,1\nhat,u,1717178400000\n",
        )
    )
    for expected in (
        "items.csv:2: price is 'ten', not a number.",
        "items.csv:3: title is empty.",
        "items.csv:3: stock is 'few', not a number.",
        "items.csv:4: item_id 'a' occurs before, at items.csv:2.",
        "items.csv:5: item_id is empty.",
        "items.csv:5: price is '-1', expected at least 0.",
        "bundles.csv:3: item 'zebra' is not in items.",
        "bundles.csv:4: bundle_id is empty.",
        "bundles.csv:5: item_id is empty.",
        "bundle_meta.csv:2: timestamp is 'yesterday', not a time.",
        "bundle_meta.csv:3: bundle_id '1' occurs before, at bundle_meta.csv:2.",
        "interactions.csv:3: item 'hat' is not in items.",
        "interactions.csv:3: timestamp is '1717178400000', expected seconds from 1970. It looks like milliseconds",
        "interactions.csv: 1 of 2 rows name items that are not in items. To leave out events of items that left the ca",
    ):
        assert expected in message
    assert "15 faults" in message


def test_missing_columns_name_the_nearest_and_the_mapping(tmp_path: Path) -> None:
    message = told(write_text(tmp_path, items_csv="itemid,titles\na,Shirt\n", bundles_csv="bundle,item_id\n1,a\n"))
    assert "items.csv:1: has no column 'item_id'; it has itemid, titles. Did you mean \"itemid\"?" in message
    assert "data.columns.items.item_id: itemid" in message
    assert "data.columns.items.title: titles" in message
    assert "data.columns.bundles.bundle_id: bundle" in message


def test_mapping_to_a_missing_column(tmp_path: Path) -> None:
    config = write_text(tmp_path, items_csv=GOOD_ITEMS, bundles_csv=GOOD_BUNDLES)
    mapping = {"items": {"title": "titel"}, "bundles": {"owner": "item_id"}, "interactions": {"item_id": "sku"}}
    message = told(config.model_copy(update={"columns": mapping}))
    assert "data.columns.items.title: names the column 'titel'" in message
    assert 'Did you mean "title"?' in message
    assert (
        "data.columns.bundles: 'owner' is no column of this table; expected one of bundle_id, item_id, position"
        in message
    )
    assert "data.columns.interactions: there is no interactions table" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "items.csv: is empty."),
        ("item_id,title\n", "items.csv: has no rows."),
        ("item_id;title\na;Shirt\n", "items.csv:1: the columns are separated by ';', expected ','."),
        ("item_id,title,title\na,b,c\n", "items.csv:1: names 'title' more than once."),
        ("item_id,title\na,Shirt\nb,Jeans, blue\n\nc\n", "items.csv:3: has 3 columns, expected 2. Put text"),
        ("item_id,title\na,Shirt\nb,Jeans, blue\n\nc\n", "items.csv:5: has 1 columns, expected 2."),
        ("item_id,title\na,Shirt, red\nb,Jeans\n", "items.csv:2: has 3 columns, expected 2."),
        (
            'item_id,title\na,"Shirt\nb,Jeans\n',
            "items.csv:2: cannot be read as CSV: unexpected end of data. A double quote",
        ),
    ],
)
def test_broken_csv(tmp_path: Path, content: str, expected: str) -> None:
    assert expected in told(write_text(tmp_path, items_csv=content, bundles_csv=GOOD_BUNDLES))


def test_lines_are_physical_lines(tmp_path: Path) -> None:
    """A title over two lines and a blank line move what follows."""
    items = 'item_id,title,price\na,"Shirt,\nlong",1\n\nb,Jeans,cheap\n'
    assert "items.csv:5: price is 'cheap'" in told(write_text(tmp_path, items_csv=items, bundles_csv=GOOD_BUNDLES))


def test_wrong_encoding_names_the_line(tmp_path: Path) -> None:
    config = write_text(tmp_path, bundles_csv=GOOD_BUNDLES)
    (tmp_path / "items.csv").write_bytes("item_id,title\na,Shirt\nb,Café\n".encode("cp1252"))
    message = told(config)
    assert "items.csv:3: is not UTF-8 (byte 0xe9" in message
    assert "cp1252 gives 'b,Café'" in message
    assert "iconv -f ENCODING -t utf-8 items.csv" in message


def test_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    config = write_text(tmp_path, bundles_csv=GOOD_BUNDLES)
    (tmp_path / "items.csv").write_bytes(GOOD_ITEMS.encode("utf-8-sig"))
    assert open_dataset(config).catalog.item_ids == ("a", "b", "c")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "items.jsonl: is empty."),
        ('{"item_id": "a", "title": "x"}\n\n{oops\n', "items.jsonl:3: is not valid JSON"),
        ('["a"]\n', "items.jsonl row 1: expected an object in braces, found str."),
        ('\n{"item_id": "a", "title": "x", "price": "much"}\n', "items.jsonl:2: price is 'much'"),
        ('{"item_id": "a", "title": null}\n', "items.jsonl:1: title is empty."),
    ],
)
def test_broken_json_lines(tmp_path: Path, content: str, expected: str) -> None:
    assert expected in told(write_text(tmp_path, items_jsonl=content, bundles_csv=GOOD_BUNDLES))


def test_broken_parquet(tmp_path: Path) -> None:
    config = write_text(tmp_path, bundles_csv=GOOD_BUNDLES)
    (tmp_path / "items.parquet").write_bytes(gzip.compress(b"not parquet"))
    assert "items.parquet: cannot be read as Parquet" in told(config)


def test_parquet_rows_are_counted_from_one(tmp_path: Path) -> None:
    message = told(write_folder(tmp_path, ".parquet", items=[*ITEMS, {**ITEMS[0], "item_id": "9", "price": -1.0}]))
    assert "items.parquet row 5: price is -1.0, expected at least 0." in message


def test_two_files_of_one_table(tmp_path: Path) -> None:
    write_folder(tmp_path, ".jsonl")
    assert "items: items.csv and items.jsonl exist; expected one." in told(write_folder(tmp_path))


def test_unknown_items_get_the_nearest_id(tmp_path: Path) -> None:
    bundles = [*BUNDLES, {"bundle_id": "b3", "item_id": "85123", "position": 1}] * 2
    message = told(write_folder(tmp_path, bundles=bundles))
    assert "bundles.csv:8: item '85123' is not in items (in 2 rows). Did you mean \"85123A\"?" in message


def test_many_faults_are_counted(tmp_path: Path) -> None:
    items = "item_id,title,price\n" + "".join(f"i{n},Thing,free\n" for n in range(500))
    message = told(write_text(tmp_path, items_csv=items, bundles_csv="bundle_id,item_id\n1,i1\n1,i2\n"))
    assert "items.csv: 480 more rows have the fault of the line above." in message
    assert len(message.splitlines()) < 30


def test_no_usable_bundle(tmp_path: Path) -> None:
    config = write_text(tmp_path, items_csv=GOOD_ITEMS, bundles_csv="bundle_id,item_id\n1,a\n2,b\n2,b\n")
    message = told(config)
    assert "bundles.csv has no usable bundle: none of its bundles has 2 to 12 distinct items" in message
    assert "2 of 2 bundles left out: fewer than 2 distinct items" in message


def test_empty_bundle_file_is_no_missing_one(tmp_path: Path) -> None:
    message = told(write_text(tmp_path, items_csv=GOOD_ITEMS, bundles_csv="bundle_id,item_id\n"))
    assert "bundles.csv: has no rows." in message


def test_neither_bundles_nor_baskets(tmp_path: Path) -> None:
    message = told(write_text(tmp_path, items_csv=GOOD_ITEMS, interactions_csv="item_id,user_id\na,u\n"))
    assert "neither a bundles table nor interactions with a basket_id column" in message


def test_bundles_from_what_is_not_there(tmp_path: Path) -> None:
    baskets = "item_id,basket_id\na,1\nb,1\n"
    config = write_text(tmp_path / "x", items_csv=GOOD_ITEMS, interactions_csv=baskets)
    assert "interactions.csv has none" in told(config.model_copy(update={"bundles_from": "bundles"}))
    config = write_text(tmp_path / "y", items_csv=GOOD_ITEMS, bundles_csv=GOOD_BUNDLES)
    assert "has no basket ids" in told(config.model_copy(update={"bundles_from": "baskets"}))


def test_bundle_meta_of_other_bundles(tmp_path: Path) -> None:
    message = told(
        write_text(tmp_path, items_csv=GOOD_ITEMS, bundles_csv=GOOD_BUNDLES, bundle_meta_csv="bundle_id,name\n8,Set\n")
    )
    assert "bundle_meta.csv: none of its bundle ids occurs in bundles.csv." in message


def test_no_items_table(tmp_path: Path) -> None:
    assert "there is no items.csv, items.parquet or items.jsonl" in told(write_text(tmp_path, bundles_csv=GOOD_BUNDLES))


def test_unknown_places(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "notes.txt").write_text("x", "utf-8")
    missing = told(DataConfig(source="folder", path=str(tmp_path / "shpo")))
    assert "There is no data folder" in missing
    assert f'Did you mean "{tmp_path / "shop"}"?' in missing
    assert "found notes.txt" in told(DataConfig(source="folder", path=str(tmp_path / "shop")))
    assert "is a file" in told(DataConfig(source="folder", path=str(tmp_path / "shop" / "notes.txt")))
    write_folder(tmp_path / "outer" / "inner")
    assert f"Did you mean {tmp_path / 'outer' / 'inner'}?" in told(
        DataConfig(source="folder", path=str(tmp_path / "outer"))
    )
    assert "needs data.path" in told(DataConfig(source="folder"))
