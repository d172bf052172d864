"""On a GPU: every precision and quantisation learns there, what was tuned there serves on a CPU, and the plan holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance_cases import ENCODERS, METHODS, MOVED, Matrix
from conftest import REPOSITORY, StopAt
from made_up import build_encoder
from safetensors.torch import load_file
from test_conformance import WORKING

from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.recipe.model import Recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.loop import tune
from peft_combo.tuning.plan import plan

pytestmark = [
    pytest.mark.gpu,
    # transformers' own attribute, which it deprecates, is read by peft when a prompt-learning model is made.
    # transformers' code of DeBERTa, under newer versions of Python.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

MakeRecipe = Callable[..., Recipe]
TEXTS = ["w10 w41 w121", "w12 w50", "w3", "w7 w8 w9 w10 w11"]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["lora", "adalora", "prefix", "bottleneck", "p-tuning: lstm", "full"])
def test_it_learns_in_every_precision_and_serves_on_a_cpu(
    method: str, precision: str, tiny_recipe: MakeRecipe, tiny_bert: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"training.epochs": 8, "backbone.precision": precision}
    if method in ("bottleneck", "p-tuning: lstm"):
        changes["adapter"] = {"method": "bottleneck"} if method == "bottleneck" else METHODS[method].model_dump()
        method = "head"
    recipe = tiny_recipe(method, **changes)
    result = tune(recipe, run_folder=tmp_path / "run")
    assert (result.plan.device, result.plan.precision) == ("cuda", {"no": "fp32"}.get(precision, precision))
    assert np.mean(result.losses[-3:]) < np.mean(result.losses[:3])
    assert result.table.gain.value > 0.02
    store = AdapterStore(recipe.store)
    assert all(
        tensor.dtype == torch.float32
        for file in result.record.path.glob("*.safetensors") for tensor in load_file(file).values()
    )  # fmt: skip
    there, here = (
        AdapterBank(Backbone.load(str(tiny_bert), max_length=16, device=device), store).encode(TEXTS, "tiny")
        for device in ("cuda", "cpu")
    )
    np.testing.assert_allclose(there, here, atol=2e-5)


@pytest.mark.parametrize("method", ["lora", "adalora", "prefix", "top-layers", "full"])
def test_a_run_on_the_gpu_is_the_run_on_the_cpu(
    method: str, tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(method, **{"training.epochs": 2, **({"adapter.dropout": 0.0} if "lora" in method else {})})
    there = tune(recipe, run_folder=tmp_path / "gpu").losses
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({**recipe.model_dump(mode="json"), "store": str(tmp_path / "cpu-store")}))
    program = (
        "import json, sys; from pathlib import Path; from peft_combo.recipe.parse import parse_recipe; "
        "from peft_combo.tuning.loop import tune; here = Path(sys.argv[1]); "
        "print(json.dumps(tune(parse_recipe(json.loads((here / 'recipe.json').read_text())), "
        "run_folder=here / 'cpu').losses))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)], cwd=REPOSITORY, capture_output=True,
        text=True, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(there, json.loads(done.stdout), rtol=2e-3)


@pytest.mark.parametrize("method", ["lora", "adalora", "prefix"])
@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_run_that_died_goes_on(method: str, precision: str, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(method, **{"backbone.precision": precision})
    straight = tune(recipe, run_folder=tmp_path / "straight")
    with pytest.raises(SystemExit):
        tune(recipe, run_folder=tmp_path / "run", callback=StopAt(8))
    resumed = tune(recipe, run_folder=tmp_path / "run", resume=True)
    # The GPU adds gradients of equal rows up in an order of its own, so the last bits may differ.
    np.testing.assert_allclose(resumed.losses, straight.losses, rtol=1e-3 if precision == "no" else 2e-2)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("encoders"), "cuda")


@pytest.mark.parametrize(("method", "encoder"), WORKING)
def test_a_method_does_there_what_it_does_on_a_cpu(matrix: Matrix, method: str, encoder: str) -> None:
    found = matrix.finding(method, encoder)
    assert not found.refused
    assert found.silent == ()
    assert (found.moved > MOVED) == (method != "head")
    assert found.base_same
    bits = ENCODERS[encoder][2]
    assert found.reloaded <= {"none": 2e-5, "8bit": 2e-2, "4bit": 1e-3}[bits]
    assert found.resumed <= {"none": 1e-5, "8bit": 2e-2, "4bit": 1e-3}[bits]


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("method", ["lora", "adalora", "prefix", "vera"])
def test_frozen_weights_in_fewer_bits_learn(method: str, bits: str, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    encoder = build_encoder(tmp_path / "wide", hidden_size=64, intermediate_size=128)  # 4 bits come in blocks of 64
    changes = {"backbone.model": str(encoder), "backbone.quantization": bits, "backbone.precision": "bf16"}
    section = METHODS[method].model_dump(mode="json")
    recipe = tiny_recipe("head", **changes, **{"adapter": section, "training.epochs": 8})
    result = tune(recipe, run_folder=tmp_path / "run")
    assert np.mean(result.losses[-3:]) < np.mean(result.losses[:3])
    assert result.record.manifest.backbone.quantization == bits


def test_the_encoder_takes_the_gpu_unless_told(tiny_bert: Path) -> None:
    there = Backbone.load(str(tiny_bert), max_length=16)
    assert there.device.type == "cuda"
    here = Backbone.load(str(tiny_bert), max_length=16, device="cpu")
    assert there.fingerprint == here.fingerprint
    texts = [f"w{one} w{one + 3} w{one % 7}" for one in range(5, 95)]
    np.testing.assert_allclose(there.encode(texts), here.encode(texts), atol=1e-5)
    np.testing.assert_allclose(there.encode(texts, chunk_tokens=64), there.encode(texts), atol=1e-5)


def test_the_plan_says_what_the_gpu_will_hold(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(**{"training.epochs": 1})
    found = plan(recipe)
    assert (found.device, found.memory.gpu) == ("cuda", True)
    measured = tune(recipe, run_folder=tmp_path / "run").peak_mib
    assert found.memory.device == pytest.approx(measured, rel=0.5)  # so small a run is mostly what CUDA rounds up
    vast = tiny_recipe(**{"training.cache_limit_mib": 0})
    assert plan(vast).memory.cached == 0


def test_accelerate_launches_it(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny_recipe().model_dump(mode="json")))
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
         "--mixed_precision", "bf16", "--dynamo_backend", "no", "-m", "peft_combo", "tune",
         "--recipe", str(tmp_path / "tiny.yaml"), "--run-folder", str(tmp_path / "run"), "--json"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout)
    assert (told["plan"]["device"], told["plan"]["precision"]) == ("cuda", "bf16")
