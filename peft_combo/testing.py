"""Conformance of scorers: what `Scorer` promises, checked on a scorer of one's own by one call.

Owns the checks and the small histories they run on. Needs no test framework: a broken promise is an AssertionError that
says what was expected and what was found. Whether a scorer ranks well is for `peft_combo.evaluation` to say.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.scoring import Scorer

__all__ = ["check_scorer"]

_ITEMS, _ROWS, _DAY = 24, 60, 86_400.0
_UNSEEN = [7, 8]


def check_scorer(
    make_scorer: Callable[[], Scorer],
    *,
    needs_items: bool = False,
    unseen_items_missing: bool = True,
    unseen_contexts_missing: bool = True,
    exact_update: bool = True,
) -> None:
    """Check that a scorer keeps every promise of `peft_combo.scoring.Scorer`.

    Scores are (Q, N) float32, finite or NaN. A query scores alike alone, in a batch, in another order and beside other
    queries. Fitting is deterministic and forgets what was fitted before; the kind of sparse matrix makes no difference
    and nothing given is changed; a history without rows will do. `support` counts rows. What is not finite, of a wrong
    width or no row of the history is refused with ValueError and changes nothing; a call before `fit` with
    RuntimeError. The state goes through JSON and `from_state` to equal scores.

    Args:
        make_scorer: builds a scorer that is not fitted; called many times, each time for an equal one.
        needs_items: `fit` needs the item vectors, (N, D).
        unseen_items_missing: an item that no row holds, with a zero vector, is NaN for every query.
        unseen_contexts_missing: a query of such items alone is NaN throughout; False for what reads no context.
        exact_update: `update` gives the scores of fitting all rows anew, with new items as well.
    Raises:
        AssertionError: a promise is broken; the message names the scorer, what was expected and what was found.

    Example:
        >>> from dataclasses import dataclass
        >>> from peft_combo.scoring import Popularity
        >>> from peft_combo.testing import check_scorer
        >>> @dataclass(eq=False)
        ... class DampedPopularity(Popularity):
        ...     def _score(self, known, contexts):
        ...         return super()._score(known, contexts) ** 0.5
        >>> check_scorer(DampedPopularity, unseen_contexts_missing=False)
    """
    trial = _Trial(make_scorer, needs_items)
    _check_shapes(trial)
    _check_batches(trial)
    _check_fitting(trial)
    _check_inputs(trial)
    _check_support(trial)
    _check_empty_history(trial)
    _check_calls_before_fit(trial)
    _check_refusals(trial)
    _check_state(trial)
    _check_missing_scores(trial, unseen_items_missing, unseen_contexts_missing)
    if exact_update:
        _check_updates(trial)


@dataclass(frozen=True)
class _Trial:
    """A scorer and what it is tried on: values 1 to 5, so that one that reads ratings has something to read."""

    make_scorer: Callable[[], Scorer]
    needs_items: bool

    @property
    def history(self) -> Any:
        return _make_rows(_ROWS, seed=0)

    @property
    def contexts(self) -> Any:
        return _make_rows(6, seed=9)

    @property
    def vectors(self) -> NDArray[np.float32]:
        return _make_vectors(_ITEMS)

    def fit(self, history: Any = None, items: NDArray[np.float32] | None = None) -> Scorer:
        history = self.history if history is None else history
        return self.refit(self.make_scorer(), history, items)

    def refit(self, scorer: Scorer, history: Any, items: NDArray[np.float32] | None = None) -> Scorer:
        times = _make_times(history.shape[0])
        return scorer.fit(history, items=self.give_items(history.shape[1], items), times=times)

    def give_items(self, n_items: int, items: NDArray[np.float32] | None = None) -> NDArray[np.float32] | None:
        """Return the vectors for a scorer that needs them, None for others."""
        return (_make_vectors(n_items) if items is None else items) if self.needs_items else None

    def expect(self, kept: bool, message: str) -> None:
        if not kept:
            raise AssertionError(f"{self.make_scorer()!r}: {message}")

    def expect_equal(self, found: NDArray[Any], expected: NDArray[Any], message: str, *, close: bool = False) -> None:
        """Compare arrays, NaN equal to NaN: bit for bit, or within the rounding of float32 where they are `close`."""
        relative, absolute = (1e-5, 1e-6) if close else (0.0, 0.0)
        np.testing.assert_allclose(
            found, expected, rtol=relative, atol=absolute, err_msg=f"{self.make_scorer()!r}: {message}"
        )

    def expect_error(self, kind: type[Exception], call: Callable[[], object], what: str) -> None:
        try:
            call()
        except kind:
            return
        except Exception as error:
            raise AssertionError(
                f"{self.make_scorer()!r}: {what} must raise {kind.__name__}, raised {type(error).__name__}: {error}"
            ) from error
        raise AssertionError(f"{self.make_scorer()!r}: {what} must raise {kind.__name__}, raised nothing.")


def _make_rows(n_rows: int, n_items: int = _ITEMS, *, seed: int) -> Any:
    """Return (n_rows, n_items) rows of 2 to 6 items with whole values 1 to 5."""
    rng = np.random.default_rng(seed)
    table = np.zeros((n_rows, n_items), np.float32)
    for row in table:
        chosen = rng.choice(n_items, rng.integers(2, 7), replace=False)
        row[chosen] = rng.integers(1, 6, len(chosen))
    return sparse.csr_matrix(table)


def _make_vectors(n_items: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(n_items, 6)).astype(np.float32)


def _make_times(n_rows: int) -> NDArray[np.float64]:
    return np.random.default_rng(2).uniform(0, 100 * _DAY, n_rows)


def _check_shapes(trial: _Trial) -> None:
    scorer = trial.fit()
    for call, scores, queries in (
        ("score_baskets", scorer.score_baskets(trial.contexts), 6),
        ("score_users", scorer.score_users([0, 3]), 2),
    ):
        expected = (queries, _ITEMS)
        trial.expect(scores.shape == expected, f"{call} must give {expected} scores, found {scores.shape}.")
        trial.expect(scores.dtype == np.float32, f"{call} must give float32, found {scores.dtype}.")
        trial.expect(not np.isinf(scores).any(), f"{call} gives infinite scores; say NaN where there is no score.")


def _check_batches(trial: _Trial) -> None:
    scorer, contexts = trial.fit(), trial.contexts
    batch = scorer.score_baskets(contexts)
    parts = np.concatenate([scorer.score_baskets(contexts[row]) for row in range(6)])
    trial.expect_equal(batch, parts, "a batch must score as its queries do one by one.", close=True)
    reverse = scorer.score_baskets(contexts[::-1])[::-1]
    trial.expect_equal(reverse, batch, "the order of the queries must make no difference.", close=True)
    beside = scorer.score_baskets(sparse.vstack([contexts[[2]], _make_rows(5, seed=11)]).tocsr())[0]
    trial.expect_equal(beside, batch[2], "a query must not see the queries beside it.", close=True)
    parts = np.concatenate([scorer.score_users([row]) for row in (4, 1, 4)])
    trial.expect_equal(
        scorer.score_users([4, 1, 4]), parts, "a batch of known rows must score as they do one by one.", close=True
    )


def _check_fitting(trial: _Trial) -> None:
    expected = trial.fit().score_baskets(trial.contexts)
    again = trial.fit().score_baskets(trial.contexts)
    trial.expect_equal(again, expected, "fitting twice on the same history must give the same scores.")
    refitted = trial.refit(trial.fit(_make_rows(30, seed=5)), trial.history).score_baskets(trial.contexts)
    trial.expect_equal(refitted, expected, "fit must forget what was fitted before.")


def _check_inputs(trial: _Trial) -> None:
    """Any sparse matrix will do, and none is changed."""
    plain, contexts, vectors = trial.history, trial.contexts, trial.vectors
    cells = plain.tocsc().tocoo()
    places = (np.append(cells.row, 0), np.append(cells.col, 0))
    stored_zero = sparse.coo_matrix((np.append(cells.data, 0), places), shape=plain.shape)
    expected = trial.fit(plain).score_baskets(contexts)
    for form in (sparse.csr_array(plain), plain.tocsc(), plain.astype(np.int64), stored_zero):
        found = trial.fit(form).score_baskets(contexts.tocoo())
        trial.expect_equal(found, expected, f"a {type(form).__name__} of {form.dtype} must score as any other.")
    scorer = trial.fit(plain, vectors)
    scorer.update(contexts, items=trial.give_items(_ITEMS, vectors), times=_make_times(6)).score_baskets(contexts)
    for name, now, before in (
        ("history", plain.toarray(), trial.history.toarray()),
        ("contexts", contexts.toarray(), trial.contexts.toarray()),
        ("items", vectors, trial.vectors),
    ):
        trial.expect_equal(now, before, f"the {name} given must not be changed.")


def _check_support(trial: _Trial) -> None:
    more = _make_rows(6, _ITEMS + 2, seed=9)
    scorer = trial.fit()
    expected = np.asarray((trial.history > 0).sum(axis=0)).ravel()
    trial.expect_equal(scorer.support, expected, "support must count the rows that hold each item.")
    scorer.update(more, items=trial.give_items(_ITEMS + 2), times=_make_times(6))
    expected = np.pad(expected, (0, 2)) + (more > 0).toarray().sum(axis=0)
    trial.expect_equal(scorer.support, expected, "support must count the rows of an update.")


def _check_empty_history(trial: _Trial) -> None:
    scorer = trial.fit(sparse.csr_array((0, _ITEMS), dtype=np.float32))
    trial.expect_equal(scorer.support, np.zeros(_ITEMS), "support must be 0 where no rows were fitted.")
    for found, queries in (
        (scorer.score_baskets(trial.contexts[:2]), 2),
        (scorer.score_baskets(sparse.csr_array((0, _ITEMS))), 0),
        (scorer.score_users(np.zeros(0, np.int64)), 0),
    ):
        message = f"fitted on no rows it must give ({queries}, {_ITEMS}) scores, found {found.shape}."
        trial.expect(found.shape == (queries, _ITEMS), message)


def _check_calls_before_fit(trial: _Trial) -> None:
    scorer = trial.make_scorer()
    calls: dict[str, Callable[[], object]] = {
        "score_baskets": lambda: scorer.score_baskets(trial.contexts),
        "score_users": lambda: scorer.score_users([0]),
        "update": lambda: scorer.update(trial.contexts),
        "state": scorer.state,
    }
    for name, call in calls.items():
        trial.expect_error(RuntimeError, call, f"{name} before fit")


def _check_refusals(trial: _Trial) -> None:
    scorer = trial.fit()
    expected = scorer.score_baskets(trial.contexts)
    broken, narrow, items = _make_rows(3, seed=9), _make_rows(2, 9, seed=9), trial.give_items(_ITEMS)
    broken.data[0] = np.nan
    times = _make_times(3)
    calls: dict[str, Callable[[], object]] = {
        "a context with too few columns": lambda: scorer.score_baskets(narrow),
        "a context that is not finite": lambda: scorer.score_baskets(broken),
        "a row after the last": lambda: scorer.score_users([_ROWS]),
        "a row before the first": lambda: scorer.score_users([-1]),
        "a row that is no whole number": lambda: scorer.score_users([0.5]),
        "an update with too few columns": lambda: scorer.update(narrow, items=items, times=times[:2]),
        "an update that is not finite": lambda: scorer.update(broken, items=items, times=times),
        "a history that is not finite": lambda: scorer.fit(broken, items=items, times=times),
    }
    if trial.needs_items:
        calls |= {
            "fit with vectors of too few items": lambda: scorer.fit(
                trial.history, items=_make_vectors(9), times=_make_times(_ROWS)
            ),
            "fit without vectors": lambda: scorer.fit(trial.history, times=_make_times(_ROWS)),
        }
    for what, call in calls.items():
        trial.expect_error(ValueError, call, what)
        trial.expect_equal(scorer.score_baskets(trial.contexts), expected, f"{what} was refused, and changed scores.")


def _check_state(trial: _Trial) -> None:
    scorer, contexts = trial.fit(), trial.contexts
    arrays, params = scorer.state()
    for name, array in arrays.items():
        plain = isinstance(array, np.ndarray) and array.dtype != object
        trial.expect(plain, f"state must hold NumPy arrays of numbers, found {type(array).__name__} in {name!r}.")
    try:
        text = json.dumps(params)
    except TypeError as error:
        raise AssertionError(f"{scorer!r}: the parameters of state must be JSON values: {error}") from error
    loaded = type(scorer).from_state({name: array.copy() for name, array in arrays.items()}, json.loads(text))
    trial.expect(repr(loaded) == repr(scorer), f"from_state must keep the settings, found {loaded!r}.")
    for found, expected in (
        (loaded.score_baskets(contexts), scorer.score_baskets(contexts)),
        (loaded.score_users([7]), scorer.score_users([7])),
        (loaded.support, scorer.support),
    ):
        trial.expect_equal(found, expected, "from_state must give equal scores and support.")
    loaded.update(contexts, items=trial.give_items(_ITEMS), times=_make_times(6))
    trial.expect_error(ValueError, lambda: type(scorer).from_state({}, params), "from_state without arrays")


def _check_missing_scores(trial: _Trial, items_missing: bool, contexts_missing: bool) -> None:
    history, vectors = trial.history.tolil(), trial.vectors
    history[:, _UNSEEN] = 0
    vectors[_UNSEEN] = 0
    scorer = trial.fit(history.tocsr(), vectors)
    scores = scorer.score_baskets(trial.contexts)
    if items_missing:
        missing = bool(np.isnan(scores[:, _UNSEEN]).all())
        trial.expect(missing, f"an item no row holds must be NaN, found {scores[:, _UNSEEN].ravel()}.")
        trial.expect(not np.isnan(scores).all(), "every score is NaN, though most queries hold items with rows.")
    if contexts_missing:
        unseen = sparse.csr_matrix((np.ones(2), _UNSEEN, [0, 2]), shape=(1, _ITEMS))
        scores = scorer.score_baskets(unseen)
        trial.expect(
            bool(np.isnan(scores).all()), f"a query of items no row holds must be NaN throughout, found {scores[0]}."
        )


def _check_updates(trial: _Trial) -> None:
    for new, new_items in ((1, 0), (20, 0), (2, 3), (40, 3)):
        whole, width = _make_rows(90, _ROWS, seed=0).tolil(), _ROWS - new_items
        if new_items:
            whole[: 90 - new, [3, *range(width, _ROWS)]] = 0  # 3 gets its first rows by the update, too
        rows, times, items = whole.tocsr(), _make_times(90), trial.give_items(_ROWS)
        scorer = trial.make_scorer().fit(
            rows[:-new, :width], items=None if items is None else items[:width], times=times[:-new]
        )
        scorer.update(rows[-new:], items=items, times=times[-new:])
        anew = trial.make_scorer().fit(rows, items=items, times=times)
        contexts, known = _make_rows(6, _ROWS, seed=9), [0, 89]
        message = f"an update by {new} rows and {new_items} new items must score as fitting anew."
        trial.expect_equal(scorer.score_baskets(contexts), anew.score_baskets(contexts), message, close=True)
        trial.expect_equal(scorer.score_users(known), anew.score_users(known), message, close=True)
