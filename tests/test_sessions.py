"""Bundles in sessions: which sessions may be learned from, groups with known answers, measures by hand, commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import shared_data
from made_up import add_sessions
from sklearn.linear_model import LogisticRegression

from peft_combo.data.model import Dataset
from peft_combo.data.sessions import LabelledSession, Sessions, list_sessions, make_up_sessions
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import Split, split
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.errors import DataError, PeftComboError
from peft_combo.evaluation.detection import ALONE, CLOSEST, WHOLE, compare_detections, detect_held_out
from peft_combo.metrics.detection import match_sets
from peft_combo.recipe.files import write_recipe
from peft_combo.recipe.model import DataConfig, Recipe
from peft_combo.recommender.bundle_detection import BundleDetector, Grouping, _solve
from peft_combo.recommender.fit_data import FitData
from peft_combo.recommender.pair_columns import PairReader
from peft_combo.recommender.recommender import BundleRecommender
from peft_combo.recommender.requests import answer, answer_file, parse_request
from peft_combo.recommender.text_ranking import TextViews
from peft_combo.recommender.text_ranking.columns import standardize_columns
from peft_combo.store.adapter_store import AdapterStore


@pytest.fixture
def dataset(tiny_recipe: Callable[..., Recipe]) -> Dataset:
    return add_sessions(open_dataset(tiny_recipe().data))


@pytest.fixture
def parts(dataset: Dataset) -> Split:
    return split(dataset, "user", 0.2, 0.3)


def know(dataset: Dataset, parts: Split) -> FitData:
    return FitData.of(dataset, parts.train, parts.train_interactions, None, {})


def sets(*texts: str) -> list[frozenset[int]]:
    return [frozenset(map(int, text)) for text in texts]


@pytest.mark.parametrize(
    ("predicted", "true", "precision", "recall", "coverage", "jaccard", "agreement"),
    [
        (["012", "34"], ["34", "012"], 1, 1, (1, 1), 1, 1),
        (["01"], ["0123", "45"], 1, 1 / 2, (1 / 2,), 1 / 4, 2 * 0.25 * 0.5 / 0.75),
        # Inside two true sets: the smaller one says how much of it was found, and both are found.
        (["01"], ["0123", "012"], 1, 1, (2 / 3,), (1 / 2 + 2 / 3) / 2, 2 * (7 / 12) * (2 / 3) / (7 / 12 + 2 / 3)),
        (["0123"], ["01", "23"], 0, 0, (), 1 / 2, 1 / 2),
        (["01", "02", "45"], ["012"], 2 / 3, 1, (2 / 3, 2 / 3), 2 / 3, 2 * (2 / 3) * (4 / 9) / (2 / 3 + 4 / 9)),
        ([], ["01"], 0, 0, (), 0, 0),
    ],
)
def test_sets_are_measured_as_by_hand(
    predicted: list[str], true: list[str], precision: float, recall: float, coverage: tuple[float, ...],
    jaccard: float, agreement: float,
) -> None:  # fmt: skip
    found = match_sets(sets(*predicted), sets(*true))
    assert (found.precision, found.recall) == pytest.approx((precision, recall))
    assert found.coverage == pytest.approx(coverage)
    assert (found.jaccard, found.agreement) == pytest.approx((jaccard, agreement))


def test_nothing_to_find_and_empty_sets_are_refused() -> None:
    for predicted, true in (([], []), ([frozenset[int]()], sets("01")), (sets("01"), [frozenset[int]()])):
        with pytest.raises(ValueError, match="none empty"):
            match_sets(predicted, true)


def square(size: int, pairs: dict[str, float], rest: float = 0.1) -> Any:
    together = np.full((size, size), rest)
    for pair, value in pairs.items():
        left, right = map(int, pair)
        together[left, right] = together[right, left] = value
    return together


def test_pairs_become_groups_by_the_mean_or_the_least_of_them() -> None:
    chain = square(5, {"01": 0.9, "12": 0.9, "02": 0.4, "34": 0.8})
    # 2 joins 0 and 1 at the mean of .9 and .4, or at the least of them.
    assert set(Grouping("average", 0.6).group(chain)) == set(sets("012", "34"))
    assert set(Grouping("complete", 0.6).group(chain)) >= set(sets("34"))
    assert sorted(map(len, Grouping("complete", 0.6).group(chain))) == [2, 2]
    assert Grouping("average", 0.85).group(chain)[0] in sets("01", "12")


def test_the_surest_pair_is_left_where_nothing_is_sure_enough() -> None:
    together = square(4, {"13": 0.3})
    np.fill_diagonal(together, 1.0)
    assert Grouping("average", 0.9).group(together) == sets("13")
    assert Grouping("complete", 0.9).group(square(2, {"01": 0.01})) == sets("01")


def test_pairs_of_a_session_are_told_by_its_bundles() -> None:
    one = LabelledSession(np.array([7, 3, 9, 5]), (frozenset({7, 9}), frozenset({9, 5})), "u", frozenset("u"))
    expected = np.zeros((4, 4), bool)
    for left, right in ((0, 2), (2, 3)):
        expected[left, right] = expected[right, left] = True
    np.testing.assert_array_equal(one.tell_pairs(), expected)
    assert one.find_places(frozenset({9, 7})) == {0, 2}


def test_a_user_is_on_one_side_with_every_session(dataset: Dataset, parts: Split) -> None:
    users = {part: {one.group for one in list_sessions(dataset, parts, part)} for part in ("train", "valid", "test")}
    groups = dataset.bundles.groups
    assert users["valid"] <= {groups[row] for row in parts.valid}
    assert users["test"] <= {groups[row] for row in parts.test}
    held_out = {groups[row] for row in (*parts.valid, *parts.test, *parts.dropped)}
    assert users["train"] == set(groups) - held_out
    assert not users["train"] & (users["valid"] | users["test"])
    assert len(list_sessions(dataset, None, "train")) == len(set(groups))


def test_a_second_session_of_a_held_out_user_is_not_learned_from(dataset: Dataset, parts: Split) -> None:
    assert dataset.sessions is not None
    bundles, own = dataset.bundles, dataset.sessions
    seen = bundles.bundle_ids[parts.train[0]]
    held_out = bundles.groups[parts.test[0]]
    # The user of a test bundle has a session whose only bundle is a training one, and one over both parts.
    more = Sessions(
        (*own.session_ids, "second", "over both"), (*own.items, np.arange(9), np.arange(60)),
        (*own.bundle_ids, (seen,), (seen, bundles.bundle_ids[parts.test[0]])), (*own.owners, held_out, None),
    )  # fmt: skip
    for part in ("train", "valid", "test"):
        before, after = (list_sessions(data, parts, part) for data in (dataset, replace(dataset, sessions=more)))
        assert len(before) == len(after)


def test_answers_of_held_out_sessions_change_nothing_that_is_learned(dataset: Dataset, parts: Split) -> None:
    assert dataset.sessions is not None
    known = know(dataset, parts)
    users = {one.group for one in list_sessions(dataset, parts, "train")}
    own = dataset.sessions
    made = tuple(ids if owner in users else ids[:1] for ids, owner in zip(own.bundle_ids, own.owners, strict=True))
    items = tuple(rows if owner in users else rows[::-1] for rows, owner in zip(own.items, own.owners, strict=True))
    changed = replace(dataset, sessions=replace(own, bundle_ids=made, items=items))
    first, second = BundleDetector.fit(known, dataset, parts), BundleDetector.fit(known, changed, parts)
    np.testing.assert_array_equal(first.weights, second.weights)
    assert first.groupings == second.groupings


def test_a_session_is_not_told_by_its_own_bundles(dataset: Dataset) -> None:
    everything = FitData.of(dataset, None, None, None, {})
    reader = PairReader.of(everything.text_views, everything.history, everything.groups)
    column = reader.names.index("bundles with both")
    rows = dataset.bundles.items[0].astype(np.int64)
    counts = dataset.bundles.to_csr(len(dataset.catalog)).toarray()[:, rows]
    others = np.array([group != dataset.bundles.groups[0] for group in dataset.bundles.groups])
    left, right = np.triu_indices(len(rows), 1)
    for left_out, seen in (((), others | True), ((dataset.bundles.groups[0],), others)):
        expected = np.log1p((counts[seen].T @ counts[seen])[left, right])
        np.testing.assert_allclose(reader.read(rows, left_out)[:, column], expected, rtol=1e-6)


def test_columns_have_names_and_are_the_same_whatever_the_order(dataset: Dataset) -> None:
    frozen = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    views = TextViews.of(dataset.catalog, dataset.text_template, frozen)
    reader = PairReader.of(views, dataset.bundles.to_csr(60), dataset.bundles.groups)
    columns = reader.read(np.array([3, 9, 4, 50]))
    assert columns.shape == (6, len(reader.names))
    assert len(set(reader.names)) == len(reader.names)
    assert np.isfinite(columns).all()
    assert np.isfinite(reader.read(np.array([3, 9]))).all()
    turned = reader.read(np.array([50, 4, 9, 3]))  # the same pairs in another order
    np.testing.assert_allclose(columns, turned[[5, 4, 2, 3, 1, 0]], atol=1e-5)


def test_sessions_are_made_up_of_bundles_and_noise(dataset: Dataset) -> None:
    bundles = dataset.bundles
    made = make_up_sessions(dataset.catalog, bundles.items, bundles.groups, 200, seed=3)
    known = {frozenset(rows.tolist()): group for rows, group in zip(bundles.items, bundles.groups, strict=True)}
    assert {min(len(one.bundles), 4) for one in made} == {1, 2, 3}
    for one in made:
        assert set(one.bundles) <= known.keys()
        assert frozenset().union(*one.bundles) <= set(one.items.tolist())
        assert len(set(one.items.tolist())) == len(one.items)
        assert one.group in one.left_out
    noise = sum(len(set(one.items.tolist()) - frozenset().union(*one.bundles)) for one in made)
    assert 100 < noise < 400
    assert make_up_sessions(dataset.catalog, [], [], 10, seed=0) == []


@pytest.mark.parametrize("alone", [False, True])
def test_bundles_of_two_styles_are_told_apart(dataset: Dataset, parts: Split, alone: bool) -> None:
    detector = BundleDetector.fit(know(dataset, parts), dataset, parts, alone=alone)
    # A number names its style by what it leaves over six.
    found = detector.detect(np.array([0, 7, 6, 13, 12]))
    assert {frozenset(one.rows) for one in found} == {frozenset({0, 6, 12}), frozenset({7, 13})}
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found:
        assert one.score == pytest.approx(np.mean(one.belongs))
        assert all(0 <= share <= 1 for share in one.belongs)
    assert next(one for one in found if 0 in one.rows).rows == (0, 6, 12), "in the order given"


def test_pairs_are_weighed_by_the_logistic_regression_of_scikit_learn() -> None:
    """Same penalty, constant without one, a session as much as the root of its pairs: to a thousandth."""
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(size, 4)) * [1, 2, 3, 4]).astype(np.float32) for size in (3, 6, 10, 15) * 20]
    labels = [rng.uniform(size=len(own)) < 1 / (1 + np.exp(2 - own @ [1, -0.5, 0.2, 0])) for own in pairs]
    centre, spread, weights, offset = _solve(pairs, labels)
    theirs = LogisticRegression(C=0.03, tol=1e-9, max_iter=1000).fit(
        standardize_columns(np.concatenate(pairs), centre, spread), np.concatenate(labels),
        sample_weight=np.concatenate([np.full(len(own), len(own) ** -0.5) for own in pairs]),
    )  # fmt: skip
    np.testing.assert_allclose([*weights, offset], [*theirs.coef_[0], theirs.intercept_[0]], atol=1e-3)


def test_real_sessions_are_learned_from_where_there_are_enough(dataset: Dataset, parts: Split) -> None:
    known = know(dataset, parts)
    assert BundleDetector.fit(known, dataset, parts).source == "1,000 sessions made of bundles"
    assert BundleDetector.fit(FitData.of(dataset, None, None, None, {}), dataset, None).source == "30 sessions"


def test_what_cannot_be_told_apart_is_refused(dataset: Dataset) -> None:
    one = replace(dataset, bundles=dataset.bundles.take([0]), sessions=None)
    with pytest.raises(DataError, match="too few bundles"):
        BundleDetector.fit(FitData.of(replace(one, bundles=one.bundles.take([])), None, None, None, {}), one, None)


def test_held_out_sessions_are_measured_beside_baselines(dataset: Dataset, parts: Split) -> None:
    found = detect_held_out(dataset, parts, know(dataset, parts), "valid")
    report = compare_detections([found], "validation")
    sessions = list_sessions(dataset, parts, "valid")
    assert (report.sessions, report.bundles) == (len(sessions), sum(len(one.bundles) for one in sessions))
    whole, first = report.row(WHOLE), report.rows[0]
    matches = [match_sets([frozenset(one.items.tolist())], one.bundles) for one in sessions]
    assert whole.values["jaccard"] == pytest.approx(np.mean([one.jaccard for one in matches]))
    assert whole.values["precision"] == pytest.approx(np.mean([one.precision for one in matches]))
    assert (whole.predicted, report.row(CLOSEST).predicted) == (1.0, 1.0)
    assert first.values["agreement"] > max(whole.values["agreement"], report.row(CLOSEST).values["agreement"])
    assert first.p is None
    assert report.row(ALONE).p is not None
    for row in report.rows:
        for value, (low, high) in row.intervals.items():
            assert low - 1e-9 <= row.values[value] <= high + 1e-9
    assert json.loads(json.dumps(report.to_json()))["rows"][0]["name"] == "detector"
    with pytest.raises(KeyError):
        report.row("nobody")


def test_a_dataset_without_sessions_is_told_so(dataset: Dataset, parts: Split) -> None:
    with pytest.raises(PeftComboError, match=r"has no sessions .* session_item\.csv"):
        detect_held_out(replace(dataset, sessions=None), parts, know(dataset, parts))


@pytest.fixture
def shop(tiny_recipe: Callable[..., Recipe], dataset: Dataset) -> BundleRecommender:
    recipe = tiny_recipe()
    bank = AdapterBank(Backbone.load(recipe.backbone.model, max_length=16), AdapterStore(recipe.store))
    return BundleRecommender.fit(dataset, split(dataset), bank, None)


def test_a_recommender_detects_bundles_and_refuses_what_is_no_session(shop: BundleRecommender, tmp_path: Path) -> None:
    found = shop.detect_bundles(["i0", "i7", "i6", "i13", "i0"])
    assert {one.items for one in found} == {("i0", "i6"), ("i7", "i13")}
    assert found[0].titles[0] == shop.dataset.catalog.titles[int(found[0].items[0][1:])]
    assert found[0].price is None
    assert shop.detect_bundles(["i0", "i7", "i6", "i13"], k=1) == found[:1]
    assert answer(shop, parse_request({"session": ["i0", "i7", "i6", "i13"]})) == found
    assert shop.detect_bundles(["i0", "i7", "i6", "i13"], sure=True)
    for items, expected in (
        (["i0", "i1x"], 'No item "i1x" .* Did you mean "i1'),
        (["i0"], "two different items or more, found i0"),
        (["i0", "i0"], "two different items or more, found i0, i0"),
        ([], "two different items or more, found none"),
    ):
        with pytest.raises(DataError, match=expected):
            shop.detect_bundles(items)
    with pytest.raises(DataError, match="k: expected at least 1"):
        shop.detect_bundles(["i0", "i1"], k=0)

    source = tmp_path / "in.jsonl"
    source.write_text('{"id": 1, "session": ["i0", "i7", "i6"]}\n{"session": ["i0"]}\n{"items": ["i0"], "k": 1}\n')
    for target in (tmp_path / "out.jsonl", tmp_path / "out.parquet"):
        done = answer_file(shop, source, target)
        assert list(done.errors) == [2]
        assert done.fault is None
    results = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["results"]
    assert results[0]["items"] == ["i0", "i6"]


@pytest.mark.parametrize(
    ("beside", "named"),
    [({"items": ["F1"]}, "items"), ({"user": "u"}, "user"), ({"budget": 9.0, "single": True}, "single, budget"),
     ({"query": "dress"}, "query"), ({"explain": True}, "explain")],
)  # fmt: skip
def test_a_session_goes_with_nothing_else(beside: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError, match=f"does not go with {named}"):
        parse_request({"session": ["F1", "F2"], **beside})
    parse_request({"session": ["F1", "F2"], "k": 3, "id": "a", "single": False, "sure": True})
    with pytest.raises(DataError, match="sure: it is for the bundles of a session"):
        parse_request({"items": ["F1"], "sure": True})


def write_bundlerec_shop(folder: Path, dataset: Dataset) -> Path:
    """Write a dataset with sessions in the BundleRec layout."""
    folder.mkdir()
    catalog, bundles, sessions = dataset.catalog, dataset.bundles, dataset.sessions
    assert sessions is not None
    ids = catalog.item_ids
    owned = list(zip(bundles.bundle_ids, bundles.owners, bundles.items, strict=True))
    tables: dict[str, list[tuple[object, ...]]] = {
        "item_titles,item ID,titles": [(ids[row], title) for row, title in enumerate(catalog.titles)],
        "item_categories,item ID,categories": [
            (ids[row], f"[[{path[0]}]]") for row, path in enumerate(catalog.categories)
        ],
        "bundle_item,bundle ID,item ID": [(name, ids[row]) for name, _, rows in owned for row in rows],
        "bundle_intent,bundle ID,intent": [(name, "w10") for name, _, _ in owned],
        "user_bundle,user ID,bundle ID,timestamp": [(owner, name, 1_400_000_000) for name, owner, _ in owned],
        "user_item,user ID,item ID,timestamp": [(o, ids[row], 1_400_000_000) for _, o, rows in owned for row in rows],
        "session_item,session ID,item ID": [
            (name, item) for name, rows in zip(sessions.session_ids, sessions.items, strict=True)
            for item in (*(ids[row] for row in rows), "untitled")
        ],
        "session_bundle,session ID,bundle ID": [
            (name, one) for name, own in zip(sessions.session_ids, sessions.bundle_ids, strict=True) for one in own
        ],
        "user_session,user ID,session ID": list(zip(sessions.owners, sessions.session_ids, strict=True)),
    }  # fmt: skip
    for head, rows in tables.items():
        name, *columns = head.split(",")
        lines = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_sessions_of_the_bundlerec_layout_are_read_and_filtered(dataset: Dataset, tmp_path: Path) -> None:
    folder = write_bundlerec_shop(tmp_path / "toys", dataset)
    read = open_dataset(DataConfig(source="bundlerec", path=str(folder)))
    assert read.sessions is not None
    assert dataset.sessions is not None
    assert (read.sessions.owners, read.sessions.bundle_ids) == (dataset.sessions.owners, dataset.sessions.bundle_ids)
    for mine, theirs in zip(read.sessions.items, dataset.sessions.items, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    narrow = open_dataset(DataConfig(source="bundlerec", path=str(folder), category_filter="Style 1"))
    assert narrow.sessions is not None
    for mine, theirs in zip(narrow.sessions.items, dataset.sessions.items, strict=True):
        kept = [f"i{row}" for row in theirs.tolist() if row % 3 == 1]
        assert [narrow.catalog.item_ids[row] for row in mine] == kept
    for name in ("session_item", "session_bundle", "user_session"):
        (folder / f"{name}.csv").unlink()
        if name != "user_session":
            with pytest.raises(DataError, match=f"{name}.csv: is missing"):
                open_dataset(DataConfig(source="bundlerec", path=str(folder)))
    without = open_dataset(DataConfig(source="bundlerec", path=str(folder)))
    assert without.sessions is None
    assert without.digest == read.digest, "no scorer learns from sessions"


def test_the_commands_detect_and_measure(
    shell: Callable[..., tuple[int, str, str]], tiny_recipe: Callable[..., Recipe], dataset: Dataset, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    folder = write_bundlerec_shop(tmp_path / "toys", dataset)
    recipe = tiny_recipe(**{"data.source": "bundlerec", "data.path": str(folder), "data.split": "user"})
    write_recipe(recipe, tmp_path / "tiny.yaml")
    ask = ("recommend", "--recipe", "./tiny.yaml", "--frozen", "--session")
    code, out, _ = shell(*ask, "i0,i7,i6,i13")
    assert code == 0
    assert out.count(" items") == 2
    assert "score" not in out
    assert "i13" in out
    code, out, _ = shell(*ask, "i0,i7,i6,i13", "-k", "1", "--json")
    assert [len(one["items"]) for one in json.loads(out)] == [2]
    code, _, err = shell(*ask, "i0,i7", "--budget", "9")
    assert code != 0
    assert "does not go with budget" in err
    code, _, err = shell(*ask, "i0")
    assert code != 0
    assert "two different items" in err

    code, out, _ = shell("evaluate", "--recipe", "./tiny.yaml", "--sessions")
    assert code == 0
    assert "closest pair by TF-IDF" in out
    assert "all items as one bundle" in out
    code, out, _ = shell("evaluate", "--recipe", "./tiny.yaml", "--sessions", "--json")
    detection = json.loads(out)["detection"]
    assert detection["part"] == "test"
    assert {"precision", "recall", "coverage", "jaccard", "agreement"} == set(detection["rows"][0]["values"])
    (folder / "session_item.csv").unlink(), (folder / "session_bundle.csv").unlink()
    (folder / "user_session.csv").unlink()
    code, _, err = shell("evaluate", "--recipe", "./tiny.yaml", "--sessions")
    assert code != 0
    assert "has no sessions" in err


@pytest.mark.parametrize("category", ["clothing", "electronic"])
def test_real_sessions(category: str) -> None:
    dataset = open_dataset(DataConfig(source="bundlerec", path=str(shared_data(f"bundlerec/{category}"))))
    parts = split(dataset, "user", seed=60)
    found = {part: list_sessions(dataset, parts, part) for part in ("train", "valid", "test")}
    assert len(found["train"]) > 6 * len(found["valid"])
    users = {part: {one.group for one in own} for part, own in found.items()}
    assert not users["train"] & users["valid"]
    assert not users["train"] & users["test"]
    assert not users["valid"] & users["test"]
    seen = {dataset.bundles.groups[row] for row in parts.train}
    for part in ("valid", "test"):
        assert not users[part] & seen
    for one in found["valid"]:
        assert all(bundle <= set(one.items.tolist()) and len(bundle) > 1 for bundle in one.bundles)
