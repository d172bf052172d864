"""Per-category PEFT adapters for BERT-like encoders, and the bundle recommender that swaps them.

Names are imported on first use: ``import peft_combo`` alone costs nothing, so the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_combo.encoder.backbone import Backbone
    from peft_combo.encoder.bank import AdapterBank
    from peft_combo.errors import PeftComboError
    from peft_combo.evaluation.completion import evaluate
    from peft_combo.recipe.files import load_recipe
    from peft_combo.recipe.model import Recipe
    from peft_combo.recommender.persistence import load_recommender, save_recommender
    from peft_combo.recommender.recommender import BundleRecommender
    from peft_combo.store.adapter_store import AdapterRecord, AdapterStore
    from peft_combo.tuning.loop import TuneResult, tune

__version__ = "0.2.0"

_HOMES = {
    "AdapterBank": "peft_combo.encoder.bank",
    "AdapterRecord": "peft_combo.store.adapter_store",
    "AdapterStore": "peft_combo.store.adapter_store",
    "Backbone": "peft_combo.encoder.backbone",
    "BundleRecommender": "peft_combo.recommender.recommender",
    "PeftComboError": "peft_combo.errors",
    "Recipe": "peft_combo.recipe.model",
    "TuneResult": "peft_combo.tuning.loop",
    "evaluate": "peft_combo.evaluation.completion",
    "load_recipe": "peft_combo.recipe.files",
    "load_recommender": "peft_combo.recommender.persistence",
    "save_recommender": "peft_combo.recommender.persistence",
    "tune": "peft_combo.tuning.loop",
}

__all__ = [
    "AdapterBank",
    "AdapterRecord",
    "AdapterStore",
    "Backbone",
    "BundleRecommender",
    "PeftComboError",
    "Recipe",
    "TuneResult",
    "__version__",
    "evaluate",
    "load_recipe",
    "load_recommender",
    "save_recommender",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
