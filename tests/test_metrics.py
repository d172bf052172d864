"""Ranks, ranking metrics, intervals and tests against answers worked by hand."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from peft_combo.metrics.ranking import midranks, per_query, ranking_metrics
from peft_combo.metrics.significance import bootstrap_interval, paired_permutation, standard_error

NAN = float("nan")


def scores(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_the_best_score_has_rank_one_and_the_worst_the_last() -> None:
    table = scores([0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1])
    assert midranks(table, [0, 1, 2]).tolist() == [1.0, 2.0, 3.0]


def test_ties_share_the_middle_of_their_places() -> None:
    # Places 2, 3 and 4 are shared by three items: rank 3. A constant row of 4: rank 2.5.
    table = scores([9, 5, 5, 5], [7, 7, 7, 7])
    assert midranks(table, [2, 0]).tolist() == [3.0, 2.5]


def test_nan_is_below_every_number_and_ties_with_nan() -> None:
    table = scores([NAN, 1.0, -np.inf, NAN], [NAN, NAN, NAN, NAN], [NAN, 0.0, -np.inf, NAN])
    # Row 0: two numbers above, two NaN share 3 and 4. Row 1: all share 1..4. Row 2: -inf is second, above both NaN.
    assert midranks(table, [0, 3, 2]).tolist() == [3.5, 2.5, 2.0]


def test_excluded_items_never_count_whether_better_equal_or_nan() -> None:
    table = scores([9, 5, 5, 1, NAN], [9, 5, 5, NAN, NAN])
    lists = [np.array([0, 1, 1]), np.array([0, 3])]
    # Row 0: target 2 keeps only 1 and NaN below it. Row 1: target 4 (NaN) has 5, 5 above and no NaN beside it.
    expected = [1.0, 3.0]
    mask = np.zeros((2, 5), bool)
    mask[0, [0, 1]] = mask[1, [0, 3]] = True
    assert midranks(table, [2, 4], lists).tolist() == expected
    assert midranks(table, [2, 4], mask).tolist() == expected
    assert midranks(table, [2, 4], sparse.csr_matrix(mask)).tolist() == expected
    assert midranks(table, [2, 4], sparse.csr_array(mask.astype(np.float32))).tolist() == expected


def test_a_stored_zero_in_a_sparse_exclusion_excludes_nothing() -> None:
    stored = sparse.csr_array((np.array([0.0]), np.array([0]), np.array([0, 1])), shape=(1, 2))
    assert midranks(scores([9, 5]), [1], stored).tolist() == [2.0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranks_agree_with_sorting(data: st.DataObject) -> None:
    n_items = data.draw(st.integers(2, 8))
    row = data.draw(
        st.lists(st.sampled_from([0.0, 1.0, 2.0, -np.inf, np.inf, NAN]), min_size=n_items, max_size=n_items)
    )
    target = data.draw(st.integers(0, n_items - 1))
    context = data.draw(st.sets(st.integers(0, n_items - 1).filter(lambda item: item != target)))
    key = [(-2, 0.0) if value != value else (0, value) for value in row]
    left = [key[item] for item in range(n_items) if item not in context]
    places = [place for place, value in enumerate(sorted(left, reverse=True), start=1) if value == key[target]]
    found = midranks(scores(row), [target], [np.array(sorted(context), np.int64)])
    assert found.tolist() == [(places[0] + places[-1]) / 2]


def test_a_thousand_queries_over_five_thousand_items_take_well_under_a_second() -> None:
    rng = np.random.default_rng(0)
    table = rng.random((1000, 5000), np.float32)
    context = [rng.choice(2500, 5, replace=False) for _ in range(1000)]
    start = time.perf_counter()
    midranks(table, np.full(1000, 4000), context)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("targets", "excluded", "message"),
    [
        ([0], None, r"targets must be \(2,\)"),
        ([0, 3], None, r"targets must lie in 0\.\.2"),
        ([0, -1], None, "targets must lie in"),
        ([0.0, 1.0], None, "whole numbers"),
        ([0, 1], [np.array([1])], "2 index arrays"),
        ([0, 1], [np.array([1]), np.array([9])], "excluded must lie in"),
        ([0, 1], [np.array([1]), np.array([1])], "target of query 1"),
        ([0, 1], np.zeros((1, 3), bool), "like scores"),
    ],
)
def test_what_does_not_fit_is_refused(targets: list[int], excluded: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        midranks(np.zeros((2, 3), np.float32), targets, excluded)  # type: ignore[arg-type]


def test_metrics_of_hand_worked_ranks() -> None:
    ranks = [1.0, 1.5, 3.0, 10.0, 10.5, 40.0]
    found = ranking_metrics(ranks)
    assert list(found) == ["r@1", "r@5", "r@10", "r@20", "ndcg@10", "mrr"]
    assert found["r@1"] == pytest.approx(1 / 6)
    assert found["r@5"] == pytest.approx(3 / 6)
    assert found["r@10"] == pytest.approx(4 / 6)
    assert found["r@20"] == pytest.approx(5 / 6)
    # 1/log2(2) + 1/log2(2.5) + 1/log2(4) + 1/log2(11) = 1 + .756471 + .5 + .289065
    assert found["ndcg@10"] == pytest.approx((1 + 0.756471 + 0.5 + 0.289065) / 6, abs=1e-6)
    assert found["mrr"] == pytest.approx((1 + 2 / 3 + 1 / 3 + 0.1 + 1 / 10.5 + 1 / 40) / 6)


def test_hit_rate_is_recall_where_there_is_one_right_answer() -> None:
    assert per_query([1, 5, 6], "hr@5").tolist() == per_query([1, 5, 6], "r@5").tolist() == [1, 1, 0]


@pytest.mark.parametrize("name", ["r@0", "ndcg", "mrr@10", "R@5", "r@", ""])
def test_an_unknown_metric_is_named_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="Known: r@k"):
        per_query([1.0], name)


@pytest.mark.parametrize("ranks", [[0.5], [NAN], [[1.0]]])
def test_ranks_that_are_none_are_refused(ranks: list[float]) -> None:
    with pytest.raises(ValueError, match="ranks must be"):
        per_query(ranks, "mrr")


def test_no_query_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no query"):
        ranking_metrics([])


def test_one_cluster_leaves_nothing_to_resample() -> None:
    assert bootstrap_interval([0.0, 1.0, 1.0], ["u", "u", "u"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_the_interval_of_single_queries_is_the_normal_one() -> None:
    values = np.random.default_rng(1).integers(0, 2, 2000).astype(float)
    low, high = bootstrap_interval(values, np.arange(2000), n=4000)
    half_width = 1.96 * values.std() / np.sqrt(2000)
    assert (low, high) == (
        pytest.approx(values.mean() - half_width, abs=0.002),
        pytest.approx(values.mean() + half_width, abs=0.002),
    )


def test_clusters_of_copies_widen_the_interval_as_if_each_were_one_query() -> None:
    single = np.random.default_rng(2).integers(0, 2, 300).astype(float)
    alone = bootstrap_interval(single, np.arange(300), seed=5)
    copied = bootstrap_interval(np.repeat(single, 9), np.repeat(np.arange(300), 9), seed=5)
    assert copied == pytest.approx(alone)


def test_the_error_of_a_mean_counts_clusters() -> None:
    # Of single queries it is s / sqrt(n) with n - 1 below the root; copies of each add nothing to what is known.
    single = np.random.default_rng(4).normal(size=50)
    alone = standard_error(single, np.arange(50))
    assert alone == pytest.approx(single.std(ddof=1) / np.sqrt(50))
    assert standard_error(np.repeat(single, 9), np.repeat(np.arange(50), 9)) == pytest.approx(alone)
    assert standard_error([0.0, 1.0], [3, 3]) == np.inf


def test_the_interval_follows_its_seed() -> None:
    values, clusters = [0.0, 1.0, 0.5, 0.2], [1, 1, 2, 3]
    assert bootstrap_interval(values, clusters, seed=3) == bootstrap_interval(values, clusters, seed=3)


def test_two_clusters_enumerate_by_hand() -> None:
    # Cluster sums of a - b are 2 and 1: |+-2 +-1| >= 3 for two of the four sign patterns, so p tends to 1/2.
    p = paired_permutation([1, 1, 1], [0, 0, 0], [7, 7, 8], n=20_000)
    assert p == pytest.approx(0.5, abs=0.02)


def test_no_difference_has_p_one_and_a_plain_one_the_smallest_p() -> None:
    ones, zeros, clusters = np.ones(40), np.zeros(40), np.arange(40)
    assert paired_permutation(ones, ones, clusters, n=99) == 1.0
    assert paired_permutation(ones, zeros, clusters, n=99) == pytest.approx(1 / 100)


def test_copies_inside_a_cluster_are_no_evidence() -> None:
    p = paired_permutation(np.ones(1000), np.zeros(1000), np.zeros(1000, int), n=200)
    assert p == 1.0  # one cluster: either sign is as extreme as what was seen


def test_p_is_symmetric() -> None:
    rng = np.random.default_rng(3)
    a, b, clusters = rng.random(50), rng.random(50), rng.integers(0, 20, 50)
    assert paired_permutation(a, b, clusters) == paired_permutation(b, a, clusters)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_interval([1.0], [1, 2]),
        lambda: bootstrap_interval([], []),
        lambda: bootstrap_interval([NAN], [1]),
        lambda: bootstrap_interval([1.0], [1], level=1.0),
        lambda: bootstrap_interval([1.0], [1], n=0),
        lambda: standard_error([1.0], [1, 2]),
        lambda: paired_permutation([1.0], [1.0, 2.0], [1]),
        lambda: paired_permutation([1.0], [2.0], [1], n=0),
    ],
)
def test_statistics_refuse_what_they_cannot_average(call: object) -> None:
    with pytest.raises(ValueError, match="must"):
        call()  # type: ignore[operator]
