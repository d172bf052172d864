"""Pictures of items: read without decoding, never from outside the folder, decoded within limits, drawn."""

from __future__ import annotations

import importlib
import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import REPOSITORY
from pyarrow import parquet

from peft_combo.data.model import Catalog
from peft_combo.data.pictures import (
    DrawnPicture,
    PictureBytes,
    PictureError,
    PictureFile,
    decode_picture,
    decoding,
    find_path_problem,
    read_pictures,
)
from peft_combo.data.pictures.drawing import COLOURS, PATTERNS
from peft_combo.data.readers.demo import demo_dataset
from peft_combo.data.sources import from_tables, open_dataset
from peft_combo.data.stats import describe
from peft_combo.errors import DataError
from peft_combo.recipe.model import DataConfig

Image: Any = pytest.importorskip("PIL.Image", reason="pillow is not installed (extra [images])")

# Changes with the rules of tools/make_demo_pictures.py, and figures measured on it with it; say so in the changelog.
DIGEST = "263e37f2697ec6b2e453e3399c9b6cc00ac7840df482ccd043499ad3a695f580"


def png(colour: str = "red", size: tuple[int, int] = (8, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def write_shop(folder: Path, images: list[str]) -> DataConfig:
    rows = "\n".join(f"i{row},title {row},{image}" for row, image in enumerate(images))
    (folder / "items.csv").write_text(f"item_id,title,image\n{rows}\n")
    (folder / "bundles.csv").write_text("bundle_id,item_id\nb,i0\nb,i1\n")
    return DataConfig(source="folder", path=str(folder))


# --- read -------------------------------------------------------------------------------------------------------------


def test_an_image_column_is_read_and_no_picture_is_opened(tmp_path: Path) -> None:
    dataset = open_dataset(write_shop(tmp_path, ["a.png", "", "not there.jpg"]))
    first, none, last = dataset.catalog.pictures
    assert isinstance(first, PictureFile)
    assert (none, last and last.name) == (None, "not there.jpg")
    assert "image" not in dataset.catalog.attributes
    assert describe(dataset)["items_with_picture"] == 2
    assert [one and one.name for one in dataset.catalog.take([2, 1]).pictures] == ["not there.jpg", None]


def test_a_catalogue_without_pictures_keeps_its_digest_and_one_with_other_pictures_is_another(tmp_path: Path) -> None:
    digests = [open_dataset(write_shop(tmp_path, images)).digest for images in (["", ""], ["a.png", ""], ["b.png", ""])]
    (tmp_path / "items.csv").write_text("item_id,title\ni0,title 0\ni1,title 1\n")
    assert open_dataset(DataConfig(source="folder", path=str(tmp_path))).digest == digests[0]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("https://example.org/a.png", "never fetched"), ("HTTP:a", "never fetched"), ("file:///etc/passwd", "fetched"),
        ("data:image/png;base64,AA", "never fetched"), ("//host/a.png", "fetched"), ("\\\\host\\a.png", "fetched"),
        ("/etc/passwd", "not relative"), ("C:\\a.png", "not relative"), ("c:a.png", "not relative"),
        ("../a.png", "leads out"), ("a/../../b.png", "leads out"), ("a\\..\\..\\b", "leads out"), ("a\0b", "character"),
    ],
)  # fmt: skip
def test_a_path_never_leaves_the_folder_and_is_no_address(path: str, problem: str) -> None:
    assert problem in find_path_problem(path)


def test_a_plain_path_below_the_folder_is_fine() -> None:
    assert [find_path_problem(path) for path in ("a.png", "images/7.jpg", "x y/ü.webp", "a..b.png")] == [""] * 4


def test_faulty_paths_are_told_with_line_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        open_dataset(write_shop(tmp_path, ["https://x.org/a.png", "../b.png"]))
    lines = str(refused.value).splitlines()
    assert "items.csv:2" in lines[1]
    assert "never fetched" in lines[1]
    assert "items.csv:3" in lines[2]
    assert "images/7.jpg" in lines[2]


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "shop" / "a.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "shop" / "b.png").write_bytes(png())
    pictures = open_dataset(write_shop(tmp_path / "shop", ["a.png", "b.png"])).catalog.pictures
    with pytest.raises(DataError, match=r"a\.png: leads out of the data folder"):
        read_pictures(pictures, "shop")
    assert read_pictures(pictures[1:], "shop") == [png()]


@pytest.mark.parametrize("records", [False, True], ids=["bytes", "records of datasets"])
def test_pictures_lie_in_parquet_as_bytes(records: bool, tmp_path: Path) -> None:
    cells = [png("red"), None]
    column = [one and {"bytes": one, "path": "x.png"} for one in cells] if records else cells
    table = pa.table({"item_id": ["i0", "i1"], "title": ["a", "b"], "image": column})
    parquet.write_table(table, tmp_path / "items.parquet")
    (tmp_path / "bundles.csv").write_text("bundle_id,item_id\nb,i0\nb,i1\n")
    found = open_dataset(DataConfig(source="folder", path=str(tmp_path))).catalog.pictures
    assert read_pictures(found, "shop") == cells
    bundles = pa.table({"bundle_id": ["b", "b"], "item_id": ["i0", "i1"]})
    in_memory = from_tables({"items": table, "bundles": bundles}).catalog.pictures
    assert read_pictures(in_memory, "shop") == cells


def test_a_path_in_a_table_in_memory_is_refused() -> None:
    items = pa.table({"item_id": ["i0", "i1"], "title": ["a", "b"], "image": ["a.png", "b.png"]})
    bundles = pa.table({"bundle_id": ["b", "b"], "item_id": ["i0", "i1"]})
    with pytest.raises(DataError, match="Give the bytes of pictures"):
        from_tables({"items": items, "bundles": bundles})


# --- decoded ----------------------------------------------------------------------------------------------------------


def test_check_names_what_is_missing_and_what_is_no_picture(tmp_path: Path, shell: Callable[..., Any]) -> None:
    write_shop(tmp_path, ["a.png", "b.png", "c.png", "d.png"])
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_text("no picture")
    (tmp_path / "c.png").write_bytes(png(size=(200, 200))[:-60])
    code, out, err = shell("data", "check", "--data", tmp_path)
    told = out + err
    assert code != 0
    assert "a.png" not in told
    for line in ("b.png of i1: is no picture", "c.png of i2: is cut short", "d.png of i3: there is no such file"):
        assert line in told


def test_a_decompression_bomb_is_refused_before_it_is_unpacked() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(PictureError, match="far more than 50,000,000 pixels"):
        decode_picture(bomb)


def test_more_pixels_than_a_camera_makes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MOST_PIXELS", 40)
    assert decode_picture(png(size=(8, 5))).size == (8, 5)
    with pytest.raises(PictureError, match="8 x 6 pixels, expected at most 40"):
        decode_picture(png(size=(8, 6)))


def test_what_is_transparent_is_white() -> None:
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(file, "PNG")
    assert decode_picture(file.getvalue()).getpixel((1, 1)) == (255, 255, 255)


# --- drawn ------------------------------------------------------------------------------------------------------------


def test_the_drawn_shop_is_what_the_script_makes_and_hides_what_it_should() -> None:
    sys.path.insert(0, str(REPOSITORY / "tools"))
    tables = importlib.import_module("make_demo_pictures").make_tables()
    folder = REPOSITORY / "peft_combo" / "data" / "demo_pictures"
    for file in folder.iterdir():
        assert parquet.read_table(file).to_pydict() == tables[file.stem]
    dataset = demo_dataset("demo-pictures")
    assert dataset.digest == DIGEST
    catalog: Catalog = dataset.catalog
    drawn = [one for one in catalog.pictures if isinstance(one, DrawnPicture)]
    assert len(drawn) == len(catalog) == 1000
    told = " ".join(catalog.titles).casefold()
    assert not any(pattern in told for pattern in ("striped", "checked", "dotted", "wavy"))
    named = np.mean([one.colour in title for one, title in zip(drawn, catalog.titles, strict=True)])
    assert 0.4 < named < 0.65
    same = [len({drawn[row].pattern for row in rows}) == 1 for rows in dataset.bundles.items]
    assert np.mean(same) > 0.45  # by chance one in five of pairs, of larger ones fewer


def test_a_drawing_is_the_same_each_time_and_shows_its_colour() -> None:
    one = DrawnPicture("bag", "Scarlet", "plain", 3)
    assert DrawnPicture.parse(one.key) == one
    assert DrawnPicture.parse(one.key).read() == one.read()
    image = decode_picture(one.read())
    assert "#{:02x}{:02x}{:02x}".format(*image.getpixel((48, 60))) == COLOURS["Scarlet"]
    assert len({DrawnPicture("bag", "Scarlet", pattern, 3).read() for pattern in PATTERNS}) == len(PATTERNS)


@pytest.mark.slow
def test_a_copy_of_the_drawn_shop_is_a_folder_with_pictures(tmp_path: Path, shell: Callable[..., Any]) -> None:
    code, _, err = shell("data", "copy", "demo-pictures", tmp_path / "shop")
    assert code == 0, err
    copy = open_dataset(DataConfig(source="folder", path=str(tmp_path / "shop")))
    demo = demo_dataset("demo-pictures")
    assert copy.catalog.titles == demo.catalog.titles
    assert read_pictures(copy.catalog.pictures[:20], "copy") == read_pictures(demo.catalog.pictures[:20], "demo")


def test_no_module_loads_the_vision_encoders_unless_a_picture_is_read() -> None:
    package = REPOSITORY / "peft_combo"
    loads = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "\nfrom peft_combo.encoder.pixels" in path.read_text(encoding="utf-8")
    ]
    assert sorted(set(loads) - {"tuning/item_pictures.py"}) == [
        "encoder/pixels/__init__.py", "encoder/pixels/encoder.py"
    ]  # fmt: skip
    assert not [path for path in package.rglob("*.py") if "\nfrom peft_combo.tuning.item_pictures" in path.read_text()]


def test_bytes_are_told_by_their_digest() -> None:
    assert PictureBytes("x", b"1").key != PictureBytes("x", b"2").key
