"""Tuning: one run of a recipe (`loop`), its plan (`plan`), its state (`progress`), what it leaves (`storing`)."""

from peft_combo.tuning.loop import Interrupted, TuneResult, learning_rate_factor, tune
from peft_combo.tuning.plan import Plan, duration, peak_mib

__all__ = ["Interrupted", "Plan", "TuneResult", "duration", "learning_rate_factor", "peak_mib", "tune"]
