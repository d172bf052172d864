"""The folder format means the same in every file format, and ids, texts and times arrive as they were written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_folders import BUNDLES, INTERACTIONS, ITEMS, META, WRITERS, write_folder, write_text

from peft_combo.data.model import Bundles, Catalog, Dataset, Interactions
from peft_combo.data.readers.demo import demo_dataset
from peft_combo.data.sources import open_dataset
from peft_combo.data.stats import describe
from peft_combo.errors import DataError


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_folder(tmp_path: Path, suffix: str) -> None:
    dataset = open_dataset(write_folder(tmp_path / "shop", suffix))
    catalog, bundles, interactions = dataset.catalog, dataset.bundles, dataset.interactions

    assert dataset.name == "shop"
    assert catalog.item_ids == ("007", "85123A", "12", "2024-01-02")
    assert catalog.titles == ("Linen shirt", "Chinos, navy", 'The "good" shoes', "Café tote 🛍")
    assert catalog.categories[0] == ("Clothing", "Men", "Shirts")
    assert catalog.categories[3] == ()
    assert catalog.leaf(0) == "Shirts"
    assert catalog.leaf(3) is None
    assert catalog.prices.tolist()[:2] == [30.0, 45.5]
    assert np.isnan(catalog.prices[2])
    assert catalog.attributes == {"brand": ("Norvale", None, "Stridell", "Satchmere")}

    assert bundles.bundle_ids == ("b1", "b2")
    assert [items.tolist() for items in bundles.items] == [[0, 1], [2, 3, 0]]  # by position, the repeat left out
    assert bundles.names == (None, "Weekend in town")
    assert bundles.owners == (None, "01")
    assert bundles.groups == ("bundle:b1", "01")
    assert np.isnan(bundles.times[0])
    assert bundles.times[1] == 1717178400.0

    assert interactions is not None
    assert len(interactions) == 3
    assert interactions.users.tolist() == [0, 0, -1]
    assert interactions.weights.tolist() == [2.0, 1.0, 1.0]
    assert interactions.times.tolist() == [1717178400.0, 1717178400.0, 1717178401.5]
    assert interactions.baskets[0] == interactions.baskets[1] != interactions.baskets[2]
    assert any("quantity of 0 or less" in note for note in dataset.notes)
    assert any("repeat an item" in note for note in dataset.notes)


def test_file_format_does_not_change_the_digest(tmp_path: Path) -> None:
    digests = {open_dataset(write_folder(tmp_path / suffix[1:], suffix)).digest for suffix in WRITERS}
    assert len(digests) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"items": [*ITEMS[:3], {**ITEMS[3], "title": "Tote"}]},
        {"items": [{**ITEMS[0], "price": 31.0}, *ITEMS[1:]]},
        {"items": [{**ITEMS[0], "brand": "Sondrel"}, *ITEMS[1:]]},
        {"bundles": BUNDLES[:-1]},
        {"bundle_meta": None},
        {"interactions": INTERACTIONS[:1]},
        {"interactions": None},
    ],
)
def test_every_content_changes_the_digest(tmp_path: Path, change: dict[str, list[dict[str, object]] | None]) -> None:
    before = open_dataset(write_folder(tmp_path / "before")).digest
    assert open_dataset(write_folder(tmp_path / "after", **change)).digest != before


def test_numeric_ids_of_parquet_and_json_are_strings(tmp_path: Path) -> None:
    items = [{"item_id": n, "title": f"thing {n}"} for n in (7, 8)]
    bundles = [{"bundle_id": 1, "item_id": n} for n in (7, 8)]
    floats = [{"item_id": n, "user_id": user} for n, user in ((7, 3.0), (8, None))]  # pandas makes floats of gaps
    for suffix in (".parquet", ".jsonl"):
        config = write_folder(
            tmp_path / suffix[1:], suffix, items=items, bundles=bundles, bundle_meta=None, interactions=floats
        )
        dataset = open_dataset(config)
        assert dataset.catalog.item_ids == ("7", "8")
        assert dataset.interactions is not None
        assert dataset.interactions.user_ids == ("3",)
        assert dataset.interactions.users.tolist() == [0, -1]


def test_columns_are_mapped(tmp_path: Path) -> None:
    config = write_text(
        tmp_path,
        items_csv="sku,name,kind\na,Shirt,top\nb,Jeans,bottom\n",
        bundles_csv="set,sku\n1,a\n1,b\n",
    )
    config = config.model_copy(
        update={
            "columns": {
                "items": {"item_id": "sku", "title": "name", "slot": "kind"},
                "bundles": {"bundle_id": "set", "item_id": "sku"},
            }
        }
    )
    catalog = open_dataset(config).catalog
    assert catalog.titles == ("Shirt", "Jeans")
    assert catalog.slots == ("top", "bottom")
    assert catalog.attributes == {}


def test_category_lists(tmp_path: Path) -> None:
    items = [
        {"item_id": "a", "title": "x", "category": ["A", "B, C"]},
        {"item_id": "b", "title": "y", "category": None},
    ]
    bundles = [{"bundle_id": "1", "item_id": "a"}, {"bundle_id": "1", "item_id": "b"}]
    for suffix in (".parquet", ".jsonl"):
        config = write_folder(
            tmp_path / suffix[1:], suffix, items=items, bundles=bundles, bundle_meta=None, interactions=None
        )
        assert open_dataset(config).catalog.categories == (("A", "B, C"), ())


@pytest.mark.parametrize(
    ("cell", "seconds"),
    [
        ("1717178400", 1717178400.0),
        ("1717178400.25", 1717178400.25),
        ("2024-05-31T18:00:00", 1717178400.0),
        ("2024-05-31 18:00:00+00:00", 1717178400.0),
        ("2024-05-31T20:00:00+02:00", 1717178400.0),
        ("2024-05-31", 1717113600.0),
        ("", float("nan")),
    ],
)
def test_timestamps(tmp_path: Path, cell: str, seconds: float) -> None:
    config = write_text(
        tmp_path,
        items_csv="item_id,title\na,A\nb,B\n",
        bundles_csv="bundle_id,item_id\n1,a\n1,b\n",
        bundle_meta_csv=f"bundle_id,timestamp\n1,{cell}\n",
    )
    np.testing.assert_equal(open_dataset(config).bundles.times[0], seconds)


def test_parquet_times_keep_their_type(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    meta = [{"bundle_id": "b1", "timestamp": datetime(2024, 5, 31, 18, tzinfo=UTC)}]
    dataset = open_dataset(write_folder(tmp_path, ".parquet", bundle_meta=meta))
    assert dataset.bundles.times[0] == 1717178400.0


def test_bundles_from_baskets(tmp_path: Path) -> None:
    items = "item_id,title\n" + "".join(f"i{n},Item {n}\n" for n in range(6))
    rows = ["user_id,basket_id,item_id,timestamp"]
    rows += ["u1,k1,i0,20", "u1,k1,i1,10", "u1,k1,i0,30"]  # two distinct items, earliest at 10
    rows += ["u2,k2,i0,5"]  # too small
    rows += [f",k3,i{n},7" for n in range(4)]  # no owner
    rows += ["u3,,i5,9"]  # no basket
    config = write_text(tmp_path, items_csv=items, interactions_csv="\n".join(rows) + "\n")
    config = config.model_copy(update={"max_bundle_size": 4})
    bundles = open_dataset(config).bundles
    assert bundles.bundle_ids == ("k1", "k3")
    assert [rows.tolist() for rows in bundles.items] == [[0, 1], [0, 1, 2, 3]]
    assert bundles.owners == ("u1", None)
    assert bundles.times.tolist() == [10.0, 7.0]
    # i0 occurs in three baskets, i1 in two, the others in one.
    supported = open_dataset(config.model_copy(update={"min_item_support": 2}))
    assert supported.catalog.item_ids == ("i0", "i1")
    assert [rows.tolist() for rows in supported.bundles.items] == [[0, 1], [0, 1]]
    assert supported.interactions is not None
    assert set(supported.interactions.items.tolist()) == {0, 1}


def test_sample_does_not_depend_on_order(tmp_path: Path) -> None:
    items = "item_id,title\n" + "".join(f"i{n},Item {n}\n" for n in range(6))
    rows = [f"b{n},i{n % 6}\nb{n},i{(n + 1) % 6}\n" for n in range(40)]
    forward = write_text(tmp_path / "f", items_csv=items, bundles_csv="bundle_id,item_id\n" + "".join(rows))
    backward = write_text(tmp_path / "b", items_csv=items, bundles_csv="bundle_id,item_id\n" + "".join(rows[::-1]))
    chosen = [
        set(open_dataset(config.model_copy(update={"max_bundles": 10})).bundles.bundle_ids)
        for config in (forward, backward)
    ]
    assert len(chosen[0]) == 10
    assert chosen[0] == chosen[1]


def test_category_filter_keeps_what_lies_under_it(tmp_path: Path) -> None:
    config = write_folder(tmp_path).model_copy(update={"category_filter": "clothing > Men"})
    dataset = open_dataset(config)
    assert dataset.catalog.item_ids == ("007", "85123A")
    assert dataset.bundles.bundle_ids == ("b1",)
    assert dataset.interactions is not None
    assert dataset.interactions.user_ids == ("01",)
    assert dataset.interactions.users.tolist() == [0, -1]
    with pytest.raises(DataError, match=r'Top categories: Clothing, Shoes. Did you mean "Clothing > Men"'):
        open_dataset(config.model_copy(update={"category_filter": "Clothing > Mem"}))


@pytest.mark.parametrize(
    ("template", "plain", "described"),
    [
        ("{title}", ("Shirt", "Jeans"), ("Shirt Clothing > Tops", "Jeans")),
        ("{title} {category}", ("Shirt", "Jeans"), ("Shirt Clothing > Tops", "Jeans")),
        ("{category} {brand} {title}", ("Nor Shirt", "Jeans"), ("Nor Shirt Clothing > Tops", "Jeans")),
        ("{category}", ("Clothing > Tops", ""), None),
    ],
)
def test_the_frozen_encoder_reads_texts_without_and_with_their_category(
    template: str, plain: tuple[str, ...], described: tuple[str, ...] | None
) -> None:
    catalog = Catalog.build(
        ["a", "b"], ["Shirt", "Jeans"], [("Clothing", "Tops"), ()], attributes={"brand": ["Nor", ""]}
    )
    dataset = Dataset.build("two", catalog, None, Bundles.build([], []), text=template)
    assert (dataset.plain, dataset.described) == (plain, described)
    # What a category does not change is not read again.
    assert dataset.read_frozen == [plain] + ([] if described is None else [described[:1]])


def test_texts_follow_the_template() -> None:
    catalog = Catalog.build(
        ["a", "b"],
        ["Shirt", "Jeans"],
        [("Clothing", "Tops"), ()],
        prices=[9.5, np.nan],
        attributes={"brand": ["Norvale", None]},
    )
    assert catalog.texts("{title}") == ["Shirt", "Jeans"]
    assert catalog.texts("{brand} {title} | {leaf}") == ["Norvale Shirt | Tops", "Jeans"]
    assert catalog.texts("{category}: {title}, {price}") == ["Clothing > Tops: Shirt, 9.50", "Jeans"]
    with pytest.raises(DataError, match=r"names 'brnd'.*Did you mean \"brand\""):
        catalog.texts("{brnd} {title}")
    for broken in ("{title", "{title.upper}", "{title:>9}", "{}"):
        with pytest.raises(DataError, match="template"):
            catalog.texts(broken)


def test_stock() -> None:
    catalog = Catalog.build(["a", "b", "c"], ["x", "y", "z"], attributes={"stock": ["3", "0", None]})
    assert catalog.in_stock.tolist() == [True, False, True]
    assert Catalog.build(["a"], ["x"]).in_stock.tolist() == [True]


def test_interactions_to_csr() -> None:
    interactions = Interactions.build(["u", "v"], [0, 0, 1, -1], [2, 2, 0, 1], weights=[1, 2, 5, 9])
    assert interactions.to_csr(3).toarray().tolist() == [[0, 0, 3], [5, 0, 0]]
    assert interactions.to_csr(3, np.array([0, 3])).toarray().tolist() == [[0, 0, 1], [0, 0, 0]]
    assert interactions.to_csr(3).dtype == np.float32


def test_bundles_to_csr() -> None:
    bundles = demo_dataset().bundles
    matrix = bundles.to_csr(1000, [5, 3])
    assert matrix.shape == (2, 1000)
    assert matrix[0].indices.tolist() == sorted(bundles.items[5].tolist())
    assert matrix.sum() == bundles.sizes[[5, 3]].sum()


def test_describe_counts(tmp_path: Path) -> None:
    figures = describe(open_dataset(write_folder(tmp_path)))
    assert figures["items"] == 4
    assert figures["words_per_text"]["max"] == 3
    assert figures["bundle_sizes"] == {"2": 1, "3": 1}
    assert figures["items_in_no_bundle"] == 0.0
    assert figures["price_known"] == 0.75
    assert figures["attributes"] == {"brand": 0.75}
    assert figures["time_range"] == ["2024-05-31T18:00:00+00:00", "2024-05-31T18:00:01+00:00"]


def test_importing_data_stays_light() -> None:
    code = (
        "import sys, peft_combo.data; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pandas', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_large_folder_loads_in_seconds(tmp_path: Path) -> None:
    import time

    rng = np.random.default_rng(0)
    n = 300_000
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"i{k},Item {k}\n" for k in range(5_000)), "utf-8")
    columns = (rng.integers(0, 9_000, n), np.arange(n) // 5, rng.integers(0, 5_000, n), np.arange(n) + 1_600_000_000)
    lines = "".join(
        f"u{u},k{b},i{i},1,{t}\n" for u, b, i, t in zip(*(column.tolist() for column in columns), strict=True)
    )
    config = write_text(tmp_path, interactions_csv="user_id,basket_id,item_id,quantity,timestamp\n" + lines)
    start = time.perf_counter()
    dataset = open_dataset(config)
    assert time.perf_counter() - start < 15  # about 0.7 s; the rest is for slow machines
    assert len(dataset.bundles) == n / 5


def test_variants_of_equal_text_are_taken_for_one(tmp_path: Path) -> None:
    shades = [
        {"item_id": str(n), "title": title} for n, title in enumerate(["lipstick", "mascara", "lipstick", "brush"])
    ]
    bundles = [
        {"bundle_id": b, "item_id": i} for b, i in (("b1", "0"), ("b1", "2"), ("b1", "3"), ("b2", "2"), ("b2", "1"))
    ]
    taken = [{"user_id": "u", "item_id": "0"}, {"user_id": "u", "item_id": "2"}]
    config = write_folder(tmp_path, items=shades, bundles=bundles, bundle_meta=None, interactions=taken)
    dataset = open_dataset(config.model_copy(update={"merge_variants": True}))
    assert dataset.catalog.item_ids == ("0", "1", "3")
    assert [items.tolist() for items in dataset.bundles.items] == [[0, 2], [0, 1]]
    assert dataset.interactions is not None
    assert dataset.interactions.items.tolist() == [0, 0]
    assert any("4 items merged into 3" in note for note in dataset.notes)


def test_a_bundle_names_the_basket_it_was_bought_as(tmp_path: Path) -> None:
    meta = [{**META[0], "basket_id": "9"}, {**META[1], "basket_id": ""}]
    dataset = open_dataset(write_folder(tmp_path, bundle_meta=meta))
    assert dataset.interactions is not None
    basket = dataset.interactions.baskets[0]
    assert dict(zip(dataset.bundles.bundle_ids, dataset.bundles.baskets, strict=True)) == {"b1": -1, "b2": basket}


def test_a_basket_that_nobody_bought_is_a_fault(tmp_path: Path) -> None:
    meta = [{**META[0], "basket_id": "7"}, META[1] | {"basket_id": ""}]
    with pytest.raises(DataError, match=r"bundle_meta\.csv:2: basket_id '7' is not in interactions"):
        open_dataset(write_folder(tmp_path, bundle_meta=meta))


def test_a_dataset_knows_the_text_of_its_items_and_the_digest_does_not(tmp_path: Path) -> None:
    config = write_folder(tmp_path)
    plain, branded = open_dataset(config), open_dataset(config.model_copy(update={"text": "{brand} {title}"}))
    assert plain.texts[:2] == ("Linen shirt", "Chinos, navy")
    assert branded.texts[:2] == ("Norvale Linen shirt", "Chinos, navy")
    assert branded.texts is branded.texts
    assert branded.digest == plain.digest
    with pytest.raises(DataError, match="names 'brnd'"):
        _ = open_dataset(config.model_copy(update={"text": "{brnd} {title}"})).texts
