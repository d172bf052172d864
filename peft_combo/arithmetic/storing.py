"""What arithmetic makes, written as plain LoRA, read back, and measured on the questions of a recipe.

Owns the files of a LoRA that was computed and not tuned, and what is asked of it. PEFT opens the files like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from peft_combo import methods, metrics
from peft_combo.backbone import Backbone
from peft_combo.categories import split_problem
from peft_combo.data import Dataset, Split, open_dataset, split_as
from peft_combo.errors import DataError
from peft_combo.manifest import Manifest
from peft_combo.methods import CONFIG_FILE, WEIGHTS_FILE, AttachedAdapter
from peft_combo.recipe import DataConfig, Recipe
from peft_combo.tasks.base import Gain, Row
from peft_combo.tasks.bundle import HEAD_FILE, BundleHead, Questions, completion_ranks, completion_row

METRIC = "ndcg@10"
LEARNED = "it may have learned from these bundles"
"""The caveat that forbids to rely on a figure; see `Exam.caveat`."""


def write_lora(
    folder: Path, backbone: Backbone, factors: Mapping[str, tuple[Tensor, Tensor]], head: BundleHead, max_length: int
) -> AttachedAdapter:
    """Write factors and head as an adapter's files, and load them as anybody will.

    Args:
        factors: name of a linear module -> B (O, R) and A (R, I), any rank; with none at all the head stands alone.
    Raises:
        StoreError: a factor does not fit the encoder.
    """
    if factors:
        ranks = {name: right.shape[0] for name, (_, right) in factors.items()}
        tensors = {}
        for name, (left, right) in factors.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = right.contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = left.contiguous()
        config: dict[str, Any] = {
            "peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "inference_mode": True, "bias": "none",
            "base_model_name_or_path": backbone.base_name, "r": max(ranks.values()), "lora_alpha": max(ranks.values()),
            "rank_pattern": ranks, "alpha_pattern": ranks,  # alpha equal to rank: a scaling of one
            "target_modules": sorted(ranks),
        }  # fmt: skip
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({name: t.detach().cpu().contiguous() for name, t in head.state_dict().items()}, folder / HEAD_FILE)
    return methods.load(backbone.model, folder, "lora" if factors else "head", max_length)


@dataclass(frozen=True, eq=False)
class Exam:
    """The validation questions of a recipe; its test bundles are not looked at.

    Attributes:
        texts: of the catalogue, row by row.
    """

    dataset: Dataset
    parts: Split
    config: DataConfig
    texts: list[str]
    questions: Questions

    @classmethod
    def of(cls, recipe: Recipe) -> Exam:
        """Read the data of a recipe.

        Raises:
            RecipeError: the recipe leaves open where its data is.
            DataError: the data is not there, has faults, or has no validation bundles.
        """
        config = recipe.ready().data
        dataset = open_dataset(config)
        parts = split_as(dataset, config)
        if not len(parts.valid):
            raise DataError(f"{dataset.name}: expected validation bundles, found none. Raise data.valid_fraction.")
        return cls(
            dataset, parts, config, dataset.catalog.texts(config.text), Questions.of(dataset.bundles, parts.valid)
        )  # fmt: skip

    @property
    def protocol(self) -> str:
        """How the figures come about, in words."""
        groups = len(set(self.questions.clusters.tolist()))
        return (
            f"{len(self.questions):,} questions of {len(self.parts.valid):,} validation bundles in {groups:,} "
            f"groups of {self.dataset.name}, each answer ranked among all {len(self.texts):,} items without the rest "
            "of its bundle; 95 % interval by bootstrap over groups. The test bundles were not looked at."
        )

    def ranks(self, head: BundleHead, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """Answer every question: (Q,) ranks, 1 = best."""
        return completion_ranks(head, vectors, self.questions)

    def row(self, name: str, ranks: NDArray[np.float64]) -> Row:
        """Return the figures of some answers."""
        return completion_row(name, ranks, self.questions.clusters)

    def gain(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> Gain:
        """Compare answers question by question."""
        old, new = metrics.per_query(before, METRIC), metrics.per_query(after, METRIC)
        return Gain.between(old, new, self.questions.clusters)

    def caveat(self, manifest: Manifest) -> str:
        """Say what flatters an adapter here; "" where nothing does."""
        if manifest.data.split_digest == self.parts.digest:
            return "these questions were its own for validation"
        then = manifest.recipe.get("data")
        if not isinstance(then, dict):
            return "what it learned from is not known here"
        now = self.config.model_dump(mode="json")
        same = manifest.data.digest == self.dataset.digest or all(then.get(k) == now[k] for k in ("source", "path"))
        if not same:
            return ""
        if split_problem(manifest, self.parts, self.config):
            return LEARNED
        return "some of these questions were its own for validation"


def figures(row: Row) -> dict[str, Any]:
    """Return a row as a manifest holds it."""
    return {**row.values, METRIC: {"value": row.values[METRIC], "low": row.interval[0], "high": row.interval[1]}}


def unlike_backbones(manifests: Sequence[Manifest]) -> list[str]:
    """Say in what the encoders of some adapters differ: fingerprint, pooling or max_length; empty where in nothing."""
    first, *others = manifests
    found = []
    for other in others:
        for name in ("fingerprint", "pooling", "max_length"):
            mine, theirs = (str(getattr(m.backbone, name))[:12] for m in (first, other))
            if getattr(first.backbone, name) != getattr(other.backbone, name):
                found.append(f"{first.reference} has {name} {mine}, {other.reference} has {theirs}")
    return found
