"""Searching: the better value is found, a study goes on as if unbroken, and a loss that runs away is seen."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from peft_combo.callbacks import RunCallback
from peft_combo.errors import PeftComboError, RecipeError
from peft_combo.evaluation.comparison.variants import Over
from peft_combo.evaluation.lr_range import lr_range, read_range
from peft_combo.evaluation.search import Span, axis_of, search
from peft_combo.recipe.files import load_recipe, write_recipe
from peft_combo.recipe.model import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def file(tiny_recipe: MakeRecipe, tmp_path: Path) -> str:
    """A recipe in a file: two epochs, and a head without a rate of its own."""
    path = tmp_path / "tiny.yaml"
    write_recipe(tiny_recipe("lora", **{"training.epochs": 2, "store": str(tmp_path / "adapters")}), path)
    return str(path)


def test_axes_are_read() -> None:
    assert axis_of("training.learning_rate=1e-4..1e-2:log") == Span("training.learning_rate", 1e-4, 1e-2, True, False)
    assert axis_of("adapter.top_layers=1..3") == Span("adapter.top_layers", 1, 3, False, True)
    assert axis_of("training.weight_decay=0..0.1") == Span("training.weight_decay", 0, 0.1, False, False)
    assert axis_of("adapter.rank=4,8") == Over("adapter.rank", ("4", "8"))
    for wrong in ("adapter.rank=8..4", "training.learning_rate=0..1:log", "adapter.rank=4..", "adapter.rank"):
        with pytest.raises(RecipeError, match=r"--over "):
            axis_of(wrong)


def test_the_better_of_two_obvious_values_is_found_and_a_study_goes_on(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    axes = [axis_of("training.learning_rate=1e-9,5e-3"), axis_of("adapter.rank=2..4")]
    with pytest.raises(RecipeError, match=r"adapter\.rank: expected an integer from 1"):
        search(file, [axis_of("adapter.rank=0..4")], trials=5, folder=tmp_path / "study")
    first = search(file, axes, trials=2, folder=tmp_path / "study")
    assert len(first.trials) == 2
    study = first.study.read_bytes()
    assert all(json.loads(line) for line in study.splitlines())  # nothing but JSON lines
    # A writer that was killed left half a line.
    first.study.write_bytes(study + b'{"op_code":4,"worker')
    found = search(file, axes, trials=5, folder=tmp_path / "study")
    assert found.trials[:2] == first.trials
    assert found.best is not None
    assert found.recipe is not None
    assert found.recipe.training.learning_rate == 5e-3
    rates = {setting for trial in found.trials for setting in trial.settings if "rate" in setting}
    assert rates == {"training.learning_rate=1e-9", "training.learning_rate=5e-3"}
    unbroken = search(file, axes, trials=5, folder=tmp_path / "unbroken")
    assert [trial.settings for trial in unbroken.trials] == [trial.settings for trial in found.trials]
    assert [trial.value for trial in unbroken.trials] == [trial.value for trial in found.trials]
    # Trials leave neither adapters nor run folders; who falls behind is cut off.
    assert not (tmp_path / "adapters").exists()
    assert not list(tmp_path.rglob("log.jsonl"))
    assert {trial.state for trial in found.trials} == {"complete", "pruned"}
    for trial in found.trials:
        assert trial.evaluations == 2 or trial.state == "pruned"
    # The same from the command line; all trials are there already.
    from peft_combo.__main__ import main

    options = ["--over", "training.learning_rate=1e-9,5e-3", "--over", "adapter.rank=2..4", "--trials", "5"]
    kept = ["--folder", str(tmp_path / "study"), "--to", str(tmp_path / "b.yaml")]
    monkeypatch.setattr(sys, "argv", ["peft-combo", "search", "--recipe", file, *options, *kept])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert f"Best: {' '.join(found.best.settings)}." in capsys.readouterr().out
    assert load_recipe(tmp_path / "b.yaml") == found.recipe.model_copy(update={"name": "b"})


def test_a_trial_that_cannot_be_tuned_does_not_end_the_search(file: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    axes = [axis_of('adapter.targets=["nowhere"],attention')]
    found = search(file, axes, trials=3, overrides=["training.epochs=1"], folder=tmp_path / "study", seed=1)
    states = {trial.settings[0].partition("=")[2]: trial for trial in found.trials}
    assert states['["nowhere"]'].state == "failed"
    assert "nowhere" in states['["nowhere"]'].reason
    assert found.best is not None
    assert found.best.settings == ("adapter.targets=attention",)


def test_what_is_missing_or_damaged_is_told(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = [axis_of("adapter.rank=2,4")]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "optuna", None)
        with pytest.raises(PeftComboError, match=r"peft-combo\[search\]"):
            search(file, axes, trials=1, folder=tmp_path)
    pytest.importorskip("optuna")
    study = tmp_path / "study" / "tiny.jsonl"
    study.parent.mkdir()
    study.write_text("no JSON\nat all\n")
    with pytest.raises(PeftComboError, match="cannot be used"):
        search(file, axes, trials=1, folder=study.parent)


# The learning-rate range.


def descent(rates: np.ndarray, curvature: float, noise: float = 0.0) -> list[float]:
    """Losses of gradient descent on curvature / 2 * w ** 2 from w = 1: it shrinks below a rate of 2 / curvature."""
    dice = np.random.default_rng(0)
    w, losses = 1.0, []
    for rate in rates:
        losses.append(1 + curvature / 2 * w**2 + noise * dice.normal())
        w = max(-1e150, min(1e150, w * (1 - rate * curvature)))
    return losses


@pytest.mark.parametrize("curvature", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_edge_of_a_parabola_is_found(curvature: float, noise: float) -> None:
    rates = np.geomspace(1e-5 / curvature, 1e3 / curvature, 200)
    found = read_range(rates.tolist(), descent(rates, curvature, noise))
    edge = 2 / curvature
    assert found.diverged is not None
    assert found.below_divergence is not None
    assert found.steepest is not None
    assert edge < rates[found.diverged] < 10 * edge  # w has first to grow back to where it was
    assert found.below_divergence < edge
    assert 0.01 * edge < found.steepest < edge
    json.dumps(found.chart("t").title)


def test_scatter_alone_is_no_divergence_and_no_number_is() -> None:
    rates = np.geomspace(1e-6, 1, 100).tolist()
    for seed in range(20):
        scatter = 4 + 0.3 * np.random.default_rng(seed).normal(size=100)
        assert read_range(rates, scatter.tolist()).diverged is None
    falling = np.linspace(4, 3, 60).tolist()
    assert read_range(rates[:60], falling).diverged is None
    assert read_range(rates[:61], [*falling, math.inf]).diverged == 60
    # A loss over bounded similarities rises to a ceiling, never to a multiple of its lowest.
    capped = [*falling, *([5.0] * 40)]
    seen = read_range(rates, capped).diverged
    assert seen is not None
    assert 60 < seen < 75
    rising = read_range(rates, np.linspace(3, 4, 100).tolist())
    assert rising.steepest is None
    assert rising.diverged is not None


def test_a_range_test_of_a_recipe_ends_where_it_runs_away_and_stores_nothing(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Steps(RunCallback):
        count = 0

        def on_step_end(self, step: int, loss: float) -> None:
            self.count = step

        def on_evaluate(self, step: int, values: Mapping[str, float], best: bool) -> None:
            raise AssertionError("a range test measures nothing")

    callback = Steps()
    found = lr_range(load_recipe(file), low=1e-5, high=100.0, steps=60, callback=callback)
    assert found.diverged is not None
    assert 1e-3 < found.rates[found.diverged] < 100
    assert callback.count == len(found.losses) < 60
    assert found.rates[1] / found.rates[0] == pytest.approx((1e7) ** (1 / 59))
    assert not (tmp_path / "adapters").exists()
    from peft_combo.__main__ import main

    monkeypatch.chdir(tmp_path)
    chart = tmp_path / "chart.html"
    arguments = ["lr-range", "--recipe", file, "--from", "1e-5", "--to", "100", "--steps", "60", "--plot", str(chart)]
    monkeypatch.setattr(sys, "argv", ["peft-combo", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert f"It is lost at {found.rates[found.diverged]:.2g}" in capsys.readouterr().out
    assert "a tenth of divergence" in chart.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chart.html", "tiny.yaml"]


def test_trials_may_run_by_workers_over_one_study_file(file: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from share_functions import Here

    axes = [axis_of("training.learning_rate=1e-9..1e-2:log"), axis_of("adapter.rank=2,4"), axis_of("seed=1..3")]
    notes: list[str] = []

    class Listen(RunCallback):
        def on_note(self, text: str) -> None:
            notes.append(text)

    options = {"folder": tmp_path / "study", "callback": Listen(), "overrides": ("training.epochs=1",)}
    found = search(file, axes, trials=3, executor=Here(), **options)
    assert [trial.number for trial in found.trials] == [0, 1, 2]
    assert [note.split(",")[0] for note in notes] == ["trial 0", "trial 1", "trial 2"]
    again = Here()
    assert search(file, axes, trials=3, executor=again, **options).trials == found.trials
    assert again.done == 0
