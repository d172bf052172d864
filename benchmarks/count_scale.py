"""Counting co-occurrence out of core as interactions grow: time, memory, and its exponent, beside implicit's in memory.

    python benchmarks/count_scale.py                       # 1m and 10m interactions, some minutes
    python benchmarks/count_scale.py --sizes 1m,10m,100m   # 10 GB of disk
    python benchmarks/count_scale.py --sizes 10m --memory 1

Interactions are made up, written to Parquet block by block: items by Zipf's law (exponent 0.9), users by a power law of
their activity (Pareto, exponent 1.4; most take a few items, some thousands), one item for each 1,000 interactions and
one user for each 20. Counting is `count_items` for `CountedKNN` (cosine, 100 neighbours); of users with more than 50
items 50 are read, drawn by a hash, in both. implicit is `CosineRecommender` on the same matrix in memory, and is left
out beyond --in-memory interactions. Each runs in a process of its own, by one
thread; "peak" is the most memory that process held, the reading of the matrix included. "agree" is the share of
neighbours that both have, on up to 500 items (ties at the edge fall as they fall). The exponent is that of time against
interactions from a size to the next.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from _smoke import add_smoke
from scipy import sparse

from peft_combo.scoring.out_of_core import Bounds, Columns, CountedKNN, count_items

BLOCK, LONGEST, NEAREST, SHOWN = 2_000_000, 50, 100, 500
ROW = "| {:>12} | {:>10} | {:>12} | {:>8} | {:>9} | {:>6} | {:>8} | {:>7} |"


def write_interactions(folder: Path, count: int) -> int:
    """Write made-up interactions to Parquet files; return the number of items."""
    dice = np.random.default_rng(0)
    n_items, n_users = max(50, count // 1000), max(50, count // 20)
    of_item = np.cumsum(np.arange(1, n_items + 1) ** -0.9)
    of_user = np.cumsum(dice.pareto(1.4, n_users) + 0.2)
    for part, start in enumerate(range(0, count, BLOCK)):
        size = min(BLOCK, count - start)
        users = np.searchsorted(of_user, dice.random(size) * of_user[-1]).astype(np.int32)
        items = np.searchsorted(of_item, dice.random(size) * of_item[-1]).astype(np.int32)
        parquet.write_table(pa.table({"user_id": users, "item_id": items}), folder / f"{part:05}.parquet")
    return n_items


def count_by_duckdb(folder: Path, n_items: int, memory: int) -> dict[str, Any]:
    bounds = Bounds(memory, folder, longest=LONGEST)
    clock = time.perf_counter()
    counted = count_items(
        folder / "*.parquet", CountedKNN(NEAREST), columns=Columns("user_id"), items=range(n_items), bounds=bounds
    )
    took = time.perf_counter() - clock
    near = counted.scorer._learned.similarity
    shown = [near[[item]].indices.tolist() for item in choose_items(n_items)]
    return {"took": took, "read": counted.interactions, "parts": counted.parts, "near": shown}


def count_by_implicit(folder: Path, n_items: int, memory: int) -> dict[str, Any]:
    """implicit's own item-item in memory, of the rows that DuckDB would read: drawn by the same hash."""
    import duckdb
    from implicit.nearest_neighbours import CosineRecommender

    clock = time.perf_counter()
    database = duckdb.connect(config={"threads": 1, "memory_limit": f"{memory // 2**20}MiB"})
    seen = database.execute(
        "SELECT row, item, x FROM (SELECT user_id::BIGINT AS row, item_id::INTEGER AS item, count(*)::FLOAT AS x "
        f"FROM read_parquet('{folder}/*.parquet') GROUP BY ALL) "
        f"QUALIFY row_number() OVER (PARTITION BY row ORDER BY hash(row, item), item) <= {LONGEST}"
    ).fetchnumpy()
    database.close()
    row, item = np.asarray(seen["row"]), np.asarray(seen["item"])
    matrix = sparse.csr_matrix((np.asarray(seen["x"]), (row, item)), shape=(row.max() + 1, n_items))
    model = CosineRecommender(K=NEAREST + 1, num_threads=1)  # an item is its own first neighbour there
    model.fit(matrix, show_progress=False)
    took = time.perf_counter() - clock
    near = sparse.csr_matrix(model.similarity)
    shown = [[other for other in near[item].indices.tolist() if other != item] for item in choose_items(n_items)]
    return {"took": took, "read": matrix.nnz, "parts": 1, "near": shown}


COUNT = {"duckdb": count_by_duckdb, "implicit": count_by_implicit}


def choose_items(n_items: int) -> list[int]:
    return np.unique(np.linspace(0, n_items - 1, SHOWN).astype(int)).tolist()


def run(kind: str, folder: Path, n_items: int, memory: int, apart: bool) -> dict[str, Any] | None:
    """Count, in a process of its own where `apart`; None where that ran out of memory or failed."""
    if not apart:
        return {**COUNT[kind](folder, n_items, memory), "peak": 0.0}
    command = [sys.executable, __file__, "--worker", kind, str(folder), str(n_items), str(memory)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        print(f"{kind}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        kind, folder, n_items, memory = sys.argv[2:]
        found = COUNT[kind](Path(folder), int(n_items), int(memory))
        print(json.dumps({**found, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1m,10m", help="interactions, such as 10m")
    parser.add_argument("--memory", type=float, default=4, help="GiB that DuckDB may take")
    parser.add_argument("--in-memory", default="10m", help="most interactions that implicit is tried on")
    parser.add_argument("--folder", type=Path, help="where files of this run go; default: a temporary folder")
    add_smoke(parser)
    options = parser.parse_args()
    units = {"k": 1_000, "m": 1_000_000}
    *sizes, most = (int(one[:-1]) * units[one[-1]] for one in [*options.sizes.split(","), options.in_memory])
    if options.smoke:
        sizes = [20_000]
    head = ("interactions", "read", "by", "time s", "peak GiB", "parts", "exponent", "agree")
    print(ROW.format(*head))
    print(ROW.format(*("---" for _ in head)))
    before: dict[str, tuple[int, float]] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="count-scale-", dir=options.folder) as name:
            n_items = write_interactions(Path(name), size)
            near: list[list[int]] = []
            for kind in ("duckdb", "implicit"):
                if kind == "implicit" and (size > most or importlib.util.find_spec("implicit") is None):
                    continue
                found = run(kind, Path(name), n_items, int(options.memory * 2**30), not options.smoke)
                if found is None:
                    print(ROW.format(f"{size:,}", "", kind, "failed", "", "", "", ""), flush=True)
                    continue
                exponent = agree = ""
                if kind in before:
                    smaller, took = before[kind]
                    exponent = f"{math.log(found['took'] / took) / math.log(size / smaller):.2f}"
                before[kind] = size, found["took"]
                if near:
                    both = [(set(mine), set(own)) for mine, own in zip(near, found["near"], strict=True)]
                    agree = f"{np.mean([len(mine & own) / max(len(mine), 1) for mine, own in both]):.3f}"
                near = found["near"]
                told = (f"{found['took']:.1f}", f"{found['peak']:.2f}", found["parts"], exponent, agree)
                print(ROW.format(f"{size:,}", f"{found['read']:,}", kind, *told), flush=True)


if __name__ == "__main__":
    main()
