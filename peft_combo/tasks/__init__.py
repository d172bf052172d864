"""What can be learned: one module per task, each with its head, its batches, its loss and its measure.

All of them look the same to the tuning loop (`base.Task`); here a recipe becomes a task and a stored head a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_never

from torch import Tensor

from peft_combo.errors import StoreError
from peft_combo.recipe import Recipe
from peft_combo.task_configs import BundleTask, ClassificationTask, MaskedTask, RatingTask, SequenceTask, TaggingTask
from peft_combo.tasks.base import AnyTask, TaskHead
from peft_combo.tasks.bundle import BundleCompletion, BundleHead
from peft_combo.tasks.classification import Classification, ClassificationHead
from peft_combo.tasks.masked import MaskedHead, MaskedWords
from peft_combo.tasks.rating import Rating, RatingHead
from peft_combo.tasks.sequence import SequenceGeneration, SequenceHead
from peft_combo.tasks.tagging import Tagging, TaggingHead


def task_of(recipe: Recipe) -> AnyTask:
    """Read the data of a recipe and make its task.

    Raises:
        DataError: the data is not there, has faults, or is too little.
    """
    match recipe.task:
        case BundleTask():
            return BundleCompletion(recipe, recipe.task)
        case ClassificationTask():
            return Classification(recipe, recipe.task)
        case RatingTask():
            return Rating(recipe, recipe.task)
        case SequenceTask():
            return SequenceGeneration(recipe, recipe.task)
        case TaggingTask():
            return Tagging(recipe, recipe.task)
        case MaskedTask():
            return MaskedWords(recipe, recipe.task)
        case _:
            assert_never(recipe.task)


def head_of(spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> TaskHead:
    """Rebuild a stored head, in evaluation mode.

    Raises:
        StoreError: there is no such task here, or the weights are not those of its head.
    """
    match spec.get("kind"):
        case "bundle":
            return BundleHead.from_spec(spec, weights)
        case "classification":
            return ClassificationHead.from_spec(spec, weights)
        case "rating":
            return RatingHead.from_spec(spec, weights)
        case "sequence":
            return SequenceHead.from_spec(spec, weights)
        case "tagging":
            return TaggingHead.from_spec(spec, weights)
        case "masked":
            return MaskedHead.from_spec(spec, weights)
        case kind:
            raise StoreError(
                f"The adapter was tuned for {kind!r}; expected bundle, classification, rating, sequence or tagging, "
                "or masked."
            )
