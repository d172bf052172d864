"""No division lets the held-out part leak: parts are disjoint, groups whole, interactions barred."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_combo.data.model import Bundles, Catalog, Dataset, Interactions
from peft_combo.data.readers.demo import demo_dataset
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import Split, split
from peft_combo.errors import DataError
from peft_combo.recipe.model import DataConfig


def make_dataset(
    bundles: list[tuple[str, list[int], str | None, float]],
    events: list[tuple[str | None, int, float, int]] = (),  # type: ignore[assignment]
    baskets: list[int] | None = None,
    n_items: int = 12,
) -> Dataset:
    """Build a dataset from (id, items, owner, time) bundles and (user, item, time, basket) events."""
    users = sorted({user for user, *_ in events if user is not None})
    return Dataset.build(
        "made",
        Catalog.build([f"i{row}" for row in range(n_items)], [f"item {row}" for row in range(n_items)]),
        Interactions.build(
            users,
            [users.index(user) if user is not None else -1 for user, *_ in events],
            [item for _, item, _, _ in events],
            times=[time for _, _, time, _ in events],
            baskets=[basket for *_, basket in events],
        ),
        Bundles.build(
            [one[0] for one in bundles],
            [one[1] for one in bundles],
            owners=[one[2] for one in bundles],
            times=[one[3] for one in bundles],
            baskets=baskets,
        ),
    )


owners = st.sampled_from([None, *(f"u{n}" for n in range(25))])
bundle_rows = st.tuples(st.frozensets(st.integers(0, 11), min_size=2, max_size=4), owners, st.integers(0, 40))
event_rows = st.tuples(owners, st.integers(0, 11), st.integers(0, 40), st.integers(-1, 30))


@st.composite
def datasets(draw: st.DrawFn) -> Dataset:
    rows = draw(st.lists(bundle_rows, min_size=40, max_size=70))
    events = draw(st.lists(event_rows, max_size=60))
    baskets = draw(st.lists(st.integers(-1, 30), min_size=len(rows), max_size=len(rows)))
    bundles = [(f"b{n}", sorted(items), owner, float(time)) for n, (items, owner, time) in enumerate(rows)]
    return make_dataset(bundles, [(user, item, float(t), basket) for user, item, t, basket in events], baskets)


def try_split(dataset: Dataset, by: str, seed: int) -> Split | None:
    try:
        return split(dataset, by, 0.2, 0.3, seed)  # type: ignore[arg-type]
    except DataError:
        return None  # too small after dropping repeats: refused, so nothing can leak


@settings(max_examples=60, deadline=None)
@given(datasets(), st.sampled_from(["user", "bundle", "time", "cold-item"]), st.integers(0, 3))
def test_parts_are_disjoint_and_leak_nothing(dataset: Dataset, by: str, seed: int) -> None:
    parts = try_split(dataset, by, seed)
    if parts is None:
        return
    rows = np.concatenate([parts.train, parts.valid, parts.test, parts.dropped])
    assert sorted(rows.tolist()) == list(range(len(dataset.bundles)))

    item_sets = [frozenset(items.tolist()) for items in dataset.bundles.items]
    in_train = {item_sets[row] for row in parts.train}
    in_test = {item_sets[row] for row in parts.test}
    assert not in_train & (in_test | {item_sets[row] for row in parts.valid})
    assert not in_test & {item_sets[row] for row in parts.valid}

    interactions = dataset.interactions
    assert interactions is not None
    held = np.concatenate([parts.valid, parts.test, parts.dropped])
    seen = interactions.take(parts.train_interactions)
    seen_users = {interactions.user_ids[user] for user in seen.users if user >= 0}
    held_owners = {dataset.bundles.owners[row] for row in held} - {None}
    if by in ("user", "cold-item"):
        held = np.concatenate([parts.valid, parts.test])
        held_owners = {dataset.bundles.owners[row] for row in held} - {None}
        held_groups = {dataset.bundles.groups[row] for row in np.concatenate([parts.valid, parts.test])}
        assert not held_groups & {dataset.bundles.groups[row] for row in parts.train}
        assert not held_owners & {dataset.bundles.owners[row] for row in parts.train}
        assert not held_owners & seen_users
    if by in ("user", "bundle"):
        assert not set(dataset.bundles.baskets[held].tolist()) - {-1} & set(seen.baskets.tolist())
    if by == "bundle":
        pairs = {(interactions.user_ids[u], int(i)) for u, i in zip(seen.users, seen.items, strict=True) if u >= 0}
        given_away = {(dataset.bundles.owners[row], int(item)) for row in held for item in dataset.bundles.items[row]}
        assert not pairs & given_away
    if by == "time":
        first_held = dataset.bundles.times[held].min()
        assert not (seen.times >= first_held).any()
        assert dataset.bundles.times[parts.train].max() < first_held
        if len(parts.valid) and len(parts.test):
            assert dataset.bundles.times[parts.valid].max() < dataset.bundles.times[parts.test].min()


@settings(max_examples=30, deadline=None)
@given(datasets(), st.lists(bundle_rows, min_size=1, max_size=10), st.integers(0, 3))
def test_more_data_moves_nobody(
    dataset: Dataset, more: list[tuple[frozenset[int], str | None, int]], seed: int
) -> None:
    """A bundle may be dropped when its double arrives, but it never changes side."""
    bundles = dataset.bundles
    before = [
        (bundles.bundle_ids[row], bundles.items[row].tolist(), bundles.owners[row], float(bundles.times[row]))
        for row in range(len(bundles))
    ]
    added = [(f"new{n}", sorted(items), owner, float(time)) for n, (items, owner, time) in enumerate(more)]
    small, large = try_split(dataset, "user", seed), try_split(make_dataset(added + before), "user", seed)
    if small is None or large is None:
        return
    shift = len(added)
    assert {row + shift for row in small.train.tolist()} <= set(large.train.tolist())
    for part, other in ((small.valid, large.test), (small.test, large.valid), (small.test, large.train)):
        assert not {row + shift for row in part.tolist()} & set(other.tolist())


def test_seed_and_digest() -> None:
    demo = demo_dataset()
    first, again, other = split(demo, seed=0), split(demo, seed=0), split(demo, seed=1)
    assert first.digest == again.digest != other.digest
    assert first.train.tolist() == again.train.tolist() != other.train.tolist()
    assert split(demo, "bundle").digest != first.digest
    assert split(demo, test_fraction=0.3).digest != first.digest


def test_fractions_are_about_right() -> None:
    parts = split(demo_dataset(), "bundle", 0.1, 0.2)
    assert 40 <= len(parts.valid) <= 80
    assert 95 <= len(parts.test) <= 145
    by_time = split(demo_dataset(), "time", 0.1, 0.2)
    assert 55 <= len(by_time.valid) <= 65
    assert 115 <= len(by_time.test) <= 125


def test_repeated_item_set_is_dropped_and_its_owner_stays_held_out() -> None:
    bundles = [(f"b{n}", [n % 12, (n + 1 + n // 12) % 12], f"u{n}", float(n)) for n in range(60)]
    dataset = make_dataset(bundles, [(f"u{n}", n % 12, float(n), -1) for n in range(60)])
    plain = split(dataset, "user", 0.2, 0.3)
    victim = int(plain.test[0])
    bundles[victim] = (bundles[victim][0], list(bundles[int(plain.train[0])][1]), *bundles[victim][2:])
    parts = split(make_dataset(bundles, [(f"u{n}", n % 12, float(n), -1) for n in range(60)]), "user", 0.2, 0.3)
    assert victim in parts.dropped
    assert victim not in np.concatenate([parts.train, parts.valid, parts.test])
    assert victim not in parts.train_interactions  # event n is by user n


def test_bundle_split_bars_the_basket_but_not_the_user() -> None:
    bundles = [(f"b{n}", [2 * n % 12, (2 * n + 1) % 12, (n // 6 + 2 * n + 2) % 12], "one", float(n)) for n in range(40)]
    events = [("one", item, float(n), n) for n, (_, items, _, _) in enumerate(bundles) for item in items]
    events += [(None, 3, 5.0, -1)]
    dataset = make_dataset(bundles, events, baskets=list(range(40)))
    parts = split(dataset, "bundle", 0.1, 0.1)
    assert len(events) - 1 in parts.train_interactions
    assert 0 < len(parts.train_interactions) < len(events)


def test_time_split_shows_only_what_was_strictly_earlier() -> None:
    bundles = [(f"b{n}", [n, n + 1], None, 1.7e9 + 100 * n) for n in range(10)]
    events = [(None, 0, 1.7e9 + 100 * time, -1) for time in (float("nan"), 0.0, 6.5, 7.0, 7.5, 9.0)]
    parts = split(make_dataset(bundles, events), "time", 0.1, 0.2)
    assert (parts.train.tolist(), parts.valid.tolist(), parts.test.tolist()) == ([*range(7)], [7], [8, 9])
    assert parts.train_interactions.tolist() == [1, 2]


def test_no_interactions() -> None:
    dataset = make_dataset([(f"b{n}", [n % 12, (n + 1 + n // 12) % 12], None, 0.0) for n in range(60)])
    bare = Dataset.build("bare", dataset.catalog, None, dataset.bundles)
    assert len(split(bare, "user", 0.2, 0.2).train_interactions) == 0


def test_nothing_held_out_when_fractions_are_zero() -> None:
    dataset = make_dataset([(f"b{n}", [n % 12, (n + 1) % 12], None, 0.0) for n in range(12)], [("u", 1, 0.0, -1)])
    for by in ("user", "bundle", "time"):
        parts = split(dataset, by, 0.0, 0.0)  # type: ignore[arg-type]
        assert len(parts.train) == 12
        assert parts.train_interactions.tolist() == [0]


def test_new_items_are_in_held_out_bundles_alone() -> None:
    demo = demo_dataset()
    parts, plain = split(demo, "cold-item"), split(demo, "user")
    interactions = demo.interactions
    assert interactions is not None

    def part_of(key: str) -> float:
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64

    new = {row for row, item_id in enumerate(demo.catalog.item_ids) if part_of(f"0:item:{item_id}") < 0.05}
    assert 0.03 < len(new) / len(demo.catalog) < 0.07
    in_train = {int(item) for row in parts.train for item in demo.bundles.items[row]}
    assert not new & in_train
    assert not new & set(interactions.items[parts.train_interactions].tolist())
    assert new & {int(item) for row in parts.test for item in demo.bundles.items[row]}
    # Nothing else changes: the parts are those of the split by user, less train bundles with a new item.
    kept = {row for row in plain.train.tolist() if not new & set(demo.bundles.items[row].tolist())}
    assert set(parts.train.tolist()) == kept
    assert set(plain.test.tolist()) <= set(parts.test.tolist())


def test_too_few_bundles_say_how_many_are_needed() -> None:
    dataset = make_dataset([("a", [0, 1], "u1", 1.0), ("b", [1, 2], "u1", 2.0), ("c", [2, 3], "u2", 3.0)])
    with pytest.raises(DataError, match=r"3 bundles of 2 owners gave .* needed are .*Give at least about \d+ owners"):
        split(dataset, "user")


def test_time_split_needs_times() -> None:
    dataset = make_dataset([("a", [0, 1], None, float("nan")), ("b", [1, 2], None, 2.0)])
    with pytest.raises(DataError, match=r"1 of 2 bundles .* have none"):
        split(dataset, "time")


def test_one_moment_for_all_cannot_be_split_by_time() -> None:
    dataset = make_dataset([(f"b{n}", [n, n + 1], None, 1.7e9) for n in range(10)])
    with pytest.raises(DataError, match=r"those of the bundles span 0 seconds.*set data.split to user or bundle"):
        split(dataset, "time")


@pytest.mark.parametrize(
    ("bundle_times", "event_time", "found"),
    [
        ([float(n) for n in range(10)], 1.7e9, r"bundles span 9 seconds"),
        ([100.0 * n for n in range(10)], 1.7e9, r"bundles lie in 1970 \(the first is 0 seconds\)"),
        ([1.7e9 + 100 * n for n in range(10)], 20_230_115.0, r"interactions lie in 1970 \(the first is 20,230,115"),
    ],
)
def test_times_that_are_none_cannot_be_split_by(bundle_times: list[float], event_time: float, found: str) -> None:
    bundles = [(f"b{n}", [n, n + 1], None, time) for n, time in enumerate(bundle_times)]
    with pytest.raises(DataError, match=found):
        split(make_dataset(bundles, [("u", 0, event_time, -1)]), "time")


def test_fractions_must_leave_something() -> None:
    with pytest.raises(ValueError, match="fractions"):
        split(demo_dataset(), "user", 0.5, 0.5)


@pytest.mark.parametrize("category", ["clothing", "electronic"])
def test_bundlerec_held_out_users_are_unseen(category: str) -> None:
    """user_item is the union of a user's own bundles: one row of a held-out user would answer their test."""
    dataset = open_dataset(DataConfig(source="bundlerec", path=str(shared_data(f"bundlerec/{category}"))))
    parts = split(dataset, "user", seed=3)
    interactions = dataset.interactions
    assert interactions is not None
    held = {dataset.bundles.owners[row] for row in [*parts.valid, *parts.test, *parts.dropped]}
    seen = interactions.take(parts.train_interactions)
    assert not held & {interactions.user_ids[user] for user in seen.users}
    assert not held & {dataset.bundles.owners[row] for row in parts.train}
    matrix = interactions.to_csr(len(dataset.catalog), parts.train_interactions)
    for owner in held:
        if owner in interactions.user_ids:
            assert matrix[interactions.user_ids.index(owner)].nnz == 0
