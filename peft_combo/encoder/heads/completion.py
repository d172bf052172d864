"""Bundle-completion head: query and target projections, temperature, scores and ranks over the catalogue."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from peft_combo import metrics
from peft_combo.data.queries import Queries
from peft_combo.encoder.heads.base import TaskHead, rebuild_head
from peft_combo.encoder.heads.pictures import WIDTH, PictureView
from peft_combo.metrics.report import ResultRow
from peft_combo.recipe.task import BundleTask, CompletionTask
from peft_combo.scoring.whitening import measure_whitening

# Scoring is done for so many queries at once: 512 rows of a catalogue of 100k items are 200 MiB.
_QUERY_BLOCK = 512


class CompletionHead(TaskHead):
    """Turns item vectors into queries (a set of items, as a whole) and into targets, two different spaces.

    What goes together is rarely alike, so the two sides have projections of their own. Whatever moves a head away from
    plain cosine starts at zero: an untrained head scores exactly like cosine over the frozen encoder.
    """

    kind = "bundle or sequence"
    described_by: ClassVar[type[CompletionTask]]
    config: CompletionTask

    def __init__(self, dim: int, config: CompletionTask, width: int | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.config = config
        self.width = width = dim if width is None else width  # of what is projected
        projected = config.projection == "linear"
        self.query_projection = nn.Linear(width, width, bias=False) if projected else None
        self.target_projection = nn.Linear(width, width, bias=False) if projected else None
        for layer in (self.query_projection, self.target_projection):
            if layer is not None:
                nn.init.zeros_(layer.weight)
        self.log_scale = nn.Parameter(
            torch.tensor(float(-np.log(config.temperature))), requires_grad=config.learn_temperature
        )
        self.dropout = nn.Dropout(config.head_dropout)

    def query(self, items: Tensor, contexts: Tensor) -> Tensor:
        """Encode sets of items.

        Args:
            items: (M, D) item vectors.
            contexts: (Q, S) rows of `items`, -1 where a set is smaller than S.
        Returns:
            (Q, D) of unit length; the same in whatever order a set is written.
        """
        raise NotImplementedError

    def target(self, items: Tensor) -> Tensor:
        """Project (M, D) item vectors to targets, (M, D) of unit length."""
        return project(self.dropout(items), self.target_projection)

    def step_weights(self) -> list[Tensor]:
        """Return the weights that are the way from plain cosine: at 0 the head is untrained."""
        return [layer.weight for layer in (self.query_projection, self.target_projection) if layer is not None]

    def interpolate(self, alpha: float) -> Self:
        """Return a copy that goes only the share `alpha` of the way from plain cosine to what was learned.

        Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT), eq. 1, applied to the head.
        """
        twin = copy.deepcopy(self)
        with torch.no_grad():
            for weight in twin.step_weights():
                weight.mul_(alpha)
        return twin

    def spec(self) -> dict[str, Any]:
        """Return what `from_spec` needs besides the weights."""
        return {**self.config.model_dump(mode="json"), "dim": self.dim}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Self:
        """Rebuild a stored head, in evaluation mode.

        Raises:
            StoreError: the weights are not those of such a head.
        """
        fields = {key: value for key, value in spec.items() if key != "dim"}
        return rebuild_head(lambda: cls(int(spec["dim"]), cls.described_by.model_validate(fields)), weights)


class BundleHead(CompletionHead):
    """The head of the bundle task: the set encoder is the mean, plain or weighted.

    Attributes:
        picture: what it makes of pictures; None where it reads texts alone. With it an item's vector is (D + W,): that
            of its text, then what `PictureView.reduce` made of its picture, 0 where it has none.
    """

    kind = "bundle"
    described_by = BundleTask
    config: BundleTask
    centre: Tensor
    change: Tensor

    def __init__(self, dim: int, config: BundleTask, picture: PictureView | None = None) -> None:
        super().__init__(dim, config, dim if picture is None else dim + WIDTH)
        self.picture = picture
        self.attention = nn.Linear(self.width, 1, bias=False) if config.pooling == "attention" else None
        if self.attention is not None:
            nn.init.zeros_(self.attention.weight)
        self.whitened = config.whitening == "half"
        if self.whitened:  # measured, not learned; until then the vectors stay as they are
            self.register_buffer("centre", torch.zeros(dim))
            self.register_buffer("change", torch.eye(dim))

    def measure(self, vectors: NDArray[np.float32]) -> None:
        """Measure on (N, D) vectors of a catalogue what half-whitens them; nothing where the recipe wants none.

        The parts of pictures were reduced so before.
        """
        if self.whitened:
            measured = measure_whitening(vectors[:, : self.dim])
            for buffer, value in zip((self.centre, self.change), measured, strict=True):
                buffer.copy_(torch.from_numpy(value))

    def _prepare(self, items: Tensor) -> Tensor:
        """Half-whiten (M, D) vectors of length 1, where the recipe says so, and weigh pictures, where there are any."""
        if self.picture is None:
            return self._whiten(items)
        return self.picture.join(self._whiten(items[:, : self.dim]), items[:, self.dim :])

    def _whiten(self, items: Tensor) -> Tensor:
        if not self.whitened:
            return items
        return functional.normalize((items - self.centre) @ self.change, dim=-1)

    def spec(self) -> dict[str, Any]:
        return super().spec() if self.picture is None else {**super().spec(), "picture": self.picture.spec()}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Self:
        if "picture" not in spec:
            return super().from_spec(spec, weights)
        fields = {key: value for key, value in spec.items() if key not in ("dim", "picture")}
        config = cls.described_by.model_validate(fields)
        return rebuild_head(lambda: cls(int(spec["dim"]), config, PictureView.from_spec(spec["picture"])), weights)

    def target(self, items: Tensor) -> Tensor:
        return super().target(self._prepare(items))

    def query(self, items: Tensor, contexts: Tensor) -> Tensor:
        """Encode sets of items, see `CompletionHead`; NaN for an empty one, of which this head can say nothing."""
        present = contexts >= 0  # (Q, S)
        items = self._prepare(items)
        members = torch.cat([items, items.new_zeros(1, self.width)])[contexts]  # (Q, S, D); -1 is the last row
        if self.attention is None:
            weights = present.to(items.dtype)
            weights = weights / weights.sum(1, keepdim=True)
        else:
            scores = self.attention(members)[..., 0].masked_fill(~present, float("-inf"))
            weights = scores.softmax(1)
        pooled = (weights[:, None] @ members)[:, 0]  # (Q, 1, S) @ (Q, S, D) -> (Q, D)
        pooled = torch.where(present.any(1, keepdim=True), pooled, torch.nan)
        return project(self.dropout(pooled), self.query_projection)


def project(vectors: Tensor, projection: nn.Linear | None) -> Tensor:
    """Move (..., D) vectors by a projection that starts at zero; (..., D) of unit length."""
    moved = vectors if projection is None else vectors + projection(vectors)
    return functional.normalize(moved, dim=-1)


def step_scale(head: CompletionHead) -> Tensor:
    """Return what turns a cosine into log-odds: one over the temperature, at most 100."""
    return head.log_scale.exp().clamp(max=100.0)


@torch.inference_mode()
def project_targets(head: CompletionHead, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the target side of items, (N, D) -> (N, D) float32 of unit length."""
    # A mapped file is read-only, and torch warns of such arrays.
    items = torch.from_numpy(np.require(vectors, requirements=["C", "W"])).to(head.log_scale.device)
    targets: NDArray[np.float32] = head.target(items).float().cpu().numpy()
    return targets


@torch.inference_mode()
def score_completion(
    head: CompletionHead, vectors: NDArray[np.float32], targets: NDArray[np.float32], contexts: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Score every item of a catalogue as the completion of each context.

    Args:
        vectors: (N, D) item vectors of the whole catalogue.
        targets: (N, D) what `project_targets` made of them.
        contexts: (Q, S) rows, -1 for none; a context may be empty.
    Returns:
        (Q, N) float32 cosine between query and target, higher is better; context items are scored like all others.
        NaN for an empty context where the head cannot say what begins a bundle (`BundleHead`).
    """
    query: NDArray[np.float32] = encode_contexts(head, vectors, contexts).float().cpu().numpy()
    return query @ targets.T  # (Q, D) @ (D, N) -> (Q, N)


def encode_contexts(head: CompletionHead, vectors: NDArray[np.float32], contexts: NDArray[np.int64]) -> Tensor:
    """Encode sets of catalogue rows, (Q, S) with -1 for none -> (Q, D); only the vectors of their items are read."""
    used, place = np.unique(contexts, return_inverse=True)  # -1, where there is one, comes first
    absent = int(used[0] == -1) if len(used) else 0
    items = torch.from_numpy(np.array(vectors[used[absent:]])).to(head.log_scale.device)
    sets = torch.from_numpy(place.reshape(contexts.shape) - absent).to(items.device)
    return head.query(items, sets)


def rank_targets(head: CompletionHead, vectors: NDArray[np.float32], questions: Queries) -> NDArray[np.float64]:
    """Rank each answer among the whole catalogue without its context; ties at mid-rank.

    Args:
        vectors: (N, D) item vectors of the whole catalogue.
    Returns:
        (Q,) float64, 1 = best.
    """
    excluded, targets = questions.excluded(), project_targets(head, vectors)
    ranks = [np.empty(0, np.float64)]
    for start in range(0, len(questions), _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        scores = score_completion(head, vectors, targets, questions.contexts[block])
        ranks.append(metrics.midranks(scores, questions.targets[block], excluded[block]))
    return np.concatenate(ranks)


def build_completion_row(name: str, ranks: NDArray[np.float64], clusters: NDArray[Any]) -> ResultRow:
    """Return the ranking metrics of some answers, with the interval of NDCG@10: (Q,) ranks, (Q,) clusters."""
    interval = metrics.bootstrap_interval(metrics.per_query(ranks, "ndcg@10"), clusters)
    return ResultRow(name, metrics.ranking_metrics(ranks), interval)
