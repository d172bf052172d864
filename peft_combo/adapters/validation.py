"""Validation queries of a recipe, to measure adapters that were computed and not tuned.

Owns the queries, the figures, and the caveat where an adapter learned from what it is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.data.leakage import split_problem
from peft_combo.data.model import Dataset
from peft_combo.data.queries import Queries
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import Split, split_as
from peft_combo.encoder.heads.completion import BundleHead, build_completion_row, rank_targets
from peft_combo.errors import DataError
from peft_combo.metrics.report import Gain, ResultRow
from peft_combo.recipe.model import DataConfig, Recipe
from peft_combo.store.manifest import Manifest

METRIC = "ndcg@10"
LEARNED = "it may have learned from these bundles"
"""The caveat that forbids to rely on a figure; see `Exam.caveat`."""


@dataclass(frozen=True, eq=False)
class ValidationQueries:
    """The validation questions of a recipe; its test bundles are not looked at.

    Attributes:
        texts: of the catalogue, row by row.
    """

    dataset: Dataset
    parts: Split
    config: DataConfig
    texts: Sequence[str]
    questions: Queries

    @classmethod
    def of(cls, recipe: Recipe) -> ValidationQueries:
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
        return cls(dataset, parts, config, dataset.texts, Queries.of(dataset.bundles, parts.valid))

    @property
    def protocol(self) -> str:
        """How the figures come about, in words."""
        groups = len(set(self.questions.groups.tolist()))
        return (
            f"{len(self.questions):,} questions of {len(self.parts.valid):,} validation bundles in {groups:,} "
            f"groups of {self.dataset.name}, each answer ranked among all {len(self.texts):,} items without the rest "
            "of its bundle; 95 % interval by bootstrap over groups. The test bundles were not looked at."
        )

    def ranks(self, head: BundleHead, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """Answer every question: (Q,) ranks, 1 = best."""
        return rank_targets(head, vectors, self.questions)

    def row(self, name: str, ranks: NDArray[np.float64]) -> ResultRow:
        """Return the figures of some answers."""
        return build_completion_row(name, ranks, self.questions.groups)

    def gain(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> Gain:
        """Compare answers question by question."""
        old, new = metrics.per_query(before, METRIC), metrics.per_query(after, METRIC)
        return Gain.between(old, new, self.questions.groups)

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


def format_figures(row: ResultRow) -> dict[str, Any]:
    """Return a row as a manifest holds it."""
    return {**row.values, METRIC: {"value": row.values[METRIC], "low": row.interval[0], "high": row.interval[1]}}
