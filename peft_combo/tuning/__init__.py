"""Tuning: one run of a recipe (`loop`), what it would need (`plan`), what learns (`trainee`), its state (`progress`),
what it leaves (`storing`)."""

from peft_combo.tuning.loop import Diverged, Interrupted, TuneResult, tune
from peft_combo.tuning.optimizing import Schedule, learning_rate_factor
from peft_combo.tuning.plan import Disk, Memory, Plan, duration, peak_mib, plan

__all__ = [
    "Disk",
    "Diverged",
    "Interrupted",
    "Memory",
    "Plan",
    "Schedule",
    "TuneResult",
    "duration",
    "learning_rate_factor",
    "peak_mib",
    "plan",
    "tune",
]
