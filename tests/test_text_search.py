"""Text search: a text finds the items and bundles that are called so, each view counting as its weight says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from peft_combo.data.model import Bundles, Catalog
from peft_combo.recommender.text_search import (
    FROZEN_ALL,
    FROZEN_TITLE,
    WORDS,
    TextQueries,
    TextSearch,
    VectorView,
    View,
    WordView,
    find_distinct,
    select_weights,
)
from peft_combo.scoring.base import dense
from peft_combo.scoring.text import cut_plurals

TITLES = ("linen dress", "wool coat", "beach towel", "swim shorts", "usb cable", "aa batteries")
PATHS = (("Dresses",), ("Coats",), ("Beach",), ("Beach",), ("Cables",), ("Power",))
BUNDLES = ([2, 3], [0, 1], [4, 5], [3, 2], [1])
INTENTS = ("beach days", "office", None, "swimming", "winter")
ROWS = [np.array(rows) for rows in BUNDLES]

Array = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture
def catalog() -> Catalog:
    return Catalog.build([f"i{row}" for row in range(6)], TITLES, PATHS)


@pytest.fixture
def bundles() -> Bundles:
    return Bundles.build([f"b{row}" for row in range(5)], BUNDLES, INTENTS, owners=["u", "v", None, "w", "u"])


def encode_by_letters(texts: Sequence[str]) -> Array:
    """Encode a text as the counts of its letters, of length 1."""
    counts = np.array([[text.count(chr(97 + letter)) for letter in range(26)] for text in texts], np.float32)
    return np.asarray(counts / np.maximum(np.linalg.norm(counts, axis=1)[:, None], 1e-9), np.float32)


@pytest.fixture
def views(catalog: Catalog) -> dict[str, View]:
    texts = catalog.texts("{title} {category}")
    return {
        WORDS: WordView.of(texts),
        FROZEN_TITLE: VectorView(encode_by_letters(TITLES), encode_by_letters),
        FROZEN_ALL: VectorView(encode_by_letters(texts), encode_by_letters),
    }


def compare(view: View, queries: Sequence[str], bundles: Sequence[Any] | None = None) -> Array:
    vectors: Any = view.items if bundles is None else view.pool(bundles)
    found: Array = dense(view.encode(queries) @ vectors.T)
    return found


@pytest.mark.parametrize(
    ("text", "cut"),
    [("Beach Dresses, 2 pcs", "beach dresse 2 pcs"), ("Gas bus socks", "gas bus sock"), ("", ""), ("--", "")],
)
def test_a_plural_is_its_singular(text: str, cut: str) -> None:
    assert cut_plurals(text) == cut


def test_words_are_found_in_title_and_category_and_in_either_number(views: dict[str, View]) -> None:
    alike = compare(views[WORDS], ["power cables", "COAT dresses", "towels", "unknown"])
    assert {*alike[0].argsort()[-2:].tolist()} == {4, 5}
    assert {*alike[1].argsort()[-2:].tolist()} == {0, 1}
    assert alike[2].argmax() == 2
    assert not alike[3].any()


def test_a_score_is_the_weighted_sum_of_standard_scores(views: dict[str, View]) -> None:
    expected = np.zeros(6)
    for name, weight in ((WORDS, 0.5), (FROZEN_TITLE, 1), (FROZEN_ALL, 1)):
        alike = compare(views[name], ["beach towel"])[0].astype(float)
        expected += weight * (alike - alike.mean()) / alike.std()
    scores = TextSearch.of(views).score_items(["beach towel"])[0]
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert scores.argmax() == 2
    doubled = TextSearch.of(views, {WORDS: 1, FROZEN_TITLE: 2, FROZEN_ALL: 2}).score_items(["beach towel"])[0]
    np.testing.assert_allclose(doubled, 2 * expected, atol=1e-4)


def test_a_view_that_says_nothing_of_a_query_changes_nothing(views: dict[str, View]) -> None:
    frozen = {FROZEN_TITLE: 1.0, FROZEN_ALL: 1.0}
    np.testing.assert_array_equal(
        TextSearch.of(views).score_items(["unknown"]), TextSearch.of(views, frozen).score_items(["unknown"])
    )
    assert not TextSearch.of(views).score_items(["?"]).any()


def test_a_bundle_is_compared_as_a_whole(views: dict[str, View]) -> None:
    """Words by the texts of its items as one, an encoder by the mean of their vectors."""
    mean = encode_by_letters(TITLES)[[0, 1]].mean(axis=0)
    query = encode_by_letters(["office"])[0]
    alike = compare(views[FROZEN_TITLE], ["office"], ROWS)
    assert alike[0, 1] == pytest.approx(query @ mean / np.linalg.norm(mean), abs=1e-6)
    # "beach" stands three times in the bundle of towel and shorts, and "towel", "swim", "short" once each.
    rare = np.log(7 / np.array([3, 2, 2, 2])) + 1  # two items of six have the first word, one each of the others
    weights = rare * [1 + np.log(3), 1, 1, 1]
    assert compare(views[WORDS], ["beach"], ROWS)[0, 0] == pytest.approx(weights[0] / np.linalg.norm(weights), abs=1e-5)


def test_given_bundles_score_as_they_would_among_those_that_are_known(views: dict[str, View]) -> None:
    search = TextSearch.of(views)
    pooled = search.pool_bundles(ROWS)
    scores = search.score_bundles(["beach", "usb"], pooled)
    assert scores.argmax(axis=1).tolist() == [0, 2]
    given = search.pool_bundles(ROWS[1:3])
    np.testing.assert_allclose(search.score_bundles(["beach", "usb"], given, pooled), scores[:, 1:3], atol=1e-5)


@pytest.mark.parametrize("weights", [{"strange": 1.0}, {WORDS: -1.0}, {WORDS: 0.0}, {WORDS: np.inf}, {}])
def test_weights_that_are_none_are_refused(views: dict[str, View], weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weights of a text search"):
        TextSearch.of(views, weights)


def test_bundles_that_hold_the_same_items_are_one(bundles: Bundles) -> None:
    first, numbers = find_distinct(bundles.items)
    assert first == [0, 1, 2, 4]
    assert numbers.tolist() == [0, 1, 2, 0, 3]
    asked = TextQueries.of(bundles, np.arange(5))
    assert asked.texts == ("beach days", "office", "swimming", "winter")
    assert asked.targets.tolist() == [0, 1, 0, 3]
    assert asked.groups.tolist() == ["u", "v", "w", "u"]
    few = TextQueries.of(bundles, np.array([3, 4]), among=np.array([1, 3, 4]))
    assert [rows.tolist() for rows in few.candidates] == [[0, 1], [3, 2], [1]]
    assert few.targets.tolist() == [1, 2]


@dataclass(frozen=True, eq=False)
class OneHot:
    """Items and bundles 0, 1, ... of a text that is their number, or of the next one where it is `wrong`."""

    items: Array
    wrong: float

    def pool(self, bundles: Sequence[Any]) -> Array:
        return self.items[[rows[0] for rows in bundles]]

    def encode(self, texts: Sequence[str]) -> Array:
        dice = np.random.default_rng(0).random(len(texts))
        places = [(int(text) + (one < self.wrong)) % len(self.items) for text, one in zip(texts, dice, strict=True)]
        return self.items[places]


@pytest.mark.parametrize(("wrong", "taken"), [(0.0, True), (1.0, False)])
def test_a_tuned_encoder_counts_where_validation_prefers_it(wrong: float, taken: bool) -> None:
    base = np.eye(60, dtype=np.float32)
    views = {FROZEN_TITLE: OneHot(base, 0.6), FROZEN_ALL: OneHot(base, 0.6), "tuned": OneHot(base, wrong)}
    every = np.arange(60)
    valid = TextQueries(tuple(map(str, every)), every, every.astype(str), tuple(np.array([row]) for row in every))
    chosen = select_weights(views, valid)
    assert ("tuned" in chosen) == taken
    none = TextQueries((), np.arange(0), np.array([], str), ())
    assert select_weights(views, none) == {FROZEN_TITLE: 1.0, FROZEN_ALL: 1.0}
