"""Path ranking: items that relations lead to from a basket, each kind of path with a weight learned from baskets.

Owns the walks over edges between items and the weights of path types. Knows edges by the items at their ends: what they
are called, and how a category becomes its items, is the caller's business.

Source: Lao and Cohen 2010, "Relational retrieval using a combination of path-constrained random walks": a path type is
a sequence of relations, its feature the probability that a random walk along it from the query ends at an item, and
weights are those of a logistic regression. Here paths have one or two steps, a feature is log(1 + N h), which compares
the probability h with that of a uniform pick, and the regression is ridge-penalised.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.metrics.regression import fit_logistic
from peft_combo.scoring.base import Csr, HistoryScorer, Learned, Vectors, scale_rows, stack, support_of

Step = tuple[str, bool]
"""A relation and whether it is walked from tail to head."""
Path = tuple[Step, ...]

_QUERIES, _NEGATIVES, _BLOCK = 2_000, 50, 128
_FEWEST = 5  # targets a path type must reach in training to have a weight
_RIDGE = 1.0


@dataclass(frozen=True)
class LearnedPaths(Learned):
    """Attributes:
    edges: (N, 2 E) 1 where an item is at the head (first half) or the tail (second half) of an edge.
    weights: (P,) of the path types, in the order of `PathRanking.paths`; 0 for one that says nothing.
    """

    edges: Csr
    weights: NDArray[np.float64]


@dataclass(eq=False)
class PathRanking(HistoryScorer[LearnedPaths]):
    """Scores items by the paths of one or two relations from the basket; NaN for an item that no path reaches.

    `fit` takes the edges as `items`: (N, 2 E), above 0 where an item is at the head (first half) or the tail (second
    half) of an edge. A relation with one edge whose head and tail are alike is a category: "same category".

    Attributes:
        relations: (E,) the relation of each edge.
    """

    relations: Sequence[str]
    _learned_type: ClassVar[type[Learned]] = LearnedPaths

    def __post_init__(self) -> None:
        self.relations = list(self.relations)

    @property
    def paths(self) -> list[Path]:
        """Every path type of one or two steps, the short ones first."""
        steps = [(relation, back) for relation in dict.fromkeys(self.relations) for back in (False, True)]
        return [*((step,) for step in steps), *itertools.product(steps, steps)]

    def explain(self, context: NDArray[np.int64], row: int) -> dict[tuple[int, Path], float]:
        """Return what each item of a context adds to the score of an item by each path type that leads there.

        Args:
            context: (S,) rows.
        """
        known = self._require_fitted("explain")
        one = sparse.csr_array(
            (np.ones(len(context), np.float32), (np.arange(len(context)), context)),
            shape=(len(context), len(known.support)),
        )
        walks = _Walks.of(known.edges, self.relations)
        found: dict[tuple[int, Path], float] = {}
        for path, weight in zip(self.paths, known.weights.tolist(), strict=True):
            if weight:
                values = _compare(walks.follow(one, path)[:, [row]].toarray()[:, 0], len(known.support)) * weight
                found |= {(int(context[place]), path): float(values[place]) for place in np.flatnonzero(values)}
        return found

    def _learn(self, history: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> LearnedPaths:
        if items is None or items.shape[1] != 2 * len(self.relations):
            found = "none" if items is None else f"{items.shape[1]} columns"
            raise ValueError(f"PathRanking needs edges as items, {2 * len(self.relations)} columns; found {found}.")
        given: Any = items
        edges: Any = sparse.csr_array(given > 0, dtype=np.float32)
        edges.sum_duplicates()
        return LearnedPaths(history, support_of(history), edges, self._fit_weights(history, edges))

    def _extend(
        self, known: LearnedPaths, rows: Csr, items: Vectors | None, times: NDArray[np.float64] | None
    ) -> LearnedPaths:
        if items is None and rows.shape[1] > known.history.shape[1]:
            raise ValueError("PathRanking needs the edges of new items.")
        return self._learn(stack(known.history, rows), known.edges if items is None else items, times)

    def _fit_weights(self, history: Csr, edges: Csr) -> NDArray[np.float64]:
        """Tell targets that were left out of their basket from items drawn at random by logistic regression."""
        weights = np.zeros(len(self.paths))
        sizes = np.diff(history.indptr)
        cells = np.flatnonzero(np.repeat(sizes, sizes) > 1)  # each is a query: the item left out of its row
        if not len(cells):
            return weights
        rng = np.random.default_rng(0)
        cells = np.sort(rng.permutation(cells)[:_QUERIES])
        owner = np.repeat(np.arange(len(sizes)), sizes)[cells]
        targets = history.indices[cells]
        drawn = rng.integers(history.shape[1], size=(len(cells), _NEGATIVES))
        columns = np.concatenate([targets[:, None], drawn], axis=1)  # (Q, 1 + negatives)
        features = self._read_cells(history, edges, owner, targets, columns)  # (P, Q, 1 + negatives)
        held = _holds(history, owner, columns)
        usable = ~held
        usable[:, 0] = True
        telling = (features[:, :, 0] > 0).sum(axis=1) >= _FEWEST
        if not telling.any():
            return weights
        table = features[telling][:, usable].T.astype(np.float64)  # (M, P')
        labels = np.zeros(columns.shape, bool)
        labels[:, 0] = True
        # Targets count as much as all that was drawn beside them.
        counts = np.where(labels[usable], usable.sum() / max(1, len(cells)) - 1, 1.0)
        scale = table.std(axis=0) + 1e-9
        table /= scale
        weights[telling] = fit_logistic(table, labels[usable], _RIDGE, counts)[1:] / scale
        return weights

    def _read_cells(
        self, history: Csr, edges: Csr, owner: NDArray[np.int64], targets: NDArray[np.int32],
        columns: NDArray[np.int64],
    ) -> NDArray[np.float32]:  # fmt: skip
        """Return the features of the cells of queries, each the rest of a row: (P, Q, C)."""
        walks = _Walks.of(edges, self.relations)
        found = np.zeros((len(self.paths), *columns.shape), np.float32)
        for start in range(0, len(owner), _BLOCK):
            block = slice(start, start + _BLOCK)
            rest = _leave_out(history[owner[block]], targets[block])
            wanted = columns[block]
            for place, walked in enumerate(walks.walk(rest, self.paths)):
                if walked is not None:
                    own = walked.toarray()
                    found[place, block] = _compare(np.take_along_axis(own, wanted, axis=1), history.shape[1])
        return found

    def _score(self, known: LearnedPaths, contexts: Csr) -> NDArray[np.float32]:
        scores, reached = np.zeros(contexts.shape, np.float32), np.zeros(contexts.shape, bool)
        telling = [place for place, weight in enumerate(known.weights.tolist()) if weight]
        paths = [self.paths[place] for place in telling]
        walks = _Walks.of(known.edges, self.relations)
        for place, walked in zip(telling, walks.walk(contexts, paths), strict=True):
            if walked is not None:
                own = walked.toarray()
                scores += np.float32(known.weights[place]) * _compare(own, contexts.shape[1])
                reached |= own > 0
        scores[~reached] = np.nan
        return scores


@dataclass(frozen=True, eq=False)
class _Walks:
    """Per step the two halves of a random walk: items to edges (N, E), edges to items (E, N), rows adding up to 1."""

    halves: dict[Step, tuple[Any, Any]]

    @classmethod
    def of(cls, edges: Csr, relations: Sequence[str]) -> _Walks:
        names = np.array(relations)
        columns = sparse.csc_array(edges)
        halves: dict[Step, tuple[Any, Any]] = {}
        for relation in dict.fromkeys(relations):
            own = np.flatnonzero(names == relation)
            heads, tails = columns[:, own], columns[:, own + len(names)]
            for back, first, second in ((False, heads, tails), (True, tails, heads)):
                halves[relation, back] = _normalise(first), _normalise(second.T)
        return cls(halves)

    def walk(self, contexts: Csr, paths: Sequence[Path]) -> list[Any]:
        """Walk each path from contexts, (Q, N) sparse: (Q, N) sparse probabilities; None where nothing is reached."""
        start = _normalise(contexts)
        after: dict[Path, Any] = {(): start}
        found = []
        for path in paths:
            for length in (1, 2):
                if path[:length] not in after:
                    after[path[:length]] = self._step(after[path[: length - 1]], path[length - 1])
            found.append(after[path] if after[path].nnz else None)
        return found

    def follow(self, contexts: Csr, path: Path) -> Any:
        """Walk one path; see `walk`."""
        reached = _normalise(contexts)
        for step in path:
            reached = self._step(reached, step)
        return reached

    def _step(self, reached: Any, step: Step) -> Any:
        first, second = self.halves[step]
        return sparse.csr_array((reached @ first) @ second)


def _normalise(matrix: Any) -> Any:
    rows = sparse.csr_array(matrix, dtype=np.float32, copy=True)
    rows.data = np.ones_like(rows.data)
    counts = np.diff(rows.indptr)
    return scale_rows(rows, np.divide(1.0, counts, out=np.zeros(len(counts)), where=counts > 0).astype(np.float32))


def _compare(probability: NDArray[np.float32], n_items: int) -> NDArray[np.float32]:
    return np.log1p(n_items * probability).astype(np.float32)


def _leave_out(rows: Csr, targets: NDArray[np.int32]) -> Csr:
    """Return rows without one item each."""
    kept = rows.indices != np.repeat(targets, np.diff(rows.indptr))
    owner = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))[kept]
    return sparse.csr_array((rows.data[kept], (owner, rows.indices[kept])), shape=rows.shape)


def _holds(history: Csr, owner: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell which cells are items of their query's row: (Q, C)."""
    found = np.zeros(columns.shape, bool)
    for place, row in enumerate(owner.tolist()):
        found[place] = np.isin(columns[place], history.indices[history.indptr[row] : history.indptr[row + 1]])
    return found
