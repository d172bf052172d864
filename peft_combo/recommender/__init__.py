"""Bundle recommender: scorers chosen and fused, bundles completed, ranked, composed and explained.

Owns what answers a request. Knows nothing of how adapters are trained. Names load on first use, so that fusion and
composing work without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_combo.recommender.composing.constraints import Constraints
    from peft_combo.recommender.composing.options import Options
    from peft_combo.recommender.persistence import load_recommender, save_recommender
    from peft_combo.recommender.recommender import BundleRecommender
    from peft_combo.recommender.requests import Request, answer
    from peft_combo.recommender.results import BundleMatch, DetectedBundle, Recommendation, Suggestion
    from peft_combo.recommender.workspace import Workspace

_HOMES = {
    "Constraints": "peft_combo.recommender.composing.constraints",
    "Options": "peft_combo.recommender.composing.options",
    "load_recommender": "peft_combo.recommender.persistence",
    "save_recommender": "peft_combo.recommender.persistence",
    "BundleRecommender": "peft_combo.recommender.recommender",
    "Request": "peft_combo.recommender.requests",
    "answer": "peft_combo.recommender.requests",
    "BundleMatch": "peft_combo.recommender.results",
    "DetectedBundle": "peft_combo.recommender.results",
    "Recommendation": "peft_combo.recommender.results",
    "Suggestion": "peft_combo.recommender.results",
    "Workspace": "peft_combo.recommender.workspace",
}

__all__ = [
    "BundleMatch",
    "BundleRecommender",
    "Constraints",
    "DetectedBundle",
    "Options",
    "Recommendation",
    "Request",
    "Suggestion",
    "Workspace",
    "answer",
    "load_recommender",
    "save_recommender",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
