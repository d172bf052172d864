"""Item vectors: kept on disk, told from damage, shared between writers; and search that agrees with sorting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from numpy.typing import NDArray
from test_bank import METHODS, in_threads, store_adapter

from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.index import ExactIndex, FaissIndex, open_index
from peft_combo.encoder.vectors import VectorCache, embed
from peft_combo.errors import PeftComboError, StoreError
from peft_combo.store.adapter_store import AdapterStore

TEXTS = [f"w{number} w{number + 7} w{190 - number}" for number in range(40)]


@pytest.fixture(scope="module")
def bank(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterBank:
    backbone = Backbone.load(str(tiny_bert), max_length=16)
    store = AdapterStore(tmp_path_factory.mktemp("adapters"))
    store_adapter(store, backbone, "food", seed=0)
    store_adapter(store, backbone, "seafood", METHODS["prefix"], seed=1)
    return AdapterBank(backbone, store)


@pytest.fixture
def encoded(bank: AdapterBank, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that really went through the encoder, in order."""
    texts: list[str] = []
    encode = bank.backbone.encode

    def noted(asked: Sequence[str], *args: Any, **kwargs: Any) -> NDArray[np.float32]:
        texts.extend(asked)
        return encode(asked, *args, **kwargs)

    monkeypatch.setattr(bank.backbone, "encode", noted)
    return texts


@pytest.fixture
def cache(tmp_path: Path) -> VectorCache:
    return VectorCache(tmp_path / "cache")


def shelves(cache: VectorCache) -> list[Path]:
    return sorted(path.parent for path in cache.folder.glob("*/*/manifest.json"))


# --- what is encoded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["food", "seafood", None])
def test_vectors_are_encoded_once_and_mapped_ever_after(
    bank: AdapterBank, cache: VectorCache, encoded: list[str], reference: str | None
) -> None:
    expected = bank.encode(TEXTS, reference)
    encoded.clear()
    for use in (cache, cache, VectorCache(cache.folder)):
        vectors = use.vectors(bank, TEXTS, reference)
        assert isinstance(vectors, np.memmap)
        assert (vectors.shape, vectors.dtype) == (expected.shape, np.float32)
        np.testing.assert_array_equal(vectors, expected)
        with pytest.raises(ValueError, match="read-only"):
            vectors[0] = 0
    assert encoded == TEXTS


def test_only_new_and_changed_texts_are_encoded(bank: AdapterBank, cache: VectorCache, encoded: list[str]) -> None:
    cache.vectors(bank, TEXTS, "food")
    changed = ["w1 changed", *TEXTS[1:], "w2 new", "w2 new"]
    assert cache.missing(bank, changed, "food") == 2
    encoded.clear()
    vectors = cache.vectors(bank, changed, "food")
    assert encoded == ["w1 changed", "w2 new"]
    assert cache.missing(bank, changed, "food") == 0
    np.testing.assert_allclose(vectors, bank.encode(changed, "food"), atol=1e-6)
    assert len(shelves(cache)) == 1  # the older state of this catalogue is gone


def test_another_order_a_part_and_repetitions_need_no_encoding(
    bank: AdapterBank, cache: VectorCache, encoded: list[str]
) -> None:
    whole = cache.vectors(bank, TEXTS, "food")
    encoded.clear()
    for rows in (np.arange(40)[::-1], np.array([3, 3, 3, 5]), np.arange(10)):
        vectors = cache.vectors(bank, [TEXTS[row] for row in rows], "food")
        assert not isinstance(vectors, np.memmap)
        assert not vectors.flags.writeable
        np.testing.assert_array_equal(vectors, whole[rows])
    assert encoded == []
    assert len(shelves(cache)) == 1


def test_repeated_texts_are_encoded_once_and_still_mapped(
    bank: AdapterBank, cache: VectorCache, encoded: list[str]
) -> None:
    doubled = [*TEXTS, *TEXTS[:10]]
    first = cache.vectors(bank, doubled, "food")
    assert encoded == TEXTS
    assert isinstance(first, np.memmap)
    np.testing.assert_array_equal(first[40:], first[:10])


def test_adapters_and_settings_do_not_share_vectors(bank: AdapterBank, cache: VectorCache) -> None:
    references = ["food", "seafood", None]
    found = [cache.vectors(bank, TEXTS, reference) for reference in references]
    assert len(shelves(cache)) == 3
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(found[one] - found[other]).max() > 1e-3
    frozen = bank.backbone
    shorter = Backbone(frozen.name, frozen.model, frozen.tokenizer, "mean", 4)
    by_first = Backbone(frozen.name, frozen.model, frozen.tokenizer, "cls", 16)
    assert shorter.fingerprint == by_first.fingerprint == frozen.fingerprint
    for backbone in (shorter, by_first):
        other = AdapterBank(backbone, bank.store)
        np.testing.assert_allclose(cache.vectors(other, TEXTS, None), backbone.encode(TEXTS), atol=1e-6)
        assert np.abs(cache.vectors(other, TEXTS, None) - found[2]).max() > 1e-3
    assert cache.key(bank, "food") == cache.key(bank, "food@v1") != cache.key(bank, None)


def test_a_new_version_of_an_adapter_has_its_own_vectors(tmp_path: Path, bank: AdapterBank, cache: VectorCache) -> None:
    own = AdapterBank(bank.backbone, AdapterStore(tmp_path / "adapters"))
    store_adapter(own.store, own.backbone, "food", seed=0)
    before = cache.vectors(own, TEXTS, "food")
    store_adapter(own.store, own.backbone, "food", seed=1)
    np.testing.assert_array_equal(cache.vectors(own, TEXTS, "food"), before)
    own.refresh("food")
    after = cache.vectors(own, TEXTS, "food")
    np.testing.assert_array_equal(after, own.encode(TEXTS, "food@v2"))
    np.testing.assert_array_equal(before, own.encode(TEXTS, "food@v1"))
    assert cache.prune([cache.key(own, "food")]) > 40 * 32 * 4
    assert [path.parent.name for path in shelves(cache)] == [cache.key(own, "food")]
    np.testing.assert_array_equal(before, own.encode(TEXTS, "food@v1"))  # what was mapped stays readable


def test_two_catalogues_under_one_adapter_live_side_by_side(
    bank: AdapterBank, cache: VectorCache, encoded: list[str]
) -> None:
    other = [f"w{number}" for number in range(5)] + TEXTS[:3]
    for _ in range(3):
        assert isinstance(cache.vectors(bank, TEXTS, None), np.memmap)
        assert isinstance(cache.vectors(bank, other, None), np.memmap)
    assert len(encoded) == 40 + 5


def test_large_catalogues_are_written_block_by_block(bank: AdapterBank, tmp_path: Path) -> None:
    cache = VectorCache(tmp_path, block_rows=7)
    texts = [*TEXTS[:20], *TEXTS[5:30]]
    done: list[int] = []
    vectors = cache.vectors(bank, texts, "food", done.append)
    assert sum(done) == 30
    np.testing.assert_allclose(vectors, bank.encode(texts, "food"), atol=1e-6)
    np.testing.assert_allclose(cache.vectors(bank, [*texts, "w9"], "food")[:-1], vectors, atol=0)


def test_no_texts_are_no_vectors(bank: AdapterBank, cache: VectorCache) -> None:
    assert cache.vectors(bank, [], "food").shape == (0, 32)
    assert embed(bank, [], "food", cache.folder) == 0
    assert not cache.folder.exists()


@pytest.mark.parametrize("text", ["", " ", "\ud800", "a\0b", "é\n", "../../x", "w" * 5000])
def test_any_text_can_be_kept_and_names_are_digests_only(bank: AdapterBank, cache: VectorCache, text: str) -> None:
    if text == "\ud800":
        with pytest.raises((UnicodeEncodeError, TypeError)):  # no tokenizer takes half a character
            bank.encode([text], None)
        return
    np.testing.assert_array_equal(cache.vectors(bank, [text], None), bank.encode([text], None))
    for shelf in shelves(cache):
        assert set(shelf.name + shelf.parent.name) <= set("0123456789abcdef")
        assert sorted(path.name for path in shelf.iterdir()) == ["manifest.json", "texts.sha256", "vectors.f32"]


def test_an_adapter_that_cannot_be_had_leaves_no_trace(bank: AdapterBank, cache: VectorCache) -> None:
    with pytest.raises(StoreError, match="No adapter for category"):
        cache.vectors(bank, TEXTS, "toys")
    assert not cache.folder.exists()


# --- damage -----------------------------------------------------------------------------------------------------------


def _set(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, Any] = {
    "vectors cut short": lambda shelf: os.truncate(shelf / "vectors.f32", 1000),
    "vectors empty": lambda shelf: (shelf / "vectors.f32").write_bytes(b""),
    "vectors longer": lambda shelf: os.truncate(shelf / "vectors.f32", 40 * 32 * 4 + 4),
    "vectors altered": lambda shelf: _set(shelf / "vectors.f32", 2000, b"\0\0\1"),
    "vectors gone": lambda shelf: (shelf / "vectors.f32").unlink(),
    "vectors a folder": lambda shelf: ((shelf / "vectors.f32").unlink(), (shelf / "vectors.f32").mkdir()),
    "texts cut short": lambda shelf: os.truncate(shelf / "texts.sha256", 32 * 39),
    "texts altered": lambda shelf: _set(shelf / "texts.sha256", 5, b"x"),
    "texts exchanged": lambda shelf: (
        lambda index: (shelf / "texts.sha256").write_bytes(index[32:64] + index[:32] + index[64:])
    )((shelf / "texts.sha256").read_bytes()),
    "texts gone": lambda shelf: (shelf / "texts.sha256").unlink(),
    "manifest gone": lambda shelf: (shelf / "manifest.json").unlink(),
    "manifest empty": lambda shelf: (shelf / "manifest.json").write_bytes(b""),
    "manifest no text": lambda shelf: (shelf / "manifest.json").write_bytes(b"\xff\xfe\0"),
    "manifest a list": lambda shelf: (shelf / "manifest.json").write_text("[" * 10_000),
    "manifest of a newer format": lambda shelf: _edit(shelf / "manifest.json", format=2),
    "manifest with a field more": lambda shelf: _edit(shelf / "manifest.json", more=1),
    "manifest with negative rows": lambda shelf: _edit(shelf / "manifest.json", rows=-1),
    "manifest with other rows": lambda shelf: _edit(shelf / "manifest.json", rows=80, dim=16),
    "manifest of another encoder": lambda shelf: _edit(shelf / "manifest.json", encoder={"adapter": None}),
    "a file in its place": lambda shelf: (__import__("shutil").rmtree(shelf), shelf.write_text("x")),
    "an empty folder in its place": lambda shelf: (__import__("shutil").rmtree(shelf), shelf.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("warm", [False, True], ids=["another process", "the same process"])
def test_what_is_damaged_is_encoded_again(
    bank: AdapterBank, cache: VectorCache, encoded: list[str], damage: str, warm: bool
) -> None:
    expected = np.array(cache.vectors(bank, TEXTS, "food"))
    (shelf,) = shelves(cache)
    time.sleep(0.02)  # file times have a grain of some milliseconds
    DAMAGE[damage](shelf)
    encoded.clear()
    use = cache if warm else VectorCache(cache.folder)
    vectors = use.vectors(bank, TEXTS, "food")
    assert encoded == TEXTS
    assert isinstance(vectors, np.memmap)
    np.testing.assert_array_equal(vectors, expected)
    np.testing.assert_array_equal(VectorCache(cache.folder).vectors(bank, TEXTS, "food"), expected)
    assert encoded == TEXTS
    assert [path.name for path in cache.folder.glob("*/.*")] == []


def test_vectors_of_another_encoder_put_in_place_are_not_taken(bank: AdapterBank, cache: VectorCache) -> None:
    cache.vectors(bank, TEXTS, "food")
    os.rename(cache.folder / cache.key(bank, "food"), cache.folder / cache.key(bank, None))
    np.testing.assert_array_equal(cache.vectors(bank, TEXTS, None), bank.encode(TEXTS, None))


def test_a_failure_while_encoding_leaves_nothing_behind(
    bank: AdapterBank, cache: VectorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bank.backbone, "encode", fail)
        with pytest.raises(KeyboardInterrupt):
            cache.vectors(bank, TEXTS, "food")
    assert list(cache.folder.glob("*/*")) == []
    assert cache.vectors(bank, TEXTS, "food").shape == (40, 32)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_encoded(
    bank: AdapterBank, tmp_path: Path, encoded: list[str]
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"The vector cache in .*file/ cannot be used: Not a directory"):
        VectorCache(tmp_path / "file").vectors(bank, TEXTS, "food")
    assert encoded == []


def test_a_full_disk_is_told(bank: AdapterBank, cache: VectorCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match=r"No space left on device\. Free some space"):
        cache.vectors(bank, TEXTS, "food")
    assert list(cache.folder.glob("*/*")) == []


def test_prune_leaves_what_is_not_its_own(bank: AdapterBank, cache: VectorCache) -> None:
    for reference in ("food", None):
        cache.vectors(bank, TEXTS, reference)
    (cache.folder / "notes.txt").write_text("mine")
    (cache.folder / "photos").mkdir()
    home = cache.folder / cache.key(bank, "food")
    for name, age in ((".draft-old", 2 * 24 * 3600), (".draft-new", 0)):
        (home / name).mkdir()
        (home / name / "vectors.f32").write_bytes(b"x" * 100)
        os.utime(home / name, (time.time() - age,) * 2)
    freed = cache.prune([cache.key(bank, "food")])
    assert freed > 100 + 40 * 32 * 4
    assert sorted(path.name for path in cache.folder.iterdir()) == sorted([home.name, "notes.txt", "photos"])
    assert len([*home.iterdir()]) == 2
    assert cache.missing(bank, TEXTS, "food") == 0
    assert cache.missing(bank, TEXTS, None) == 40
    assert VectorCache(cache.folder / "nowhere").prune([]) == 0


# --- several writers --------------------------------------------------------------------------------------------------


def test_threads_that_write_the_same_and_other_catalogues_all_succeed(bank: AdapterBank, cache: VectorCache) -> None:
    catalogues = [TEXTS, TEXTS[::-1], TEXTS[:25], [*TEXTS, "w150"], TEXTS[20:]]
    expected = [bank.encode(texts, "food") for texts in catalogues]

    def write(number: int) -> None:
        own = VectorCache(cache.folder)
        for turn in range(6):
            which = (number + turn) % len(catalogues)
            vectors = own.vectors(bank, catalogues[which], "food")
            np.testing.assert_allclose(vectors, expected[which], atol=1e-6)

    in_threads([lambda number=number: write(number) for number in range(6)])
    assert list(cache.folder.glob("*/.*")) == []


def test_one_writer_finds_what_another_damaged_meanwhile(bank: AdapterBank, cache: VectorCache) -> None:
    expected = bank.encode(TEXTS, "food")
    done = threading.Event()
    answers: list[int] = []

    def damage() -> None:
        for _ in range(40):
            for file in cache.folder.glob("*/*/manifest.json"):
                file.unlink(missing_ok=True)
            time.sleep(0.005)
        done.set()

    def read() -> None:
        while not done.is_set():
            vectors = None
            with suppress(StoreError):  # damaged five times in a row
                vectors = VectorCache(cache.folder).vectors(bank, TEXTS, "food")
            if vectors is not None:
                np.testing.assert_array_equal(vectors, expected)
                answers.append(1)

    in_threads([damage, read, read])
    assert len(answers) > 5


_PROGRAM = """
import sys, time, numpy as np, warnings
warnings.simplefilter("error")
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.vectors import VectorCache, embed
model, store, folder, texts, process, processes, delay = sys.argv[1:]
bank = AdapterBank(Backbone.load(model, max_length=16), AdapterStore(store))
time.sleep(float(delay))
print(embed(bank, texts.split(","), "food", folder, process=int(process), processes=int(processes)))
"""


def test_two_processes_share_the_work(tiny_bert: Path, bank: AdapterBank, cache: VectorCache) -> None:
    texts = [*TEXTS, *TEXTS[:5], "w3 w4 w5", *TEXTS[:2]]
    cache.vectors(bank, TEXTS[:9], "food")  # known already
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(tiny_bert), str(bank.store.path), str(cache.folder), ",".join(texts),
             str(process), "2", str(process)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
        )
        for process in range(2)
    ]  # fmt: skip
    finished = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], finished
    assert sum(int(output) for output, _ in finished) == 41 - 9
    assert all(int(output) >= 14 for output, _ in finished)
    (shelf,) = shelves(cache)  # the shares were put together and are gone
    vectors = cache.vectors(bank, texts, "food")
    assert isinstance(vectors, np.memmap)
    assert Path(str(vectors.filename)).parent == shelf
    np.testing.assert_allclose(vectors, bank.encode(texts, "food"), atol=1e-6)


def test_shares_cover_every_text_once_whoever_comes_first(
    bank: AdapterBank, cache: VectorCache, encoded: list[str]
) -> None:
    for process in (2, 1):
        embed(bank, TEXTS, "food", cache.folder, process=process, processes=3)
    assert embed(bank, TEXTS, "food", cache.folder, process=0, processes=3) == 14
    assert sorted(encoded) == sorted(TEXTS)
    assert [embed(bank, TEXTS, "food", cache.folder, process=process, processes=3) for process in range(3)] == [0] * 3
    assert len(shelves(cache)) == 1


def test_what_a_lost_process_owes_is_encoded_by_the_first(
    bank: AdapterBank, cache: VectorCache, encoded: list[str]
) -> None:
    assert embed(bank, TEXTS, "food", cache.folder, process=0, processes=2, patience=0.3) == 40
    assert encoded == [*TEXTS[::2], *TEXTS[1::2]]
    assert cache.missing(bank, TEXTS, "food") == 0


def test_a_catalogue_known_in_another_order_is_laid_out_anew(
    bank: AdapterBank, cache: VectorCache, encoded: list[str]
) -> None:
    cache.vectors(bank, TEXTS, "food")
    encoded.clear()
    assert embed(bank, TEXTS[::-1], "food", cache.folder) == 0
    assert encoded == []
    assert isinstance(cache.vectors(bank, TEXTS[::-1], "food"), np.memmap)


@pytest.mark.parametrize(("process", "processes"), [(1, 1), (-1, 2), (0, 0)])
def test_a_process_that_is_none_of_them_is_refused(
    bank: AdapterBank, cache: VectorCache, process: int, processes: int
) -> None:
    with pytest.raises(ValueError, match="process: expected"):
        embed(bank, TEXTS, None, cache.folder, process=process, processes=processes)


# --- search -----------------------------------------------------------------------------------------------------------


def by_sorting(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], k: int, excluded: Sequence[Sequence[int]] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Sort all rows by score, highest first, then by number."""
    k = min(k, len(vectors))
    rows = np.full((len(queries), k), -1, np.int64)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    for query, vector in enumerate(queries):
        score = vectors @ vector
        allowed = [row for row in range(len(vectors)) if excluded is None or row not in excluded[query]]
        best = sorted(allowed, key=lambda row: (-score[row], row))[:k]
        rows[query, : len(best)], scores[query, : len(best)] = best, score[best]
    return rows, scores


def whole_numbers(n_rows: int, dim: int, seed: int) -> NDArray[np.float32]:
    """Vectors whose products are exact and often equal."""
    return np.random.default_rng(seed).integers(-2, 3, (n_rows, dim)).astype(np.float32)


def clustered(n_rows: int, dim: int, seed: int = 0) -> NDArray[np.float32]:
    dice = np.random.default_rng(seed)
    centres = dice.standard_normal((max(n_rows // 100, 1), dim))
    vectors = centres[dice.integers(len(centres), size=n_rows)] + 0.5 * dice.standard_normal((n_rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 3, 10, 50, 1000])
@pytest.mark.parametrize("n_rows", [1, 9, 10, 11, 64, 200])
def test_exact_search_is_a_full_sort(n_rows: int, k: int) -> None:
    vectors, queries = whole_numbers(n_rows, 3, 0), whole_numbers(9, 3, 1)
    dice = np.random.default_rng(2)
    excluded = [dice.integers(0, n_rows, dice.integers(0, n_rows + 1)).tolist() for _ in queries]
    excluded[0], excluded[1] = [], list(range(n_rows))
    for barred in (None, excluded):
        rows, scores = ExactIndex(vectors, block=(4, 10)).search(queries, k, barred)
        expected_rows, expected_scores = by_sorting(vectors, queries, k, barred)
        assert rows.shape == scores.shape == (9, min(k, n_rows))
        assert (rows.dtype, scores.dtype) == (np.int64, np.float32)
        np.testing.assert_array_equal(rows, expected_rows)
        np.testing.assert_array_equal(scores, expected_scores)


def test_exact_search_over_several_real_blocks() -> None:
    vectors = clustered(20_000, 16)
    queries = clustered(300, 16, seed=1)
    rows, scores = ExactIndex(vectors).search(queries, 10)
    whole = queries @ vectors.T
    expected = np.argsort(-whole, axis=1, kind="stable")[:, :10]
    assert (rows == expected).mean() > 0.999  # equal up to the last bit of a float32 product
    np.testing.assert_allclose(scores, np.take_along_axis(whole, expected, 1), atol=1e-6)


def test_equal_rows_come_in_the_order_of_their_numbers() -> None:
    vectors = np.ones((30_000, 4), np.float32)
    rows, scores = ExactIndex(vectors).search(vectors[:2], 5, [[], [0, 2]])
    assert rows.tolist() == [[0, 1, 2, 3, 4], [1, 3, 4, 5, 6]]
    assert (scores == 4).all()


def test_rows_that_are_not_there_exclude_nothing() -> None:
    vectors = whole_numbers(5, 3, 0)
    plain = ExactIndex(vectors).search(vectors[:1], 5)
    np.testing.assert_array_equal(ExactIndex(vectors).search(vectors[:1], 5, [[-1, 5, 99]])[0], plain[0])


def test_a_mapped_file_can_be_searched(bank: AdapterBank, cache: VectorCache) -> None:
    vectors = cache.vectors(bank, TEXTS, "food")
    rows, scores = open_index(vectors).search(vectors[3:6], 1)
    assert rows[:, 0].tolist() == [3, 4, 5]
    np.testing.assert_allclose(scores, 1, atol=1e-6)


@pytest.mark.parametrize("kind", ["exact", "hnsw", "ivf-sq8", "ivfpq"])
def test_what_cannot_be_searched_is_refused_and_nothing_is_found_in_nothing(kind: Any) -> None:
    if kind != "exact":
        pytest.importorskip("faiss", reason="the extra faiss is not installed")
    vectors = whole_numbers(60, 4, 0)
    index = open_index(vectors, kind)
    assert len(index) == 60
    for queries, k, excluded, told in (
        (vectors[:2, :3], 1, None, "queries: expected"),
        (vectors[0], 1, None, "queries: expected"),
        (vectors[:2], 0, None, "k: expected"),
        (vectors[:2], 1, [[]], "excluded: expected"),
        (np.full((1, 4), np.nan, np.float32), 1, None, "finite"),
    ):
        with pytest.raises(ValueError, match=told):
            index.search(queries, k, excluded)
    rows, scores = index.search(vectors[:0], 3, [])
    assert rows.shape == scores.shape == (0, 3)
    rows, scores = open_index(vectors[:0], kind).search(vectors[:2], 3, [[1], []])
    assert rows.shape == scores.shape == (2, 0)
    with pytest.raises(ValueError, match="float32"):
        open_index(vectors.astype(np.float64), kind)


@pytest.fixture(scope="module")
def many() -> NDArray[np.float32]:
    return clustered(10_200, 64)


@pytest.mark.parametrize("kind", ["hnsw", "ivf-sq8", "ivfpq"])
def test_approximate_search_finds_nearly_all_of_the_best(many: NDArray[np.float32], kind: Any) -> None:
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    many, queries = many[:10_000], many[10_000:]
    excluded = [list(range(query, query + query % 7)) for query in range(200)]
    best, true_scores = ExactIndex(many).search(queries, 10)
    index = open_index(many, kind)
    rows, scores = index.search(queries, 10)
    recall = np.mean([len({*found} & {*wanted}) / 10 for found, wanted in zip(rows, best, strict=True)])
    assert recall >= 0.95
    same = rows == best
    np.testing.assert_allclose(scores[same], true_scores[same], atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    without = [[*own, *wanted[:3]] for own, wanted in zip(excluded, best, strict=True)]
    rows, _ = index.search(queries, 10, without)
    assert not any({*found} & {*barred} for found, barred in zip(rows.tolist(), without, strict=True))
    expected, _ = ExactIndex(many).search(queries, 10, without)
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(rows, expected, strict=True)]) >= 0.95


@pytest.mark.parametrize("kind", ["hnsw", "ivf-sq8", "ivfpq"])
@pytest.mark.parametrize("n_rows", [1, 5, 60, 400])
def test_small_sets_are_searched_too(kind: Any, n_rows: int, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    vectors = clustered(400, 8)[:n_rows]
    rows, scores = open_index(vectors, kind).search(vectors[:3], 10, [[0]] * len(vectors[:3]))
    assert rows.shape == scores.shape == (len(vectors[:3]), min(10, n_rows))
    expected, _ = ExactIndex(vectors).search(vectors[:3], 10, [[0]] * len(vectors[:3]))
    if n_rows < 400:
        np.testing.assert_array_equal(np.sort(rows), np.sort(expected))
    assert "".join(capfd.readouterr()) == ""  # k-means grumbles where it has too few points


def test_faiss_comes_in_by_size_and_only_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(400, 8)
    assert isinstance(open_index(vectors), ExactIndex)
    monkeypatch.setitem(sys.modules, "faiss", None)
    for kind in ("hnsw", "ivf-sq8", "ivfpq"):
        with pytest.raises(PeftComboError, match=r"pip install \"peft-combo\[faiss\]\""):
            open_index(vectors, kind)
    with pytest.warns(UserWarning, match="All 400 rows are compared"):
        assert isinstance(open_index(vectors, exact_rows=100), ExactIndex)
    monkeypatch.undo()
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    index = open_index(vectors, exact_rows=100)
    assert isinstance(index, FaissIndex)
    assert index.kind == "ivf-sq8"
    index = open_index(vectors, exact_rows=100, compressed_rows=200)
    assert isinstance(index, FaissIndex)
    assert index.kind == "ivfpq"


def test_threads_may_search_one_index(many: NDArray[np.float32]) -> None:
    queries = clustered(20, 64, seed=1)
    index = ExactIndex(many)
    alone = index.search(queries, 10)
    with ThreadPoolExecutor(4) as pool:
        for rows, scores in pool.map(lambda _: index.search(queries, 10), range(8)):
            np.testing.assert_array_equal(rows, alone[0])
            np.testing.assert_array_equal(scores, alone[1])
