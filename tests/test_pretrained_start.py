"""A task that starts from an adapter which read texts alone: the weights, the head over them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from peft_combo.cli.app import app
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads.classification import ClassificationHead
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.errors import TuningError
from peft_combo.recipe.files import write_recipe
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.parse import parse_recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.versions import AdapterRecord
from peft_combo.tuning.continual import start_pretrained
from peft_combo.tuning.loop import TuneResult, tune
from peft_combo.tuning.plan import plan
from peft_combo.tuning.tasks import build_task

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def pretrained(tiny_bert: Path, tiny_shop: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, AdapterRecord]:
    """A store with an adapter that read the tiny shop's titles."""
    home = tmp_path_factory.mktemp("pretrained")
    made = parse_recipe(
        {
            "name": "read", "category": "tiny-text", "store": str(home / "adapters"), "task": {"kind": "masked"},
            "backbone": {"model": str(tiny_bert), "max_length": 16},
            "data": {"source": "folder", "path": str(tiny_shop)},
            "adapter": {"method": "lora", "rank": 4, "top_layers": 2, "dropout": 0.1},
            "training": {"epochs": 3, "batch_size": 16, "learning_rate": 2e-2, "early_stopping": None},
        }
    )  # fmt: skip
    return str(home / "adapters"), tune(made, run_folder=home / "run").record


def supervised(tiny_recipe: MakeRecipe, store: str, **changes: Any) -> Recipe:
    still = {
        "training.learning_rate": 1e-12,
        "training.head_learning_rate": 1e-12,
        "training.epochs": 1,
        "store": store,
    }
    return tiny_recipe("lora", **{**still, **changes})


def started(recipe: Recipe, tmp_path: Path) -> TuneResult:
    found = start_pretrained(recipe, "tiny-text")
    assert found is not None
    return tune(found.recipe, task=found.task, start=found.start, run_folder=tmp_path / "run")


@pytest.mark.parametrize("task", [{"kind": "bundle"}, {"kind": "classification", "min_texts": 2}])
def test_another_task_starts_with_exactly_these_weights(
    task: dict[str, Any], tiny_recipe: MakeRecipe, tmp_path: Path, pretrained: tuple[str, AdapterRecord]
) -> None:
    store, read = pretrained
    result = started(supervised(tiny_recipe, store, task=task, category=f"tiny-{task['kind']}"), tmp_path)
    bank = AdapterBank(Backbone.of(tiny_recipe().backbone), AdapterStore(store))
    texts = ["w10 w40 w120", "w12 w41 w121"]
    first, then = (bank.encode(texts, record.reference) for record in (read, result.record))
    frozen = bank.encode(texts, None)
    assert np.abs(first - frozen).max() > 1e-2  # it had learned something
    assert np.allclose(first, then, atol=1e-5)
    extra = result.record.manifest.data.model_extra
    assert extra is not None
    assert extra["continued"] == {"from": read.reference, "digest": read.digest, "pretrained": True}
    head = bank.get(result.record.reference).task_head
    assert isinstance(head, BundleHead | ClassificationHead)


def test_a_head_is_fitted_over_the_states_it_will_stand_on(
    tiny_recipe: MakeRecipe, tmp_path: Path, pretrained: tuple[str, AdapterRecord]
) -> None:
    store, read = pretrained
    task = {"kind": "classification", "min_texts": 2}
    result = started(supervised(tiny_recipe, store, task=task, category="tiny-fitted"), tmp_path)
    bank = AdapterBank(Backbone.of(tiny_recipe().backbone), AdapterStore(store))
    own = build_task(supervised(tiny_recipe, store, task=task))
    head = own.head(bank.backbone, 16)
    own.start(head, lambda rows: bank.encode([own.texts[row] for row in rows], read.reference))
    stored = bank.get(result.record.reference).head_as(ClassificationHead)
    assert torch.allclose(stored.linear.weight, head.linear.weight, atol=1e-3)
    own.start(head, lambda rows: bank.encode([own.texts[row] for row in rows], None))
    assert not torch.allclose(stored.linear.weight, head.linear.weight, atol=1e-3)


def test_another_shape_is_refused_with_the_keys_to_set(
    tiny_recipe: MakeRecipe, pretrained: tuple[str, AdapterRecord]
) -> None:
    store, _ = pretrained
    other = {"adapter": {"method": "lora", "rank": 8, "top_layers": 1}}
    with pytest.raises(TuningError, match=r"--set adapter.rank=4 --set adapter.top_layers=2"):
        start_pretrained(supervised(tiny_recipe, store, **other), "tiny-text")
    with pytest.raises(TuningError, match=r"adapter.method: lora"):
        start_pretrained(tiny_recipe("prefix", store=store), "tiny-text")
    # An adapter of the task itself goes on as before.
    assert start_pretrained(supervised(tiny_recipe, store, task={"kind": "masked"}), "tiny-text") is None


def test_the_command_starts_from_it_and_there_is_nothing_to_promote(
    tiny_recipe: MakeRecipe, tmp_path: Path, pretrained: tuple[str, AdapterRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(supervised(tiny_recipe, pretrained[0], category="tiny-told"), tmp_path / "told.yaml")
    command = ["tune", "--recipe", "told.yaml", "--from", "tiny-text"]
    refused = CliRunner().invoke(app, [*command, "--promote", "prod"])
    assert "was pretrained on texts" in str(refused.exception)
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["adapter"] == "tiny-told@v1"


def test_a_plan_of_it_and_of_tagging_can_be_made(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    found = plan(tiny_recipe(task={"kind": "masked"}))
    assert found.task == "masked"
    assert found.memory.cached == 0  # its texts are others at every step
    lines = [json.dumps({"tokens": [f"w{n}", "w9"], "tags": ["B-Clo", "O"]}) for n in range(60)]
    (tmp_path / "tags.jsonl").write_text("\n".join(lines))
    assert plan(tiny_recipe(task={"kind": "tagging"}, **{"data.path": str(tmp_path)})).task == "tagging"
