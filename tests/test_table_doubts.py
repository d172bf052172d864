"""What a user's tables look like in the wild: read, or refused with file, line and remedy; never believed unseen.

A property test per reader: any bytes in any table give a dataset or faults. `HYPOTHESIS_PROFILE=thorough` runs more.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tempfile
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_folders import ITEMS, write_folder, write_parquet, write_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_combo.data import Dataset, from_tables, open_dataset, split
from peft_combo.data.readers.encodings import decode
from peft_combo.data.readers.times import recognise
from peft_combo.data.task_data import inspect_data
from peft_combo.errors import DataError, PeftComboError
from peft_combo.recipe.model import DataConfig
from peft_combo.recipe.task import ClassificationTask, TaggingTask

settings.register_profile("ci", max_examples=120)
settings.register_profile("thorough", max_examples=10_000)
FUZZ = settings(
    settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci")), deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)  # fmt: skip

SHOP = "item_id,title\n" + "".join(f"a{n},Linen shirt {n}\n" for n in range(6))
SETS = "bundle_id,item_id\n" + "".join(f"b{n},a{n}\nb{n},a{(n + 1) % 6}\n" for n in range(6))


def told(config: DataConfig) -> str:
    with pytest.raises(DataError) as refusal:
        open_dataset(config)
    return str(refusal.value)


def titles(config: DataConfig) -> tuple[str, ...]:
    return open_dataset(config).catalog.titles


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["shop[1]", "a::b", "s*p", "q?", "{x,y}", "$HOME", "~nobody", "p%20q", " lead", "zip:", "é", "e\u0301", "-rf"],
)
def test_a_folder_is_the_one_that_was_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "shop1", items_csv=SHOP.replace("Linen", "Wrong"), bundles_csv=SETS)
    write_text(tmp_path / name, items_csv=SHOP, bundles_csv=SETS)
    write_parquet(tmp_path / name / "interactions.parquet", [{"item_id": "a1", "user_id": "u"}])
    monkeypatch.chdir(tmp_path)
    for path in (name, str(tmp_path / name)):
        dataset = open_dataset(DataConfig(source="folder", path=path))
        assert dataset.catalog.titles[0] == "Linen shirt 0"
        assert dataset.interactions is not None


# --- forms ------------------------------------------------------------------------------------------------------------

PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: pa.compress(raw, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("table", ["bundles.csv", "Bundles.CSV", "bundles.tsv", "bundles.jsonl"])
def test_compressed_tables_are_read(tmp_path: Path, table: str, ending: str) -> None:
    config = write_text(tmp_path, items_csv=SHOP)
    text = SETS.replace(",", "\t") if table.endswith("tsv") else SETS
    if table.endswith("jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in pd.read_csv(io.StringIO(SETS)).to_dict("records"))
    (tmp_path / f"{table}{ending}").write_bytes(PACKED[ending](text.encode()))
    assert len(open_dataset(config).bundles) == 6
    (tmp_path / f"{table}{ending}").write_bytes(PACKED[ending](text.encode())[:-9])
    assert "cannot be unpacked" in told(config) or ending == ".gz"


def parts_of(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    for place in range(0, len(rows), 5):
        write_parquet(folder / f"part-{place:05d}.snappy.parquet", rows[place : place + 5])
    (folder / "_SUCCESS").touch()
    (folder / ".part-0.crc").write_bytes(b"x")


def test_a_folder_of_parts_is_one_table(tmp_path: Path) -> None:
    rows = pd.read_csv(io.StringIO(SETS)).to_dict("records")
    for name in ("bundles.parquet", "bundles"):
        config = write_text(tmp_path / name, items_csv=SHOP)
        parts_of(tmp_path / name / name, rows)
        assert len(open_dataset(config).bundles) == 6
    (tmp_path / "bundles" / "bundles.csv").write_text(SETS)
    assert "bundles: bundles/ and bundles.csv exist; expected one." in told(config)


def test_folders_named_by_a_column_give_it(tmp_path: Path) -> None:
    """Hive partitions: the column stands in the folder's name alone."""
    config = write_text(tmp_path, items_csv=SHOP, bundles_csv=SETS)
    for user in ("u 1", "u2"):
        parts_of(tmp_path / "interactions.parquet" / f"user_id={user.replace(' ', '%20')}", [{"item_id": "a1"}])
    parts_of(tmp_path / "interactions.parquet" / "user_id=__HIVE_DEFAULT_PARTITION__", [{"item_id": "a2"}])
    interactions = open_dataset(config).interactions
    assert interactions is not None
    assert interactions.user_ids == ("u 1", "u2")
    assert interactions.users.tolist() == [-1, 0, 1]


def test_faults_name_the_part_and_its_row(tmp_path: Path) -> None:
    config = write_text(tmp_path, items_csv=SHOP)
    rows = pd.read_csv(io.StringIO(SETS)).to_dict("records")
    parts_of(tmp_path / "bundles.parquet", [*rows[:6], {"bundle_id": "b9", "item_id": "zebra"}])
    assert "bundles.parquet/part-00005.snappy.parquet row 2: item 'zebra' is not in items." in told(config)


def test_parts_of_several_types_and_columns_become_one(tmp_path: Path) -> None:
    config = write_text(
        tmp_path, items_csv="item_id,title\n7,Seven\n8,Eight\n", bundles_csv="bundle_id,item_id\n1,7\n1,8\n"
    )
    (tmp_path / "interactions").mkdir()
    write_parquet(
        tmp_path / "interactions" / "a.parquet", [{"item_id": 7, "user_id": 1}, {"item_id": 8, "user_id": None}]
    )
    write_parquet(tmp_path / "interactions" / "b.parquet", [{"item_id": "8", "rating": 4.0}])
    interactions = open_dataset(config).interactions
    assert interactions is not None
    assert interactions.items.tolist() == [0, 1, 1]
    assert interactions.users.tolist() == [0, -1, -1]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda f: (f / "bundles.parquet").mkdir(), "bundles.parquet/: is empty; expected the parts of a table."),
        (lambda f: [(f / "bundles.csv").mkdir(), (f / "bundles.csv" / "x.log").touch()], "holds bundles.csv/x.log"),
        (lambda f: (f / "bundles.parquet" / "_delta_log").mkdir(parents=True), "is a table of Delta: which of its"),
        (lambda f: (f / "bundle.csv").write_text(SETS), "bundle.csv: is not read; expected bundles.csv"),
        (lambda f: (f / "Bundles.xlsx").write_bytes(b"PK\3\4"), "Bundles.xlsx: is not read; expected bundles.csv"),
        (lambda f: (f / "bundles.csv.zip").write_bytes(b"PK\3\4"), "bundles.csv.zip: is not read; expected"),
        (lambda f: (f / "bundles.csv").write_bytes(b"PK\3\4"), "bundles.csv:1: is a ZIP archive or an Excel"),
        (lambda f: (f / "bundles.csv").write_bytes(b"PAR1xx"), "bundles.csv:1: is Parquet. Name it .parquet."),
        (lambda f: (f / "bundles.parquet").write_text("version https://git-lfs.github.com/spec/v1\n"), "lfs pull"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(tmp_path: Path, make: Callable[[Path], object], expected: str) -> None:
    config = write_text(tmp_path, items_csv=SHOP, interactions_csv="item_id,basket_id\na1,1\na2,1\n")
    make(tmp_path)
    assert expected in told(config)


def test_tables_nobody_reads_are_noted(tmp_path: Path) -> None:
    config = write_text(tmp_path, items_csv=SHOP, bundles_csv=SETS, orders_csv="x\n", bundle_csv=SETS)
    assert open_dataset(config).notes == ("not read, since no table is called so: bundle.csv, orders.csv",)


@pytest.mark.parametrize(
    "rows",
    [
        [{"bundle_id": "1", "item_id": ["a1", "a2"]}, {"bundle_id": "2", "item_id": ["a3", "a0"]}],
        [
            {"bundle_id": 1, "item_id": ["a1", "a2"], "position": [1, 2]},
            {"bundle_id": 2, "item_id": ["a0", "a3"], "position": [2, 1]},
        ],
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_row_may_hold_the_items_of_its_bundle(tmp_path: Path, rows: list[dict[str, Any]], suffix: str) -> None:
    write_text(tmp_path, items_csv=SHOP)
    write_folder(tmp_path / "sets", suffix, items=None, bundles=rows, bundle_meta=None, interactions=None)
    (tmp_path / "sets" / f"bundles{suffix}").rename(tmp_path / f"bundles{suffix}")
    bundles = open_dataset(DataConfig(source="folder", path=str(tmp_path))).bundles
    assert [one.tolist() for one in bundles.items] == [[1, 2], [3, 0]]


@pytest.mark.parametrize("cell", ['["a1", "a2"]', "['a1', 'a2']", "['a1' 'a2']", "[a1, a2]"])
def test_lists_in_csv_cells(tmp_path: Path, cell: str) -> None:
    quoted = cell.replace('"', '""')
    config = write_text(tmp_path, items_csv=SHOP, bundles_csv=f'bundle_id,item_id\n1,"{quoted}"\n2,a3\n2,a4\n')
    assert [one.tolist() for one in open_dataset(config).bundles.items] == [[1, 2], [3, 4]]


@pytest.mark.parametrize("cell", ["a1|a2", "a1;a2", "a1 a2", '"a1, a2"'])
def test_several_ids_in_a_cell_are_told(tmp_path: Path, cell: str) -> None:
    config = write_text(tmp_path, items_csv=SHOP, bundles_csv=f"bundle_id,item_id\n1,{cell}\n2,a3\n")
    assert "bundles.csv:2" in (message := told(config))
    assert "write one row an item" in message


def test_faults_in_a_list_name_its_row(tmp_path: Path) -> None:
    lines = '{"bundle_id": 1, "item_id": ["a1", "a2"]}\n\n{"bundle_id": 2, "item_id": ["a1", "zebra"]}\n'
    assert "bundles.jsonl:3: item 'zebra' is not in items." in told(
        write_text(tmp_path, items_csv=SHOP, bundles_jsonl=lines)
    )


def test_one_json_array_is_read(tmp_path: Path) -> None:
    items = json.dumps([{"item_id": f"a{n}", "title": f"Shirt {n}"} for n in range(6)], indent=1)
    assert titles(write_text(tmp_path, items_json=items, bundles_csv=SETS))[5] == "Shirt 5"


def test_an_index_of_pandas_is_left_out(tmp_path: Path) -> None:
    frame = pd.read_csv(io.StringIO(SHOP))
    config = write_text(tmp_path, items_csv=frame.to_csv(), bundles_csv=SETS)
    dataset = open_dataset(config)
    assert dataset.catalog.attributes == {}
    assert "items.csv: column 1 has no name and was left out" in dataset.notes
    frame.to_csv(tmp_path / "items.csv")
    pd.read_csv(tmp_path / "items.csv").to_csv(tmp_path / "items.csv", index=False)
    dataset = open_dataset(config)
    assert dataset.catalog.attributes == {}
    assert "items.csv: the column 'Unnamed: 0' is an index of pandas and was left out" in dataset.notes


# --- items that left the catalogue ------------------------------------------------------------------------------------


def test_unknown_items_are_dropped_on_request(tmp_path: Path) -> None:
    config = write_text(
        tmp_path, items_csv=SHOP, bundles_csv=SETS + "b9,gone\nb9,a1\nb9,a2\n",
        interactions_csv="item_id,user_id\na1,u\ngone,u\nlost,v\ngone,v\n",
    )  # fmt: skip
    assert "--set data.unknown_items=drop" in told(config)
    dataset = open_dataset(config.model_copy(update={"unknown_items": "drop"}))
    assert dataset.interactions is not None
    assert len(dataset.interactions) == 1
    assert dataset.bundles.items[-1].tolist() == [1, 2]
    assert (
        "3 of 4 rows of interactions.csv name 2 items that are not in items, such as 'gone', and were left out "
        "(data.unknown_items: drop)" in dataset.notes
    )
    assert any("1 of 15 rows of bundles.csv name one item that is" in note for note in dataset.notes)


def test_ids_of_another_catalogue_are_a_fault_even_so(tmp_path: Path) -> None:
    config = write_text(tmp_path, items_csv=SHOP, bundles_csv=SETS.replace(",a", ",z"))
    assert "is not in items" in told(config.model_copy(update={"unknown_items": "drop"}))


# --- CSV --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", [r'"pan 10\" wide"', r'"a \"good\" pan"', r'"pan 10\", red"', r'"10\""', r"pan 10\" wide"]
)
def test_quotes_escaped_by_a_backslash_are_told(tmp_path: Path, row: str) -> None:
    config = write_text(tmp_path, items_csv=f"item_id,title\na9,Plain\na8,{row}\n", bundles_csv=SETS)
    assert 'items.csv:3: holds \\" ; expected "" for a quote within quotes.' in told(config)


def test_a_backslash_may_be_text(tmp_path: Path) -> None:
    items = 'item_id,title\na0,"C:\\"\na1,"{""wide"": ""10\\""""}"\na2,x\na3,x\na4,x\na5,x\n'
    assert titles(write_text(tmp_path, items_csv=items, bundles_csv=SETS))[:2] == ("C:\\", '{"wide": "10\\""}')


@pytest.mark.parametrize("length", [200_000, 3_000_000])
def test_long_cells_are_read(tmp_path: Path, length: int) -> None:
    rows = [(f"a{n}", f"Linen shirt {n}", f'"{"wörd, " * (length // 6)}"' if n == 0 else "") for n in range(6)]
    items = "item_id,title,description\n" + "".join(",".join(row) + "\n" for row in rows)
    dataset = open_dataset(write_text(tmp_path, items_csv=items, bundles_csv=SETS))
    assert len(dataset.catalog.descriptions[0]) >= length - 8


def test_rows_of_commas_are_left_out(tmp_path: Path) -> None:
    dataset = open_dataset(write_text(tmp_path, items_csv=SHOP + ",\n,\n", bundles_csv=SETS))
    assert len(dataset.catalog) == 6
    assert "2 rows of items.csv are empty and were left out" in dataset.notes
    assert "items.csv:10: title is empty." in told(
        write_text(tmp_path, items_csv=SHOP + ",\n,\na9,\n", bundles_csv=SETS)
    )


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("sep=;\nitem_id;title\n", "items.csv:1: starts with 'sep=;', which only a spreadsheet understands."),
        ("item_id\ttitle\na\tb\n", "items.csv:1: the columns are separated by '\\t', expected ','. Name it .tsv."),
        ("item_id,title\na,b\\, c\n", "a backslash before it is not understood"),
    ],
)
def test_dialects_that_are_not_read_are_told(tmp_path: Path, items: str, expected: str) -> None:
    assert expected in told(write_text(tmp_path, items_csv=items, bundles_csv=SETS))


CELLS = st.text(st.sampled_from(list('ab,"\n\r \t\\;é\0')), max_size=8)


@FUZZ
@given(rows=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=6), quoting=st.sampled_from([0, 1]))
def test_what_the_csv_module_writes_is_read_back(rows: list[tuple[str, str, str]], quoting: Any) -> None:
    import csv

    from peft_combo.data.readers.csv_table import read_csv

    out = io.StringIO(newline="")
    csv.writer(out, quoting=quoting).writerows([("x", "y", "z"), *rows])
    faults: list[Any] = []
    read = read_csv(out.getvalue(), "items.csv", ",", faults, [])
    if read is None:
        assert all('holds \\"' in str(fault) for fault in faults)
        return
    kept = [row for row in rows if any(cell.strip() for cell in row)]
    assert list(zip(*(read[name].to_pylist() for name in "xyz"), strict=True)) == kept


# --- encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "word"),
    [
        ("gb18030", "红色亚麻连衣裙"),
        ("big5", "紅色亞麻連衣裙"),
        ("shift_jis", "赤いリネンのワンピース"),
        ("cp949", "빨간 린넨 드레스"),
        ("cp1251", "Красное льняное платье"),
        ("koi8_r", "Красное льняное платье"),
        ("cp1252", "Robe d’été brodée"),
        ("cp1250", "Żółta sukienka wieczorowa"),
    ],
)
def test_another_encoding_is_named_with_how_the_line_would_read(tmp_path: Path, encoding: str, word: str) -> None:
    config = write_text(tmp_path, bundles_csv=SETS)
    (tmp_path / "items.csv").write_bytes(SHOP.replace("Linen shirt", word).encode(encoding))
    message = told(config)
    assert "items.csv:2: is not UTF-8" in message
    assert f"'a0,{word} 0'" in message
    assert "> utf8-items.csv" in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_what_a_byte_order_mark_names_is_read_and_said(tmp_path: Path, encoding: str) -> None:
    config = write_text(tmp_path, bundles_csv=SETS)
    (tmp_path / "items.csv").write_bytes(SHOP.replace("Linen", "Líñen").encode(encoding))
    dataset = open_dataset(config)
    assert dataset.catalog.titles[0] == "Líñen shirt 0"
    assert (dataset.notes == ()) == (encoding == "utf-8-sig")


def test_sixteen_bits_without_a_mark_are_named() -> None:
    for encoding in ("utf-16-le", "utf-16-be"):
        found = decode(SHOP.encode(encoding), "items.csv")
        assert found.text is None
        assert f"iconv -f {encoding.replace('-16-', '-16')} " in found.remedy


def test_a_cut_character_is_no_other_encoding() -> None:
    found = decode(("item_id,title\n" + "é,à\n" * 9).encode()[:-2] + b"\n", "items.csv")
    assert (found.line, found.text) == (10, None)
    assert "the file is UTF-8 but for one place" in found.problem
    assert "do not convert the whole file" in found.remedy


# --- missing values ---------------------------------------------------------------------------------------------------


def test_nan_in_json_is_missing(tmp_path: Path) -> None:
    lines = '{"item_id": "a", "title": "x", "price": NaN}\n{"item_id": "b", "title": NaN}\n'
    assert "items.jsonl:2: title is empty." in told(write_text(tmp_path, items_jsonl=lines, bundles_csv=SETS))
    lines = "".join(f'{{"item_id": "a{n}", "title": "x {n}", "brand": NaN}}\n' for n in range(6))
    users = '{"item_id": "a1", "user_id": NaN}\n{"item_id": "a1", "user_id": 7}\n'
    dataset = open_dataset(write_text(tmp_path, items_jsonl=lines, bundles_csv=SETS, interactions_jsonl=users))
    assert dataset.interactions is not None
    assert dataset.interactions.user_ids == ("7",)
    assert dataset.catalog.attributes["brand"] == (None,) * 6
    config = write_text(tmp_path, items_jsonl=lines.replace("NaN", "Infinity"))
    assert "items.jsonl:1: is not valid JSON: Infinity is no value." in told(config)


@pytest.mark.parametrize("word", ["nan", "NULL", "None", "N/A", "<NA>", "\\N", "NaT"])
def test_words_for_missing_values(tmp_path: Path, word: str) -> None:
    """An id that is none is a fault: all its rows would be one user. In a text it is said."""
    users = f"item_id,user_id\na1,u\na2,{word}\n"
    assert "interactions.csv:3: user_id is " in (
        message := told(write_text(tmp_path / "ids", items_csv=SHOP, bundles_csv=SETS, interactions_csv=users))
    )
    assert "a word for a missing value. Leave the cell empty" in message
    items = SHOP.replace("title", "title,brand").replace("\n", ",x\n").replace("title,brand,x", "title,brand")
    items = items.replace("shirt 3,x", f"shirt 3,{word}")
    (note,) = open_dataset(write_text(tmp_path / "texts", items_csv=items, bundles_csv=SETS)).notes
    assert note == (
        f"brand is {word!r} in one row of items.csv, first at items.csv:5: taken for text; leave a cell empty where it "
        "is missing"
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("a1,8.80123E+12\n", "user_id is '8.80123E+12', digits that a spreadsheet rounded. Export the column as text."),
        ("a1,caf\ufffd\n", "user_id is 'caf\ufffd', which has lost characters."),
    ],
)
def test_ids_that_lost_something_are_told(tmp_path: Path, rows: str, expected: str) -> None:
    config = write_text(tmp_path, items_csv=SHOP, bundles_csv=SETS, interactions_csv="item_id,user_id\n" + rows)
    assert expected in told(config)


def test_floats_that_lost_digits_are_told(tmp_path: Path) -> None:
    config = write_text(tmp_path, items_csv=SHOP, bundles_csv=SETS)
    table = {"item_id": ["a1", "a2"], "user_id": [1e16, None]}
    pq.write_table(pa.table(table), tmp_path / "interactions.parquet")
    assert "interactions.parquet row 1: user_id is 1e+16, a float that has lost digits." in told(config)


@pytest.mark.parametrize(
    ("known", "unknown"), [("café", "cafe\u0301"), ("a1", "a\u200b1"), ("Ａ1", "A1"), ("a1", "A1"), ("a\xad1", "a1")]
)
def test_look_alikes_are_said_to_be(tmp_path: Path, known: str, unknown: str) -> None:
    items, sets = f"item_id,title\n{known},x\nb,y\n", f"bundle_id,item_id\n1,{unknown}\n1,b\n"
    message = told(write_text(tmp_path, items_csv=items, bundles_csv=sets))
    assert "It looks like " in message or "but for upper and lower case" in message
    if not known.isascii() or not unknown.isascii():
        both = write_text(tmp_path / "both", items_csv=f"{items}{unknown},z\n", bundles_csv=sets)
        (note,) = open_dataset(both).notes
        assert note.startswith("one pair of item_id in items.csv look alike and count as different")


# --- times ------------------------------------------------------------------------------------------------------------

MOMENT = 1_673_740_800  # 2023-01-15


@pytest.mark.parametrize(
    ("numbers", "seconds", "said"),
    [
        ([MOMENT, MOMENT + 60.5], [MOMENT, MOMENT + 60.5], ""),
        ([MOMENT * 1e3], [MOMENT], "milliseconds since 1970"),
        ([MOMENT * 1e6], [MOMENT], "microseconds since 1970"),
        ([MOMENT * 1e9], [MOMENT], "nanoseconds since 1970"),
        ([20230115, 20240229], [MOMENT, 1_709_164_800], "dates such as 20240531"),
        ([202301150130], [MOMENT + 5_400], "times such as 202405311800"),
        ([20230115013005], [MOMENT + 5_405], "times such as 20240531180000"),
    ],
)
def test_numbers_that_can_be_one_thing_alone_are_read_as_that(
    numbers: list[float], seconds: list[float], said: str
) -> None:
    found = recognise(np.array([*numbers, np.nan], np.float64), now=MOMENT + 1e8)
    assert found.seconds[:-1].tolist() == seconds
    assert np.isnan(found.seconds[-1])
    assert not found.misfits.any()
    assert said in found.note
    assert bool(said) == bool(found.note)


@pytest.mark.parametrize(
    ("numbers", "keys"),
    [([202301, 202312], ["%Y%m"]), ([44941, 44942], ["excel"]), ([44941.5], ["excel"]), ([2022, 2023], ["%Y"]),
     ([19372], ["days"]), ([2023011512, 2023011513], ["%Y%m%d%H", "s"])],
)  # fmt: skip
def test_numbers_that_could_be_several_things_are_asked_about(
    tmp_path: Path, numbers: list[float], keys: list[str]
) -> None:
    assert [one.key for one in recognise(np.array(numbers, float), now=MOMENT).choices] == keys
    rows = "".join(f"a{n},u,{number}\n" for n, number in enumerate(numbers))
    config = write_text(
        tmp_path, items_csv=SHOP, bundles_csv=SETS, interactions_csv=f"item_id,user_id,timestamp\n{rows}"
    )
    assert f"--set data.time_format.interactions={keys[0]}" in told(config)
    chosen = config.model_copy(update={"time_format": {"interactions": keys[0]}})
    interactions = open_dataset(chosen).interactions
    assert interactions is not None
    assert 2021 < datetime.fromtimestamp(interactions.times[0], UTC).year < 2024


@pytest.mark.parametrize(
    ("cell", "problem"),
    [("0", "expected seconds since 1970 as in most rows"), ("-1", "expected seconds since 1970 as in most rows"),
     ("1673740800000", "It looks like milliseconds"), ("20230115", "It looks like dates such as 20240531"),
     ("9999-12-31", "expected a time from 1970 to 2200"), ("1900-01-01", "expected a time from 1970 to 2200"),
     ("15.01.2023", "not a time"), ("nan", "not a time")],
)  # fmt: skip
def test_a_time_that_is_none_among_others(tmp_path: Path, cell: str, problem: str) -> None:
    rows = "".join(f"a{n},{MOMENT + n}\n" for n in range(4)) + f"a5,{cell}\n"
    message = told(
        write_text(tmp_path, items_csv=SHOP, bundles_csv=SETS, interactions_csv=f"item_id,timestamp\n{rows}")
    )
    assert f"interactions.csv:6: timestamp is '{cell}'" in message
    assert problem in message


def test_times_are_read_as_the_recipe_says(tmp_path: Path) -> None:
    config = write_text(
        tmp_path, items_csv=SHOP, bundles_csv=SETS, interactions_csv="item_id,timestamp\na1,15.01.2023\na2,\n"
    )
    interactions = open_dataset(config.model_copy(update={"time_format": {"interactions": "%d.%m.%Y"}})).interactions
    assert interactions is not None
    assert interactions.times[0] == MOMENT
    wrong = config.model_copy(update={"time_format": {"interactions": "%m/%d/%Y"}})
    assert "which is not written as %m/%d/%Y" in told(wrong)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([date(2023, 1, 15), date(9999, 12, 31)]),
        pa.array([datetime(2023, 1, 15), datetime(9999, 12, 31)], pa.timestamp("us")),
        pa.array([datetime(2023, 1, 15, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)], pa.timestamp("s", "UTC")),
        pa.array([datetime(2023, 1, 15), datetime(9999, 12, 31)], pa.date64()),
    ],
)
def test_times_of_arrow(tmp_path: Path, column: Any) -> None:
    config = write_text(tmp_path, items_csv=SHOP, bundles_csv=SETS)
    pq.write_table(pa.table({"item_id": ["a1", "a2"], "timestamp": column}), tmp_path / "interactions.parquet")
    message = told(config)
    assert "interactions.parquet row 2: timestamp is '9999-12-31" in message
    assert "expected a time from 1970 to 2200. Leave it empty where it is not known." in message
    pq.write_table(pa.table({"item_id": ["a1"], "timestamp": column[:1]}), tmp_path / "interactions.parquet")
    interactions = open_dataset(config).interactions
    assert interactions is not None
    assert interactions.times.tolist() == [MOMENT]


def test_dates_written_as_numbers_do_not_leak_into_a_split_by_time(tmp_path: Path) -> None:
    """Bundles in ISO 8601 and interactions as 20230115: what lies after the first held-out bundle stays unseen."""
    days = [f"2023-{month:02d}-{day:02d}" for month in range(1, 11) for day in (1, 15)]
    config = write_text(
        tmp_path,
        items_csv="item_id,title\n" + "".join(f"a{n},Shirt {n}\n" for n in range(21)),
        bundles_csv="bundle_id,item_id\n" + "".join(f"b{n},a{n}\nb{n},a{n + 1}\n" for n in range(20)),
        bundle_meta_csv="bundle_id,timestamp\n" + "".join(f"b{n},{day}\n" for n, day in enumerate(days)),
        interactions_csv="item_id,timestamp\n" + "".join(f"a{n},{d.replace('-', '')}\n" for n, d in enumerate(days)),
    )  # fmt: skip
    parts = split(open_dataset(config), "time", 0.1, 0.2)
    assert len(parts.train_interactions) == 14


# --- Parquet and Arrow ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([[("k", "v")]] * 6, pa.map_(pa.string(), pa.string())), "k"),
        (pa.array([{"a": 1}] * 6), '{"a": 1}'),
        (pa.array([b"\xff\xfe"] * 6, pa.binary()), None),
        (pa.array([1] * 6, pa.duration("s")), None),
        (pa.array(["x"] * 6).dictionary_encode(), "x"),
        (pa.array(["x"] * 6, pa.large_string()), "x"),
        (pa.array([None] * 6), None),
    ],
)
def test_columns_nobody_needs_cost_nothing_but_themselves(tmp_path: Path, column: Any, expected: str | None) -> None:
    config = write_text(tmp_path, bundles_csv=SETS)
    frame = pd.read_csv(io.StringIO(SHOP))
    table = pa.table({"item_id": frame["item_id"], "title": frame["title"], "extra": column})
    pq.write_table(table, tmp_path / "items.parquet")
    dataset = open_dataset(config)
    held = dataset.catalog.attributes.get("extra", (None,))[0]
    assert (expected or "") in (held or "")
    left_out = "items.parquet: the column 'extra' cannot be read and was left out"
    assert any(note.startswith(left_out) for note in dataset.notes) == ("extra" not in dataset.catalog.attributes)


def test_text_that_is_not_utf_8_in_parquet_is_told(tmp_path: Path) -> None:
    config = write_text(tmp_path, bundles_csv=SETS)
    broken = pa.array([b"ok", b"caf\xe9"]).view(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, broken.buffers())
    pq.write_table(pa.table({"item_id": ["a1", "a2"], "title": text}), tmp_path / "items.parquet")
    assert "items.parquet: title cannot be read: In chunk 0: Invalid: Invalid UTF8 sequence at string index 1" in told(
        config
    )


def test_half_an_emoji_is_replaced_and_said(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"item_id": f"a{n}", "title": f"Tote {n}"}) + "\n" for n in range(6))
    lines = lines.replace('Tote 3"', 'Tote 3 \\ud83d"')
    dataset = open_dataset(write_text(tmp_path, items_jsonl=lines, bundles_csv=SETS))
    assert dataset.catalog.titles[3] == "Tote 3 \ufffd"
    assert "the first in line 4; U+FFFD stands for it" in dataset.notes[0]


@pytest.mark.parametrize("given", [pd.DataFrame, datasets.Dataset.from_list, pa.Table.from_pylist])
def test_tables_in_memory_are_checked_as_a_folder_is(given: Callable[[Any], Any]) -> None:
    rows = [{"item_id": f"a{n}", "title": f"Shirt {n}"} for n in range(6)]
    sets = [{"bundle_id": "1", "item_id": ["a1", "a2"]}, {"bundle_id": "2", "item_id": ["a2", "a3"]}]
    dataset = from_tables({"items": given(rows), "bundles": given(sets)})
    assert [one.tolist() for one in dataset.bundles.items] == [[1, 2], [2, 3]]
    with pytest.raises(DataError, match=r"bundles row 1: item 'a9' is not in items"):
        from_tables({"items": given(rows), "bundles": given([{"bundle_id": "1", "item_id": "a9"}])})
    with pytest.raises(DataError, match=r"item: is no table.*Did you mean \"items\"\?"):
        from_tables({"item": given(rows)})


def test_a_selection_of_a_dataset_is_what_is_taken() -> None:
    rows = datasets.Dataset.from_list([{"item_id": f"a{n}", "title": f"Shirt {n}"} for n in range(6)])
    assert from_tables({"items": rows.select([4, 2])}).catalog.item_ids == ("a4", "a2")


# --- data check says what tune would say ------------------------------------------------------------------------------


def test_the_check_says_how_much_is_left_and_what_was_left_out(tmp_path: Path) -> None:
    config = write_text(tmp_path, items_csv=SHOP, bundles_csv=SETS + "b9,a1\n")
    faults, (figures,) = inspect_data(config)
    assert faults == []
    assert (figures["bundles"], figures["notes"]) == (6, ["1 of 7 bundles left out: fewer than 2 distinct items"])


# --- anything at all --------------------------------------------------------------------------------------------------

HEADERS = [b"item_id,title\n", b"bundle_id,item_id\n", b"item_id,user_id,timestamp\n", b"text,label\n", b""]
SNIPPETS = st.sampled_from(
    [b"a0", b"a1,", b'"', b'""', b"\n", b"\r\n", b"\r", b"\t", b"\\", b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"[",
     b"{", b"\xff\xfe", b"NaN", b"null", b'{"item_id": "a1", "title": "x"}\n', b"PK\x03\x04", b"\x1f\x8b",
     b'{"text": "red hat", "spans": [[4, 7, "Clo"]]}\n',
     b"]", b"}", b'"\\ud83d"', b"1e999", b"9" * 400, b"-1", b"20230115", b"9999-12-31", b"[" * 400, b"PAR1", b"sep=;\n"]
)  # fmt: skip
PIECES = SNIPPETS | st.binary(max_size=12) | st.text(max_size=6).map(lambda text: text.encode("utf-8", "surrogatepass"))
BYTES = st.builds(
    lambda header, pieces: header + b"".join(pieces), st.sampled_from(HEADERS), st.lists(PIECES, max_size=12)
)
ENDINGS = st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".csv.gz", ".jsonl.zst", ".csv.xz", ".parquet"])


def opens_or_refuses(config: DataConfig, needs: Any = "items") -> Dataset | None:
    try:
        return open_dataset(config, needs)
    except PeftComboError:
        return None


@pytest.mark.parametrize("table", ["items", "bundles", "bundle_meta", "interactions"])
@FUZZ
@given(content=BYTES, ending=ENDINGS)
def test_any_bytes_in_a_table_give_a_dataset_or_faults(tmp_path: Path, table: str, content: bytes, ending: str) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    samples = {"items.csv": SHOP, "bundles.csv": SETS}
    for name, text in samples.items():
        if not name.startswith(table):
            (folder / name).write_text(text)
    packed = PACKED.get(Path(f"x{ending}").suffix)
    (folder / f"{table}{ending}").write_bytes(content if packed is None else packed(content))
    opens_or_refuses(DataConfig(source="folder", path=str(folder)))
    (folder / f"{table}{ending}").write_bytes(content)
    opens_or_refuses(DataConfig(source="folder", path=str(folder)))


@pytest.fixture(scope="module")
def parquet_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("sound") / "items.parquet"
    write_parquet(file, ITEMS)
    return file.read_bytes()


@FUZZ
@given(data=st.data())
def test_any_damage_to_parquet_is_a_fault(tmp_path: Path, parquet_bytes: bytes, data: st.DataObject) -> None:
    raw = bytearray(parquet_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))]
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    (folder / "items.parquet").write_bytes(bytes(raw))
    opens_or_refuses(DataConfig(source="folder", path=str(folder)))


@FUZZ
@given(content=BYTES, ending=st.sampled_from(["labels.csv", "labels.jsonl", "tags.jsonl", "tags.conll"]))
def test_any_bytes_in_labels_and_tags_are_read_or_refused(tmp_path: Path, content: bytes, ending: str) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    (folder / ending).write_bytes(content)
    config = DataConfig(source="folder", path=str(folder))
    for task in (ClassificationTask(labels="table"), TaggingTask(), None):
        inspect_data(config, task)


@FUZZ
@given(content=BYTES, place=st.integers(0, 5))
def test_any_bytes_in_the_layout_of_bundlerec(tmp_path: Path, content: bytes, place: int) -> None:
    from peft_combo.data.readers.bundlerec import FILES

    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    for name, columns in FILES.items():
        cells = ["b1" if "bundle" in one else "u1" if "user" in one else "1" for one in columns]
        (folder / name).write_text(f"{','.join(columns)}\n{','.join(cells)}\n")
    changed = list(FILES)[place]
    (folder / changed).write_bytes(",".join(FILES[changed]).encode() + b"\n" + content)
    opens_or_refuses(DataConfig(source="bundlerec", path=str(folder)))
