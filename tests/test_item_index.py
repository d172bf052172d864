"""Search among many items: the index finds what scoring all would, filters first, and is kept beside the vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.data.queries import Queries
from peft_combo.encoder.index import FaissIndex, GrownIndex, ShardedIndex
from peft_combo.recommender.evidence import Evidence
from peft_combo.recommender.fitted_scorers import FittedScorer
from peft_combo.recommender.item_index import ItemIndex, find_home
from peft_combo.recommender.retrieval import Retrieval
from peft_combo.recommender.scorer_id import ScorerId
from peft_combo.recommender.text_search import FROZEN_ALL, FROZEN_TITLE, WORDS, TextSearch, VectorView, WordView
from peft_combo.scoring.factors import ALS

pytest.importorskip("faiss", reason="the extra faiss is not installed")
ROWS, DIM = 6000, 16


def read_number(texts: Sequence[str]) -> NDArray[np.float32]:
    """The vector of a query: near that of the item whose number it begins with."""
    return VECTORS[[int(text.split()[0]) for text in texts]]


def make_vectors(seed: int) -> NDArray[np.float32]:
    dice = np.random.default_rng(seed)
    own = dice.standard_normal((200, DIM))[dice.integers(200, size=ROWS)] + 0.5 * dice.standard_normal((ROWS, DIM))
    return np.asarray(own / np.linalg.norm(own, axis=1, keepdims=True), np.float32)


VECTORS = make_vectors(0)


@pytest.fixture(scope="module")
def titles() -> list[str]:
    dice = np.random.default_rng(2)
    return [f"{row} " + " ".join(f"w{word}" for word in dice.zipf(1.4, 4).clip(max=300)) for row in range(ROWS)]


@pytest.fixture
def search(titles: list[str], monkeypatch: pytest.MonkeyPatch) -> TextSearch:
    monkeypatch.setattr("peft_combo.encoder.index.EXACT_ROWS", 1000)
    monkeypatch.setattr("peft_combo.recommender.text_search._DEPTH", 200)
    views = {
        WORDS: WordView.of(titles), FROZEN_TITLE: VectorView(VECTORS, read_number),
        FROZEN_ALL: VectorView(VECTORS[:, ::-1].copy(), lambda texts: read_number(texts)[:, ::-1].copy()),
    }  # fmt: skip
    return TextSearch.of(views).with_indexes()


@pytest.mark.parametrize("share", [1.0, 0.4, 0.01, 0.0])
def test_the_best_items_are_those_that_scoring_all_finds_best(
    search: TextSearch, titles: list[str], share: float
) -> None:
    assert isinstance(search.nearest[FROZEN_TITLE].index, FaissIndex)
    allowed = np.random.default_rng(3).random(ROWS) < share
    kept = 0.0
    for row in range(0, ROWS, 200):
        query = titles[row]
        scores = search.score_items([query])[0]
        best = sorted(np.flatnonzero(allowed).tolist(), key=lambda one: (-scores[one], one))[:10]
        rows, found = search.find_items(query, 10, allowed)
        assert len(rows) == min(10, allowed.sum())
        assert allowed[rows].all()
        np.testing.assert_allclose(found, scores[rows], atol=2e-5)
        assert (np.diff(found) <= 0).all()
        kept += len({*rows.tolist()} & {*best}) / max(len(best), 1)
    assert kept / 30 >= 0.97 or share == 0.0


def test_without_many_items_all_are_scored(search: TextSearch, titles: list[str]) -> None:
    plain = TextSearch(search.views, search.weights)
    assert not plain.nearest
    many, _ = plain.find_items(titles[5], 3000)
    same, _ = search.find_items(titles[5], 3000)  # so many are wanted that all are scored
    np.testing.assert_array_equal(many, same)
    assert len(search.score_query(titles[5], np.ones(ROWS, bool), None)) == ROWS
    known = np.isfinite(search.score_query(titles[5], np.ones(ROWS, bool), 7))
    assert known.sum() == 7
    alike = search.score_alike(9, np.arange(ROWS) != 9, 5)
    exact = VECTORS @ VECTORS[9]
    exact[9] = -1
    assert set(np.flatnonzero(np.isfinite(alike))) == set(np.argsort(-exact)[:5])


def test_moments_are_those_of_all_scores_also_after_items_came_and_changed() -> None:
    now = np.concatenate([VECTORS, make_vectors(5)[:40]])
    now[[3, 70]] = make_vectors(6)[:2]
    grown = ItemIndex.build(VECTORS).grow(now, {70: None, 3: None}.keys())
    for query in make_vectors(7)[:5]:
        alike = now @ query
        mean, deviation = grown.describe(query)
        assert abs(mean - alike.mean()) < 1e-5
        assert abs(deviation - alike.std()) < 1e-5
    rows, _ = grown.index.search(now[[3, ROWS + 5]], 1)
    assert rows[:, 0].tolist() == [3, ROWS + 5]


def test_an_index_follows_vectors_that_change_again_and_again() -> None:
    """One index over the first vectors stays beneath, whatever the number of changes."""
    once, twice = VECTORS.copy(), VECTORS.copy()
    once[[3, 70]] = twice[[3, 70]] = make_vectors(6)[:2]
    twice[[70, 900]] = make_vectors(8)[:2]
    first = ItemIndex.build(VECTORS, exact_rows=0)
    last = first.grow(once, {3, 70}).grow(twice, {70, 900})
    assert isinstance(last.index, GrownIndex)
    assert last.index.base is first.index
    assert last.index.changed.tolist() == [3, 70, 900]
    for query in make_vectors(7)[:5]:
        mean, deviation = last.describe(query)
        assert abs(mean - (twice @ query).mean()) < 1e-5
        assert abs(deviation - (twice @ query).std()) < 1e-5
    assert last.index.search(twice[[3, 70, 900]], 1)[0][:, 0].tolist() == [3, 70, 900]


def test_candidates_follow_factors_that_learned_more() -> None:
    """An update of ALS changes the factors of what was bought; the grown index scores as all factors do."""
    pytest.importorskip("implicit", reason="the optional package implicit is not installed")
    dice = np.random.default_rng(0)
    history = sparse.csr_array(dice.random((80, 300)) < 0.05, dtype=np.float32)
    before = FittedScorer(ALS(factors=8, iterations=2).fit(history))
    rows = sparse.csr_array(([1.0, 1.0], ([0, 0], [5, 9])), shape=(1, 300))
    after = FittedScorer(copy.copy(before.scorer).update(rows))
    name = ScorerId("ALS")
    retrieval = Retrieval.build({name: before}, None).grow({name: after}, {5, 9})
    queries = Queries(np.array([[5, 20]]), np.zeros(1, np.int64), np.array([""]), np.zeros(1, np.int64))
    evidence = Evidence(queries.contexts, before.scorer.support)
    (asked,) = retrieval.ask({name: after}, None, queries, evidence)
    scores = after(queries)[0]
    np.testing.assert_allclose(asked.scorers[name].score(np.arange(300)), scores, rtol=1e-4, atol=1e-5)
    scores[[5, 20]] = np.nan
    best = np.argsort(-np.nan_to_num(scores, nan=-9))[:10]
    assert {*best.tolist()} <= {*asked.scorers[name].find_best(20).tolist()}


def test_an_index_is_kept_beside_mapped_vectors_and_made_anew_where_it_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_combo.encoder.index.EXACT_ROWS", 1000)
    VECTORS.tofile(tmp_path / "vectors.f32")
    mapped = np.memmap(tmp_path / "vectors.f32", "<f4", "r", shape=VECTORS.shape)
    assert find_home(mapped) == tmp_path
    assert find_home(VECTORS) is None
    build: Callable[[], ItemIndex] = lambda: ItemIndex.build(mapped, find_home(mapped))  # noqa: E731
    first = build()
    assert isinstance(first.index, ShardedIndex)
    (file,) = tmp_path.glob("index-*/shard-00000.faiss")
    written = file.stat().st_mtime_ns
    rows, _ = build().index.search(VECTORS[:50], 1)
    assert (file.stat().st_mtime_ns, rows[:, 0].tolist()) == (written, list(range(50)))
    file.write_bytes(b"not an index")
    with pytest.warns(UserWarning, match="is left out"):
        again = build()
    assert isinstance(again.index, ShardedIndex)
    assert not again.index.degraded
    assert file.stat().st_size > 1000
    monkeypatch.setattr("peft_combo.recommender.item_index.lock_file", _refuse)
    assert isinstance(build().index, FaissIndex), "in memory where it cannot be kept"


def _refuse(path: Path, wait: float) -> None:
    raise PermissionError(f"{path} is read-only")
