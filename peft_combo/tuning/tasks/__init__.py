"""Training tasks: what can be learned, one module per task, each with its head, its batches, its loss and its measure.

All of them look the same to the tuning loop (`base.Task`); here a recipe becomes a task and a stored head a head.
"""

from __future__ import annotations

from typing import assert_never

from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import (
    BundleTask,
    ClassificationTask,
    MaskedTask,
    MatchingTask,
    RatingTask,
    SequenceTask,
    TaggingTask,
)
from peft_combo.tuning.tasks.base import AnyTask
from peft_combo.tuning.tasks.bundle import BundleCompletion
from peft_combo.tuning.tasks.classification import Classification
from peft_combo.tuning.tasks.masked import MaskedWords
from peft_combo.tuning.tasks.matching import AnswerMatching
from peft_combo.tuning.tasks.rating import ItemRating
from peft_combo.tuning.tasks.sequence import SequenceGeneration
from peft_combo.tuning.tasks.tagging import Tagging

__all__ = [
    "AnswerMatching",
    "AnyTask",
    "BundleCompletion",
    "Classification",
    "ItemRating",
    "MaskedWords",
    "SequenceGeneration",
    "Tagging",
    "build_task",
]


def build_task(recipe: Recipe) -> AnyTask:
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
            return ItemRating(recipe, recipe.task)
        case SequenceTask():
            return SequenceGeneration(recipe, recipe.task)
        case TaggingTask():
            return Tagging(recipe, recipe.task)
        case MaskedTask():
            return MaskedWords(recipe, recipe.task)
        case MatchingTask():
            return AnswerMatching(recipe, recipe.task)
        case _:
            assert_never(recipe.task)
