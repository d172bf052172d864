"""Step extensions of a recipe: text augmentation, R-Drop, adversarial training, weight averaging."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import nn

from peft_combo.recipe.model import TrainingConfig
from peft_combo.tuning.adversarial import add_adversarial_gradients
from peft_combo.tuning.augmentation import TextVariants
from peft_combo.tuning.averaging import WeightAverage
from peft_combo.tuning.item_encoder import ItemEncoder
from peft_combo.tuning.r_drop import compute_r_drop_loss
from peft_combo.tuning.step import NoWeightCopy, StepExtensions, keep_texts, pass_once, predict_once


def build_extensions(
    training: TrainingConfig,
    items: ItemEncoder,
    parameters: Mapping[str, nn.Parameter],
    variants: TextVariants | None,
    exclusive: bool,
) -> StepExtensions:
    """Make what a recipe asks for around its steps.

    Args:
        parameters: name -> weight that learns.
        variants: variants of the items' texts, which `items` was given as extra ones.
        exclusive: whether a row of logits is one softmax, as the task says.
    """
    return StepExtensions(
        choose_texts=keep_texts if variants is None else variants.chooser(items),
        compute_loss=partial(compute_r_drop_loss, training.r_drop, exclusive) if training.r_drop else predict_once,
        add_gradients=partial(add_adversarial_gradients, training.adversarial) if training.adversarial else pass_once,
        weights=WeightAverage(training.averaging, parameters) if training.averaging else NoWeightCopy(),
    )
