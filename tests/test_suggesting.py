"""What is suggested for labelling: the unsure, spread out, in files that are read back once they are filled in."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from peft_combo.data.labels.annotation import find_unlabelled, write_to_label
from peft_combo.data.model import Bundles, Catalog, Dataset
from peft_combo.data.task_data import check_data
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.errors import DataError, StoreError
from peft_combo.recipe.files import write_recipe
from peft_combo.recipe.model import DataConfig, Recipe
from peft_combo.recipe.task import ClassificationTask, TaggingTask
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.active_learning import (
    choose_spread,
    compute_entropies,
    compute_margins,
    suggest_bundles,
    suggest_texts,
)
from peft_combo.tuning.loop import tune

MakeRecipe = Callable[..., Recipe]


def test_uncertainties_of_worked_cases() -> None:
    likely = np.array([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.0], [0.1, 0.6, 0.3]])
    np.testing.assert_allclose(compute_margins(likely, exclusive=True), [0.0, 1.0, 1.0, 0.7])
    many = compute_margins(np.array([[1.0, 0.0], [0.5, 0.5], [0.5, 1.0], [0.9, 0.2]]), exclusive=False)
    np.testing.assert_allclose(many, [0.0, 1.0, 0.5, 0.3])
    np.testing.assert_allclose(compute_entropies(likely[:3]), [0.0, 1.0, np.log(2) / np.log(3)], atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_unsure_cluster_is_chosen_and_none_of_its_near_copies(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sure = rng.normal(size=(200, 16))
    unsure = np.repeat(rng.normal(size=(5, 16)), 40, axis=0) + rng.normal(scale=1e-4, size=(200, 16))
    vectors = np.concatenate([sure, unsure]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    weights = np.concatenate([np.full(200, 0.02), np.full(200, 0.9)])
    chosen = choose_spread(vectors, weights, 5, seed)
    # One of each forty: a random choice of five of two hundred has all of these in one of thirty cases.
    assert sorted((row - 200) // 40 for row in chosen) == [0, 1, 2, 3, 4]
    assert choose_spread(vectors, weights, 5, seed) == chosen


def test_copies_and_what_is_sure_are_never_chosen() -> None:
    vectors = np.repeat(np.eye(3, dtype=np.float32), 2, axis=0)
    chosen = choose_spread(vectors, np.array([1.0, 1, 1, 1, 0, 0]), 6, seed=0)
    assert sorted(row // 2 for row in chosen) == [0, 1]
    assert choose_spread(vectors, np.zeros(6), 3, seed=0) == []
    assert choose_spread(vectors[:0], np.zeros(0), 3, seed=0) == []


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def items(folder: Path, texts: list[str], **columns: list[str]) -> None:
    with (folder / "items.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["item_id", "title", *columns])
        cells = zip(texts, *columns.values(), strict=True)
        writer.writerows([f"i{row}", *own] for row, own in enumerate(cells))


def test_what_waits_for_a_label_is_what_has_none_anywhere(tmp_path: Path) -> None:
    data = DataConfig(source="folder", path=str(tmp_path))
    table = ClassificationTask(labels="table")
    items(tmp_path, ["Red tee", "Blue tee", "Red  TEE", "Hat"], category=["A > B", "", "A", ""], kind=["x", "", "", ""])
    assert find_unlabelled(data, table).texts == ("Red tee", "Blue tee", "Hat")
    (tmp_path / "labels.csv").write_text("text,label\nhat,head\nsock,\nred tee,top\n")
    found = find_unlabelled(data, table)
    assert (found.texts, found.labelled) == (("sock", "Blue tee"), 2)
    only = DataConfig(source="folder", path=str(tmp_path / "labels.csv"))
    assert find_unlabelled(only, table).texts == ("sock",)
    # By a column of the catalogue: two texts are one but for case, and one of them has a label.
    assert find_unlabelled(data, ClassificationTask(labels="category", depth=2)).texts == ("Blue tee", "Hat")
    assert find_unlabelled(data, ClassificationTask(labels="kind")).texts == ("Blue tee", "Hat")
    assert len(find_unlabelled(data, ClassificationTask(labels="nowhere")).texts) == 3
    (tmp_path / "tags.jsonl").write_text(json.dumps({"text": "Hat", "spans": [[0, 3, "Acc"]]}) + "\n")
    assert find_unlabelled(data, TaggingTask()).texts == ("Red tee", "Blue tee")
    # Tags made by a rule are no labels.
    assert len(find_unlabelled(data, TaggingTask(tags="slots", types={"hat": "Acc"})).texts) == 3


def test_where_everything_has_a_label_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("text,label\nhat,head\n")
    data = DataConfig(source="folder", path=str(tmp_path))
    with pytest.raises(DataError, match="waits for a label: 1 texts have one"):
        find_unlabelled(data, ClassificationTask(labels="table"))
    (tmp_path / "labels.csv").write_text("txt,label\nhat,head\n")
    with pytest.raises(DataError, match=r"labels\.csv:1: has no column 'text'"):
        find_unlabelled(data, ClassificationTask(labels="table"))


def test_a_file_to_fill_in_has_a_form_we_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ends in \.csv or \.jsonl, found \.txt"):
        write_to_label(tmp_path / "a.txt", [{"text": "a"}])
    with pytest.raises(DataError, match=r"ends in \.jsonl, found \.csv"):
        write_to_label(tmp_path / "a.csv", [{"text": "a", "spans": [[0, 1, "X"]]}])


def labelled(folder: Path) -> list[str]:
    """Write 200 labelled texts, `first` where they say w10 and `second` where they say w11, and items: 40 such, and 40
    that say both. Return the latter.
    """
    folder.mkdir()
    rng = np.random.default_rng(2)

    def text(*words: str) -> str:
        return " ".join(rng.permutation([*words, *(f"w{40 + int(n)}" for n in rng.choice(60, 2, replace=False))]))

    rows = [(text(f"w{10 + row % 2}", f"w{10 + row % 2}"), ("first", "second")[row % 2]) for row in range(200)]
    (folder / "labels.csv").write_text("text,label\n" + "".join(f"{one},{label}\n" for one, label in rows))
    both = [text("w10", "w11") for _ in range(40)]
    items(folder, [*(text(f"w{10 + row % 2}", f"w{10 + row % 2}") for row in range(40)), *both])
    return both


def test_titles_that_a_classifier_is_torn_over_are_suggested_and_read_back(
    shell: Callable[..., tuple[int, str, str]], tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    both = labelled(tmp_path / "shop")
    task = {"kind": "classification", "labels": "table", "min_texts": 5}
    changes = {"task": task, "data.path": str(tmp_path / "shop"), "training.epochs": 1}
    recipe = tiny_recipe("head", **changes)
    tune(recipe, run_folder=tmp_path / "run")
    write_recipe(recipe, tmp_path / "own.yaml")
    ask = ["data", "suggest", "--recipe", tmp_path / "own.yaml", "--adapter", "tiny", "--store", tmp_path / "adapters"]
    file = tmp_path / "todo" / "labels.csv"
    code, out, err = shell(*ask, "-n", 10, "--to", file)
    assert code == 0, err
    assert "texts wait for a label, 200 have one" in err
    assert "10 to label in" in out
    rows = read_csv(file)
    assert len({row["text"] for row in rows}) == 10
    assert sum(row["text"] in both for row in rows) >= 9  # half of the pool
    assert all(0 < float(row["uncertainty"]) <= 1 and row["label"] == "" for row in rows)
    # Filled in, it is a table like any other; what helped to fill it in is not read.
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "label": ("first", "second")[place % 2]} for place, row in enumerate(rows))
    assert check_data(DataConfig(source="folder", path=str(file)), recipe.task) == []
    code, out, _ = shell(*ask, "-n", 3, "--json")
    assert [len(one["rows"]) for one in json.loads(out)] == [1, 1, 1]

    code, _, err = shell(*ask, "--what", "bundles")
    assert code == 1
    assert "An adapter for classification cannot say which bundles to label. Leave --what out" in err
    code, _, err = shell(
        "data", "suggest", "--recipe", "lora-fashion", "--adapter", "tiny", "--store", tmp_path / "adapters"
    )
    assert code == 1
    assert 'Adapter tiny was tuned for classification, recipe "lora-fashion" is for bundle; expected one task.' in err


def test_suggested_tags_come_as_spans_to_put_right(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "tagged"
    folder.mkdir()
    rows = [f"w{40 + row % 50} w{10 + row % 2} w{100 + row % 60}" for row in range(120)]
    spans = [[[4, 7, "Clo" if row % 2 else "Acc"]] for row in range(120)]
    (folder / "tags.jsonl").write_text(
        "".join(json.dumps({"text": text, "spans": own}) + "\n" for text, own in zip(rows, spans, strict=True))
    )
    recipe = tiny_recipe("head", **{"task": {"kind": "tagging"}, "data.path": str(folder), "training.epochs": 1})
    tune(recipe, run_folder=tmp_path / "run")
    bank = AdapterBank(Backbone.of(recipe.backbone), AdapterStore(recipe.store))
    texts = [f"w{40 + row} w{10 + row % 2} w9" for row in range(30)]
    found = suggest_texts(bank.backbone, bank.get("tiny"), texts, 4)
    assert len({one.shown for one in found}) == 4
    write_to_label(tmp_path / "todo" / "tags.jsonl", [row for one in found for row in one.rows])
    data = DataConfig(source="folder", path=str(tmp_path / "todo"))
    assert check_data(data, recipe.task) == []
    with pytest.raises(StoreError, match="expected one tuned for bundle"):
        suggest_bundles(bank.backbone, bank.get("tiny"), *(None, [], 3))  # type: ignore[arg-type]


def test_suggested_bundles_are_new_and_read_back(
    shell: Callable[..., tuple[int, str, str]], tiny_recipe: MakeRecipe, tiny_shop: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe("head", **{"training.epochs": 1})
    tune(recipe, run_folder=tmp_path / "run")
    write_recipe(recipe, tmp_path / "own.yaml")
    file = tmp_path / "todo" / "bundles.csv"
    code, out, err = shell(
        "data", "suggest", "--recipe", tmp_path / "own.yaml", "--adapter", "tiny", "--store", tmp_path / "adapters",
        "-n", 6, "--to", file,
    )  # fmt: skip
    assert code == 0, err
    assert out.count(" + ") == 6
    made: dict[str, set[str]] = {}
    for row in read_csv(file):
        made.setdefault(row["bundle_id"], set()).add(row["item_id"])
    assert list(made) == [f"suggested-{place}" for place in range(1, 7)]
    there: dict[str, set[str]] = {}
    for row in read_csv(tiny_shop / "bundles.csv"):
        there.setdefault(row["bundle_id"], set()).add(row["item_id"])
    assert all(len(own) == 2 and own not in there.values() for own in made.values())
    (tmp_path / "todo" / "items.csv").write_text((tiny_shop / "items.csv").read_text())
    assert check_data(DataConfig(source="folder", path=str(tmp_path / "todo")), recipe.task) == []
    # Sets that were bought together are candidates as well; one that is a bundle already is none.
    bank = AdapterBank(Backbone.of(recipe.backbone), AdapterStore(recipe.store))
    catalog = Catalog.build(["a", "b", "c", "d"], ["w10 w11"] * 4)  # copies, of which no pairs are made
    dataset = Dataset.build("d", catalog, None, Bundles.build(["x"], [[0, 1]]))
    sets = [np.array([1, 0], np.int32), np.array([0, 1, 2], np.int32)]
    found = suggest_bundles(bank.backbone, bank.get("tiny"), dataset, sets, 5)
    assert [[row["item_id"] for row in one.rows] for one in found] == [["a", "b", "c"]]
