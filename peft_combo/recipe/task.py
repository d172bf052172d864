"""Task section of a recipe: one class per task, told apart by `kind`.

Owns the fields, their defaults and ranges. Knows nothing of data or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from peft_combo.recipe.fields import Bool, Int, Real, Section, Text, fault


class CompletionTask(Section):
    """What all tasks share that learn to complete bundles."""

    metrics: ClassVar[tuple[str, ...]] = ("ndcg@10", "r@1", "r@5", "r@10", "r@20", "mrr")

    kind: str
    projection: Literal["linear", "none"] = Field(
        default="linear", description="Separate maps for query and target side: what goes together is rarely alike."
    )
    strengths: tuple[Annotated[Real, Field(gt=0, le=1)], ...] = Field(
        default=(0.1, 0.25, 0.5, 1.0),
        min_length=1,
        max_length=20,
        description="Shares of what the head learned to try on validation; the best is kept, so a head that "
        "learned too much is taken back towards the plain cosine. Wortsman et al. 2022, WiSE-FT.",
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
    head_dropout: Real = Field(default=0.0, ge=0, lt=1, description="Dropout on the head's input.")


class PseudoBundles(Section):
    """Sets of items that were bought together so surely that they stand for bundles."""

    most: Int = Field(default=1000, ge=1, le=1_000_000, description="Sets taken at most, the surest first.")
    min_confidence: Real = Field(
        default=0.1, gt=0, lt=1, description="Lower 95 % bound, at least, of the share of the buyings of each item in "
        "which the others were bought too. Omiecinski 2003, all-confidence; Wilson 1927 for the bound.",
    )  # fmt: skip
    min_together: Int = Field(default=3, ge=1, le=1_000_000, description="Times a set must have been bought together.")
    max_items: Int = Field(default=4, ge=2, le=20, description="Items of a set at most.")
    window_days: Real = Field(
        default=1.0, gt=0, le=3650, description="Where no baskets are known: what a user took within so many days was "
        "taken together.",
    )  # fmt: skip
    weight: Real = Field(
        default=0.5, gt=0, le=1, description="A question of such a set weighs this times its confidence; of a real "
        "bundle, 1.",
    )  # fmt: skip


class BundleTask(CompletionTask):
    """Learn which items belong with the rest of a bundle."""

    kind: Literal["bundle"] = "bundle"
    pooling: Literal["mean", "attention"] = Field(
        default="mean", description="How the items of a partial bundle become one query."
    )
    whitening: Literal["none", "half"] = Field(
        default="none", description="What the head starts from: the cosine of the encoder's vectors as they are, or "
        "with each principal component of the catalogue divided by the root of its deviation.",
    )  # fmt: skip
    context_dropout: Real = Field(
        default=0.0, ge=0, lt=1, description="Chance of leaving out each item of the partial bundle; one always stays."
    )
    label_smoothing: Real = Field(
        default=0.0, ge=0, lt=1, description="Share of each target that is spread over the question's fair candidates."
    )
    propensity_power: Real = Field(
        default=0.0, ge=0, le=1, description="A question weighs one over its answer's propensity, ((bundles with it + "
        "1) / (most + 1)) to this power: 0 weighs all alike, 0.5 is usual. Schnabel et al. 2016; Saito et al. 2020.",
    )  # fmt: skip
    propensity_floor: Real = Field(
        default=0.1, gt=0, le=1, description="Lowest propensity: no question weighs more than one over this."
    )
    pseudo_bundles: PseudoBundles | None = Field(
        default=None, description="Learn from sets that were bought together as well; null learns from bundles alone."
    )


class SequenceTask(CompletionTask):
    """Learn to write bundles item by item: which item comes next, and when a bundle is complete."""

    kind: Literal["sequence"] = "sequence"
    layers: Int = Field(default=1, ge=1, le=12, description="Blocks of the decoder.")
    width: Int = Field(default=128, ge=8, le=4096, description="Of a block's attention and of its hidden layer.")
    attention_heads: Int = Field(default=4, ge=1, le=64, description="Heads of the attention; they share the width.")
    orders: Int = Field(
        default=2, ge=1, le=64, description="Random orders in which a batch reads each bundle: it has no first item."
    )
    sizes: Int = Field(
        default=32, ge=2, le=1000, description="Sizes told apart where completeness is judged; larger ones are one."
    )

    @field_validator("attention_heads")
    @classmethod
    def _heads_share_the_width(cls, heads: int, info: ValidationInfo) -> int:
        width = info.data.get("width")
        if width is not None and width % heads:
            raise fault(f"expected a divisor of width ({width}), found {heads}.")
        return heads


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


class MaskedTask(Section):
    """Learn to fill in masked words of the catalogue's texts: a start for other tasks that needs no label."""

    metrics: ClassVar[tuple[str, ...]] = ("log_likelihood", "token_accuracy", "top5_accuracy")

    kind: Literal["masked"] = "masked"
    mask_share: Real = Field(
        default=0.15, gt=0, lt=1, description="Share of a text's words that is asked for; one at least. Devlin et al. "
        "2019, BERT.",
    )  # fmt: skip
    whole_words: Bool = Field(
        default=True, description="Mask all pieces of a word together; else each piece stands for itself. Cui et al. "
        "2021, whole word masking.",
    )  # fmt: skip
    random_share: Real = Field(
        default=0.1, ge=0, lt=1, description="Share of what is asked for that shows some other word, not the mask."
    )
    kept_share: Real = Field(
        default=0.1, ge=0, lt=1, description="Share of what is asked for that shows itself, as texts later do."
    )

    @field_validator("kept_share")
    @classmethod
    def _something_is_masked(cls, kept: float, info: ValidationInfo) -> float:
        random = info.data.get("random_share")
        if random is not None and random + kept >= 1:
            raise fault(
                f"expected less than 1 together with task.random_share, found {random:g} + {kept:g}.",
                "The rest is what the mask stands for.",
            )
        return kept


class MatchingTask(Section):
    """Learn which answer template a question is answered with."""

    metrics: ClassVar[tuple[str, ...]] = ("mrr", "r@1", "r@5")

    kind: Literal["matching"] = "matching"
    unseen: Literal["answers", "questions"] = Field(
        default="answers", description="What stands on one side of the split only. answers: tests ask for templates "
        "that were never answered in training. questions: for known templates in new wordings.",
    )  # fmt: skip
    temperature: Real = Field(
        default=0.05, ge=0.001, le=10, description="Start of what divides the similarities in the softmax."
    )
    label_smoothing: Real = Field(
        default=0.0, ge=0, lt=1, description="Share of each target that is spread over the other answers of its batch."
    )


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
    neighbours: Int = Field(
        default=0, ge=0, le=100_000, description="Nearest items kept of each item, by who took both: how near an item "
        "is to the history speaks beside its text. 0 leaves it to text and popularity.",
    )  # fmt: skip
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
    BundleTask | SequenceTask | RatingTask | MaskedTask | ClassificationTask | TaggingTask | MatchingTask,
    Field(discriminator="kind"),
    BeforeValidator(_bundle_unless_said),
]
Metric = Literal[
    "ndcg@10", "r@1", "r@5", "r@10", "r@20", "mrr", "macro_f1", "micro_f1", "accuracy", "f1", "precision", "recall",
    "auc", "log_likelihood", "token_accuracy", "top5_accuracy",
]  # fmt: skip
