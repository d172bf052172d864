"""Exploration shows what it says, as often as it says: propensities against counts and against enumeration."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtr

from peft_combo.errors import PeftComboError
from peft_combo.metrics.off_policy import estimate_value
from peft_combo.serving.drawing import ListDrawer
from peft_combo.serving.exploration import (
    EpsilonGreedy,
    ExplorationPolicy,
    PlackettLuce,
    Thompson,
    compute_propensities,
    explore,
    measure_places,
    parse_policy,
)
from peft_combo.serving.learning import gather_lists
from peft_combo.serving.state import ExposureRow, FeedbackRow, ShownItem, State

SCORES = np.array([0.2, 1.5, -0.3, 0.9])
THOMPSON = Thompson(np.array([1.0, 30.0, 0.0, 4.0]), np.array([10.0, 300.0, 2.0, 30.0]), rate=0.1, strength=5.0)
POLICIES: list[ExplorationPolicy] = [EpsilonGreedy(0.3), PlackettLuce(0.5), THOMPSON]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_propensities_are_those_of_what_is_drawn(policy: ExplorationPolicy) -> None:
    lists = list(permutations(range(4), 2))
    expected = {one: float(np.prod(compute_propensities(SCORES, one, policy))) for one in lists}
    assert sum(expected.values()) == pytest.approx(1, abs=1e-4)
    draws = 2500
    seen = Counter(tuple(explore(SCORES, 2, policy, f"r{n}").order.tolist()) for n in range(draws))
    for one, share in expected.items():
        assert abs(seen[one] / draws - share) < 4.5 * np.sqrt(share * (1 - share) / draws) + 1e-3, one
    told = explore(SCORES, 2, policy, "r0")
    assert told.list_probability == pytest.approx(expected[tuple(told.order.tolist())])  # type: ignore[index]


def test_epsilon_greedy_and_plackett_luce_by_hand() -> None:
    # Best first, 1: 0.7 + 0.3 / 4; then 2, not the best of three: 0.3 / 3; then 3, the better of two: 0.7 + 0.3 / 2.
    np.testing.assert_allclose(compute_propensities(SCORES, [1, 2, 3], EpsilonGreedy(0.3)), [0.775, 0.1, 0.85])
    np.testing.assert_allclose(compute_propensities(np.log([1.0, 2.0, 5.0]), [2, 0], PlackettLuce(1.0)), [5 / 8, 1 / 3])


def test_thompsons_first_place_is_the_chance_of_the_larger_draw() -> None:
    # Angles of Beta(2, 1) and of Beta(1, 1): arcsin(sqrt(2/3)) and pi / 4, variances 1/16 and 1/12.
    policy = Thompson(np.array([1.0, 0.0]), np.array([1.0, 0.0]), rate=0.5, strength=2.0, epsilon=0.0)
    share = float(ndtr((np.arcsin(np.sqrt(2 / 3)) - np.pi / 4) / np.sqrt(1 / 16 + 1 / 12)))
    np.testing.assert_allclose(compute_propensities(np.zeros(2), [0, 1], policy), [share, 1], atol=1e-5)
    np.testing.assert_allclose(compute_propensities(np.zeros(2), [1, 0], policy), [1 - share, 1], atol=1e-5)


def test_a_request_id_gives_its_list_again_and_a_secret_another() -> None:
    policy, scores = PlackettLuce(2.0), np.arange(50.0)
    first, again = (explore(scores, 10, policy, "abc", b"s") for _ in range(2))
    np.testing.assert_array_equal(first.order, again.order)
    np.testing.assert_array_equal(first.propensities, again.propensities)
    assert explore(scores, 10, policy, "abd", b"s").order.tolist() != first.order.tolist()
    assert explore(scores, 10, policy, "abc", b"t").order.tolist() != first.order.tolist()


def test_what_has_no_score_is_never_shown_and_greedy_is_the_ranking() -> None:
    scores = np.array([0.1, np.nan, 0.5, -np.inf, 0.3])
    for policy in (EpsilonGreedy(1.0), PlackettLuce(9.0), Thompson(np.zeros(5), np.zeros(5))):
        told = explore(scores, 9, policy, "x")
        assert sorted(told.order.tolist()) == [0, 2, 4]
        assert np.all(told.propensities > 0)
        assert told.propensities[-1] == pytest.approx(1, abs=1e-4)
        np.testing.assert_array_equal(compute_propensities(scores, [2, 1, 0], policy)[1:], [0, 0])
    greedy = explore(scores, 2, EpsilonGreedy(0.0), "x")
    assert (greedy.order.tolist(), greedy.propensities.tolist()) == ([2, 4], [1, 1])
    assert len(explore([np.nan], 3, EpsilonGreedy(), "x").order) == 0


def test_marginals_of_places_are_sums_over_all_lists() -> None:
    expected = np.zeros((4, 3))
    for one in permutations(range(4), 3):
        expected[list(one), range(3)] += np.prod(compute_propensities(SCORES, one, EpsilonGreedy(0.3)))
    np.testing.assert_allclose(measure_places(SCORES, 3, 0.3), expected, atol=1e-12)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon: expected a number from 0 to 1, found 2"):
        EpsilonGreedy(2)
    with pytest.raises(ValueError, match="temperature"):
        PlackettLuce(0.0)
    with pytest.raises(ValueError, match="0 <= clicks <= views"):
        Thompson(np.ones(2), np.zeros(2))
    with pytest.raises(ValueError, match="rate must lie"):
        Thompson(np.zeros(2), np.zeros(2), rate=1.0)
    with pytest.raises(ValueError, match="as scores are"):
        explore(np.zeros(3), 1, Thompson(np.zeros(2), np.zeros(2)), "x")
    with pytest.raises(ValueError, match="distinct rows"):
        compute_propensities(SCORES, [1, 1], EpsilonGreedy())
    with pytest.raises(ValueError, match="k: expected"):
        explore(SCORES, 0, EpsilonGreedy(), "x")
    assert parse_policy("epsilon-greedy:0.2") == EpsilonGreedy(0.2)
    assert parse_policy("plackett-luce:2") == PlackettLuce(2.0)
    told = parse_policy("thompson:30")
    assert isinstance(told, Thompson)
    assert told.strength == 30
    for text in ("plackett:1", "epsilon-greedy", "epsilon-greedy:7", "plackett-luce:0", "thompson:0", "thomson:9"):
        with pytest.raises(PeftComboError, match="Expected epsilon-greedy:SHARE"):
            parse_policy(text)
    with pytest.raises(ValueError, match="k: expected"):
        measure_places(SCORES, 5, 0.1)


def test_thompson_finds_what_scores_hide_and_its_log_tells_the_worth_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_COMBO_SECRET", "a secret of the tests")  # it seeds what is drawn
    # Eight items, lists of two, clicks by item alone. The best one has the lowest score: the ranking never shows it.
    rates, scores = np.array([0.1] * 7 + [0.6]), np.linspace(1, -1, 8).astype(np.float32)
    items, state, rng = list("abcdefgh"), State.open(tmp_path), np.random.default_rng(0)
    drawers = [ListDrawer("thompson:20", state) for _ in range(2)]  # two workers on one state
    for turn in range(30):
        rows, said = [], []
        for n in range(10):
            name, drawer = f"{turn}-{n}", drawers[n % 2]
            told = drawer.draw(items, scores, 2, name)
            shown = [
                ShownItem(items[row], float(scores[row]), float(p))
                for row, p in zip(told.order, told.propensities, strict=True)
            ]
            rows.append(ExposureRow(name, None, "complete", "x@prod", "x@v1", "d", "prod", ("z",), shown))
            said += [FeedbackRow(name, "click", items[row]) for row in told.order if rng.random() < rates[row]]
        state.add_exposures(rows)
        state.add_feedback(said)
        for drawer in drawers:
            drawer.refresh()
    logged = gather_lists(state)
    state.close()
    assert len(logged) == 300
    assert np.mean([one.items[0] == "h" for one in logged[:50]]) < 0.5
    assert np.mean([one.items[0] == "h" for one in logged[-100:]]) > 0.8
    # The worth of a recommender that knows the best one, from lists that were drawn otherwise and ever differently.
    other, wanted = np.array([*scores[:7], 2.0]), PlackettLuce(0.5)
    place = {item: row for row, item in enumerate(items)}
    truth = sum(
        np.prod(compute_propensities(other, one, wanted)) * rates[list(one)].sum() for one in permutations(range(8), 2)
    )
    told = estimate_value(
        [one.rewards for one in logged], [one.propensities for one in logged],
        [compute_propensities(other, [place[item] for item in one.items], wanted) for one in logged],
        [one.request_id for one in logged], estimator="ips",
    )  # fmt: skip
    assert told.interval[0] <= truth <= told.interval[1]
    assert told.interval[1] - told.interval[0] < 0.4
    assert told.mean_weight == pytest.approx(1, abs=0.2)
