"""The comparison of whole bundles: measured by hand, on the test bundles alone, and with nothing of them learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from peft_combo.data.model import Dataset
from peft_combo.data.queries import Queries
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import Split, split
from peft_combo.encoder.heads.completion import BundleHead, CompletionHead, project_targets, score_completion
from peft_combo.encoder.heads.sequence import SequenceHead
from peft_combo.evaluation.completion import evaluate
from peft_combo.evaluation.composition import _measure_bundles, _take_top
from peft_combo.evaluation.report import Report
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import BundleTask, SequenceTask
from peft_combo.recommender.composing.generation import Sizes, build_steps, generate
from peft_combo.recommender.composing.openings import Openings
from peft_combo.recommender.composing.slots import SlotTemplates

NAN = float("nan")


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    """Titles of the tiny shop as vectors that know their style: items of one style, and only they, are alike."""
    generator = torch.Generator().manual_seed(0)
    style = torch.eye(16)[torch.arange(60) % 6]
    return functional.normalize(style + 0.02 * torch.randn(60, 16, generator=generator), dim=-1).numpy()


@pytest.fixture
def dataset(tiny_recipe: Callable[..., Recipe]) -> Dataset:
    return open_dataset(tiny_recipe().data)


def heads() -> dict[str, CompletionHead]:
    sequence = SequenceHead(16, SequenceTask(width=8)).eval()
    with torch.no_grad():
        sequence.size_log_odds.copy_(torch.full((33,), -9.0))
        sequence.size_log_odds[3] = 9.0
    return {"set": BundleHead(16, BundleTask()).eval(), "seq": sequence}


def report_of(dataset: Dataset, parts: Split, vectors: NDArray[np.float32]) -> Report:
    tuned = {name: (vectors, head) for name, head in heads().items()}
    return evaluate(dataset, parts, frozen=vectors, tuned=tuned, compose=True)


def test_bundles_are_measured_by_what_they_share_with_the_wanted_one() -> None:
    wanted = (np.array([1, 2]),) * 7
    openings = Openings(np.zeros(7, np.int64), wanted, np.array(list("abcdefg")))
    # Half right, right, twice the same, the given one again, an unknown row, nothing, one too many.
    composed = [(1, 3), (2, 1), (1, 1), (0, 1), (1, 9), (), (1, 2, 3)]
    plane = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    told = _measure_bundles(composed, openings, plane, told=True)
    np.testing.assert_allclose(told["precision"], [0.5, 1, 0.5, 0.5, 0.5, 0, 2 / 3])
    np.testing.assert_allclose(told["recall"], [0.5, 1, 0.5, 0.5, 0.5, 0, 1])
    np.testing.assert_allclose(told["exact"], [0, 1, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(told["jaccard"], [1 / 3, 1, 1 / 2, 1 / 3, 1 / 3, 0, 2 / 3])
    np.testing.assert_allclose(told["valid"], [1, 1, 0, 0, 0, 0, 0])
    # Cosines of (0, 1, 3): 0, 0 and 1. Of (0, 2, 1): 1, 0 and 0. Of (0, 1, 2, 3): two of six.
    np.testing.assert_allclose(told["diversity"], [2 / 3, 2 / 3, 2 / 3, 2 / 3, NAN, NAN, 2 / 3], rtol=1e-6)
    open_ended = _measure_bundles(composed, openings, plane, told=False)
    np.testing.assert_allclose(open_ended["valid"], [1, 1, 0, 0, 0, 0, 1])


def test_one_item_of_each_bundle_is_told_and_the_seed_says_which() -> None:
    bundles = [np.array([row, row + 30, row + 60], np.int32) for row in range(30)]
    questions = Queries.leave_one_out(bundles, [f"u{row // 2}" for row in range(30)])
    openings = Openings.of(questions, seed=4)
    whole = [
        sorted([int(given), *wanted.tolist()]) for given, wanted in zip(openings.given, openings.wanted, strict=True)
    ]
    assert whole == [bundle.tolist() for bundle in bundles]
    assert openings.groups.tolist() == [f"u{row // 2}" for row in range(30)]
    assert {int(given) // 30 for given in openings.given} == {0, 1, 2}
    np.testing.assert_array_equal(openings.given, Openings.of(questions, seed=4).given)
    assert openings.given.tolist() != Openings.of(questions, seed=5).given.tolist()
    np.testing.assert_array_equal(openings.queries.contexts[:, 0], openings.given)


def test_a_list_takes_the_best_that_is_known_and_never_what_is_given() -> None:
    openings = Openings(np.array([0, 1]), (np.array([1, 2]), np.array([0])), np.array(["a", "b"]))
    scores = np.array([[9, 1, 3, 3], [NAN, 5, NAN, NAN]], np.float32)
    assert _take_top(openings, scores) == [(2, 3), ()]


def test_every_way_has_its_row_and_lists_are_the_best_completions(
    dataset: Dataset, vectors: NDArray[np.float32]
) -> None:
    parts = split(dataset)
    report = report_of(dataset, parts, vectors)
    found = report.composition
    assert found is not None
    assert [row.name for row in found.rows] == [
        "top-k, fusion", "composer, fusion", "top-k, tuned BERT set", "composer, tuned BERT set",
        "top-k, tuned BERT seq", "composer, tuned BERT seq", "beam, tuned BERT set", "beam, tuned BERT seq",
        "beam to its end, tuned BERT seq",
    ]  # fmt: skip
    assert found.bundles == len(parts.test)
    for row in found.rows:
        assert row.values["valid"] == 1
        low, high = row.intervals["recall"]
        assert low <= row.values["recall"] <= high
        assert (row.p is None) == (row.name == "composer, fusion")
        if "its end" not in row.name:
            assert row.values["precision"] == pytest.approx(row.values["recall"])

    openings = Openings.of(Queries.of(dataset.bundles, parts.test), seed=0)
    head = heads()["set"]
    scores = score_completion(head, vectors, project_targets(head, vectors), openings.given[:, None])
    np.put_along_axis(scores, openings.given[:, None], -2, axis=1)
    best = [np.argsort(-own)[: len(wanted)] for own, wanted in zip(scores, openings.wanted, strict=True)]
    hits = [np.isin(wanted, own).mean() for own, wanted in zip(best, openings.wanted, strict=True)]
    assert found.row("top-k, tuned BERT set").values["recall"] == pytest.approx(np.mean(hits))
    # Untrained, both heads are the same cosine. The one that knows an end stops at three items: two besides the given.
    beam = found.row("beam, tuned BERT seq").values
    assert beam == found.row("beam, tuned BERT set").values
    assert beam["recall"] > 0.1
    steps, any_two = build_steps(head, vectors), Sizes(np.ones(60, bool), 2, 2)
    two = [generate(steps, [int(given)], any_two, beam=16)[0].added for given in openings.given]
    right = [np.isin(added, wanted).mean() for added, wanted in zip(two, openings.wanted, strict=True)]
    assert found.row("beam to its end, tuned BERT seq").values["precision"] == pytest.approx(np.mean(right))
    again = json.loads(json.dumps(report.to_json()))["composition"]
    assert [row["name"] for row in again["rows"]] == [row.name for row in found.rows]


def test_test_bundles_are_composed_and_teach_nothing(
    dataset: Dataset, vectors: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = split(dataset)
    seen: list[Any] = []
    learn = SlotTemplates.learn.__func__  # type: ignore[attr-defined]

    def spy(cls: type[SlotTemplates], catalog: Any, bundles: Any, *rest: Any) -> SlotTemplates:
        seen.extend(tuple(rows.tolist()) for rows in bundles)
        found: SlotTemplates = learn(cls, catalog, bundles, *rest)
        return found

    monkeypatch.setattr(SlotTemplates, "learn", classmethod(spy))
    items = list(dataset.bundles.items)
    for row in parts.test:
        items[row] = np.array([0, 1, 2], np.int32)  # of three styles: whoever knows styles is at a loss
    found = report_of(replace(dataset, bundles=replace(dataset.bundles, items=tuple(items))), parts, vectors)
    assert seen == [tuple(dataset.bundles.items[row].tolist()) for row in parts.train]
    assert found.composition is not None
    assert found.composition.bundles == len(parts.test)
    assert {row.values["recall"] for row in found.composition.rows if "beam" in row.name} == {0}
