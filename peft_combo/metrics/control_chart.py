"""Control chart of a share over time: a CUSUM of counts with a chosen mean time to a false alarm.

Source: Page 1954, "Continuous inspection schemes", in the form for proportions of Reynolds and Stoumbos 1999, "A CUSUM
chart for monitoring a proportion when inspecting continuously": S rises by the log-likelihood ratio of the share that
is to be found over the usual one, and never falls below 0. It detects a small lasting rise sooner than a p-chart, which
looks at one window at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CHAINS, _LONGEST = 500, 8  # simulated series, each so many times the mean time to a false alarm


@dataclass(frozen=True)
class Cusum:
    """A chart ready to run.

    Attributes:
        usual, risen: shares of counted texts in control and out of it. limit: S from which on there is an alarm.
        arl: mean number of windows to a false alarm that the limit was chosen for (average run length in control).
    """

    usual: float
    risen: float
    limit: float
    arl: float

    @classmethod
    def design(cls, usual: float, risen: float, sizes: Sequence[int], arl: float, seed: int = 0) -> Cusum:
        """Choose the limit so that `arl` windows pass on the mean before a false alarm.

        Series at the usual share, of windows of these sizes in random order, are simulated; the limit is the least at
        which their mean time to an alarm is `arl`. It is right where the usual share is known: an estimate of few
        texts makes false alarms rarer or more frequent.

        Args:
            usual, risen: 0 < usual < risen < 1. sizes: texts of windows, at least 1 each. arl: at least 2 windows.
        Raises:
            ValueError: an argument is out of its range.
        """
        if not 0 < usual < risen < 1:
            raise ValueError(f"expected 0 < usual < risen < 1, found {usual:g} and {risen:g}.")
        if not len(sizes) or min(sizes) < 1 or arl < 2:
            raise ValueError("expected windows of at least one text and an average run length of at least 2.")
        rng = np.random.default_rng(seed)
        length = int(_LONGEST * arl)
        drawn = rng.choice(np.asarray(sizes, np.int64), (_CHAINS, length))
        steps = _log_ratios(rng.binomial(drawn, usual), drawn, usual, risen)
        highest = np.maximum.accumulate(_accumulate(steps), axis=1)
        low, high = 0.0, float(highest.max()) + 1e-9
        for _ in range(40):  # the mean time grows with the limit
            middle = (low + high) / 2
            times = np.where(highest[:, -1] >= middle, (highest >= middle).argmax(axis=1) + 1, length)
            low, high = (middle, high) if times.mean() < arl else (low, middle)
        return cls(usual, risen, high, arl)

    def run(self, given: ArrayLike, sizes: ArrayLike) -> NDArray[np.float64]:
        """Return S after each window: (W,) counts of (W,) texts -> (W,)."""
        steps = _log_ratios(np.asarray(given, np.int64), np.asarray(sizes, np.int64), self.usual, self.risen)
        found: NDArray[np.float64] = _accumulate(steps[None])[0]
        return found


def _log_ratios(given: NDArray[np.int64], sizes: NDArray[np.int64], usual: float, risen: float) -> NDArray[np.float64]:
    ratios: NDArray[np.float64] = given * np.log(risen / usual) + (sizes - given) * np.log((1 - risen) / (1 - usual))
    return ratios


def _accumulate(steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """S of each series, (C, W): the sum so far less its least value before, 0 at the start."""
    sums = np.cumsum(steps, axis=1)
    least = np.minimum(np.minimum.accumulate(sums, axis=1), 0)
    return np.asarray(sums - least, np.float64)
