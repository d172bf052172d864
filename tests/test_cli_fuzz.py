"""Any words on the command line: an answer, or a message of ours with an exit code of its own, never a fault.

Each case is a command with a few of its options and arguments, filled with what fits and what does not. What fits is
a stored adapter, a recipe, a shop and a base that are tiny and real. `HYPOTHESIS_PROFILE=thorough` runs more cases.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny_recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import commands

from peft_combo.cli import app
from peft_combo.cli.guard import run
from peft_combo.recipe.files import write_recipe
from peft_combo.tuning.loop import tune

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
COMMANDS = dict(commands())
# What starts processes of its own for minutes, and what asks the network.
LEFT_OUT = {"compare", "search", "data get"}
FITTING = [
    "tiny.yaml", "shop", "shop/items.csv", "shop/bundles.csv", "base", "adapters", "tiny", "tiny@v1", "tiny@prod", "i1",
    "i1,i2", "u1", "training.epochs=1", "adapter.rank=2", "bundles", "titles", "out.jsonl", "out.csv", "out",
    "new.yaml", "1", "2", "0.5", "w1 w2", "onnx", "lora", "prod", "requests.jsonl",
]  # fmt: skip
STRANGE = [
    "", " ", ".", "..", "~", "$HOME", "*", "[red]", "[/]", "-1", "0", "1e400", "nan", "inf", "-inf",
    "99999999999999999999", "0x10", "1_000", "١", "١.٥", "é", "e\u0301", "\u202e", "\u200b", "👩\u200d💻", "a\nb",
    "a\tb", "x" * 5_000, "a=b", "=", "training=", "=1", "training.epochs", "training.epochs=nan", "a.b.c=1",
    "adapter={}", "adapter={method: lora}", "data.path=[", "category=../x", "store=~", "{}", "null", "--", "@",
    "tiny@", "@v1", "tiny@v9", "tiny@v1@v1", "tiny/v1", "../tiny", "nowhere", "nowhere.yaml", "nowhere.csv", "empty",
    "binary.bin", "binary.yaml", "adapters/tiny/v1", "adapters/tiny/v1/manifest.json",
]  # fmt: skip
WORDS = st.sampled_from(FITTING) | st.sampled_from(STRANGE) | st.text(max_size=8)


@pytest.fixture(scope="module")
def workshop(tiny_bert: Path, tiny_shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shop, a base, a recipe, and a store with one adapter and an alias."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copytree(tiny_bert, folder / "base")
    shutil.copytree(tiny_shop, folder / "shop")
    changes = {"training.epochs": 1, "backbone.model": str(folder / "base"), "data.path": str(folder / "shop")}
    recipe = make_tiny_recipe(tiny_bert, tiny_shop, folder / "adapters", **changes)
    write_recipe(recipe, folder / "tiny.yaml", ("tiny",))
    tune(recipe, run_folder=folder / "runs")
    (folder / "empty").mkdir()
    (folder / "binary.bin").write_bytes(bytes(range(256)))
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "requests.jsonl").write_text('{"items": ["i1"]}\nnot json\n', encoding="utf-8")
    return folder


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """Draw a command, some of its options with values, and some arguments."""
    name = draw(st.sampled_from(sorted(COMMANDS.keys() - LEFT_OUT)))
    words = name.split()
    for parameter in COMMANDS[name].params:
        flags = [one for one in parameter.opts if one.startswith("-")]
        needed = bool(parameter.required)
        if not flags:
            words += [draw(WORDS) for _ in range(draw(st.integers(0 if not needed else 1, 2)))]
        elif needed or draw(st.integers(0, 3)) == 0:
            fits = {"--recipe": "tiny.yaml", "--adapter": "tiny", "--data": "shop", "--store": "adapters"}
            value = fits[flags[0]] if flags[0] in fits and draw(st.booleans()) else draw(WORDS)
            words += [flags[0]] if getattr(parameter, "is_flag", False) else [flags[0], value]
    return words


@pytest.fixture
def inside(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Put a fresh copy of the workshop in the working folder."""
    number = iter(range(10**6))

    def renew() -> None:
        folder = tmp_path / str(next(number))
        shutil.copytree(workshop, folder, symlinks=True)
        monkeypatch.chdir(folder)

    return renew


@settings(
    max_examples=3_000 if THOROUGH else 60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(arguments=lines())
def test_any_words_give_an_answer_or_a_message(
    inside: Callable[[], None], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    inside()
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code = run(app, arguments)
    said: Any = capsys.readouterr().err
    assert code in (0, 1, 2, 3, 4), f"{arguments}: exit code {code}\n{said}"
    assert "Traceback" not in said
    assert code == 0 or said.strip(), f"{arguments}: ended with {code} and no message"
    assert len(said) < 20_000, f"{arguments}: {said[:2_000]}"
