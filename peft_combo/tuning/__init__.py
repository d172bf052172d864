"""Tuning: adapters trained by one loop for six tasks, planned, resumed, continued and stored.

The only importer of accelerate. Knows nothing of the recommender. Names load on first use, so that a run folder that is
in use is told without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_combo.tuning.continual import continue_tuning
    from peft_combo.tuning.figures import Disk, Memory, Plan
    from peft_combo.tuning.loop import Diverged, Interrupted, TuneResult, tune
    from peft_combo.tuning.optimizer import Schedule, learning_rate_factor
    from peft_combo.tuning.resources import duration, peak_mib
    from peft_combo.tuning.tasks import build_task

_HOMES = {
    "Disk": "peft_combo.tuning.figures",
    "Diverged": "peft_combo.tuning.loop",
    "Interrupted": "peft_combo.tuning.loop",
    "Memory": "peft_combo.tuning.figures",
    "Plan": "peft_combo.tuning.figures",
    "Schedule": "peft_combo.tuning.optimizer",
    "TuneResult": "peft_combo.tuning.loop",
    "build_task": "peft_combo.tuning.tasks",
    "continue_tuning": "peft_combo.tuning.continual",
    "duration": "peft_combo.tuning.resources",
    "learning_rate_factor": "peft_combo.tuning.optimizer",
    "peak_mib": "peft_combo.tuning.resources",
    "tune": "peft_combo.tuning.loop",
}

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
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
