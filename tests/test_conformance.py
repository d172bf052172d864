"""Every method in every architecture does what a method must, or is refused before it trains."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance_cases import (
    ENCODERS,
    METHODS,
    MOVED,
    RELOAD_TOLERANCE,
    Finding,
    Matrix,
    Tuned,
    page,
)
from conftest import REPOSITORY

from peft_combo.recipe.model import Recipe
from peft_combo.tuning.loop import tune

REFUSED = {
    *((method, encoder)
      for method in ("prefix", "prefix: projection")
      for encoder in ("DistilBERT", "ModernBERT", "MPNet", "ALBERT", "DeBERTa")),
    ("bitfit", "ModernBERT"),
    *((method, encoder)
      for method in ("lora: pissa", "top-layers", "full") for encoder in ("BERT, 8bit", "BERT, 4bit")),
    ("lora: dora", "BERT, 8bit"),
    ("c3a", "BERT, 8bit"),
    ("c3a", "BERT, 4bit"),
    ("loha", "BERT, 4bit"),
    ("lokr", "BERT, 4bit"),
}  # fmt: skip
PAIRS = [(method, encoder) for encoder in ENCODERS for method in METHODS]
WORKING = [pair for pair in PAIRS if pair not in REFUSED]

PAGE = (REPOSITORY / "docs" / "conformance.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module", params=WORKING, ids=lambda pair: " in ".join(pair))
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A pair that works; of the module, so that all tests of a pair run one after the other, in one process."""
    found: tuple[str, str] = request.param
    return found


@pytest.fixture
def finding(matrix: Matrix, pair: tuple[str, str]) -> Finding:
    found = matrix.finding(*pair)
    assert not found.refused
    return found


def read_cell(method: str, encoder: str) -> str:
    """Return what the page in the docs says of a pair."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {method} |"))
    return row.strip("| ").split(" | ")[1 + list(ENCODERS).index(encoder)]


@pytest.mark.parametrize(("method", "encoder"), sorted(REFUSED))
def test_a_pair_that_cannot_work_is_refused_with_reason_and_remedy(matrix: Matrix, method: str, encoder: str) -> None:
    reason = matrix.finding(method, encoder).refused
    assert reason.startswith("adapter.")
    assert "Use " in reason or "Set " in reason
    number = re.fullmatch(r"refused \[(\d+)\]", read_cell(method, encoder))
    assert number is not None
    assert f"\n{number[1]}. {reason}\n" in PAGE


def test_every_trained_tensor_gets_a_gradient(finding: Finding) -> None:
    assert finding.silent == ()


def test_training_moves_the_vectors(finding: Finding, pair: tuple[str, str]) -> None:
    assert (finding.moved > MOVED) == (pair[0] != "head")


def test_the_frozen_encoder_stays_bit_for_bit(finding: Finding) -> None:
    assert finding.base_same


def test_saved_and_loaded_it_gives_equal_vectors(finding: Finding, pair: tuple[str, str]) -> None:
    assert finding.reloaded <= RELOAD_TOLERANCE[ENCODERS[pair[1]][2]]


def test_a_resumed_run_is_the_uninterrupted_one(finding: Finding) -> None:
    assert finding.resumed == 0.0


def test_the_page_in_the_docs_says_that_it_works(pair: tuple[str, str]) -> None:
    assert read_cell(*pair) == "ok", "run: python benchmarks/conformance.py"


def test_the_page_in_the_docs_has_every_method_and_encoder() -> None:
    said = page(lambda method, encoder: Finding(), (), tuple(ENCODERS)).rstrip("\n")
    assert PAGE.startswith(said), "run: python benchmarks/conformance.py"
    assert re.findall(r"^\| (\S[^|]*) \|", PAGE, re.MULTILINE)[1:] == list(METHODS)


@pytest.mark.parametrize("encoder", ["BERT", "ModernBERT", "BERT, 8bit"])
def test_all_methods_side_by_side_are_each_what_they_are_alone(matrix: Matrix, encoder: str) -> None:
    methods = [method for method in METHODS if (method, encoder) in WORKING]
    together = {method: Tuned(matrix.backbone(encoder), METHODS[method]) for method in methods}
    for _ in range(2):  # each takes its first step before any takes its second
        for tuned in together.values():
            tuned.step()
    for method, tuned in together.items():
        np.testing.assert_array_equal(tuned.vectors(), matrix.finding(method, encoder).vectors, err_msg=method)


@pytest.mark.parametrize("method", METHODS)
def test_in_bf16_every_tensor_still_gets_a_gradient(matrix: Matrix, method: str) -> None:
    tuned = Tuned(matrix.backbone("BERT"), METHODS[method])
    exact = tuned.vectors()
    with torch.autocast("cpu", torch.bfloat16):
        assert tuned.silent() == []
        rounded = tuned.vectors()
    assert rounded.dtype == np.float32
    assert (rounded * exact).sum(1).min() > 0.999  # cosine: the same direction but for eight bits of rounding
    assert all(p.dtype == torch.float32 for p in tuned.attached.trainable().values())


# The whole run: plan and probe, the loop, the store, the reloaded adapter compared.


def recipe_of(method: str, make: Callable[..., Recipe], **changes: Any) -> Recipe:
    section = METHODS[method].model_dump(mode="json")
    if section["method"] == "tokens":
        section["words"] = ["w41", "w42", "w120"]  # words of the tiny shop
    return make("head", **{"adapter": section, "training.epochs": 1, **changes})


# Six are tuned up and down in test_tuning.py.
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"lora", "adalora", "prefix", "head", "top-layers", "full"}))
def test_a_recipe_of_every_other_method_is_tuned_and_stored(
    method: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_of(method, tiny_recipe)
    result = tune(recipe, run_folder=tmp_path / "run")
    assert result.record.manifest.method == recipe.adapter.method
    assert result.record.read("head.safetensors")
    assert result.plan.adapter_parameters > 0


def test_two_processes_learn_what_one_does(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    several = ("vera", "randlora", "lora: dora", "prompt", "bottleneck: parallel", "tokens", "layer-norm")
    alone, raw = {}, {}
    for method in several:
        recipe = recipe_of(method, tiny_recipe)
        alone[method] = tune(recipe, run_folder=tmp_path / "one").losses
        raw[method] = {**recipe.model_dump(mode="json"), "store": str(tmp_path / "two-store")}
    (tmp_path / "recipes.json").write_text(json.dumps(raw))
    (tmp_path / "pair.py").write_text(
        "import json, os\n"
        "from pathlib import Path\n"
        "from peft_combo.recipe.parse import parse_recipe\n"
        "from accelerate import Accelerator\n"
        "from peft_combo.tuning.loop import tune\n"
        "Accelerator.end_training = lambda self: None  # the pair stays a pair between the runs\n"
        "here, losses = Path(__file__).parent, {}\n"
        "for name, raw in json.loads((here / 'recipes.json').read_text()).items():\n"
        "    losses[name] = tune(parse_recipe(raw), run_folder=here / 'two').losses\n"
        "(here / f'losses-{os.environ[\"RANK\"]}.json').write_text(json.dumps(losses))\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port),
         str(tmp_path / "pair.py")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        together = json.loads((tmp_path / f"losses-{rank}.json").read_text())
        for method in several:
            np.testing.assert_allclose(together[method], alone[method], rtol=2e-4, err_msg=method)
