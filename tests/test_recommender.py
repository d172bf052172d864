"""The recommender end to end over a tiny encoder and shop: ids in, bundles out, nothing chosen on test bundles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peft_combo.adapters import AdapterStore
from peft_combo.backbone import Backbone
from peft_combo.bank import AdapterBank
from peft_combo.constraints import Constraints
from peft_combo.data import Bundles, Dataset, Interactions, Split, open_dataset, split
from peft_combo.errors import DataError
from peft_combo.recipe import Recipe
from peft_combo.recommender import BundleRecommender
from peft_combo.recommender_files import fitted_recommender, load_recommender, save_recommender
from peft_combo.tuning import tune
from peft_combo.vectors import VectorCache


@pytest.fixture
def bank(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> AdapterBank:
    recipe = tiny_recipe(**{"training.epochs": 6})
    tune(recipe, run_folder=tmp_path / "run")
    return AdapterBank(Backbone.load(recipe.backbone.model, max_length=16), AdapterStore(recipe.store))


@pytest.fixture
def dataset(tiny_recipe: Callable[..., Recipe]) -> Dataset:
    """The tiny shop, where every user bought the items of their own bundles."""
    shop = open_dataset(tiny_recipe().data)
    users = sorted({owner for owner in shop.bundles.owners if owner})
    pairs = [
        (users.index(owner), row)
        for owner, rows in zip(shop.bundles.owners, shop.bundles.items, strict=True)
        if owner is not None
        for row in rows
    ]
    bought = Interactions.build(users, [u for u, _ in pairs], [r for _, r in pairs], times=np.arange(len(pairs)))
    return Dataset.build("tiny", shop.catalog, bought, shop.bundles)


@pytest.fixture
def parts(dataset: Dataset) -> Split:
    return split(dataset)


@pytest.fixture
def fitted(dataset: Dataset, parts: Split, bank: AdapterBank, tmp_path: Path) -> BundleRecommender:
    return BundleRecommender.fit(dataset, parts, bank, "tiny", cache=VectorCache(tmp_path / "vectors"))


def test_completion_leaves_the_context_out_and_adds_up(fitted: BundleRecommender) -> None:
    found = fitted.complete(["i0", "i6"], k=8)
    assert len(found) == 8
    assert not {"i0", "i6"} & {one.item_id for one in found}
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found:
        assert sum(one.shares.values()) == pytest.approx(one.score, abs=1e-3)
    # Items of one style go together, and a number names its style by what it leaves over six.
    assert sum(int(one.item_id[1:]) % 6 == 0 for one in found) >= 5


def test_counts_of_the_evidence_are_those_of_the_bundles(fitted: BundleRecommender, dataset: Dataset) -> None:
    ids = dataset.catalog.item_ids
    for one in fitted.complete(["i0"], k=20):
        held = sum({"i0", one.item_id} <= {ids[row] for row in rows} for rows in dataset.bundles.items)
        assert one.together == ({"i0": held} if held else {})


def test_bundles_hold_what_was_given_and_come_out_the_same_again(fitted: BundleRecommender) -> None:
    first = fitted.compose(["i0"])
    assert first == fitted.compose(["i0"])
    for bundle in first:
        assert "i0" in bundle.items
        assert set(bundle.added) == set(bundle.items) - {"i0"}
        assert sum(bundle.parts.values()) == pytest.approx(bundle.score)
        assert [entry["item"] for entry in bundle.evidence] == [i for i in bundle.items if i in bundle.added]
    assert len({frozenset(bundle.items) for bundle in first}) == len(first)


def test_a_user_and_a_text_are_enough(fitted: BundleRecommender, dataset: Dataset) -> None:
    assert fitted.compose(user="u1")
    assert fitted.complete(user="u1", k=3)
    title = dataset.catalog.titles[7]
    assert fitted.search(title, k=1)[0] == ("i7", pytest.approx(1.0, abs=1e-5))
    assert fitted.compose(query=title)


def test_given_bundles_are_ranked_by_how_well_they_go_together(fitted: BundleRecommender) -> None:
    ranked = fitted.rank([["i0", "i1"], ["i0", "i6"]])
    assert {bundle.items for bundle in ranked} == {("i0", "i1"), ("i0", "i6")} or len(ranked) == 2
    assert set(ranked[0].items) == {"i0", "i6"}


def test_constraints_hold(fitted: BundleRecommender) -> None:
    only = Constraints(categories=("Style 1",))
    assert all(int(one.item_id[1:]) % 3 == 1 for one in fitted.complete(["i0"], constraints=only))
    with pytest.raises(DataError, match="udget"):
        fitted.compose(["i0"], constraints=Constraints(budget=5))  # no item has a known price


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda r: r.complete(["i61"]), 'No item "i61" among the 60'),
        (lambda r: r.complete(user="u99"), 'No user "u99" among the 30'),
        (lambda r: r.complete(), "give items or a user"),
        (lambda r: r.compose(), "give items, a user or a query"),
        (lambda r: r.compose(["i0"], required=["hats"]), "hats"),
    ],
)
def test_what_is_not_known_is_said(
    ask: Callable[[BundleRecommender], object], expected: str, fitted: BundleRecommender
) -> None:
    with pytest.raises(DataError, match=expected):
        ask(fitted)


def test_test_bundles_choose_nothing(
    fitted: BundleRecommender, dataset: Dataset, parts: Split, bank: AdapterBank
) -> None:
    """Other test bundles leave the weights of the fusion, and the table behind them, as they were."""
    items = list(dataset.bundles.items)
    for row in parts.test:
        items[row] = np.array([0, 1, 2], np.int32)
    changed = replace(dataset, bundles=replace(dataset.bundles, items=tuple(items)))
    assert isinstance(changed.bundles, Bundles)
    again = BundleRecommender.fit(changed, parts, bank, "tiny")
    assert again.fusion.state() == fitted.fusion.state()


def test_without_an_adapter_the_frozen_encoder_answers(dataset: Dataset, parts: Split, bank: AdapterBank) -> None:
    frozen = BundleRecommender.fit(dataset, parts, bank, None)
    assert frozen.adapters == ()
    assert frozen.complete(["i0"], k=3)


def test_each_given_item_is_credited_with_what_is_lost_without_it(fitted: BundleRecommender) -> None:
    (first, *_) = fitted.complete(["i0", "i6", "i1"], k=2, explain=True)
    assert set(first.because) <= {"i0", "i6", "i1"}
    without = {one.item_id: one.score for one in fitted.complete(["i0", "i6"], k=60)}
    assert first.because["i1"] == pytest.approx(first.score - without[first.item_id], abs=1e-4)
    assert fitted.complete(["i0"], k=1, explain=True)[0].because == {}


def test_each_item_of_a_bundle_is_credited_with_what_is_lost_without_it(fitted: BundleRecommender) -> None:
    bundle = next(one for one in fitted.compose(["i0", "i6"], explain=True) if len(one.items) > 2)
    index = fitted.dataset.catalog.index
    for told in bundle.evidence:
        assert set(told["because"]) == set(bundle.items) - {told["item"]}
        rest = np.array([index[item] for item in bundle.items if item != told["item"]])
        less = np.array([row for row in rest if row != index["i6"]])
        with_it, without = fitted._beside([rest, less], np.array([index[told["item"]]]))[:, 0]
        assert told["because"]["i6"] == pytest.approx(with_it - without, abs=1e-5)
        assert set(told["scorers"]) <= {*fitted.fusion.needs, "users alike"}
    assert all("because" not in told for one in fitted.compose(["i0"]) for told in one.evidence)


@pytest.fixture
def several(tiny_recipe: Callable[..., Recipe], bank: AdapterBank, tmp_path: Path) -> AdapterBank:
    """The bank with an adapter for Style 1 beside the one for everything."""
    recipe = tiny_recipe(**{"category": "style1", "data.category_filter": "Style 1", "training.epochs": 3})
    tune(recipe, run_folder=tmp_path / "run1")
    return bank


def test_adapters_of_categories_answer_together(
    dataset: Dataset, parts: Split, several: AdapterBank, tmp_path: Path
) -> None:
    shop = BundleRecommender.fit(dataset, parts, several, ["tiny", "style1"], cache=VectorCache(tmp_path / "vectors"))
    table = {line.name for line in shop.fusion.table}
    assert {"tuned by category", "tuned BERT tiny@v1", "tuned BERT style1@v1"} <= table
    assert len(shop.complete(["i0", "i1"], k=5)) == 5
    assert shop.compose(["i1"])


@pytest.mark.parametrize("adapters", [None, "tiny", ["tiny", "style1"]])
def test_a_kept_recommender_answers_as_before(
    adapters: str | list[str] | None, dataset: Dataset, parts: Split, several: AdapterBank, tmp_path: Path
) -> None:
    made = BundleRecommender.fit(dataset, parts, several, adapters)
    save_recommender(made, tmp_path / "kept")
    again = load_recommender(tmp_path / "kept", dataset, several)
    assert again.fusion == made.fusion
    assert again.settings == made.settings
    for ask in ({"items": ["i0", "i6"]}, {"user": "u3"}):
        assert again.complete(**ask, k=20) == made.complete(**ask, k=20)
        assert again.compose(**ask) == made.compose(**ask)
    save_recommender(again, tmp_path / "kept")  # over itself
    assert load_recommender(tmp_path / "kept", dataset, several).fusion == made.fusion
    assert [path.name for path in tmp_path.glob(".kept*")] == []


def test_a_kept_recommender_is_refused_for_other_data_or_altered_bytes(
    dataset: Dataset, parts: Split, bank: AdapterBank, fitted: BundleRecommender, tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    save_recommender(fitted, folder)
    other = Dataset.build("tiny", dataset.catalog, None, dataset.bundles)
    with pytest.raises(DataError, match="was fitted on data with digest"):
        load_recommender(folder, other, bank)
    scorer = next(folder.glob("*.safetensors"))
    content = scorer.read_bytes()
    scorer.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="was altered since it was written"):
        load_recommender(folder, dataset, bank)
    scorer.write_bytes(content)
    manifest = folder / "recommender.json"
    said = manifest.read_text()
    for text in ("", "[]", "{}", said[:-20], said.replace("scorer-0.safetensors", "../../x.safetensors"), "[" * 10**5):
        manifest.write_text(text)
        with pytest.raises(DataError, match=r"damaged|format"):
            load_recommender(folder, dataset, bank)
    with pytest.raises(DataError, match="No recommender in"):
        load_recommender(tmp_path / "nowhere", dataset, bank)
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="holds no recommender"):
        save_recommender(fitted, tmp_path / "mine")


def test_what_is_asked_for_again_is_not_fitted_again(
    dataset: Dataset, parts: Split, bank: AdapterBank, tmp_path: Path
) -> None:
    told: list[str] = []
    first = fitted_recommender(tmp_path, dataset, parts, bank, ["tiny"], done=told.append)
    assert told
    told.clear()
    assert fitted_recommender(tmp_path, dataset, parts, bank, ["tiny"], done=told.append).fusion == first.fusion
    assert told == []
    next(tmp_path.glob("*/recommender.json")).write_text("{")  # damaged: made anew, not an error
    assert fitted_recommender(tmp_path, dataset, parts, bank, ["tiny"], done=told.append).fusion == first.fusion
    assert told
