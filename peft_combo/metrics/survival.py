"""Metrics of times to an event of which some are censored: Kaplan-Meier, concordance, Brier scores.

Knows numbers only. A time is how long something was watched; it is right-censored where the event had not come by then.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peft_combo.machine import row_blocks

Floats = NDArray[np.float64]


def kaplan_meier(times: ArrayLike, came: ArrayLike) -> tuple[Floats, Floats]:
    """Return the moments at which events came, and the share that is still without one after each.

    Args:
        times: (P,) any unit, >= 0. came: (P,) True where the event came, False where the time is censored.
    Returns:
        (M,) distinct moments ascending and (M,) shares; both empty where no event came.
    Raises:
        ValueError: shapes differ, nothing is there, or a time is negative or not finite.
    Source: Kaplan and Meier 1958; at equal times events come before censoring.
    """
    waited, events = _check(times, came)
    moments, place = np.unique(waited, return_inverse=True)
    coming = np.bincount(place, weights=events, minlength=len(moments))
    leaving = np.bincount(place, minlength=len(moments))
    at_risk = len(waited) - np.concatenate([[0], np.cumsum(leaving)[:-1]])
    share = np.cumprod(1 - coming / at_risk)
    return moments[coming > 0], share[coming > 0]


def concordance(times: ArrayLike, came: ArrayLike, risks: ArrayLike) -> float:
    """Return how often, of two of which the one is known to come first, that one had the higher risk; ties for half.

    Args:
        times, came: as for `kaplan_meier`. risks: (P,) higher is sooner.
    Returns:
        Harrell's C; 0.5 where no two can be compared.
    Raises:
        ValueError: as for `kaplan_meier`, or risks have another shape.
    Source: Harrell et al. 1982, "Evaluating the yield of medical tests".
    """
    waited, events = _check(times, came)
    score = np.asarray(risks, np.float64)
    if score.shape != waited.shape:
        raise ValueError(f"risks must be {waited.shape}, found {score.shape}.")
    right = total = 0.0
    first = np.flatnonzero(events)
    for block in row_blocks(len(first), len(waited)):
        own = first[block]
        # Whoever is censored at the moment of an event had it later.
        later = waited[None, :] > waited[own, None]
        later |= (waited[None, :] == waited[own, None]) & ~events[None, :]
        right += float((later & (score[own, None] > score[None, :])).sum())
        right += 0.5 * float((later & (score[own, None] == score[None, :])).sum())
        total += float(later.sum())
    return right / total if total else 0.5


def brier(times: ArrayLike, came: ArrayLike, chances: ArrayLike, horizon: float) -> float:
    """Return the mean squared error of the chance that the event comes within a horizon.

    Who was lost before the horizon is left out, and who was not stands for them: each counts by one over the chance of
    not having been lost by then. Where all are watched for as long as the horizon this is the plain mean.

    Args:
        times, came: as for `kaplan_meier`. chances: (P,) in [0, 1].
        horizon: in the unit of times.
    Raises:
        ValueError: as for `kaplan_meier`, chances do not fit, or nobody was watched for so long.
    Source: Graf et al. 1999, "Assessment and comparison of prognostic classification schemes for survival data".
    """
    waited, events = _check(times, came)
    told = np.asarray(chances, np.float64)
    if told.shape != waited.shape or not np.all((told >= 0) & (told <= 1)):
        raise ValueError(f"chances must be {waited.shape} in [0, 1], found {told.shape}.")
    moments, kept = kaplan_meier(waited, ~events)
    steps = np.concatenate([[1.0], kept])
    due, open_still = events & (waited <= horizon), (waited > horizon) | (~events & (waited == horizon))
    # Just before the moment of an event: who is censored at that moment was there for it.
    weights = np.zeros(len(waited))
    weights[due] = steps[np.searchsorted(moments, waited[due], "left")]
    weights[open_still] = steps[np.searchsorted(moments, horizon, "left")]
    inside = due | open_still
    if not inside.any() or not np.all(weights[inside] > 0):
        raise ValueError(f"Nobody was watched for {horizon:g}; the longest time is {waited.max():g}.")
    errors = np.square(told - due)[inside] / weights[inside]
    return float(errors.sum() / len(waited))


def average_brier(times: ArrayLike, came: ArrayLike, chances: ArrayLike, horizons: Sequence[float]) -> float:
    """Return `brier` averaged over the time between the first and the last horizon, by trapezia.

    Args:
        chances: (P, H), one column per horizon. horizons: (H,) ascending, H >= 2.
    Raises:
        ValueError: as for `brier`, or the horizons do not ascend.
    """
    told = np.asarray(chances, np.float64)
    if len(horizons) < 2 or np.any(np.diff(horizons) <= 0) or told.ndim != 2 or told.shape[1] != len(horizons):
        raise ValueError(f"Expected two ascending horizons or more and a column for each, found {told.shape}.")
    scores = [brier(times, came, told[:, place], horizon) for place, horizon in enumerate(horizons)]
    return float(np.trapezoid(scores, horizons) / (horizons[-1] - horizons[0]))


def _check(times: ArrayLike, came: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    waited, events = np.asarray(times, np.float64), np.asarray(came, bool)
    if waited.ndim != 1 or waited.shape != events.shape or not waited.size:
        raise ValueError(f"times and came must be (P,) with P >= 1, found {waited.shape} and {events.shape}.")
    if not np.all(np.isfinite(waited)) or waited.min() < 0:
        raise ValueError("times must be finite and not negative.")
    return waited, events
