"""Item-kNN and user-kNN: items like those in the context, users like this one.

Sparse throughout: products are made a block at a time and pruned to the k nearest before the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.machine import LIMITS, row_blocks
from peft_combo.scoring.base import (
    Csr,
    HistoryScorer,
    Learned,
    Vectors,
    binary,
    concatenate,
    lengths,
    mask_missing,
    no_interactions,
    positive,
    row_of,
    scale_rows,
    stack,
    support_of,
    unpack_history,
    widen,
    with_data,
)


@dataclass(frozen=True)
class Similar(Learned):
    """Attributes:
    similarity: (N, N) float32, per item its k nearest others.
    """

    similarity: Csr


@dataclass(eq=False)
class ItemKNN(HistoryScorer[Similar]):
    """Items near those of the context: score = sum_c x_c s(c, item) / sum_c |x_c|, over context items that were seen.

    An item is the column of its rows. `similarity`:

    - ``cosine``: dot / (|a| |b| + shrinkage).
    - ``tfidf``: the same after sqrt(x) * ln((1 + N) / (1 + items of the row)), so that a row of few items says more.

    NaN: an item no row holds; every item where that is so of the whole context. 0 means seen, no near neighbour.
    An update is exact. It renews only items that share a row with those of the new rows; tfidf depends on the number of
    items, so where this changes all are renewed.

    Attributes:
        k: nearest others kept per item, >= 1.
        similarity: as above.
        shrinkage: holds back similarity that rests on few rows, >= 0.
    Source: Sarwar et al. 2001; Deshpande and Karypis 2004 (k nearest per context item); shrinkage as in Ferrari Dacrema
    et al. 2019.
    """

    k: int = 100
    similarity: Literal["cosine", "tfidf"] = "cosine"
    shrinkage: float = 0.0
    _learned_type: ClassVar[type[Learned]] = Similar

    def __post_init__(self) -> None:
        positive("k", self.k)
        positive("shrinkage", self.shrinkage, zero=True)
        if self.similarity not in ("cosine", "tfidf"):
            raise ValueError(f'similarity must be "cosine" or "tfidf", found {self.similarity!r}.')

    def _learn(self, history: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> Similar:
        return Similar(history, support_of(history), self._nearest(history, np.arange(history.shape[1])))

    def _extend(self, known: Similar, rows: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> Similar:
        history = stack(known.history, rows)
        grown = history.shape[1] > known.history.shape[1]
        if self.similarity == "tfidf" and grown:
            return self._learn(history, items, times)  # a number that is in every weight has changed
        # The norm of each item in the new rows changes, and with it its similarity to all that share a row with it.
        touched = np.zeros(history.shape[1], np.float32)
        touched[rows.indices] = 1
        sharing = history[np.flatnonzero(history @ touched)]
        renewed = np.unique(sharing.indices).astype(np.int64)
        kept = np.setdiff1d(np.arange(known.history.shape[1]), renewed)
        empty = np.setdiff1d(np.arange(known.history.shape[1], history.shape[1]), renewed)
        parts = [
            widen(known.similarity[kept], history.shape[1]),
            self._nearest(history, renewed),
            no_interactions(len(empty), history.shape[1]),
        ]
        similarity = concatenate(parts, history.shape[1])[np.argsort(np.concatenate([kept, renewed, empty]))]
        return Similar(history, support_of(history), similarity)

    def _score(self, known: Similar, contexts: Csr) -> NDArray[np.float32]:
        return score_neighbours(known, contexts)

    def score_stored(self, contexts: Csr) -> tuple[Csr, NDArray[np.bool_]]:
        """Score only items with a near neighbour in a context; every other item that was seen has 0.

        Args:
            contexts: (Q, N) canonical.
        Returns:
            (Q, N) with sorted columns, and (Q,) which contexts hold an item that was seen.
        Raises:
            RuntimeError: nothing was fitted yet.
        """
        known = self._require_fitted("score_stored")
        weights, familiar = _share_weights(known, contexts)
        scores: Csr = (weights @ known.similarity).tocsr()
        scores.sort_indices()
        return scores, familiar

    def _nearest(self, history: Csr, wanted: NDArray[np.int64]) -> Csr:
        """The k nearest others of each wanted item: (len(wanted), N)."""
        if self.similarity == "tfidf":
            length = np.diff(history.indptr)
            idf = np.log((1 + history.shape[1]) / (1 + length))
            by_item = scale_rows(with_data(history, np.sqrt(np.abs(history.data)) * np.sign(history.data)), idf)
            by_item = by_item.T.tocsr()
        else:
            by_item = history.T.tocsr()
        by_row = by_item.T.tocsr()
        norms = lengths(by_item)
        cost = by_item[wanted].astype(bool).astype(np.float64) @ np.diff(by_row.indptr).astype(np.float64)
        parts = []
        for block in _by_cost(cost):
            chosen = wanted[block]
            product: Csr = (by_item[chosen] @ by_row).tocsr()  # (b, R) @ (R, N)
            own = np.repeat(chosen, np.diff(product.indptr))
            scale = norms[own] * norms[product.indices] + np.float32(self.shrinkage)
            product.data = np.divide(product.data, scale, out=np.zeros_like(product.data), where=scale > 0)
            product.data[own == product.indices] = 0
            parts.append(largest(product, self.k))
        return concatenate(parts, history.shape[1])


@dataclass(frozen=True)
class Raters(Learned):
    """Attributes:
    centred: (R, N) history less its row means, zeros kept; with implicit feedback these are taken as 0.
    by_item: (N, R) the history transposed.
    centred_by_item: (N, R) `centred` transposed.
    norms: (R,) Euclidean length of each row.
    """

    centred: Csr
    by_item: Csr
    centred_by_item: Csr
    norms: NDArray[np.float32]

    @cached_property
    def has(self) -> Csr:
        """(R, N) 1 where a row has an item; kept, for it is as large as the history."""
        return binary(self.history)

    @cached_property
    def has_by_item(self) -> Csr:
        """(N, R) the same transposed."""
        return binary(self.by_item)


@dataclass(eq=False)
class UserKNN(HistoryScorer[Raters]):
    """Users like this one: the classical predictor.

    score(u, i) = mean(u) + sum_j w_uj (r_ji - mean(j)) / sum_j |w_uj|, over the k rows j nearest to u.

    - ``explicit``: values are ratings; the sums run over those of the k rows that rated i.
    - ``implicit``: values are purchases. Missing means 0, so means are taken as 0 and both sums run over all k rows
      (over those with i alone every score would be 1): the weighted share of the neighbours that have i.

    w is the cosine of the rows, or Pearson's correlation over the items both rated (around each row's mean over all it
    rated), times n / (n + shrinkage) for n items in common. The k with the largest w are taken, w = 0 left out.

    NaN: no neighbour has the item, or there is no neighbour. A known row is no neighbour of its own. An update appends
    rows and is exact.

    Attributes:
        k: rows taken as neighbours, >= 1.
        similarity: ``pearson`` needs explicit feedback.
        shrinkage: items in common that halve the weight, >= 0.
        feedback: as above.
    Source: Resnick et al. 1994, GroupLens; Herlocker et al. 1999 (significance of n).
    """

    k: int = 50
    similarity: Literal["cosine", "pearson"] = "cosine"
    shrinkage: float = 0.0
    feedback: Literal["implicit", "explicit"] = "implicit"
    _learned_type: ClassVar[type[Learned]] = Raters
    _saved: ClassVar[tuple[str, ...] | None] = ("history",)  # the rest is quicker made than read

    def __post_init__(self) -> None:
        positive("k", self.k)
        positive("shrinkage", self.shrinkage, zero=True)
        if self.similarity not in ("cosine", "pearson") or self.feedback not in ("implicit", "explicit"):
            raise ValueError(
                'similarity must be "cosine" or "pearson" and feedback "implicit" or "explicit", '
                f"found {self.similarity!r} and {self.feedback!r}."
            )
        if self.similarity == "pearson" and self.feedback == "implicit":
            raise ValueError('similarity "pearson" needs feedback "explicit": purchases are all alike, 0 / 0.')

    def _learn(self, history: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> Raters:
        centred = _centre(history, self._means(history))
        return Raters(history, support_of(history), centred, history.T.tocsr(), centred.T.tocsr(), lengths(history))

    def _restore(self, arrays: Mapping[str, NDArray[Any]]) -> Raters:
        return self._learn(unpack_history(arrays), None, None)

    def _score(self, known: Raters, contexts: Csr) -> NDArray[np.float32]:
        return self._predict(known, contexts, None)

    def _score_known(self, known: Raters, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._predict(known, known.history[rows], rows)

    def score_stored(self, contexts: Csr) -> Csr:
        """Score only items that a neighbour of new contexts has; of every other item they cannot say.

        Args:
            contexts: (Q, N) canonical.
        Returns:
            (Q, N) with sorted columns; a stored 0 is a score.
        Raises:
            RuntimeError: nothing was fitted yet.
        """
        return self._predict_stored(self._require_fitted("score_stored"), contexts, None)

    def score_stored_users(self, rows: NDArray[np.int64]) -> Csr:
        """Do the same for known rows: (Q,) of the history."""
        known = self._require_fitted("score_stored_users")
        return self._predict_stored(known, known.history[rows], rows)

    def _predict(self, known: Raters, contexts: Csr, own: NDArray[np.int64] | None) -> NDArray[np.float32]:
        scores = np.full(contexts.shape, np.nan, np.float32)
        for block in row_blocks(contexts.shape[0], sum(known.history.shape)):
            stored = self._predict_stored(known, contexts[block], None if own is None else own[block])
            scores[block][row_of(stored), stored.indices] = stored.data
        return scores

    def _predict_stored(self, known: Raters, contexts: Csr, own: NDArray[np.int64] | None) -> Csr:
        means = self._means(contexts)
        weights = self._weights(known, contexts, means)  # (q, R), -inf where nothing is shared
        if own is not None:
            weights[np.arange(len(weights)), own] = -np.inf
        near = keep_nearest(weights, self.k)
        strength = with_data(near, np.abs(near.data))
        part: Csr = (near @ known.centred).tocsr()  # (q, R) @ (R, N)
        rated: Csr = (strength @ known.has).tocsr()
        rated.sort_indices()
        if part.nnz == rated.nnz:
            part.sort_indices()
            values = part.data
        else:  # a product leaves out what adds up to 0, which is a score all the same
            values = part.toarray()[row_of(rated), rated.indices]
        if self.feedback == "explicit":
            total = rated.data
        else:
            total = np.asarray(strength.sum(axis=1), np.float32).reshape(-1)[row_of(rated)]
        return with_data(rated, values / total + means[row_of(rated)])

    def _weights(self, known: Raters, contexts: Csr, means: NDArray[np.float32]) -> NDArray[np.float32]:
        common: NDArray[np.float32] = (binary(contexts) @ known.has_by_item).toarray()  # (q, N) @ (N, R)
        if self.similarity == "pearson":
            mine, theirs = _centre(contexts, means), known.centred_by_item
            dots = (mine @ theirs).toarray()
            left = (with_data(mine, mine.data**2) @ binary(theirs)).toarray()
            right = (binary(mine) @ with_data(theirs, theirs.data**2)).toarray()
            scale = np.sqrt(left * right)
        else:
            dots = (contexts @ known.by_item).toarray()
            scale = lengths(contexts)[:, None] * known.norms[None, :]
        weights: NDArray[np.float32] = np.divide(dots, scale, out=np.zeros_like(common), where=scale > 0)
        if self.shrinkage:
            weights *= common / (common + np.float32(self.shrinkage))
        weights[(common == 0) | (weights == 0)] = -np.inf
        return weights

    def _means(self, rows: Csr) -> NDArray[np.float32]:
        if self.feedback == "implicit":
            return np.zeros(rows.shape[0], np.float32)
        sums, counts = np.asarray(rows.sum(axis=1), np.float64), np.diff(rows.indptr)
        return np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0).astype(np.float32)


def score_neighbours(known: Similar, contexts: Csr) -> NDArray[np.float32]:
    """Score all items by their likeness to those of each context, as `ItemKNN` says: (Q, N) -> (Q, N)."""
    weights, familiar = _share_weights(known, contexts)
    scores = np.empty(contexts.shape, np.float32)
    for block in row_blocks(*contexts.shape):
        scores[block] = (weights[block] @ known.similarity).toarray()
    return mask_missing(scores, familiar, known.support > 0)


def _share_weights(known: Similar, contexts: Csr) -> tuple[Csr, NDArray[np.bool_]]:
    """Return contexts over the weight of their items that were seen, and which have any: (Q, N), (Q,)."""
    seen = with_data(contexts, np.abs(contexts.data) * (known.support[contexts.indices] > 0))
    weight = np.asarray(seen.sum(axis=1), np.float32).reshape(-1)
    return scale_rows(contexts, np.divide(1, weight, out=np.zeros_like(weight), where=weight > 0)), weight > 0


def largest(matrix: Csr, k: int) -> Csr:
    """Keep the k largest non-zero values of each row; of equal values the earlier columns. Sorts the columns."""
    matrix.eliminate_zeros()
    matrix.sort_indices()
    keep = np.ones(matrix.nnz, bool)
    for row in np.flatnonzero(np.diff(matrix.indptr) > k):
        cells = slice(matrix.indptr[row], matrix.indptr[row + 1])
        values = matrix.data[cells]
        least = np.partition(values, len(values) - k)[len(values) - k]
        inside = values > least
        inside[np.flatnonzero(values == least)[: k - np.count_nonzero(inside)]] = True
        keep[cells] = inside
    counts = np.add.reduceat(np.append(keep, False), matrix.indptr[:-1]) * (np.diff(matrix.indptr) > 0)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(matrix.indptr.dtype)
    return sparse.csr_array((matrix.data[keep], matrix.indices[keep], indptr), shape=matrix.shape)


def keep_nearest(weights: NDArray[np.float32], k: int) -> Csr:
    """Keep the k largest per row of dense (q, R) weights, -inf being none; of equal ones the earlier rows."""
    if k < weights.shape[1]:
        least = np.partition(weights, weights.shape[1] - k, axis=1)[:, weights.shape[1] - k, None]
        inside, level = weights > least, weights == least
        room = k - np.count_nonzero(inside, axis=1)[:, None]
        inside |= level & (np.cumsum(level, axis=1, dtype=np.int32) <= room)
        weights = np.where(inside, weights, -np.inf)
    return sparse.csr_array(np.where(np.isneginf(weights), np.float32(0), weights).astype(np.float32))


def _centre(rows: Csr, means: NDArray[np.float32]) -> Csr:
    return with_data(rows, rows.data - np.repeat(means, np.diff(rows.indptr)))


def _by_cost(cost: NDArray[np.float64]) -> Iterator[slice]:
    """Cut items into runs whose products stay within `LIMITS.block_products`, at least one item each."""
    start = 0
    total = np.concatenate([[0.0], np.cumsum(cost)])
    while start < len(cost):
        stop = max(start + 1, int(np.searchsorted(total, total[start] + LIMITS.block_products, side="right")) - 1)
        yield slice(start, stop)
        start = stop
