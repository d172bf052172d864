"""What can be learned: one module per task, each with its head, its batches, its loss and its measure.

All of them look the same to the tuning loop (`base.Task`); here a recipe becomes one.
"""

from __future__ import annotations

from peft_combo.recipe import Recipe
from peft_combo.tasks.base import AnyTask
from peft_combo.tasks.bundle import BundleCompletion


def task_of(recipe: Recipe) -> AnyTask:
    """Read the data of a recipe and make its task.

    Raises:
        DataError: the data is not there, has faults, or is too little.
    """
    return BundleCompletion(recipe, recipe.task)
