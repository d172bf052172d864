"""Quantification: the share of a class among texts, corrected for the errors of the classifier that counted it.

Source: Forman 2008, "Quantifying counts and costs via classification", adjusted count; the same estimate is known in
epidemiology by Rogan and Gladen 1978, "Estimating prevalence from the results of a screening test", whose variance is
used here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class ErrorRates:
    """How often a classifier gives a class, measured on texts whose class is known.

    Attributes:
        hits: texts of the class that get it, of `positives`. false: texts of other classes that get it, of `negatives`.
    """

    hits: int
    positives: int
    false: int
    negatives: int

    def __post_init__(self) -> None:
        if not (0 <= self.hits <= self.positives and 0 <= self.false <= self.negatives):
            raise ValueError(f"expected hits of positives and false of negatives, found {self}.")
        if not self.positives or not self.negatives:
            raise ValueError("error rates need texts of the class and of others, found only one kind.")
        if self.true_rate <= self.false_rate:
            raise ValueError(
                f"a classifier that gives the class to {self.false_rate:.0%} of other texts and to "
                f"{self.true_rate:.0%} of its own says nothing of the share."
            )

    @property
    def true_rate(self) -> float:
        """Share of the texts of the class that get it."""
        return self.hits / self.positives

    @property
    def false_rate(self) -> float:
        """Share of the other texts that get it."""
        return self.false / self.negatives


def adjust_share(given: int, of: int, rates: ErrorRates | None) -> tuple[float, float, float]:
    """Estimate the share of a class from how many texts a classifier gave it.

    Args:
        given: texts that got the class. of: texts in all, at least 1.
        rates: of the classifier; None where the classes are known.
    Returns:
        (given / of - false rate) / (true rate - false rate) within [0, 1], and a 95 % interval by the delta method, in
        which the error rates are estimates too. Without errors, the interval is that of Wilson 1927.
    Raises:
        ValueError: `of` is below 1 or `given` is not of it.
    """
    if of < 1 or not 0 <= given <= of:
        raise ValueError(f"expected texts with the class among at least one, found {given} of {of}.")
    seen = given / of
    if rates is None:
        middle, scale = (given + _Z**2 / 2) / (of + _Z**2), 1 + _Z**2 / of
        half = _Z / scale * math.sqrt(seen * (1 - seen) / of + _Z**2 / (4 * of**2))
        return seen, max(0.0, middle - half), min(1.0, middle + half)
    spread = rates.true_rate - rates.false_rate
    share = min(1.0, max(0.0, (seen - rates.false_rate) / spread))

    def vary(rate: float, n: int) -> float:
        smooth = (rate * n + 1) / (n + 2)  # a rate of 0 or 1 was measured on few texts only
        return smooth * (1 - smooth) / n

    variance = vary(seen, of) + share**2 * vary(rates.true_rate, rates.positives)
    variance += (1 - share) ** 2 * vary(rates.false_rate, rates.negatives)
    half = _Z * math.sqrt(variance) / spread
    return share, max(0.0, share - half), min(1.0, share + half)
