"""The classification task: it learns, it measures what it says, and it goes through the loop like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import StopAt
from safetensors.torch import load_file
from typer.testing import CliRunner

from peft_combo.cli.app import app
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads import load_head
from peft_combo.encoder.heads.classification import ClassificationHead
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.errors import DataError, RecipeError, StoreError
from peft_combo.recipe.files import load_recipe
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import ClassificationTask
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.loop import TuneResult, tune
from peft_combo.tuning.tasks import build_task
from peft_combo.tuning.tasks.classification import Classification

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def intents(tmp_path: Path) -> Path:
    """300 texts, "same" where their two telling words are both of the first or both of the second kind, else "other".

    No word tells the class by itself, so a linear layer over frozen vectors has little to go by.
    """
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(300):
        one, two = rng.integers(2, size=2)
        words = [f"w{10 + one}", f"w{20 + two}", f"w{40 + int(rng.integers(20))}"]
        rng.shuffle(words)
        rows.append(f"{' '.join(words)},{'same' if one == two else 'other'}")
    folder = tmp_path / "intents"
    folder.mkdir()
    (folder / "labels.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    return folder


@pytest.fixture
def recipe(tiny_recipe: MakeRecipe, intents: Path) -> MakeRecipe:
    def make(method: str = "lora", **changes: Any) -> Recipe:
        task = {"kind": "classification", "labels": "table", "min_texts": 5}
        given = {"task": task, "data.path": str(intents), "training.epochs": 12, "training.learning_rate": 2e-2}
        return tiny_recipe(method, **{**given, **changes})

    return make


def run(recipe: Recipe, tmp_path: Path, **options: Any) -> TuneResult:
    return tune(recipe, run_folder=tmp_path / "run", **options)


def test_it_learns_is_stored_and_tells_the_same_again(recipe: MakeRecipe, tmp_path: Path) -> None:
    made = recipe()
    result = run(made, tmp_path)
    table = result.table
    assert [row.name for row in table.rows] == [
        "most frequent class", "TF-IDF + logistic regression", "frozen backbone", "tuned",
    ]  # fmt: skip
    assert table.gain.value > 0.1
    assert table.gain.interval[0] > 0
    assert table.gain.p < 0.05
    assert table.after.interval[0] <= table.after.values["macro_f1"] <= table.after.interval[1]
    manifest = result.record.manifest
    assert manifest.task["classes"] == ["other", "same"]
    assert manifest.metrics["after"]["macro_f1"]["value"] == table.after.values["macro_f1"]
    # Out of the files again: the same answers to the same test texts.
    backbone = Backbone.of(made.backbone)
    live = AdapterBank(backbone, AdapterStore(made.store)).get("tiny")
    head = live.head_as(ClassificationHead)
    task = build_task(made)
    assert isinstance(task, Classification)
    vectors = backbone.encode(task.texts, live.attached)
    again = task.predict(head, lambda rows: vectors if rows is None else vectors[rows])
    assert task.table(again, again).after.values["macro_f1"] == pytest.approx(table.after.values["macro_f1"], abs=1e-6)
    with pytest.raises(StoreError, match="tuned for classification; expected one tuned for bundle"):
        _ = live.head
    call = ["classify", *task.texts[:2], "--adapter", "tiny", "--store", made.store]
    told = CliRunner().invoke(app, [*call, "--json"])
    assert told.exit_code == 0
    wanted = head.classes(head.probabilities(vectors[:2]))
    assert [one["classes"] for one in json.loads(told.stdout)] == [
        [name for name, own in zip(head.labels, row, strict=True) if own] for row in wanted
    ]
    assert task.texts[0] in CliRunner().invoke(app, call).stdout
    *confusions, classes = table.details
    assert sum(int(row[1]) for row in classes.rows) == table.questions
    wrong = round((1 - table.after.values["accuracy"]) * table.questions)
    assert sum(int(row[2]) for detail in confusions for row in detail.rows) == wrong


def test_a_run_that_died_goes_on_to_the_same_end(recipe: MakeRecipe, tmp_path: Path) -> None:
    made = recipe(**{"training.epochs": 2, "task.head_dropout": 0.2})
    straight = run(made, tmp_path / "straight")
    with pytest.raises(SystemExit):
        tune(made, run_folder=tmp_path / "run", callback=StopAt(7))
    resumed = run(made, tmp_path, resume=True)
    assert resumed.losses == straight.losses
    for name in ("head.safetensors", "adapter_model.safetensors"):
        theirs, ours = load_file(straight.record.path / name), load_file(resumed.record.path / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_it_is_compared_with_does_not_depend_on_dropout(recipe: MakeRecipe, tmp_path: Path) -> None:
    same = {"training.epochs": 1}
    calm = run(recipe(**same), tmp_path / "calm").table
    wild = run(recipe(**same, **{"task.head_dropout": 0.9}), tmp_path / "wild").table
    assert wild.before == calm.before


def test_several_classes_apply(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        on = rng.random(3) < 0.5
        on[rng.integers(3)] = True
        words = [f"w{10 + k}" for k in np.flatnonzero(on)] + [f"w{60 + int(w)}" for w in rng.integers(60, size=3)]
        rows.append(f"{' '.join(words)},{'|'.join(f'k{k}' for k in np.flatnonzero(on))}")
    (tmp_path / "labels.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    task = {"kind": "classification", "labels": "table", "multi_label": True, "class_weights": "balanced"}
    result = run(
        tiny_recipe(**{"task": task, "data.path": str(tmp_path), "training.epochs": 3, "training.learning_rate": 1e-2}),
        tmp_path,
    )
    assert result.table.after.values["micro_f1"] > 0.8
    assert 0 < result.chosen["threshold"] < 1
    head = load_head(result.record.manifest.task, load_file(result.record.path / "head.safetensors"))
    assert isinstance(head, ClassificationHead)
    assert float(head.threshold) == pytest.approx(result.chosen["threshold"])


def test_a_head_is_rebuilt_and_refused() -> None:
    head = ClassificationHead(4, ["a", "b"], ClassificationTask())
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    vectors = np.eye(4, dtype=np.float32)[:2]
    # The logit of the right class is sqrt(4) = 2, of the other 0.
    np.testing.assert_allclose(head.eval().probabilities(vectors)[0, 0], 1 / (1 + np.exp(-2)), rtol=1e-6)
    again = load_head(head.spec(), head.state_dict())
    assert isinstance(again, ClassificationHead)
    np.testing.assert_array_equal(again.probabilities(vectors), head.probabilities(vectors))
    assert again.classes(again.probabilities(vectors)).tolist() == [[True, False], [False, True]]
    with pytest.raises(StoreError, match="does not match"):
        load_head({**head.spec(), "classes": ["a"]}, head.state_dict())
    with pytest.raises(StoreError, match="expected bundle, classification, rating, sequence, tagging, masked or match"):
        load_head({"kind": "ranking"}, {})
    assert BundleHead.kind == "bundle"


def test_rare_classes_and_too_few_are_said(recipe: MakeRecipe, intents: Path) -> None:
    with (intents / "labels.csv").open("a") as file:
        file.write("w99 w98,rare\n")
    task = build_task(recipe())
    assert any("1 classes with under 5 training texts left out, 1 texts" in note for note in task.notes)
    with pytest.raises(DataError, match="needs two classes with 500 training texts"):
        build_task(recipe(**{"task.min_texts": 500}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"training.early_stopping": {"metric": "mrr"}},
            r"early_stopping\.metric: expected one of macro_f1, .* \"mrr\"",
        ),
        ({"task.depth": 2}, "only labels: category has levels, found labels: table"),
        ({"task.temperature": 0.1}, "task.temperature: unknown key for classification"),
    ],
)
def test_what_does_not_suit_the_task_is_refused(changes: dict[str, Any], told: str, recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe(**changes)


def test_the_metric_that_counts_is_the_tasks_own(recipe: MakeRecipe, tiny_recipe: MakeRecipe) -> None:
    assert recipe().metric == "macro_f1"
    assert recipe(**{"training.early_stopping": {"metric": "accuracy"}}).metric == "accuracy"
    assert tiny_recipe(**{"training.early_stopping": None}).metric == "ndcg@10"


SLICE = [
    "backbone.max_length=16",
    "training.epochs=1",
    "adapter.top_layers=1",
    "task.min_texts=2",
    "data.valid_fraction=0.2",
]


@pytest.mark.parametrize("name", ["classify-fashion", "classify-food", "classify-texts"])
def test_the_shipped_recipes_run(name: str, tiny_bert: Path, tiny_shop: Path, intents: Path, tmp_path: Path) -> None:
    own = [f"backbone.model={tiny_bert}", f"store={tmp_path / 'store'}"]
    if name == "classify-fashion":
        own.append("task.depth=1")  # the tiny shop has one level
    data = intents if name == "classify-texts" else tiny_shop
    result = run(load_recipe(name, [*SLICE, *own], data), tmp_path)
    assert result.table.metric == "macro_f1"
    assert AdapterStore(tmp_path / "store").verify() == []
