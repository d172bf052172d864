"""What the tests share: where real data lies, tiny real encoders, and recipes over small made-up data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from made_up import build_encoder, build_shop

from peft_combo import __main__
from peft_combo.callbacks import RunCallback

REPOSITORY = Path(__file__).resolve().parent.parent

# Workers of pytest-xdist share the cores between them, and so do the processes that tests start: one thread each. One
# thread also gives the same sums in the same order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files whose tests take minutes or many seconds each: with several workers the suite ends when the last of them does,
# so they have to start first.
LONGEST = ("test_readme.py", "test_benchmarks.py", "test_comparing.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within and after them stays. Skip what needs a GPU where there is none."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def shared_data(name: str) -> Path:
    """Return a folder of real data, or skip the calling test with the reason."""
    root = Path(os.environ.get("PEFT_COMBO_DATA", REPOSITORY.parent / "shared" / "data"))
    folder = root / name
    if not folder.exists():
        pytest.skip(f"real data {name!r} is not on this machine (PEFT_COMBO_DATA names its folder)")
    return folder


class StopAt(RunCallback):
    """Raises after a step, like a kill between two checkpoints."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, step: int, loss: float) -> None:
        if step == self.step:
            raise SystemExit


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command as from a shell; give exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peft-combo", *map(str, arguments)])
        code = 0
        capsys.readouterr()
        try:
            __main__.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT in a folder."""
    return build_encoder(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def tiny_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `build_shop`."""
    return build_shop(tmp_path_factory.mktemp("tiny-shop"))


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The shop of `build_served`, with its fitted recommender once somebody served it."""
    from served_shop import build_served

    return build_served(tmp_path_factory.mktemp("served"))


def make_tiny_recipe(encoder: Path, shop: Path, store: Path, /, method: str = "lora", **changes: Any) -> Any:
    """Make a recipe of a tiny encoder and shop: ``make_tiny_recipe(..., "lora", **{"training.epochs": 2})``."""
    from peft_combo.recipe.parse import parse_recipe

    adapters: dict[str, dict[str, Any]] = {
        "lora": {"rank": 4, "top_layers": 2, "dropout": 0.1},
        "adalora": {"initial_rank": 4, "target_rank": 2, "top_layers": 2, "allocate_every": 2, "dropout": 0.1},
        "prefix": {"length": 4},
        "head": {},
        "top-layers": {"layers": 1},
        "full": {},
    }
    raw: dict[str, Any] = {
        "name": f"tiny-{method}",
        "category": "tiny",
        "store": str(store),
        "backbone": {"model": str(encoder), "max_length": 16},
        "data": {"source": "folder", "path": str(shop)},
        "adapter": {"method": method, **adapters[method]},
        "training": {"epochs": 4, "batch_size": 16, "learning_rate": 5e-3, "checkpoint_every": 3},
    }
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        place = raw
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return parse_recipe(raw)


@pytest.fixture
def tiny_recipe(tiny_bert: Path, tiny_shop: Path, tmp_path: Path) -> Callable[..., Any]:
    """Make recipes of the tiny encoder and shop with a store of the test's own; see `make_tiny_recipe`."""
    return partial(make_tiny_recipe, tiny_bert, tiny_shop, tmp_path / "adapters")
