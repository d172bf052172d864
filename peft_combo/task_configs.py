"""The task section of a recipe: one class for each thing that can be learned, told apart by `kind`.

Owns the fields, their defaults and ranges. Knows nothing of data or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from peft_combo.recipe_fields import Bool, Int, Real, Section, Text, fault


class BundleTask(Section):
    """Learn which items belong with the rest of a bundle."""

    metrics: ClassVar[tuple[str, ...]] = ("ndcg@10", "r@1", "r@5", "r@10", "r@20", "mrr")

    kind: Literal["bundle"] = "bundle"
    pooling: Literal["mean", "attention"] = Field(
        default="mean", description="How the items of a partial bundle become one query."
    )
    projection: Literal["linear", "none"] = Field(
        default="linear", description="Separate maps for query and target side: what goes together is rarely alike."
    )
    strengths: tuple[Annotated[Real, Field(gt=0, le=1)], ...] = Field(
        default=(0.1, 0.25, 0.5, 1.0),
        min_length=1,
        max_length=20,
        description="Shares of the trained projections to try on validation; the best is kept, so a projection that "
        "learned too much is taken back towards the identity. Wortsman et al. 2022, WiSE-FT.",
    )
    temperature: Real = Field(default=0.05, ge=0.001, le=10, description="Divides the similarities in the softmax.")
    learn_temperature: Bool = Field(default=True, description="Let the temperature be trained from that start.")
    extra_negatives: Int = Field(
        default=0, ge=0, le=65_536, description="Further catalogue items per batch as wrong answers, beside its own."
    )
    negatives: Literal["leaf", "random"] = Field(
        default="leaf", description="Where those come from: the category leaves of the batch's items, or anywhere."
    )
    mask_duplicates: Bool = Field(
        default=True, description="Leave items with the target's very text out of the negatives."
    )
    context_dropout: Real = Field(
        default=0.0, ge=0, lt=1, description="Chance of leaving out each item of the partial bundle; one always stays."
    )
    head_dropout: Real = Field(default=0.0, ge=0, lt=1, description="Dropout on the head's input.")


class ClassificationTask(Section):
    """Learn the class of a text, or all classes that apply: a category, an intent, a sentiment."""

    metrics: ClassVar[tuple[str, ...]] = ("macro_f1", "micro_f1", "accuracy")

    kind: Literal["classification"] = "classification"
    labels: Text = Field(
        default="category",
        description="What names the class: category, leaf, slot or an attribute of the catalogue's items; or table, "
        "for texts of your own with their labels (labels.csv or .jsonl in the data folder: text, label).",
    )
    depth: Int | None = Field(
        default=None, ge=1, le=20, description="Levels of the category path from the top; null takes the whole path."
    )
    multi_label: Bool = Field(
        default=False,
        description='A text may have several classes: all names of the category path, or parts of a label between "|".',
    )
    min_texts: Int = Field(
        default=10, ge=1, le=1_000_000, description="Classes with fewer training texts than this are left out."
    )
    label_smoothing: Real = Field(
        default=0.0, ge=0, lt=1, description="Share of each target that is spread over all classes."
    )
    class_weights: Literal["none", "balanced"] = Field(
        default="none", description="balanced: every class weighs the same in the loss, however rare it is."
    )
    head_dropout: Real = Field(default=0.0, ge=0, lt=1, description="Dropout on the head's input.")

    @field_validator("depth")
    @classmethod
    def _only_categories_have_levels(cls, depth: int | None, info: ValidationInfo) -> int | None:
        labels = info.data.get("labels")
        if depth is not None and labels not in (None, "category"):
            raise fault(f"only labels: category has levels, found labels: {labels}.", "Leave depth out.")
        return depth


class TaggingTask(Section):
    """Learn which words of a text name something, and what: clothing, shoes, accessories, or types of your own."""

    metrics: ClassVar[tuple[str, ...]] = ("f1", "precision", "recall", "macro_f1")

    kind: Literal["tagging"] = "tagging"
    tags: Literal["table", "slots"] = Field(
        default="table",
        description="Where the tags come from. table: tags.jsonl (tokens and tags, or text and spans) or tags.conll in "
        "the data folder. slots: made from the catalogue's titles and slots with a list of fashion nouns.",
    )
    types: dict[Text, Literal["Clo", "Shoe", "Acc"]] = Field(
        default={}, description="For tags: slots, the entity type that the items of a slot are named by."
    )
    head_dropout: Real = Field(default=0.0, ge=0, lt=1, description="Dropout on the head's input.")

    @field_validator("types")
    @classmethod
    def _types_suit_tags(cls, types: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        if (info.data.get("tags") == "slots") != bool(types):
            raise fault(
                "tags: slots needs the types of the slots, and only it does.",
                "Write for example types: {shoes: Shoe, bag: Acc}.",
            )
        return types


_Rating = Annotated[Real, Field(ge=-1e6, le=1e6)]


class RatingTask(Section):
    """Learn how likely a user is to take an item: a score in [0, 1]."""

    metrics: ClassVar[tuple[str, ...]] = ("ndcg@10", "auc")

    kind: Literal["rating"] = "rating"
    feedback: Literal["implicit", "explicit"] = Field(
        default="implicit",
        description="implicit: what was taken against drawn items. explicit: the weight of an interaction is a rating.",
    )
    scale: tuple[_Rating, _Rating] = Field(
        default=(1.0, 5.0), description="Lowest and highest rating, which become 0 and 1; for explicit feedback."
    )
    like_from: _Rating | None = Field(
        default=None, description="Ratings from this one on become 1, others 0; null keeps their place on the scale."
    )
    history: Int = Field(default=20, ge=1, le=1000, description="Latest items that stand for a user, in whole items.")
    pooling: Literal["mean", "attention"] = Field(default="mean", description="How these items become one vector.")
    projection: Literal["linear", "none"] = Field(
        default="linear", description="Separate maps for the user's and the item's side."
    )
    temperature: Real = Field(default=0.2, ge=0.01, le=10, description="Start of what divides the similarities.")
    negatives: Int = Field(default=4, ge=1, le=1000, description="Items drawn against each taken one (implicit).")
    popularity_power: Real = Field(
        default=0.75, ge=0, le=1, description="Items are drawn by (count + 1) to this power, and corrected for it; 0 "
        "draws evenly, 1 by popularity. Yi et al. 2019; Mikolov et al. 2013 for 0.75.",
    )  # fmt: skip
    max_events: Int | None = Field(
        default=None, ge=10, le=100_000_000, description="Train on a seeded sample of so many events; null takes all."
    )

    @property
    def implicit(self) -> bool:
        """Whether nothing but what was taken is known."""
        return self.feedback == "implicit"

    @field_validator("scale")
    @classmethod
    def _scale_rises(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] >= scale[1]:
            raise fault(f"expected the lowest rating before the highest, found {scale[0]:g} and {scale[1]:g}.")
        return scale

    @field_validator("like_from")
    @classmethod
    def _only_ratings_are_liked(cls, like_from: float | None, info: ValidationInfo) -> float | None:
        if like_from is not None and info.data.get("feedback") == "implicit":
            raise fault("implicit feedback has no ratings.", "Set task.feedback to explicit, or leave like_from out.")
        return like_from


def _bundle_unless_said(value: Any) -> Any:
    # Recipes said nothing while there was one task.
    return {"kind": "bundle", **value} if isinstance(value, Mapping) and "kind" not in value else value


TaskConfig = Annotated[
    BundleTask | RatingTask | ClassificationTask | TaggingTask,
    Field(discriminator="kind"),
    BeforeValidator(_bundle_unless_said),
]
Metric = Literal[
    "ndcg@10", "r@1", "r@5", "r@10", "r@20", "mrr", "macro_f1", "micro_f1", "accuracy", "f1", "precision", "recall",
    "auc",
]  # fmt: skip
