"""Text augmentation in training: other variants of a task's texts, shown in their place now and then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.augmentation.variants import Rewrite, describe_variants, make_variants
from peft_combo.recipe.model import Recipe
from peft_combo.tuning.item_encoder import ItemEncoder, Selection
from peft_combo.tuning.step import ChooseTexts
from peft_combo.tuning.tasks.base import AnyTask


@dataclass(frozen=True, eq=False)
class TextVariants:
    """Other variants of some texts.

    Attributes:
        texts: the texts as they are. variants: for each its others; none is fine.
        share: chance that a text of a training batch is shown in one of them.
    """

    texts: Sequence[str]
    variants: Sequence[Sequence[str]]
    share: float

    def __iter__(self) -> Iterator[str]:
        """Yield all variants, text by text."""
        return (variant for own in self.variants for variant in own)

    def chooser(self, items: ItemEncoder) -> ChooseTexts:
        """Return what shows variants in place of texts; `items` was given all of them as extra texts."""
        known: dict[int, NDArray[np.int64]] = {}
        for text, own in zip(self.texts, self.variants, strict=True):
            number = items.number_of[text]
            mine = np.array([items.number_of[variant] for variant in own], np.int64)
            known[number] = np.unique(np.concatenate([known.get(number, mine), mine]))
        return partial(show_variants, known, self.share)


def show_variants(known: dict[int, NDArray[np.int64]], share: float, selection: Selection, seed: int) -> Selection:
    """Show each text, with the chance `share`, in one of the variants `known` of it."""
    rng = np.random.default_rng(seed)
    texts = selection.texts
    drawn = zip(texts, rng.random(len(texts)) < share, rng.random(len(texts)), strict=True)
    shown = [
        own[int(which * len(own))] if altered and len(own := known[int(text)]) else text
        for text, altered, which in drawn
    ]
    return replace(selection, texts=np.array(shown, np.int64))


def build_text_variants(
    recipe: Recipe, task: AnyTask, rewrite: Rewrite | None = None
) -> tuple[TextVariants | None, list[str]]:
    """Make the other variants of the texts, and say what was made.

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
    made = make_variants(task.texts, config, brands=task.brands, rewrite=rewrite, seed=recipe.seed)
    return TextVariants(task.texts, made, config.share), describe_variants(made, config, task.brands)
