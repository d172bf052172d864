"""What a long job tells while it goes on, so that a terminal, a notebook or a service can show it.

Owns the words only; costs nothing to import.
"""

from __future__ import annotations

from collections.abc import Mapping


class Watch:
    """Told of a run while it goes on, on the main process only. This one keeps it to itself."""

    def note(self, text: str) -> None:
        """Take something worth a line."""

    def stage(self, name: str, total: int) -> None:
        """Take that a stretch of work of `total` units begins."""

    def advance(self, units: int) -> None:
        """Take that so many units of the stage are done."""

    def planned(self, summary: str, metric: str) -> None:
        """Take the plan in a line, and the metric that `evaluated` tells; the first step is next."""

    def stepped(self, step: int, loss: float) -> None:
        """Take that optimizer step number `step` (from 1) is done; it counts as one unit of the stage."""

    def evaluated(self, step: int, values: Mapping[str, float], best: bool) -> None:
        """Take validation metrics after `step`; `best` if none before were better."""
