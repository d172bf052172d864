"""State of the service: items, events, exposures, feedback, deployments, keys, audit, in SQLite or behind a URL.

Owns what has to be there after a crash. Knows nothing of recommenders, adapters' files or HTTP.
"""

from __future__ import annotations

from peft_combo.serving.state.identities import Identities
from peft_combo.serving.state.journal import Journal
from peft_combo.serving.state.rows import (
    SCOPES,
    AuditRow,
    Caller,
    DeployedArm,
    DeploymentRow,
    EventKind,
    EventRow,
    ExposureRow,
    FeedbackKind,
    FeedbackRow,
    Heads,
    ItemCount,
    ItemRow,
    Scope,
    ShownItem,
)
from peft_combo.serving.state.store import State
from peft_combo.serving.state.tables import StateError

__all__ = [
    "SCOPES",
    "AuditRow",
    "Caller",
    "DeployedArm",
    "DeploymentRow",
    "EventKind",
    "EventRow",
    "ExposureRow",
    "FeedbackKind",
    "FeedbackRow",
    "Heads",
    "Identities",
    "ItemCount",
    "ItemRow",
    "Journal",
    "Scope",
    "ShownItem",
    "State",
    "StateError",
]
