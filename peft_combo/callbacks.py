"""Callbacks of a run: notes, stages, the plan, steps and validation metrics, for a terminal, a notebook or a service.

Owns the calls only, knows no plan and no task; costs nothing to import.
"""

from __future__ import annotations

from collections.abc import Mapping


class RunCallback:
    """Base callback of a run: called on the main process only, while it goes on. This one does nothing."""

    def on_note(self, text: str) -> None:
        """Take something worth a line."""

    def on_stage(self, name: str, total: int) -> None:
        """Take that a stretch of work of `total` units begins."""

    def on_advance(self, units: int) -> None:
        """Take that so many units of the stage are done."""

    def on_plan(self, summary: str, metric: str) -> None:
        """Take the plan in a line, and the metric that `on_evaluate` gets; the first step is next."""

    def on_step_end(self, step: int, loss: float) -> None:
        """Take that optimizer step number `step` (from 1) is done; it counts as one unit of the stage."""

    def on_evaluate(self, step: int, values: Mapping[str, float], best: bool) -> None:
        """Take validation metrics after `step`; `best` if none before were better."""
