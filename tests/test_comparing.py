"""Comparing: all the same but for what is compared, every figure as by hand, nothing lost by a stop or a failure."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_combo import metrics
from peft_combo.callbacks import RunCallback
from peft_combo.errors import PeftComboError, RecipeError
from peft_combo.evaluation.comparison import worker as one
from peft_combo.evaluation.comparison.result import Result, read_result
from peft_combo.evaluation.comparison.runs import compare
from peft_combo.evaluation.comparison.table import Failed, comparison_of
from peft_combo.evaluation.comparison.variants import Variant, over_of, variants_of
from peft_combo.metrics.charts import Bar, Bars, Curve, Plane, Point, draw
from peft_combo.metrics.significance import holm
from peft_combo.recipe.files import check, load_recipe, write_recipe
from peft_combo.recipe.model import Recipe
from peft_combo.store.adapter_store import AdapterStore

MakeRecipe = Callable[..., Recipe]


# What is compared.


def test_a_method_brings_its_defaults_and_rate_and_keeps_depth_modules_and_budget() -> None:
    methods = ["lora", "adalora", "ia3", "full", "top-layers"]
    found = {variant.label: variant.recipe for variant in variants_of("lora-fashion", methods=methods)}
    base = load_recipe("lora-fashion")
    assert found["lora"] == base
    assert found["adalora"].adapter.model_dump() == {
        **load_recipe("lora-fashion", ["adapter.method=adalora"]).adapter.model_dump(), "top_layers": 1,
    }  # fmt: skip
    assert found["ia3"].adapter.model_dump() == {"method": "ia3", "top_layers": 1}
    assert found["top-layers"].adapter.model_dump() == {"method": "top-layers", "layers": 1}
    assert found["full"].training.learning_rate == 5e-5  # 1e-3 suits a low-rank update and ruins a whole encoder
    for recipe in found.values():
        budget = recipe.training.model_copy(update={"learning_rate": base.training.learning_rate})
        assert (recipe.data, recipe.task, budget) == (base.data, base.task, base.training)
    same_rate = variants_of("lora-fashion", methods=["lora", "full"], overrides=["training.learning_rate=2e-4"])
    assert [variant.recipe.training.learning_rate for variant in same_rate] == [2e-4, 2e-4]


def test_values_multiply_and_other_recipes_take_the_first_ones_data_and_budget() -> None:
    found = variants_of(
        "lora-fashion", methods=["lora", "prefix"], over=[over_of("training.batch_size=16,32"), over_of("seed=1,2")]
    )
    assert len(found) == 8
    assert found[-1].label == "prefix, training.batch_size=32, seed=2"
    first, other = variants_of("lora-fashion", others=["prefix-fashion"], overrides=["training.epochs=3"])
    assert (other.label, other.recipe.adapter.method) == ("prefix-fashion", "prefix")
    assert other.recipe.data == first.recipe.data
    assert (other.recipe.training.epochs, other.recipe.training.batch_size) == (3, first.recipe.training.batch_size)
    assert over_of('data.text="{title}, {leaf}",{title}').values == ('"{title}, {leaf}"', "{title}")
    assert over_of("adapter.targets=[query, value],attention").values == ("[query, value]", "attention")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "nothing to compare"),
        ({"methods": ["lora", "lora"]}, "are the same recipe"),
        ({"methods": ["lora", "adalorra"]}, r"adalorra: No method .*Did you mean .*adalora"),
        ({"over": [over_of("adapter.rank=4,0")]}, r"adapter.rank=0: .*\n  adapter.rank: expected an integer from 1"),
    ],
)
def test_what_cannot_be_compared_is_told_before_anything_runs(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(PeftComboError, match=expected):
        variants_of("lora-fashion", **options)
    with pytest.raises(RecipeError, match="KEY=VALUE"):
        over_of("adapter.rank")


# What it says.


def test_holm_by_hand() -> None:
    # Ascending: .005 x 4 = .02, .01 x 3 = .03, .03 x 2 = .06, .04 x 1 = .04 but not below what came before.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def made(after: Any, before: Any = None, *, parameters: int = 100, metric: str = "ndcg@10") -> Result:
    values = None if after is None else tuple(float(value) for value in after)
    frozen = None if values is None else tuple(float(x) for x in (np.zeros(len(values)) if before is None else before))
    return Result(
        metric=metric, value=0.5 if values is None else float(np.mean(values)),
        clusters=None if values is None else tuple(f"u{place // 2}" for place in range(len(values))),
        before=frozen,
        after=values, asked="40 questions", adapter_parameters=parameters, head_parameters=7, stored_bytes=2**20,
        steps=3, seconds=60.0, peak_mib=100.0, encode_ms={1: 1.0, 32: 4.0}, frozen_ms={1: 1.0, 32: 3.0}, load_ms=2.0,
        machine="a machine", adapter="adapters/x/v1",
    )  # fmt: skip


def test_the_table_is_made_of_questions_averaged_over_seeds() -> None:
    dice = np.random.default_rng(0)
    base = dice.random(40)
    recipe = load_recipe("lora-fashion")
    good = [made(base + 0.3, base), made(base + 0.1, base)]
    near = [made(base + 0.21 - 0.04 * (np.arange(40) % 4 < 2), base, parameters=10) for _ in range(2)]
    poor = [made(base, base, parameters=1), made(base - 0.1, base, parameters=1)]
    names = ("poor", "good", "near")
    found = comparison_of(
        [Variant(name, recipe) for name in names], dict(zip(names, (poor, good, near), strict=True)),
        (Failed("broken", "no memory"),), (0, 1),
    )  # fmt: skip
    assert [line.label for line in found.lines] == ["good", "near", "poor"]
    best, second, last = found.lines
    assert best.value == pytest.approx(base.mean() + 0.2)
    assert best.by_seed == pytest.approx((base.mean() + 0.3, base.mean() + 0.1))
    assert best.spread == pytest.approx(0.2 / np.sqrt(2))  # standard deviation of two values 0.2 apart
    assert best.gain is not None
    assert best.gain.value == pytest.approx(0.2)
    # Against a row of one's choice, and Holm counts those that were asked for alone.
    beside = found.against("poor", ["good"])
    assert beside.keys() == {"good"}
    assert beside["good"].value == pytest.approx(0.25)
    assert beside["good"].p == pytest.approx(found.against("poor")["good"].p / 2)
    with pytest.raises(PeftComboError, match=r'single questions for "broken". Known: good, near, poor'):
        found.against("broken")
    clusters = np.array([f"u{place // 2}" for place in range(40)])
    assert best.interval == metrics.bootstrap_interval(base + 0.2, clusters)
    assert best.p is None
    assert best.slowdown(32) == pytest.approx(4 / 3)
    raw = [metrics.paired_permutation(np.mean([run.after for run in runs], 0), base + 0.2, clusters)
           for runs in (near, poor)]  # fmt: skip
    assert [second.p, last.p] == holm(raw)
    assert last.p is not None
    assert last.p < 0.001
    # `near` trails by 0.01 +- 0.02 a group: not significantly worse, and a tenth of the size. `poor` is.
    assert second.p is not None
    assert found.cheapest == ("near" if second.p > 0.05 else "good")
    assert found.failed == (Failed("broken", "no memory"),)
    json.dumps(found.to_json())


def test_ties_go_to_the_smaller_and_metrics_without_questions_say_no_p() -> None:
    recipe = load_recipe("lora-fashion")
    values = np.linspace(0, 1, 20)
    variants = [Variant("large", recipe), Variant("small", recipe)]
    tied = comparison_of(variants, {"large": [made(values)], "small": [made(values, parameters=5)]}, (), (0,))
    assert (tied.best.label, tied.cheapest, tied.lines[1].p, tied.best.spread) == ("large", "small", 1.0, None)
    f1 = comparison_of(variants, {"large": [made(None, metric="f1")], "small": [made(None, metric="f1")]}, (), (0,))
    assert (f1.cheapest, f1.lines[1].p, f1.best.interval, f1.best.gain) == (None, None, None, None)
    with pytest.raises(PeftComboError, match=r'"small" \(f1\) is not measured as "large" is \(ndcg@10\)'):
        comparison_of(variants, {"large": [made(values)], "small": [made(None, metric="f1")]}, (), (0,))


def test_a_result_that_does_not_read_counts_as_none(tmp_path: Path) -> None:
    whole = made([0.5, 1.0])
    (tmp_path / "result.json").write_text(whole.model_dump_json())
    assert read_result(tmp_path) == whole
    (tmp_path / "result.json").write_text(whole.model_dump_json()[:-9])
    assert read_result(tmp_path) is None
    assert read_result(tmp_path / "nowhere") is None


# Running it.


class Notes(RunCallback):
    """Keeps what it is told; ends the program, as a kill would, after so many notes."""

    def __init__(self, stop: int = 99) -> None:
        self.told: list[str] = []
        self._stop = stop

    def on_note(self, text: str) -> None:
        self.told.append(text)
        if len(self.told) == self._stop:
            raise SystemExit


def test_a_comparison_from_start_to_winner(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.yaml"
    write_recipe(tiny_recipe("lora", **{"training.epochs": 2}), file)
    variants = variants_of(str(file), methods=["lora", "head"])
    folder = tmp_path / "runs"
    with pytest.raises(SystemExit):
        compare(variants, (0, 1), folder, Notes(stop=2))
    callback = Notes()
    found = compare(variants, (0, 1), folder, callback)
    assert [note.endswith("kept from before") for note in callback.told] == [True, True, False, False]
    # Each figure is that of the run it belongs to.
    assert {line.label for line in found.lines} == {"lora", "head"}
    for line in found.lines:
        runs = [read_result(home) for home in sorted(folder.glob(f"{line.label}-seed*"))]
        for run, value in zip(runs, line.by_seed, strict=True):
            assert run is not None
            record = AdapterStore(Path(run.adapter).parents[1]).open("tiny")
            assert record.manifest.metrics["after"]["ndcg@10"]["value"] == pytest.approx(value)  # type: ignore[index, call-overload]
            assert np.mean(run.after or ()) == pytest.approx(value)
            assert run.peak_mib > 50
            assert min(*run.encode_ms.values(), *run.frozen_ms.values(), run.load_ms) > 0
    parameters = {line.label: line.adapter_parameters for line in found.lines}
    assert parameters["head"] == 0 < parameters["lora"]

    # All of it again from the command line: nothing is run, the winner is a recipe of its own.
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.chdir(tmp_path)
    from peft_combo.__main__ import main

    arguments = ["compare", "--recipe", str(file), "--method", "lora", "--method", "head", "--seeds", "0,1", "--folder",
                 str(folder), "--plot", "chart.html", "--to", "Winner 1.yaml"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["peft-combo", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"Best: {found.best.label}." in shown
    assert "the test data has no part in it" in shown
    winner = tmp_path / "Winner 1.yaml"
    assert check(winner) == []
    expected = found.recipes[found.best.label]
    assert load_recipe(winner) == expected.model_copy(update={"name": "winner-1"})
    drawn = (tmp_path / "chart.html").read_text()
    assert all(re.search(rf">{re.escape(label)} 0\.\d{{4}}</text>", drawn) for label in found.recipes)
    with pytest.raises(SystemExit):
        main()
    assert "exists already" in capsys.readouterr().err


class Dying:
    """Stands for the process of a run that comes to grief: tells why where it can, and ends with a code."""

    def __init__(self, command: Sequence[str], **_: Any) -> None:
        home = Path(command[-1])
        self.stdin = io.BytesIO()
        self._code = {"told": 1, "killed": -9, "crashed": 2}[home.name.partition("-")[0]]
        if self._code == 1:
            (home / "failed.txt").write_text("No module nowhere.")
        (home / "log.txt").write_text("Traceback\nSomeError: too bad\n")

    def wait(self) -> int:
        return self._code


def test_whoever_fails_is_a_row_with_its_reason(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", Dying)
    variants = [Variant(name, tiny_recipe()) for name in ("told", "killed", "crashed")]
    with pytest.raises(PeftComboError) as none:
        compare(variants, (5, 6), tmp_path)
    expected = [
        "None of the variants could be tuned:",
        r"  told: seed 5: No module nowhere\.",
        "  killed: seed 5: ended by SIGKILL; if it was not you, the memory may have run out",
        r"  crashed: seed 5: SomeError: too bad \(all of it in .*log.txt\)",
    ]
    assert re.fullmatch("\n".join(expected), str(none.value))


def test_a_run_does_not_outlive_its_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(one.os, "_exit", ended.append)
    monkeypatch.setattr(one.os, "read", lambda descriptor, size: b"")  # what a pipe gives whose other end is closed
    one._end_with_parent()
    assert ended == [3]


def test_different_questions_are_not_compared(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    variants = [Variant("a", tiny_recipe()), Variant("b", tiny_recipe(**{"data.split_seed": 1}))]
    with pytest.raises(PeftComboError, match='"a" and "b" are measured on different questions'):
        compare(variants, (0,), tmp_path)


# Recipes and charts as files.


def test_a_written_recipe_reads_as_it_was(tmp_path: Path) -> None:
    changes = (
        "data.source=folder", 'data.path="1e3"', 'data.columns.items.title="yes: # no"', 'data.text="{title}, {leaf}"',
        "training.learning_rate=1e-05", "training.early_stopping=null", 'adapter.targets=["no", "0x1F"]',
    )  # fmt: skip
    odd = load_recipe("lora-fashion", changes)
    file = tmp_path / "odd.yaml"
    assert write_recipe(odd, file, ("What it is.", "", "Run: it")) == odd.model_copy(update={"name": "odd"})
    assert file.read_text().startswith("# What it is.\n#\n# Run: it\n")
    with pytest.raises(RecipeError, match="exists already"):
        write_recipe(odd, file)
    with pytest.raises(RecipeError, match=r"ends in \.yaml"):
        write_recipe(odd, tmp_path / "odd.txt")


def test_a_plane_is_to_scale(tmp_path: Path) -> None:
    points = [
        Point("<a>", 10, 0.2, 0.1, 0.3, marked=True),
        Point("b", 1000, 0.4, 0.4, 0.4),
        Point("c", 100, 0.4, 0.4, 0.4),
    ]
    draw(
        Plane("t & t", "x", "y", points, (Curve((10, 1000), (0.1, float("inf"))),), (("here", 100.0),)),
        tmp_path / "p.html",
    )
    text = (tmp_path / "p.html").read_text()
    assert "&lt;a&gt; 0.2000" in text
    assert "t &amp; t" in text
    circles = re.findall(r'<path id="(\w+)" d="M 0 [^"]*C', text)  # markers with a bend: those of the points
    marks = re.findall(rf'<use xlink:href="#(?:{"|".join(circles)})" x="([\d.]+)" y="([\d.]+)"', text)
    (bx, by), (cx, cy), (ax, ay) = ((float(x), float(y)) for x, y in marks)  # from top to bottom
    assert by == cy < ay
    assert cx - ax == pytest.approx(bx - cx, abs=0.2)  # decades are equally far apart
    names = [float(y) for y in re.findall(r'y="([\d.]+)" transform="[^"]*">(?:&lt;a&gt;|b|c) 0\.', text)]
    assert len(names) == 3
    assert min(np.diff(sorted(names))) >= 12  # names of equal heights do not cover each other
    draw(Plane("t", "x", "y", points), tmp_path / "p.png")
    draw(Bars("t", [Bar("a", 1, 0.5, 2)]), tmp_path / "b.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"


def test_a_name_is_no_formula_and_no_markup(tmp_path: Path) -> None:
    draw(Bars("5$ and $6 <b>", [Bar("$\\frac{1}{2}$ & \u793e\x07", 1, 0.5, 2)], ("<i>",)), tmp_path / "b.html")
    text = (tmp_path / "b.html").read_text()
    for shown in ("5$ and $6 &lt;b&gt;", "$\\frac{1}{2}$ &amp; \u793e\\x07<", "<p>&lt;i&gt;</p>"):
        assert shown in text
