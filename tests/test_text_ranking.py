"""The text ranker: views by hand, columns by brute force, and what it learns and must not learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from peft_combo import metrics
from peft_combo.data import demo_dataset, split
from peft_combo.data.model import Catalog
from peft_combo.data.queries import Queries
from peft_combo.evaluation.measures import rank_among
from peft_combo.recommender.fit_data import FitData
from peft_combo.recommender.text_ranking import TextRanker, TextViews
from peft_combo.recommender.text_ranking.columns import gather, name_columns
from peft_combo.recommender.text_ranking.views import Crowding, SparseViews, _join
from peft_combo.scoring.whitening import half_whiten

WORDS = ["red", "blue", "linen", "wool", "silk", "navy"]
THINGS = ["shirt", "dress", "hat", "belt", "shoes", "scarf"]
CATALOG = Catalog.build(
    [f"i{n}" for n in range(36)],
    [f"{word} {thing}" for word in WORDS for thing in THINGS],
    [("Clothing", thing) for _ in WORDS for thing in THINGS],
)
# Bundles are of one colour or cloth: the first word says it all.
BUNDLES = [np.array([6 * word + place for place in (first, first + 1, first + 2)], np.int32)
           for word in range(6) for first in range(4)]  # fmt: skip


def vectors(rows: int = 36, size: int = 8) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    drawn = np.random.default_rng(0).normal(size=(rows, size)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def views() -> TextViews:
    return TextViews.of(CATALOG, "{title}", vectors())


def questions(bundles: list[np.ndarray[tuple[int], np.dtype[np.int32]]]) -> Queries:
    return Queries.leave_one_out(bundles, [f"u{place}" for place in range(len(bundles))])


def test_pairs_of_sparse_views_are_dot_products() -> None:
    rng = np.random.default_rng(1)
    options = {"density": 0.3, "rng": rng, "dtype": np.float32, "format": "csr"}
    made = [(f"v{n}", *(sparse.random_array((20, 7), **options) for _ in "qt")) for n in range(3)]
    found = SparseViews.build(made).pairs(np.array([3, 5]), np.array([0, 19, 7]))
    for place, (_, query, target) in enumerate(made):
        expected = (query @ target.T).toarray()[[3, 5]][:, [0, 19, 7]]
        np.testing.assert_allclose(found[place], expected, atol=1e-6)


def test_half_whitening_evens_out_the_components() -> None:
    """A component of deviation s has deviation s^(1/2) before rows are scaled: 16 to 1 becomes 4 to 1."""
    rng = np.random.default_rng(2)
    drawn = (rng.normal(size=(5000, 2)) * [16.0, 1.0]).astype(np.float32)
    found = half_whiten(np.hstack([drawn, np.full((5000, 1), 3.0, np.float32)]))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    ratio = np.abs(found @ np.linalg.svd(found.T @ found)[0][:, :2])
    assert np.median(ratio[:, 0] / ratio[:, 1]) == pytest.approx(
        4 * np.median(np.abs(drawn[:, 0] / drawn[:, 1])) / 16, rel=0.1
    )


def test_dense_views_are_joined_by_their_principal_components() -> None:
    """The joint view's likenesses are those of all views side by side, up to the components that are left out."""
    rng = np.random.default_rng(4)
    parts = [rng.normal(size=(300, width)).astype(np.float32) for width in (5, 40)]
    beside = np.hstack(parts) - np.hstack(parts).mean(axis=0)
    beside /= np.linalg.norm(beside, axis=1, keepdims=True)
    joint = _join(parts)
    np.testing.assert_allclose(joint @ joint.T, beside @ beside.T, atol=1e-4)


def test_a_place_in_its_own_list_counts_closer_items() -> None:
    alike = np.array(
        [[1.0, 0.9, 0.2, 0.5], [0.9, 1.0, 0.7, 0.1], [0.2, 0.7, 1.0, 0.6], [0.5, 0.1, 0.6, 1.0]], np.float32
    )
    crowd = Crowding.measure(iter([(slice(0, 4), alike.copy())]), 4, np.arange(4))
    # Beside item 0: item 1 has nobody closer than 0, item 2 has 1 and 3 closer, item 3 has 2 closer.
    found = crowd.reverse_ranks(alike[[0]][:, [1, 2, 3]], np.array([1, 2, 3]))
    np.testing.assert_allclose(np.expm1(found), [[0, 2, 1]], atol=1e-5)
    np.testing.assert_allclose(crowd.hubness[0, 0], np.mean([-1, 0.9, 0.5, 0.2]), atol=1e-3)


def test_candidates_leave_the_context_out_and_every_column_has_a_name(views: TextViews) -> None:
    context = np.array([0, 7])
    found = gather(views, context)
    assert not np.isin(context, found.rows).any()
    assert found.columns.shape == (len(found.rows), len(name_columns(views)))
    assert np.isfinite(found.columns).all()
    assert np.isneginf(found.base[context]).all()


def test_columns_are_what_their_names_say(views: TextViews) -> None:
    found = gather(views, np.array([0, 8]))  # red shirt, blue hat
    names = name_columns(views)
    row = int(np.flatnonzero(found.rows == 2)[0])  # red hat
    said = dict(zip(names, found.columns[row], strict=True))
    assert said["leaf, best"] == 1
    assert said["leaf, mean"] == 0.5
    assert said["category path, mean"] == pytest.approx(1.5)
    assert said["kinship, best"] == pytest.approx(1)
    assert said["kinship, least"] == pytest.approx(0.5)
    assert said["first word, best"] == pytest.approx(1 / np.log2(7))
    assert said["rarest shared word, best"] == pytest.approx(np.log(6))
    assert said["length of the title"] == 2
    assert said["BM25, best"] == pytest.approx(0.5, abs=0.01)


def test_it_learns_what_bundles_have_in_common(views: TextViews) -> None:
    """Bundles of the last two words were never seen, nor was any of their items."""
    ranker = TextRanker.fit(views, questions(BUNDLES[:16]))
    held = questions(BUNDLES[16:])
    ranks = metrics.midranks(ranker(held), held.targets, held.excluded())
    assert metrics.per_query(ranks, "r@5").mean() > 0.95
    told = ranker.explain(np.array([24, 25]), [26, 30])
    reason = next(iter(told[26]))
    assert told[26][reason] > 0
    assert reason in ("same first words (brand)", "titles share 'silk'")


def test_answers_are_those_of_the_state(views: TextViews) -> None:
    ranker = TextRanker.fit(views, questions(BUNDLES[:16]))
    arrays, values = ranker.state()
    held = questions(BUNDLES[16:])
    np.testing.assert_array_equal(TextRanker.from_state(views, arrays, values)(held), ranker(held))
    with pytest.raises(ValueError, match="'smell, mean', which is not known here"):
        TextRanker.from_state(views, arrays, {**values, "columns": [*values["columns"][:-1], "smell, mean"]})
    with pytest.raises(ValueError, match="1 columns, found"):
        TextRanker.from_state(views, arrays, {**values, "columns": values["columns"][:1]})


def test_an_empty_context_says_nothing(views: TextViews) -> None:
    ranker = TextRanker.fit(views, questions(BUNDLES[:16]))
    asked = Queries(np.array([[-1], [3]]), np.zeros(2, np.int64), np.array(["", ""]), np.zeros(2, np.int64))
    scores = ranker(asked)
    assert np.isnan(scores[0]).all()
    assert np.isfinite(scores[1]).all()


def test_no_question_can_be_answered() -> None:
    views = TextViews.of(CATALOG.take(np.arange(2)), "{title}", None)
    with pytest.raises(ValueError, match="no training question has its answer among the candidates"):
        TextRanker.fit(views, questions([np.array([0], np.int32)]))


@pytest.mark.parametrize("titles", [["x"] * 3, ["", "", "a"], ["...", "!", "?"]])
def test_catalogues_with_next_to_no_text(titles: list[str]) -> None:
    views = TextViews.of(Catalog.build(["a", "b", "c"], titles, [()] * 3), "{title}", None)
    found = gather(views, np.array([0]))
    assert np.isfinite(found.columns).all()


def test_no_column_reads_support() -> None:
    """The demo with other bundles: views, candidates and columns are the same to the last bit."""
    demo, parts = demo_dataset(), split(demo_dataset(), "user")
    some = FitData.of(demo, parts.train[:50], None, None, {})
    every = FitData.of(demo, None, None, None, {})
    context = demo.bundles.items[parts.test[0]][:2].astype(np.int64)
    one, other = gather(some.text_views, context), gather(every.text_views, context)
    np.testing.assert_array_equal(one.rows, other.rows)
    np.testing.assert_array_equal(one.columns, other.columns)


def test_shuffled_texts_leave_it_at_chance() -> None:
    """With each item given another's text and category, R@10 on test bundles falls to that of a blind guess."""
    demo = demo_dataset()
    parts = split(demo, "user")
    order = np.random.default_rng(0).permutation(len(demo.catalog))
    found = {}
    for name, catalog in (("right", demo.catalog), ("shuffled", demo.catalog.take(order))):
        known = FitData.of(replace(demo, catalog=catalog), parts.train, None, None, {})
        ranker = TextRanker.fit(known.text_views, known.questions)
        asked = Queries.of(demo.bundles, parts.test)
        ranks = metrics.midranks(ranker(asked), asked.targets, asked.excluded())
        found[name] = float(metrics.per_query(ranks, "r@10").mean())
    assert found["right"] > 0.08
    assert found["shuffled"] < 0.03  # 10 of about 996 candidates are .010


def test_knowing_which_items_are_warm_gains_nothing_among_cold_items() -> None:
    """Scores that put every cold item first lift cold targets, and not at all where cold items alone are candidates."""
    rng = np.random.default_rng(0)
    support = np.array([1] * 60 + [0] * 40)
    targets = np.tile(np.arange(60, 100), 25)
    asked = Queries(np.full((1000, 1), 0), targets, np.arange(1000).astype(str), np.arange(1000))
    skill = rng.normal(size=(1000, 100)).astype(np.float32)
    cheat = skill + 100 * (support == 0).astype(np.float32)
    every = [metrics.midranks(one, targets, asked.excluded()).mean() for one in (skill, cheat)]
    assert every[1] < 0.6 * every[0]
    among = [rank_among(one, asked, support == 0, support == 0) for one in (skill, cheat)]
    np.testing.assert_array_equal(*among)
    assert among[0].mean() == pytest.approx(20.5, abs=1.5)  # 40 candidates and no skill


def test_ranks_among_cold_items_by_hand() -> None:
    scores = np.array([[9.0, 1.0, 3.0, 2.0, 5.0], [0.0, 4.0, 3.0, 2.0, 1.0]], np.float32)
    asked = Queries(np.array([[4], [2]]), np.array([2, 0]), np.array(["u", "v"]), np.array([0, 1]))
    cold = np.array([False, True, True, True, True])
    # Item 2 is above 1 and 3, and the context item 4 is no candidate; the second target is warm.
    np.testing.assert_array_equal(rank_among(scores, asked, cold, cold), [1, np.nan])


def test_ranks_among_distractors_by_hand() -> None:
    scores = np.array([[9.0, 1.0, 3.0, 2.0, 5.0], [0.0, 4.0, 3.0, 2.0, 0.0]], np.float32)
    asked = Queries(np.array([[4, 2], [2, -1]]), np.array([0, 3]), np.array(["u", "v"]), np.array([0, 1]))
    unbundled = np.array([False, True, False, True, False])
    # 0 is above 1 and 3, though it is none of them; 3 is one of them, below 1.
    np.testing.assert_array_equal(rank_among(scores, asked, np.ones(5, bool), unbundled), [1, 2])
