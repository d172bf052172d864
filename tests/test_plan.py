"""The plan: its counts are the run's, its sizes what can be counted by hand, and what cannot work costs no loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance_cases import METHODS
from made_up import build_encoder
from torch import nn

from peft_combo.encoder import methods
from peft_combo.encoder.backbone import Backbone
from peft_combo.errors import BackboneError, TuningError
from peft_combo.recipe.model import BackboneConfig, Recipe
from peft_combo.tuning.figures import Memory
from peft_combo.tuning.loop import tune
from peft_combo.tuning.plan import count_frozen_bytes, plan
from peft_combo.tuning.probe import probe
from peft_combo.tuning.resources import measure

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"shira"}))
def test_shapes_alone_tell_what_every_method_trains(name: str, tiny_bert: Path) -> None:
    config = BackboneConfig(model=str(tiny_bert), max_length=16)
    adapter = METHODS[name]
    if name == "lora: pissa":
        adapter = adapter.model_copy(update={"pissa": False})
    counts = []
    for backbone in (Backbone.of(config), Backbone.blueprint(config)):
        attached = methods.attach(
            backbone.model, adapter, max_length=16, total_steps=10, seed=0, tokenizer=backbone.tokenizer
        )
        shapes = {name: p.shape for name, p in attached.trainable().items() if "ranknum" not in name}
        counts.append((shapes, attached.first_layer, attached.max_length))
    assert counts[0] == counts[1]


def test_the_cells_of_shira_are_counted_without_being_drawn(tiny_recipe: MakeRecipe, tiny_bert: Path) -> None:
    backbone = Backbone.load(str(tiny_bert), max_length=16)
    attached = methods.attach(backbone.model, METHODS["shira"], max_length=16, total_steps=10, seed=0)
    recipe = tiny_recipe("head", adapter=METHODS["shira"].model_dump())
    assert plan(recipe).adapter_parameters == sum(p.numel() for p in attached.trainable().values())


@pytest.mark.parametrize("method", ["lora", "adalora", "prefix", "head", "top-layers", "full"])
def test_the_plan_is_the_plan_of_the_run(method: str, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(method, **{"training.epochs": 2, "training.evaluate_every": 0.5})
    before = plan(recipe)
    assert not (tmp_path / "adapters").exists()
    run = tune(recipe, run_folder=tmp_path / "run").plan
    told = ("adapter_parameters", "head_parameters", "frozen_parameters", "steps", "warmup_steps", "evaluations",
            "items", "examples", "precision", "metric")  # fmt: skip
    assert {name: getattr(before, name) for name in told} == {name: getattr(run, name) for name in told}
    assert before.memory.trained == run.memory.trained
    assert before.memory.cached == run.memory.cached
    assert before.memory.vectors == run.memory.vectors
    assert before.memory.frozen == pytest.approx(run.memory.frozen, rel=1e-3)
    # Two twins of one and two layers tell what three layers, or the two that are adapted, keep for the backward pass.
    assert before.memory.step == pytest.approx(run.memory.step, rel=0.05)


def test_sizes_and_steps_by_hand(tiny_recipe: MakeRecipe) -> None:
    # 63 training bundles in batches of 16: 4 steps an epoch. Rank 4 on the six linear modules of two layers, 32 wide.
    recipe = tiny_recipe(**{"training.epochs": 5, "training.warmup_fraction": 0.12, "training.evaluate_every": 2})
    found = plan(recipe)
    rank_numbers = 4 * (4 * (32 + 32) + (32 + 48) + (48 + 32))
    assert found.adapter_parameters == 2 * rank_numbers
    assert found.head_parameters == 2 * 32 * 32 + 1
    assert found.steps == 5 * round(found.examples["train"] / 16)
    assert found.warmup_steps == int(np.ceil(0.12 * found.steps))
    assert found.evaluations == 3  # after epochs 2, 4 and, at the end, 5
    trained = 4 * (found.adapter_parameters + found.head_parameters) / 2**20
    assert found.memory.trained == pytest.approx(5 * trained)  # itself, gradient, two moments, the best copy
    assert found.memory.vectors == 4 * 60 * 32 / 2**20
    assert found.memory.cached == 4 * 60 * 5 * 32 / 2**20  # sixty titles of three words, [CLS] and [SEP]
    assert found.disk.adapter == pytest.approx(trained)
    assert found.disk.checkpoints == pytest.approx(2 * 4 * trained)
    plain = plan(tiny_recipe(**{"training.optimizer": "sgd", "training.fast_path": False}))
    assert plain.memory.trained == pytest.approx(4 * trained)
    assert plain.memory.cached == 0


def test_what_the_backward_pass_needs_is_counted_once_and_without_weights() -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 8))

        def forward(self, batch: Any, seed: int) -> torch.Tensor:
            hidden = torch.ones(100, 8) @ self.weight  # keeps its input, (100, 8)
            return (hidden * hidden).sum()  # keeps hidden, (100, 8), twice the same

    model = Squares()

    class Attached:
        inner, first_layer = nn.Module(), 0

        def trainable(self) -> dict[str, nn.Parameter]:
            return {"weight": model.weight}

    recipe: Any = type("Recipe", (), {"seed": 0})
    attached: Any = Attached()
    head: Any = nn.Module()
    monkey = pytest.MonkeyPatch()
    monkey.setattr("peft_combo.tuning.probe.set_training", lambda *_: None)
    try:
        assert probe(model, attached, head, None, recipe)[1] == 2 * 100 * 8 * 4  # type: ignore[arg-type]
    finally:
        monkey.undo()
    assert torch.equal(model.weight, torch.ones(8, 8))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_weights_take_what_bitsandbytes_takes(bits: Any, tiny_bert: Path) -> None:
    shapes = Backbone.blueprint(BackboneConfig(model=str(tiny_bert), max_length=16))
    loaded = Backbone.load(str(tiny_bert), max_length=16, quantization=bits)
    total = sum(t.numel() * t.element_size() for t in (*loaded.model.parameters(), *loaded.model.buffers()))
    for module in loaded.model.modules():
        weight: Any = getattr(module, "weight", None)
        if getattr(weight, "SCB", None) is not None:
            total += weight.SCB.numel() * 4
        if getattr(weight, "quant_state", None) is not None:
            total += weight.quant_state.absmax.numel() * 4
    assert count_frozen_bytes(shapes.model, bits) == pytest.approx(total, rel=0.01)
    assert count_frozen_bytes(shapes.model, bits) < count_frozen_bytes(shapes.model, "none")


def void_weights(file: Path) -> None:
    """Leave the header and make every number of the weights none."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:start] + b"\xff" * (len(content) - start))


def test_weights_are_not_read_for_a_plan_nor_for_a_refusal(
    tiny_recipe: MakeRecipe, tiny_bert: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "no-weights"
    shutil.copytree(tiny_bert, empty)
    void_weights(empty / "model.safetensors")
    assert plan(tiny_recipe(**{"backbone.model": str(empty)})).frozen_parameters > 0
    with pytest.raises(BackboneError, match="top_layers: expected at most 3"):
        plan(tiny_recipe(**{"backbone.model": str(empty), "adapter.top_layers": 9}))
    with pytest.raises(BackboneError, match=r"max_length: expected at most 64 .*, found 512"):
        plan(tiny_recipe(**{"backbone.model": str(empty), "backbone.max_length": 512}))
    with pytest.raises(BackboneError, match="leave none"):
        plan(
            tiny_recipe("adalora", **{"training.epochs": 1, "training.batch_size": 64, "adapter.final_fraction": 0.89})
        )
    modern = build_encoder(tmp_path / "modern", "modernbert")
    void_weights(modern / "model.safetensors")
    with pytest.raises(BackboneError, match=r"prefix.* does not work on modernbert"):
        plan(tiny_recipe("prefix", **{"backbone.model": str(modern)}))


def test_a_method_that_reaches_nothing_is_refused_by_the_plan(tiny_recipe: MakeRecipe, monkeypatch: Any) -> None:
    honest = methods.attach

    def deaf(*args: Any, **options: Any) -> Any:
        attached = honest(*args, **options)
        module = next(m for m in attached.inner.modules() if hasattr(m, "lora_B"))
        module.forward = module.get_base_layer().forward
        return attached

    monkeypatch.setattr(methods, "attach", deaf)
    with pytest.raises(TuningError, match="get no gradient"):
        plan(tiny_recipe())


def test_the_peak_is_of_what_is_there_at_the_same_time() -> None:
    memory = Memory(
        base=500, frozen=80, loading=90, trained=10, step=300, cached=20, vectors=5, evaluation=50, allocator=7
    )
    assert memory.host == 500 + 80 + 10 + 20 + 7 + 300
    assert replace(memory, step=10).host == 500 + 80 + 10 + 20 + 7 + 55
    assert replace(memory, loading=2000).host == 2500
    assert memory.device == 0
    on_gpu = replace(memory, gpu=True)
    assert on_gpu.device == 80 + 10 + 20 + 7 + 300
    assert replace(on_gpu, step=10).device == 80 + 10 + 20 + 7 + 50
    assert on_gpu.host == 500 + 90


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the GPU's memory where there is one")
def test_growth_is_seen_while_it_lasts() -> None:
    def work() -> None:
        held = np.ones(40 * 2**20 // 8)
        assert held.sum() > 0

    seconds, grown = measure(work)
    assert seconds > 0
    assert 30 < grown < 60


def test_what_does_not_fit_is_said_with_a_remedy(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    found = plan(recipe)
    assert found.shortfalls(recipe, tmp_path / "run") == ()
    (short,) = found.shortfalls(recipe, tmp_path / "run", max_memory_gib=0.001)
    assert "under --max-memory-gib, found 0.00 GiB" in short
    (long,) = found.shortfalls(recipe, tmp_path / "run", max_minutes=0)
    assert "training.epochs" in long
    vast = replace(found, memory=replace(found.memory, step=1e9), disk=replace(found.disk, checkpoints=1e12))
    memory, disk = vast.shortfalls(recipe, tmp_path / "run")
    assert "GiB of memory" in memory
    assert "training.accumulation" in memory
    assert f"disk at {tmp_path}" in disk


def test_a_small_encoder_is_advised_against_quantisation(tiny_recipe: MakeRecipe) -> None:
    assert plan(tiny_recipe()).advice == ()
    (advice,) = plan(tiny_recipe(**{"backbone.quantization": "8bit"})).advice
    assert "8bit weights save 0 MiB" in advice
    assert "times what float32 takes here. Set backbone.quantization: none." in advice


def test_the_command_prints_the_plan_and_ends_with_3_where_it_does_not_fit(
    tiny_recipe: MakeRecipe, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from peft_combo.__main__ import main

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["peft-combo", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny_recipe().model_dump(mode="json")))
    left = sorted(tmp_path.rglob("*"))
    code, out = run("tune", "--recipe", "tiny.yaml", "--dry-run")
    assert code == 0
    assert "Fits. Nothing was trained or stored." in out
    code, out = run("tune", "--recipe", "tiny.yaml", "--dry-run", "--max-memory-gib", "0.01", "--json")
    assert code == 3
    told = json.loads(out)
    assert (told["fits"], len(told["shortfalls"])) == (False, 1)
    assert told["peak_mib"] > 10
    assert sorted(tmp_path.rglob("*")) == left
    assert run("tune", "--recipe", "tiny.yaml", "--max-minutes", "5")[0] == 1  # it means nothing without --dry-run
