"""Latent factors: ALS, trained by the optional package `implicit`.

Training needs the package; scoring, folding in and loading a saved state do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.errors import PeftComboError
from peft_combo.machine import one_blas_thread, row_blocks
from peft_combo.scoring.base import (
    Csr,
    HistoryScorer,
    Learned,
    Vectors,
    binary,
    mask_missing,
    positive,
    stack,
    support_of,
)


@dataclass(frozen=True)
class Factors(Learned):
    """Attributes:
    users: (R, F) float32, one row of factors per row of the history.
    items: (N, F) float32, zero for an item without factors.
    has_factors: (N,) bool.
    square: (F, F) float64, the items' factors by themselves, which folding in needs.
    """

    users: NDArray[np.float32]
    items: NDArray[np.float32]
    has_factors: NDArray[np.bool_]
    square: NDArray[np.float64]


@dataclass(eq=False)
class ALS(HistoryScorer[Factors]):
    """Weighted matrix factorisation of implicit feedback by alternating least squares.

    A stored value x is a 1 believed with confidence alpha x, everything else a 0 with confidence 1. A context is folded
    in exactly: its factors are the least squares solution given the items'. NaN: an item without factors; every item
    where that is so of the whole context.

    An update is one half-sweep, not a refit: new rows are folded in, then the items they hold (new ones as well) are
    solved once given all rows. Fit anew now and then.

    Attributes:
        factors, regularization, alpha, iterations: as in `implicit`.
        seed: of the first factors.

    Raises:
        PeftComboError: from fit, where `implicit` is not installed.
    Source: Hu, Koren and Volinsky 2008, "Collaborative filtering for implicit feedback datasets".
    """

    factors: int = 64
    regularization: float = 0.05
    alpha: float = 10.0
    iterations: int = 15
    seed: int = 0
    _learned_type: ClassVar[type[Learned]] = Factors

    def __post_init__(self) -> None:
        for name in ("factors", "regularization", "alpha", "iterations"):
            positive(name, getattr(self, name))

    def _learn(self, history: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> Factors:
        with _implicit():
            from implicit.cpu.als import AlternatingLeastSquares

            model = AlternatingLeastSquares(
                factors=self.factors,
                regularization=self.regularization,
                alpha=self.alpha,
                iterations=self.iterations,
                random_state=self.seed,
            )
            if history.nnz:
                model.fit(sparse.csr_matrix(history), show_progress=False)
        support = support_of(history)
        users, vectors = _train(model, history, self.factors)
        vectors[support == 0] = 0
        return Factors(history, support, users, vectors, support > 0, _square(vectors))

    def _extend(self, known: Factors, rows: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> Factors:
        history = stack(known.history, rows)
        support = support_of(history)
        vectors = np.zeros((history.shape[1], self.factors), np.float32)
        vectors[: len(known.items)] = known.items
        users = np.concatenate([known.users, self._solve_users(rows, vectors, known.square)])
        touched = np.unique(rows.indices)
        vectors[touched] = self._solve_users(history[:, touched].T.tocsr(), users, _square(users))
        return Factors(history, support, users, vectors, support > 0, _square(vectors))

    def fold_in(self, contexts: Csr) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the factors of each context given those of the items, and of which they say anything.

        Args:
            contexts: (Q, N).
        Returns:
            (Q, F) float32, whose inner products with the items' factors are the scores, and (Q,) bool.
        Raises:
            RuntimeError: nothing was fitted yet.
        """
        return self._fold_in(self._require_fitted("fold_in"), contexts)

    def _fold_in(self, known: Factors, contexts: Csr) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        familiar = binary(contexts) @ known.has_factors.astype(np.float32) > 0
        return self._solve_users(contexts, known.items, known.square), familiar

    def _score(self, known: Factors, contexts: Csr) -> NDArray[np.float32]:
        factors, familiar = self._fold_in(known, contexts)
        return mask_missing(factors @ known.items.T, familiar, known.has_factors)  # (Q, F) @ (F, N)

    def _solve_users(self, rows: Csr, others: NDArray[np.float32], square: NDArray[np.float64]) -> NDArray[np.float32]:
        """The factors of each row given those of its columns: (Y'Y + Y'(C - I)Y + reg I)^-1 Y'c, (Q, F)."""
        base = square + self.regularization * np.eye(len(square))
        found = np.zeros((rows.shape[0], len(square)), np.float32)
        for block in row_blocks(rows.shape[0], base.size):
            systems, sides = [], []
            for row in range(block.start, block.stop):
                cells = slice(rows.indptr[row], rows.indptr[row + 1])
                near = others[rows.indices[cells]].astype(np.float64)
                confidence = self.alpha * rows.data[cells].astype(np.float64)
                systems.append(base + (near.T * (np.abs(confidence) - 1)) @ near)
                sides.append(np.maximum(confidence, 0) @ near)
            found[block] = np.linalg.solve(np.array(systems), np.array(sides)[:, :, None])[:, :, 0]
        return found


def _train(model: Any, history: Csr, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Copy the factors of rows and items; zeros where there was nothing to train on."""
    if not history.nnz:
        return np.zeros((history.shape[0], width), np.float32), np.zeros((history.shape[1], width), np.float32)
    return np.array(model.user_factors, np.float32), np.array(model.item_factors, np.float32)


def _square(factors: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = factors.astype(np.float64)
    return wide.T @ wide


@contextmanager
def _implicit() -> Iterator[None]:
    """Hold BLAS to one thread while `implicit` trains: it runs threads of its own and warns where BLAS does too."""
    try:
        import implicit  # noqa: F401
    except ImportError as cause:
        raise PeftComboError(
            'ALS is trained by the package "implicit", which is not installed. '
            'Install it with: pip install "peft-combo[als]"'
        ) from cause
    with one_blas_thread():
        yield
