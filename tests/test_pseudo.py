"""Pseudo-bundles: what counts as bought together, how sure that is, and what may never be looked at or given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from peft_combo.data.model import Bundles, Catalog, Dataset, Interactions
from peft_combo.data.pseudo_bundles import Mined, mine, wilson_lower
from peft_combo.data.splits import Split, split
from peft_combo.recipe.task import PseudoBundles

Baskets = Sequence[Sequence[int]]
N_ITEMS = 50


def shop(interactions: Interactions, bundles: Baskets = (), owners: Sequence[str | None] | None = None) -> Dataset:
    catalog = Catalog.build([f"i{row}" for row in range(N_ITEMS)], [f"Item {row}" for row in range(N_ITEMS)])
    made = Bundles.build([f"b{row}" for row in range(len(bundles))], list(bundles), owners=owners)
    return Dataset.build("shop", catalog, interactions, made)


def in_baskets(baskets: Baskets) -> Interactions:
    items = [item for basket in baskets for item in basket]
    numbers = [number for number, basket in enumerate(baskets) for _ in basket]
    return Interactions.build([], [-1] * len(items), items, baskets=numbers)


def all_seen(dataset: Dataset, **parts: list[int]) -> Split:
    def rows(name: str) -> np.ndarray:
        return np.array(parts.get(name, []), np.int32)

    assert dataset.interactions is not None
    seen = np.arange(len(dataset.interactions))
    return Split(rows("train"), rows("valid"), rows("test"), rows("dropped"), seen, "")


def mined(baskets: Baskets, **config: float) -> Mined:
    dataset = shop(in_baskets(baskets))
    return mine(dataset, all_seen(dataset), PseudoBundles.model_validate(config))


def sets(found: Mined) -> list[list[int]]:
    return [rows.tolist() for rows in found.items]


def test_the_bound_of_worked_cases() -> None:
    # k = n: n / (n + z^2). k = 0 or n = 0: nothing. Half of ten: Wilson's own formula.
    np.testing.assert_allclose(wilson_lower([10, 0, 0, 5], [10, 10, 0, 10]), [10 / 13.8416, 0, 0, 0.2366], atol=1e-4)


def test_a_pair_is_as_sure_as_its_commoner_item_says() -> None:
    # 0 and 1: ten times together, 1 ten times more without 0, in fifty purchases.
    found = mined([[0, 1]] * 10 + [[1]] * 10 + [[2]] * 30)
    assert sets(found) == [[0, 1]]
    np.testing.assert_allclose(found.confidences, wilson_lower(10, 20), rtol=1e-6)
    assert mined([[0, 1]] * 10 + [[1]] * 10 + [[2]] * 30, min_confidence=0.4).items == ()


def test_what_everybody_buys_is_together_by_chance() -> None:
    assert mined([[0, 1]] * 20).items == ()
    assert sets(mined([[0, 1]] * 20 + [[2]] * 20)) == [[0, 1]]


def test_a_pair_must_be_seen_often_enough() -> None:
    baskets = [[0, 1]] * 3 + [[2]] * 20
    assert sets(mined(baskets)) == [[0, 1]]
    assert mined(baskets, min_together=4).items == ()


def test_a_pair_grows_while_it_stays_sure_and_its_pairs_are_not_taken_again() -> None:
    baskets = [[0, 1, 2]] * 10 + [[0, 1]] * 2 + [[3, 4]] * 5 + [[5]] * 40
    found = mined(baskets)
    assert sets(found) == [[3, 4], [0, 1, 2]]  # 5 of 5: 0.566; 10 of 12: 0.552
    np.testing.assert_allclose(found.confidences, wilson_lower([5, 10], [5, 12]), rtol=1e-6)
    assert sets(mined(baskets, max_items=2)) == [[0, 1], [3, 4], [0, 2], [1, 2]]
    assert sets(mined(baskets, most=1)) == [[0, 1, 2]]
    # The triple would be less sure than is asked, the pairs are not.
    assert sets(mined(baskets, min_confidence=0.56)) == [[0, 1], [3, 4]]


def test_without_baskets_a_user_and_a_window_say_what_was_together() -> None:
    day = 86_400.0
    users = [*range(10), *range(10), *range(10), *range(10, 30)]
    items = [0] * 10 + [1] * 10 + [2] * 10 + [3] * 20
    times = [0.0] * 10 + [0.9 * day] * 10 + [1.1 * day] * 10 + [0.0] * 20
    events = Interactions.build([f"u{user}" for user in range(30)], users, items, times=times)
    dataset = shop(events)
    assert sets(mine(dataset, all_seen(dataset), PseudoBundles())) == [[0, 1]]
    assert sets(mine(dataset, all_seen(dataset), PseudoBundles(window_days=2))) == [[0, 1, 2]]
    # Events without a time or a user went together with nothing we know of.
    timeless = shop(Interactions.build([f"u{user}" for user in range(30)], users, items))
    found = mine(timeless, all_seen(timeless), PseudoBundles())
    assert found.items == ()
    assert found.notes == ("pseudo-bundles: 0 sets of items out of 0 purchases",)


def test_nothing_of_held_out_users_is_looked_at() -> None:
    # Every user has one bundle, and the split decides who is held out; a pair is bought by one side only.
    owners = [f"u{user}" for user in range(40)]
    bundles = [[2 + user, 3 + user] for user in range(40)]
    probe = shop(in_baskets([[0]]), bundles, owners)
    parts = split(probe, "user", seed=1)
    held = {probe.bundles.owners[row] for row in (*parts.valid, *parts.test, *parts.dropped)}
    assert 5 < len(held) < 35

    def found(buyers: list[str]) -> list[list[int]]:
        rows = [(owners.index(buyer), item, 1000 * place) for place, buyer in enumerate(buyers) for item in (0, 1)]
        rows += [(user, 49, -1 - user) for user in range(40)]
        users, items, when = zip(*rows, strict=True)
        events = Interactions.build(owners, users, items, times=[float(moment) for moment in when])
        dataset = shop(events, bundles, owners)
        return sets(mine(dataset, split(dataset, "user", seed=1), PseudoBundles(window_days=0.001)))

    assert found(sorted(map(str, held))) == []
    assert found([owner for owner in owners if owner not in held]) == [[0, 1]]


def test_no_set_is_or_holds_a_bundle_that_will_be_asked_for() -> None:
    baskets = [[0, 1, 2]] * 10 + [[5]] * 40
    dataset = shop(in_baskets(baskets), [[0, 1, 2], [3, 4]])
    config = PseudoBundles()
    assert sets(mine(dataset, all_seen(dataset), config)) == [[0, 1, 2]]
    # The triple is held out: its pairs remain, as nobody asks for them. Each is one, for it may not grow.
    for part in ("valid", "test"):
        assert sets(mine(dataset, all_seen(dataset, **{part: [0]}), config)) == [[0, 1], [0, 2], [1, 2]]
    # A pair is held out: nothing that holds it is given.
    dataset = shop(in_baskets(baskets), [[0, 1], [3, 4]])
    assert sets(mine(dataset, all_seen(dataset, test=[0]), config)) == [[0, 2], [1, 2]]


def test_a_training_bundle_is_not_given_once_more() -> None:
    dataset = shop(in_baskets([[0, 1]] * 10 + [[5]] * 40), [[1, 0], [3, 4]])
    assert mine(dataset, all_seen(dataset, train=[0, 1]), PseudoBundles()).items == ()


def test_without_interactions_there_are_none_and_it_is_said() -> None:
    catalog = Catalog.build(["a", "b"], ["A", "B"])
    dataset = Dataset.build("shop", catalog, None, Bundles.build(["b0"], [[0, 1]]))
    found = mine(dataset, all_seen(shop(in_baskets([[]]))), PseudoBundles())
    assert found.items == ()
    assert found.notes == ("pseudo-bundles: there are no interactions that training may see",)


@pytest.mark.parametrize("field", ["min_confidence", "weight"])
def test_a_confidence_is_a_share(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        PseudoBundles.model_validate({field: 1.5})
