"""A tuned pair of text and picture adapter: it learns what pictures show, is stored, hot-swapped, masked, explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import StopAt, make_tiny_recipe
from made_up import build_pictured_shop, build_vision

from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import split_as
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.encoder.heads.pictures import WIDTH
from peft_combo.encoder.vectors import VectorCache
from peft_combo.errors import DataError, RecipeError, StoreError
from peft_combo.recipe.parse import parse_recipe
from peft_combo.recommender import BundleRecommender
from peft_combo.recommender.explanations import FusedScores
from peft_combo.recommender.fitted_scorers import FittedHead
from peft_combo.recommender.fused_scorer import FusedScorer
from peft_combo.recommender.item_pictures import append_pictures
from peft_combo.recommender.live_catalog import TITLE, LiveItem, VectorBuffers, extend_recommender
from peft_combo.recommender.scorer_id import PICTURES
from peft_combo.recommender.text_ranking import LOOKS_ALIKE
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.loop import TuneResult, tune
from peft_combo.tuning.tasks import build_task

pytest.importorskip("PIL", reason="pillow is not installed (extra [images])")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `shop`, `vit`, `resnet` and a store."""
    folder = tmp_path_factory.mktemp("pictured")
    (folder / "shop").mkdir()
    build_pictured_shop(folder / "shop")
    for kind in ("vit", "resnet"):
        build_vision(folder / kind, kind)
    return folder


def make_recipe(tiny_bert: Path, folder: Path, kind: str = "resnet", **changes: Any) -> Any:
    fields = {"backbone.image_model": str(folder / kind), "backbone.image_rank": 4, "training.epochs": 6}
    return make_tiny_recipe(tiny_bert, folder / "shop", folder / "adapters", **{**fields, **changes})


@pytest.fixture(scope="module")
def tuned(tiny_bert: Path, folder: Path) -> TuneResult:
    return tune(make_recipe(tiny_bert, folder), run_folder=folder / "run")


@pytest.fixture(scope="module")
def bank(tiny_bert: Path, folder: Path, tuned: TuneResult) -> AdapterBank:
    backbone = Backbone.load(str(tiny_bert), max_length=16, image_model=str(folder / "resnet"))
    return AdapterBank(backbone, AdapterStore(folder / "adapters"))


def test_what_only_pictures_show_is_learned(tuned: TuneResult, tiny_bert: Path, folder: Path, tmp_path: Path) -> None:
    blind = make_recipe(tiny_bert, folder, **{"backbone.image_model": None, "store": str(tmp_path / "adapters")})
    without = tune(blind, run_folder=tmp_path / "run").table.after.values["ndcg@10"]
    assert tuned.table.after.values["ndcg@10"] > without + 0.1


def test_it_is_stored_with_its_picture_adapter_and_comes_back(tuned: TuneResult, bank: AdapterBank) -> None:
    manifest = tuned.record.manifest
    assert manifest.backbone.image_fingerprint == bank.backbone.need_pictures().fingerprint
    live = bank.get("tiny")
    head = live.head_as(BundleHead)
    assert head.picture is not None
    assert head.picture.adapter is not None
    assert head.picture.adapter.kind == "bottleneck"
    assert head.picture.adapter.up is not None
    assert head.picture.adapter.up.weight.abs().max() > 0
    assert live.pictures is not None


def test_items_without_a_picture_have_a_masked_part(tuned: TuneResult, bank: AdapterBank, folder: Path) -> None:
    dataset = open_dataset(make_recipe(folder / "none", folder).data)
    texts = bank.encode(dataset.texts, "tiny")
    vectors = append_pictures(texts, dataset, bank.get("tiny"), VectorCache(folder / "vectors"))
    assert vectors.shape == (60, bank.backbone.dim + WIDTH)
    there = np.abs(vectors[:, bank.backbone.dim :]).max(axis=1) > 0
    assert np.flatnonzero(~there).tolist() == list(range(9, 60, 10))
    # Through the cache, which encodes equal pictures once, or without one: the same vectors.
    np.testing.assert_allclose(append_pictures(texts, dataset, bank.get("tiny"), None), vectors, rtol=1e-4, atol=1e-5)


def test_a_bank_without_the_vision_encoder_or_with_another_refuses_it(
    tuned: TuneResult, tiny_bert: Path, folder: Path
) -> None:
    store = AdapterStore(folder / "adapters")
    with pytest.raises(StoreError, match=r"there is none.*backbone\.image_model="):
        AdapterBank(Backbone.load(str(tiny_bert), max_length=16), store).get("tiny@v1")
    other = Backbone.load(str(tiny_bert), max_length=16, image_model=str(folder / "vit"))
    with pytest.raises(StoreError, match="with other weights"):
        AdapterBank(other, store).get("tiny@v1")


def test_a_tool_for_adapters_of_texts_refuses_it(tuned: TuneResult, bank: AdapterBank) -> None:
    with pytest.raises(StoreError, match="reads pictures beside texts"):
        _ = bank.get("tiny@v1").head


def test_fitted_with_pictures_it_answers_explains_and_takes_new_items(
    tuned: TuneResult, bank: AdapterBank, tiny_bert: Path, folder: Path
) -> None:
    config = make_recipe(tiny_bert, folder).data
    dataset = open_dataset(config)
    recommender = BundleRecommender.fit(dataset, split_as(dataset, config), bank, "tiny@v1")
    assert recommender.state.known.pictures is not None
    found = recommender.complete(["i0"], k=5, explain=True)
    assert sum(int(one.item_id[1:]) % 6 == 0 for one in found) >= 3  # of the colour of i0, which no text tells
    # A scorer of pictures adds what it adds by looks alone, the pair as much as its pictures carry.
    live = bank.get("tiny@v1")
    vectors = recommender.state.known.tuned["tiny@v1"][0]
    fitted = FittedHead.of(vectors, live.head_as(BundleHead))
    context, rows = np.array([0]), np.array([6, 1])  # of the same colour, and of another
    alike, other = fitted.measure_looks(context, rows)
    assert alike > 0.2
    assert alike > other + 0.1
    added = np.linspace(1, 2, 60, dtype=np.float32)
    reasons = FusedScorer(recommender.state).explain(context, [6, 1], FusedScores(added, {PICTURES: added}))
    assert {row: own[LOOKS_ALIKE] for row, own in reasons.items()} == {row: float(added[row]) for row in (6, 1)}
    encoded = {name: bank.encode(["w1 w2"], name or None)[0] for name in (TITLE, "tiny@v1")}
    new = LiveItem("new", "w1 w2", vectors=encoded)
    longer = extend_recommender(recommender, [new], (), VectorBuffers())
    assert len(longer.dataset.catalog) == 61
    assert longer.dataset.catalog.pictures[60] is None
    before, after = (one.score_context(np.array([0]), None).scores for one in (recommender, longer))
    assert after.shape == (61,)
    assert np.isfinite(before).sum() <= np.isfinite(after).sum()


def test_a_run_over_lora_that_was_killed_goes_on_bit_for_bit_and_is_hot_swapped_as_a_pair(
    tiny_bert: Path, folder: Path, tmp_path: Path
) -> None:
    changes = {"store": str(tmp_path / "adapters"), "training.checkpoint_every": 2}
    recipe = make_recipe(tiny_bert, folder, "vit", **changes)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"epochs": 1})})
    whole = tune(recipe, run_folder=tmp_path / "whole")
    with pytest.raises(SystemExit):
        tune(recipe, run_folder=tmp_path / "cut", callback=StopAt(3))
    bank = AdapterBank(
        Backbone.load(str(tiny_bert), max_length=16, image_model=str(folder / "vit")), AdapterStore(recipe.store)
    )
    first = bank.get("tiny")
    again = tune(recipe, run_folder=tmp_path / "cut", resume=True)
    assert again.losses == whole.losses
    second = bank.refresh("tiny")
    assert (first.reference, second.reference) == ("tiny@v1", "tiny@v2")
    dataset = open_dataset(recipe.data)
    texts = bank.encode(dataset.texts, "tiny")
    np.testing.assert_array_equal(*(append_pictures(texts, dataset, one, None) for one in (first, second)))
    assert first.pictures is not None
    assert second.pictures is not None
    assert first.pictures.model is not bank.backbone.need_pictures().model
    assert second.pictures.key != first.pictures.key


def test_no_picture_where_some_are_wanted_and_no_task_that_reads_none(
    tiny_bert: Path, tiny_shop: Path, folder: Path, tmp_path: Path
) -> None:
    fields = {"backbone.image_model": str(folder / "resnet")}
    with pytest.raises(DataError, match=r"no item of .* has a picture"):
        build_task(make_tiny_recipe(tiny_bert, tiny_shop, tmp_path, **fields))
    raw = make_recipe(tiny_bert, folder).model_dump(mode="json")
    with pytest.raises(RecipeError, match=r"task\.kind masked reads no pictures"):
        parse_recipe({**raw, "task": {"kind": "masked"}})
