"""Repurchase times: how likely a customer takes a thing again within so many days, from who took what when.

Owns the histories of pairs of a user and a thing (an item or a category), the landmark model of their next purchase,
and the figures of how right it was. Knows nothing of texts, vectors or rankings.

Every pair is looked at from moments of the past ("landmarks"): what was known then, and in which later period, if any,
it was taken again. A logistic regression of these periods gives the hazard of each; a pair that was not taken again by
the end of the data counts for the periods that were seen, and says nothing of those that were not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy.special import expit, gammaln

from peft_combo.data.model import Interactions
from peft_combo.errors import DataError
from peft_combo.metrics.regression import fit_logistic, predict_linear
from peft_combo.scoring.popularity import SECONDS_PER_DAY

Floats = NDArray[np.float64]

PERIODS = 13
"""So many periods after a landmark have a hazard of their own; later ones have that of the last."""
_LANDMARKS, _ROWS = 10, 400_000
_FEWEST_EVENTS = 20


@dataclass(frozen=True, eq=False)
class PurchaseHistory:
    """When each user took each thing; what they took on one day counts once.

    Attributes:
        users, things: (P,) of each pair. starts: (P + 1,) where the days of each pair begin.
        days: (E,) whole days since 1970, ascending within a pair.
    """

    users: NDArray[np.int64]
    things: NDArray[np.int64]
    starts: NDArray[np.int64]
    days: Floats

    @classmethod
    def of(cls, interactions: Interactions, things: NDArray[np.integer[Any]]) -> Self:
        """Gather what known users took at known times.

        Args:
            things: (N,) the thing each item of the catalogue is, such as its row or its category; -1 for none.
        Raises:
            DataError: no interaction has both a user and a time.
        """
        own = things[interactions.items]
        kept = np.flatnonzero((interactions.users >= 0) & np.isfinite(interactions.times) & (own >= 0))
        if not len(kept):
            raise DataError(
                f"Times of repurchase need interactions with user_id and timestamp; none of {len(interactions):,} has "
                "both. Add the columns to the table of interactions."
            )
        days = np.floor(interactions.times[kept] / SECONDS_PER_DAY)
        rows = np.unique(np.column_stack([interactions.users[kept], own[kept], days.astype(np.int64)]), axis=0)
        first = np.flatnonzero(np.r_[True, (rows[1:, :2] != rows[:-1, :2]).any(axis=1)])
        starts = np.append(first, len(rows))
        return cls(rows[first, 0], rows[first, 1], starts, rows[:, 2].astype(np.float64))

    def __len__(self) -> int:
        return len(self.users)

    def before(self, day: float) -> PurchaseHistory:
        """Return what happened before a day; a pair without any of it is gone."""
        pair = np.repeat(np.arange(len(self)), np.diff(self.starts))
        inside = self.days < day
        counts = np.bincount(pair[inside], minlength=len(self))
        kept = np.flatnonzero(counts)
        return PurchaseHistory(
            self.users[kept], self.things[kept], np.concatenate([[0], np.cumsum(counts[kept])]), self.days[inside]
        )

    def wait(self, asked: PurchaseHistory, day: float, end: float) -> tuple[Floats, NDArray[np.bool_]]:
        """Return how many days from `day` on each asked pair waited for its next purchase, and whether it came.

        Args:
            asked: pairs of this history, as `before` gives them. end: the day until which anything was seen.
        Returns:
            (P,) days in 1..end - day (a purchase on `day` itself waited 1), and (P,) False where censored at the end.
        """
        pair = np.repeat(np.arange(len(self)), np.diff(self.starts))
        later = (self.days >= day) & (self.days < end)
        waits = np.full(len(self), np.inf)
        np.minimum.at(waits, pair[later], self.days[later] - day + 1)
        width = 1 + int(max(self.things.max(initial=0), asked.things.max(initial=0)))
        places = np.searchsorted(self.users * width + self.things, asked.users * width + asked.things)
        found = waits[places]
        return np.minimum(found, end - day), np.isfinite(found)


@dataclass(frozen=True, eq=False)
class DuePairs:
    """What is told of pairs on a day.

    Attributes:
        users, things: (P,). last: (P,) day of the latest purchase. counts: (P,) purchases so far.
        day: from which on waiting counts. period: days of a period.
        hazards: (P, PERIODS) chance of a purchase in each period, given none before.
    """

    users: NDArray[np.int64]
    things: NDArray[np.int64]
    last: Floats
    counts: NDArray[np.int64]
    day: float
    period: float
    hazards: Floats

    def within(self, days: float) -> Floats:
        """Return the chance of a purchase within so many days: (P,) in [0, 1]."""
        gone = days / self.period
        weights = np.clip(gone - np.arange(PERIODS), 0, 1)
        weights[-1] += max(0.0, gone - PERIODS)
        return np.asarray(-np.expm1(np.log1p(-self.hazards) @ weights), np.float64)

    def median(self) -> Floats:
        """Return the days by which a purchase is as likely as not: (P,), inf where that is beyond ten years."""
        passed = np.cumsum(-np.log1p(-self.hazards), axis=1)  # (P, PERIODS)
        half = np.log(2.0)
        place = (passed < half).sum(axis=1)
        before = np.where(place > 0, np.take_along_axis(passed, np.maximum(place - 1, 0)[:, None], 1)[:, 0], 0.0)
        rate = -np.log1p(-self.hazards[np.arange(len(place)), np.minimum(place, PERIODS - 1)])
        days = (place + (half - before) / np.maximum(rate, 1e-12)) * self.period
        return np.where(days <= 3650, days, np.inf)


@dataclass(frozen=True, eq=False)
class RepurchaseModel:
    """Discrete-time hazards of the next purchase of a pair, read from what is known of it on a day.

    Read are: the pair's rate by a gamma-Poisson posterior around its thing's rate (whose strength the data choose), how
    long ago the last purchase was, alone and as a share of the pair's mean gap, and how often and how recently the user
    took anything. A user who stays away has a lower hazard, so nobody is due for ever.

    Attributes:
        period: days of a period. weights: (F,). centre, spread: (F,) of the columns.
    Source: van Houwelingen 2007, "Dynamic prediction by landmarking in event history analysis"; Singer and Willett
        1993 (discrete-time hazards by logistic regression); Ehrenberg 1959 (gamma-Poisson purchases).
    """

    period: float
    weights: Floats
    centre: Floats
    spread: Floats

    @classmethod
    def fit(cls, history: PurchaseHistory, end: float, *, period: float = 7.0, seed: int = 0) -> Self:
        """Learn from what happened before a day.

        Args:
            end: the day until which anything was seen. period: days.
            seed: of the pairs that are drawn where there are too many.
        Raises:
            DataError: too little was taken again to learn from.
        """
        seen = history.before(end)
        first = float(seen.days.min()) if len(seen) else end
        moments = [end - period * 2 * (place + 1) for place in range(_LANDMARKS)]
        moments = [day for day in moments if day - first >= (end - first) / 3]
        rng, columns, events = np.random.default_rng(seed), [], []
        for day in moments:
            known = seen.before(day)
            waited, came = seen.wait(known, day, end)
            rows = np.arange(len(known))
            most = _ROWS // (len(moments) * PERIODS)
            if len(rows) > most:
                rows = np.sort(rng.choice(rows, most, replace=False))
            facts = _describe(known, day, period)[rows]
            # A period counts where the whole of it was seen, or the purchase came in it.
            last = np.where(came[rows], np.ceil(waited[rows] / period), np.floor(waited[rows] / period))
            last = np.minimum(last, PERIODS).astype(np.int64)
            pair = np.repeat(np.arange(len(rows)), last)
            step = np.arange(len(pair)) - np.repeat(np.cumsum(last) - last, last) + 1
            columns.append(_spread_over(facts[pair], step))
            events.append(came[rows][pair] & (np.ceil(waited[rows] / period)[pair] == step))
        if sum(int(own.sum()) for own in events) < _FEWEST_EVENTS:
            raise DataError(
                f"Times of repurchase are learned from things taken again; expected {_FEWEST_EVENTS} such events, "
                f"found {sum(int(own.sum()) for own in events)}. Give a longer history, or ask by category."
            )
        table, labels = np.concatenate(columns), np.concatenate(events)
        centre, spread = table.mean(axis=0), table.std(axis=0) + 1e-9
        return cls(period, fit_logistic((table - centre) / spread, labels), centre, spread)

    def predict(self, history: PurchaseHistory, day: float) -> DuePairs:
        """Tell of every pair that was taken before a day how likely it is taken again in each period from it on."""
        known = history.before(day)
        facts = _describe(known, day, self.period)
        hazards = np.empty((len(known), PERIODS))
        for place in range(PERIODS):
            table = _spread_over(facts, np.full(len(known), place + 1))
            hazards[:, place] = expit(predict_linear((table - self.centre) / self.spread, self.weights))
        counts = np.diff(known.starts)
        return DuePairs(
            known.users, known.things, known.days[known.starts[1:] - 1], counts, day, self.period,
            np.clip(hazards, 1e-9, 1 - 1e-9),
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Return what was learned as JSON values."""
        return {
            "period": self.period, "weights": self.weights.tolist(), "centre": self.centre.tolist(),
            "spread": self.spread.tolist(),
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Rebuild from `state`.

        Raises:
            ValueError: the arrays do not fit each other.
        """
        weights, centre, spread = (np.asarray(state[name], np.float64) for name in ("weights", "centre", "spread"))
        if centre.shape != spread.shape or weights.shape != (len(centre) + 1,):
            raise ValueError(f"weights, centre and spread do not fit: {weights.shape}, {centre.shape}, {spread.shape}.")
        return cls(float(state["period"]), weights, centre, spread)


def measure_rates(known: PurchaseHistory, day: float, period: float) -> tuple[Floats, Floats]:
    """Return shape and rate (in periods) of the gamma posterior of how often each pair is taken again: (P,), (P,).

    The mean of a pair's prior is its thing's rate, repeats by the time since first purchases, those that never came
    back among them; its strength is the one under which the counts are likeliest.

    Source: Robbins 1956 (empirical Bayes); Greenwood and Yule 1920 (negative binomial).
    """
    repeats = (np.diff(known.starts) - 1).astype(np.float64)
    watched = np.maximum(day - known.days[known.starts[:-1]], 0.5) / period
    overall = max(repeats.sum(), 0.5) / watched.sum()
    of_thing = np.bincount(known.things, weights=repeats) + 1
    prior = (of_thing / (np.bincount(known.things, weights=watched) + 1 / overall))[known.things]  # (P,)

    def loss(log_strength: float) -> float:
        strength = np.exp(log_strength)
        mean = prior * watched
        told = gammaln(strength + repeats) - gammaln(strength)
        told += strength * np.log(strength / (strength + mean)) + repeats * np.log(mean / (strength + mean))
        return -float(told.mean())

    strength = float(np.exp(optimize.minimize_scalar(loss, bounds=(-4.0, 5.0), method="bounded").x))
    return strength + repeats, strength / prior + watched


def _describe(known: PurchaseHistory, day: float, period: float) -> Floats:
    """Return what is known of each pair on a day: (P, 8)."""
    shape, rate = measure_rates(known, day, period)
    first, last = known.days[known.starts[:-1]], known.days[known.starts[1:] - 1]
    repeats = np.diff(known.starts) - 1
    elapsed = np.maximum(day - last, 0.5) / period
    mean_gap = np.maximum(last - first, 0.5) / np.maximum(repeats, 1) / period
    pair = np.repeat(np.arange(len(known)), np.diff(known.starts))
    visits = np.unique(np.column_stack([known.users[pair], known.days.astype(np.int64)]), axis=0)
    size = int(known.users.max(initial=0)) + 1
    count = np.bincount(visits[:, 0], minlength=size)[known.users]
    earliest, latest = np.full(size, np.inf), np.full(size, -np.inf)
    np.minimum.at(earliest, visits[:, 0], visits[:, 1])
    np.maximum.at(latest, visits[:, 0], visits[:, 1])
    away = np.maximum(day - latest[known.users], 0.5) / period
    active = count / ((day - earliest[known.users]) / period + 4)
    share = np.where(repeats > 0, np.log(np.clip(elapsed / mean_gap, 0.05, 20)), 0.0)
    return np.column_stack(
        [
            np.log(shape / rate), np.log(elapsed), share, np.square(share), repeats > 0, np.log1p(repeats),
            np.log(away), np.log(active),
        ]
    ).astype(np.float64)  # fmt: skip


def _spread_over(facts: Floats, step: NDArray[np.int64]) -> Floats:
    """Return the columns of periods: (M, 8) facts of each, and its number after the landmark from 1 on."""
    number = np.log(step)
    due = np.log(np.clip(np.exp(facts[:, 2]) * (1 + step / np.exp(facts[:, 1])), 0.05, 40)) * facts[:, 4]
    extra = [number, np.square(number), step == 1, due, np.square(due), number * facts[:, 1], number * facts[:, 6]]
    return np.column_stack([facts, *extra])
