"""Tuning: adapters trained by one loop for six tasks, planned, resumed, continued and stored.

The only importer of accelerate. Knows nothing of the recommender.
"""

from __future__ import annotations

from peft_combo.tuning.continual import continue_tuning
from peft_combo.tuning.figures import Disk, Memory, Plan
from peft_combo.tuning.loop import Diverged, Interrupted, TuneResult, tune
from peft_combo.tuning.optimizer import Schedule, learning_rate_factor
from peft_combo.tuning.plan import plan
from peft_combo.tuning.resources import duration, peak_mib
from peft_combo.tuning.tasks import build_task

__all__ = [
    "Disk",
    "Diverged",
    "Interrupted",
    "Memory",
    "Plan",
    "Schedule",
    "TuneResult",
    "build_task",
    "continue_tuning",
    "duration",
    "learning_rate_factor",
    "peak_mib",
    "plan",
    "tune",
]
