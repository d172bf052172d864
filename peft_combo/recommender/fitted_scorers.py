"""Fitted scorers of a recommender: one call from queries to scores, whatever they were learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.data.queries import Queries, pad_contexts
from peft_combo.encoder.heads.completion import (
    BundleHead,
    CompletionHead,
    encode_contexts,
    project_targets,
    score_completion,
)
from peft_combo.recipe.task import BundleTask
from peft_combo.recommender.category_calibration import Calibration, CategoryCoverage
from peft_combo.recommender.fit_data import FitData
from peft_combo.recommender.fusion import Fusion
from peft_combo.recommender.rating import FittedRating, Rater
from peft_combo.recommender.scorer_id import ScorerId
from peft_combo.scoring.base import Scorer
from peft_combo.scoring.neighbours import UserKNN
from peft_combo.scoring.next_basket import TifuKNN

# Settings of the two: what a rating adapter tells from, and what is averaged over several adapters of bundles.
_PAST, _BESIDE = "owner's past", "bundle and past"
_SCORES, _VECTORS = "mean of scores", "mean of vectors"
# The setting of users alike that reads ratings: a weighted sum over similar users of mean-centred ratings.
_RATINGS = "mean-centred ratings"
# Those of the next basket: in how many days a purchase loses half its weight.
_HALF_LIVES: dict[str, float | None] = {"all times alike": None, "half-life 90 days": 90.0, "half-life 30 days": 30.0}

ItemVectors: TypeAlias = "NDArray[np.float32] | sparse.csr_array[Any, tuple[int, int]]"


class Fitted(Protocol):
    """A scorer that has learned what it may: called with (Q) queries, it gives (Q, N) scores, NaN for silence."""

    def __call__(self, queries: Queries) -> NDArray[np.float32]: ...


@dataclass(frozen=True, eq=False)
class FittedScorer:
    """A scorer of `scoring`, asked with the context alone."""

    scorer: Scorer

    def __call__(self, queries: Queries) -> NDArray[np.float32]:
        return self.scorer.score_baskets(queries.to_csr(len(self.scorer.support)))


@dataclass(frozen=True, eq=False)
class FittedHead:
    """An adapter's head over the vectors of its encoder; it comes fitted."""

    vectors: NDArray[np.float32]
    head: CompletionHead
    targets: NDArray[np.float32]

    @classmethod
    def of(cls, vectors: NDArray[np.float32], head: CompletionHead) -> FittedHead:
        return cls(vectors, head, project_targets(head, vectors))

    @classmethod
    def of_frozen(cls, vectors: NDArray[np.float32]) -> FittedHead:
        """Return what the frozen encoder says, the cosine with the mean: (N, D) its vectors."""
        return cls.of(vectors, BundleHead(vectors.shape[1], BundleTask()).eval())

    def __call__(self, queries: Queries) -> NDArray[np.float32]:
        return score_completion(self.head, self.vectors, self.targets, queries.contexts)

    def measure_looks(self, context: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return which share of rows' likeness to a context is their pictures': (S,) and (C,) -> (C,).

        0 for a head that reads texts alone; above 1 where the texts speak against it.
        """
        dim = self.head.dim
        if self.targets.shape[1] == dim:
            return np.zeros(len(rows), np.float32)
        query: NDArray[np.float32] = encode_contexts(self.head, self.vectors, context[None]).float().cpu().numpy()[0]
        looks, whole = self.targets[rows, dim:] @ query[dim:], self.targets[rows] @ query
        return np.where(whole > 0, looks / np.maximum(whole, 1e-9), 0.0).astype(np.float32)

    def score_among(self, queries: Queries, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Score some items only: (C,) rows -> (Q, C). Few are gathered first, of many all are scored as they lie."""
        if 4 * len(rows) >= len(self.targets):
            return self(queries)[:, rows]
        return score_completion(self.head, self.vectors, self.targets[rows], queries.contexts)


@dataclass(frozen=True, eq=False)
class FittedEnsemble:
    """Several adapters of all items as one scorer: the mean of their scores, or the score of their mean vectors.

    The mean vectors of k adapters over one encoder also compare the query of each with the targets of the others:
    their score is the mean of all k * k cosines. Either way the catalogue is encoded, and kept, k times, and a query
    is pooled k times; it then costs k products with a matrix of the catalogue where scores are averaged, one where
    vectors are.

    Attributes:
        heads: what each adapter says. targets: (N, D) the mean of theirs; None where scores are averaged.
    """

    heads: tuple[FittedHead, ...]
    targets: NDArray[np.float32] | None

    @classmethod
    def of(cls, heads: Sequence[FittedHead], *, vectors: bool) -> FittedEnsemble:
        """Join adapters; `vectors` averages these and not the scores."""
        return cls(tuple(heads), _average([one.targets for one in heads]) if vectors else None)

    def __call__(self, queries: Queries) -> NDArray[np.float32]:
        if self.targets is None:
            return _average([one(queries) for one in self.heads])
        return self.encode(queries) @ self.targets.T  # (Q, D) @ (D, N) -> (Q, N)

    def score_among(self, queries: Queries, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Score some items only: (C,) rows -> (Q, C)."""
        if self.targets is None:
            return _average([one.score_among(queries, rows) for one in self.heads])
        return self.encode(queries) @ self.targets[rows].T

    def encode(self, queries: Queries) -> NDArray[np.float32]:
        """Return the mean of what each adapter makes of the contexts: (Q, D)."""
        with torch.inference_mode():
            every = [encode_contexts(one.head, one.vectors, queries.contexts) for one in self.heads]
            return _average([one.float().cpu().numpy() for one in every])


def _average(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.asarray(np.mean(np.stack(parts), axis=0), np.float32)


@dataclass(frozen=True, eq=False)
class FittedCategories:
    """Several adapters, each speaking of the items it is at home with, on one scale."""

    heads: Mapping[str, FittedHead]
    coverage: CategoryCoverage
    calibration: Calibration

    def __call__(self, queries: Queries) -> NDArray[np.float32]:
        return self.calibration.combine({name: head(queries) for name, head in self.heads.items()}, self.coverage)


@dataclass(frozen=True, eq=False)
class FittedPast:
    """What the user of a query took before, what users like them took, or both; NaN for users it never met."""

    past: sparse.csr_matrix[Any]
    user_rows: Mapping[str, int]
    alike: UserKNN | TifuKNN | None

    def find_users(self, queries: Queries) -> NDArray[np.int64]:
        """Return the row of the user of each query, (Q,); -1 where it was never met."""
        return np.array([self.user_rows.get(str(group), -1) for group in queries.groups], np.int64)

    def __call__(self, queries: Queries) -> NDArray[np.float32]:
        scores = np.full((len(queries), self.past.shape[1]), np.nan, np.float32)
        rows = self.find_users(queries)
        met = np.flatnonzero(rows >= 0)
        if self.alike is not None:
            scores[met] = self.alike.score_users(rows[met])
        else:
            scores[met] = np.log1p(np.maximum(self.past[rows[met]].toarray(), 0))
        return scores


@dataclass(frozen=True, eq=False)
class LengthenedScorer:
    """A scorer of `size` items as one of `total`; a new item is spoken of as of those it is most like, or not at all.

    Attributes:
        nearest: (M, K) rows that stand for each new item as a candidate, and their weights; None gives it no score.
        stands: the same for new items of a context, of which the first stands for them; None leaves these out.
    """

    fitted: Fitted
    size: int
    total: int
    nearest: tuple[NDArray[np.int64], NDArray[np.float32]] | None
    stands: tuple[NDArray[np.int64], NDArray[np.float32]] | None

    def __call__(self, queries: Queries) -> NDArray[np.float32]:
        shorter = self.shorten(queries)
        scores = self.fitted(shorter)
        found = np.full((len(scores), self.total), np.nan, np.float32)
        found[:, : self.size] = scores
        if self.nearest is not None:
            beside = np.array(scores)
            cells = np.nonzero(shorter.contexts >= 0)
            beside[cells[0], shorter.contexts[cells]] = np.nan  # a basket is no example of what goes with it
            found[:, self.size :] = self.average(beside[:, self.nearest[0]])
        return found

    def shorten(self, queries: Queries) -> Queries:
        """Return queries whose contexts hold none but the first items."""
        contexts = np.array(queries.contexts)
        for row in contexts:
            later = np.flatnonzero(row >= self.size)
            for place in later:
                other = -1 if self.stands is None else int(self.stands[0][row[place] - self.size, 0])
                row[place] = -1 if other in row else other
        return replace(queries, contexts=contexts)

    def average(self, own: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scores of new items: (Q, M, K) those of what stands for them -> (Q, M), NaN where none has one."""
        assert self.nearest is not None
        known = np.isfinite(own) * self.nearest[1]
        total = known.sum(axis=2)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = (np.nan_to_num(own) * known).sum(axis=2) / total
        return np.where(total > 0, mean, np.float32(np.nan)).astype(np.float32)


def build_rating(known: FitData, name: str, setting: str) -> FittedRating:
    """Return a rating adapter over what is known, as it was or will be set.

    Raises:
        DataError: there are no interactions with times that may be seen.
    """
    return FittedRating(Rater.of(*known.rated[name], known.interactions), beside=setting == _BESIDE)


def build_ensemble(known: FitData, setting: str) -> FittedEnsemble:
    """Return the adapters of all items as one scorer."""
    heads = [FittedHead.of(vectors, head) for vectors, head in known.general.values()]
    return FittedEnsemble.of(heads, vectors=setting == _VECTORS)


def build_past(known: FitData, *, neighbours: bool, setting: str = "") -> FittedPast:
    """Return what reads the past of the user of a query, or with `neighbours` that of users alike.

    Args:
        setting: of the neighbours: what they took (""), or what they rated above or below their mean.
    """
    if not neighbours:
        return FittedPast(known.past, known.user_rows, None)
    if setting == _RATINGS:
        alike = UserKNN(similarity="pearson", feedback="explicit").fit(known.ratings)
    else:
        alike = UserKNN().fit(known.taken)
    return FittedPast(known.past, known.user_rows, alike)


def list_half_lives(known: FitData) -> list[str]:
    """Return the settings of what a user takes next; one alone where purchases have no times."""
    dated = known.interactions is not None and bool(np.isfinite(known.interactions.times).any())
    return list(_HALF_LIVES)[: None if dated else 1]


def build_next_basket(known: FitData, setting: str) -> FittedPast:
    """Return what the user of a query takes again and again, beside what users with such habits take.

    Args:
        setting: one of `list_half_lives`.
    """
    habits = TifuKNN().fit(known.count_baskets(_HALF_LIVES[setting]))
    return FittedPast(known.past, known.user_rows, habits)


def fuse_scorers(fusion: Fusion[ScorerId], asks: Mapping[ScorerId, Fitted], known: FitData) -> Fitted:
    """Return what a fusion makes of the scorers it needs, by name in `asks`."""

    def ask(queries: Queries) -> NDArray[np.float32]:
        return fusion.combine({name: asks[name](queries) for name in fusion.needs}, known.evidence(queries))

    return ask


def score_beside(fitted: Fitted, sets: Sequence[NDArray[np.int64]], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Score rows beside sets of items of no user: S sets of rows, (C,) rows -> (S, C); a `Compatibility`."""
    none = np.zeros(len(sets), np.int64)
    queries = Queries(pad_contexts(sets), none, np.full(len(sets), ""), none)
    if isinstance(fitted, FittedHead | FittedEnsemble):
        return fitted.score_among(queries, rows)
    return fitted(queries)[:, rows]
