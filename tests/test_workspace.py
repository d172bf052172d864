"""A workspace: what a recipe names is opened once, on first use, and adapters are looked up before all else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from safetensors.numpy import load_file, save_file
from test_adapter_store import write

from peft_combo.data.splits import split_as
from peft_combo.errors import StoreError
from peft_combo.recipe.files import write_recipe
from peft_combo.recommender import Workspace
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.loop import tune


def test_each_thing_is_opened_once_and_on_first_use(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe()
    space = Workspace.of(recipe, cache=tmp_path / "vectors")
    assert not {"dataset", "split", "backbone", "bank", "cache"} & set(vars(space))
    assert space.store.path == Path(recipe.store)
    assert space.split.digest == split_as(space.dataset, recipe.data).digest
    assert "backbone" not in vars(space)
    assert space.bank.backbone is space.backbone
    vectors = space.encode_catalog()
    np.testing.assert_allclose(vectors, space.backbone.encode(space.dataset.catalog.texts()), atol=1e-6)
    assert len(vectors) == len(space.dataset.texts)
    for name in ("dataset", "split", "backbone", "bank", "cache"):
        assert getattr(space, name) is getattr(space, name)


@pytest.mark.parametrize("command", ["embed", "evaluate", "recommend", "tune --dry-run", "rate"])
def test_what_is_noticed_of_base_and_data_is_told_by_every_command(
    command: str, tiny_recipe: Callable[..., Any], tiny_bert: Path, tiny_shop: Path, tmp_path: Path,
    shell: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base = shutil.copytree(tiny_bert, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({f"module.{name}": value for name, value in weights.items()}, base / "model.safetensors")
    shop = shutil.copytree(tiny_shop, tmp_path / "shop")
    with open(shop / "items.csv", "a", encoding="utf-8") as file:
        file.write("caf\u00e9,w1 w2,Style 1\ncafe\u0301,w1 w3,Style 1\n")  # ids that look alike
    rates = {"task": {"kind": "rating"}, "data.split": "user"} if command == "rate" else {}
    if rates:
        members = (shop / "bundles.csv").read_text().splitlines()[1:]
        rows = [f"u{int(line.split(',')[0][1:]) % 30},{line.split(',')[1]},{n}" for n, line in enumerate(members)]
        (shop / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    changes = {"backbone.model": str(base), "data.path": str(shop), "training.epochs": 1}
    recipe = tiny_recipe(**changes, **rates)
    write_recipe(recipe, tmp_path / "tiny.yaml", ("tiny",))
    monkeypatch.chdir(tmp_path)
    words: list[str] = [*command.split(), "--recipe", "./tiny.yaml"]
    if command == "recommend":
        words += ["--items", "i0", "--frozen"]
    elif command == "rate":
        tune(recipe, run_folder=tmp_path / "runs")
        words = ["rate", "--adapter", "tiny", "--liked", "i0", "--store", recipe.store]
    code, out, err = shell(*words)
    assert code == 0, err
    assert (out + err).count('start with "module."') == 1
    assert (out + err).count("look alike") == 1


@pytest.mark.parametrize(("words", "told"), [(("--items", "i0,i61"), '"i61"'), (("--user", "u3"), '"u3"')])
def test_an_unknown_id_is_refused_before_the_encoder_is_loaded(
    words: tuple[str, str], told: str, tiny_recipe: Callable[..., Any], tmp_path: Path,
    shell: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write_recipe(tiny_recipe(**{"backbone.model": str(tmp_path / "no-encoder")}), tmp_path / "tiny.yaml", ("tiny",))
    monkeypatch.chdir(tmp_path)
    code, _, err = shell("recommend", "--recipe", "./tiny.yaml", "--frozen", *words)
    assert code == 1
    assert told in err
    assert "no-encoder" not in err


def test_an_unknown_adapter_is_refused_before_anything_is_opened(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = tiny_recipe(**{"backbone.model": str(tmp_path / "no-encoder"), "data.path": str(tmp_path / "no-data")})
    write(AdapterStore(recipe.store), category="tiny")
    with pytest.raises(StoreError, match='Did you mean "tiny"'):
        Workspace.of(recipe, adapters=["tinny"])
    assert [record.reference for record in Workspace.of(recipe, adapters=["tiny"]).records] == ["tiny@v1"]


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "--recipe", "./tiny.yaml"),
        ("recommend", "--recipe", "./tiny.yaml", "--items", "i0"),
        ("embed", "--recipe", "./tiny.yaml"),
        ("data", "suggest", "--recipe", "./tiny.yaml"),
        ("rate",),
        ("classify", "a text"),
    ],
    ids=lambda command: command[0],
)
def test_no_command_loads_torch_data_or_encoder_to_refuse_an_unknown_adapter(
    command: tuple[str, ...], tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = tiny_recipe(**{"backbone.model": str(tmp_path / "no-encoder"), "data.path": str(tmp_path / "no-data")})
    write(AdapterStore(recipe.store), category="tiny")
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    arguments = ["peft-combo", *command, "--adapter", "tinny", "--store", recipe.store]
    program = (
        f"import os, sys; sys.argv = {arguments!r}; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from peft_combo.__main__ import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert 'Did you mean "tiny"?' in done.stderr
    assert done.stdout.strip() == "False"
