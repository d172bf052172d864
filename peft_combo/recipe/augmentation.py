"""Augmentation section of a recipe: which variants of its texts training sees.

Owns the fields, their defaults and ranges. Knows nothing of words, data or torch; see `data.augmenting`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from peft_combo.recipe.fields import Int, Real, Section, Text

_Chance = Annotated[Real, Field(ge=0, lt=1)]


class AugmentationConfig(Section):
    """Altered texts, made once before training; everything is off unless a chance is given."""

    synonyms: _Chance = Field(
        default=0.0, description="Chance that a phrase of the lexicon gives way to a synonym. Wei and Zou 2019."
    )
    attributes: _Chance = Field(
        default=0.0,
        description="Chance that a colour, a material, a pattern or the like gives way to another of its kind; not "
        "where that very attribute is what is learned.",
    )
    word_drop: _Chance = Field(
        default=0.0, description="Chance that a word is left out; one always stays. Wei and Zou 2019."
    )
    brand_mask: _Chance = Field(
        default=0.0, description="Chance that the item's brand is left out; needs a brand column in the catalogue."
    )
    shuffle: _Chance = Field(
        default=0.0,
        description='Chance that the parts of a title (between commas, dashes or "|", before with, for, in) change '
        "places.",
    )
    variants: Int = Field(default=4, ge=1, le=32, description="Altered texts made of each text at most.")
    share: Real = Field(default=0.5, ge=0, le=1, description="Chance that an item of a training batch is seen altered.")
    lexicon: Text | None = Field(
        default=None,
        description="YAML file with synonyms and attributes of your own; null takes the one we ship, wordnet adds the "
        "nouns of WordNet to it, where that is installed.",
    )

    @property
    def alters(self) -> bool:
        """Whether any kind of change is on."""
        return any((self.synonyms, self.attributes, self.word_drop, self.brand_mask, self.shuffle))
