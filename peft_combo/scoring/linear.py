"""EASE and CEASE: linear item-to-item models with a closed form, the second with text features.

One matrix inverse is the whole of training. The inverse is what is kept: scores follow from it, and so does an update.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from peft_combo.errors import PeftComboError
from peft_combo.machine import LIMITS, row_blocks
from peft_combo.scoring.base import (
    Csr,
    HistoryScorer,
    Learned,
    Vectors,
    dense,
    mask_missing,
    positive,
    row_of,
    stack,
    support_of,
    unit_rows,
)
from peft_combo.scoring.text import has_vector

_LEAF = 32  # small enough that LAPACK stays on one thread


@dataclass(frozen=True)
class Inverse(Learned):
    """Attributes:
    active: (n,) the items the model knows, ascending.
    inverse: (n, n) float64, P = (Gram + l2 I)^-1 over the active items, symmetric.
    vectors: (N, D) unit rows, for CEASE; None for EASE.
    """

    active: NDArray[np.int64]
    inverse: NDArray[np.float64]
    vectors: Vectors | None = None

    @cached_property
    def diagonal(self) -> NDArray[np.float64]:
        """(n,) the diagonal of `inverse`; kept, for reading it goes through all of the matrix."""
        return np.ascontiguousarray(np.diagonal(self.inverse))

    @cached_property
    def place_of(self) -> NDArray[np.int64]:
        """(N,) the place of each item among those that are active, -1 for none."""
        places = np.full(self.history.shape[1], -1)
        places[self.active] = np.arange(len(self.active))
        return places

    def take_active(self, contexts: Csr) -> Csr:
        """Return the columns of the active items: (Q, N) -> (Q, n) float64."""
        columns = self.place_of[contexts.indices]
        inside = columns >= 0
        ends = np.concatenate([[0], np.cumsum(inside)])[contexts.indptr]
        shape = (contexts.shape[0], len(self.active))
        return sparse.csr_array((contexts.data[inside].astype(np.float64), columns[inside], ends), shape=shape)


@dataclass(eq=False)
class EASE(HistoryScorer[Inverse]):
    """Each item as a linear combination of the others, in closed form.

    B = argmin ||X - X B||^2 + l2 ||B||^2 with a zero diagonal, which is B_ij = -P_ij / P_jj for P = (X'X + l2 I)^-1;
    a context scores x B. NaN: an item no row holds; every item where that is so of the whole context.

    An update is exact: the inverse is corrected by the new rows (Woodbury), O(n^2 m) for m rows instead of O(n^3).

    Attributes:
        l2: ridge penalty, > 0, in units of squared interactions; grows with the size of the history.

    Raises:
        PeftComboError: from fit and update, where more than 20,000 items were seen.
    Source: Steck 2019, "Embarrassingly shallow autoencoders for sparse data".
    """

    l2: float = 10.0
    _learned_type: ClassVar[type[Learned]] = Inverse

    def __post_init__(self) -> None:
        positive("l2", self.l2)

    def _learn(self, history: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> Inverse:
        return _solve(history, self.l2, None, 0.0, "EASE")

    def _extend(self, known: Inverse, rows: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> Inverse:
        return _correct(known, rows, self.l2) or self._learn(stack(known.history, rows), None, times)

    def _score(self, known: Inverse, contexts: Csr) -> NDArray[np.float32]:
        return _scores(known, contexts)


@dataclass(eq=False)
class CEASE(HistoryScorer[Inverse]):
    """EASE whose Gram also holds what the items' vectors say: G = X'X + alpha F F', F the unit vectors.

    The vectors act as further rows of the history, weighted by alpha, so two items with alike text are related even
    where no row holds either: cold items are scored, and score others. NaN: an item with neither rows nor a vector;
    every item where that is so of the whole context.

    An update with known items is exact (Woodbury, as EASE); with new items it learns anew and needs their vectors.

    Attributes:
        l2: ridge penalty, > 0.
        alpha: weight of the vectors against the rows, > 0.

    Raises:
        ValueError: from fit, without `items`.
        PeftComboError: from fit and update, with more than 20,000 items.
    Source: Jeunen, Van Balen and Goethals 2020, "Closed-form models for collaborative filtering with side-information".
    """

    # The best of a grid on validation users of BundleRec clothing and electronic together, with TF-IDF of single words.
    # Apart they disagree (alpha 0.3, l2 1 and alpha 10, l2 10), so choose both on a validation part where there is one.
    l2: float = 30.0
    alpha: float = 10.0
    _learned_type: ClassVar[type[Learned]] = Inverse

    def __post_init__(self) -> None:
        positive("l2", self.l2)
        positive("alpha", self.alpha)

    def _learn(self, history: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> Inverse:
        if items is None:
            raise ValueError("CEASE needs items, an (N, D) vector per item: fit(history, items=vectors).")
        return _solve(history, self.l2, unit_rows(items), self.alpha, "CEASE")

    def _extend(self, known: Inverse, rows: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> Inverse:
        if rows.shape[1] > known.history.shape[1] and items is None:
            raise ValueError("CEASE.update with new items needs items, the vectors of all of them.")
        corrected = _correct(known, rows, self.l2) if items is None else None
        if corrected is not None:
            return corrected
        vectors = known.vectors if items is None else unit_rows(items)
        return _solve(stack(known.history, rows), self.l2, vectors, self.alpha, "CEASE")

    def _score(self, known: Inverse, contexts: Csr) -> NDArray[np.float32]:
        return _scores(known, contexts)


def _solve(history: Csr, l2: float, vectors: Vectors | None, alpha: float, who: str) -> Inverse:
    support = support_of(history)
    active = np.flatnonzero((support > 0) if vectors is None else (support > 0) | has_vector(vectors))
    if len(active) > LIMITS.inverted_items:
        raise PeftComboError(
            f"{who} inverts an items-by-items matrix, practical to {LIMITS.inverted_items:,} items; "
            f"found {len(active):,}. Use ItemKNN or ALS, or one category at a time."
        )
    rows: Csr = history[:, active].astype(np.float64)
    gram: NDArray[np.float64] = (rows.T.tocsr() @ rows).toarray()
    if vectors is not None:
        chosen: Any = vectors[active]
        gram += alpha * dense(chosen @ chosen.T)
    gram[np.diag_indices_from(gram)] += l2
    _invert(gram)
    return Inverse(history, support, active, gram, vectors)


def _invert(matrix: NDArray[np.float64]) -> None:
    """Invert a symmetric positive definite matrix in place, halving it until LAPACK takes over; 4/3 n^3 operations.

    With S = D - B' A^-1 B the Schur complement, the inverse of [[A, B], [B', D]] has the corner C = -A^-1 B S^-1 and
    the blocks A^-1 - C B' A^-1 and S^-1. Nearly all of it is matrix products, which is the point: the threads of
    LAPACK's own Cholesky wait for each other after every panel, and beside other busy processes that made it six times
    slower (measured at n = 3,000 on two shared cores: 6.6 s against 1.2 s).
    In float64: with popular items the condition number reaches 1e5 and more, and float32 keeps 7 digits.
    """
    n = len(matrix)
    if n <= _LEAF:
        try:
            factor = linalg.cho_factor(matrix, lower=False, check_finite=False)
        except linalg.LinAlgError as cause:
            raise PeftComboError("The Gram matrix is not positive definite to working precision. Raise l2.") from cause
        matrix[:] = linalg.cho_solve(factor, np.eye(n), check_finite=False)
        return
    half = n // 2
    a, b, d = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    _invert(a)
    ab = a @ b  # (h, h) @ (h, n - h)
    d -= b.T @ ab
    _invert(d)
    corner = -(ab @ d)
    a -= corner @ ab.T
    matrix[:half, half:], matrix[half:, :half] = corner, corner.T


def _correct(known: Inverse, rows: Csr, l2: float) -> Inverse | None:
    """Give the inverse of the Gram with `rows` added, or None where inverting anew is cheaper or needed.

    (G + U'U)^-1 = P - V' (I + V U')^-1 V  with V = U P, for U the (m, n) new rows.
    """
    width = rows.shape[1]
    support = np.pad(known.support, (0, width - len(known.support))) + support_of(rows)
    fresh = np.setdiff1d(np.unique(rows.indices), known.active)
    active = np.concatenate([known.active, fresh])
    if rows.shape[0] * 3 > len(active) or len(active) > LIMITS.inverted_items:
        return None
    if known.vectors is not None and width > known.history.shape[1]:
        return None
    inverse = known.inverse
    if fresh.size:
        # An item without rows or vector stands in the Gram with l2 alone, so 1 / l2 in the inverse.
        n = len(known.active)
        grown = np.zeros((len(active), len(active)))
        grown[:n, :n] = inverse
        grown[range(n, len(active)), range(n, len(active))] = 1 / l2
        order = np.argsort(active)
        inverse, active = grown[np.ix_(order, order)], active[order]
    u: Csr = rows[:, active].astype(np.float64)
    v = u @ inverse  # (m, n) @ (n, n) -> (m, n)
    core = np.eye(rows.shape[0]) + u @ v.T
    _invert(core)
    inverse = inverse - v.T @ (core @ v)
    inverse = (inverse + inverse.T) / 2  # rounding is all that makes it unsymmetric; do not let it build up
    return Inverse(stack(known.history, rows), support, active, inverse, known.vectors)


def _multiply(part: Csr, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Multiply sparse rows (q, n) by (n, n); of a single row only the rows it needs are read."""
    if part.shape[0] == 1:
        return (part.data @ matrix[part.indices])[None]
    product: NDArray[np.float64] = part @ matrix
    return product


def _scores(known: Inverse, contexts: Csr) -> NDArray[np.float32]:
    """x B for each context, from P alone: B_ij = -P_ij / P_jj off the diagonal, 0 on it."""
    scores = np.full(contexts.shape, np.nan, np.float32)
    inside = known.take_active(contexts)
    for block in row_blocks(inside.shape[0], inside.shape[1] * 2):
        part = inside[block]
        product = _multiply(part, known.inverse)  # (q, n) @ (n, n)
        product /= -known.diagonal
        # The division gave the diagonal -1 where B has 0: give each context item its own weight back.
        product[row_of(part), part.indices] += part.data
        scores[block, known.active] = product
    return mask_missing(scores, np.diff(inside.indptr) > 0, None)
