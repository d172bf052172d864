"""The evaluation of text queries on shops whose answers are known, and on real intents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import shared_data

from peft_combo.data.model import Bundles, Catalog, Dataset
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import Split, split
from peft_combo.errors import DataError
from peft_combo.evaluation.text_queries import BASELINE, BOTH, CHOSEN, LABELS, VALUES, _share_found, evaluate_queries
from peft_combo.recipe.model import DataConfig
from peft_combo.recommender.text_search import FROZEN_ALL, FROZEN_TITLE, WORDS, View, WordView

ALL_WORDS = LABELS[WORDS]
THINGS = tuple(f"thing{number:02d}" for number in range(40))


@pytest.fixture
def shop() -> Dataset:
    """80 items, two of each thing: one is called so, one is of a category called so. Bundles of a thing, asked for."""
    titles = [*(f"fine {thing}" for thing in THINGS), *(f"plain article {number}" for number in range(40))]
    catalog = Catalog.build([f"i{row}" for row in range(80)], titles, [(), *[()] * 39, *((thing,) for thing in THINGS)])
    members = [[row, row + 40] for row in range(40)]
    bundles = Bundles.build([f"b{row}" for row in range(40)], members, [f"a {thing}" for thing in THINGS])
    return Dataset.build("things", catalog, None, bundles)


@pytest.fixture
def parts(shop: Dataset) -> Split:
    return split(shop)


class Blind:
    """A view to which all is one."""

    items = np.ones((80, 1), np.float32)

    def pool(self, bundles: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
        return self.items[: len(bundles)]

    encode = pool


@pytest.fixture
def views(shop: Dataset) -> dict[str, View]:
    words = WordView.of(shop.described or ())
    return {WORDS: words, FROZEN_TITLE: Blind(), FROZEN_ALL: Blind()}


def test_what_is_called_so_is_found_and_who_is_blind_guesses(
    shop: Dataset, parts: Split, views: dict[str, View]
) -> None:
    found = evaluate_queries(shop, parts, {**views, "mine": Blind()})
    assert [row.name for row in found.rows] == [
        BASELINE, ALL_WORDS, FROZEN_TITLE, FROZEN_ALL, "tuned mine", BOTH, CHOSEN,
    ]  # fmt: skip
    assert set(found.rows[0].values) == set(VALUES)
    assert found.row(ALL_WORDS).values["r@1"] == found.row(ALL_WORDS).values["items@10"] == 1
    # Titles name one of the two; the other is one of 79 that are equal, of which nine may be within the first ten.
    assert found.row(BASELINE).values["r@1"] == 1
    assert found.row(BASELINE).values["items@10"] == pytest.approx((1 + 9 / 79) / 2)
    assert found.row(FROZEN_TITLE).values["mrr"] == pytest.approx(1 / 20.5)
    assert found.row(FROZEN_TITLE).values["items@20"] == pytest.approx(20 / 80)
    # A blind view changes nothing, in whatever share.
    for name in (BOTH, CHOSEN):
        assert found.row(name).values == found.row(ALL_WORDS).values
    assert found.rows[0].p == {}
    assert found.row(ALL_WORDS).p["r@10"] == 1
    assert found.counts["candidates"] == 40
    assert found.counts["queries"] == len(parts.test)
    again = json.loads(json.dumps(found.to_json()))
    assert [row["name"] for row in again["rows"]] == [row.name for row in found.rows]
    assert again["weights"] == found.weights


def test_equals_at_the_edge_have_equal_chances() -> None:
    scores = np.array([5, 4, *[3] * 10, *[1] * 88], np.float32)
    assert _share_found(scores, np.array([0])) == [1, 1, 1]
    assert _share_found(scores, np.array([0, 5])) == [pytest.approx((1 + 0.8) / 2), 1, 1]
    assert _share_found(scores, np.array([99])) == [0, pytest.approx(8 / 88), pytest.approx(38 / 88)]


def test_a_twin_of_a_bundle_is_no_wrong_answer(shop: Dataset, parts: Split, views: dict[str, View]) -> None:
    twins = Bundles.build(
        [f"b{row}" for row in range(80)],
        [*shop.bundles.items, *shop.bundles.items],
        [*shop.bundles.names, *[None] * 40],
    )
    found = evaluate_queries(replace(shop, bundles=twins), parts, views)
    assert found.counts["candidates"] == 40
    assert found.row(ALL_WORDS).values["r@1"] == 1


def test_without_intents_it_is_said_what_to_add(shop: Dataset, parts: Split, views: dict[str, View]) -> None:
    none = [None] * 40
    silent = replace(shop, bundles=replace(shop.bundles, names=tuple(none), intents=tuple(none)))
    with pytest.raises(DataError, match=r"column intent of bundle_meta.*bundle_intent\.csv"):
        evaluate_queries(silent, parts, views)
    # Without validation intents nothing is chosen.
    of_test = [intent if row in parts.test else None for row, intent in enumerate(shop.bundles.intents)]
    some = replace(shop, bundles=replace(shop.bundles, intents=tuple(of_test)))
    found = evaluate_queries(some, parts, views)
    assert found.weights == {WORDS: 0.5, FROZEN_TITLE: 1.0, FROZEN_ALL: 1.0}
    assert any("no validation bundle has an intent" in note for note in found.notes)


def test_test_intents_choose_nothing(shop: Dataset, parts: Split, views: dict[str, View]) -> None:
    changed = [None if row in parts.test[1:] else intent for row, intent in enumerate(shop.bundles.intents)]
    other = replace(shop, bundles=replace(shop.bundles, intents=tuple(changed)))
    assert evaluate_queries(other, parts, views).weights == evaluate_queries(shop, parts, views).weights


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ("bundle_id,intent\nb0,dinner\nb1,\n", {"b0": "dinner", "b1": None}),
        ("bundle_id,name\nb0,Set 1\nb1,Set 2\n", {"b0": "Set 1", "b1": "Set 2"}),
        ("bundle_id,name,intent\nb0,Set 1,dinner  out\nb1,Set 2,\n", {"b0": "dinner out", "b1": "Set 2"}),
    ],
)
def test_a_folder_tells_intents(meta: str, expected: dict[str, str | None], tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("item_id,title\n1,a\n2,b\n3,c\n")
    (tmp_path / "bundles.csv").write_text("bundle_id,item_id\nb0,1\nb0,2\nb1,2\nb1,3\n")
    (tmp_path / "bundle_meta.csv").write_text(meta)
    found = open_dataset(DataConfig(source="folder", path=str(tmp_path))).bundles
    assert dict(zip(found.bundle_ids, found.intents, strict=True)) == expected
    assert found.take([1]).intents == (expected["b1"],)


@pytest.mark.parametrize("name", ["clothing", "electronic"])
def test_real_intents_are_found_by_words_far_above_chance(name: str) -> None:
    shop = open_dataset(DataConfig(source="bundlerec", path=str(shared_data(f"bundlerec/{name}"))))
    parts = split(shop, "user", 0.1, 0.2, 60)
    words = WordView.of(shop.described or ())
    found = evaluate_queries(shop, parts, {WORDS: words}, rows=parts.valid)
    assert found.counts["queries"] > 0.9 * len(parts.valid)
    assert found.row(ALL_WORDS).values["r@10"] > 0.2 > 30 * 10 / found.counts["candidates"] / 2
