"""Configurations of accelerate: data parallel runs, also without a GPU; what would divide the weights is refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from peft_combo.errors import TuningError
from peft_combo.tuning.processes import refuse_sharding

CONFIGS = sorted((REPOSITORY / "recipes" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_configuration_is_one_of_accelerate_and_says_what_it_is_for(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert "# Run:  " in file.read_text()
    config = load_config_from_file(str(file))
    assert str(config.distributed_type.value) == yaml.safe_load(file.read_text())["distributed_type"]
    assert config.num_processes >= 2


@pytest.mark.parametrize("switch", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"])
def test_what_divides_weights_is_refused_with_the_reason(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_sharding()
    monkeypatch.setenv(switch, "true")
    with pytest.raises(TuningError, match=r"divides weights or optimizer .* recipes/accelerate/ddp\.yaml"):
        refuse_sharding()


def test_tune_prints_the_reason_and_stores_nothing(
    shell: Any, tiny_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    recipe = tiny_recipe(**{"training.epochs": 1})
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    code, out, err = shell("tune", "-r", "./tiny.yaml")
    assert (code, out) == (1, "")
    assert "This run was launched with FSDP" in err
    assert not list(Path(recipe.store).glob("*/v*"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("fsdp", 0), ("ddp-cpu", 2)])
def test_tune_under_a_configuration(name: str, processes: int, tiny_recipe: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe(**{"training.epochs": 1})
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
         str(REPOSITORY / "recipes" / "accelerate" / f"{name}.yaml"), "--num_processes", str(max(processes, 1)),
         "--main_process_port", str(port), "-m", "peft_combo", "tune", "-r", "./tiny.yaml", "--json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    if processes:
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["plan"]["processes"] == processes
    else:
        assert done.returncode == 1
        assert "This run was launched with FSDP" in done.stderr
        assert not Path(recipe.store).exists() or not list(Path(recipe.store).glob("*/v*"))
