"""Every recipe that comes with the package runs from its data to a stored adapter, on a small slice."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from peft_combo.data.pictures import DrawnPicture
from peft_combo.data.pictures.drawing import COLOURS
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads import load_head
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.recipe.files import load_recipe, recipes_folder
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.loop import tune

HAS_PILLOW = all(importlib.util.find_spec(name) for name in ("PIL", "efficientnet_lite_pytorch"))
SHIPPED = sorted(file.stem for file in recipes_folder().glob("*.yaml"))
# transformers' own attribute, which it deprecates, is read by peft when a prompt-learning model is made.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def slice_of_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every table a recipe may ask for: 120 items in 6 styles, bundles, baskets, labels and tags."""
    dice = random.Random(3)
    folder = tmp_path_factory.mktemp("slice")
    styles = [[number for number in range(120) if number % 6 == style] for style in range(6)]
    slots = ("upper", "bottom", "shoe", "bag", "accessory", "dress")
    nouns = ("blouse", "jeans", "sneakers", "tote", "scarf", "dress")
    words = [f"w{10 + row % 6 * 2 + row // 6 % 2} w{40 + row % 80}" for row in range(120)]
    titles = [f"{own} {nouns[row % 6]}" for row, own in enumerate(words)]
    items = [
        f"i{row},{title},Floor {row % 3} > Room > Wall > Shelf {row % 3},{slots[row % 6]},{5 + row},maker {row % 4},"
        f"style{row % 6}.png"
        for row, title in enumerate(titles)
    ]
    if HAS_PILLOW:
        for style in range(6):
            drawn = DrawnPicture("top", list(COLOURS)[5 * style], "plain", style)
            (folder / f"style{style}.png").write_bytes(drawn.read())
    bundles, meta, baskets = [], [], []
    for bundle in range(120):
        bundles += [f"b{bundle},i{row}" for row in dice.sample(styles[dice.randrange(6)], dice.choice((3, 4)))]
        meta.append(f"b{bundle},u{bundle % 40}")
    for basket in range(900):
        rows = dice.sample(styles[(basket % 40) % 6], 8)
        baskets += [f"u{basket % 40},k{basket},i{row},1,{1_700_000_000 + 86_400 * basket}" for row in rows]
    labels = [f"{own} w{100 + copy},kind {row % 3}" for row, own in enumerate(words) for copy in (0, 1)]
    tables = {
        "items": ["item_id,title,category,slot,price,brand,image", *items],
        "bundles": ["bundle_id,item_id", *bundles],
        "bundle_meta": ["bundle_id,user_id", *meta],
        "interactions": ["user_id,basket_id,item_id,quantity,timestamp", *baskets],
        "labels": ["text,label", *labels],
    }  # fmt: skip
    for name, lines in tables.items():
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    asked = [f"{own} w{100 + row},{own.split()[0]} w{30 + row % 12}" for row, own in enumerate(words)]
    (folder / "answers.csv").write_text("question,answer\n" + "\n".join(asked) + "\n")
    tagged = [{"tokens": title.split(), "tags": ["B-Clo", "O", "B-Acc"]} for title in titles]
    (folder / "tags.jsonl").write_text("\n".join(map(json.dumps, tagged)) + "\n")
    return folder


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_runs(name: str, slice_of_all: Path, tiny_bert: Path, tmp_path: Path) -> None:
    if name == "lora-fashion-pictures" and not HAS_PILLOW:
        pytest.skip("pillow and the vision encoder are not installed (extra [images])")
    changes = [
        f"store={tmp_path / 'adapters'}", f"backbone.model={tiny_bert}", "backbone.max_length=16", "training.epochs=2",
        "data.source=folder", f"data.path={slice_of_all}", "data.departments=[]",
    ]  # fmt: skip
    recipe = load_recipe(name, changes)
    result = tune(recipe, run_folder=tmp_path / "run")
    assert len(result.losses) == result.plan.steps or result.stopped_early
    assert np.isfinite(result.losses).all()
    assert [row.name for row in result.table.rows[-2:]] == ["frozen backbone", "tuned"]
    assert all(np.isfinite(value) for row in result.table.rows for value in row.values.values())
    assert AdapterStore(recipe.store).verify() == []
    # What was stored serves: the adapter attaches, and the head is one of its task.
    Backbone.of(recipe.backbone).attach(result.record)
    head = load_head(result.record.manifest.task, load_file(result.record.file(HEAD_FILE)))
    assert head.kind == recipe.task.kind == result.record.manifest.task["kind"]
