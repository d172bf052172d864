"""Exploration: epsilon-greedy, Plackett-Luce and Thompson re-ranking, with the exact propensities of what is shown.

Owns how a list is drawn from scores so that later another recommender can be judged by what people did with it: every
list that is drawn has a known probability. Pure functions of arrays; knows nothing of items, requests or logs.

A propensity here is the probability of an item at its place **given what stands before it**. The first of them is
therefore the marginal probability of the first place, the product of the first k that of the list's first k places, and
the product of all the probability of the list (`Exploration.list_probability`). `metrics.off_policy` reads all three.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, assert_never

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from peft_combo.errors import PeftComboError, did_you_mean

CANDIDATES = 100
"""Best items that a service draws a list from; `evaluate --log` lets a candidate draw from as many."""

# Nodes of the integrals behind Thompson's propensities, over their whole range and within each posterior.
_NODES = 512
_QUANTILES = special.ndtri(np.concatenate([[1e-9, 1e-6, 1e-4], np.linspace(0.003, 0.997, 25), [1 - 1e-4, 1 - 1e-6,
                                                                                            1 - 1e-9]]))  # fmt: skip


@dataclass(frozen=True)
class EpsilonGreedy:
    """At every place, with probability `epsilon` any of the items that are left, else the best of them.

    Source: Sutton and Barto 2018, "Reinforcement Learning", section 2.2, place by place.
    """

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        _check_between("epsilon", self.epsilon, 0.0, 1.0)


@dataclass(frozen=True)
class PlackettLuce:
    """Every place by softmax of score over `temperature` among the items that are left; near 0 it is greedy.

    Drawn as the order of scores with Gumbel noise.
    Source: Plackett 1975, "The analysis of permutations"; Kool et al. 2019, "Stochastic beams" (Gumbel top-k).
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature: expected a number above 0, found {self.temperature}.")


@dataclass(frozen=True, eq=False)
class Thompson:
    """At every place the item whose click rate, drawn from its posterior, is the highest of those that are left.

    Rates are drawn anew for every place, and with probability `epsilon` any item takes it: what is known to be worse
    would else become so improbable that no log could tell what another recommender earns by it. The posterior of item i
    is Beta(strength * r_i + clicks_i, strength * (1 - r_i) + views_i - clicks_i), its prior mean
    r_i = sigmoid(logit(rate) + z_i) with z_i the score in standard deviations of the candidates. Drawn is the angle
    arcsin(sqrt(rate)), from the normal distribution that the delta method gives: its variance hangs on the views alone,
    also where nobody clicked yet (that of log-odds has no bound there), and propensities take milliseconds.

    Attributes:
        clicks, views: (N,) so far, of each candidate; views at least clicks. Without them it is a policy that is still
            to be told what it draws from.
        rate: click rate of a candidate of average score.
        strength: so many views the score is worth.
        epsilon: share of places given to any item.
    Source: Chapelle and Li 2011, "An empirical evaluation of Thompson sampling"; Zhang et al. 2021, "Inference for
        batched bandits" (a least probability, for the log's sake); Anscombe 1948 (the angle).
    """

    clicks: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    views: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    rate: float = 0.05
    strength: float = 20.0
    epsilon: float = 0.1

    def __post_init__(self) -> None:
        _check_between("rate", self.rate, 0.0, 1.0)
        _check_between("epsilon", self.epsilon, 0.0, 1.0)
        if not 0 < self.rate < 1 or not (np.isfinite(self.strength) and self.strength > 0):
            raise ValueError(
                f"rate must lie inside (0, 1) and strength above 0, found {self.rate} and {self.strength}."
            )
        clicks, views = np.asarray(self.clicks, np.float64), np.asarray(self.views, np.float64)
        if clicks.ndim != 1 or clicks.shape != views.shape or np.any(clicks < 0) or np.any(views < clicks):
            raise ValueError("clicks and views must both be (N,), with 0 <= clicks <= views.")


ExplorationPolicy: TypeAlias = EpsilonGreedy | PlackettLuce | Thompson


@dataclass(frozen=True, eq=False)
class Exploration:
    """What is shown, and how probable it was.

    Attributes:
        order: (K,) rows of the candidates, first place first.
        propensities: (K,) in (0, 1], each given the items before it; the first is the first place's marginal.
    """

    order: NDArray[np.int64]
    propensities: NDArray[np.float64]

    @property
    def list_probability(self) -> float:
        """The probability of the whole list, in this order."""
        return float(np.prod(self.propensities))


def parse_policy(text: str) -> ExplorationPolicy:
    """Read a policy as it is written on a command line: ``epsilon-greedy:0.1``, ``plackett-luce:0.5``, ``thompson:20``.

    The number of the last is its `strength`; it knows no clicks and views yet.

    Raises:
        PeftComboError: it is none.
    """
    name, _, number = text.partition(":")
    policies: dict[str, Callable[[float], ExplorationPolicy]] = {
        "epsilon-greedy": EpsilonGreedy,
        "plackett-luce": PlackettLuce,
        "thompson": lambda strength: Thompson(strength=strength),
    }
    try:
        return policies[name](float(number))
    except (KeyError, ValueError) as error:
        raise PeftComboError(
            "Expected epsilon-greedy:SHARE (0 to 1), plackett-luce:TEMPERATURE (above 0) or thompson:VIEWS (above 0, "
            f'what a score is worth), found "{text}". {did_you_mean(name, policies)}'.rstrip()
        ) from error


def explore(scores: ArrayLike, k: int, policy: ExplorationPolicy, request_id: str, secret: bytes = b"") -> Exploration:
    """Draw the list that a request is shown; the same request, scores and secret give the same list again.

    Args:
        scores: (N,), higher is better. NaN and minus infinity are never shown.
        k: places; fewer are filled where there are fewer candidates.
        request_id: seeds the draw.
        secret: what a client that chooses its own request ids cannot know, so that it cannot choose its list either.
    Returns:
        the first k places with their propensities.
    Raises:
        ValueError: shapes differ, or k is below 1.
    """
    values, shown = _check_scores(scores, policy)
    if k < 1:
        raise ValueError(f"k: expected at least 1, found {k}.")
    rng = np.random.default_rng(list(hashlib.sha256(secret + b"\n" + request_id.encode()).digest()))
    candidates = np.flatnonzero(shown)
    if not len(candidates):
        return Exploration(np.empty(0, np.int64), np.empty(0))
    own = values[candidates]
    match policy:
        case EpsilonGreedy():
            order = _draw_epsilon_greedy(own, min(k, len(own)), policy.epsilon, rng)
        case PlackettLuce():
            order = np.argsort(-(own / policy.temperature + rng.gumbel(size=len(own))), kind="stable")[:k]
        case Thompson():
            order = _draw_thompson(*_posterior(own, policy, candidates), min(k, len(own)), policy.epsilon, rng)
        case _:
            assert_never(policy)
    rows = candidates[order].astype(np.int64)
    return Exploration(rows, compute_propensities(values, rows, policy))


def compute_propensities(scores: ArrayLike, order: Sequence[int] | NDArray[np.int64], policy: ExplorationPolicy) -> (
    NDArray[np.float64]
):  # fmt: skip
    """Return how probable a list is under a policy, place by place: what a candidate recommender would have shown.

    Args:
        scores: (N,) of the policy that is asked about.
        order: (K,) distinct rows, as they were shown.
    Returns:
        (K,) probability of each item at its place given those before it; exact for epsilon-greedy and Plackett-Luce,
        by quadrature to some 1e-5 for Thompson; 0 from the first item on that the policy never shows.
    Raises:
        ValueError: shapes differ, or rows repeat or are out of range.
    """
    values, shown = _check_scores(scores, policy)
    rows = np.asarray(order, np.int64)
    if len(np.unique(rows)) != len(rows) or (len(rows) and (rows.min() < 0 or rows.max() >= len(values))):
        raise ValueError(f"order: expected distinct rows of 0..{len(values) - 1}, found {rows.tolist()}.")
    possible = int(np.argmin(shown[rows])) if not shown[rows].all() else len(rows)
    found = np.zeros(len(rows))
    candidates = np.flatnonzero(shown)
    place = np.full(len(values), -1)
    place[candidates] = np.arange(len(candidates))
    own, wanted = values[candidates], place[rows[:possible]]
    match policy:
        case EpsilonGreedy():
            found[:possible] = _epsilon_greedy_propensities(own, wanted, policy.epsilon)
        case PlackettLuce():
            found[:possible] = _plackett_luce_propensities(own / policy.temperature, wanted)
        case Thompson():
            found[:possible] = _thompson_propensities(*_posterior(own, policy, candidates), wanted, policy.epsilon)
        case _:
            assert_never(policy)
    return found


def measure_places(scores: ArrayLike, k: int, epsilon: float) -> NDArray[np.float64]:
    """Return the marginal probability of every item at every place under epsilon-greedy, for item-position estimates.

    Args:
        scores: (N,), higher is better; of equal ones the first counts as better.
    Returns:
        (N, k) float64; columns sum to 1.
    Raises:
        ValueError: epsilon is no share, or k is out of 1..N.
    """
    values, shown = _check_scores(scores, EpsilonGreedy(epsilon))
    candidates = np.flatnonzero(shown)
    n = len(candidates)
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to {n}, found {k}.")
    found = np.zeros((len(values), k))
    ranked = candidates[np.argsort(-values[candidates], kind="stable")]
    # waiting[r, m]: the item of rank r is still there with m better ones; one place takes a better one, it, or a worse.
    waiting = np.eye(n)
    better = np.arange(n)
    for place in range(k):
        left = n - place
        taken = np.full((n, n), epsilon / left)
        taken[:, 0] += 1 - epsilon
        found[ranked, place] = (waiting * taken).sum(1)
        lower = epsilon * better / left + np.where(better > 0, 1 - epsilon, 0.0)  # a better one goes
        worse = epsilon * np.clip(left - 1 - better, 0, None) / left
        following = waiting * worse
        following[:, :-1] += (waiting * lower)[:, 1:]
        waiting = following
    return found


def _draw_epsilon_greedy(
    scores: NDArray[np.float64], k: int, epsilon: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    left = np.argsort(-scores, kind="stable").tolist()
    return np.array(
        [left.pop(int(rng.integers(len(left))) if rng.random() < epsilon else 0) for _ in range(k)], np.int64
    )


def _epsilon_greedy_propensities(
    scores: NDArray[np.float64], order: NDArray[np.int64], epsilon: float
) -> NDArray[np.float64]:
    left = np.argsort(-scores, kind="stable").tolist()
    found = np.empty(len(order))
    for place, row in enumerate(order.tolist()):
        found[place] = epsilon / len(left) + (1 - epsilon) * (left[0] == row)
        left.remove(row)
    return found


def _plackett_luce_propensities(logits: NDArray[np.float64], order: NDArray[np.int64]) -> NDArray[np.float64]:
    left = np.ones(len(logits), bool)
    found = np.empty(len(order))
    for place, row in enumerate(order):
        found[place] = np.exp(logits[row] - special.logsumexp(logits[left]))
        left[row] = False
    return found


def _draw_thompson(
    mean: NDArray[np.float64], spread: NDArray[np.float64], k: int, epsilon: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    left = np.arange(len(mean))
    order = np.empty(k, np.int64)
    for place in range(k):
        best = int(np.argmax(rng.normal(mean[left], spread[left])))
        chosen = int(rng.integers(len(left))) if rng.random() < epsilon else best
        order[place] = left[chosen]
        left = np.delete(left, chosen)
    return order


def _thompson_propensities(
    mean: NDArray[np.float64], spread: NDArray[np.float64], order: NDArray[np.int64], epsilon: float
) -> NDArray[np.float64]:
    """Return the probability of each item at its place given those before it.

    P(x_i is the largest of those left) = integral of dF_i(y) * prod over the others j that are left of F_j(y).
    """
    found = np.empty(len(order))
    if not len(order):
        return found
    # Nodes where the draws are, so that narrow posteriors have theirs, and the middle between any two.
    own = mean[order, None] + spread[order, None] * _QUANTILES
    leaders = np.argsort(-(mean + 2 * spread), kind="stable")[
        : max(len(order), 12)
    ]  # what the others' product turns at
    quantiles = np.concatenate([own, mean[leaders, None] + spread[leaders, None] * _QUANTILES]).ravel()
    grid = np.unique(np.concatenate([quantiles, np.linspace(quantiles.min(), quantiles.max(), _NODES)]))
    grid = np.insert((grid[:-1] + grid[1:]) / 2, np.arange(len(grid)), grid)
    width = np.diff(grid[::2])
    logs = special.log_ndtr((grid - mean[:, None]) / spread[:, None])  # (N, G)
    others = logs.sum(0)
    for place, row in enumerate(order):
        others = others - logs[row]
        density = np.exp(others - ((grid - mean[row]) / spread[row]) ** 2 / 2) / (spread[row] * np.sqrt(2 * np.pi))
        largest = float((width * (density[:-2:2] + 4 * density[1::2] + density[2::2])).sum() / 6)  # Simpson's rule
        found[place] = epsilon / (len(mean) - place) + (1 - epsilon) * min(max(largest, 0.0), 1.0)
    return found


def _posterior(
    scores: NDArray[np.float64], policy: Thompson, candidates: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard deviation of the angle of each candidate's click rate, arcsin(sqrt(rate)): (N,) each."""
    wide = scores.std()
    standard = (scores - scores.mean()) / wide if wide > 0 else np.zeros(len(scores))
    expected = special.expit(special.logit(policy.rate) + standard)
    clicks = np.asarray(policy.clicks, np.float64)[candidates]
    views = np.asarray(policy.views, np.float64)[candidates]
    a, b = policy.strength * expected + clicks, policy.strength * (1 - expected) + views - clicks
    return np.arcsin(np.sqrt(a / (a + b))), 0.5 / np.sqrt(a + b + 1)


def _check_scores(scores: ArrayLike, policy: ExplorationPolicy) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the scores and which of them may be shown."""
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or np.any(values == np.inf):
        raise ValueError(f"scores must be (N,) and below infinity, found shape {values.shape}.")
    if isinstance(policy, Thompson) and len(policy.clicks) != len(values):
        raise ValueError(f"clicks and views must be ({len(values)},) as scores are, found {len(policy.clicks)}.")
    return values, np.isfinite(values)


def _check_between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a number from {low:g} to {high:g}, found {value}.")
