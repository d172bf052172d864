"""The recommender end to end over a tiny encoder and shop: ids in, bundles out, nothing chosen on test bundles."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_combo.data.labels.tags import Entity
from peft_combo.data.model import Bundles, Dataset, Interactions
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import Split, split
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.vectors import VectorCache
from peft_combo.errors import DataError
from peft_combo.recipe.model import Recipe
from peft_combo.recommender import fit_state
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.composing.options import ModeWeights, ObjectiveWeights, Options
from peft_combo.recommender.fusion import Fusion
from peft_combo.recommender.live_catalog import DESCRIBED, TITLE, LiveItem, VectorBuffers, extend_recommender
from peft_combo.recommender.persistence import load_or_fit, load_recommender, save_recommender
from peft_combo.recommender.query import parse_query
from peft_combo.recommender.query_items import match_items
from peft_combo.recommender.recommender import BundleRecommender
from peft_combo.recommender.results import Recommendation, Suggestion
from peft_combo.recommender.scorer_id import ENSEMBLE, ScorerId
from peft_combo.recommender.text_search import WORDS, TextSearch
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.loop import tune


@pytest.fixture
def bank(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> AdapterBank:
    recipe = tiny_recipe(**{"training.epochs": 6})
    tune(recipe, run_folder=tmp_path / "run")
    return AdapterBank(Backbone.load(recipe.backbone.model, max_length=16), AdapterStore(recipe.store))


@pytest.fixture
def dataset(tiny_recipe: Callable[..., Recipe]) -> Dataset:
    """The tiny shop, where every user bought the items of their own bundles."""
    shop = open_dataset(tiny_recipe().data)
    users = sorted({owner for owner in shop.bundles.owners if owner})
    pairs = [
        (users.index(owner), row)
        for owner, rows in zip(shop.bundles.owners, shop.bundles.items, strict=True)
        if owner is not None
        for row in rows
    ]
    bought = Interactions.build(users, [u for u, _ in pairs], [r for _, r in pairs], times=np.arange(len(pairs)))
    return Dataset.build("tiny", shop.catalog, bought, shop.bundles)


@pytest.fixture
def parts(dataset: Dataset) -> Split:
    return split(dataset)


@pytest.fixture
def fitted(dataset: Dataset, parts: Split, bank: AdapterBank, tmp_path: Path) -> BundleRecommender:
    return BundleRecommender.fit(dataset, parts, bank, "tiny", cache=VectorCache(tmp_path / "vectors"))


def test_completion_leaves_the_context_out_and_adds_up(fitted: BundleRecommender) -> None:
    found = fitted.complete(["i0", "i6"], k=8)
    assert len(found) == 8
    assert not {"i0", "i6"} & {one.item_id for one in found}
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found:
        assert sum(one.shares.values()) == pytest.approx(one.score, abs=1e-3)
    # Items of one style go together, and a number names its style by what it leaves over six.
    assert sum(int(one.item_id[1:]) % 6 == 0 for one in found) >= 5


def test_counts_of_the_evidence_are_those_of_the_bundles(fitted: BundleRecommender, dataset: Dataset) -> None:
    ids = dataset.catalog.item_ids
    for one in fitted.complete(["i0"], k=20):
        held = sum({"i0", one.item_id} <= {ids[row] for row in rows} for rows in dataset.bundles.items)
        assert one.together == ({"i0": held} if held else {})


def test_bundles_hold_what_was_given_and_come_out_the_same_again(fitted: BundleRecommender) -> None:
    first = fitted.compose(["i0"])
    assert first == fitted.compose(["i0"])
    for bundle in first:
        assert "i0" in bundle.items
        assert set(bundle.added) == set(bundle.items) - {"i0"}
        assert sum(bundle.parts.values()) == pytest.approx(bundle.score)
        assert [entry["item"] for entry in bundle.evidence] == [i for i in bundle.items if i in bundle.added]
    assert len({frozenset(bundle.items) for bundle in first}) == len(first)


def test_a_user_and_a_text_are_enough(fitted: BundleRecommender, dataset: Dataset) -> None:
    assert fitted.compose(user="u1")
    assert fitted.complete(user="u1", k=3)
    title = dataset.catalog.titles[7]
    assert [item for item, _ in fitted.search(title, k=1)] == ["i7"]
    assert fitted.compose(query=title)


def test_where_items_are_many_an_index_answers_and_filters_come_first(
    fitted: BundleRecommender, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    monkeypatch.setattr("peft_combo.encoder.index.EXACT_ROWS", 10)
    monkeypatch.setattr("peft_combo.recommender.text_search._DEPTH", 12)
    large = replace(fitted.state, search=fitted.state.search.with_indexes())
    assert large.search.nearest.keys() == large.search.weights.keys() - {WORDS}
    many = BundleRecommender(dataset, fitted.bank, large, composer=fitted.composer, like=fitted)
    monkeypatch.setattr(TextSearch, "score_items", None)  # all items are never scored
    title = dataset.catalog.titles[7]
    best = [item for item, _ in many.search(title, k=3)]
    monkeypatch.undo()
    assert best == [item for item, _ in fitted.search(title, k=3)]
    asks: list[Callable[[BundleRecommender], list[Suggestion]]] = [
        lambda one: one.complete(query=title, k=3),
        lambda one: one.complete(query=title, k=3, exclude=best),
        lambda one: one.complete(query=title, k=3, constraints=Constraints(exclude_items=tuple(range(20)))),
        lambda one: one.replace([best[0]], best[0], k=3, exclude=best[1:]),
    ]
    for ask in asks:
        found, expected = ask(many), ask(fitted)
        assert [one.item_id for one in found] == [one.item_id for one in expected]
        assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-4)
    text, names = "w45 of late", [*fitted.state.known.tuned]
    vectors = {name: fitted.bank.encode([text], name)[0] for name in names}
    vectors |= dict.fromkeys((TITLE, DESCRIBED), fitted.bank.encode([text], None)[0])
    monkeypatch.setattr("peft_combo.recommender.text_search._DEPTH", 12)
    found, expected = (
        extend_recommender(one, [LiveItem("late", text, vectors=vectors)], best[:1], VectorBuffers()).complete(
            query=f"{text} {title}", k=5
        )
        for one in (many, fitted)
    )  # fmt: skip
    assert [one.item_id for one in found] == [one.item_id for one in expected]
    assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-4)
    assert "late" in {one.item_id for one in found}
    assert best[0] not in {one.item_id for one in found}


def test_each_kind_of_request_has_its_weights(fitted: BundleRecommender) -> None:
    relevant = ObjectiveWeights(compatibility=0, slots=0, agreement=0, redundancy=0)
    kinds = ModeWeights(*(replace(relevant, relevance=weight) for weight in (1, 2, 3, 4)))
    other = BundleRecommender(fitted.dataset, fitted.bank, replace(fitted.state, weights=kinds))

    def relevance(**asked: Any) -> float:
        options = Options(k=1, weights=asked.pop("weights", None))
        return other.compose(options=options, **asked)[0].parts["relevance"]

    title = fitted.dataset.catalog.titles[7]
    plain = {"weights": relevant}
    assert relevance(query=title) == pytest.approx(relevance(query=title, **plain))
    assert relevance(user="u1") == pytest.approx(2 * relevance(user="u1", **plain))
    assert relevance(items=["i0", "i6"]) == pytest.approx(3 * relevance(items=["i0", "i6"], **plain))
    assert relevance(items=["i0"], query=title) == pytest.approx(4 * relevance(items=["i0"], query=title, **plain))
    # Nothing but the text of a query says what is relevant, so something else must say what goes together.
    assert min(fitted.state.weights.query.compatibility, fitted.state.weights.user.compatibility) > 0


def test_given_bundles_are_ranked_by_how_well_they_go_together(fitted: BundleRecommender) -> None:
    ranked = fitted.rank([["i0", "i1"], ["i0", "i6"]])
    assert {bundle.items for bundle in ranked} == {("i0", "i1"), ("i0", "i6")} or len(ranked) == 2
    assert set(ranked[0].items) == {"i0", "i6"}


def test_bundles_are_found_by_a_text(fitted: BundleRecommender, dataset: Dataset) -> None:
    titles, known = dataset.catalog.titles, dataset.bundles
    rows = known.items[3]
    found = fitted.search_bundles(" ".join(titles[row] for row in rows), k=3)
    assert len(found) == 3
    assert set(found[0].items) == {dataset.catalog.item_ids[row] for row in rows}
    assert found[0].bundle_id in known.bundle_ids
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    # Given bundles score as they do among those that are known.
    (alone,) = fitted.search_bundles(" ".join(titles[row] for row in rows), bundles=[found[0].items])
    assert (alone.bundle_id, alone.titles) == (None, found[0].titles)
    assert alone.score == pytest.approx(found[0].score, abs=1e-3)
    given = [["i1", "i2"], ["i7", "i8"], ["i3", "i4"]]
    assert fitted.search_bundles(titles[7], bundles=given)[0].items == ("i7", "i8")
    assert fitted.rank(given, query=titles[7])[0].parts["relevance"] == max(
        one.parts["relevance"] for one in fitted.rank(given, query=titles[7])
    )
    for ask in (lambda: fitted.search_bundles(" "), lambda: fitted.rank(given, query=""), lambda: fitted.search("")):
        with pytest.raises(DataError, match="query is empty"):
            ask()
    with pytest.raises(DataError, match="found an empty one"):
        fitted.search_bundles("w10", bundles=[[]])


def test_constraints_hold(fitted: BundleRecommender) -> None:
    only = Constraints(categories=("Style 1",))
    assert all(int(one.item_id[1:]) % 3 == 1 for one in fitted.complete(["i0"], constraints=only))
    with pytest.raises(DataError, match="udget"):
        fitted.compose(["i0"], constraints=Constraints(budget=5))  # no item has a known price


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda r: r.complete(["i61"]), 'No item "i61" among the 60'),
        (lambda r: r.complete(user="u99"), 'No user "u99" among the 30'),
        (lambda r: r.complete(), "give items or a user"),
        (lambda r: r.compose(), "give items, a user or a query"),
        (lambda r: r.compose(["i0"], required=["hats"]), "hats"),
    ],
)
def test_what_is_not_known_is_said(
    ask: Callable[[BundleRecommender], object], expected: str, fitted: BundleRecommender
) -> None:
    with pytest.raises(DataError, match=expected):
        ask(fitted)


def test_test_bundles_choose_nothing(
    fitted: BundleRecommender, dataset: Dataset, parts: Split, bank: AdapterBank
) -> None:
    """Other test bundles leave the weights of the fusion, and the table behind them, as they were."""
    items = list(dataset.bundles.items)
    for row in parts.test:
        items[row] = np.array([0, 1, 2], np.int32)
    changed = replace(dataset, bundles=replace(dataset.bundles, items=tuple(items)))
    assert isinstance(changed.bundles, Bundles)
    again = BundleRecommender.fit(changed, parts, bank, "tiny")
    assert again.state.fusion.state() == fitted.state.fusion.state()


def test_without_an_adapter_the_frozen_encoder_answers(dataset: Dataset, parts: Split, bank: AdapterBank) -> None:
    frozen = BundleRecommender.fit(dataset, parts, bank, None)
    assert frozen.state.adapters == ()
    assert frozen.complete(["i0"], k=3)


def test_each_given_item_is_credited_with_what_is_lost_without_it(fitted: BundleRecommender) -> None:
    (first, *_) = fitted.complete(["i0", "i6", "i1"], k=2, explain=True)
    assert set(first.because) <= {"i0", "i6", "i1"}
    without = {one.item_id: one.score for one in fitted.complete(["i0", "i6"], k=60)}
    assert first.because["i1"] == pytest.approx(first.score - without[first.item_id], abs=1e-4)
    assert fitted.complete(["i0"], k=1, explain=True)[0].because == {}


def test_each_item_of_a_bundle_is_credited_with_what_is_lost_without_it(fitted: BundleRecommender) -> None:
    bundle = next(one for one in fitted.compose(["i0", "i6"], explain=True) if len(one.items) > 2)
    index = fitted.dataset.catalog.index
    for told in bundle.evidence:
        assert set(told["because"]) == set(bundle.items) - {told["item"]}
        rest = np.array([index[item] for item in bundle.items if item != told["item"]])
        less = np.array([row for row in rest if row != index["i6"]])
        with_it, without = fitted._scorer.score_beside([rest, less], np.array([index[told["item"]]]))[:, 0]
        assert told["because"]["i6"] == pytest.approx(with_it - without, abs=1e-5)
        assert set(told["scorers"]) <= {*map(str, fitted.state.fusion.needs), "users alike"}
    assert all("because" not in told for one in fitted.compose(["i0"]) for told in one.evidence)


@pytest.fixture
def several(tiny_recipe: Callable[..., Recipe], bank: AdapterBank, tmp_path: Path) -> AdapterBank:
    """The bank with an adapter for Style 1 beside the one for everything."""
    recipe = tiny_recipe(**{"category": "style1", "data.category_filter": "Style 1", "training.epochs": 3})
    tune(recipe, run_folder=tmp_path / "run1")
    return bank


def test_adapters_of_categories_answer_together(
    dataset: Dataset, parts: Split, several: AdapterBank, tmp_path: Path
) -> None:
    shop = BundleRecommender.fit(dataset, parts, several, ["tiny", "style1"], cache=VectorCache(tmp_path / "vectors"))
    table = {line.name for line in shop.state.fusion.table}
    assert {"tuned by category", "tuned BERT tiny@v1", "tuned BERT style1@v1"} <= table
    assert len(shop.complete(["i0", "i1"], k=5)) == 5
    assert shop.compose(["i1"])


@pytest.mark.parametrize("adapters", [None, "tiny", ["tiny", "style1"]])
def test_a_kept_recommender_answers_as_before(
    adapters: str | list[str] | None, dataset: Dataset, parts: Split, several: AdapterBank, tmp_path: Path
) -> None:
    answers_as_before(BundleRecommender.fit(dataset, parts, several, adapters), tmp_path)


def answers_as_before(made: BundleRecommender, tmp_path: Path) -> None:
    save_recommender(made, tmp_path / "kept")
    again = load_recommender(tmp_path / "kept", made.dataset, made.bank)
    assert again.state.fusion == made.state.fusion
    assert again.state.settings == made.state.settings
    for ask in ({"items": ["i0", "i6"]}, {"user": "u3"}):
        assert again.complete(**ask, k=20) == made.complete(**ask, k=20)
        assert again.compose(**ask) == made.compose(**ask)
    assert again.search("w10 w45", k=20) == made.search("w10 w45", k=20)
    assert again.search_bundles("w10 w45", k=20) == made.search_bundles("w10 w45", k=20)
    save_recommender(again, tmp_path / "kept")  # over itself
    assert load_recommender(tmp_path / "kept", made.dataset, made.bank).state.fusion == made.state.fusion
    assert [path.name for path in tmp_path.glob(".kept*")] == []


class OfThese:
    """In place of `Fusion` where one is fitted: what must be kept is not what happens to win."""

    @staticmethod
    def fit(scores: Mapping[ScorerId, object], *rest: object, **options: object) -> Fusion[ScorerId]:
        chosen = [scorer for scorer in scores if scorer.kind in ("ensemble", "rated")]
        return Fusion("z", {scorer: {"always": 1.0} for scorer in chosen}, {}, "these")


def test_ensembles_and_ratings_are_served_and_kept(
    tiny_recipe: Callable[..., Recipe], dataset: Dataset, parts: Split, bank: AdapterBank, tiny_shop: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "rated"
    shutil.copytree(tiny_shop, folder)
    bought = dataset.interactions
    assert bought is not None
    rows = zip(bought.users, bought.items, bought.times, strict=True)
    lines = [f"{bought.user_ids[user]},i{item},{time}" for user, item, time in rows]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
    rating = {"category": "rated", "data.path": str(folder), "task": {"kind": "rating", "neighbours": 5}}
    for name, changes in (("rated", rating), ("second", {"category": "second", "seed": 1})):
        tune(tiny_recipe("head", **{**changes, "training.epochs": 1}), run_folder=tmp_path / name)
    monkeypatch.setattr(fit_state, "select_text_scorer", lambda picked: ENSEMBLE)
    monkeypatch.setattr(fit_state, "Fusion", OfThese)
    made = BundleRecommender.fit(dataset, parts, bank, ["tiny", "second", "rated"])
    assert made.state.fusion.needs == (ENSEMBLE, ScorerId("rated", "rated@v1"))
    assert made.state.settings.keys() == set(made.state.fusion.needs)
    assert not any(note.startswith("Rating adapter") for note in made.state.notes)
    answers_as_before(made, tmp_path)
    # An owner's past speaks: it is not the stranger's answer.
    assert made.complete(["i0"], user="u3", k=20) != made.complete(["i0"], k=20)
    other = BundleRecommender.fit(dataset, split(dataset, seed=1), bank, ["tiny", "second", "rated"])
    assert any(note.startswith("Rating adapter rated@v1 may have learned") for note in other.state.notes)


def test_a_kept_recommender_is_refused_for_other_data_or_altered_bytes(
    dataset: Dataset, parts: Split, bank: AdapterBank, fitted: BundleRecommender, tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    save_recommender(fitted, folder)
    other = Dataset.build("tiny", dataset.catalog, None, dataset.bundles)
    with pytest.raises(DataError, match="was fitted on data with digest"):
        load_recommender(folder, other, bank)
    scorer = next(folder.glob("*.safetensors"))
    content = scorer.read_bytes()
    scorer.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="was altered since it was written"):
        load_recommender(folder, dataset, bank)
    scorer.write_bytes(content)
    manifest = folder / "recommender.json"
    said = manifest.read_text()
    for text in ("", "[]", "{}", said[:-20], said.replace("scorer-0.safetensors", "../../x.safetensors"), "[" * 10**5):
        manifest.write_text(text)
        with pytest.raises(DataError, match=r"damaged|format"):
            load_recommender(folder, dataset, bank)
    manifest.write_text(said.replace('"format": 4', '"format": 1'))
    with pytest.raises(DataError, match="has format 1, expected 4"):
        load_recommender(folder, dataset, bank)
    manifest.write_text(said)
    assert load_recommender(folder, dataset, bank).state.weights == fitted.state.weights
    # What format 3 kept: one set of weights for all kinds of request, and no agreement.
    values = json.loads(said)
    old = {"relevance": 1.0, "compatibility": 0.5, "slots": 0.2, "redundancy": 0.5}
    manifest.write_text(json.dumps({**values, "format": 3, "weights": old}))
    read = load_recommender(folder, dataset, bank).state.weights
    assert read.query == read.item == ObjectiveWeights(**old, agreement=0)
    manifest.write_text(said)
    with pytest.raises(DataError, match="No recommender in"):
        load_recommender(tmp_path / "nowhere", dataset, bank)
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="holds no recommender"):
        save_recommender(fitted, tmp_path / "mine")


def test_what_is_asked_for_again_is_not_fitted_again(
    dataset: Dataset, parts: Split, bank: AdapterBank, tmp_path: Path
) -> None:
    told: list[str] = []
    first = load_or_fit(tmp_path, dataset, parts, bank, ["tiny"], done=told.append)
    assert told
    told.clear()
    assert load_or_fit(tmp_path, dataset, parts, bank, ["tiny"], done=told.append).state.fusion == first.state.fusion
    assert told == []
    next(tmp_path.glob("*/recommender.json")).write_text("{")  # damaged: made anew, not an error
    assert load_or_fit(tmp_path, dataset, parts, bank, ["tiny"], done=told.append).state.fusion == first.state.fusion
    assert told


def by_last_word(texts: Sequence[str]) -> list[list[Entity]]:
    """Name the words w120 to w129, as titles of the tiny shop end in one of the first seven: odd ones and even ones."""
    return [
        [
            Entity("Odd" if int(word[0][1:]) % 2 else "Even", word[0], *word.span(), 1.0)
            for word in re.finditer(r"\bw12\d\b", text)
        ]
        for text in texts
    ]


def last_words(bundle: Recommendation) -> list[str]:
    return [title.split()[-1] for title in bundle.titles]


def test_each_thing_a_query_names_is_in_every_bundle_and_said_to_be(fitted: BundleRecommender) -> None:
    query = "w10 w121 with w45 w124"
    bundles = fitted.compose(query=query, tagger=by_last_word, explain=True)
    assert len(bundles) == 5
    for bundle in bundles:
        words = last_words(bundle)
        assert words.count("w121") == words.count("w124") == 1
        told = {entry["item"]: entry.get("answers") for entry in bundle.evidence}
        for item, word in zip(bundle.items, words, strict=True):
            expected = {"wish": word, "type": "Odd" if word == "w121" else "Even", "named": True}
            assert told[item] == ([expected] if word in ("w121", "w124") else None)
    # The whole query as one text says neither.
    assert not all({"w121", "w124"} <= set(last_words(bundle)) for bundle in fitted.compose(query=query))
    kept = fitted.compose(["i0"], query=query, tagger=by_last_word)
    assert all("i0" in bundle.items and "i0" not in bundle.added for bundle in kept)


def test_the_words_on_a_thing_choose_among_those_that_answer(fitted: BundleRecommender) -> None:
    """Title 43 is "w13 w83 w121", as no other is; the words on the other thing do not draw it away."""
    assert fitted.dataset.catalog.titles[43] == "w13 w83 w121"
    items = parse_query("w13 w83 w121 and w10 w40 w124", by_last_word).items
    found = match_items(items, by_last_word, fitted.state.search, fitted.dataset.catalog.titles)
    assert [one.item.text for one in found] == ["w13 w83 w121", "w10 w40 w124"]
    assert found[0].rows[0] == 43
    assert found[0].likeness.argmax() == 43


def test_what_the_catalogue_does_not_have_is_answered_by_its_type_or_not_at_all(fitted: BundleRecommender) -> None:
    for bundle in fitted.compose(query="w127 with w121", tagger=by_last_word, options=Options(k=2)):
        answers = [one for entry in bundle.evidence for one in entry.get("answers", ())]
        assert {"wish": "w127", "type": "Odd", "named": False} in answers
        assert {"wish": "w121", "type": "Odd", "named": True} in answers
        assert sum(int(word[1:]) % 2 for word in last_words(bundle)) == 2

    def strange(texts: Sequence[str]) -> list[list[Entity]]:
        return [[Entity("Hat", "hat", 0, 3, 1.0)] if text.startswith("hat") else [] for text in texts]

    for bundle in fitted.compose(query="hat", tagger=strange):
        assert not any("answers" in entry for entry in bundle.evidence)


def test_a_budget_in_the_query_binds_unless_another_is_given(dataset: Dataset, parts: Split, bank: AdapterBank) -> None:
    priced = replace(dataset, catalog=replace(dataset.catalog, prices=np.full(60, 10, np.float32)))
    shop = BundleRecommender.fit(priced, parts, bank, None)
    query = "w121 with w124 under 25"
    for bundle in shop.compose(query=query, tagger=by_last_word):
        assert sorted(last_words(bundle)) == ["w121", "w124"]
        assert bundle.price == 20
    more = shop.compose(query=query, tagger=by_last_word, constraints=Constraints(budget=40, size=(4, 4)))
    assert {bundle.price for bundle in more} == {40}
    with pytest.raises(DataError, match=r"budget leaves 15\.00.*w121 10\.00 \+ w124 10\.00"):
        shop.compose(query="w121 with w124 under 15", tagger=by_last_word)
