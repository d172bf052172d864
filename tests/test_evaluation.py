"""The evaluation on a shop whose answers are known: nothing held out is learned, and shuffled titles tell nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from peft_combo.data import Dataset, Split, open_dataset, split
from peft_combo.evaluation import canary, evaluate
from peft_combo.recipe import Recipe
from peft_combo.scoring import Popularity


@pytest.fixture
def dataset(tiny_recipe: Callable[..., Recipe]) -> Dataset:
    return open_dataset(tiny_recipe().data)


@pytest.fixture
def parts(dataset: Dataset) -> Split:
    return split(dataset)


class Spy(Popularity):
    """Remembers what it was fitted on."""

    seen: list[Any] = []  # noqa: RUF012  (shared on purpose: the evaluation may copy the scorer)

    def fit(self, history: Any, **options: Any) -> Any:
        Spy.seen.append(history)
        return super().fit(history, **options)


def test_scorers_see_training_bundles_and_nothing_else(dataset: Dataset, parts: Split) -> None:
    Spy.seen.clear()
    evaluate(dataset, parts, also={"spy": Spy()})
    train = dataset.bundles.to_csr(len(dataset.catalog), parts.train).toarray()
    assert Spy.seen
    for history in Spy.seen:
        np.testing.assert_array_equal(history.toarray(), train)


def test_test_bundles_are_measured_and_choose_nothing(dataset: Dataset, parts: Split) -> None:
    report = evaluate(dataset, parts)
    items = list(dataset.bundles.items)
    for row in parts.test:
        items[row] = np.array([0, 1, 2], np.int32)
    changed = evaluate(replace(dataset, bundles=replace(dataset.bundles, items=tuple(items))), parts)
    assert changed.fusion.state() == report.fusion.state()
    assert [(row.name, row.setting, row.valid_ndcg) for row in changed.lines] == [
        (row.name, row.setting, row.valid_ndcg) for row in report.lines
    ]
    assert changed.row("item-kNN").values != report.row("item-kNN").values


def test_rows_slices_and_intervals_hang_together(dataset: Dataset, parts: Split) -> None:
    report = evaluate(dataset, parts)
    assert {"random", "popularity", "item-kNN", "EASE", "TF-IDF title", "CEASE-TFIDF", "fusion"} <= {
        row.name for row in report.lines
    }
    for row in report.lines:
        low, high = row.intervals["ndcg@10"]
        assert low <= row.values["ndcg@10"] <= high
        warm, cold = row.slices.get("warm target"), row.slices.get("cold target")
        if warm is not None and cold is not None and warm.questions + cold.questions == report.counts["test questions"]:
            whole = (warm.ndcg * warm.questions + cold.ndcg * cold.questions) / report.counts["test questions"]
            assert whole == pytest.approx(row.values["ndcg@10"], abs=1e-9)
    # Items of one style go together and a style shows in the titles: words must beat chance by far.
    assert report.row("TF-IDF title").values["ndcg@10"] > 3 * report.row("random").values["ndcg@10"]


def test_the_same_seed_gives_the_same_report(dataset: Dataset, parts: Split) -> None:
    assert evaluate(dataset, parts, seed=3).to_json() == evaluate(dataset, parts, seed=3).to_json()


def test_shuffled_titles_tell_nothing(dataset: Dataset, parts: Split) -> None:
    found = canary(dataset, parts)
    assert found.alive
    assert found.right["TF-IDF title"] > 2 * found.chance
