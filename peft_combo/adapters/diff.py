"""Adapter diff: what each of two adapters changes in the weights, and how often that shows in an answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_combo import metrics
from peft_combo.adapters.deltas import Changes, Spectrum, read_changes, relative
from peft_combo.callbacks import RunCallback
from peft_combo.data.queries import Queries
from peft_combo.encoder.architectures import find_architecture
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import LiveAdapter
from peft_combo.encoder.heads.completion import BundleHead, project_targets, score_completion
from peft_combo.encoder.index import ExactIndex
from peft_combo.errors import BackboneError, DataError

NEIGHBOURS = 10
SUBSPACE = 8
"""The most directions of two changes that are compared; the main table of Hu et al. 2021, section 7.2 has so many."""

_MOST_QUERIES = 1_000  # texts whose neighbours are looked up among all
_BLOCK = 256


@dataclass(frozen=True)
class Change:
    """One weight, or several taken as one long vector, as two adapters change it.

    Attributes:
        a, b: Frobenius norm of the change over that of what is changed.
        cosine: between the two changes; None where one of them is zero.
        overlap: similarity of the subspaces of inputs that the changes read, from 0 (orthogonal) to 1 (the smaller
            within the larger), for the first `directions` of each; None where there is no matrix to speak of. Chance
            level is ``directions / width``.
    """

    name: str
    a: float
    b: float
    cosine: float | None
    overlap: float | None = None
    directions: int | None = None


@dataclass(frozen=True)
class Predictions:
    """How far two adapters answer alike.

    Attributes:
        texts: how many different ones. cosine: mean between the two vectors of a text.
        neighbours: mean share of the ten nearest other texts that are the same, of `queries` texts.
        questions: how many were asked; None where there were none, as then for what follows.
        first_churn, list_churn: share of questions whose first answer, and whose set of ten, is another.
        ndcg: NDCG@10 of the first and of the second adapter.
    """

    texts: int
    cosine: float
    neighbours: float
    queries: int
    questions: int | None = None
    first_churn: float | None = None
    list_churn: float | None = None
    ndcg: tuple[float, float] | None = None


@dataclass(frozen=True)
class Difference:
    """What `diff` found.

    Attributes:
        layers: the changes summed up by layer, and last over everything. modules: by weight.
        head: by map of the head, relative to the identity it is added to.
        scales: what the two heads multiply cosines by.
        notes: what could not be compared, and why.
    """

    a: str
    b: str
    layers: tuple[Change, ...]
    modules: tuple[Change, ...]
    head: tuple[Change, ...]
    scales: tuple[float, float]
    predictions: Predictions | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def diff(
    a: LiveAdapter,
    b: LiveAdapter,
    backbone: Backbone,
    *,
    texts: Sequence[str] | None = None,
    questions: Queries | None = None,
    callback: RunCallback | None = None,
) -> Difference:
    """Compare two adapters of one encoder by their weights and, on `texts`, by what they answer.

    Args:
        texts: a catalogue's, row by row; None leaves answers out.
        questions: completion questions over the rows of `texts`.
    Raises:
        DataError: fewer than two different texts.
    Source: subspace similarity: Hu et al. 2021, LoRA, equation 4, of right singular vectors; churn: Milani Fard et al.
        2016, "Launch and iterate: reducing prediction churn", section 2.
    """
    callback = callback or RunCallback()
    notes = []
    layers: tuple[Change, ...] = ()
    modules: tuple[Change, ...] = ()
    try:
        changes = read_changes(a.attached), read_changes(b.attached)
    except BackboneError as error:
        notes.append(f"Weights were not compared. {error}")
    else:
        layers, modules = _compare_weights(*changes, backbone.model, callback)
    head, said = _compare_heads(a.head, b.head)
    predictions = None if texts is None else _compare_predictions(a, b, backbone, texts, questions, callback)
    scales = (math.exp(float(a.head.log_scale)), math.exp(float(b.head.log_scale)))
    return Difference(a.reference, b.reference, layers, modules, head, scales, predictions, (*notes, *said))


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """Squares and products, summed over weights: in float64, since one layer may change a thousand times another."""

    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    whole: float = 0.0

    @classmethod
    def of(cls, a: Tensor, b: Tensor, whole: float) -> _Sums:
        one, two = a.double().flatten(), b.double().flatten()
        return cls(float(one @ one), float(two @ two), float(one @ two), whole**2)

    def add(self, other: _Sums) -> None:
        self.aa, self.bb = self.aa + other.aa, self.bb + other.bb
        self.ab, self.whole = self.ab + other.ab, self.whole + other.whole

    def change(self, name: str, overlap: float | None = None, directions: int | None = None) -> Change:
        whole = math.sqrt(self.whole)
        cosine = self.ab / math.sqrt(self.aa) / math.sqrt(self.bb) if self.aa and self.bb else None
        return Change(
            name, relative(math.sqrt(self.aa), whole), relative(math.sqrt(self.bb), whole), cosine, overlap, directions
        )  # fmt: skip


def _compare_weights(
    a: Changes, b: Changes, model: nn.Module, callback: RunCallback
) -> tuple[tuple[Change, ...], tuple[Change, ...]]:
    parameters = dict(model.named_parameters())
    place = f"{find_architecture(model).layers}."
    layers: dict[str, _Sums] = {}
    modules = []
    total = _Sums()
    touched = [
        name for name in parameters if _is_touched(name, a) or _is_touched(name, b)
    ]  # in the encoder's own order
    callback.on_stage("Comparing weights", len(touched))
    for name in touched:
        module, parameter = name.removesuffix(".weight"), parameters[name].detach().cpu().float()
        linear = module in a.linear or module in b.linear
        one, two = (_get_change(name, changes, parameter) for changes in (a, b))
        sums = _Sums.of(one, two, float(torch.linalg.norm(parameter)))
        overlap, directions = _measure_overlap(one, two, parameter) if linear else (None, None)
        modules.append(sums.change(module if linear else name, overlap, directions))
        inside = name.startswith(place)
        layer = f"layer {name.removeprefix(place).split('.')[0]}" if inside else "outside the layers"
        layers.setdefault(layer, _Sums()).add(sums)
        total.add(sums)
        callback.on_advance(1)
    if not modules:
        return (), ()
    summed = [*(sums.change(name) for name, sums in layers.items()), total.change("all of these")]
    return tuple(summed), tuple(modules)


def _is_touched(parameter: str, changes: Changes) -> bool:
    return parameter in changes.other or parameter.removesuffix(".weight") in changes.linear


def _get_change(parameter: str, changes: Changes, like: Tensor) -> Tensor:
    change = changes.linear.get(parameter.removesuffix(".weight"), changes.other.get(parameter))
    return torch.zeros_like(like) if change is None else change


def _measure_overlap(a: Tensor, b: Tensor, weight: Tensor) -> tuple[float | None, int | None]:
    one, two = Spectrum.of(a, weight), Spectrum.of(b, weight)
    directions = min(one.rank(), two.rank(), SUBSPACE)
    if not directions:
        return None, None
    shared = one.right[:directions] @ two.right[:directions].T  # (R, I) @ (I, R)
    return min(float(shared.square().sum()) / directions, 1.0), directions


def _compare_heads(a: BundleHead, b: BundleHead) -> tuple[tuple[Change, ...], list[str]]:
    notes = [
        f"The heads differ in {name}: {getattr(a.config, name)} and {getattr(b.config, name)}."
        for name in ("projection", "pooling")
        if getattr(a.config, name) != getattr(b.config, name)
    ]
    maps: Mapping[str, Tensor] = a.state_dict()
    others = b.state_dict()
    found = []
    for name, one in maps.items():
        if name != "log_scale" and name in others:
            # A projection is added to the identity; attention starts at zero and is added to nothing.
            whole = math.sqrt(one.shape[0]) if one.shape[0] == one.shape[1] else 1.0
            found.append(_Sums.of(one.cpu(), others[name].cpu(), whole).change(name.removesuffix(".weight")))
    return tuple(found), notes


# --- answers ----------------------------------------------------------------------------------------------------------


def _compare_predictions(
    a: LiveAdapter,
    b: LiveAdapter,
    backbone: Backbone,
    texts: Sequence[str],
    questions: Queries | None,
    callback: RunCallback,
) -> Predictions:
    first: dict[str, int] = {}
    for row, text in enumerate(texts):
        first.setdefault(text, row)
    if len(first) < 2:
        raise DataError(f"Expected at least 2 different texts to compare on, found {len(first)}.")
    callback.on_stage("Encoding the texts", 2 * len(first))
    mine, theirs = (backbone.encode(texts, one.attached, progress=callback.on_advance) for one in (a, b))
    rows = np.fromiter(first.values(), np.int64)
    one, two = mine[rows], theirs[rows]
    asked = np.sort(np.random.default_rng(0).choice(len(rows), min(len(rows), _MOST_QUERIES), replace=False))
    near = [_find_neighbours(vectors, asked) for vectors in (one, two)]
    found = Predictions(
        len(rows), float((one * two).sum(1, dtype=np.float64).mean()), float(_measure_shared(*near).mean()),
        len(asked),
    )  # fmt: skip
    if questions is None or not len(questions):
        return found
    (lists, ranks), (other_lists, other_ranks) = _answer(a, mine, questions), _answer(b, theirs, questions)
    return Predictions(
        found.texts, found.cosine, found.neighbours, found.queries, len(questions),
        float((lists[:, 0] != other_lists[:, 0]).mean()),
        float((_measure_shared(lists, other_lists) < 1).mean()),
        (_measure_ndcg(ranks), _measure_ndcg(other_ranks)),
    )  # fmt: skip


def _find_neighbours(vectors: NDArray[np.float32], asked: NDArray[np.int64]) -> NDArray[np.int64]:
    depth = min(NEIGHBOURS, len(vectors) - 1)
    found, _ = ExactIndex(vectors).search(vectors[asked], depth, list(asked[:, None]))
    return found


def _measure_shared(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return for each row the share of one list that is in the other: (Q, K), (Q, K) -> (Q,)."""
    share: NDArray[np.float64] = (a[:, :, None] == b[:, None, :]).any(2).mean(1)
    return share


def _answer(
    live: LiveAdapter, vectors: NDArray[np.float32], questions: Queries
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the first ten of each list (Q, 10), of equal scores the lower row first, and the answers' ranks (Q,)."""
    targets = project_targets(live.head, vectors)
    lists, ranks = [], []
    for start in range(0, len(questions), _BLOCK):
        part = questions.take(slice(start, start + _BLOCK))
        scores = score_completion(live.head, vectors, targets, part.contexts)
        ranks.append(metrics.midranks(scores, part.targets, part.excluded()))
        query, place = np.nonzero(part.contexts >= 0)
        scores[query, part.contexts[query, place]] = -np.inf
        lists.append(np.argsort(-scores, axis=1, kind="stable")[:, :NEIGHBOURS])
    return np.concatenate(lists), np.concatenate(ranks)


def _measure_ndcg(ranks: NDArray[np.float64]) -> float:
    return float(metrics.per_query(ranks, "ndcg@10").mean())
