"""Watch over opinion: shares corrected for a classifier's errors, and a chart that alarms as rarely as it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from peft_combo.errors import DataError
from peft_combo.evaluation.opinion import measure_rates, watch_share
from peft_combo.metrics.control_chart import Cusum
from peft_combo.metrics.quantification import ErrorRates, adjust_share
from peft_combo.recipe.model import Recipe
from peft_combo.tuning.loop import tune
from peft_combo.tuning.tasks.classification import read_test_texts

RATES = ErrorRates(180, 200, 30, 300)  # gives the class to 90 % of its texts and to 10 % of others


def test_the_adjusted_count_takes_errors_back() -> None:
    # Of 1000 texts 300 are of the class: 270 of these get it, and 70 of the others.
    assert adjust_share(340, 1000, RATES)[0] == pytest.approx(0.3)
    assert adjust_share(340, 1000, None)[0] == pytest.approx(0.34)
    assert adjust_share(0, 50, RATES)[:2] == (0.0, 0.0)
    assert adjust_share(50, 50, RATES)[0] == 1.0


def test_its_interval_holds_the_share_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        rates = ErrorRates(int(rng.binomial(200, 0.85)), 200, int(rng.binomial(300, 0.2)), 300)
        positives = int(rng.binomial(150, 0.3))
        given = int(rng.binomial(positives, 0.85) + rng.binomial(150 - positives, 0.2))
        _, low, high = adjust_share(given, 150, rates)
        held += low <= 0.3 <= high
    assert 0.92 <= held / 400 <= 0.99


@pytest.mark.parametrize(("hits", "of", "false", "others"), [(1, 2, 1, 2), (0, 5, 3, 5), (2, 0, 0, 1), (1, 1, 0, 0)])
def test_rates_that_say_nothing_are_refused(hits: int, of: int, false: int, others: int) -> None:
    with pytest.raises(ValueError, match=r"says nothing|expected hits|found only one kind"):
        ErrorRates(hits, of, false, others)


def test_false_alarms_come_as_seldom_as_was_asked_for_and_a_rise_is_found() -> None:
    sizes = [40] * 10
    chart, rng = Cusum.design(0.2, 0.3, sizes, arl=50, seed=1), np.random.default_rng(2)

    def time(share: float) -> float:
        runs = [chart.run(rng.binomial(40, share, 600), np.full(600, 40)) >= chart.limit for _ in range(300)]
        return float(np.mean([run.argmax() + 1 if run.any() else 600 for run in runs]))

    assert time(0.2) == pytest.approx(50, rel=0.25)
    assert time(0.3) < 6
    assert chart.run([0, 40], [40, 40])[0] == 0


def stream(shares: list[float], per_week: int = 100, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Texts of weeks from Monday, 1 January 2024, and whether they are of the class."""
    rng, monday = np.random.default_rng(seed), datetime(2024, 1, 1, tzinfo=UTC)
    times = [
        (monday + timedelta(weeks=week, seconds=float(rng.uniform(0, 604_800)))).timestamp()
        for week in range(len(shares))
        for _ in range(per_week)
    ]
    return np.array(times), rng.random(len(times)) < np.repeat(shares, per_week)


def test_an_alarm_comes_after_the_rise_and_its_shares_are_those_of_the_texts() -> None:
    times, right = stream([0.2] * 12 + [0.45] * 6)
    rng = np.random.default_rng(1)
    given = np.where(right, rng.random(len(right)) < 0.9, rng.random(len(right)) < 0.1)
    order = rng.permutation(len(times))
    found = watch_share(times[order], given[order], rates=RATES)
    assert [one.start for one in found.windows[:2]] == ["2024-01-01", "2024-01-08"]
    assert found.alarm in [one.start for one in found.windows[12:15]]
    assert found.usual == pytest.approx(0.2, abs=0.05)
    assert found.windows[-1].low < 0.45 < found.windows[-1].high
    assert [one.cusum is None for one in found.windows[:9]] == [True] * 8 + [False]
    assert watch_share(*stream([0.2] * 18)).alarm is None


def test_what_cannot_be_watched_is_refused() -> None:
    with pytest.raises(DataError, match="Expected more than 8 weeks"):
        watch_share(*stream([0.2] * 4))
    with pytest.raises(DataError, match="cannot rise by 30"):
        watch_share(*stream([0.9] * 12), rise=0.3)
    with pytest.raises(DataError, match="cannot be corrected"):
        measure_rates([True, True], [True, False])


def test_the_command_reads_labels_and_its_exit_code_says_alarm(
    tmp_path: Path, shell: Callable[..., tuple[int, str, str]]
) -> None:
    for name, shares, expected in (("calm", [0.2] * 16, 0), ("risen", [0.2] * 10 + [0.6] * 6, 4)):
        times, right = stream(shares, per_week=40)
        lines = [
            f"{datetime.fromtimestamp(time, UTC).isoformat()},{'negative' if own else 'positive'}"
            for time, own in zip(times, right, strict=True)
        ]
        file = tmp_path / f"{name}.csv"
        file.write_text("timestamp,label\n" + "\n".join(lines) + "\n")
        code, out, _ = shell("watch", file, "--json")
        assert code == expected
        found = json.loads(out)
        assert (found["alarm"] is not None) == bool(expected)
        assert sum(one["texts"] for one in found["windows"]) == len(lines)
    code, out, _ = shell("watch", tmp_path / "risen.csv")
    assert code == 4
    assert "Alarm in the week of" in out
    code, _, err = shell("watch", tmp_path / "nothing.csv")
    assert code == 1
    assert "there is no" in err


def test_the_command_reads_texts_by_an_adapter_and_takes_its_errors_back(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, shell: Callable[..., tuple[int, str, str]]
) -> None:
    """A word tells the class of nine texts in ten; what is given is counted, what is right is estimated."""
    rng = np.random.default_rng(0)

    def write(negative: bool) -> str:
        told = negative != (rng.random() < 0.1)
        return f"w{40 + rng.integers(30)} w{10 if told else 11} w{80 + rng.integers(30)}"

    rows = [f"{write(negative)},{'negative' if negative else 'positive'}" for negative in (True, False) * 200]
    (tmp_path / "labels.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    task = {"kind": "classification", "labels": "table", "min_texts": 5}
    learn = {"training.epochs": 2, "training.learning_rate": 2e-2}
    recipe = tiny_recipe(task=task, **{"data.path": str(tmp_path), **learn})
    tune(recipe, run_folder=tmp_path / "run")
    times, right = stream([0.1] * 10 + [0.5] * 6, per_week=60)
    texts = [write(negative) for negative in right.tolist()]
    lines = [f"{datetime.fromtimestamp(at, UTC).isoformat()},{text}" for at, text in zip(times, texts, strict=True)]
    (tmp_path / "reviews.csv").write_text("timestamp,text\n" + "\n".join(lines) + "\n")
    call = ("watch", tmp_path / "reviews.csv", "--adapter", "tiny", "--store", recipe.store)
    code, out, _ = shell(*call, "--json")
    found = json.loads(out)
    assert code == 4
    assert found["alarm"] in ("2024-03-11", "2024-03-18")
    assert [one["texts"] for one in found["windows"]] == [60] * 16
    assert all(one["low"] < 0.5 < one["high"] for one in found["windows"][-6:])
    code, out, err = shell(*call)
    assert (code, err) == (4, "")
    assert f"Alarm in the week of {found['alarm']}." in out
    told = re.search(r"errors: ([\d.]+)% of (\d+) texts of the class get it, and ([\d.]+)% of (\d+) others", out)
    assert told is not None
    true, positives, false, negatives = map(float, told.groups())
    labels = [label for (label,) in read_test_texts(recipe)[1]]
    assert (positives, negatives) == (labels.count("negative"), labels.count("positive"))
    for one in found["windows"]:
        expected = (one["given"] / 60 - false / 100) / (true / 100 - false / 100)
        assert one["share"] == pytest.approx(min(max(expected, 0), 1), abs=0.01)
    code, _, err = shell(*call, "--class", "negativ")
    assert code == 1
    assert 'no class "negativ". Classes: negative, positive. Name one with --class. Did you mean "negative"?' in err
