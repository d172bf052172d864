"""Every scorer keeps the promises of `check_scorer`; then each one's answers on cases worked by hand."""

from __future__ import annotations

import doctest
import importlib.util
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save
from scipy import sparse

from peft_combo.errors import PeftComboError
from peft_combo.machine import LIMITS
from peft_combo.scoring import load_scorer
from peft_combo.scoring.factors import ALS
from peft_combo.scoring.linear import CEASE, EASE
from peft_combo.scoring.neighbours import ItemKNN, UserKNN
from peft_combo.scoring.next_basket import TifuKNN
from peft_combo.scoring.popularity import CoOccurrence, Popularity, Random
from peft_combo.scoring.text import TextCosine, Tfidf, tfidf_vectors
from peft_combo.testing import check_scorer

NAN = float("nan")
DAY = 86_400.0

needs_implicit = pytest.mark.skipif(
    importlib.util.find_spec("implicit") is None, reason="the optional package implicit is not installed"
)

Make = Callable[[], Any]
COUNTING: dict[str, Make] = {
    "popularity": Popularity,
    "popularity-decay": lambda: Popularity(half_life_days=30),
    "cooccurrence-count": lambda: CoOccurrence("count"),
    "cooccurrence-conditional": CoOccurrence,
    "cooccurrence-lift": lambda: CoOccurrence("lift"),
    "item-knn": ItemKNN,
    "item-knn-5": lambda: ItemKNN(k=5, shrinkage=2.0),
    "item-knn-tfidf": lambda: ItemKNN(k=5, similarity="tfidf"),
    "user-knn": lambda: UserKNN(k=8),
    "user-knn-shrunk": lambda: UserKNN(k=8, shrinkage=3.0),
    "user-knn-pearson": lambda: UserKNN(k=8, similarity="pearson", feedback="explicit"),
    "ease": EASE,
    "next-basket": lambda: TifuKNN(k=8),
    "next-basket-own": lambda: TifuKNN(k=3, own=1.0),
}
WITH_TEXT: dict[str, Make] = {
    "cease": CEASE,
    "text-mean": TextCosine,
    "text-max": lambda: TextCosine("max"),
}
FACTORS: dict[str, Make] = {
    "als": lambda: ALS(factors=8, iterations=10),
}
ALL = COUNTING | WITH_TEXT | FACTORS | {"random": lambda: Random(seed=3)}


def kinds(*groups: dict[str, Make]) -> pytest.MarkDecorator:
    """Run a test once per scorer of the groups."""
    marked = [
        pytest.param(make, id=name, marks=needs_implicit if name in FACTORS else ())
        for group in groups
        for name, make in group.items()
    ]
    return pytest.mark.parametrize("make", marked)


def rows(*baskets: list[float], dtype: type = np.float32) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.array(baskets, dtype))


def baskets(n_rows: int = 60, n_items: int = 24, seed: int = 0, top: int = 1) -> sparse.csr_matrix:
    """Random rows of 2 to 6 items; values 1..top."""
    rng = np.random.default_rng(seed)
    table = np.zeros((n_rows, n_items), np.float32)
    for row in table:
        chosen = rng.choice(n_items, rng.integers(2, 7), replace=False)
        row[chosen] = rng.integers(1, top + 1, len(chosen))
    return sparse.csr_matrix(table)


def vectors(n_items: int = 24, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_items, 6)).astype(np.float32)


def when(n_rows: int = 60) -> np.ndarray:
    return np.random.default_rng(2).uniform(0, 100 * DAY, n_rows)


def fitted(make: Make, history: Any = None, items: Any = None) -> Any:
    history = baskets(top=5) if history is None else history
    items = vectors(history.shape[1]) if items is None else items
    return make().fit(history, items=items, times=when(history.shape[0]))


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_implicit if name in FACTORS else ()) for name in ALL])
def test_every_scorer_keeps_its_promises(name: str) -> None:
    check_scorer(
        ALL[name],
        needs_items=name in WITH_TEXT,
        unseen_items_missing=name != "random",
        unseen_contexts_missing=name != "random" and not name.startswith("popularity"),
        exact_update=name not in FACTORS,
    )


class TestCheckScorer:
    """Each scorer here breaks one promise, and is told which."""

    def _check(self, message: str, **methods: Any) -> None:
        kind = type("Broken", (Popularity,), methods)
        with pytest.raises(AssertionError, match=rf"(?s)Broken.*{message}"):
            check_scorer(kind, unseen_contexts_missing=False)

    @pytest.mark.parametrize(
        ("message", "change"),
        [
            ("float32, found float64", lambda scores: scores.astype(np.float64)),
            (r"\(6, 24\) scores, found \(6, 23\)", lambda scores: scores[:, :-1]),
            ("infinite", lambda scores: scores / np.float32(0)),
            ("one by one", lambda scores: scores / np.float32(len(scores))),
            ("must be NaN, found", np.nan_to_num),
        ],
    )
    @pytest.mark.filterwarnings("ignore:divide by zero")
    def test_scores(self, message: str, change: Any) -> None:
        self._check(message, _score=lambda self, known, rows: change(Popularity._score(self, known, rows)))

    def test_scores_that_differ_from_fit_to_fit(self) -> None:
        fits = itertools.count()
        self._check(
            "twice",
            _share=lambda self, age: np.ones_like(age),
            _learn=lambda self, *given: replace(Popularity._learn(self, *given), counts=np.full(24, next(fits) / 8)),
        )

    def test_a_context_that_is_changed(self) -> None:
        def score_baskets(self: Popularity, contexts: Any) -> Any:
            scores = Popularity.score_baskets(self, contexts)
            contexts.data[:] = 1
            return scores

        self._check("contexts given must not be changed", score_baskets=score_baskets)

    def test_a_width_that_is_not_checked(self) -> None:
        def score_baskets(self: Popularity, contexts: Any) -> Any:
            return self._score(
                self._require_fitted("score_baskets"), sparse.csr_array((contexts.shape[0], len(self.support)))
            )

        self._check("too few columns must raise ValueError, raised nothing", score_baskets=score_baskets)

    def test_a_state_that_is_not_whole(self) -> None:
        def state(self: Popularity) -> Any:
            arrays, params = Popularity.state(self)
            return arrays | {"counts": np.zeros(24)}, params

        self._check("from_state must give equal scores", state=state)

    def test_an_update_that_is_less_than_a_fit(self) -> None:
        def extend(self: Popularity, known: Any, *rows: Any) -> Any:
            new = Popularity._extend(self, known, *rows)
            return replace(new, counts=np.pad(known.counts, (0, len(new.counts) - len(known.counts))))

        self._check("an update by 1 rows and 0 new items must score as fitting anew", _extend=extend)

    def test_the_example_of_its_docstring(self) -> None:
        examples = doctest.DocTestFinder().find(check_scorer, "check_scorer")
        assert [doctest.DocTestRunner().run(one) for one in examples] == [(0, 5)]


@kinds(ALL)
def test_a_state_goes_through_safetensors_and_load_scorer(make: Make) -> None:
    scorer, contexts = fitted(make), baskets(6, seed=9)
    arrays, params = scorer.state()
    back = load_scorer(load(save(arrays)), params)
    assert type(back) is type(scorer)
    np.testing.assert_array_equal(back.score_baskets(contexts), scorer.score_baskets(contexts))


def test_the_state_of_another_or_half_a_state_is_refused() -> None:
    arrays, params = fitted(EASE).state()
    with pytest.raises(ValueError, match="state of"):
        EASE.from_state(arrays, params | {"scorer": "Oracle"})
    with pytest.raises(ValueError, match="lacks"):
        EASE.from_state({}, params)
    with pytest.raises(ValueError, match="not whole"):
        EASE.from_state({name: a for name, a in arrays.items() if name != "history.indptr"}, params)


def test_what_does_not_fit_is_refused_with_what_was_expected_and_found() -> None:
    scorer = fitted(Popularity)
    broken = baskets(3)
    broken.data[0] = NAN
    for call, message in (
        (lambda: scorer.score_baskets(baskets(2, n_items=9)), "24 columns, found 9"),
        (lambda: scorer.score_baskets(np.zeros((2, 24))), "sparse"),
        (lambda: scorer.score_baskets(broken), "not finite"),
        (lambda: scorer.score_users([60]), r"0\.\.59"),
        (lambda: scorer.score_users([0.5]), "whole numbers"),
        (lambda: scorer.update(baskets(2, n_items=9), times=when(2)), "fewer than the 24"),
        (lambda: scorer.update(baskets(2), times=when(5)), r"times must be \(2,\)"),
        (lambda: scorer.fit(baskets(), items=vectors(9), times=when()), "24 items, found 9"),
        (Popularity().state, "before fit"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()


@kinds({k: v for k, v in (COUNTING | FACTORS).items() if not k.startswith("popularity")})
def test_what_is_missing_from_its_block_comes_first(make: Make) -> None:
    # Two blocks of items that never mix; every row lacks one item of its block. Given the others of a block, the
    # missing one is above all of the other block. Ratings vary, so that Pearson has something to correlate.
    table = np.zeros((24, 12), np.float32)
    for row in range(24):
        block = slice(0, 6) if row % 2 else slice(6, 12)
        table[row, block] = [5, 4, 5, 4, 5, 4]
        table[row, block.start + (row // 2) % 6] = 0
    scorer = make().fit(sparse.csr_matrix(table), times=when(24))
    for item in range(12):
        context = np.zeros((1, 12), np.float32)
        block = slice(0, 6) if item < 6 else slice(6, 12)
        context[0, block] = [5, 4, 5, 4, 5, 4]
        context[0, item] = 0
        scores = np.nan_to_num(scorer.score_baskets(sparse.csr_matrix(context))[0], nan=-np.inf)
        other = slice(6, 12) if item < 6 else slice(0, 6)
        assert scores[item] > scores[other].max()


class TestRandom:
    def test_the_seed_and_the_context_decide(self) -> None:
        contexts = baskets(4, seed=9)
        one, same, other = (Random(seed).fit(baskets()).score_baskets(contexts) for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, same)
        assert (one != other).any(axis=1).all()
        assert (one[0] != one[1]).any()
        assert one.min() >= 0
        assert one.max() < 1


class TestPopularity:
    def test_it_counts_rows_and_not_quantities(self) -> None:
        scores = Popularity().fit(rows([9, 1, 0], [0, 1, 0])).score_baskets(rows([0, 0, 0]))
        np.testing.assert_array_equal(scores, [[1, 2, NAN]])

    def test_a_row_one_half_life_old_counts_half(self) -> None:
        history = rows([1, 1, 0], [0, 1, 0], [0, 0, 1])
        scorer = Popularity(half_life_days=10).fit(history, times=[80 * DAY, 90 * DAY, 100 * DAY])
        np.testing.assert_allclose(scorer.score_baskets(rows([0, 0, 0])), [[0.25, 0.75, 1.0]])

    def test_a_later_row_ages_the_rest(self) -> None:
        scorer = Popularity(half_life_days=10).fit(rows([1, 0]), times=[0.0])
        scorer.update(rows([0, 1]), times=[20 * DAY])
        np.testing.assert_allclose(scorer.score_users([0]), [[0.25, 1.0]])

    @pytest.mark.parametrize("times", [None, [0.0, NAN]])
    def test_a_half_life_needs_times(self, times: Any) -> None:
        with pytest.raises(ValueError, match="finite time for each row"):
            Popularity(half_life_days=10).fit(rows([1, 0], [1, 1]), times=times)


class TestCoOccurrence:
    # Item 0 in three rows, with item 1 in two of them and with item 2 in one; item 3 with none.
    history = rows([1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1])

    @pytest.mark.parametrize(
        ("measure", "expected"),
        [
            ("count", [0, 2, 1, 0]),
            ("conditional", [0, 2 / 3, 1 / 3, 0]),
            ("lift", [0, (2 / 3) / (2 / 4), (1 / 3) / (1 / 4), 0]),
        ],
    )
    def test_one_context_item(self, measure: Any, expected: list[float]) -> None:
        scores = CoOccurrence(measure).fit(self.history).score_baskets(rows([1, 0, 0, 0]))
        np.testing.assert_allclose(scores, [expected], rtol=1e-6)

    def test_the_mean_is_over_context_items_that_were_seen(self) -> None:
        wide = sparse.hstack([self.history, sparse.csr_matrix((4, 1))]).tocsr()
        scores = CoOccurrence().fit(wide).score_baskets(rows([0, 1, 1, 0, 1]))
        np.testing.assert_allclose(scores, [[1.0, 0, 0, 0, NAN]])

    def test_an_unknown_measure_is_refused(self) -> None:
        with pytest.raises(ValueError, match="conditional"):
            CoOccurrence("pmi")  # type: ignore[arg-type]


class TestItemKNN:
    history = rows([1, 1, 0], [1, 1, 1], [1, 0, 0])

    def test_cosine_of_columns(self) -> None:
        # |a| = sqrt 3, |b| = sqrt 2, |c| = 1; a.b = 2, a.c = 1, b.c = 1
        scores = ItemKNN().fit(self.history).score_baskets(rows([1, 0, 0], [0, 1, 1]))
        ab, ac, bc = 2 / np.sqrt(6), 1 / np.sqrt(3), 1 / np.sqrt(2)
        np.testing.assert_allclose(scores, [[0, ab, ac], [(ab + ac) / 2, bc / 2, bc / 2]], rtol=1e-6)

    def test_shrinkage_is_added_to_the_norms(self) -> None:
        scores = ItemKNN(shrinkage=4.0).fit(self.history).score_baskets(rows([1, 0, 0]))
        np.testing.assert_allclose(scores, [[0, 2 / (np.sqrt(6) + 4), 1 / (np.sqrt(3) + 4)]], rtol=1e-6)

    def test_only_the_k_nearest_are_kept_and_the_earlier_of_equals(self) -> None:
        scores = ItemKNN(k=1).fit(self.history).score_baskets(rows([1, 0, 0]))
        np.testing.assert_allclose(scores, [[0, 2 / np.sqrt(6), 0]], rtol=1e-6)
        level = ItemKNN(k=2).fit(rows([1, 1, 1, 1], [1, 1, 1, 1])).score_baskets(rows([1, 0, 0, 0]))
        np.testing.assert_allclose(level, [[0, 1, 1, 0]], rtol=1e-6)

    def test_tfidf_trusts_rows_of_few_items(self) -> None:
        # 0 and 1 share a row of two items, 0 and 2 a row of four.
        history = rows([1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1])
        cosine = ItemKNN().fit(history).score_baskets(rows([1, 0, 0, 0, 0, 0]))[0]
        tfidf = ItemKNN(similarity="tfidf").fit(history).score_baskets(rows([1, 0, 0, 0, 0, 0]))[0]
        assert cosine[1] == pytest.approx(cosine[2])
        assert tfidf[1] > tfidf[2] > 0

    def test_a_row_of_all_items_says_nothing_under_tfidf(self) -> None:
        scores = ItemKNN(similarity="tfidf").fit(rows([1, 1, 1], [1, 1, 1])).score_baskets(rows([1, 0, 0]))
        np.testing.assert_array_equal(scores, [[0, 0, 0]])

    def test_blocks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = ItemKNN(k=4).fit(baskets()).score_baskets(baskets(6, seed=9))
        monkeypatch.setattr(LIMITS, "block_products", 50)
        monkeypatch.setattr(LIMITS, "block_cells", 30)
        np.testing.assert_array_equal(ItemKNN(k=4).fit(baskets()).score_baskets(baskets(6, seed=9)), whole)


class TestUserKNN:
    def test_the_textbook_example_of_pearson(self) -> None:
        # Aggarwal 2016, "Recommender Systems: The Textbook", table 2.1: the two users nearest to user 3 are 1 and 2,
        # and the mean-centred predictions for items 1 and 6 are 3.35 and 0.86.
        ratings = rows(
            [7, 6, 7, 4, 5, 4], [6, 7, 0, 4, 3, 4], [0, 3, 3, 1, 1, 0], [1, 2, 2, 3, 3, 4], [1, 0, 1, 2, 3, 3]
        )
        scorer = UserKNN(k=2, similarity="pearson", feedback="explicit").fit(ratings)
        scores = scorer.score_users([2])[0]
        assert scores[[0, 5]] == pytest.approx([3.35, 0.86], abs=0.005)
        # The same row as a basket finds itself in the history and would be its own nearest neighbour.
        others = UserKNN(k=2, similarity="pearson", feedback="explicit").fit(ratings[[0, 1, 3, 4]])
        np.testing.assert_allclose(others.score_baskets(ratings[2])[0], scores, rtol=1e-5)

    def test_explicit_cosine_by_hand(self) -> None:
        # Context (4, -, 2): mean 3. Row 0 = (4, 5, 0): cosine 16 / (sqrt 20 sqrt 41), mean 4.5. Row 1 = (0, 1, 2):
        # cosine 4 / (sqrt 20 sqrt 5), mean 1.5.
        w = np.array([16 / np.sqrt(20 * 41), 4 / np.sqrt(20 * 5)])
        scores = UserKNN(feedback="explicit").fit(rows([4, 5, 0], [0, 1, 2])).score_baskets(rows([4, 0, 2]))[0]
        assert scores == pytest.approx([3 - 0.5, 3 + (w[0] * 0.5 - w[1] * 0.5) / w.sum(), 3 + 0.5], rel=1e-5)

    def test_shrinkage_weighs_by_items_in_common(self) -> None:
        plain = rows([1, 1, 1, 0], [1, 0, 0, 1])
        context = rows([1, 1, 0, 0])
        w = np.array([2 / np.sqrt(6) * 2 / (2 + 3), 1 / 2 * 1 / (1 + 3)])
        scores = UserKNN(shrinkage=3.0).fit(plain).score_baskets(context)[0]
        assert scores == pytest.approx([1, w[0] / w.sum(), w[0] / w.sum(), w[1] / w.sum()], rel=1e-5)

    def test_implicit_is_the_weighted_share_of_neighbours(self) -> None:
        scores = UserKNN(k=2).fit(rows([1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1])).score_baskets(rows([1, 0, 0, 0]))
        np.testing.assert_allclose(scores, [[1, 0.5, 0.5, NAN]], rtol=1e-6)

    def test_negative_correlation_counts_against(self) -> None:
        ratings = rows([1, 5, 5], [5, 1, 5])
        scores = UserKNN(k=2, similarity="pearson", feedback="explicit").fit(ratings).score_baskets(rows([5, 1, 0]))[0]
        # Only co-rated items count: w = -1 for row 0 and +1 for row 1; both rated item 2 above their mean of 11/3.
        assert scores[2] == pytest.approx(3 + (-(5 - 11 / 3) + (5 - 11 / 3)) / 2, abs=1e-5)

    def test_only_k_rows_are_neighbours_and_the_earlier_of_equals(self) -> None:
        history = rows([1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1])
        scores = UserKNN(k=2).fit(history).score_baskets(rows([1, 0, 0, 0]))
        np.testing.assert_allclose(scores, [[1, 0.5, 0.5, NAN]], rtol=1e-6)

    def test_a_flat_rater_has_no_correlation(self) -> None:
        ratings = rows([3, 3, 3], [1, 2, 5])
        assert np.isnan(
            UserKNN(similarity="pearson", feedback="explicit").fit(ratings).score_baskets(rows([4, 4, 0]))
        ).all()

    def test_pearson_of_purchases_is_refused(self) -> None:
        with pytest.raises(ValueError, match="explicit"):
            UserKNN(similarity="pearson")

    def test_blocks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = UserKNN(k=4).fit(baskets()).score_users(np.arange(60))
        monkeypatch.setattr(LIMITS, "block_cells", 300)
        np.testing.assert_allclose(UserKNN(k=4).fit(baskets()).score_users(np.arange(60)), whole, rtol=1e-6)


def solved_by_columns(data: np.ndarray, l2: float) -> np.ndarray:
    """EASE's problem solved without its closed form: a ridge regression per item on all others."""
    n = data.shape[1]
    b = np.zeros((n, n))
    for item in range(n):
        others = np.delete(np.arange(n), item)
        x = data[:, others]
        b[others, item] = np.linalg.solve(x.T @ x + l2 * np.eye(n - 1), x.T @ data[:, item])
    return b


class TestTifuKNN:
    def test_by_hand(self) -> None:
        """Of [2, 1, 0, 0] the others are like by the cosine 2 / sqrt 5, 2 / sqrt 10 and 0; the better one is taken."""
        history = rows([2, 1, 0, 0], [1, 0, 0, 0.5], [0, 2, 2, 0], [0, 0, 0, 3])
        scorer = TifuKNN(k=1, own=0.5).fit(history)
        cosine = 2 / np.sqrt(5 * 1.25)
        expected = [0.5 * 2 + cosine * 1, 0.5 * 1, 0, cosine * 0.5]
        np.testing.assert_allclose(scorer.score_users([0])[0], expected, rtol=1e-6)
        # As a stranger with the same habits, the row itself is the nearest: cosine 1.
        np.testing.assert_allclose(scorer.score_baskets(history[:1])[0], [3, 1.5, 0, 0], rtol=1e-6)

    def test_habits_come_back_where_users_repeat_and_others_where_they_do_not(self) -> None:
        history = rows([9, 0, 0, 1, 0], [8, 0, 0, 0, 2], [0, 5, 5, 0, 0])
        weighed = TifuKNN(own=1.0).fit(history).score_users([0])[0]
        alike = TifuKNN(own=0.0).fit(history).score_users([0])[0]
        assert weighed.argmax() == 0
        assert np.flatnonzero(alike).tolist() == [0, 4]  # item 3, which nobody like them took, is not among them


class TestEASE:
    def test_it_is_a_ridge_regression_of_each_item_on_the_others(self) -> None:
        history, contexts = baskets(top=3), baskets(6, seed=9, top=3)
        expected = contexts.toarray() @ solved_by_columns(history.toarray().astype(float), 2.5)
        np.testing.assert_allclose(EASE(l2=2.5).fit(history).score_baskets(contexts), expected, rtol=1e-4, atol=1e-6)

    def test_two_items_by_hand(self) -> None:
        # Gram [[3, 2], [2, 2]] + 1: the ridge of item 1 on item 0 is 2 / (3 + 1), of item 0 on item 1 2 / (2 + 1).
        scores = EASE(l2=1.0).fit(rows([1, 1], [1, 1], [1, 0])).score_baskets(rows([1, 0], [0, 1]))
        np.testing.assert_allclose(scores, [[0, 0.5], [2 / 3, 0]], rtol=1e-6)

    def test_the_inverse_is_right_beyond_a_leaf(self) -> None:
        n = 101  # more than three leaves of the recursive inverse
        history = baskets(400, n_items=n)
        gram = history.toarray().astype(float).T @ history.toarray() + 0.5 * np.eye(n)
        arrays, _ = EASE(l2=0.5).fit(history).state()
        np.testing.assert_allclose(
            arrays["inverse"] @ gram[np.ix_(arrays["active"], arrays["active"])],
            np.eye(len(arrays["active"])),
            atol=1e-10,
        )

    def test_many_small_updates_do_not_drift(self) -> None:
        whole, contexts = baskets(200, n_items=40), baskets(6, n_items=40, seed=9)
        scorer = EASE().fit(whole[:100])
        for row in range(100, 200):
            scorer.update(whole[row])
        np.testing.assert_allclose(
            scorer.score_baskets(contexts), EASE().fit(whole).score_baskets(contexts), rtol=1e-5, atol=1e-7
        )

    def test_too_many_items_names_the_way_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(LIMITS, "inverted_items", 10)
        with pytest.raises(PeftComboError, match=r"(?s)10 items; found 24.*ItemKNN or ALS"):
            EASE().fit(baskets())
        scorer = EASE().fit(baskets(40, n_items=10))
        with pytest.raises(PeftComboError, match="ItemKNN"):
            scorer.update(baskets(2))


class TestCEASE:
    def test_vectors_are_further_rows_of_the_history(self) -> None:
        history, contexts, items = baskets(), baskets(6, seed=9), vectors()
        unit = items / np.linalg.norm(items, axis=1, keepdims=True)
        rows_and_text = np.concatenate([history.toarray(), np.sqrt(0.7) * unit.T])
        expected = contexts.toarray() @ solved_by_columns(rows_and_text.astype(float), 2.0)
        scores = CEASE(l2=2.0, alpha=0.7).fit(history, items=items).score_baskets(contexts)
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)

    def test_sparse_and_dense_vectors_score_alike(self) -> None:
        items = np.where(vectors() > 0.5, vectors(), 0)
        items[5, 0] = 1
        dense = CEASE().fit(baskets(), items=items).score_baskets(baskets(6, seed=9))
        thin = CEASE().fit(baskets(), items=sparse.csr_matrix(items)).score_baskets(baskets(6, seed=9))
        np.testing.assert_allclose(thin, dense, rtol=1e-5, atol=1e-6)

    def test_a_cold_item_is_found_by_its_text(self) -> None:
        # 0 goes with 1; 3 reads like 1 but no row holds it; 2 and 4 have nothing to do with either.
        history = rows([1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 1])
        items = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0.2], [0, 0.1, 1]], np.float32)
        scores = CEASE(l2=1.0, alpha=2.0).fit(history, items=items).score_baskets(rows([1, 0, 0, 0, 0]))[0]
        assert not np.isnan(scores).any()
        assert scores[1] > scores[4]
        cold = CEASE(l2=1.0, alpha=2.0).fit(history, items=items).score_baskets(rows([0, 0, 0, 1, 0]))[0]
        assert np.argmax(cold) == 1

    def test_without_rows_or_vector_there_is_nothing_to_say(self) -> None:
        history, items = baskets().tolil(), vectors()
        history[:, [4, 5]] = 0
        items[[4, 6]] = 0
        contexts = sparse.csr_matrix((np.ones(2), [4, 5], [0, 1, 2]), shape=(2, 24))
        scores = CEASE().fit(history.tocsr(), items=items).score_baskets(contexts)
        assert np.isnan(scores[0]).all()  # 4 has neither
        assert np.isnan(scores[1]).nonzero()[0].tolist() == [4]  # 5 has a vector, 6 has rows

    @pytest.mark.parametrize("new", [1, 40])
    def test_an_update_is_as_good_as_a_refit(self, new: int) -> None:
        whole, contexts, items = baskets(90, n_items=60), baskets(6, n_items=60, seed=9), vectors(60)
        scorer = CEASE().fit(whole[:-new], items=items).update(whole[-new:])
        expected = CEASE().fit(whole, items=items).score_baskets(contexts)
        np.testing.assert_allclose(scorer.score_baskets(contexts), expected, rtol=1e-5, atol=1e-6)

    def test_new_items_need_their_vectors(self) -> None:
        whole, items = baskets(90, n_items=60), vectors(60)
        scorer = CEASE().fit(whole[:80, :50], items=items[:50])
        with pytest.raises(ValueError, match="vectors of all"):
            scorer.update(whole[80:])
        scorer.update(whole[80:], items=items)
        anew = CEASE().fit(sparse.vstack([whole[:80].multiply(np.arange(60) < 50), whole[80:]]).tocsr(), items=items)
        np.testing.assert_allclose(scorer.score_users([85]), anew.score_users([85]), rtol=1e-5, atol=1e-6)

    def test_it_needs_items(self) -> None:
        with pytest.raises(ValueError, match="fit\\(history, items=vectors\\)"):
            CEASE().fit(baskets())


class TestTextCosine:
    items = np.array([[2, 0], [0, 3], [1, 1], [0, 0]], np.float32)

    @pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
    def test_mean_and_max_by_hand(self, form: Any) -> None:
        s = np.sqrt(0.5)
        history = rows([0, 0, 0, 0])
        mean = TextCosine().fit(history, items=form(self.items)).score_baskets(rows([1, 1, 0, 0], [1, 0, 0, 1]))
        np.testing.assert_allclose(mean, [[s, s, 1, NAN], [1, 0, s, NAN]], atol=1e-6)
        best = TextCosine("max").fit(history, items=form(self.items)).score_baskets(rows([1, 1, 0, 0], [1, 0, 0, 1]))
        np.testing.assert_allclose(best, [[1, 1, s, NAN], [1, 0, s, NAN]], atol=1e-6)

    @pytest.mark.parametrize("context", ["mean", "max"])
    def test_a_context_without_text_is_nan(self, context: Any) -> None:
        scorer = TextCosine(context).fit(rows([0, 0, 0, 1]), items=self.items)
        assert np.isnan(scorer.score_users([0])).all()
        assert np.isnan(scorer.score_baskets(rows([0, 0, 0, 0]))).all()

    def test_a_longer_vector_weighs_no_more(self) -> None:
        history, items = rows([1, 1, 0, 0]), self.items.copy()
        items[0] *= 100
        np.testing.assert_allclose(
            TextCosine().fit(history, items=items).score_users([0]),
            TextCosine().fit(history, items=self.items).score_users([0]),
        )

    def test_it_needs_vectors_for_all_items(self) -> None:
        with pytest.raises(ValueError, match="needs items"):
            TextCosine().fit(baskets())
        with pytest.raises(ValueError, match="vectors of all"):
            TextCosine().fit(baskets(), items=vectors()).update(baskets(2, n_items=30))


class TestWords:
    def test_tfidf_by_hand(self) -> None:
        # Terms: blue, "blue shirt", red, "red shirt", shirt. n = 2, so idf is ln(3/2) + 1 for df 1 and 1 for df 2.
        found = tfidf_vectors(["Red shirt", "BLUE  shirt"], longest=2)
        rare = np.log(1.5) + 1
        raw = np.array([[0, 0, rare, rare, 1], [rare, rare, 0, 0, 1]])
        np.testing.assert_allclose(found.toarray(), raw / np.sqrt(2 * rare**2 + 1), rtol=1e-6)
        assert found.dtype == np.float32

    def test_sublinear_damps_repetition(self) -> None:
        text = ["a a a b"]
        plain, damped = (Tfidf.fit(text, sublinear=on).vectors(text).toarray()[0] for on in (False, True))
        assert plain[0] / plain[1] == pytest.approx(3)
        assert damped[0] / damped[1] == pytest.approx(1 + np.log(3))

    def test_a_new_text_uses_the_fitted_terms(self) -> None:
        words = Tfidf.fit(["red shirt", "blue shoe"])
        found = words.vectors(["shirt, green", "unheard of", ""])
        assert found.shape == (3, len(words.terms))
        assert found[[0]].nnz == 1
        assert found[[1, 2]].nnz == 0

    def test_the_order_of_texts_does_not_change_the_terms(self) -> None:
        texts = ["red shirt", "blue shoe", "green hat"]
        assert Tfidf.fit(texts).terms == Tfidf.fit(texts[::-1]).terms

    def test_no_text_at_all_makes_no_terms(self) -> None:
        assert tfidf_vectors([]).shape == (0, 0)
        assert tfidf_vectors(["", "  "]).shape == (2, 0)


class TestFactors:
    @needs_implicit
    def test_als_solves_each_row_given_its_items(self) -> None:
        scorer = ALS(factors=4, alpha=3.0, regularization=0.1).fit(baskets(top=3))
        arrays, _ = scorer.state()
        items = arrays["items"].astype(float)
        context = baskets(1, seed=9, top=3)
        confidence = np.where(context.toarray()[0] > 0, 3.0 * context.toarray()[0], 1)
        wanted = (context.toarray()[0] > 0).astype(float)
        normal = items.T @ (confidence[:, None] * items) + 0.1 * np.eye(4)
        expected = items @ np.linalg.solve(normal, items.T @ (confidence * wanted))
        np.testing.assert_allclose(scorer.score_baskets(context)[0], expected, rtol=1e-3, atol=1e-4)

    @needs_implicit
    def test_an_update_lets_als_score_new_items(self) -> None:
        whole = baskets(90, n_items=60)
        scorer = ALS(factors=8).fit(whole[:60, :50])
        assert scorer.update(whole[60:]).score_users([80]).shape == (1, 60)
        seen = np.asarray(whole[60:].sum(axis=0)).ravel()[50:] > 0
        assert (~np.isnan(scorer.score_users([80])[0, 50:]) == seen).all()

    def test_without_the_package_the_command_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "implicit", None)
        with pytest.raises(PeftComboError, match=r'pip install "peft-combo\[als\]"'):
            ALS().fit(baskets())


def test_a_saved_state_without_a_known_scorer_is_refused() -> None:
    with pytest.raises(ValueError, match="Popularity"):
        load_scorer({}, {"scorer": "Oracle"})


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (EASE, {"l2": 0}),
        (CEASE, {"alpha": -1.0}),
        (Popularity, {"half_life_days": 0}),
        (UserKNN, {"k": 0}),
        (UserKNN, {"feedback": "none"}),
        (ItemKNN, {"k": 0}),
        (ItemKNN, {"shrinkage": -1.0}),
        (ItemKNN, {"similarity": "dice"}),
        (Random, {"seed": -1}),
        (ALS, {"factors": 0}),
        (ALS, {"regularization": float("inf")}),
        (TextCosine, {"context": "median"}),
    ],
)
def test_hyperparameters_are_checked_when_given(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        kind(**options)


def test_a_large_sparse_history_is_fitted_in_seconds() -> None:
    rng = np.random.default_rng(0)
    n_rows, n_items, n_cells = 60_000, 8_000, 500_000
    items = np.minimum(rng.pareto(1.0, n_cells) * 40, n_items - 1).astype(int)
    history = sparse.csr_matrix((np.ones(n_cells), (rng.integers(0, n_rows, n_cells), items)), shape=(n_rows, n_items))
    start = time.perf_counter()
    for scorer in (Popularity(), ItemKNN(), UserKNN()):
        scorer.fit(history).score_baskets(history[:50])
    assert time.perf_counter() - start < 60
