"""Off-policy estimates: worked out by hand, and against a made-up shop whose truth is known."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from peft_combo.metrics.off_policy import RewardModel, compare_arms, estimate_value, weigh_places

Array = NDArray[np.float64]


def test_one_place_by_hand() -> None:
    rewards, logged, candidate = [1.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.25, 0.5], [0.25, 0.75, 0.5, 0.0]
    users = ["a", "b", "c", "d"]  # weights .5, 1.5, 2, 0
    ips = estimate_value(rewards, logged, candidate, users, estimator="ips")
    assert ips.value == pytest.approx(2.5 / 4)
    assert estimate_value(rewards, logged, candidate, users).value == pytest.approx(2.5 / 4)  # the weights sum to 4
    assert ips.effective_size == pytest.approx(16 / 6.5)
    assert (ips.mean_weight, ips.logged, ips.gain) == pytest.approx((1.0, 0.75, -0.125))
    cut = estimate_value(rewards, logged, candidate, users, clip=1.0)
    assert cut.value == pytest.approx(1.5 / 2.5)
    assert cut.clipped == 0.5
    model = RewardModel(shown=[0.5, 0.5, 0.5, 0.5], expected=[0.6, 0.6, 0.6, 0.6])
    dr = estimate_value(rewards, logged, candidate, users, estimator="dr", predicted=model)
    assert dr.value == pytest.approx(0.6 + (0.25 - 0.75 + 1.0 + 0.0) / 4)
    assert any("effective sample of 2 lists" in doubt for doubt in dr.doubts)


def test_weights_of_places_by_hand() -> None:
    logged = np.array([[0.5, 0.5, 0.2], [0.5, 1.0, np.nan]])
    candidate = np.array([[1.0, 0.25, 0.4], [0.25, 1.0, 0.3]])
    np.testing.assert_allclose(weigh_places(logged, candidate, "position"), [[2, 0.5, 2], [0.5, 1, 1]])
    np.testing.assert_allclose(weigh_places(logged, candidate, "cascade"), [[2, 1, 2], [0.5, 0.5, 0.5]])
    np.testing.assert_allclose(weigh_places(logged, candidate, "list"), [[2] * 3, [0.5] * 3])
    np.testing.assert_allclose(weigh_places(logged, candidate, "cascade", clip=1.5)[0], [1.5, 1, 1.5])


def test_a_list_without_a_place_earns_nothing_there() -> None:
    logged = np.array([[0.5, np.nan], [0.5, 0.5]])
    found = estimate_value([[1.0, np.nan], [0.0, 1.0]], logged, np.full((2, 2), 0.5), ["a", "b"], estimator="ips")
    assert found.value == pytest.approx(1.0)


class Shop:
    """Five items, lists of two, users of two kinds and their own tastes; truth by enumeration of all lists.

    Clicks follow item and place alone, so all three slate models hold.
    """

    lists = np.array(list(permutations(range(5), 2)))  # (L, 2)
    examined = np.array([1.0, 0.5])

    def __init__(self, seed: int, users: int, per_user: int) -> None:
        rng = np.random.default_rng(seed)
        self.users = np.repeat(np.arange(users), per_user)
        kind = rng.integers(0, 2, users)[:, None]
        taste = rng.normal(size=(users, 5)) * 0.7 + np.where(kind, 1, -1) * np.linspace(-1, 1, 5)
        self.rates = 1 / (1 + np.exp(2.5 - taste))  # (U, 5)
        seen = np.where(kind, 1.0, -1.0) * np.linspace(-1, 1, 5)  # what recommenders know of a user
        self.scores = {"logged": 0.3 * seen, "candidate": seen}
        chances = {name: self.list_chances(scores) for name, scores in self.scores.items()}  # (U, L)
        earned = (self.rates[:, self.lists] * self.examined).sum(2)  # (U, L)
        self.truth = float((chances["candidate"] * earned).sum(1).mean())
        cumulative = chances["logged"].cumsum(1)[self.users]
        drawn = (rng.random((len(self.users), 1)) > cumulative).sum(1).clip(max=len(self.lists) - 1)
        self.shown = self.lists[drawn]  # (Q, 2)
        chance = np.take_along_axis(self.rates[self.users], self.shown, 1) * self.examined
        self.clicks = (rng.random(chance.shape) < chance).astype(np.float64)

    @staticmethod
    def first_chances(scores: Array) -> Array:
        return np.asarray(np.exp(scores) / np.exp(scores).sum(1, keepdims=True))

    def list_chances(self, scores: Array) -> Array:
        first = self.first_chances(scores)
        a, b = self.lists.T
        return np.asarray(first[:, a] * first[:, b] / (1 - first[:, a]))

    def propensities(self, name: str, marginal: bool = False) -> Array:
        if marginal:
            chances = self.list_chances(self.scores[name])
            places = np.stack([chances @ (self.lists[:, [k]] == np.arange(5)) for k in (0, 1)], 2)  # (U, 5, 2)
            return np.asarray(places[self.users[:, None], self.shown, [0, 1]])
        first = self.first_chances(self.scores[name])[self.users]
        own = np.take_along_axis(first, self.shown, 1)
        own[:, 1] /= 1 - own[:, 0]
        return np.asarray(own)


TRUTH = float(np.mean([Shop(seed, 4000, 1).truth for seed in range(1000, 1005)]))


def measure_shops(repeats: int, **options: object) -> tuple[Array, float]:
    """Return errors of the estimate in made-up shops, and how often the interval held the truth."""
    marginal = options.get("model") == "position"
    errors, held = [], []
    for seed in range(repeats):
        shop = Shop(seed, 120, 5)
        logged, candidate = (shop.propensities(name, marginal) for name in ("logged", "candidate"))
        found = estimate_value(shop.clicks, logged, candidate, shop.users, n=200, **options)  # type: ignore[arg-type]
        errors.append(found.value - TRUTH)
        held.append(found.interval[0] <= TRUTH <= found.interval[1])
    return np.array(errors), float(np.mean(held))


@pytest.mark.parametrize(
    "options", [{"estimator": "ips", "model": "list"}, {"model": "list"}, {"model": "cascade"}, {"model": "position"}],
    ids=str,
)  # fmt: skip
def test_intervals_of_a_made_up_shop_hold_its_truth(options: dict[str, object]) -> None:
    errors, held = measure_shops(120, **options)
    assert abs(errors.mean()) < 3.5 * errors.std() / np.sqrt(len(errors)) + 0.002  # SNIPS has a bias of order 1 / Q
    assert 0.87 <= held <= 1.0


def test_a_model_of_what_happens_narrows_the_estimate() -> None:
    widths = {}
    for name, options in {"list": {"model": "list"}, "position": {"model": "position"}}.items():
        widths[name] = measure_shops(60, estimator="ips", **options)[0].std()
    assert widths["position"] < widths["list"]


@pytest.mark.parametrize("model", ["list", "cascade"])
def test_doubly_robust_survives_wrong_propensities_or_a_wrong_model(model: str) -> None:
    errors: dict[str, list[float]] = {"wrong rewards": [], "wrong propensities": []}
    for seed in range(60):
        shop = Shop(seed, 120, 5)
        logged, candidate = shop.propensities("logged"), shop.propensities("candidate")
        rates = shop.rates[shop.users]
        shown = np.take_along_axis(rates, shop.shown, 1) * shop.examined
        first = shop.first_chances(shop.scores["candidate"])[shop.users]
        if model == "cascade":  # given the logged first item
            left = first.copy()
            np.put_along_axis(left, shop.shown[:, :1], 0.0, 1)
            second = (left / left.sum(1, keepdims=True) * rates).sum(1)
        else:
            chances = shop.list_chances(shop.scores["candidate"])[shop.users]
            second = (chances * rates[:, shop.lists[:, 1]]).sum(1)
        expected = np.column_stack([(first * rates).sum(1), 0.5 * second])
        flat = RewardModel(np.full_like(shown, 0.2), np.full_like(shown, 0.2))
        right = RewardModel(shown, expected)
        own: dict[str, object] = {"estimator": "dr", "model": model, "n": 1}
        wrong = estimate_value(shop.clicks, logged, candidate, shop.users, predicted=flat, **own)  # type: ignore[arg-type]
        errors["wrong rewards"].append(wrong.value - TRUTH)
        if model == "list":  # under cascade the weights also stand before the expectation
            even = np.full_like(logged, 0.3)
            wrong = estimate_value(shop.clicks, even, candidate, shop.users, predicted=right, **own)  # type: ignore[arg-type]
            errors["wrong propensities"].append(wrong.value - TRUTH)
    for found in filter(None, errors.values()):
        assert abs(np.mean(found)) < 3.5 * np.std(found) / np.sqrt(len(found)) + 0.001


def test_wrong_propensities_and_a_far_candidate_are_told() -> None:
    shop = Shop(0, 400, 3)
    logged, candidate = shop.propensities("logged"), shop.propensities("candidate")
    assert not estimate_value(shop.clicks, logged, candidate, shop.users).doubts
    (doubt,) = estimate_value(shop.clicks, np.clip(logged * 2, 0, 1), candidate, shop.users).doubts
    assert "weights average 0." in doubt
    far = np.where(np.arange(len(candidate))[:, None] < 5, candidate, 0.0)
    assert any("effective sample of" in told for told in estimate_value(shop.clicks, logged, far, shop.users).doubts)
    with pytest.raises(ValueError, match="nothing of what was shown"):
        estimate_value(shop.clicks, logged, np.zeros_like(logged), shop.users)


def test_whole_users_are_drawn() -> None:
    # Everything a user does is the same: 20 lists of one user are worth one.
    rewards = np.repeat(np.arange(50) % 2, 20).astype(float)
    even = np.full(1000, 0.5)
    by_user = estimate_value(rewards, even, even, np.repeat(np.arange(50), 20))
    alone = estimate_value(rewards, even, even, np.arange(1000))
    ratio = np.subtract(*by_user.interval) / np.subtract(*alone.interval)
    assert ratio == pytest.approx(np.sqrt(20), rel=0.2)


def test_arms_are_compared_by_their_users() -> None:
    rng = np.random.default_rng(0)
    users = rng.integers(0, 300, 3000)
    worse, better = (rng.random(3000) < rate for rate in (0.05, 0.15))
    found = compare_arms(worse, users, better, users + 300)
    assert found.difference == pytest.approx(better.mean() - worse.mean())
    assert found.interval[0] > 0
    assert found.users == (len(set(users)),) * 2
    same = compare_arms(worse, users, worse, users)
    assert same.difference == 0
    assert same.interval[0] < 0 < same.interval[1]
    with pytest.raises(ValueError, match="An arm needs"):
        compare_arms([], [], [1.0], [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logged": [0.0, 0.5]}, r"in \(0, 1\]"),
        ({"candidate": [0.5, 1.5]}, r"in \[0, 1\]"),
        ({"users": [0]}, "must be"),
        ({"rewards": [np.nan, 1.0]}, "finite"),
        ({"estimator": "dr"}, "reward model"),
        ({"clip": 0.0}, "clip"),
        ({"level": 1.0}, "level"),
        ({"n": 0}, "n must"),
        ({"candidate": [[0.5, 0.5]]}, "one shape"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "rewards": [0.0, 1.0], "logged": [0.5, 0.5], "candidate": [0.5, 0.5], "users": [0, 1],
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        estimate_value(**{**given, **change})  # type: ignore[arg-type]
