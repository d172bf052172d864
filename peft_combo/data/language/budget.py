"""Budget of a query: what all it asks for may cost, and where the query says so."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Attributes:
    amount: what all of it may cost, in the shop's own currency. start, stop: the words that say so.
    """

    amount: float
    start: int
    stop: int
