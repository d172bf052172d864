"""How right times of repurchase are: a model of what came before a day, measured on what came after it.

Owns the protocol and the baselines. The model is `recommender.repurchase`'s, the figures are `metrics.survival`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.errors import DataError
from peft_combo.metrics.probability import reliability
from peft_combo.metrics.survival import average_brier, brier, concordance
from peft_combo.recommender.repurchase import PurchaseHistory, RepurchaseModel, measure_rates

Floats = NDArray[np.float64]

LANDMARK, STEP, MEMORYLESS, POSTERIOR, BASE = (
    "landmark hazards", "mean gap", "mean gap, memoryless", "gamma-Poisson", "nobody told apart"
)  # fmt: skip
_HELD_OUT, _MOST_COMPARED = 0.2, 8_000


@dataclass(frozen=True)
class RepurchaseRow:
    """One way to tell when a thing is taken again.

    Attributes:
        concordance: Harrell's C of the chance within the middle horizon. brier: at that horizon.
        integrated_brier: over all horizons. mean_chance: mean of the chances, beside `RepurchaseReport.share`.
        error: mean absolute days between the median and the purchase, of pairs whose purchase was seen.
        bins: of `metrics.probability.reliability`.
    """

    name: str
    concordance: float
    brier: float
    integrated_brier: float
    mean_chance: float
    error: float
    bins: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class RepurchaseReport:
    """Figures of a division by time.

    Attributes:
        pairs: that were taken before; repeated: of these, twice or more. watched: days of the held-out time.
        horizons: days at which chances are judged. share: of pairs taken again within the middle one.
        every, often: rows over all pairs, and over those that were taken twice or more.
    """

    pairs: int
    repeated: int
    watched: float
    horizons: tuple[float, ...]
    share: float
    every: tuple[RepurchaseRow, ...]
    often: tuple[RepurchaseRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def measure_repurchase(
    history: PurchaseHistory, *, held_out: float = _HELD_OUT, until: float | None = None, period: float = 7.0,
    seed: int = 0,
) -> RepurchaseReport:  # fmt: skip
    """Fit on the earlier part of the time, and tell who takes what again in the later one.

    Everybody is watched until the same day, so what is not seen again is censored there and at no time before.

    Args:
        held_out: share of the time that is measured on, in (0, 1). until: a day; nothing from it on is looked at.
    Raises:
        DataError: the time is too short, or too little was taken again.
    """
    first, end = float(history.days.min()), float(history.days.max()) + 1 if until is None else until
    day = float(np.floor(first + (end - first) * (1 - held_out)))
    watched = end - day
    if watched < 4 or day - first < 8 * period:
        raise DataError(
            f"Times of repurchase are measured on {held_out:.0%} of the time; it lasts {end - first:.0f} days. Give "
            f"{10 * period:.0f} days or more."
        )
    horizons = tuple(float(max(1, round(watched * share))) for share in (0.15, 0.3, 0.6, 0.9))
    known = history.before(day)
    waited, came = history.before(end).wait(known, day, end)
    model = RepurchaseModel.fit(history, day, period=period, seed=seed)
    ways = {LANDMARK: model.predict(history, day)}
    told = {name: (_tell(one.within, horizons), one.median()) for name, one in ways.items()}
    told |= _list_baselines(known, day, period, horizons)
    repeated = np.diff(known.starts) > 1
    rng = np.random.default_rng(seed)

    def rows(chosen: NDArray[np.int64]) -> tuple[RepurchaseRow, ...]:
        compared = chosen if len(chosen) <= _MOST_COMPARED else rng.choice(chosen, _MOST_COMPARED, replace=False)
        found = []
        for name, (chances, median) in told.items():
            own, middle = chances[chosen], horizons[1]
            if name == BASE:  # the share of these pairs: no way that tells them apart may lose to it
                own = np.tile([float((came & (waited <= days))[chosen].mean()) for days in horizons], (len(chosen), 1))
            due = (came & (waited <= middle))[chosen]
            seen = chosen[came[chosen]]
            found.append(
                RepurchaseRow(
                    name, concordance(waited[compared], came[compared], chances[compared, 1]),
                    brier(waited[chosen], came[chosen], own[:, 1], middle),
                    average_brier(waited[chosen], came[chosen], own, horizons), float(own[:, 1].mean()),
                    float(np.abs(np.minimum(median, watched) - waited)[seen].mean()) if len(seen) else float("nan"),
                    reliability(own[:, 1], due.astype(np.float32), 10),
                )
            )  # fmt: skip
        return tuple(found)

    often = np.flatnonzero(repeated)
    return RepurchaseReport(
        len(known), int(repeated.sum()), watched, horizons, float((came & (waited <= horizons[1])).mean()),
        rows(np.arange(len(known))), rows(often) if len(often) else (),
    )  # fmt: skip


def _tell(within: Any, horizons: tuple[float, ...]) -> Floats:
    return np.column_stack([within(days) for days in horizons])


def _list_baselines(
    known: PurchaseHistory, day: float, period: float, horizons: tuple[float, ...]
) -> Mapping[str, tuple[Floats, Floats]]:
    """Return chances (P, H) and median days (P,) of each baseline; those of the last are the caller's to put in."""
    first, last = known.days[known.starts[:-1]], known.days[known.starts[1:] - 1]
    repeats = np.diff(known.starts) - 1
    own = repeats > 0
    gaps = np.where(own, (last - first) / np.maximum(repeats, 1), np.nan)
    overall = float(np.nanmean(gaps)) if own.any() else day - float(first.min())
    counts = np.bincount(known.things[own], minlength=int(known.things.max()) + 1)
    sums = np.bincount(known.things[own], weights=gaps[own], minlength=len(counts))
    of_thing = np.where(counts > 0, sums / np.maximum(counts, 1), overall)
    gap = np.where(own, gaps, of_thing[known.things])
    rest = np.maximum(last + gap - day, 0) + 1
    shape, rate = measure_rates(known, day, period)
    return {
        POSTERIOR: (
            _tell(lambda days: 1 - (1 + days / period / rate) ** -shape, horizons),
            (2 ** (1 / shape) - 1) * rate * period,
        ),
        STEP: (_tell(lambda days: (rest <= days).astype(np.float64), horizons), rest),
        MEMORYLESS: (_tell(lambda days: -np.expm1(-days / gap), horizons), gap * np.log(2)),
        BASE: (np.zeros((len(gap), len(horizons))), np.full(len(gap), np.inf)),
    }
