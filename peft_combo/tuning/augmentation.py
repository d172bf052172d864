"""Other wordings of a task's texts, as a recipe asks for them."""

from __future__ import annotations

from peft_combo.data.augmentation.variants import Rewrite, told, variants
from peft_combo.recipe.model import Recipe
from peft_combo.tuning.item_encoder import Variants
from peft_combo.tuning.tasks.base import AnyTask


def wordings_of(recipe: Recipe, task: AnyTask, rewrite: Rewrite | None = None) -> tuple[Variants | None, list[str]]:
    """Make the other wordings of the texts, and say what was made.

    Args:
        rewrite: back-translation or the like, beside what the recipe names.
    Returns:
        None where neither recipe nor caller asks for any, and notes for whoever watches the run.
    Raises:
        DataError: the lexicon cannot be used, or `rewrite` failed.
    """
    config = recipe.augmentation
    if rewrite is None and not config.alters:
        return None, []
    made = variants(task.texts, config, brands=task.brands, rewrite=rewrite, seed=recipe.seed)
    return Variants(made, config.share), told(made, config, task.brands)
