"""Scores of one query by one scorer, without those of all items: its best rows, its moments, and any rows asked for.

Owns how scorers answer so: by an index over vectors where a score is an inner product, by what is stored where most
items have none or 0, and by all scores where neither holds. Knows rows; nothing of fusion or of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from peft_combo.data.queries import Queries
from peft_combo.encoder.heads.completion import encode_contexts
from peft_combo.recommender.fitted_scorers import (
    Fitted,
    FittedEnsemble,
    FittedHead,
    FittedPast,
    FittedScorer,
    LengthenedScorer,
)
from peft_combo.recommender.item_index import ItemIndex
from peft_combo.recommender.text_search import select_largest
from peft_combo.scoring.factors import ALS
from peft_combo.scoring.neighbours import ItemKNN, UserKNN
from peft_combo.scoring.text import TextCosine

Floats: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class Moments:
    """Attributes:
    count: items that have a score, those of the context left out. total: the sum of their scores. squares: of these
        squared.
    """

    count: int
    total: float
    squares: float

    @property
    def mean(self) -> float:
        """0 where no item has a score."""
        return self.total / self.count if self.count else 0.0

    @property
    def deviation(self) -> float:
        """Of the population, as fusion takes it."""
        return max(self.squares / self.count - self.mean**2, 0.0) ** 0.5 if self.count else 0.0

    def less(self, scores: Floats) -> Moments:
        """Return the moments without some scores; NaN is none."""
        return self._add(scores, -1)

    def more(self, scores: Floats) -> Moments:
        """Return the moments with more scores; NaN is none."""
        return self._add(scores, 1)

    def _add(self, scores: Floats, sign: int) -> Moments:
        wide = scores[np.isfinite(scores)].astype(np.float64)
        return Moments(
            self.count + sign * len(wide), self.total + sign * float(wide.sum()),
            self.squares + sign * float(wide @ wide),
        )  # fmt: skip


class QueryScores(Protocol):
    """What a scorer says of one query; see the head of this module."""

    @property
    def moments(self) -> Moments:
        """Of all items but the context's."""
        ...

    def find_best(self, count: int, allowed: Mask | None = None) -> Rows:
        """Return up to `count` rows with the highest scores, none of the context; (N,) `allowed` limits them."""
        ...

    def score(self, rows: Rows) -> Floats:
        """Return the scores of rows, of the context too: (C,) -> (C,), NaN where there is none."""
        ...


@dataclass(frozen=True, eq=False)
class AllScores:
    """A scorer that was asked about all items.

    Attributes:
        scores: (N,), NaN where there is none. context: rows.
    """

    scores: Floats
    context: Rows

    @cached_property
    def moments(self) -> Moments:
        return Moments(0, 0.0, 0.0).more(self.scores).less(self.scores[self.context])

    def find_best(self, count: int, allowed: Mask | None = None) -> Rows:
        heard = np.isfinite(self.scores)
        heard[self.context] = False
        rows = np.flatnonzero(heard if allowed is None else heard & allowed)
        return rows[select_largest(self.scores[rows], count)]

    def score(self, rows: Rows) -> Floats:
        return self.scores[rows]


@dataclass(frozen=True, eq=False)
class StoredScores:
    """A scorer most of whose scores are 0 or none.

    Attributes:
        rows: (M,) ascending, those whose scores are stored. scores: (M,).
        others: (N,) which of the others have a score of 0; None where none has.
    """

    rows: Rows
    scores: Floats
    others: Mask | None
    context: Rows

    @cached_property
    def moments(self) -> Moments:
        count = len(self.rows)
        if self.others is not None:
            count = int(np.count_nonzero(self.others)) + int(np.count_nonzero(~self.others[self.rows]))
        wide = self.scores.astype(np.float64)
        return Moments(count, float(wide.sum()), float(wide @ wide)).less(self.score(self.context))

    def find_best(self, count: int, allowed: Mask | None = None) -> Rows:
        kept = ~np.isin(self.rows, self.context)
        if allowed is not None:
            kept &= allowed[self.rows]
        return self.rows[kept][select_largest(self.scores[kept], count)]

    def score(self, rows: Rows) -> Floats:
        found = np.full(len(rows), np.nan, np.float32)
        if self.others is not None:
            found[self.others[rows]] = 0
        if len(self.rows):
            place = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
            there = self.rows[place] == rows
            found[there] = self.scores[place[there]]
        return found


@dataclass(frozen=True, eq=False)
class IndexedScores:
    """A scorer whose scores are inner products with vectors that an index finds the largest of.

    Attributes:
        query: (D,). known: (N,) which items have a score, the vectors of all others being 0; None where all have.
    """

    query: Floats
    index: ItemIndex
    known: Mask | None
    context: Rows

    @cached_property
    def moments(self) -> Moments:
        rows = len(self.index.vectors)
        mean, deviation = self.index.describe(self.query)
        count = rows if self.known is None else int(np.count_nonzero(self.known))
        return Moments(count, rows * mean, rows * (deviation**2 + mean**2)).less(self.score(self.context))

    def find_best(self, count: int, allowed: Mask | None = None) -> Rows:
        found: Rows = self.index.index.search(self.query[None], count, [self.context], allowed)[0][0]
        found = found[found >= 0]
        return found if self.known is None else found[self.known[found]]

    def score(self, rows: Rows) -> Floats:
        scores = self.index.vectors[rows] @ self.query  # (C, D) @ (D,)
        return scores if self.known is None else np.where(self.known[rows], scores, np.float32(np.nan))


@dataclass(frozen=True, eq=False)
class LengthenedScores:
    """A scorer of fewer items than there are now: a later one has the mean of those that stand for it, or no score.

    Attributes:
        base: of the first items. size: how many. later: (M,) scores of the others.
    """

    base: QueryScores
    size: int
    later: Floats
    context: Rows

    @cached_property
    def moments(self) -> Moments:
        own = self.context[self.context >= self.size] - self.size
        return self.base.moments.more(self.later).less(self.later[own])

    def find_best(self, count: int, allowed: Mask | None = None) -> Rows:
        first = self.base.find_best(count, None if allowed is None else allowed[: self.size])
        heard = np.isfinite(self.later) & (True if allowed is None else allowed[self.size :])
        rows = np.setdiff1d(self.size + np.flatnonzero(heard), self.context)
        rows = rows[select_largest(self.later[rows - self.size], count)]
        return np.concatenate([first, rows])

    def score(self, rows: Rows) -> Floats:
        found = np.empty(len(rows), np.float32)
        first = rows < self.size
        found[first], found[~first] = self.base.score(rows[first]), self.later[rows[~first] - self.size]
        return found


def list_vectors(fitted: Fitted) -> Floats | None:
    """Return the (N, D) vectors whose inner products with a query are a scorer's scores; None where none are."""
    match fitted:
        case FittedHead() | FittedEnsemble(targets=np.ndarray()):
            return fitted.targets
        case FittedScorer(ALS() as scorer):
            return scorer.learned.items
        case FittedScorer(TextCosine("mean") as scorer) if isinstance(scorer.learned.vectors, np.ndarray):
            return scorer.learned.vectors
        case LengthenedScorer():
            return list_vectors(fitted.fitted)
        case _:
            return None


def ask_scorer(
    fitted: Fitted, queries: Queries, index: ItemIndex | None, contexts: Sequence[Rows] | None = None
) -> Sequence[QueryScores]:
    """Ask a scorer about queries.

    Args:
        index: over `list_vectors`; None where it has none.
        contexts: for each query the rows that are no candidates; None for those of the queries.
    Returns:
        One for each query.
    """
    contexts = contexts or [row[row >= 0] for row in queries.contexts]
    match fitted:
        case LengthenedScorer():
            return _ask_lengthened(fitted, queries, index, contexts)
        case FittedScorer(ItemKNN() as scorer):
            stored, familiar = scorer.score_stored(queries.to_csr(len(scorer.support)))
            seen = scorer.support > 0
            return _split_stored(stored, [seen if one else None for one in familiar.tolist()], contexts)
        case FittedScorer(UserKNN() as scorer):
            stored = scorer.score_stored(queries.to_csr(len(scorer.support)))
            return _split_stored(stored, [None] * len(queries), contexts)
        case FittedPast(alike=UserKNN() as alike):
            rows = fitted.find_users(queries)
            met = np.flatnonzero(rows >= 0).tolist()
            found = [_say_nothing(own) for own in contexts]
            stored = alike.score_stored_users(rows[met])
            for place, one in zip(
                met, _split_stored(stored, [None] * len(met), [contexts[place] for place in met]), strict=True
            ):  # fmt: skip
                found[place] = one
            return found
        case _ if index is not None:
            wide, known = _embed(fitted, queries)
            return [
                IndexedScores(query, index, known, own) if np.isfinite(query).all() else _say_nothing(own)
                for query, own in zip(wide, contexts, strict=True)
            ]
        case _:
            return [AllScores(scores, own) for scores, own in zip(fitted(queries), contexts, strict=True)]


@torch.inference_mode()
def _embed(fitted: Fitted, queries: Queries) -> tuple[Floats, Mask | None]:
    """Return (Q, D) whose inner products with `list_vectors` are the scores, NaN for a query without any, and (N,)
    which items have one.
    """
    match fitted:
        case FittedHead():
            return encode_contexts(fitted.head, fitted.vectors, queries.contexts).float().cpu().numpy(), None
        case FittedEnsemble():
            return fitted.encode(queries), None
        case FittedScorer(ALS() as scorer):
            wide, familiar = scorer.fold_in(queries.to_csr(len(scorer.support)))
            known = scorer.learned.has_factors
        case FittedScorer(TextCosine() as scorer):
            wide, familiar = scorer.embed(queries.to_csr(len(scorer.support)))
            known = scorer.learned.has_text
        case _:
            raise TypeError(f"{type(fitted).__name__} has no vectors.")
    wide = np.where(familiar[:, None], wide, np.float32(np.nan))
    return wide, None if known.all() else known


def _ask_lengthened(
    fitted: LengthenedScorer, queries: Queries, index: ItemIndex | None, contexts: Sequence[Rows]
) -> list[QueryScores]:
    shorter = fitted.shorten(queries)
    first = [own[own < fitted.size] for own in contexts]
    made: list[QueryScores] = []
    asked = ask_scorer(fitted.fitted, shorter, index, first)
    for base, context, stands in zip(asked, contexts, shorter.contexts, strict=True):
        later = np.full(fitted.total - fitted.size, np.nan, np.float32)
        if fitted.nearest is not None:
            rows = fitted.nearest[0]
            beside = base.score(rows.ravel()).reshape(rows.shape)
            later = fitted.average(np.where(np.isin(rows, stands), np.float32(np.nan), beside)[None])[0]
        made.append(LengthenedScores(base, fitted.size, later, context))
    return made


def _split_stored(stored: Any, others: Sequence[Mask | None], contexts: Sequence[Rows]) -> list[StoredScores]:
    """Return the rows of a (Q, N) matrix with sorted columns."""
    cells = [slice(start, stop) for start, stop in zip(stored.indptr[:-1], stored.indptr[1:], strict=True)]
    return [
        StoredScores(stored.indices[own].astype(np.int64), stored.data[own], zeros, context)
        for own, zeros, context in zip(cells, others, contexts, strict=True)
    ]


def _say_nothing(context: Rows) -> StoredScores:
    return StoredScores(np.empty(0, np.int64), np.empty(0, np.float32), None, context)
