"""Watch over opinion: the share of a class of texts per day or week, corrected for errors, and an alarm when it rises.

Owns the windows of time and what an alarm means. Knows classes that were given, not how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from peft_combo.errors import DataError
from peft_combo.metrics.control_chart import Cusum
from peft_combo.metrics.quantification import ErrorRates, adjust_share

Window = Literal["day", "week"]
_DAY = 86_400.0
_FEWEST = 30  # texts of the baseline


@dataclass(frozen=True)
class WindowShare:
    """One window of time.

    Attributes:
        start: its first day, ISO 8601, UTC; weeks begin on Mondays. texts: in it. given: of them with the class.
        share: of the class, corrected; low, high: its 95 % interval. cusum: of the chart; None for the baseline.
    """

    start: str
    texts: int
    given: int
    share: float
    low: float
    high: float
    cusum: float | None


@dataclass(frozen=True)
class WatchReport:
    """What was found.

    Attributes:
        usual: share of the class in the baseline, corrected. rise: above it, what the chart is to find.
        limit: of the chart. arl: windows that pass on the mean before a false alarm.
        alarm: start of the first window at which the limit was reached; None for none.
    """

    windows: tuple[WindowShare, ...]
    usual: float
    rise: float
    limit: float
    arl: float
    alarm: str | None

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def watch_share(
    times: NDArray[np.float64], given: NDArray[np.bool_], *, window: Window = "week", baseline: int = 8,
    rise: float = 0.1, arl: float = 100.0, rates: ErrorRates | None = None, seed: int = 0,
) -> WatchReport:  # fmt: skip
    """Watch the share of a class for a rise above what it was in the first windows.

    Args:
        times: (M,) seconds since 1970-01-01 UTC, in any order. given: (M,) texts that a classifier gave the class.
        window: of time; windows without a text are left out.
        baseline: first windows that say what is usual; the chart runs over those after.
        rise: of the corrected share, in (0, 1), that is to be found.
        arl: windows that pass on the mean before a false alarm.
        rates: of the classifier; None where the classes are known.
    Raises:
        DataError: there are too few windows or texts, or the share cannot rise so far.
    """
    if not len(times) or not np.isfinite(times).all():
        raise DataError("Expected texts with a time each, found none or some without.")
    days = np.floor(times / _DAY).astype(np.int64)
    starts = days if window == "day" else days - (days + 3) % 7  # 1970-01-01 was a Thursday
    names, place = np.unique(starts, return_inverse=True)
    sizes, counts = np.bincount(place), np.bincount(place, weights=given).astype(np.int64)
    if len(names) <= baseline or sizes[:baseline].sum() < _FEWEST:
        raise DataError(
            f"Expected more than {baseline} {window}s with texts, and {_FEWEST} texts in the first {baseline}; found "
            f"{len(names)} {window}s and {sizes[:baseline].sum():,} texts. Give more texts, or change --baseline."
        )
    seen, n = int(counts[:baseline].sum()), int(sizes[:baseline].sum())
    usual = adjust_share(seen, n, rates)[0]
    if usual + rise >= 1:
        raise DataError(f"The usual share is {usual:.1%} and cannot rise by {rise:.1%}. Give a smaller --rise.")
    # What the chart counts are given classes, errors and all: shares become rates of these.
    true, false = (1.0, 0.0) if rates is None else (rates.true_rate, rates.false_rate)
    counted = (seen + 0.5) / (n + 1)
    chart = Cusum.design(counted, min(counted + rise * (true - false), 1 - 1e-6), sizes.tolist(), arl, seed)
    values = chart.run(counts[baseline:], sizes[baseline:])
    shares = [adjust_share(int(c), int(s), rates) for c, s in zip(counts, sizes, strict=True)]
    over = np.flatnonzero(values >= chart.limit)
    windows = tuple(
        WindowShare(_name(start), int(sizes[row]), int(counts[row]), *shares[row],
                    None if row < baseline else float(values[row - baseline]))
        for row, start in enumerate(names.tolist())
    )  # fmt: skip
    alarm = windows[baseline + int(over[0])].start if len(over) else None
    return WatchReport(windows, usual, rise, chart.limit, arl, alarm)


def _name(day: int) -> str:
    return datetime.fromtimestamp(day * _DAY, UTC).date().isoformat()


def measure_rates(given: Sequence[bool] | NDArray[np.bool_], right: Sequence[bool] | NDArray[np.bool_]) -> ErrorRates:
    """Count the errors of a classifier on texts whose class is known: (M,) given and (M,) right.

    Raises:
        DataError: the classes say nothing of the share.
    """
    said, truth = np.asarray(given, bool), np.asarray(right, bool)
    try:
        return ErrorRates(int((said & truth).sum()), int(truth.sum()), int((said & ~truth).sum()), int((~truth).sum()))
    except ValueError as error:
        raise DataError(f"The classifier's errors cannot be corrected for: {error}") from error
