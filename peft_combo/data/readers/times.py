"""Numbers as times: the unit or the date that a column of numbers holds, recognised by its range.

Owns which numbers can only be seconds, milliseconds or a date written as a number, and which could be several things.
All times are seconds since 1970-01-01 UTC.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Values: TypeAlias = NDArray[np.float64]

EARLIEST, LATEST = 0.0, 7_258_118_400.0  # 1970 to 2200
_YEAR = 31_557_600.0
# What shops record lies in these years: a number that is a moment in them in one unit is none in any other.
_FIRST, _LAST = 631_152_000.0, 4_102_444_800.0  # 1990 to 2100
UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
_SPELLED = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


@dataclass(frozen=True)
class Reading:
    """What numbers may be taken for.

    Attributes:
        key: what `data.time_format` calls it.
        words: "milliseconds since 1970", for messages.
        certain: whether nothing else has numbers like these, so that they may be read without asking.
        seconds: (n,) numbers to (n,) seconds, NaN where a number is no such time.
    """

    key: str
    words: str
    certain: bool
    seconds: Callable[[Values], Values]


def _in_unit(key: str) -> Reading:
    per_second = UNITS[key]

    def seconds(values: Values) -> Values:
        moments = values / per_second
        return np.where((moments >= _FIRST) & (moments < _LAST), moments, np.nan)

    return Reading(key, f"{_SPELLED[key]} since 1970", True, seconds)


def _as_digits(key: str, words: str, digits: int, certain: bool) -> Reading:
    """Read numbers whose decimal digits are year, month, day, hour, minute, second, as many as there are."""

    def seconds(values: Values) -> Values:
        whole = np.isfinite(values) & (values == np.floor(values))
        whole &= (values >= 10.0 ** (digits - 1)) & (values < 10.0**digits)
        rest = np.where(whole, values, 0.0).astype(np.int64)
        fields = []
        for _ in range((digits - 4) // 2):
            fields.append(rest % 100)
            rest //= 100
        year, clock = rest, fields[::-1]
        month, day, hour, minute, second = [*clock, *(np.full_like(year, low) for low in (1, 1, 0, 0, 0)[len(clock) :])]
        valid = whole & (year >= 1990) & (year < 2100) & (month >= 1) & (month <= 12) & (day >= 1)
        valid &= (hour < 24) & (minute < 60) & (second < 60)
        months = np.where(valid, (year - 1970) * 12 + month - 1, 0).astype("datetime64[M]")
        length = ((months + 1).astype("datetime64[D]") - months.astype("datetime64[D]")).astype(np.int64)
        valid &= day <= length
        days = months.astype("datetime64[D]").astype(np.int64) + day - 1
        return np.where(valid, days * 86_400.0 + hour * 3_600 + minute * 60 + second, np.nan)

    return Reading(key, words, certain, seconds)


def _excel(values: Values) -> Values:
    """Read days since 1899-12-30, as spreadsheets store dates."""
    return np.where((values >= 32_874) & (values < 73_051), np.round((values - 25_569) * 86_400), np.nan)


def _days(values: Values) -> Values:
    return np.where((values >= 7_305) & (values < 32_874), values * 86_400, np.nan)


READINGS = (
    *(_in_unit(key) for key in UNITS),
    _as_digits("%Y%m%d", "dates such as 20240531", 8, certain=True),
    _as_digits("%Y%m%d%H%M%S", "times such as 20240531180000", 14, certain=True),
    _as_digits("%Y%m%d%H%M", "times such as 202405311800", 12, certain=True),
    _as_digits("%Y%m%d%H", "hours such as 2024053118", 10, certain=False),
    _as_digits("%Y%m", "months such as 202405", 6, certain=False),
    _as_digits("%Y", "years such as 2024", 4, certain=False),
    Reading("excel", "days of a spreadsheet (44941 is 2023-01-15)", False, _excel),
    Reading("days", "days since 1970", False, _days),
)


@dataclass(frozen=True, eq=False)
class Recognised:
    """What a column of numbers was taken for.

    Attributes:
        seconds: (n,) NaN where there is no number, or none that was taken for a time.
        misfits: (n,) bool, numbers that are no such time.
        words: what the numbers were taken for; "" where no reading fits most of them and they stand as seconds.
        choices: the readings that are possible where none is certain; then nothing was taken.
        note: what is to be said of the reading.
    """

    seconds: Values
    misfits: NDArray[np.bool_]
    words: str
    choices: tuple[Reading, ...] = ()
    note: str = ""


def recognise(values: Values, now: float) -> Recognised:
    """Tell what numbers of a column of times are.

    Numbers of 1990 to 2100 in seconds, milli-, micro- or nanoseconds lie in ranges that do not touch, and neither
    does a date written as eight digits: the reading that fits most is taken, and what it does not fit is a misfit.
    Where no such reading fits most, the column may be ambiguous (days of a spreadsheet, years, months), which is for
    its owner to say; smaller numbers are taken for seconds of 1970, which orders events and says nothing else.

    Args:
        values: (n,) NaN where a cell is empty.
        now: seconds since 1970: ten digits of which all are hours written out and most lie in the future as seconds
            are ambiguous.
    """
    there = np.isfinite(values)
    total = int(there.sum())
    if not total:
        return Recognised(values, np.zeros(len(values), bool), "")
    fitting = {one.key: (one, one.seconds(values)) for one in READINGS}
    counts = {key: int(np.isfinite(seconds).sum()) for key, (_, seconds) in fitting.items()}
    likely = max(counts, key=counts.__getitem__)
    reading, seconds = fitting[likely]
    if 2 * counts[likely] <= total:
        misfits = there & ((values < EARLIEST) | (values >= LATEST))
        last = np.nanmax(np.where(misfits, np.nan, values)) if (there & ~misfits).any() else np.nan
        note = ""
        if last < _YEAR:
            note = f"holds small numbers (up to {last:,.0f}): they order events, and count as seconds of 1970"
        return Recognised(np.where(misfits, np.nan, values), misfits, "", note=note)
    if likely == "s" and counts["%Y%m%d%H"] == total and np.nanmedian(values) > now:
        return Recognised(np.full(len(values), np.nan), there, "", (fitting["%Y%m%d%H"][0], fitting["s"][0]))
    if not reading.certain:
        possible = tuple(one for key, (one, _) in fitting.items() if counts[key] == counts[likely])
        return Recognised(np.full(len(values), np.nan), there, "", possible)
    note = "" if likely == "s" else f"holds {reading.words} and was read as that"
    return Recognised(seconds, there & ~np.isfinite(seconds), reading.words, note=note)


def convert(values: Values, key: str) -> Values:
    """Return (n,) numbers as seconds, read as `key` says: s, ms, us, ns, days or excel.

    Raises:
        ValueError: `key` is a format, which texts are read by, or nothing at all.
    """
    if key in UNITS:
        return values / UNITS[key]
    if key == "days":
        return values * 86_400
    if key == "excel":
        return np.asarray(np.round((values - 25_569) * 86_400), np.float64)
    raise ValueError(key)
