"""Counting out of core: the scorers of memory, from Parquet and in bounded memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import shared_data
from scipy import sparse

from peft_combo.errors import PeftComboError
from peft_combo.scoring import CoOccurrence, CountedKNN, CountedPairs, ItemKNN, count_items, load_scorer
from peft_combo.scoring.out_of_core import Bounds, Columns

USERS, ITEMS = 300, 80


def needs_duckdb() -> None:
    pytest.importorskip("duckdb", reason="the extra scale is not installed")


def make_lines() -> tuple[list[str], list[str], list[float]]:
    """Baskets of whole numbers, some items never sold, some lines twice, some that cancel out."""
    dice = np.random.default_rng(0)
    rows = dice.integers(USERS, size=4000)
    items = (dice.zipf(1.3, 4000) - 1) % (ITEMS - 5)
    weights = dice.integers(1, 4, 4000).astype(float)
    lines = list(zip(rows.tolist(), items.tolist(), weights.tolist(), strict=True))
    lines += [*lines[:50], (0, 3, -sum(w for r, i, w in lines + lines[:50] if (r, i) == (0, 3)))]
    return [f"b'{row}" for row, _, _ in lines], [f"i{item:02}" for _, item, _ in lines], [own for _, _, own in lines]


def write(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("it's")  # a quote in the path
    rows, items, weights = make_lines()
    for part in range(2):
        cut = slice(part * 2000, None if part else 2000)
        write(folder / f"{part}.parquet", {"basket_id": rows[cut], "item_id": items[cut], "n": weights[cut]})
    return folder / "*.parquet"


@pytest.fixture(scope="module")
def history() -> sparse.csr_array:
    rows, items, weights = make_lines()
    place = {row: number for number, row in enumerate(dict.fromkeys(rows))}
    cells = ([place[row] for row in rows], [int(item[1:]) for item in items])
    found = sparse.coo_array((weights, cells), shape=(len(place), ITEMS)).tocsr().astype(np.float32)
    found.eliminate_zeros()
    return found


CATALOGUE = [f"i{item:02}" for item in range(ITEMS)]


def contexts(n_items: int) -> sparse.csr_array:
    return sparse.random_array((40, n_items), density=0.05, rng=np.random.default_rng(1), dtype=np.float32).tocsr()


@pytest.mark.parametrize("memory", [2**30, 64 * 2**20])
@pytest.mark.parametrize("weight", [None, "n"])
@pytest.mark.parametrize(
    ("similarity", "k", "shrinkage"), [("cosine", 10, 0.0), ("cosine", 500, 3.5), ("tfidf", 10, 0.0)]
)
def test_neighbours_are_those_of_memory(
    lines: Path, history: sparse.csr_array, memory: int, weight: str | None, similarity: Any, k: int, shrinkage: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    needs_duckdb()
    if memory < 2**30:
        monkeypatch.setattr("peft_combo.scoring.out_of_core._PAIR_BYTES", 10_000)  # so that there are several parts
    told: list[tuple[int, int]] = []
    counted = count_items(
        lines, CountedKNN(k, similarity, shrinkage), columns=Columns(weight=weight), items=CATALOGUE,
        bounds=Bounds(memory), progress=lambda *own: told.append(own),
    )  # fmt: skip
    assert (counted.parts > 1) == (memory < 2**30)
    assert told[-1] == (counted.parts, counted.parts)
    own = history.copy()
    if weight is None:  # lines are counted, and none cancels another
        rows, items, _ = make_lines()
        place = {row: number for number, row in enumerate(dict.fromkeys(rows))}
        cells = ([place[row] for row in rows], [int(item[1:]) for item in items])
        own = sparse.coo_array((np.ones(len(rows)), cells), shape=(len(place), ITEMS)).tocsr().astype(np.float32)
    plain = ItemKNN(k, similarity, shrinkage).fit(own)
    np.testing.assert_array_equal(counted.scorer.support, plain.support)
    assert counted.interactions == own.nnz
    asked = contexts(ITEMS)
    np.testing.assert_allclose(counted.scorer.score_baskets(asked), plain.score_baskets(asked), rtol=1e-5, atol=1e-6)
    mine, theirs = counted.scorer._learned.similarity, plain._learned.similarity
    if similarity == "cosine":  # whole numbers are summed without rounding, so even ties fall the same
        np.testing.assert_array_equal(mine.indptr, theirs.indptr)
        np.testing.assert_array_equal(mine.indices, theirs.indices)
        np.testing.assert_array_equal(mine.data, theirs.data)


@pytest.mark.parametrize("measure", ["count", "conditional", "lift"])
def test_pairs_are_those_of_memory_and_the_most_frequent_stay(
    lines: Path, history: sparse.csr_array, measure: Any
) -> None:
    needs_duckdb()
    counted = count_items(lines, CountedPairs(measure), columns=Columns(weight="n"), items=CATALOGUE, top=ITEMS)
    plain = CoOccurrence(measure).fit(history)
    asked = contexts(ITEMS)
    np.testing.assert_allclose(counted.scorer.score_baskets(asked), plain.score_baskets(asked), rtol=1e-6)
    few = count_items(lines, CountedPairs(measure), columns=Columns(weight="n"), items=CATALOGUE, top=3).scorer
    kept, whole = few._learned.pairs, plain._learned.pairs
    for item in range(ITEMS):
        assert sorted(kept[[item]].data) == sorted(whole[[item]].data)[-3:]


def test_a_counted_scorer_is_kept_and_says_what_it_cannot_do(lines: Path) -> None:
    needs_duckdb()
    counted = count_items(lines, CountedKNN(5))
    assert counted.items == tuple(CATALOGUE[: ITEMS - 5])
    again = load_scorer(*counted.scorer.state())
    asked = contexts(len(counted.items))
    np.testing.assert_array_equal(again.score_baskets(asked), counted.scorer.score_baskets(asked))
    for scorer in (again, count_items(lines, CountedPairs()).scorer):
        with pytest.raises(PeftComboError, match=r"score_users: it was counted out of core .* Count anew"):
            scorer.score_users([0])
        with pytest.raises(PeftComboError, match=r"update: it was counted"):
            scorer.update(asked)
    with pytest.raises(ValueError, match="k must be"):
        CountedKNN(0)


def test_long_rows_are_read_in_part(tmp_path: Path) -> None:
    needs_duckdb()
    file = write(tmp_path / "own.parquet", {"user": [1] * 50 + [2, 2, None], "what": [*range(50), 0, 1, 2]})
    counted = count_items(file, CountedPairs("count"), columns=Columns("user", "what"), bounds=Bounds(longest=10))
    assert counted.interactions == 12
    assert counted.scorer.support.sum() == 12
    assert len(counted.scorer._learned.pairs.data) <= 10 * 9 + 2
    assert count_items(file, CountedPairs("count"), columns=Columns("user", "what")).interactions == 52


def test_what_cannot_be_counted_is_said(tmp_path: Path, lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_duckdb()
    with pytest.raises(PeftComboError, match=r"none.parquet cannot be counted: .* Expected Parquet with the columns"):
        count_items(tmp_path / "none.parquet", CountedKNN())
    with pytest.raises(PeftComboError, match="Expected Parquet with the columns no and item_id"):
        count_items(lines, CountedKNN(), columns=Columns("no"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="memory must be"):
        Bounds(memory=0)
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(PeftComboError, match=r"pip install \"peft-combo\[scale\]\""):
        count_items(lines, CountedKNN())


@pytest.mark.slow
def test_online_retail_in_256_megabytes_is_that_of_memory(tmp_path: Path) -> None:
    needs_duckdb()
    folder = shared_data("online_retail")
    table = pyarrow.csv.read_csv(
        folder / "interactions.csv",
        convert_options=pyarrow.csv.ConvertOptions(include_columns=["basket_id", "item_id"]),
    )
    table = table.set_column(0, "basket_id", table["basket_id"].cast(pa.string()))
    table = table.set_column(1, "item_id", table["item_id"].cast(pa.string()))
    pyarrow.parquet.write_table(table, tmp_path / "lines.parquet")
    counted = count_items(tmp_path / "lines.parquet", CountedKNN(50), bounds=Bounds(256 * 2**20))
    row, item = (np.unique(table[name].to_pylist(), return_inverse=True)[1] for name in ("basket_id", "item_id"))
    history = sparse.coo_array((np.ones(len(row)), (row, item))).tocsr()
    plain = ItemKNN(50).fit(history)
    assert len(counted.items) == history.shape[1]
    mine, theirs = counted.scorer._learned.similarity, plain._learned.similarity
    np.testing.assert_array_equal(mine.indptr, theirs.indptr)
    np.testing.assert_array_equal(mine.indices, theirs.indices)
    np.testing.assert_array_equal(mine.data, theirs.data)
