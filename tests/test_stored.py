"""What earlier versions stored still reads and answers as it did: adapters, aliases, checkpoints, recommenders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from safetensors.torch import load_file

from peft_combo.data.model import Dataset
from peft_combo.data.sources import open_dataset
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads import load_head
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.parse import parse_recipe
from peft_combo.recommender.persistence import load_recommender
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.loop import tune

STORED = Path("tests/stored")
EXPECTED: dict[str, Any] = json.loads((REPOSITORY / STORED / "expected.json").read_text())


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored files name their encoder and data relative to the repository."""
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def backbone() -> Backbone:
    return Backbone.load(str(STORED / "encoder"), max_length=16)


@pytest.fixture
def store() -> AdapterStore:
    return AdapterStore(STORED / "adapters")


def recipe_of(store: AdapterStore, category: str) -> Recipe:
    return parse_recipe(store.open(category).manifest.recipe)


def dataset_of(store: AdapterStore) -> Dataset:
    return open_dataset(recipe_of(store, "bundle-lora").data)


def test_the_store_is_whole_and_its_alias_points_where_it_did(store: AdapterStore) -> None:
    assert store.verify() == []
    assert store.open("bundle-lora@prod").reference == "bundle-lora@v1"
    assert set(store.categories()) == set(EXPECTED["vectors"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("category", EXPECTED["vectors"])
def test_an_adapter_encodes_as_it_did_and_its_head_is_of_its_task(
    category: str, backbone: Backbone, store: AdapterStore
) -> None:
    record = store.open(category)
    vectors = backbone.encode(EXPECTED["texts"], backbone.attach(record))
    np.testing.assert_allclose(vectors, EXPECTED["vectors"][category], atol=1e-5)
    head = load_head(record.manifest.task, load_file(record.file(HEAD_FILE)))
    assert head.kind == record.manifest.task["kind"] == category.split("-")[0]


def test_a_run_goes_on_from_the_checkpoint(store: AdapterStore, tmp_path: Path) -> None:
    shutil.copytree(STORED / "checkpoint", tmp_path / "run")
    recipe = recipe_of(store, "bundle-lora")
    training = recipe.training.model_copy(update={"epochs": 3})
    recipe = recipe.model_copy(update={"training": training, "store": str(tmp_path / "adapters")})
    losses = tune(recipe, run_folder=tmp_path / "run", resume=True).losses
    np.testing.assert_allclose(losses, EXPECTED["resumed_losses"], rtol=1e-5)


def test_a_fitted_recommender_answers_as_it_did(backbone: Backbone, store: AdapterStore) -> None:
    dataset = dataset_of(store)
    fitted = load_recommender(STORED / "recommender", dataset, AdapterBank(backbone, store))

    def bundles(found: Any) -> list[list[Any]]:
        return [[list(one.items), pytest.approx(one.score, abs=1e-4)] for one in found]

    # What else comes with the best bundle, and what a text finds, are the composer's ways of today: nothing of them is
    # stored.
    assert bundles(fitted.compose(["i0"]))[0] == EXPECTED["composed"][0]
    assert len(fitted.compose(query=dataset.catalog.titles[7], user="u1")) == 5
    completed = [[one.item_id, pytest.approx(one.score, abs=1e-4)] for one in fitted.complete(["i0"], k=5)]
    assert completed == EXPECTED["completed"]
