"""Bundle generation under constraints: beam search over slot templates, an objective, diversity and evidence."""

from __future__ import annotations

from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.composing.options import ObjectiveWeights, Options
from peft_combo.recommender.composing.slots import SlotTemplates

__all__ = [
    "Composer",
    "Constraints",
    "ObjectiveWeights",
    "Options",
    "SlotTemplates",
]
