"""Habits beside a fusion: which requests they are for, and that validation takes them only where they tell more."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from peft_combo.data.model import Bundles, Catalog, Dataset, Interactions
from peft_combo.data.queries import Queries
from peft_combo.recommender.fit_data import FitData
from peft_combo.recommender.fitted_scorers import Fitted, build_next_basket
from peft_combo.recommender.user_habits import UserHabits, choose_habits, find_alone

ITEMS, USERS = 40, 60


@pytest.fixture(scope="module")
def world() -> tuple[FitData, Bundles]:
    """60 users took six items each of the ten of their style; the next bundle of each holds two more of these."""
    rng = np.random.default_rng(0)
    users, items, bundles = [], [], []
    for user in range(USERS):
        drawn = user % 4 * 10 + rng.permutation(10)
        users += [user] * 6
        items += drawn[:6].tolist()
        bundles.append(drawn[6:8])
    names = [f"u{user}" for user in range(USERS)]
    later = Bundles.build([f"b{user}" for user in range(USERS)], bundles, owners=names)
    catalog = Catalog.build([f"i{item}" for item in range(ITEMS)], [f"word{item}" for item in range(ITEMS)])
    interactions = Interactions.build(names, users, items, times=np.arange(len(items)) * 86_400.0)
    none = np.empty(0, np.int64)
    return FitData.of(Dataset.build("w", catalog, interactions, later), none, None, None, {}), later


def guess(queries: Queries) -> NDArray[np.float32]:
    return np.random.default_rng(len(queries)).random((len(queries), ITEMS), np.float32)


def test_habits_are_taken_where_they_tell_more_than_the_fusion(world: tuple[FitData, Bundles]) -> None:
    known, later = world
    habits, rows = build_next_basket(known, "all times alike"), np.arange(USERS, dtype=np.int32)
    assert choose_habits(known, later, rows, guess, habits, "z") >= 3
    assert choose_habits(known, later, rows, habits, guess, "z") == 0  # what only guesses is not added
    assert choose_habits(known, later, rows[:10], guess, habits, "z") == 0  # nor on the word of ten users


def test_strangers_ask_nothing(world: tuple[FitData, Bundles]) -> None:
    known, later = world
    strangers = Bundles.build(later.bundle_ids, later.items, owners=[f"stranger{n}" for n in range(USERS)])
    habits: Fitted = build_next_basket(known, "all times alike")
    assert choose_habits(known, strangers, np.arange(USERS, dtype=np.int32), guess, habits, "z") == 0


def test_what_is_added_is_the_comparable_score_and_nothing_where_it_cannot_say(world: tuple[FitData, Bundles]) -> None:
    known, _ = world
    queries = Queries(np.array([[0, 1], [2, 3]]), np.zeros(2, np.int64), np.array(["u0", "stranger"]), np.zeros(2, int))
    one, three = (UserHabits.of(known, "half-life 30 days", weight) for weight in (1.0, 3.0))
    added = one.share(queries, known.evidence(queries), "z")
    np.testing.assert_allclose(three.share(queries, known.evidence(queries), "z"), 3 * added, rtol=1e-6)
    assert not added[1].any()
    assert added[0, :2].tolist() == [0, 0]  # items of the context
    assert added[0, 2:].std() == pytest.approx(1, abs=0.1)


def test_a_user_alone_is_one_whose_context_is_what_they_took_last() -> None:
    taken = np.array([9, 8, 7, 6, 5, 4, 3]), np.array([0, 6, 7])
    rows = {"a": 0, "b": 1}
    asked = [([9, 8, 7, 6, 5], "a"), ([9, 8], "a"), ([3], "b"), ([3], "a"), ([9, 8, 7, 6, 5], None), ([], "c")]
    found = find_alone([(np.array(context, np.int64), user) for context, user in asked], taken, rows)
    assert found.tolist() == [True, False, True, False, False, False]
