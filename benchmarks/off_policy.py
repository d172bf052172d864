"""How far off-policy estimates may be trusted: bias, error and coverage in a made-up shop whose truth is known.

    OMP_NUM_THREADS=1 python benchmarks/off_policy.py                 # minutes
    OMP_NUM_THREADS=1 python benchmarks/off_policy.py --smoke

A recommender shows lists of five of twenty items, drawn by `serving.exploration`; a candidate that differs little
(near) or much (far) is judged from that log by `metrics.off_policy`. Users click by one of three laws: by item and
place alone, as long as they are not satisfied (cascade), or less where items of the list are alike (list). The truth is
the mean expected reward of lists drawn by the candidate. One row is one law, estimator and slate model over all
repeats: bias and root mean squared error in clicks per list, the share of 95 % intervals that held the truth, the mean
effective sample.

A last table is of Thompson sampling, which changes with what it sees: eight items, of which the best has the lowest
score, lists of two, counters read every ten lists; the candidate knows the best one.
"""

from __future__ import annotations

import argparse
from itertools import permutations
from typing import Any

import numpy as np
from _smoke import add_smoke
from numpy.typing import NDArray

from peft_combo.metrics.off_policy import Estimator, RewardModel, SlateModel, estimate_value
from peft_combo.serving.exploration import (
    EpsilonGreedy,
    ExplorationPolicy,
    PlackettLuce,
    Thompson,
    compute_propensities,
    explore,
)

ITEMS, PLACES = 20, 5
LAWS = ("position", "cascade", "list")
ESTIMATES: tuple[tuple[Estimator, SlateModel], ...] = (
    ("ips", "list"), ("snips", "list"), ("ips", "cascade"), ("snips", "cascade"), ("dr", "cascade"),
)  # fmt: skip
POLICIES: dict[str, ExplorationPolicy] = {"epsilon-greedy": EpsilonGreedy(0.3), "Plackett-Luce": PlackettLuce(0.5)}
NOISE = {"near": 0.3, "far": 1.5}
Array = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--lists", type=int, default=6, help="of each user")
    add_smoke(parser)
    options = parser.parse_args()
    if options.smoke:
        options.repeats, options.users, options.lists = 3, 15, 2
    print(f"{options.repeats} logs of {options.users} users with {options.lists} lists each, {PLACES} of {ITEMS} items")
    print(f"{'policy':15}{'candidate':10}{'clicks by':10}{'estimate':17}{'truth':>7}{'bias':>8}{'error':>8}"
          f"{'coverage':>10}{'effective':>11}")  # fmt: skip
    for policy_name, policy in POLICIES.items():
        for distance, noise in NOISE.items():
            for line in measure(policy, noise, options):
                print(f"{policy_name:15}{distance:10}{line}", flush=True)
    print(f"\n{'Thompson':15}{'lists':>7}{'estimate':>15}{'truth':>7}{'bias':>8}{'error':>8}{'coverage':>10}"
          f"{'effective':>11}{'best first':>12}")  # fmt: skip
    for lists in (60,) if options.smoke else (300, 1000):
        for line in measure_thompson(lists, options.repeats):
            print(line, flush=True)


def measure(policy: ExplorationPolicy, noise: float, options: argparse.Namespace) -> list[str]:
    """Estimate the candidate in every repeat, under every law, and compare with the truth."""
    truth: dict[str, list[float]] = {law: [] for law in LAWS}
    found: dict[tuple[str, str], list[Any]] = {}
    for repeat in range(options.repeats):
        rng = np.random.default_rng(repeat)
        tastes = rng.normal(size=(options.users, ITEMS))
        logging = tastes + rng.normal(size=tastes.shape)
        candidate = logging + noise * rng.normal(size=tastes.shape)
        rates = 1 / (1 + np.exp(2 - tastes))
        users = np.repeat(np.arange(options.users), options.lists)
        shown, logged, asked = [], [], []
        for place, user in enumerate(users):
            drawn = explore(logging[user], PLACES, policy, f"{repeat} {place}")
            shown.append(drawn.order)
            logged.append(drawn.propensities)
            asked.append(compute_propensities(candidate[user], drawn.order, policy))
            other = explore(candidate[user], PLACES, policy, f"truth {repeat} {place}").order
            for law in LAWS:
                truth[law].append(float(expect_clicks(law, rates[user], other).sum()))
        rows, mine, theirs = (np.array(part) for part in (shown, logged, asked))
        guess = np.full((len(users), PLACES), 0.12)  # a rough reward model: every item and place alike
        model = RewardModel(guess, guess)
        for law in LAWS:
            chances = np.array([expect_clicks(law, rates[user], row) for user, row in zip(users, rows, strict=True)])
            clicks = (rng.random(chances.shape) < chances).astype(np.float64)
            for estimator, slate in ESTIMATES:
                own = model if estimator == "dr" else None
                told = estimate_value(
                    clicks, mine, theirs, users, estimator=estimator, model=slate, predicted=own, n=300, seed=repeat
                )
                found.setdefault((law, f"{estimator} {slate}"), []).append(told)
    lines = []
    for (law, name), estimates in found.items():
        right = float(np.mean(truth[law]))
        values = np.array([one.value for one in estimates])
        held = np.mean([one.interval[0] <= right <= one.interval[1] for one in estimates])
        error = np.sqrt(np.mean((values - right) ** 2))
        effective = np.mean([one.effective_size for one in estimates])
        lines.append(
            f"{law:10}{name:17}{right:7.3f}{values.mean() - right:+8.3f}{error:8.3f}{held:10.2f}{effective:11.0f}"
        )
    return lines


def measure_thompson(lists: int, repeats: int) -> list[str]:
    """Judge a candidate from logs that Thompson sampling drew while it learned."""
    rates, scores, batch = np.array([0.1] * 7 + [0.6]), np.linspace(1, -1, 8), 10
    other, wanted = np.array([*scores[:7], 2.0]), PlackettLuce(0.5)
    truth = sum(
        float(np.prod(compute_propensities(other, one, wanted)) * rates[list(one)].sum())
        for one in permutations(range(8), 2)
    )
    found: dict[tuple[Estimator, SlateModel], list[Any]] = {}
    best = []
    for repeat in range(repeats):
        rng, clicks, views = np.random.default_rng(repeat), np.zeros(8), np.zeros(8)
        shown, earned, logged = [], [], []
        for start in range(0, lists, batch):
            policy = Thompson(clicks.copy(), views.copy())
            for place in range(start, start + batch):
                drawn = explore(scores, 2, policy, f"{repeat} {place}")
                shown.append(drawn.order)
                logged.append(drawn.propensities)
                earned.append((rng.random(2) < rates[drawn.order]).astype(np.float64))
                views[drawn.order] += 1
                clicks[drawn.order] += earned[-1]
        best.append(np.mean([order[0] == 7 for order in shown[-100:]]))
        asked = [compute_propensities(other, order, wanted) for order in shown]
        for estimator, slate in ESTIMATES[:4]:
            told = estimate_value(earned, logged, asked, np.arange(lists), estimator=estimator, model=slate, n=300)
            found.setdefault((estimator, slate), []).append(told)
    lines = []
    for (estimator, slate), estimates in found.items():
        values = np.array([one.value for one in estimates])
        held = np.mean([one.interval[0] <= truth <= one.interval[1] for one in estimates])
        error, effective = np.sqrt(np.mean((values - truth) ** 2)), np.mean([one.effective_size for one in estimates])
        lines.append(
            f"{'':15}{lists:7}{estimator + ' ' + slate:>15}{truth:7.3f}{values.mean() - truth:+8.3f}{error:8.3f}"
            f"{held:10.2f}{effective:11.0f}{np.mean(best):12.2f}"
        )
    return lines


def expect_clicks(law: str, rates: Array, order: NDArray[np.int64]) -> Array:
    """Return the chance of a click at every place."""
    own = rates[order]
    if law == "position":
        return np.asarray(own / np.log2(np.arange(2, len(order) + 2)))
    if law == "cascade":
        return np.asarray(own * np.concatenate([[1.0], np.cumprod(1 - own)[:-1]]))
    alike = np.array([np.sum(order % 4 == item % 4) - 1 for item in order])  # four kinds of items
    return np.asarray(own * 0.6**alike)


if __name__ == "__main__":
    main()
