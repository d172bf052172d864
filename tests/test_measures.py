"""Entities, F1, calibration and their tests, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from peft_combo.data.labels.tags import entities
from peft_combo.metrics import classification as measures
from peft_combo.tuning.tasks.tagging import count_entities


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", []),
        ("B-Clo I-Clo O B-Acc", [("Clo", 0, 2), ("Acc", 3, 4)]),
        ("B-Clo B-Clo", [("Clo", 0, 1), ("Clo", 1, 2)]),
        ("B-Clo I-Acc", [("Clo", 0, 1), ("Acc", 1, 2)]),  # another type cannot go on
        ("O I-Clo I-Clo", [("Clo", 1, 3)]),  # no beginning: it begins there
        ("I-Clo B-Clo I-Clo", [("Clo", 0, 1), ("Clo", 1, 3)]),
        ("B-Shoe O I-Shoe", [("Shoe", 0, 1), ("Shoe", 2, 3)]),
        ("B-per-son I-per-son", [("per-son", 0, 2)]),
    ],
)
def test_entities_of_a_tag_sequence(tags: str, found: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == found


def counts(gold: list[str], said: list[str], types: tuple[str, ...] = ("Acc", "Clo")) -> measures.Counts:
    return count_entities([tuple(tags.split()) for tags in gold], [tuple(tags.split()) for tags in said], types)


def test_half_an_entity_is_none_though_most_tokens_are_right() -> None:
    sums = measures.totals(counts(["B-Clo I-Clo O O"], ["B-Clo O O O"]))  # three tokens of four agree
    assert measures.f1_values(sums) == {"precision": 0, "recall": 0, "f1": 0, "macro_f1": 0}


def test_entity_f1_of_a_worked_case() -> None:
    own = counts(
        ["B-Clo I-Clo O", "B-Acc O B-Clo", "O O O"],
        ["B-Clo I-Clo O", "B-Acc O B-Acc", "O B-Clo O"],
    )
    # Clo: right 1, given 2, wanted 2. Acc: right 1, given 2, wanted 1.
    assert measures.totals(own).tolist() == [[1, 2, 1], [1, 2, 2]]
    values = measures.f1_values(measures.totals(own))
    assert values["precision"] == 2 / 4
    assert values["recall"] == 2 / 3
    assert values["f1"] == pytest.approx(4 / 7)
    assert values["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_a_class_that_nobody_wanted_or_gave_is_no_class() -> None:
    sums = np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert measures.macro_f1(sums) == 1
    assert measures.macro_f1(np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])) == 0.5  # given in vain counts


def test_calibration_error_of_a_worked_case() -> None:
    # One bin holds 0.6 and 0.62 (mean 0.61, one of two right), another 0.95 (right).
    error = measures.calibration_error(np.array([0.61, 0.63, 0.95]), np.array([True, False, True]))
    assert error == pytest.approx((2 * abs(0.62 - 0.5) + 1 * abs(0.95 - 1)) / 3)
    assert measures.calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


def single(rights: list[int]) -> measures.Counts:
    return measures.class_counts([[(0, right, 1, 1)] for right in rights], 1)


def test_an_interval_is_that_of_the_share() -> None:
    assert measures.interval(single([1] * 50), measures.micro_f1) == (1, 1)
    low, high = measures.interval(single([1] * 50 + [0] * 50), measures.micro_f1)
    # The binomial: 0.5 +- 1.96 * sqrt(0.25 / 100).
    assert low == pytest.approx(0.402, abs=0.02)
    assert high == pytest.approx(0.598, abs=0.02)


def test_the_interval_of_a_gain_draws_both_sides_alike() -> None:
    # Every text is one better on the right side: whatever is drawn, the gain is that.
    assert measures.gain_interval(single([0] * 30), single([1] * 30), measures.micro_f1) == (1, 1)


def test_the_paired_test_of_worked_cases() -> None:
    same = single([1, 0, 1, 0])
    assert measures.permute_pairs(same, same, measures.micro_f1, n=99) == 1
    # Three texts, all better: of the 8 exchanges 2 are as extreme, so p is near 1 / 4.
    p = measures.permute_pairs(single([0] * 3), single([1] * 3), measures.micro_f1)
    assert p == pytest.approx(0.25, abs=0.02)
    assert measures.permute_pairs(single([0] * 20), single([1] * 20), measures.micro_f1) < 0.001
    # One of a hundred: exchanging it or not gives the same difference.
    assert measures.permute_pairs(single([1] * 100), single([1] * 99 + [0]), measures.micro_f1) == 1


def test_counts_lie_class_by_class() -> None:
    made = measures.class_counts([[(1, 2, 3, 4)], []], 2)
    assert isinstance(made, sparse.csr_array)
    assert made.toarray().tolist() == [[0, 0, 0, 2, 3, 4], [0] * 6]
