"""Every fitted scorer of a recommender keeps the same promises, and answers alike after it was saved and loaded."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from conftest import make_tiny_recipe
from made_up import build_vision
from scipy.sparse import csr_array

from peft_combo.data.knowledge.relations import Relations
from peft_combo.data.knowledge.rule_set import Knowledge
from peft_combo.data.model import Bundles, Catalog, Dataset, Interactions
from peft_combo.data.pictures import DrawnPicture
from peft_combo.data.pictures.drawing import COLOURS
from peft_combo.data.queries import Queries
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import split
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads.rating import RatingHead
from peft_combo.recipe.task import RatingTask
from peft_combo.recommender import fit_state, retrieval
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.fit_data import FitData
from peft_combo.recommender.fitted_scorers import (
    Fitted,
    FittedPast,
    LengthenedScorer,
    build_next_basket,
    build_past,
    fuse_scorers,
    list_half_lives,
    score_beside,
)
from peft_combo.recommender.fusion import Fusion
from peft_combo.recommender.item_index import ItemIndex
from peft_combo.recommender.live_catalog import DESCRIBED, TITLE, LiveItem, VectorBuffers, extend_recommender
from peft_combo.recommender.model_selection import Setting, list_scorers
from peft_combo.recommender.persistence import load_recommender, save_recommender
from peft_combo.recommender.query_scores import StoredScores, ask_scorer, list_vectors
from peft_combo.recommender.recommender import BundleRecommender
from peft_combo.recommender.scorer_id import (
    ALIKE,
    BOUGHT,
    FUSION,
    NEXT_BASKET,
    NOT_LIKE,
    RANDOM,
    TEXT_SEARCH,
    UNSEEN_FIRST,
    Kind,
    ScorerId,
)
from peft_combo.recommender.user_habits import UserHabits
from peft_combo.scoring.neighbours import UserKNN
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.loop import tune

N_ITEMS = 60
# What reads an adapter's head, which is asked with a context item at least.
ADAPTERS = ("tuned BERT", "ensemble", "tuned by category", "fusion")

needs_implicit = pytest.mark.skipif(
    importlib.util.find_spec("implicit") is None, reason="the optional package implicit is not installed"
)
OF_REPORTS, OF_ANSWERS = (RANDOM.kind, UNSEEN_FIRST.kind), (TEXT_SEARCH.kind, NOT_LIKE.kind)  # nothing is fitted
KINDS = [kind for kind in get_args(Kind) if kind not in OF_REPORTS + OF_ANSWERS]
every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs_implicit if kind == "ALS" else ()) for kind in KINDS]
)


class AllOfThem:
    """In place of `Fusion` where one is fitted: every scorer is needed, so every one is served and kept."""

    @staticmethod
    def fit(scores: Mapping[ScorerId, object], *rest: object, **options: object) -> Fusion[ScorerId]:
        return Fusion("z", {scorer: {"always": 1.0} for scorer in scores}, {}, "all")


@dataclass(frozen=True)
class Shop:
    """Attributes:
    scorers: one of each kind, as fitted. loaded: the same after save and load.
    without: a recommender. habitual: the same where validation found habits worth adding, as made and as loaded.
    """

    scorers: dict[str, Fitted]
    loaded: dict[str, Fitted]
    without: BundleRecommender
    habitual: tuple[BundleRecommender, BundleRecommender]


def list_served(made: BundleRecommender) -> dict[str, Fitted]:
    """Return the last fitted scorer of each kind, what reads the past of users, and the fusion of those served."""
    state = made.state
    assert state.neighbours is not None
    return {
        **{scorer.kind: fitted for scorer, fitted in state.serving.items()},
        BOUGHT.kind: build_past(state.known, neighbours=False),
        ALIKE.kind: state.neighbours,
        NEXT_BASKET.kind: build_next_basket(state.known, list_half_lives(state.known)[-1]),
        FUSION.kind: fuse_scorers(state.fusion, state.serving, state.known),
    }


@pytest.fixture(scope="module")
def shop(tiny_bert: Path, tiny_shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """The tiny shop, whose users bought the items of their bundles, with adapters for bundles, a category, ratings."""
    folder = tmp_path_factory.mktemp("fitted")
    bundles = open_dataset(make_tiny_recipe(tiny_bert, tiny_shop, folder).data)
    users = sorted({owner for owner in bundles.bundles.owners if owner})
    bought = [
        (users.index(owner), row)
        for owner, rows in zip(bundles.bundles.owners, bundles.bundles.items, strict=True)
        if owner is not None
        for row in rows
    ]
    interactions = Interactions.build(
        users, [u for u, _ in bought], [r for _, r in bought], times=np.arange(len(bought))
    )
    drawn = tuple(DrawnPicture("top", list(COLOURS)[row % 6], "plain", row) for row in range(N_ITEMS))
    catalog = replace(bundles.catalog, pictures=drawn)
    # Items i3 apart go together, as in the bundles of one style.
    relations = Relations(tuple((f"i{row}", "same line as", f"i{row + 3}") for row in range(N_ITEMS - 3)))
    dataset = replace(
        Dataset.build("tiny", catalog, interactions, bundles.bundles), knowledge=Knowledge(relations=relations)
    )
    with_times = shutil.copytree(tiny_shop, folder / "data")
    lines = [f"{users[user]},i{item},{time}" for time, (user, item) in enumerate(bought)]
    (with_times / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
    recipes = {
        "tiny": {},
        "second": {"seed": 1},
        "style1": {"data.category_filter": "Style 1"},
        "rated": {"data.path": str(with_times), "task": {"kind": "rating", "neighbours": 5}},
    }
    for name, changes in recipes.items():
        changes = {"category": name, "training.epochs": 1, **changes}
        tune(make_tiny_recipe(tiny_bert, tiny_shop, folder / "store", "head", **changes), run_folder=folder / name)
    pytest.importorskip("PIL", reason="pillow is not installed (extra [images])")
    vision = str(build_vision(folder / "vision", "resnet"))
    bank = AdapterBank(Backbone.load(tiny_bert, max_length=16, image_model=vision), AdapterStore(folder / "store"))
    scorers: dict[str, Fitted] = {}
    loaded: dict[str, Fitted] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_state, "Fusion", AllOfThem)
        for adapters in (["tiny", "style1"], ["tiny", "second", "rated"]):
            made = BundleRecommender.fit(dataset, split(dataset), bank, adapters)
            save_recommender(made, folder / "kept")
            scorers |= list_served(made)
            loaded |= list_served(load_recommender(folder / "kept", dataset, bank))
    state = replace(made.state, habits=UserHabits.of(made.state.known, "all times alike", 3.0))
    habitual = BundleRecommender(dataset, bank, state)
    save_recommender(habitual, folder / "habits")
    return Shop(scorers, loaded, made, (habitual, load_recommender(folder / "habits", dataset, bank)))


@pytest.fixture
def queries() -> Queries:
    """Four queries: of a user who is known twice, of a stranger, and of nobody."""
    contexts = np.array([[0, 6, -1], [1, -1, -1], [2, 8, 14], [0, 6, -1]], np.int64)
    return Queries(contexts, np.zeros(4, np.int64), np.array(["u3", "u3", "stranger", ""]), np.arange(4))


def test_every_kind_of_scorer_is_here(shop: Shop) -> None:
    assert {*shop.scorers, "ALS"} == shop.loaded.keys() | {"ALS"} == set(KINDS)


@every_kind
def test_scores_are_float32_and_finite_or_missing(kind: str, shop: Shop, queries: Queries) -> None:
    scores = shop.scorers[kind](queries)
    assert scores.shape == (4, N_ITEMS)
    assert scores.dtype == np.float32
    assert not np.isinf(scores).any()
    assert not np.isnan(scores[0]).all()


@every_kind
def test_a_query_scores_alike_alone_and_beside_any_others(kind: str, shop: Shop, queries: Queries) -> None:
    fitted = shop.scorers[kind]
    batch = fitted(queries)
    np.testing.assert_array_equal(fitted(queries), batch)
    rounding = 1e-4 if kind == FUSION.kind else 1e-5  # it divides all of them by their deviations and adds them up
    for rows in ([0], [1], [2], [3], [3, 2, 1, 0], [0, 2, 2]):
        found = fitted(queries.take(np.array(rows)))
        np.testing.assert_allclose(found, batch[rows], rtol=1e-5, atol=rounding)


@every_kind
def test_empty_places_of_a_context_make_no_difference(kind: str, shop: Shop, queries: Queries) -> None:
    wider = np.concatenate([np.full((4, 2), -1), queries.contexts], axis=1)
    found = shop.scorers[kind](replace(queries, contexts=wider))
    np.testing.assert_allclose(found, shop.scorers[kind](queries), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ADAPTERS])
def test_without_context_items_what_reads_them_cannot_say(kind: str, shop: Shop, queries: Queries) -> None:
    """Of a user who is known, of the stranger, of nobody."""
    scores = shop.scorers[kind](replace(queries, contexts=np.full((4, 3), -1)))
    missing = np.isnan(scores).all(axis=1).tolist()
    reads_past = kind in ("bought before", "users alike", "next basket", "rated")
    expected = {"popularity": [False] * 4}.get(kind, [False, False, True, True] if reads_past else [True] * 4)
    assert missing == expected


@pytest.mark.parametrize("kind", ["bought before", "users alike", "next basket"])
def test_what_reads_the_past_cannot_say_of_strangers(kind: str, shop: Shop, queries: Queries) -> None:
    scores = shop.scorers[kind](queries)
    assert np.isnan(scores).all(axis=1).tolist() == [False, False, True, True]
    np.testing.assert_array_equal(scores[0], scores[1])  # the same user, whatever the context


@every_kind
def test_a_loaded_scorer_scores_as_the_saved_one(kind: str, shop: Shop, queries: Queries) -> None:
    np.testing.assert_array_equal(shop.loaded[kind](queries), shop.scorers[kind](queries))


@pytest.mark.parametrize("kind", ["popularity", "tuned BERT", "ensemble", "tuned by category", "fusion"])
@pytest.mark.parametrize("candidates", [[5], [7, 0, 59], list(range(40))])
def test_some_items_score_as_they_do_among_all(kind: str, candidates: list[int], shop: Shop) -> None:
    sets, rows = [np.array([0, 6]), np.array([1])], np.array(candidates)
    contexts = np.array([[0, 6], [1, -1]], np.int64)
    all_items = shop.scorers[kind](Queries(contexts, np.zeros(2, np.int64), np.array(["", ""]), np.zeros(2, np.int64)))
    found = score_beside(shop.scorers[kind], sets, rows)
    np.testing.assert_allclose(found, all_items[:, rows], rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.parametrize("later", [0, 3], ids=["as fitted", "of a longer catalogue"])
def test_a_query_tells_its_best_items_and_moments_as_its_scores_do(
    kind: str, later: int, shop: Shop, queries: Queries
) -> None:
    """Three later items: one that nothing stands for but itself is in a context, all have stand-ins."""
    fitted = shop.scorers[kind]
    if later:
        stands = np.array([[4, 10], [5, 11], [8, 2]]), np.full((3, 2), 0.5, np.float32)
        fitted = LengthenedScorer(fitted, N_ITEMS, N_ITEMS + later, stands, stands)
        queries = replace(queries, contexts=np.column_stack((queries.contexts, [-1, 61, 62, -1])))
    vectors = list_vectors(fitted)
    index = None if vectors is None else ItemIndex.build(vectors)
    allowed = np.arange(N_ITEMS + later) % 2 == 0
    asked = ask_scorer(fitted, queries, index)
    for one, scores, context in zip(asked, fitted(queries), queries.contexts, strict=True):
        rows = np.arange(len(scores))
        np.testing.assert_allclose(one.score(rows), scores, rtol=1e-5, atol=1e-6)
        scores[context[context >= 0]] = np.nan
        heard = scores[np.isfinite(scores)]
        assert one.moments.count == len(heard)
        if len(heard):
            assert one.moments.mean == pytest.approx(heard.mean(dtype=np.float64), rel=1e-5, abs=1e-6)
            assert one.moments.deviation == pytest.approx(heard.std(dtype=np.float64), rel=1e-3, abs=1e-4)
        for limit in (None, allowed):
            best = one.find_best(5, limit)
            assert np.isfinite(scores[best]).all()
            assert limit is None or limit[best].all()
            among = heard if limit is None else scores[limit & np.isfinite(scores)]
            expected = np.sort(among)[::-1][: len(best)]
            if isinstance(one, StoredScores):  # of the items with 0 it names none
                assert len(best) >= min(5, (among > 0).sum())
            else:
                assert len(best) >= min(5, len(among))
            if kind != "item-kNN" or (expected > 0).all():
                np.testing.assert_allclose(np.sort(scores[best])[::-1][:5], expected[:5], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [2, 256], ids=["few candidates", "all items are candidates"])
def test_candidates_have_the_scores_they_have_among_all_items(
    limit: int, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss", reason="the optional package faiss is not installed")
    monkeypatch.setattr(retrieval, "_BEST", limit)
    monkeypatch.setattr(retrieval, "_ALL", 1)
    made = shop.without
    fast = made.with_retrieval(N_ITEMS)
    assert made.with_retrieval(N_ITEMS + 1) is made
    assert fast.with_retrieval(N_ITEMS) is fast
    for context, user in (([0, 6], "u3"), ([1], None), ([2, 8, 14], "u4")):
        rows = np.array(context)
        whole = made.score_context(rows, user)
        (some,) = fast.score_contexts([(rows, user)], 1)
        scored = np.isfinite(some.scores)
        assert (1 <= scored.sum() < N_ITEMS - len(rows)) if limit == 2 else scored.sum() == N_ITEMS - len(rows)
        np.testing.assert_allclose(some.scores[scored], whole.scores[scored], rtol=1e-3, atol=1e-3)
        for scorer, part in some.parts.items():
            np.testing.assert_allclose(part[scored], whole.parts[scorer][scored], rtol=1e-3, atol=1e-3)
        given = [made.dataset.catalog.item_ids[row] for row in context]
        if limit == 256:
            expected = made.complete(given, user=user, k=5, explain=True)
            for one, other in zip(fast.complete(given, user=user, k=5, explain=True), expected, strict=True):
                assert (one.item_id, one.score) == (other.item_id, pytest.approx(other.score, rel=1e-3, abs=1e-3))
                assert one.because == pytest.approx(other.because, rel=1e-2, abs=1e-2)


def test_of_a_batch_only_what_candidates_cannot_answer_is_scored_whole(shop: Shop) -> None:
    """A user alone goes by habits, which speak of all items; each answer stands at its own place."""
    pytest.importorskip("faiss", reason="the optional package faiss is not installed")
    fast = shop.habitual[0].with_retrieval(N_ITEMS)
    alone = fast.find_context(np.empty(0, np.int64), "u3")
    asked = [(np.array([0, 6]), None), (alone, "u3"), (np.array([2]), "u4"), (alone, "u3")]
    found = fast.score_contexts(asked, 1)
    assert [one.whole for one in found] == [False, True, False, True]
    for one, (context, user) in zip(found, asked, strict=True):
        whole = shop.habitual[0].score_context(context, user).scores
        scored = np.isfinite(one.scores)
        np.testing.assert_allclose(one.scores[scored], whole[scored], rtol=1e-3, atol=1e-3)


def test_few_allowed_items_are_all_candidates(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="the optional package faiss is not installed")
    monkeypatch.setattr(retrieval, "_BEST", 1)
    fast = shop.without.with_retrieval(N_ITEMS)
    narrow = Constraints(exclude_items=tuple(range(3, N_ITEMS)))
    (some,) = fast.complete(["i0", "i1"], k=5, constraints=narrow)
    assert some.item_id == "i2"


def test_users_alike_read_ratings_where_a_rating_adapter_says_that_there_are_some() -> None:
    """The example of `UserKNN`, Aggarwal 2016, table 2.1: user 3 would rate items 1 and 6 with 3.35 and 0.86."""
    table = [[7, 6, 7, 4, 5, 4], [6, 7, 0, 4, 3, 4], [0, 3, 3, 1, 1, 0], [1, 2, 2, 3, 3, 4], [1, 0, 1, 2, 3, 3]]
    given = [(user, item, float(r)) for user, row in enumerate(table) for item, r in enumerate(row) if r]
    given += [(0, 0, 8.0), (0, 0, 6.0)]  # rated again: the mean counts
    users, items, ratings = zip(*given, strict=True)
    catalog = Catalog.build([f"i{n}" for n in range(6)], [f"word{n}" for n in range(6)])
    interactions = Interactions.build([f"u{n}" for n in range(1, 6)], users, items, ratings, range(len(given)))
    dataset = Dataset.build("ratings", catalog, interactions, Bundles.build(["b"], [[0, 1]]))

    def list_settings(task: RatingTask) -> list[Setting]:
        rated = {"stars@v1": (np.zeros((6, 4), np.float32), RatingHead(4, task))}
        known = FitData.of(dataset, None, None, None, {}, rated=rated)
        return list_scorers(known, {"u3"}, seed=0)[ALIKE]

    assert [one.setting for one in list_settings(RatingTask())] == [""]
    taken, rated = list_settings(RatingTask(feedback="explicit", scale=(1, 7)))
    query = Queries(np.array([[1]]), np.array([0]), np.array(["u3"]), np.array([0]))
    alike = rated.fit()
    assert isinstance(alike, FittedPast)
    assert isinstance(alike.alike, UserKNN)
    expected = UserKNN(similarity="pearson", feedback="explicit").fit(csr_array(np.array(table, np.float32)))
    np.testing.assert_array_equal(alike(query), expected.score_users([2]))
    alike = replace(alike, alike=replace(alike.alike, k=2).fit(csr_array(np.array(table, np.float32))))
    assert alike(query)[0, [0, 5]] == pytest.approx([3.35, 0.86], abs=0.005)
    assert not np.array_equal(taken.fit()(query), expected.score_users([2]))


def test_baskets_are_counted_once_each_and_lose_half_their_weight_in_a_half_life() -> None:
    """User 0 took item 0 in two baskets 30 days apart, on two lines of the second; nobody knows when user 1 took 2."""
    day = 86_400.0
    interactions = Interactions.build(
        ["u0", "u1"], [0, 0, 0, 1, -1], [0, 0, 0, 2, 1], [5, 1, 1, 1, 1], [70 * day, 100 * day, 100 * day, np.nan, 0.0],
        [7, 8, 8, -1, 9],
    )  # fmt: skip
    catalog = Catalog.build(["a", "b", "c"], ["one", "two", "three"])
    known = FitData.of(
        Dataset.build("dated", catalog, interactions, Bundles.build(["b"], [[0, 1]])), None, None, None, {}
    )
    assert known.count_baskets(None).toarray().tolist() == [[2, 0, 0], [0, 0, 1]]
    np.testing.assert_allclose(known.count_baskets(30.0).toarray(), [[1.5, 0, 0], [0, 0, 0.5]], rtol=1e-6)
    assert list_half_lives(known)[0] == "all times alike"
    without = replace(known, interactions=replace(interactions, times=np.full(5, np.nan)))
    assert list_half_lives(without) == ["all times alike"]
    np.testing.assert_array_equal(without.count_baskets(30.0).toarray(), without.count_baskets(None).toarray())


def test_baskets_that_are_no_bundles_are_learned_from_beside_them() -> None:
    """Basket 7 is bundle "b"; 8 is larger, with an item twice; 9 has one item; 10 belongs to a held-out bundle."""
    lines = {7: [0, 1], 8: [1, 2, 3, 4, 5, 1], 9: [3], 10: [4, 5]}
    baskets = np.array([number for number, items in lines.items() for _ in items])
    items = [item for own in lines.values() for item in own]
    interactions = Interactions.build(["u"], [0] * len(items), items, baskets=baskets)
    catalog = Catalog.build(list("abcdef"), ["red top", "red hat", "blue bag", "blue belt", "cap", "sock"])
    bundles = Bundles.build(["b", "held"], [[0, 1], [4, 5]], baskets=[7, 10])
    dataset = Dataset.build("baskets", catalog, interactions, bundles)
    seen = np.flatnonzero(baskets != 10)
    known = FitData.of(dataset, np.array([0]), seen, None, {})
    assert known.users is None  # the bundles are of the same baskets
    assert known.baskets is not None
    assert known.baskets.toarray().tolist() == [[1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]]
    # A pair of the bundle of two weighs 2, one of five items 1.
    gram = (known.weighted_baskets.T @ known.weighted_baskets).toarray()
    assert gram[0, 1] == pytest.approx(2)
    assert gram[2, 5] == pytest.approx(1)
    assert gram[1, 1] == pytest.approx(3)
    settings = {
        str(scorer): [one.setting for one in choices] for scorer, choices in list_scorers(known, set(), 0).items()
    }
    assert settings["item-kNN"] == ["cosine", "cosine with baskets", "tfidf", "tfidf with baskets"]
    assert "words, l2 10, alpha 3 with baskets" in settings["CEASE-TFIDF"]
    assert FitData.of(dataset, np.array([0]), np.flatnonzero(baskets == 7), None, {}).baskets is None


def test_habits_count_where_a_user_is_all_there_is_to_go_by(shop: Shop) -> None:
    """They are in the score, in its explanation, and in what was saved; a request with items is answered as ever."""
    made, loaded = shop.habitual
    alone = made.complete(user="u3", k=5, explain=True)
    assert alone == loaded.complete(user="u3", k=5, explain=True)
    assert alone != shop.without.complete(user="u3", k=5, explain=True)
    for one in alone:
        assert sum(one.shares.values()) == pytest.approx(one.score, abs=1e-3)
        assert "next basket" in one.shares
    context = made.find_context(np.empty(0, np.int64), "u3")
    before, after = (one.score_context(context, "u3") for one in (shop.without, made))
    queries = Queries(context[None, :], np.zeros(1, np.int64), np.array(["u3"]), np.zeros(1, np.int64))
    known = made.state.known
    assert made.state.habits is not None
    added = made.state.habits.share(queries, known.evidence(queries), made.state.fusion.form)[0]
    np.testing.assert_allclose(after.scores, before.scores + added, rtol=1e-5, atol=1e-5)
    given = made.dataset.catalog.item_ids[3]
    assert made.complete([given], user="u3", k=5) == shop.without.complete([given], user="u3", k=5)


def test_habits_stay_where_items_come_later(shop: Shop) -> None:
    """A new item has no habit; what is said of the others is as before."""
    made, _ = shop.habitual
    known = made.state.known
    assert known.frozen is not None
    names = {TITLE: known.frozen, DESCRIBED: known.described, **{name: own for name, (own, _) in known.tuned.items()}}
    vectors = {name: own[0] for name, own in names.items() if own is not None}
    later = extend_recommender(made, [LiveItem("new", "w10 w99", ("Style 1",), vectors=vectors)], (), VectorBuffers())
    context = made.find_context(np.empty(0, np.int64), "u3")
    before, after = made.score_context(context, "u3"), later.score_context(context, "u3")
    np.testing.assert_allclose(after.parts[NEXT_BASKET][:N_ITEMS], before.parts[NEXT_BASKET], rtol=1e-4, atol=1e-4)
    assert len(after.scores) == N_ITEMS + 1
