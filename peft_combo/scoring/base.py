"""Scorer protocol: a fitted history in, (Q, N) scores out, NaN where a score is missing.

Owns the `Scorer` protocol, the checks on what comes in, and the saved form (named arrays plus JSON parameters). Knows
row and column numbers only: ids were exchanged for numbers before a matrix gets here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Generic, Protocol, Self, TypeAlias, TypeGuard, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

Csr: TypeAlias = "sparse.csr_array[Any, tuple[int, int]]"
SparseRows: TypeAlias = "sparse.sparray | sparse.spmatrix"
ItemFeatures: TypeAlias = "NDArray[np.floating[Any]] | sparse.sparray | sparse.spmatrix"
Vectors: TypeAlias = "NDArray[np.float32] | Csr"
_FEW = 1024  # cells of a request; more are a batch, whose copy does not matter
State: TypeAlias = tuple[dict[str, NDArray[Any]], dict[str, Any]]


class Scorer(Protocol):
    """Scores every item of the catalogue for a basket or a known row.

    A row of the history is a user, a basket or a bundle; a column is an item. Higher is better and NaN means "cannot
    say": a whole row where nothing is known of the context, a column where nothing is known of the item. Items of the
    context are scored like all others; leaving them out is the caller's business.
    """

    def fit(self, history: SparseRows, *, items: ItemFeatures | None = None, times: ArrayLike | None = None) -> Self:
        """Learn from an (R, N) history, forgetting what was learned before.

        Args:
            history: (R, N) sparse; stored zeros are no interaction, duplicates are added up.
            items: (N, D) vectors, dense or sparse; only text-aware scorers read them.
            times: (R,) seconds, when each row happened; only scorers with a notion of time read them.
        """
        ...

    def update(
        self, new_rows: SparseRows, *, items: ItemFeatures | None = None, times: ArrayLike | None = None
    ) -> Self:
        """Append rows to the history without learning everything anew.

        Args:
            new_rows: (R', N') sparse, N' >= N; columns from N on are new items.
            items: (N', D), where the scorer reads vectors and there are new items.
            times: (R',) seconds, where the scorer was fitted with times.
        """
        ...

    def score_baskets(self, contexts: SparseRows) -> NDArray[np.float32]:
        """Score all items for contexts that need not be in the history: (Q, N) sparse -> (Q, N)."""
        ...

    def score_users(self, rows: ArrayLike) -> NDArray[np.float32]:
        """Score all items for rows of the fitted history: (Q,) row numbers -> (Q, N)."""
        ...

    def state(self) -> State:
        """Give what was learned as named arrays and JSON-ready parameters."""
        ...

    @classmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Self:
        """Rebuild a fitted scorer from `state`."""
        ...

    @property
    def support(self) -> NDArray[np.int64]:
        """(N,) rows of the history that hold each item: the evidence there is on it."""
        ...


@dataclass(frozen=True)
class Learned:
    """All a fitted scorer knows, never changed in place: scoring beside an update sees the old or the new.

    Attributes:
        history: (R, N) float32.
        support: (N,) rows that hold each item.
    """

    history: Csr
    support: NDArray[np.int64]


L = TypeVar("L", bound=Learned)


class HistoryScorer(Generic[L]):
    """The part of `Scorer` that is the same for all: checks, saved form and the exchange of one `Learned` for another.

    A scorer adds `_learn` and `_score`; `_extend` where it can do better than to learn anew from the longer history.
    Hyperparameters are the fields of the scorer, a dataclass.
    """

    _learned_type: ClassVar[type[Learned]] = Learned
    _saved: ClassVar[tuple[str, ...] | None] = None  # fields of Learned worth saving; None saves all
    _learned: L | None = None

    def fit(self, history: SparseRows, *, items: ItemFeatures | None = None, times: ArrayLike | None = None) -> Self:
        """Learn from an (R, N) history; see `Scorer.fit`.

        Raises:
            ValueError: a value is not finite, shapes do not fit, or a matrix this scorer needs is missing.
        """
        rows = as_rows(history, "history")
        vectors = None if items is None else as_vectors(items, rows.shape[1])
        self._learned = self._learn(rows, vectors, _as_times(times, rows.shape[0]))
        return self

    def update(
        self, new_rows: SparseRows, *, items: ItemFeatures | None = None, times: ArrayLike | None = None
    ) -> Self:
        """Append rows, in place and in one step; see `Scorer.update`.

        Raises:
            ValueError: there are fewer columns than before, or shapes do not fit.
            RuntimeError: nothing was fitted yet.
        """
        known = self._require_fitted("update")
        rows = as_rows(new_rows, "new_rows")
        if rows.shape[1] < known.history.shape[1]:
            raise ValueError(f"new_rows has {rows.shape[1]} columns, fewer than the {known.history.shape[1]} fitted.")
        vectors = None if items is None else as_vectors(items, rows.shape[1])
        self._learned = self._extend(known, rows, vectors, _as_times(times, rows.shape[0]))
        return self

    def score_baskets(self, contexts: SparseRows) -> NDArray[np.float32]:
        """Score all items for new contexts; see `Scorer.score_baskets`.

        Raises:
            ValueError: the width is not that of the history, or a value is not finite.
            RuntimeError: nothing was fitted yet.
        """
        known = self._require_fitted("score_baskets")
        rows = contexts if _is_canonical(contexts) else as_rows(contexts, "contexts")
        if rows.shape[1] != known.history.shape[1]:
            raise ValueError(f"contexts must have {known.history.shape[1]} columns, found {rows.shape[1]}.")
        return self._score(known, rows)

    def score_users(self, rows: ArrayLike) -> NDArray[np.float32]:
        """Score all items for rows of the fitted history; see `Scorer.score_users`.

        Raises:
            ValueError: a row is not a whole number in 0..R-1.
            RuntimeError: nothing was fitted yet.
        """
        known = self._require_fitted("score_users")
        wanted, count = np.atleast_1d(np.asarray(rows)), known.history.shape[0]
        if wanted.ndim != 1 or (wanted.size and not np.issubdtype(wanted.dtype, np.integer)):
            raise ValueError(f"rows must be a list of whole numbers, found {wanted.dtype} of shape {wanted.shape}.")
        if wanted.size and (wanted.min() < 0 or wanted.max() >= count):
            raise ValueError(f"rows must lie in 0..{count - 1}, found {wanted.min()}..{wanted.max()}.")
        return self._score_known(known, wanted.astype(np.int64))

    def state(self) -> State:
        """Give what was learned as named arrays (a sparse one as four) and JSON-ready parameters.

        Raises:
            RuntimeError: nothing was fitted yet.
        """
        known = self._require_fitted("state")
        arrays: dict[str, NDArray[Any]] = {}
        for field in fields(known):
            value = getattr(known, field.name)
            if value is None or (self._saved is not None and field.name not in self._saved):
                continue
            arrays |= _pack(field.name, value)
        return arrays, {"scorer": type(self).__name__, **hyperparameters(self)}

    @classmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]], params: Mapping[str, Any]) -> Self:
        """Rebuild a fitted scorer; scores are bit for bit those of the scorer that was saved.

        Raises:
            ValueError: the state is that of another scorer, or an array is missing.
        """
        options = dict(params)
        if options.pop("scorer", None) != cls.__name__:
            raise ValueError(f"expected the state of {cls.__name__}, found that of {params.get('scorer')!r}.")
        scorer = cls(**options)
        scorer._learned = scorer._restore(arrays)
        return scorer

    @property
    def support(self) -> NDArray[np.int64]:
        """(N,) rows of the history that hold each item."""
        return self._require_fitted("support").support

    @property
    def learned(self) -> L:
        """What was fitted.

        Raises:
            RuntimeError: nothing was fitted yet.
        """
        return self._require_fitted("learned")

    def _learn(self, history: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> L:
        raise NotImplementedError

    def _score(self, known: L, contexts: Csr) -> NDArray[np.float32]:
        raise NotImplementedError

    def _score_known(self, known: L, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._score(known, known.history[rows])

    def _extend(self, known: L, rows: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> L:
        return self._learn(stack(known.history, rows), items, times)

    def _restore(self, arrays: Mapping[str, NDArray[Any]]) -> L:
        found: dict[str, Any] = {field.name: _unpack(field.name, arrays) for field in fields(self._learned_type)}
        needed = [field.name for field in fields(self._learned_type) if field.default is MISSING]
        missing = [name for name in needed if found[name] is None]
        if missing:
            raise ValueError(
                f"the state of {type(self).__name__} lacks {', '.join(missing)}; it holds {sorted(arrays)}."
            )
        return cast(L, self._learned_type(**found))

    def _require_fitted(self, asked: str) -> L:
        if self._learned is None:
            raise RuntimeError(f"{type(self).__name__}.{asked} was called before fit.")
        return self._learned


def as_rows(matrix: SparseRows, name: str) -> Csr:
    """Copy to canonical CSR float32: sorted, duplicates added, no stored zeros, all finite."""
    given: Any = matrix
    if not is_sparse(given) or given.ndim != 2:
        raise ValueError(f"{name} must be a two-dimensional sparse matrix, found {type(given).__name__}.")
    rows: Csr = sparse.csr_array(given, dtype=np.float32, copy=True)
    if not np.all(np.isfinite(rows.data)):
        raise ValueError(f"{name} holds values that are not finite.")
    rows.sum_duplicates()
    rows.eliminate_zeros()
    return rows


def _is_canonical(matrix: SparseRows) -> TypeGuard[Csr]:
    """Tell whether `as_rows` would only copy, as it does for every request that `Queries` wrote."""
    given: Any = matrix
    return (
        isinstance(given, sparse.csr_array)
        and given.dtype == np.float32
        and given.ndim == 2
        and given.nnz <= _FEW
        and bool(given.has_canonical_format)
        and bool(np.isfinite(given.data).all() and given.data.all())
    )


def as_vectors(items: ItemFeatures, n_items: int) -> Vectors:
    """Check item vectors and bring them to float32, dense or CSR as they came."""
    given: Any = items
    vectors: Vectors
    if is_sparse(given):
        vectors = as_rows(given, "items")
    else:
        vectors = np.ascontiguousarray(given, np.float32)
        if vectors.ndim != 2 or not np.all(np.isfinite(vectors)):
            raise ValueError(f"items must be a finite (N, D) array, found shape {vectors.shape}.")
    if vectors.shape[0] != n_items:
        raise ValueError(f"items must hold one vector for each of {n_items} items, found {vectors.shape[0]}.")
    return vectors


def unit_rows(vectors: Vectors) -> Vectors:
    """Scale each row to Euclidean length 1; a zero row stays zero."""
    norms = lengths(vectors) if isinstance(vectors, sparse.csr_array) else np.linalg.norm(vectors, axis=1)
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0).astype(np.float32)
    if isinstance(vectors, sparse.csr_array):
        return scale_rows(vectors, scale)
    return vectors * scale[:, None]


def scale_rows(matrix: Csr, scale: NDArray[Any]) -> Csr:
    """Multiply each row by its own number, keeping the pattern and dtype."""
    factors = np.repeat(scale, np.diff(matrix.indptr)).astype(matrix.dtype, copy=False)
    return with_data(matrix, matrix.data * factors)


def binary(matrix: Csr) -> Csr:
    """Put 1 wherever something is stored."""
    return with_data(matrix, np.ones(matrix.nnz, np.float32))


def with_data(matrix: Csr, data: NDArray[Any]) -> Csr:
    """Keep the pattern, take other values."""
    return sparse.csr_array((data, matrix.indices, matrix.indptr), shape=matrix.shape)


def support_of(history: Csr) -> NDArray[np.int64]:
    """Count the rows that hold each item."""
    return np.bincount(history.indices, minlength=history.shape[1]).astype(np.int64)


def widen(matrix: Csr, n_columns: int) -> Csr:
    """Add empty columns on the right."""
    return sparse.csr_array((matrix.data, matrix.indices, matrix.indptr), shape=(matrix.shape[0], n_columns))


def stack(above: Csr, below: Csr) -> Csr:
    """Append rows, widening to the columns of `below`."""
    return concatenate([widen(above, below.shape[1]), below], below.shape[1])


def concatenate(parts: list[Csr], n_columns: int) -> Csr:
    """Put matrices of equal width below each other; none makes a matrix without rows."""
    return sparse.vstack(parts, format="csr") if parts else no_interactions(0, n_columns)


def no_interactions(n_rows: int, n_columns: int) -> Csr:
    """A matrix that stores nothing."""
    return cast(Csr, sparse.csr_array((n_rows, n_columns), dtype=np.float32))


def dense(product: Any) -> NDArray[Any]:
    """Give the product of two matrices as an array, whichever kind they were."""
    whole: NDArray[Any] = product.toarray() if is_sparse(product) else np.asarray(product)
    return whole


def is_sparse(matrix: Any) -> bool:
    """`scipy.sparse.issparse` without its type guard, which the stubs narrow to a class without methods."""
    return bool(sparse.issparse(matrix))


def lengths(rows: Csr) -> NDArray[np.float32]:
    """Euclidean length of each row."""
    return np.sqrt(
        np.bincount(row_of(rows), weights=rows.data.astype(np.float64) ** 2, minlength=rows.shape[0])
    ).astype(np.float32)


def row_of(matrix: Csr) -> NDArray[np.int64]:
    """The row of each stored value."""
    return np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))


def mask_missing(
    scores: NDArray[np.float32], rows_known: NDArray[np.bool_] | None, columns_known: NDArray[np.bool_] | None
) -> NDArray[np.float32]:
    """Write NaN into rows and columns of which nothing is known; (Q, N), (Q,), (N,)."""
    if columns_known is not None:
        scores = np.where(columns_known, scores, np.float32(np.nan))  # a masked copy takes ten times as long
    if rows_known is not None:
        scores[~rows_known] = np.nan
    return scores


def hyperparameters(scorer: object) -> dict[str, Any]:
    """Read the fields of a scorer; each is a JSON value."""
    return {field.name: getattr(scorer, field.name) for field in fields(scorer)}  # type: ignore[arg-type]


def positive(name: str, value: float, *, zero: bool = False) -> None:
    """Refuse a hyperparameter that is not finite and above zero (or zero, where that means something)."""
    if not np.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be finite and {'>= 0' if zero else '> 0'}, found {value}.")


def _as_times(times: ArrayLike | None, n_rows: int) -> NDArray[np.float64] | None:
    if times is None:
        return None
    found = np.asarray(times, np.float64)
    if found.shape != (n_rows,):
        raise ValueError(f"times must be ({n_rows},), one per row, found {found.shape}.")
    return found


def _pack(name: str, value: NDArray[Any] | Csr) -> dict[str, NDArray[Any]]:
    if isinstance(value, np.ndarray):
        return {name: value}
    return {
        f"{name}.data": value.data,
        f"{name}.indices": value.indices,
        f"{name}.indptr": value.indptr,
        f"{name}.shape": np.array(value.shape, np.int64),
    }


def unpack_history(arrays: Mapping[str, NDArray[Any]]) -> Csr:
    """Read the history out of a saved state."""
    history = _unpack("history", arrays)
    if history is None or isinstance(history, np.ndarray):
        raise ValueError(f"the state lacks its history; it holds {sorted(arrays)}.")
    return history


def _unpack(name: str, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any] | Csr | None:
    if name in arrays:
        return arrays[name]
    parts = [arrays.get(f"{name}.{part}") for part in ("data", "indices", "indptr", "shape")]
    if all(part is None for part in parts):
        return None
    data, indices, indptr, shape = parts
    if data is None or indices is None or indptr is None or shape is None:
        raise ValueError(f"the saved matrix {name} is not whole: data, indices, indptr and shape belong together.")
    whole: Csr = sparse.csr_array((data, indices, indptr), shape=(int(shape[0]), int(shape[1])))
    return whole
