"""Exploration: epsilon-greedy, Plackett-Luce and Thompson re-ranking, with the exact propensities of what is shown.

Owns how a list is drawn from scores so that later another recommender can be judged by what people did with it: every
list that is drawn has a known probability. Pure functions of arrays; knows nothing of items, requests or logs.

A propensity here is the probability of an item at its place **given what stands before it**. The first of them is
therefore the marginal probability of the first place, the product of the first k that of the list's first k places, and
the product of all the probability of the list (`Exploration.list_probability`). `metrics.off_policy` reads all three.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, assert_never

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from peft_combo.errors import PeftComboError, did_you_mean

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
    """The order of click rates drawn from each item's posterior, around what its score leads to expect.

    The posterior of item i is Beta(strength * r_i + clicks_i, strength * (1 - r_i) + views_i - clicks_i), its prior
    mean r_i = sigmoid(logit(rate) + z_i) with z_i the score in standard deviations of the candidates. Its log-odds are
    drawn from the normal distribution of the same mean and variance, whose propensities take milliseconds.

    Attributes:
        clicks, views: (N,) so far, of each candidate; views at least clicks.
        rate: click rate of a candidate of average score.
        strength: so many views the score is worth.
    Source: Chapelle and Li 2011, "An empirical evaluation of Thompson sampling".
    """

    clicks: NDArray[np.float64]
    views: NDArray[np.float64]
    rate: float = 0.05
    strength: float = 20.0

    def __post_init__(self) -> None:
        _check_between("rate", self.rate, 0.0, 1.0)
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


def parse_policy(text: str) -> EpsilonGreedy | PlackettLuce:
    """Read a policy as it is written on a command line: ``epsilon-greedy:0.1``, ``plackett-luce:0.5``.

    Raises:
        PeftComboError: it is none.
    """
    name, _, number = text.partition(":")
    policies: dict[str, type[EpsilonGreedy] | type[PlackettLuce]] = {
        "epsilon-greedy": EpsilonGreedy,
        "plackett-luce": PlackettLuce,
    }
    try:
        return policies[name](float(number))
    except (KeyError, ValueError) as error:
        raise PeftComboError(
            f'Expected epsilon-greedy:SHARE (0 to 1) or plackett-luce:TEMPERATURE (above 0), found "{text}". '
            f"{did_you_mean(name, policies)}".rstrip()
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
            mean, spread = _posterior(own, policy, candidates)
            order = np.argsort(-rng.normal(mean, spread), kind="stable")[:k]
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
            found[:possible] = _thompson_propensities(*_posterior(own, policy, candidates), wanted)
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


def _thompson_propensities(
    mean: NDArray[np.float64], spread: NDArray[np.float64], order: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the conditional probabilities that independent normal draws come in this order, by nested integrals.

    P(x_1 > ... > x_m > all others) = integral of dF_m(y) * above_{m-1}(y) * prod_{others} F_j(y), with above_m(y) =
    integral from y on of dF_m(t) above_{m-1}(t) and above_0 = 1; what is conditional is the ratio of two of these.
    """
    if not len(order):
        return np.empty(0)
    # Nodes where the draws are, so that narrow posteriors have theirs; the masses between nodes are exact.
    quantiles = (mean[:, None] + spread[:, None] * _QUANTILES).ravel()
    grid = np.unique(np.concatenate([quantiles, np.linspace(quantiles.min(), quantiles.max(), _NODES)]))
    cumulative = special.ndtr((grid - mean[:, None]) / spread[:, None])  # (N, G)
    mass = np.diff(cumulative, axis=1)  # (N, G - 1)
    logs = np.log(np.clip((cumulative[:, 1:] + cumulative[:, :-1]) / 2, 1e-300, None))
    others = logs.sum(0)
    above = np.ones(mass.shape[1])
    prefix = np.empty(len(order))
    for place, row in enumerate(order):
        others = others - logs[row]
        cells = mass[row] * above
        prefix[place] = float((cells * np.exp(others)).sum())
        above = np.cumsum(cells[::-1])[::-1] - cells / 2  # from the middle of each cell on
    found: NDArray[np.float64] = np.clip(prefix / np.concatenate([[1.0], prefix[:-1]]), 0.0, 1.0)
    return found


def _posterior(
    scores: NDArray[np.float64], policy: Thompson, candidates: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard deviation of the log-odds of each candidate's click rate, (N,) each."""
    wide = scores.std()
    standard = (scores - scores.mean()) / wide if wide > 0 else np.zeros(len(scores))
    expected = special.expit(special.logit(policy.rate) + standard)
    clicks = np.asarray(policy.clicks, np.float64)[candidates]
    views = np.asarray(policy.views, np.float64)[candidates]
    a, b = policy.strength * expected + clicks, policy.strength * (1 - expected) + views - clicks
    spread = np.sqrt(special.polygamma(1, a) + special.polygamma(1, b))
    return special.digamma(a) - special.digamma(b), spread


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
