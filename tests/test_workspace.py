"""A workspace: what a recipe names is opened once, on first use, and adapters are looked up before all else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from test_adapter_store import write

from peft_combo.data.splits import split_as
from peft_combo.errors import StoreError
from peft_combo.recommender import Workspace
from peft_combo.store.adapter_store import AdapterStore


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
