"""Which index serves how many vectors: time to build, bytes, recall@10 and time of a search, on one core.

    python benchmarks/search_scale.py                                 # 10k to 1m rows, 384 wide; 2 GB of disk
    python benchmarks/search_scale.py --sizes 5m --kinds ivf-sq8      # 10 GB of disk, 12 GB of memory as cache
    python benchmarks/search_scale.py --sizes 200k --kinds exact,hnsw,ivf-sq8,ivfpq
    python benchmarks/search_scale.py --sizes 1m --threads 2          # also with two shards searched at a time

Vectors are made up and written to a mapped file block by block; the index is built over the file in shards, kept,
opened and searched by one query at a time. A row is the sum of a common direction, a category, a family of alike
products and a part of its own, each drawn with the spectrum that titles have, scaled to length 1; categories (as many
as the root of the rows) and families (one for 12 rows) differ in size by a power law. Of 7,986 real titles of clothing
and electronics under all-MiniLM-L6-v2 and of 8,000 made-up rows:

                                          titles                       made up
    cosine with the nearest (5, 50, 95 %)    .53  .72  .93                .56  .70  .83
    with the 10th nearest                    .43  .57  .71                .44  .58  .73
    with any other (median, 99 %)            .12  .48                     .17  .50
    variance in 8, 32, 128 components        .24  .48  .83                .24  .50  .82

Queries are rows of the same families that are not in the index. recall@10 is against the exact index. Times are
milliseconds a query by the clock, median and 95th percentile; "of exact" is the exact median over this one's, in the
same run. "held" is the most anonymous memory while building, above what was there before.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _smoke import add_smoke
from numpy.typing import NDArray

from peft_combo.encoder.index import Index, ShardedIndex, build_index
from peft_combo.files import measure_size

DIM, BLOCK = 384, 32_768
SHARES = (0.3, 0.002)  # of the rows that a filter leaves
ROW = "| {:>9} | {:<13} | {:>7} | {:>7} | {:>8} | {:>6} | {:>8} | {:>8} | {:>8} |"


class Titles:
    """Draws made-up vectors, block by block, the same for the same seed."""

    def __init__(self, rows: int, dim: int) -> None:
        self.dice = np.random.default_rng(0)
        place = np.arange(dim, dtype=np.float64)
        spectrum = (place + 2) ** -0.6 * np.exp(-place / 250)
        self.deviations = np.sqrt(spectrum / spectrum.sum()).astype(np.float32)
        self.common = self._draw(1)[0]
        self.common /= np.linalg.norm(self.common)
        categories, families = max(8, round(rows**0.5)), max(1, rows // 12)
        self.families = 0.4 * self._draw(families)
        own = self._choose(categories, families, 0.8)
        centres = 0.45 * self._draw(categories)
        self.centres = centres[own]
        self.shares = np.cumsum(self._weigh(families, 0.5))

    def draw(self, count: int) -> NDArray[np.float32]:
        """Return (count, D) vectors of length 1."""
        family = np.searchsorted(self.shares, self.dice.random(count)).clip(max=len(self.shares) - 1)
        spread = self.dice.uniform(0.6, 1.3, (count, 1)).astype(np.float32)
        own = self.dice.uniform(0.5, 1.4, (count, 1)).astype(np.float32)
        vectors = 0.36 * self.common + self.centres[family] + spread * self.families[family]
        vectors += 0.62 * own * self._draw(count)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _draw(self, count: int) -> NDArray[np.float32]:
        return self.dice.standard_normal((count, len(self.deviations)), np.float32) * self.deviations

    def _weigh(self, count: int, power: float) -> NDArray[np.float64]:
        weights = np.arange(1, count + 1) ** -power
        return weights / weights.sum()

    def _choose(self, among: int, count: int, power: float) -> NDArray[np.int64]:
        return self.dice.choice(among, count, p=self._weigh(among, power))


def write_vectors(path: Path, rows: int, dim: int, queries: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Write vectors to a file; return it mapped, and queries."""
    titles = Titles(rows, dim)
    with path.open("wb") as file:
        for start in range(0, rows, BLOCK):
            file.write(titles.draw(min(BLOCK, rows - start)).data)
    return np.memmap(path, "<f4", "r", shape=(rows, dim)), titles.draw(queries)


def search_times(index: Index, queries: NDArray[np.float32], **named: NDArray[np.bool_]) -> tuple[float, float, list]:
    """Return median and 95th percentile of one query at a time in ms, and the rows found."""
    took, found = [], []
    for query in np.split(queries, len(queries)):
        clock = time.perf_counter()
        rows, _ = index.search(query, 10, **named)
        took.append(1000 * (time.perf_counter() - clock))
        found.append({*rows[0].tolist()})
    return float(np.median(took)), float(np.percentile(took, 95)), found


def recall(found: list[set[int]], best: list[set[int]]) -> float:
    return float(np.mean([len(own & true) / len(true) for own, true in zip(found, best, strict=True)]))


def held_mib() -> float:
    """Anonymous memory of this process: what mapped files take of the page cache does not count."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


def measure(
    folder: Path, rows: int, dim: int, kinds: list[str], shards: int, asked: int, efforts: list[int], threads: int
) -> None:
    """Print a line for each kind of index over so many rows."""
    vectors, queries = write_vectors(folder / "vectors.f32", rows, dim, asked)
    parts = np.array_split(vectors, shards)
    dice = np.random.default_rng(1)
    masks = [dice.random(rows) < share for share in SHARES]
    build_index(folder / "exact", parts, "exact")
    exact = ShardedIndex.open(folder / "exact", parts, check_vectors=False)
    exact.search(queries[:1], 10)  # reads the file once
    usual, slow, best = search_times(exact, queries)
    print(ROW.format(f"{rows:,}", "exact", "", "", "", "1.000", f"{usual:.2f}", f"{slow:.2f}", "1.0"), flush=True)
    if threads > 1:
        print_threads(ShardedIndex.open(folder / "exact", parts, threads=threads, check_vectors=False), queries, best)
    best_of = [search_times(exact, queries[: asked // 4], allowed=mask)[2] for mask in masks]
    for kind in kinds:
        if kind == "exact":
            continue
        before, seen, clock = held_mib(), [0.0], time.perf_counter()
        build_index(folder / kind, parts, kind, progress=lambda _, seen=seen: seen.append(held_mib()))
        built = time.perf_counter() - clock
        size, held = measure_size(folder / kind) / rows, max(seen) - before
        for effort in [None, *efforts] if kind != "hnsw" else [None]:
            index = ShardedIndex.open(folder / kind, parts, effort=effort, check_vectors=False)
            index.search(queries[:50], 10)
            middle, high, found = search_times(index, queries)
            name, kept = f"{kind} {index._parts[0][0].effort}", f"{recall(found, best):.3f}"
            cost = (f"{built:.0f} s", f"{size:.0f} B", f"{held:.0f} MiB")
            ratio = f"{usual / middle:.1f}"
            print(ROW.format(f"{rows:,}", name, *cost, kept, f"{middle:.2f}", f"{high:.2f}", ratio), flush=True)
            if effort is None and threads > 1:
                index = ShardedIndex.open(folder / kind, parts, threads=threads, check_vectors=False)
                print_threads(index, queries, best)
            if effort is None:
                for share, mask, true in zip(SHARES, masks, best_of, strict=True):
                    middle, high, found = search_times(index, queries[: asked // 4], allowed=mask)
                    name = f"{share:.1%} allowed"
                    print(
                        ROW.format(
                            "", name, "", "", "", f"{recall(found, true):.3f}", f"{middle:.2f}", f"{high:.2f}", ""
                        ),
                        flush=True,
                    )


def print_threads(index: ShardedIndex, queries: NDArray[np.float32], best: list[set[int]]) -> None:
    """Print a line for several shards at a time."""
    index.search(queries[:50], 10)
    middle, high, found = search_times(index, queries)
    kept = f"{recall(found, best):.3f}"
    print(ROW.format("", "in threads", "", "", "", kept, f"{middle:.2f}", f"{high:.2f}", ""), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10k,50k,200k,1m", help="rows, such as 200k or 5m")
    parser.add_argument("--kinds", default="exact,ivf-sq8", help="of exact, hnsw, ivf-sq8, ivfpq")
    parser.add_argument("--efforts", default="", help="lists to open, beside what is usual")
    parser.add_argument("--shards", type=int, default=4, help="files an index is divided over")
    parser.add_argument("--threads", type=int, default=1, help="shards searched at a time, measured beside one")
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--folder", type=Path, help="where files of this run go; default: a temporary folder")
    add_smoke(parser)
    options = parser.parse_args()
    units = {"k": 1_000, "m": 1_000_000}
    sizes = [int(one[:-1]) * units[one[-1]] for one in options.sizes.split(",")]
    kinds, dim, queries = options.kinds.split(","), DIM, options.queries
    if options.smoke:
        sizes, kinds, dim, queries = [2_000], ["ivf-sq8"], 16, 40
    if os.environ.get("OMP_NUM_THREADS") != "1" and not options.smoke:  # one core: libraries read it as they start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    head = ("rows", "index", "build", "bytes", "held", "recall", "p50 ms", "p95 ms", "of exact")
    print(ROW.format(*head))
    print(ROW.format(*("---" for _ in head)))
    efforts = [int(one) for one in options.efforts.split(",") if one]
    for rows in sizes:
        with tempfile.TemporaryDirectory(prefix="search-scale-", dir=options.folder) as name:
            measure(Path(name), rows, dim, kinds, options.shards, queries, efforts, options.threads)


if __name__ == "__main__":
    main()
