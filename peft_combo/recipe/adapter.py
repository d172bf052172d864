"""Adapter section of a recipe: one class per PEFT method, each with its defaults and the reason for them.

Owns the fields of every method, the peak learning rate a method takes where the recipe names none, and what may not be
combined. Knows nothing of how a method works (see `methods`) nor of the rest of a recipe.

One way only: what changes a low-rank update without replacing it (rsLoRA, DoRA, PiSSA, LoRA+, LoRA-FA) is a switch of
``lora`` and may be combined; what trains something else is a method of its own.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from peft_combo.recipe.adapter_fields import Alpha, Dropout, Length, Rank, Targets, TopLayerCount
from peft_combo.recipe.fields import Bool, Int, Real, Section, Text, fault


class LoraAdapter(Section):
    """A low-rank update beside frozen weights. Hu et al. 2021, LoRA; its variants are switches.

    Learning rate: 1e-3, ten times what full tuning bears, since B starts at zero and only B A has to move.
    """

    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["lora"] = "lora"
    rank: Rank = 8
    alpha: Alpha = 16.0
    dropout: Dropout = 0.0
    targets: Targets = "attention+ffn"
    top_layers: TopLayerCount = None
    rslora: Bool = Field(
        default=False,
        description="Scale by alpha / sqrt(rank) instead, which keeps high ranks learning. Kalajdzievski 2023.",
    )
    dora: Bool = Field(
        default=False,
        description="Train the length of each weight row apart from its direction: nearer to full tuning, and slower "
        "by a product of the weights per step. Liu et al. 2024.",
    )
    pissa: Bool = Field(
        default=False,
        description="Start from the principal singular vectors of the weights instead of from zero: learns sooner. "
        "Stored as plain LoRA of twice the rank, so the encoder stays as it is. Meng et al. 2024.",
    )
    plus_ratio: Real = Field(
        default=1.0,
        ge=1,
        le=1000,
        description="Learning rate of B over that of A; 1 is LoRA, 16 is what LoRA+ proposes. Hayou et al. 2024.",
    )
    freeze_a: Bool = Field(
        default=False,
        description="Leave A at its random start and train B alone: half the trained numbers, and the backward pass "
        "keeps rank numbers a token instead of the layer's width. Zhang et al. 2023, LoRA-FA.",
    )

    @field_validator("pissa")
    @classmethod
    def _pissa_folds_back(cls, pissa: bool, info: ValidationInfo) -> bool:
        if pissa and info.data.get("dora"):
            raise fault(
                "pissa and dora exclude each other: the lengths DoRA trains cannot be folded into plain LoRA.",
                "Set one of the two to false.",
            )
        return pissa

    @field_validator("freeze_a")
    @classmethod
    def _a_has_a_rate(cls, freeze_a: bool, info: ValidationInfo) -> bool:
        if freeze_a and info.data.get("plus_ratio", 1.0) != 1.0:
            raise fault(
                "freeze_a and plus_ratio exclude each other: a frozen A has no learning rate to compare with.",
                "Drop plus_ratio and set training.learning_rate, which is then B's.",
            )
        return freeze_a


class AdaloraAdapter(Section):
    """LoRA whose rank is moved to the layers that use it. Zhang et al. 2023, AdaLoRA.

    Learning rate: ten times LoRA's, since the singular values start at 0 and scale whatever else learns.
    """

    default_learning_rate: ClassVar[float] = 1e-2

    method: Literal["adalora"] = "adalora"
    initial_rank: Int = Field(default=12, ge=1, le=1024, description="Rank of each update at the start.")
    target_rank: Int = Field(default=8, ge=1, le=1024, description="Mean rank of the updates at the end.")
    alpha: Real = Field(default=16.0, gt=0, le=4096, description="Scale of the update.")
    dropout: Dropout = 0.0
    targets: Targets = "attention+ffn"
    top_layers: TopLayerCount = None
    warmup_fraction: Real = Field(
        default=0.1, ge=0, lt=1, description="Share of the optimizer steps at the initial rank (t_i in the paper)."
    )
    final_fraction: Real = Field(
        default=0.3, ge=0, lt=1, description="Share of the optimizer steps at the end with the ranks fixed (t_f)."
    )
    allocate_every: Int = Field(
        default=10, ge=1, le=100_000, description="Optimizer steps between two allocations (Delta T)."
    )
    beta1: Real = Field(default=0.85, ge=0, lt=1, description="Smoothing of the importance of a rank.")
    beta2: Real = Field(default=0.85, ge=0, lt=1, description="Smoothing of the uncertainty of that importance.")
    orthogonal_weight: Real = Field(
        default=0.5, ge=0, le=100, description="Weight of the penalty that keeps P and Q orthogonal (gamma)."
    )

    @field_validator("target_rank")
    @classmethod
    def _rank_only_falls(cls, target: int, info: ValidationInfo) -> int:
        initial = info.data.get("initial_rank")
        if initial is not None and target > initial:
            raise fault(f"expected at most adapter.initial_rank, which is {initial}, found {target}.")
        return target

    @field_validator("final_fraction")
    @classmethod
    def _some_steps_allocate(cls, final: float, info: ValidationInfo) -> float:
        warmup = info.data.get("warmup_fraction")
        if warmup is not None and warmup + final >= 1:
            raise fault(
                f"expected less than 1 together with adapter.warmup_fraction, found {warmup:g} + {final:g}.",
                "The ranks are allocated in the steps between the two.",
            )
        return final


class VeraAdapter(Section):
    """Two trained vectors per layer scale random matrices that all layers share. Kopiczko et al. 2024, VeRA.

    Learning rate: 1e-2. Few numbers stand for many, so each has to move further; the paper takes 4e-3 to 1e-2.
    """

    default_learning_rate: ClassVar[float] = 1e-2

    method: Literal["vera"] = "vera"
    rank: Int = Field(
        default=256, ge=1, le=4096, description="Rows of the shared random matrices; a rank costs one number a layer."
    )
    initial_scale: Real = Field(default=0.1, gt=0, le=10, description="Start of the scales on the rank (d_init).")
    dropout: Dropout = 0.0
    targets: Targets = "attention+ffn"
    top_layers: TopLayerCount = None


class LohaAdapter(Section):
    """The update is the element-wise product of two low-rank matrices: rank up to r squared. Hyeon-Woo et al. 2022.

    Learning rate: LoRA's; one of the four factors starts at zero, as B does there.
    """

    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["loha"] = "loha"
    rank: Rank = 8
    alpha: Alpha = 16.0
    targets: Targets = "attention+ffn"
    top_layers: TopLayerCount = None


class LokrAdapter(Section):
    """The update is a Kronecker product of a small and a low-rank matrix. Edalati et al. 2022; Yeh et al. 2024, LoKr.

    Learning rate: LoRA's.
    """

    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["lokr"] = "lokr"
    rank: Rank = 8
    alpha: Alpha = 16.0
    factor: Int | None = Field(
        default=None,
        ge=2,
        le=4096,
        description="Most rows and columns of the small matrix; null splits each dimension as evenly as it divides.",
    )
    targets: Targets = "attention+ffn"
    top_layers: TopLayerCount = None


class RandloraAdapter(Section):
    """A full-rank update: trained diagonals between many shared random low-rank bases. Albert et al. 2025, RandLoRA.

    Learning rate: LoRA's; alpha is large because the bases are scaled to unit variance and the diagonals start small.
    """

    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["randlora"] = "randlora"
    rank: Int = Field(
        default=32, ge=1, le=1024, description="Rank of each basis; a smaller one trains more numbers, over more bases."
    )
    alpha: Real = Field(default=640.0, gt=0, le=65_536, description="Scale; 20 times the rank is the paper's choice.")
    dropout: Dropout = 0.0
    targets: Targets = "attention+ffn"
    top_layers: TopLayerCount = None


class OftAdapter(Section):
    """The inputs of frozen weights are rotated in blocks, so lengths and angles stay. Qiu et al. 2023, OFT.

    Learning rate: LoRA's; the rotation starts as the identity.
    """

    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["oft"] = "oft"
    block_size: Int = Field(
        default=32, ge=2, le=1024, description="Width of a rotated block; it divides the width of every adapted layer."
    )
    targets: Targets = "attention+ffn"
    top_layers: TopLayerCount = None


class MissAdapter(Section):
    """One trained matrix a layer, repeated over blocks of the input; B of LoRA without A. Kang and Yin 2024, MiSS.

    Learning rate: LoRA's; the matrix starts at zero.
    """

    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["miss"] = "miss"
    rank: Rank = 16
    dropout: Dropout = 0.0
    targets: Targets = "attention+ffn"
    top_layers: TopLayerCount = None


class HiraAdapter(Section):
    """The frozen weight is multiplied, element by element, by a low-rank matrix: a full-rank update. Huang et al. 2025.

    Learning rate: ten times LoRA's; what learns is multiplied by weights of some hundredths.
    """

    default_learning_rate: ClassVar[float] = 1e-2

    method: Literal["hira"] = "hira"
    rank: Rank = 8
    dropout: Dropout = 0.0
    targets: Targets = "attention+ffn"
    top_layers: TopLayerCount = None


class ShiraAdapter(Section):
    """Few cells of each weight, drawn by chance, get values of their own. Bhardwaj et al. 2024, SHiRA.

    Learning rate: LoRA's; each cell is one number of a weight, and starts as it was.
    """

    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["shira"] = "shira"
    rank: Int = Field(
        default=8, ge=1, le=4096, description="As many cells as a LoRA of this rank has numbers: rank (in + out)."
    )
    targets: Targets = "attention+ffn"
    top_layers: TopLayerCount = None


class C3aAdapter(Section):
    """The update consists of circulant blocks, a vector each, multiplied by FFT. Chen et al. 2024, C3A.

    Learning rate: ten times LoRA's; a number of a circulant block stands for a whole diagonal.
    """

    default_learning_rate: ClassVar[float] = 1e-2

    method: Literal["c3a"] = "c3a"
    block_size: Int = Field(
        default=64, ge=2, le=4096,
        description="Width of a block; it divides the input and output of every adapted layer. Larger trains fewer.",
    )  # fmt: skip
    targets: Targets = "attention+ffn"
    top_layers: TopLayerCount = None


class LilyAdapter(Section):
    """LoRA whose B matrices are shared by all layers and mixed by a router for each token. Zhong et al. 2024, Lily.

    Learning rate: LoRA's.
    """

    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["lily"] = "lily"
    rank: Rank = 16
    layers_per_a: Int = Field(default=1, ge=1, le=1024, description="Neighbouring layers that share one A matrix.")
    shared_b: Int = Field(default=2, ge=2, le=64, description="B matrices that the layers share; a router mixes them.")
    targets: Targets = "attention+ffn"
    top_layers: TopLayerCount = None


class Ia3Adapter(Section):
    """Trained scales on keys, values and the inside of the feed-forward part, as in the paper. Liu et al. 2022, (IA)^3.

    Learning rate: 1e-2. The scales start at one and have to move by tenths; they are not decayed, which would pull
    them to zero.
    """

    default_learning_rate: ClassVar[float] = 1e-2

    method: Literal["ia3"] = "ia3"
    top_layers: TopLayerCount = None


class LayerNormTuning(Section):
    """The encoder's normalisation weights alone are trained. Zhao et al. 2024, Tuning LayerNorm in Attention.

    Learning rate: 1e-3; the weights start near one and steer whole coordinates.
    """

    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["layer-norm"] = "layer-norm"
    top_layers: TopLayerCount = None


class BitfitTuning(Section):
    """The encoder's biases alone are trained. Ben Zaken et al. 2022, BitFit.

    Learning rate: 1e-3, within the paper's 1e-4 to 1e-3 at its upper end, since runs here are short.
    """

    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["bitfit"] = "bitfit"
    top_layers: TopLayerCount = None


class PromptAdapter(Section):
    """Trained vectors stand before the words of every text. Lester et al. 2021, prompt tuning.

    Learning rate: 1e-2. The only path to the output leads through all frozen layers; the paper goes up to 0.3.
    """

    default_learning_rate: ClassVar[float] = 1e-2

    method: Literal["prompt"] = "prompt"
    length: Length = 8


class PTuningAdapter(Section):
    """Prompt tuning whose vectors a small network makes while training. Liu et al. 2021, P-tuning.

    Learning rate: 1e-3; the network, not the single vector, takes the step.
    """

    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["p-tuning"] = "p-tuning"
    length: Length = 8
    network: Literal["mlp", "lstm"] = Field(
        default="mlp", description="What makes the vectors: an MLP, or the paper's LSTM, which relates them in order."
    )
    network_size: Int = Field(default=256, ge=1, le=8192, description="Width of that network.")


class PrefixAdapter(Section):
    """Trained keys and values before every layer's own. Li and Liang 2021, Prefix-Tuning.

    Learning rate: 5e-3. A prefix starts from noise and has few numbers: at LoRA's rate it hardly moves.
    """

    default_learning_rate: ClassVar[float] = 5e-3

    method: Literal["prefix"] = "prefix"
    length: Length = 8
    projection: Bool = Field(
        default=False, description="Make the prefix with a small MLP while training, as the paper does for stability."
    )
    projection_size: Int = Field(default=256, ge=1, le=8192, description="Width of that MLP; unused without it.")


class TokensAdapter(Section):
    """The embeddings of chosen words are trained, all other words stay: for brands and trade terms.

    Learning rate: 1e-3; a word's vector gets a gradient only where the word occurs.
    """

    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["tokens"] = "tokens"
    words: tuple[Text, ...] = Field(
        min_length=1,
        max_length=10_000,
        description="Words to train, each one token of the encoder's vocabulary; a longer word by its pieces.",
    )


class BottleneckAdapter(Section):
    """A narrow network of two layers at a sublayer. Houlsby et al. 2019; Pfeiffer et al. 2021; He et al. 2022.

    Learning rate: LoRA's; the widening matrix starts at zero, so the encoder starts as it is.
    """

    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["bottleneck"] = "bottleneck"
    size: Int = Field(default=48, ge=1, le=4096, description="Width of the narrow part.")
    placement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        default="pfeiffer",
        description="houlsby: behind attention and feed-forward part of each layer. pfeiffer: behind the feed-forward "
        "part. parallel: beside the feed-forward part, from its input to its output.",
    )
    scale: Real = Field(
        default=1.0, gt=0, le=100, description="Factor on its output; He et al. take 4 for the parallel placement."
    )
    top_layers: TopLayerCount = None


class HeadOnly(Section):
    """No adapter: the head alone learns, over the frozen encoder. The control for every other method."""

    default_learning_rate: ClassVar[float] = 1e-3

    method: Literal["head"] = "head"


class TopLayers(Section):
    """The encoder's own top layers are trained; the rest stays frozen.

    Learning rate: 1e-4, between LoRA's and full tuning's: all weights of a layer move at once.
    """

    default_learning_rate: ClassVar[float] = 1e-4

    method: Literal["top-layers"] = "top-layers"
    layers: Int = Field(default=2, ge=1, le=256, description="Layers trained, counted from the output.")


class FullTuning(Section):
    """Every weight of the encoder is trained. The costly reference.

    Learning rate: 5e-5, the upper end of what Devlin et al. 2019 use; more destroys what pretraining learned.
    """

    default_learning_rate: ClassVar[float] = 5e-5

    method: Literal["full"] = "full"


AdapterConfig = Annotated[
    LoraAdapter
    | AdaloraAdapter
    | VeraAdapter
    | LohaAdapter
    | LokrAdapter
    | RandloraAdapter
    | OftAdapter
    | MissAdapter
    | HiraAdapter
    | ShiraAdapter
    | C3aAdapter
    | LilyAdapter
    | Ia3Adapter
    | BottleneckAdapter
    | PrefixAdapter
    | PromptAdapter
    | PTuningAdapter
    | TokensAdapter
    | LayerNormTuning
    | BitfitTuning
    | HeadOnly
    | TopLayers
    | FullTuning,
    Field(discriminator="method"),
]
