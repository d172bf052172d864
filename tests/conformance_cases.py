"""Every adapter method in every architecture: what is tried of a pair, and the table of how it went.

The tests assert on what is found here, and `benchmarks/conformance.py` writes the same findings to docs/conformance.md.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from made_up import build_encoder
from numpy.typing import NDArray

from peft_combo.encoder import methods
from peft_combo.encoder.backbone import Backbone
from peft_combo.errors import BackboneError
from peft_combo.recipe.adapter import (
    AdaloraAdapter,
    AdapterConfig,
    BitfitTuning,
    BottleneckAdapter,
    C3aAdapter,
    FullTuning,
    HeadOnly,
    HiraAdapter,
    Ia3Adapter,
    LayerNormTuning,
    LilyAdapter,
    LohaAdapter,
    LokrAdapter,
    LoraAdapter,
    MissAdapter,
    OftAdapter,
    PrefixAdapter,
    PromptAdapter,
    PTuningAdapter,
    RandloraAdapter,
    ShiraAdapter,
    TokensAdapter,
    TopLayers,
    VeraAdapter,
)
from peft_combo.tuning.checkpoint import optimizer_state, optimizer_tensors

METHODS: dict[str, AdapterConfig] = {
    "lora": LoraAdapter(rank=4),
    "lora: rslora": LoraAdapter(rank=4, rslora=True),
    "lora: dora": LoraAdapter(rank=4, dora=True),
    "lora: pissa": LoraAdapter(rank=4, pissa=True),
    "lora: plus_ratio": LoraAdapter(rank=4, plus_ratio=16),
    "lora: freeze_a": LoraAdapter(rank=4, freeze_a=True),
    # Ranks are lowered at both steps that are made here.
    "adalora": AdaloraAdapter(initial_rank=4, target_rank=2, allocate_every=1, warmup_fraction=0),
    "vera": VeraAdapter(rank=16),
    "loha": LohaAdapter(rank=4),
    "lokr": LokrAdapter(rank=2),
    "randlora": RandloraAdapter(rank=8, alpha=160),
    "oft": OftAdapter(block_size=16),
    "miss": MissAdapter(rank=4),
    "hira": HiraAdapter(rank=4),
    "shira": ShiraAdapter(rank=4),
    "c3a": C3aAdapter(block_size=16),
    "lily": LilyAdapter(rank=4),
    "ia3": Ia3Adapter(),
    "bottleneck: houlsby": BottleneckAdapter(size=8, placement="houlsby"),
    "bottleneck: pfeiffer": BottleneckAdapter(size=8, placement="pfeiffer"),
    "bottleneck: parallel": BottleneckAdapter(size=8, placement="parallel"),
    "prefix": PrefixAdapter(length=4),
    "prefix: projection": PrefixAdapter(length=4, projection=True, projection_size=16),
    "prompt": PromptAdapter(length=4),
    "p-tuning": PTuningAdapter(length=4, network_size=16),
    "p-tuning: lstm": PTuningAdapter(length=4, network="lstm", network_size=16),
    "tokens": TokensAdapter(words=("w1", "w5", "w12")),
    "layer-norm": LayerNormTuning(),
    "bitfit": BitfitTuning(),
    "head": HeadOnly(),
    "top-layers": TopLayers(layers=1),
    "full": FullTuning(),
}

_QUANTISED: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes packs 64 numbers at a time
ENCODERS: dict[str, tuple[str, dict[str, Any], Literal["none", "8bit", "4bit"]]] = {
    "BERT": ("bert", {}, "none"),
    "RoBERTa": ("roberta", {}, "none"),
    "ELECTRA": ("electra", {}, "none"),
    "DistilBERT": ("distilbert", {"n_layers": 2}, "none"),
    "ModernBERT": ("modernbert", {}, "none"),
    "MPNet": ("mpnet", {}, "none"),
    "ALBERT": ("albert", {}, "none"),
    "DeBERTa": ("deberta-v2", {}, "none"),
    "BERT, 8bit": ("bert", _QUANTISED, "8bit"),
    "BERT, 4bit": ("bert", _QUANTISED, "4bit"),
}

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w12 w13"]
MAX_LENGTH = 16
# A reloaded adapter does the same sums, but for PiSSA and AdaLoRA, which are stored as plain LoRA; in 8 bits those
# other sums are rounded to other steps.
RELOAD_TOLERANCE = {"none": 5e-6, "8bit": 2e-2, "4bit": 1e-4}


MOVED = 1e-5  # two steps move the vectors of these encoders by 7e-5 at least; rounding does by 1e-7


@dataclass
class Tuned:
    """An adapter and its optimizer, as the training loop pairs them."""

    backbone: Backbone
    config: AdapterConfig
    seed: int = 0
    attached: methods.AttachedAdapter = field(init=False)
    steps: int = 0

    def __post_init__(self) -> None:
        self.attached = methods.attach(
            self.backbone.model, self.config, max_length=MAX_LENGTH, total_steps=20, seed=self.seed,
            tokenizer=self.backbone.tokenizer,
        )  # fmt: skip
        self.attached.encoder.eval()

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer | None:
        groups = [
            {"params": g.parameters, "lr": 1e-2 * g.rate, "weight_decay": 0.01 * g.decayed}
            for g in self.attached.groups()
        ]
        return torch.optim.AdamW(groups) if groups else None

    def loss(self) -> torch.Tensor:
        """How far the vectors of four texts are from fixed random directions."""
        dim = self.backbone.dim
        wanted = torch.nn.functional.normalize(torch.randn(4, dim, generator=torch.Generator().manual_seed(1)), dim=1)
        device = self.backbone.device
        padded = self.backbone.tokenize(TEXTS).pad(np.arange(len(TEXTS)), self.backbone.pad_id)
        ids, mask = (part.to(device) for part in padded)
        pooled = self.backbone.pool(self.attached.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
        loss = -(pooled * wanted.to(device)).sum(1).mean()
        extra = self.attached.regularizer()
        return loss if extra is None else loss + extra

    def step(self) -> None:
        self.steps += 1
        if self.optimizer is not None:
            self.loss().backward()
            self.optimizer.step()
            self.attached.after_step(self.steps)
            self.optimizer.zero_grad()

    def vectors(self) -> NDArray[np.float32]:
        return self.backbone.encode(TEXTS, self.attached)

    def silent(self) -> list[str]:
        """Names of trained tensors without a gradient, away from the start, where a factor of zero hides the other."""
        trained = self.attached.trainable()
        start = {name: p.detach().clone() for name, p in trained.items()}
        noise = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise).to(parameter.device))
        if trained:
            self.loss().backward()
        silent = [name for name, p in trained.items() if p.grad is None or not float(p.grad.abs().sum()) > 0]
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(start[name])
                parameter.grad = None
        return silent

    def resumed(self) -> Tuned:
        """A new one of the same seed, brought to where this one is as a checkpoint would."""
        other = Tuned(self.backbone, self.config, self.seed)
        state, values = self.attached.state()
        other.attached.load_state(state, json.loads(json.dumps(values)))
        other.steps = self.steps
        if self.optimizer is not None and other.optimizer is not None:
            kept = optimizer_tensors(self.optimizer.state_dict()["state"])
            tensors = {name: tensor.clone() for name, tensor in kept.items()}  # a file would not be shared either
            other.optimizer.load_state_dict({**other.optimizer.state_dict(), "state": optimizer_state(tensors)})
        return other


@dataclass(frozen=True)
class Finding:
    """How one method went in one encoder.

    Attributes:
        refused: why it was refused; "" where it was not, and then the rest says how it went.
        silent: trained tensors that got no gradient.
        moved: largest change of a coordinate of a vector by two steps.
        base_same: the frozen encoder's vectors and tensors are bit for bit what they were, the adapter beside it.
        reloaded: largest difference of a coordinate after saving and loading.
        resumed: largest difference between two steps in one go and with a checkpoint between.
        vectors: of TEXTS after the two steps.
    """

    refused: str = ""
    silent: tuple[str, ...] = ()
    moved: float = 0.0
    base_same: bool = True
    reloaded: float = 0.0
    resumed: float = 0.0
    vectors: NDArray[np.float32] | None = None


def find(backbone: Backbone, config: AdapterConfig) -> Finding:
    """Try one method in one encoder."""
    base = backbone.encode(TEXTS)
    tensors = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    try:
        tuned = Tuned(backbone, config)
    except BackboneError as error:
        return Finding(refused=str(error))
    silent = tuned.silent()
    start = tuned.vectors()
    tuned.step()
    resumed = tuned.resumed()
    tuned.step()
    resumed.step()
    vectors = tuned.vectors()
    with tempfile.TemporaryDirectory() as folder:
        tuned.attached.save(Path(folder), "tiny")
        loaded = methods.load(backbone.model, Path(folder), tuned.attached.stored_as, MAX_LENGTH)
        reloaded = backbone.encode(TEXTS, loaded)
    same = np.array_equal(backbone.encode(TEXTS), base)
    same &= all(torch.equal(tensors[name], tensor) for name, tensor in backbone.model.state_dict().items())
    return Finding(
        silent=tuple(silent),
        moved=float(np.abs(vectors - start).max()),
        base_same=same,
        reloaded=float(np.abs(reloaded - vectors).max()),
        resumed=float(np.abs(resumed.vectors() - vectors).max()),
        vectors=vectors,
    )


class Matrix:
    """The encoders, built when first needed, and the findings, each made once."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self._folder, self._device = folder, device
        self._backbones: dict[str, Backbone] = {}
        self._findings: dict[tuple[str, str], Finding] = {}

    def backbone(self, encoder: str) -> Backbone:
        if encoder not in self._backbones:
            architecture, changes, quantization = ENCODERS[encoder]
            changes = changes if architecture == "distilbert" else {"num_hidden_layers": 2, **changes}
            folder = build_encoder(self._folder / encoder.replace(", ", "-"), architecture, **changes)
            self._backbones[encoder] = Backbone.load(
                str(folder), max_length=MAX_LENGTH, quantization=quantization, device=self._device
            )
        return self._backbones[encoder]

    def finding(self, method: str, encoder: str) -> Finding:
        if (method, encoder) not in self._findings:
            self._findings[method, encoder] = find(self.backbone(encoder), METHODS[method])
        return self._findings[method, encoder]


def passes(method: str, encoder: str, finding: Finding) -> bool:
    """Whether a pair that was not refused does all it should."""
    return (
        not finding.silent
        and (finding.moved > MOVED) == (method != "head")
        and finding.base_same
        and finding.reloaded <= RELOAD_TOLERANCE[ENCODERS[encoder][2]]
        and finding.resumed == 0.0
    )


def page(
    finding_of: Callable[[str, str], Finding], methods: Sequence[str] = tuple(METHODS),
    encoders: Sequence[str] = tuple(ENCODERS),
) -> str:  # fmt: skip
    """Return docs/conformance.md, or as much of it as some methods and encoders fill."""
    reasons: dict[str, int] = {}
    rows = []
    for method in methods:
        cells = []
        for encoder in encoders:
            finding = finding_of(method, encoder)
            if finding.refused:
                cells.append(f"refused [{reasons.setdefault(finding.refused, len(reasons) + 1)}]")
            else:
                cells.append("ok" if passes(method, encoder, finding) else "FAILS")
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(
        [
            "# Which method works in which encoder",
            "",
            "Written by `python benchmarks/conformance.py`; the tests fail where a run gives another page. `ok` means,",
            "in a tiny encoder of that architecture: every trained tensor gets a gradient; training moves the vectors;",
            "the frozen encoder beside it gives the same bits before and after; saved and loaded, the vectors are",
            "equal; a run stopped after a step and resumed is the uninterrupted one bit for bit, optimizer included. A",
            "pair that is refused says why before it trains.",
            "",
            f"| method | {' | '.join(encoders)} |",
            f"|---|{'---|' * len(encoders)}",
            *rows,
            "",
            *(f"{number}. {reason}" for reason, number in reasons.items()),
            "",
        ]
    )


def counts(finding_of: Callable[[str, str], Finding]) -> Mapping[str, int]:
    """Return how many pairs are ok, refused, failing."""
    told = {"ok": 0, "refused": 0, "failing": 0}
    for method in METHODS:
        for encoder in ENCODERS:
            finding = finding_of(method, encoder)
            ok = passes(method, encoder, finding)
            told["refused" if finding.refused else "ok" if ok else "failing"] += 1
    return told
