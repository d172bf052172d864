"""Adapters of single categories: who is at home where, and one scale for all."""

from __future__ import annotations

import json

import numpy as np
import pytest

from peft_combo import metrics
from peft_combo.data.model import Catalog
from peft_combo.errors import DataError
from peft_combo.recommender.category_calibration import Calibration, CategoryCoverage

CATALOG = Catalog.build(
    [f"i{n}" for n in range(6)],
    ["title"] * 6,
    categories=[("A", "Men"), ("A", "Men", "Shoes"), ("A", "Women"), ("A",), ("B",), ()],
)


def narrowed(path: str | None = None, departments: tuple[str, ...] = ()) -> dict[str, object]:
    return {"data": {"category_filter": path, "departments": list(departments)}}


def test_the_longest_path_has_the_item() -> None:
    coverage = CategoryCoverage.of(
        CATALOG,
        {"all": narrowed(), "men": narrowed("a > men"), "shoes": narrowed("A > Men > Shoes"), "b": narrowed("B")},
    )
    assert coverage is not None
    assert coverage.members == ("men", "shoes", "b")
    assert coverage.shared == "all"
    assert coverage.of_item.tolist() == [0, 1, -1, -1, 2, -1]


def test_departments_are_categories_too() -> None:
    coverage = CategoryCoverage.of(CATALOG, {"both": narrowed(departments=("A", "B"))})
    assert coverage is not None
    assert coverage.shared is None
    assert coverage.of_item.tolist() == [0, 0, 0, 0, 0, -1]


def test_adapters_of_everything_need_no_areas() -> None:
    assert CategoryCoverage.of(CATALOG, {"one": narrowed(), "two": {}}) is None
    assert CategoryCoverage.of(CATALOG, {}) is None


@pytest.mark.parametrize(
    ("recipes", "expected"),
    [
        ({"one": narrowed(), "two": narrowed(), "b": narrowed("B")}, "one and two were both tuned on all"),
        ({"hats": narrowed("A > Hats")}, 'hats is for "a > hats", but no item'),
    ],
)
def test_adapters_that_do_not_go_together_are_refused(recipes: dict[str, dict[str, object]], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        CategoryCoverage.of(CATALOG, recipes)


def test_crossing_answers_are_of_an_area_the_context_lacks() -> None:
    coverage = CategoryCoverage(("a", "b"), None, np.array([0, 0, 1, -1]))
    contexts = np.array([[0, -1], [0, 2], [0, -1], [3, -1], [3, -1]])
    targets = np.array([1, 1, 2, 3, 2])
    assert coverage.find_crossing(np.where(contexts == targets[:, None], -1, contexts), targets).tolist() == [
        False, False, True, True, True,
    ]  # fmt: skip


def two_scales(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], CategoryCoverage, np.ndarray, np.ndarray]:
    """Each of two adapters knows its half of 40 items perfectly well, but one of them shouts: scale 50, offset 900."""
    coverage = CategoryCoverage(("quiet", "loud"), None, np.repeat([0, 1], 20))
    targets = rng.integers(40, size=300)
    truth = rng.normal(size=(300, 40))
    truth[np.arange(300), targets] += 3.0
    scores = {"quiet": truth.astype(np.float32), "loud": (50 * truth + 900).astype(np.float32)}
    contexts = ((targets + 1) % 40)[:, None]
    return scores, coverage, targets, contexts


def test_scores_on_different_scales_become_comparable() -> None:
    rng = np.random.default_rng(0)
    scores, coverage, targets, contexts = two_scales(rng)
    clusters = np.arange(300).astype(str)
    calibration, crossed = Calibration.fit(scores, coverage, targets, contexts, clusters)

    naive = np.where(coverage.of_item == 0, scores["quiet"], scores["loud"])
    excluded = [np.array(row) for row in contexts]
    best = metrics.per_query(metrics.midranks(scores["quiet"], targets, excluded), "ndcg@10").mean()
    told = metrics.per_query(metrics.midranks(crossed, targets, excluded), "ndcg@10").mean()
    raw = metrics.per_query(metrics.midranks(naive, targets, excluded), "ndcg@10").mean()
    assert raw < 0.6 * best
    assert told > 0.98 * best
    # After scaling, both halves are the same scores: so are the numbers fitted for them, up to the noise of 300.
    assert calibration.own["loud"] == pytest.approx(calibration.own["quiet"], rel=0.25)
    assert np.isfinite(crossed).all()


def test_combination_is_the_formula() -> None:
    coverage = CategoryCoverage(("a",), "all", np.array([0, 0, -1]))
    calibration = Calibration({"a": (1.0, 2.0), "all": (0.0, 1.0)}, {"a": 3.0}, {"a": 0.5, "": 2.0}, {"a": 0.25})
    scores = {"a": np.array([[5, 1, 9]], np.float32), "all": np.array([[2, 4, 6]], np.float32)}
    # a: (5-1)/2 = 2 -> 3*2 + .5*2 + .25; (1-1)/2 = 0 -> .5*4 + .25; elsewhere 2*6.
    assert calibration.combine(scores, coverage).tolist() == [[7.25, 2.25, 12.0]]
    alone = CategoryCoverage(("a",), None, np.array([0, 0, -1]))
    silent = calibration.combine({"a": scores["a"]}, alone)
    assert silent[0, :2].tolist() == [6.25, 0.25]
    assert np.isnan(silent[0, 2])


def test_a_calibration_survives_json() -> None:
    scores, coverage, targets, contexts = two_scales(np.random.default_rng(1))
    calibration, _ = Calibration.fit(scores, coverage, targets, contexts, np.arange(300).astype(str))
    again = Calibration.from_state(json.loads(json.dumps(calibration.state())))
    assert again == calibration
    assert np.array_equal(again.combine(scores, coverage), calibration.combine(scores, coverage))


def test_no_question_is_judged_by_a_calibration_that_saw_its_cluster() -> None:
    """With one cluster there is nothing else to learn from; with two, each half is judged by the other's fit."""
    scores, coverage, targets, contexts = two_scales(np.random.default_rng(2))
    clusters = np.repeat(["x", "y"], 150)
    _, crossed = Calibration.fit(scores, coverage, targets, contexts, clusters)
    swapped = targets.copy()
    swapped[:150] = (targets[:150] + 7) % 40  # other answers for x alone
    _, again = Calibration.fit(scores, coverage, swapped, np.full_like(contexts, -1), clusters)
    _, before = Calibration.fit(scores, coverage, targets, np.full_like(contexts, -1), clusters)
    assert not np.allclose(again[150:], before[150:])  # y is judged by x's fit, which changed
    assert crossed.shape == (300, 40)
