"""Off-policy evaluation of a candidate recommender: what it would have earned on the lists that the service logged.

Owns which logged lists can be judged and how probable the candidate would have shown them. The estimators are
`metrics.off_policy`'s; how lists are drawn from scores is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.use import LoggedList
from peft_combo.errors import DataError
from peft_combo.metrics.off_policy import Estimate, Estimator, SlateModel, estimate_value

Propensities = Callable[[NDArray[np.float64], NDArray[np.int64]], NDArray[np.float64]]
"""(N,) scores and (K,) rows in order to the probability of each at its place given those before it."""

ESTIMATES: tuple[tuple[Estimator, SlateModel], ...] = (("snips", "cascade"), ("snips", "list"), ("ips", "cascade"))


@dataclass(frozen=True)
class OffPolicyReport:
    """What a candidate would have earned per list.

    Attributes:
        estimates: by estimator and slate model, the one to read first.
        judged: lists, of `logged`. left_out: reason -> how many lists.
    """

    candidate: str
    estimates: Mapping[str, Estimate]
    judged: int
    logged: int
    left_out: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "candidate": self.candidate,
            "judged": self.judged,
            "logged": self.logged,
            "left_out": dict(self.left_out),
            "estimates": {name: asdict(one) for name, one in self.estimates.items()},
        }


def judge_candidate(
    name: str, lists: Sequence[LoggedList], score: Callable[[tuple[str, ...]], Mapping[str, float]],
    propensities: Propensities, *, seed: int = 0,
) -> OffPolicyReport:  # fmt: skip
    """Estimate what a candidate would have earned from what was shown.

    Lists without propensities, or of a person or a query without items, are left out: of the first nothing is known,
    and what the candidate would have made of the second cannot be asked again from keys alone.

    Args:
        score: the items that the candidate would draw from for a context, id -> score; asked once per context.
        propensities: how the candidate draws.
    Raises:
        DataError: nothing is left to judge, or the candidate shows none of it.
    """
    left_out = {"no propensities": 0, "no items given": 0}
    known: dict[tuple[str, ...], Mapping[str, float]] = {}
    rows: list[tuple[LoggedList, NDArray[np.float64]]] = []
    for one in lists:
        if one.propensities is None:
            left_out["no propensities"] += 1
        elif not one.context:
            left_out["no items given"] += 1
        else:
            if one.context not in known:
                known[one.context] = score(one.context)
            rows.append((one, _find_probabilities(one, known[one.context], propensities)))
    if not rows:
        raise DataError(
            f"Expected logged lists with propensities and the items they were shown for, found none among "
            f"{len(lists):,}. Let the service explore, and log for a while."
        )
    width = max(len(one.items) for one, _ in rows)
    rewards, logged, candidate = (np.full((len(rows), width), np.nan) for _ in range(3))
    for place, (one, probabilities) in enumerate(rows):
        size = slice(len(one.items))
        rewards[place, size], logged[place, size], candidate[place, size] = one.rewards, one.propensities, probabilities
    groups = np.array([one.group for one, _ in rows])
    try:
        estimates = {
            f"{estimator.upper()}, {model}": estimate_value(
                rewards, logged, candidate, groups, estimator=estimator, model=model, seed=seed
            )
            for estimator, model in ESTIMATES
        }
    except ValueError as error:
        raise DataError(f"{name} cannot be judged by this log. {error}") from error
    return OffPolicyReport(name, estimates, len(rows), len(lists), left_out)


def _find_probabilities(
    one: LoggedList, scores: Mapping[str, float], propensities: Propensities
) -> NDArray[np.float64]:
    """Return how probable each shown item is at its place under the candidate, 0 from one on that it never draws."""
    names = list(dict.fromkeys([*scores, *one.items]))  # an item it does not draw from has no score
    place = {item: row for row, item in enumerate(names)}
    values = np.array([scores.get(item, np.nan) for item in names], np.float64)
    return propensities(values, np.array([place[item] for item in one.items], np.int64))
