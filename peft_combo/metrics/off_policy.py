"""Off-policy evaluation: what another recommender would have earned, from logged lists with known propensities.

Owns importance weights of lists and places, the estimators IPS, SNIPS and doubly robust, their diagnostics, intervals
that draw whole users, and the comparison of arms. Knows numbers only: how lists were drawn is `serving.exploration`'s.

A logged list has K places, a reward at each (1 where it was clicked), and per place two propensities: of the
recommender that showed it and of the candidate that is judged. What they are is the caller's choice of `SlateModel`:

- ``list``: a reward may depend on the whole list. Conditional propensities; unbiased whatever users do, and widest.
- ``cascade``: a reward depends on its own place and what stands above it. Conditional propensities; narrower.
- ``position``: a reward depends on its own item and place alone. **Marginal** propensities of the places
  (`serving.exploration.measure_places`); the narrowest, and biased where neighbours matter.

With one place the three are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, assert_never

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peft_combo.machine import row_blocks

SlateModel: TypeAlias = Literal["list", "cascade", "position"]
Estimator: TypeAlias = Literal["ips", "snips", "dr"]

FEWEST_EFFECTIVE = 100
"""Below so many logged lists in effect an interval is not to be trusted; `Estimate.doubts` says so."""


@dataclass(frozen=True)
class Estimate:
    """What the candidate would have earned per list, and how far that may be trusted.

    Attributes:
        value: mean reward per list, summed over its places. interval: of it.
        logged: what was earned. gain, gain_interval: of the candidate over it, on the same resampled users.
        effective_size: Kish's (sum w)^2 / sum w^2, of the place that has least.
        mean_weight: near 1 where propensities are right and the candidate shows nothing the log could not.
        clipped: share of weights that were cut.
        lists, users: how many. doubts: what speaks against relying on it, in words.
    """

    value: float
    interval: tuple[float, float]
    logged: float
    gain: float
    gain_interval: tuple[float, float]
    effective_size: float
    mean_weight: float
    clipped: float
    lists: int
    users: int
    doubts: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class RewardModel:
    """Predicted rewards that make a doubly robust estimate: right where either they or the propensities are.

    Attributes:
        shown: (Q, K) or (Q,) predicted reward of what was shown at each place.
        expected: same shape, predicted reward of what the candidate shows there in the mean; under ``cascade`` given
            the logged items above.
    """

    shown: ArrayLike
    expected: ArrayLike


def weigh_places(
    logged: ArrayLike, candidate: ArrayLike, model: SlateModel = "cascade", clip: float | None = None
) -> NDArray[np.float64]:
    """Return the importance weight of the reward at each place.

    Args:
        logged, candidate: (Q, K) propensities; NaN in `logged` where a list had no such place. See the module.
        clip: weights above it are cut to it: less variance for some bias towards the log.
    Returns:
        (Q, K) float64.
    Raises:
        ValueError: shapes differ, a logged propensity is not in (0, 1], or a candidate's not in [0, 1].
    Source: Horvitz and Thompson 1952 (weights); McInerney et al. 2020, "Counterfactual evaluation of slate
        recommendations with sequential reward interactions" (cascade); Li et al. 2018, "Offline evaluation of ranking
        policies with click models" (item-position); Ionides 2008 (clipping).
    """
    mine, theirs = _to_places(logged, "logged"), _to_places(candidate, "candidate")
    if mine.shape != theirs.shape:
        raise ValueError(f"logged and candidate must have one shape, found {mine.shape} and {theirs.shape}.")
    absent = np.isnan(mine)
    if np.any((mine <= 0) | (mine > 1 + 1e-9)):
        raise ValueError("logged: propensities of what was shown must lie in (0, 1]; was anything logged that was not?")
    theirs = np.where(absent, 0.0, theirs)
    if not np.all((theirs >= 0) & (theirs <= 1 + 1e-9)):
        raise ValueError("candidate: propensities must lie in [0, 1].")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: expected a weight above 0, found {clip}.")
    ratios = np.where(absent, 1.0, theirs / np.where(absent, 1.0, mine))
    match model:
        case "list":
            weights = np.repeat(ratios.prod(1, keepdims=True), ratios.shape[1], axis=1)
        case "cascade":
            weights = np.cumprod(ratios, axis=1)
        case "position":
            weights = ratios
        case _:
            assert_never(model)
    return weights if clip is None else np.minimum(weights, clip)


def estimate_value(
    rewards: ArrayLike, logged: ArrayLike, candidate: ArrayLike, users: ArrayLike, *, estimator: Estimator = "snips",
    model: SlateModel = "cascade", predicted: RewardModel | None = None, clip: float | None = None, n: int = 1000,
    seed: int = 0, level: float = 0.95,
) -> Estimate:  # fmt: skip
    """Estimate the mean reward of a candidate from lists that another recommender showed.

    - ``ips``: mean of weight times reward; unbiased without clipping, widest.
    - ``snips``: divided by the mean weight, place by place; a bias that vanishes with Q, and much narrower.
    - ``dr``: the reward model's expectation plus the weighted error of it on what was shown.

    Args:
        rewards: (Q, K), or (Q,) for lists of one place; what was earned at each.
        logged, candidate: the same shape, propensities; see `weigh_places`.
        users: (Q,) what must be drawn as a whole: whom each list was shown to.
        predicted: for ``dr``.
        n, seed, level: of the bootstrap over users.
    Returns:
        the estimate with its percentile interval.
    Raises:
        ValueError: shapes or values do not fit, or the candidate shows nothing of what was shown.
    Source: Swaminathan and Joachims 2015, "The self-normalized estimator for counterfactual learning"; Dudik et al.
        2011, "Doubly robust policy evaluation and learning"; Kiyohara et al. 2022, "Doubly robust off-policy evaluation
        for ranking policies under the cascade behavior model".
    """
    earned = _to_places(rewards, "rewards")
    weights = weigh_places(logged, candidate, model, clip)
    whole = weights if clip is None else weigh_places(logged, candidate, model)
    labels = np.asarray(users)
    if earned.shape != weights.shape or labels.shape != (len(earned),) or not len(earned):
        raise ValueError(
            f"rewards and propensities must be (Q, K) and users (Q,) with Q >= 1, found {earned.shape}, "
            f"{weights.shape} and {labels.shape}."
        )
    earned = np.where(np.isnan(_to_places(logged, "logged")), 0.0, earned)
    if not np.all(np.isfinite(earned)):
        raise ValueError("rewards must be finite.")
    tops, bottoms = split_ratios(earned, weights, estimator, model, predicted)
    codes = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    columns = np.column_stack([tops, bottoms, earned.sum(1), np.ones(len(earned)), weights])
    drawn, whole_sums = _resample(columns, codes, n, seed)
    width = tops.shape[1]
    values, value = (_sum_ratios(sums[:, :width], sums[:, width : 2 * width]) for sums in (drawn, whole_sums))
    means, mean = (sums[:, 2 * width] / sums[:, 2 * width + 1] for sums in (drawn, whole_sums))
    mean_weights = drawn[:, 2 * width + 2 :].mean(1) / drawn[:, 2 * width + 1]
    gains = values - means
    squares = np.square(weights).sum(0)
    effective = float(np.min(np.square(weights.sum(0)) / np.where(squares > 0, squares, 1.0)))
    return Estimate(
        value=float(value[0]), interval=_interval(values, level), logged=float(mean[0]),
        gain=float(value[0] - mean[0]), gain_interval=_interval(gains, level), effective_size=effective,
        mean_weight=float(weights.mean()), clipped=float(np.mean(whole > weights)), lists=len(earned),
        users=int(codes.max()) + 1, doubts=_list_doubts(effective, mean_weights, clip, level),
    )  # fmt: skip


@dataclass(frozen=True)
class ArmDifference:
    """One arm beside another, by what their users did.

    Attributes:
        first, second: mean reward per list. difference: second minus first. interval: of it.
        lists, users: of the first and the second arm.
    """

    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    lists: tuple[int, int]
    users: tuple[int, int]


def compare_arms(
    first: ArrayLike, first_users: ArrayLike, second: ArrayLike, second_users: ArrayLike, *, n: int = 1000,
    seed: int = 0, level: float = 0.95,
) -> ArmDifference:  # fmt: skip
    """Compare two arms of live traffic, each resampled by its own users.

    Args:
        first, second: (Q1,) and (Q2,) reward of each list. first_users, second_users: whom it was shown to; an arm is
            sticky, so a user is in one arm.
    Raises:
        ValueError: shapes differ, an arm has no list, or a value is not finite.
    """
    sides = []
    for place, (rewards, users) in enumerate(((first, first_users), (second, second_users))):
        values, labels = np.asarray(rewards, np.float64), np.asarray(users)
        if values.ndim != 1 or values.shape != labels.shape or not values.size or not np.all(np.isfinite(values)):
            raise ValueError(
                f"An arm needs (Q,) finite rewards and as many users, found {values.shape}, {labels.shape}."
            )
        codes = np.unique(labels, return_inverse=True)[1].astype(np.int64)
        drawn, _ = _resample(np.column_stack([values, np.ones(len(values))]), codes, n, seed + place)
        sides.append((float(values.mean()), drawn[:, 0] / drawn[:, 1], len(values), int(codes.max()) + 1))
    (mean, means, lists, users_), (other, others, other_lists, other_users) = sides
    return ArmDifference(
        mean, other, other - mean, _interval(others - means, level), (lists, other_lists), (users_, other_users)
    )


def split_ratios(
    earned: NDArray[np.float64], weights: NDArray[np.float64], estimator: Estimator, model: SlateModel,
    predicted: RewardModel | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # fmt: skip
    """Return (Q, P) numerators and denominators whose ratios of means sum to the estimate; see `estimate_value`.

    Args:
        earned, weights: (Q, K) of `weigh_places`.
    Raises:
        ValueError: a reward model is missing or does not fit, or every weight of a place is 0.
    """
    if (predicted is not None) != (estimator == "dr"):
        raise ValueError(f"A reward model belongs to dr, and dr needs one; found estimator {estimator}.")
    one = np.ones((len(earned), 1))
    match estimator:
        case "ips":
            return (weights * earned).sum(1, keepdims=True), one
        case "snips":
            if np.any(weights.sum(0) == 0):
                raise ValueError(
                    "The candidate shows nothing of what was shown: every weight of a place is 0. Log more "
                    "exploration, or judge one that is nearer."
                )
            return weights * earned, weights
        case "dr":
            assert predicted is not None
            shown, expected = (_to_places(part, "predicted") for part in (predicted.shown, predicted.expected))
            if shown.shape != earned.shape or expected.shape != earned.shape:
                raise ValueError(f"predicted: expected {earned.shape}, found {shown.shape} and {expected.shape}.")
            before = np.ones_like(weights)
            if model == "cascade":
                before[:, 1:] = weights[:, :-1]
            return (before * expected + weights * (earned - shown)).sum(1, keepdims=True), one
        case _:
            assert_never(estimator)


def _resample(
    columns: NDArray[np.float64], codes: NDArray[np.int64], n: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return column sums over users drawn with replacement, (n, C), and over all of them once, (1, C)."""
    if n < 1:
        raise ValueError(f"n must be >= 1, found {n}.")
    count = int(codes.max()) + 1
    sums = np.zeros((count, columns.shape[1]))
    np.add.at(sums, codes, columns)
    rng = np.random.default_rng(seed)
    drawn = np.empty((n, columns.shape[1]))
    for block in row_blocks(n, count):
        drawn[block] = rng.multinomial(count, np.full(count, 1 / count), size=block.stop - block.start) @ sums
    return drawn, sums.sum(0, keepdims=True)


def _sum_ratios(tops: NDArray[np.float64], bottoms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum of ratios of each row; a resample without any weight says 0."""
    ratios: NDArray[np.float64] = np.divide(tops, bottoms, out=np.zeros_like(tops), where=bottoms > 0)
    summed: NDArray[np.float64] = ratios.sum(1)
    return summed


def _interval(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), found {level}.")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _list_doubts(
    effective: float, mean_weights: NDArray[np.float64], clip: float | None, level: float
) -> tuple[str, ...]:
    doubts = []
    if effective < FEWEST_EFFECTIVE:
        doubts.append(
            f"an effective sample of {effective:.0f} lists, and {FEWEST_EFFECTIVE} are the least for its interval: log "
            "more, or judge a candidate that is nearer to what was shown"
        )
    low, high = _interval(mean_weights, level)
    if clip is None and not low - 0.01 <= 1 <= high + 0.01:
        doubts.append(
            f"weights average {mean_weights.mean():.2f} and not 1: the candidate shows what was never shown, or the "
            "propensities are not those that lists were drawn by"
        )
    return tuple(doubts)


def _to_places(values: ArrayLike, name: str) -> NDArray[np.float64]:
    found: NDArray[Any] = np.asarray(values, np.float64)
    if found.ndim not in (1, 2):
        raise ValueError(f"{name}: expected (Q,) or (Q, K), found {found.ndim} dimensions.")
    return found[:, None] if found.ndim == 1 else found
