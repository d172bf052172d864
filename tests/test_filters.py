"""Conditions on item columns, and what a request bars: each on a catalogue whose right answer is plain to see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import sparse

from peft_combo.data.model import Catalog
from peft_combo.data.queries import Queries
from peft_combo.errors import DataError
from peft_combo.recommender.composing.columns import ItemColumns, KeptMasks
from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.composing.options import Options
from peft_combo.recommender.composing.slots import SlotTemplates
from peft_combo.recommender.explanations import FusedScores
from peft_combo.recommender.filters import Filter, parse_filter
from peft_combo.recommender.fitted_scorers import FittedScorer
from peft_combo.recommender.item_ranking import ItemRanking, join_scores, push_away
from peft_combo.recommender.requests import parse_request
from peft_combo.recommender.scorer_id import FUSION, NOT_LIKE, TEXT_SEARCH
from peft_combo.scoring.linear import CEASE, EASE
from peft_combo.scoring.neighbours import ItemKNN, UserKNN
from peft_combo.scoring.popularity import CoOccurrence, Popularity
from peft_combo.scoring.text import TextCosine


@pytest.fixture
def catalog() -> Catalog:
    return Catalog.build(
        ["a", "b", "c", "d"], ["Red Dress", "Blue dress", "Boots", "Bag"],
        [("Clothing", "Dresses"), ("Clothing", "Dresses"), ("Shoes",), ()], ["dress", "dress", "shoes", None],
        [10.0, 20.5, np.nan, 30.0],
        attributes={"brand": ["Acme", "bold", "ACME", None], "size": ["38", "40.5", "x", None]},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"must": [{"column": "brand", "any": ["acme"]}]}, "ac"),
        ({"must": [{"column": "Brand", "any": ["acme", "BOLD"]}]}, "abc"),
        ({"must_not": [{"column": "brand", "any": ["acme"]}]}, "bd"),
        ({"must_not": [{"column": "brand", "any": ["never heard of"]}]}, "abcd"),
        ({"must": [{"column": "price", "gte": 10, "lt": 30}]}, "ab"),
        ({"must": [{"column": "price", "gt": 10, "lte": 30}]}, "bd"),
        ({"must": [{"column": "price", "any": [20.5, 30]}]}, "bd"),
        ({"must_not": [{"column": "price", "gte": 30}]}, "abc"),
        ({"must": [{"column": "size", "gt": 39}]}, "b"),
        ({"must": [{"column": "size", "any": [38, "x"]}]}, "ac"),
        ({"must": [{"column": "category", "any": ["clothing"]}]}, "ab"),
        ({"must": [{"column": "category", "any": ["Clothing>Dresses"]}]}, "ab"),
        ({"must": [{"column": "leaf", "any": ["shoes"]}]}, "c"),
        (
            {"must": [{"column": "slot", "any": ["dress"]}], "must_not": [{"column": "title", "any": ["red dress"]}]},
            "b",
        ),
        ({"must": [{"column": "item_id", "any": ["d", "zz"]}]}, "d"),
    ],
)
def test_a_filter_keeps_what_meets_it(catalog: Catalog, asked: dict[str, Any], expected: str) -> None:
    checks = ItemColumns(catalog).match(Filter.model_validate(asked)).values()
    kept = np.logical_and.reduce(list(checks))
    assert "".join(item for item, own in zip(catalog.item_ids, kept, strict=True) if own) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"must": [{"column": "bramd", "any": ["x"]}]}, 'no column "bramd".*Did you mean "brand"'),
        ({"must": [{"column": "brand", "any": ["Acne"]}]}, 'No item has brand "Acne". Did you mean "A'),
        ({"must": [{"column": "brand", "gt": 1}]}, "nothing is a number"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(catalog: Catalog, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ItemColumns(catalog).match(Filter.model_validate(asked))


def test_conditions_read_as_written_on_a_command_line() -> None:
    found = parse_filter(["price<50", "price >= 1.5", "brand=Nike|Puma", "colour!=dark red"])
    assert found.model_dump(exclude_none=True) == {
        "must": (
            {"column": "price", "lt": 50.0}, {"column": "price", "gte": 1.5},
            {"column": "brand", "any": ("Nike", "Puma")},
        ),
        "must_not": ({"column": "colour", "any": ("dark red",)},),
    }  # fmt: skip
    for wrong, message in (("price", "such as price<50"), ("price<cheap", "expected a number after <")):
        with pytest.raises(DataError, match=message):
            parse_filter([wrong])


def test_a_request_reads_filters_and_says_what_is_wrong_with_them() -> None:
    request = parse_request({"items": ["a"], "filter": {"must": [{"column": "price", "lt": 5}]}, "exclude": ["b"]})
    assert request.constraints.filter == request.filter
    assert request.exclude_seen
    with pytest.raises(DataError, match="needs any, gt, gte, lt or lte"):
        parse_request({"filter": {"must": [{"column": "price"}]}})


def test_masks_are_kept_and_let_go() -> None:
    kept = KeptMasks(most=25)
    made: list[str] = []

    def make(name: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        made.append(name)
        return np.ones(10, bool)

    for name in ("a", "b", "a", "c", "a", "b"):
        kept.get(name, lambda name=name: make(name))  # type: ignore[misc]
    assert made == ["a", "b", "c", "b"]


def test_composed_bundles_keep_to_a_filter(catalog: Catalog) -> None:
    templates = SlotTemplates.learn(catalog, [np.array([0, 2]), np.array([1, 2])])
    composer = Composer(catalog, templates)
    wanted = Constraints(filter=Filter.model_validate({"must_not": [{"column": "brand", "any": ["acme"]}]}))
    assert composer.find_allowed(wanted).tolist() == [False, True, False, True]
    only = Constraints(filter=Filter.model_validate({"must": [{"column": "brand", "any": ["bold"]}]}))
    with pytest.raises(DataError, match="filter brand = bold"):
        composer.compose([1], constraints=only, options=Options(k=1))
    (best,) = composer.compose([2], constraints=wanted, options=Options(k=1))
    assert best.items == (1, 2)
    replaced = composer.find_replacements(0, np.array([2]), Constraints(exclude_items=(0,)))
    assert replaced.tolist() == [False, True, False, False]
    with pytest.raises(DataError, match="price"):
        composer.find_replacements(0, np.array([2]), Constraints(budget=30))


def test_a_list_goes_on_behind_the_item_shown_last() -> None:
    scores = np.array([3, 1, 3, np.nan, 2, 1], np.float32)
    ranking = ItemRanking(np.empty(0, np.int64), None, FusedScores(scores, {}), np.isfinite(scores))
    assert ranking.take(10) == [0, 2, 4, 1, 5]
    assert ranking.take(2, after=0) == [2, 4]
    assert ranking.take(2, after=1) == [5]
    assert ranking.take(2, after=5) == []


def test_a_query_and_a_context_count_alike_and_rejected_items_push() -> None:
    fused, words = np.array([1, 2, 3], np.float32), np.array([30, 20, 10], np.float32)
    joined = join_scores(FusedScores(fused, {}), words)
    assert joined.scores == pytest.approx([0, 0, 0], abs=1e-6)
    assert set(joined.parts) == {FUSION, TEXT_SEARCH}
    assert join_scores(None, words).scores is words

    vectors = np.array([[1, 0], [0.9, 0.1], [0, 1], [-1, 0]], np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pushed = push_away(FusedScores(np.array([0.4, 0.3, 0.2, 0.1], np.float32), {}), vectors, np.array([0]))
    less = pushed.parts[NOT_LIKE]
    assert less[0] < less[1] < 0
    assert less[2] == less[3] == 0  # what is less like it than the mean loses nothing
    assert pushed.scores[2] > pushed.scores[1]  # and before it was the other way round


def test_one_request_is_scored_as_it_is_among_others() -> None:
    """What a single request spares itself, conversions and rows that are not read, changes no score."""
    rng = np.random.default_rng(3)
    history = sparse.csr_array((rng.random((80, 30)) < 0.15).astype(np.float32))
    vectors = rng.standard_normal((30, 8)).astype(np.float32)
    contexts = np.array([[3, 7, -1], [7, 3, 12], [29, -1, -1], [0, 1, 2]])
    none = np.zeros(4, np.int64)
    queries = Queries(contexts, none, np.array([""] * 4), none)
    for scorer in (EASE(5.0), CEASE(5.0), ItemKNN(), UserKNN(), Popularity(), CoOccurrence(), TextCosine()):
        fitted = FittedScorer(scorer.fit(history, items=vectors))  # type: ignore[attr-defined]
        together = fitted(queries)
        for row in range(4):
            alone = fitted(queries.take(slice(row, row + 1)))[0]
            np.testing.assert_allclose(alone, together[row], atol=1e-5, err_msg=type(scorer).__name__)
