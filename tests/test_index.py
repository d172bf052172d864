"""The index: filters before the best are taken, shards merged exactly, files checked before they are read."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from peft_combo.encoder.index import (
    ExactIndex,
    FaissIndex,
    GrownIndex,
    ShardedIndex,
    build_index,
    choose_kind,
    merge_results,
    open_index,
)
from peft_combo.errors import PeftComboError, StoreError

KINDS = ("exact", "hnsw", "ivf-sq8", "ivfpq")
CUTS = (0, 1, 700, 3001, 5000)


def needs_faiss(kind: str) -> None:
    if kind != "exact":
        pytest.importorskip("faiss", reason="the extra faiss is not installed")


def cut(vectors: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return [vectors[start:stop] for start, stop in itertools.pairwise(CUTS)]


@pytest.fixture(scope="module")
def vectors() -> NDArray[np.float32]:
    dice = np.random.default_rng(0)
    centres = dice.standard_normal((60, 24))
    own = centres[dice.integers(60, size=5000)] + 0.6 * dice.standard_normal((5000, 24))
    own[4000:4040] = own[3]  # equal ones, in several shards
    return np.asarray(own / np.linalg.norm(own, axis=1, keepdims=True), np.float32)


@pytest.fixture(scope="module")
def queries(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    noise = 0.1 * np.random.default_rng(1).standard_normal((50, 24))
    own = vectors[np.arange(0, 5000, 100)] + noise
    own[0] = vectors[3]
    return own.astype(np.float32)


def recall(rows: NDArray[np.int64], best: NDArray[np.int64]) -> float:
    return float(np.mean([len({*a} & {*b}) / len(b) for a, b in zip(rows.tolist(), best.tolist(), strict=True)]))


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 10, 200])
@pytest.mark.parametrize("width", [1, 3, 24])
def test_exact_shards_are_the_single_index_row_for_row_and_bit_for_bit(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], width: int, k: int, tmp_path: Path
) -> None:
    own, asked = np.ascontiguousarray(vectors[:, :width]), np.ascontiguousarray(queries[:, :width])
    shards = cut(own)
    build_index(tmp_path / "index", shards, "exact")
    index = ShardedIndex.open(tmp_path / "index", shards, threads=2)
    dice = np.random.default_rng(2)
    excluded = [dice.integers(0, 5000, 300).tolist() for _ in asked]
    allowed = dice.random(5000) < 0.3
    for barred, mask in ((None, None), (excluded, None), (None, allowed), (excluded, allowed)):
        rows, scores = index.search(asked, k, barred, mask)
        for block in ((256, 8192), (7, 333)):  # nor does it matter how matrix products are cut
            alone = ExactIndex(own, block).search(asked, k, barred, mask)
            np.testing.assert_array_equal(rows, alone[0])
            np.testing.assert_array_equal(scores, alone[1])
    for query in range(3):  # one query or many: the same
        np.testing.assert_array_equal(index.search(asked[[query]], k)[1][0], index.search(asked, k)[1][query])
    assert not index.degraded
    assert len(index) == 5000


@pytest.mark.parametrize("kind", ["ivf-sq8", "ivfpq"])
def test_shards_of_inverted_lists_find_what_one_index_does(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], kind: Any, tmp_path: Path
) -> None:
    needs_faiss(kind)
    told: list[int] = []
    build_index(tmp_path / "whole", [vectors], kind)
    build_index(tmp_path / "parts", cut(vectors), kind, progress=told.append)
    assert sum(told) == 5000
    whole = ShardedIndex.open(tmp_path / "whole", [vectors]).search(queries, 10)
    parts = ShardedIndex.open(tmp_path / "parts", cut(vectors), threads=2).search(queries, 10)
    assert recall(parts[0], whole[0]) > 0.99  # more is proposed where each shard proposes
    assert recall(parts[0], ExactIndex(vectors).search(queries, 10)[0]) > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapped_file_is_indexed_and_searched_and_the_folder_is_replaced_whole(kind: Any, tmp_path: Path) -> None:
    needs_faiss(kind)
    own = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32)
    own.tofile(tmp_path / "vectors.f32")
    shards = [np.memmap(tmp_path / "vectors.f32", "<f4", "r", shape=(500, 8))]
    for source in ("one", "two"):
        manifest = build_index(tmp_path / "index", shards, kind, source=source)
        assert (manifest.rows, manifest.source) == (500, source)
    index = ShardedIndex.open(tmp_path / "index", shards, source="two")
    assert index.search(own[:20] * 9, 1)[0][:, 0].tolist() == ExactIndex(own).search(own[:20], 1)[0][:, 0].tolist()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index", "vectors.f32"]


def test_an_index_of_other_vectors_or_another_adapter_is_refused(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    shards = cut(vectors)
    build_index(tmp_path, shards, "exact", source="fashion@v1")
    with pytest.raises(StoreError, match=r"of 'fashion@v1', expected 'fashion@v2'. Build it again"):
        ShardedIndex.open(tmp_path, shards, source="fashion@v2")
    with pytest.raises(StoreError, match="is of shards"):
        ShardedIndex.open(tmp_path, shards[:2])
    with pytest.raises(StoreError, match="is of shards"):
        ShardedIndex.open(tmp_path, [own[:, :8] for own in shards])
    with pytest.raises(StoreError, match="There is no index"):
        ShardedIndex.open(tmp_path / "none", shards)
    with pytest.raises(ValueError, match="expected shards"):
        build_index(tmp_path / "none", [], "exact")
    with pytest.raises(ValueError, match="expected shards"):
        build_index(tmp_path / "none", [vectors, vectors[:, :3]], "exact")
    others = [own if place % 2 == 0 else own * 2 for place, own in enumerate(shards)]
    with pytest.warns(UserWarning, match=r"Shard [13] .* is left out: its vectors are not those"):
        index = ShardedIndex.open(tmp_path, others)
    assert index.missing == (1, 3)


def test_a_missing_or_broken_shard_is_told_and_the_rest_answers(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], tmp_path: Path
) -> None:
    needs_faiss("ivf-sq8")
    shards = cut(vectors)
    build_index(tmp_path, shards, "ivf-sq8")
    broken = tmp_path / "shard-00002.faiss"
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    with pytest.warns(UserWarning, match=r"Shard 2 .* shard-00002.faiss is not what was written. 2301 of 5000 rows"):
        index = ShardedIndex.open(tmp_path, shards)
    assert (index.degraded, index.missing, len(index)) == (True, (2,), 5000)
    there = np.ones(5000, bool)
    there[700:3001] = False
    rows, _ = index.search(queries, 10)
    assert there[rows].all()
    assert recall(rows, ExactIndex(vectors).search(queries, 10, allowed=there)[0]) > 0.95
    broken.unlink()
    with pytest.warns(UserWarning, match="shard-00002.faiss cannot be read"):
        assert ShardedIndex.open(tmp_path, shards).degraded
    broken.symlink_to(tmp_path / "shard-00001.faiss")
    with pytest.warns(UserWarning, match="it is a link"):
        assert ShardedIndex.open(tmp_path, shards).degraded
    with pytest.warns(UserWarning, match="its vectors are missing"), pytest.raises(StoreError, match="No shard"):
        ShardedIndex.open(tmp_path, [None] * 4)


def test_a_manifest_that_names_other_files_is_refused(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    needs_faiss("ivf-sq8")
    build_index(tmp_path, [vectors], "ivf-sq8")
    said = json.loads((tmp_path / "index.json").read_text())
    for changed in (
        {**said, "shards": [{**said["shards"][0], "file": "../shard-00000.faiss"}]},
        {**said, "shards": [{**said["shards"][0], "file": None}]},
        {**said, "shards": []},
        {**said, "kind": "pickle"},
        {**said, "more": 1},
    ):
        (tmp_path / "index.json").write_text(json.dumps(changed))
        with pytest.raises(StoreError, match=r"index.json.*uild (it|the index) again"):
            ShardedIndex.open(tmp_path, [vectors])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read as Linux tells it")
def test_building_holds_a_block_and_not_the_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_faiss("ivf-sq8")
    rows, dim = 60_000, 256  # 61 MB of vectors, 15 MB of codes, in six shards
    with (tmp_path / "vectors.f32").open("wb") as file:
        for seed in range(6):
            file.write(np.random.default_rng(seed).standard_normal((rows // 6, dim), np.float32).data)
    mapped = np.memmap(tmp_path / "vectors.f32", "<f4", "r", shape=(rows, dim))
    for module in ("shards", "approximate"):
        monkeypatch.setattr(f"peft_combo.encoder.index.{module}.BLOCK_ROWS", 2000)
    monkeypatch.setattr("peft_combo.encoder.index.shards._SAMPLE_ROWS", 4000)

    def held() -> int:
        lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssAnon"].split()[0])

    before, seen = held(), []
    build_index(tmp_path / "index", np.split(mapped, 6), "ivf-sq8", progress=lambda _: seen.append(held()))
    assert len(seen) == 30
    assert (max(seen) - before) / 1024 < 30, "MB more than before, of 61 MB of vectors"


# --- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_filters_and_exclusions_count_before_the_best_are_taken(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_faiss(kind)
    monkeypatch.setattr("peft_combo.encoder.index.approximate.FEW_ROWS", 100)
    index, exact = open_index(vectors, kind), ExactIndex(vectors)
    best, _ = exact.search(queries, 50)
    every = np.ones(5000, bool)
    some = np.random.default_rng(3).random(5000) < 0.2
    barred = [own[: 3 * (query % 3)].tolist() for query, own in enumerate(best)]  # of some queries none
    apart = every.copy()
    apart[np.unique(best)] = False  # what would have been found is not allowed at all
    few = np.zeros(5000, bool)
    few[::500] = True
    for mask, excluded in ((None, barred), (some, None), (some, barred), (apart, None), (apart, barred), (few, barred)):
        rows, scores = index.search(queries, 10, excluded, mask)
        expected, true_scores = exact.search(queries, 10, excluded, mask)
        assert (rows >= 0).sum() == (expected >= 0).sum(), "as many are found as may be"
        assert (mask is None) or mask[rows[rows >= 0]].all()
        assert not any({*own} & {*wrong} for own, wrong in zip(rows.tolist(), excluded or [[]] * 50, strict=True))
        assert recall(rows, expected) > 0.93
        same = rows == expected
        np.testing.assert_array_equal(scores[same], true_scores[same])
    rows, scores = index.search(queries, 10, None, ~every)
    assert (rows == -1).all()
    assert np.isneginf(scores).all()
    with pytest.raises(ValueError, match="allowed: expected"):
        index.search(queries, 10, None, every[:-1])


@pytest.mark.parametrize("kind", ["hnsw", "ivf-sq8", "ivfpq"])
def test_more_than_was_opened_is_found_all_the_same(vectors: NDArray[np.float32], kind: Any) -> None:
    needs_faiss(kind)
    index = FaissIndex(vectors, kind, effort=1)
    rows, _ = index.search(vectors[:3], 4990)
    assert (rows >= 0).all()
    assert all(len({*own}) == 4990 for own in rows.tolist())


# --- rows that came later ---------------------------------------------------------------------------------------------


def test_new_and_changed_rows_are_found_as_they_are_now(
    vectors: NDArray[np.float32], queries: NDArray[np.float32]
) -> None:
    now = vectors.copy()
    now[[5, 17]] = queries[1:3]
    grown = GrownIndex(ExactIndex(vectors[:4900]), now, [17, 5])
    dice = np.random.default_rng(4)
    excluded = [dice.integers(0, 5000, 400).tolist() for _ in queries]
    allowed = dice.random(5000) < 0.5
    for barred, mask in ((None, None), (excluded, None), (None, allowed), (excluded, allowed)):
        expected = ExactIndex(now).search(queries, 10, barred, mask)
        found = grown.search(queries, 10, barred, mask)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
    assert len(grown) == 5000
    same = GrownIndex(ExactIndex(vectors), vectors).search(queries, 10)
    np.testing.assert_array_equal(same[0], ExactIndex(vectors).search(queries, 10)[0])


def test_results_of_several_places_are_merged_by_score_then_row() -> None:
    def found(rows: list[int], scores: list[float]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return np.array([rows]), np.array([scores], np.float32)

    rows, scores = merge_results([found([9, 4], [3, 1]), found([7, -1], [3, -np.inf])], 5)
    assert rows.tolist() == [[7, 9, 4, -1]]
    assert scores.tolist() == [[3, 3, 1, -np.inf]]


def test_the_size_picks_the_kind() -> None:
    assert [choose_kind(rows) for rows in (1, 200_000, 200_001, 5_000_000, 60_000_000)] == [
        "exact", "exact", "ivf-sq8", "ivf-sq8", "ivfpq",
    ]  # fmt: skip


def test_an_index_in_files_takes_the_kind_of_all_its_rows(vectors: NDArray[np.float32], tmp_path: Path) -> None:
    needs_faiss("ivf-sq8")
    assert build_index(tmp_path / "few", cut(vectors)).kind == "exact"
    many = [np.broadcast_to(vectors[0], (100_001, 24))] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft_combo.encoder.index.shards.train", _stop)
        with pytest.raises(InterruptedError, match="ivf-sq8 for 200002 rows"):
            build_index(tmp_path / "many", many)


def _stop(sample: NDArray[np.float32], kind: str, *, rows: int) -> None:
    raise InterruptedError(f"{kind} for {rows} rows")


def test_without_faiss_the_extra_is_named(
    vectors: NDArray[np.float32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(PeftComboError, match=r"pip install \"peft-combo\[faiss\]\""):
        build_index(tmp_path / "index", [vectors], "ivf-sq8")
    assert not (tmp_path / "index").exists()
