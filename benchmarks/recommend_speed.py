"""How long an answer takes on one core: completing and composing bundles, searching, swapping category adapters.

    python benchmarks/recommend_speed.py                      # 5k and 100k items, six minutes
    python benchmarks/recommend_speed.py --sizes 5k,100k,1m   # 12 GiB of memory, and half an hour for the graph over 1m
    python benchmarks/recommend_speed.py --sizes 5k --json    # the same figures as JSON

The shop is made up, see `make_shop`; item vectors are there already, as `VectorCache` would map them, and requests come
one at a time through `BundleRecommender.fit`, which chooses and weighs scorers on few validation bundles; the line of
"complete" names those it took. The head is random, for what it says does not matter to time. Figures are milliseconds a
request by the clock, median and 95th percentile, and by the processor (median), which is what is left of them on a
machine that nobody else uses.

- complete: ten items for the rest of a bundle, with what each scorer adds.
- candidates first: the same by `BundleRecommender.with_retrieval`, and how many of the ten are those of "complete".
- compose: five bundles around the rest of a bundle, or around one item.
- exact, hnsw: `ExactIndex` and `FaissIndex` on means of two items, ten rows each; recall@10 is against the exact ones.
- adapters (LoRA as in lora-fashion over the embedded encoder): fetching one that is in memory, loading one from disk,
  and encoding a title while requests alternate between two adapters, less the time where all go to one. Memory an
  adapter is what the process grows by, over 24 adapters.

One core means one thread, which the script sees to by starting itself anew; the graph alone is built with all cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _smoke import add_smoke, make_tiny
from numpy.typing import NDArray
from safetensors.torch import save_file

from peft_combo.data.model import Bundles, Catalog, Dataset
from peft_combo.data.splits import split
from peft_combo.encoder import methods
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.encoder.index import ExactIndex, FaissIndex
from peft_combo.encoder.vectors import VectorCache
from peft_combo.recipe.files import load_recipe
from peft_combo.recommender.recommender import BundleRecommender
from peft_combo.store.adapter_store import AdapterStore

BARS = {5_000: 5.0, 100_000: 20.0}  # milliseconds of the median completion
FIRST_BARS = {100_000: 5.0}  # the same where candidates are found first
COMPOSE_BARS = {5_000: 30.0}  # milliseconds of nineteen compositions in twenty
SWAP_BAR = 2.0  # milliseconds more than without
ADAPTERS = 24
VALID = 40  # bundles that the fusion is fitted on
SLOTS = ("top", "bottom", "dress", "shoes", "bag", "jacket", "hat", "scarf", "belt", "watch", "socks", "sunglasses")
OUTFITS = (
    (0, 1, 3), (0, 1, 3, 4), (0, 1, 3, 5), (2, 3, 4), (2, 3, 4, 9), (0, 1, 3, 4, 5), (5, 7, 6), (0, 1, 8, 3, 9),
    (2, 3, 5, 4), (0, 1, 10, 3), (0, 1, 3, 11), (1, 8, 3, 9),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Shop:
    """A made-up shop with the structure of a real one.

    Attributes:
        bundles: three to five items, of one style and of different slots, most of them often sold; each item is in one
            and a half on average, many in none.
        vectors: (N, D) unit vectors near the centres of their style and slot.
    """

    catalog: Catalog
    bundles: list[NDArray[np.int64]]
    vectors: NDArray[np.float32]


def make_shop(n_items: int, dim: int, seed: int = 0) -> Shop:
    rng = np.random.default_rng(seed)
    n_styles = max(8, n_items // 500)
    slot_of, style_of = rng.integers(len(SLOTS), size=n_items), rng.integers(n_styles, size=n_items)
    centres = rng.standard_normal((n_styles + len(SLOTS), dim), dtype=np.float32)
    vectors = rng.standard_normal((n_items, dim), dtype=np.float32)
    vectors += 0.8 * centres[style_of]
    vectors += 0.6 * centres[n_styles + slot_of]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    # Items of one slot and style lie next to each other in `order`; a low place in its group is a popular item.
    group = style_of * len(SLOTS) + slot_of
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(n_styles * len(SLOTS) + 1))
    n_bundles = round(1.5 * n_items / np.mean([len(outfit) for outfit in OUTFITS]))
    outfits, styles = rng.integers(len(OUTFITS), size=n_bundles), rng.integers(n_styles, size=n_bundles)
    bundles = []
    for outfit, style in zip(outfits.tolist(), styles.tolist(), strict=True):
        cells = style * len(SLOTS) + np.array(OUTFITS[outfit])
        sizes = starts[cells + 1] - starts[cells]
        places = (sizes * rng.random(len(cells)) ** 3).astype(np.int64)
        bundles.append(order[(starts[cells] + places)[sizes > 0]])
    bundles = [rows for rows in bundles if len(rows) > 1]

    # Words: the slot, two of the style, a brand, and three out of a long tail.
    tail = np.minimum(rng.zipf(1.2, size=(n_items, 3)), 30_000)
    of_style, brands = rng.integers(6, size=(n_items, 2)), rng.integers(max(20, n_items // 200), size=n_items)
    titles = [
        f"{SLOTS[slot]} s{style}a{one} s{style}b{two} brand{brand} w{a} w{b} w{c}"
        for slot, style, (one, two), brand, (a, b, c) in zip(
            slot_of.tolist(), style_of.tolist(), of_style.tolist(), brands.tolist(), tail.tolist(), strict=True
        )
    ]
    catalog = Catalog.build(
        [str(row) for row in range(n_items)],
        titles,
        [("Clothing", SLOTS[slot].title()) for slot in slot_of.tolist()],
        [SLOTS[slot] for slot in slot_of.tolist()],
        np.round(np.exp(rng.normal(3.5, 0.7, n_items)), 2),
    )
    return Shop(catalog, bundles, vectors)


class MadeUpVectors(VectorCache):
    """Gives the shop's vectors for whatever encoder: as if all had been encoded before."""

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        self._vectors = vectors

    def vectors(self, *asked: Any) -> NDArray[np.float32]:
        return self._vectors


Times = tuple[float, float]  # seconds by the clock and by the processor


@dataclass
class Line:
    """One line of the table; times in milliseconds, `cpu` the median of what the processor spent.

    `bar` is for `p50`, or for `p95` where `tail` says so.
    """

    items: int | None
    name: str
    p50: float
    p95: float
    cpu: float
    bar: float | None = None
    on_note: str = ""
    tail: bool = False


@dataclass
class Report:
    """Lines as they were measured, and memory."""

    lines: list[Line] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)

    def add(
        self, items: int | None, name: str, took: Sequence[Times], bar: float | None = None, note: str = "",
        tail: bool = False,
    ) -> None:  # fmt: skip
        wall, cpu = np.array(took).T * 1e3
        p50, p95 = np.quantile(wall, [0.5, 0.95]).tolist()
        line = Line(items, name, p50, p95, float(np.median(cpu)), bar, note, tail)
        self.lines.append(line)
        print(shown(line), file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="5k,100k", help="numbers of items: 5k,100k,1m")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--no-graph", action="store_true", help="leave FAISS out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    add_smoke(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.smoke:
        with make_tiny() as tiny:
            recipe = load_recipe("lora-fashion", tiny.changes)
            tell(
                measure(Backbone.of(recipe.backbone), tiny.folder, [300], 4, 3, graph=not options.no_graph),
                options.json,
            )
        return
    sizes = [items_in(size) for size in options.sizes.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Backbone.load(), Path(folder), sizes, options.requests, ADAPTERS, graph=not options.no_graph)
    tell(report, options.json)


def measure(
    backbone: Backbone, folder: Path, sizes: Sequence[int], requests: int, adapters: int, graph: bool
) -> Report:  # fmt: skip
    """Measure adapters, then catalogues of each size."""
    report = Report()
    store = store_adapters(folder / "adapters", backbone, adapters)
    measure_adapters(report, backbone, store, requests)
    bank = AdapterBank(backbone, store)
    for n_items in sizes:
        measure_size(report, make_shop(n_items, backbone.dim), bank, requests, graph)
        gc.collect()
    return report


def tell(report: Report, as_json: bool) -> None:
    """Print all lines and what is to be said of the bars."""
    machine = f"{cpu_name()}, one thread; numpy {np.__version__}, torch {torch.__version__}"
    if as_json:
        print(json.dumps({"machine": machine, "memory": report.memory, "lines": [asdict(one) for one in report.lines]}))
    else:
        print(machine)
        print("\n".join(shown(line) for line in report.lines))
        print("\n".join(f"{name}: {value:,.1f}" for name, value in report.memory.items()))
    missed = [f"{line.items or ''} {line.name}: {verdict(line)}" for line in report.lines if verdict(line) != "pass"]
    own, grown, shared = (report.memory[name] for name in (OWN, GROWN, BACKBONE))
    print(
        f"times: {'; '.join(missed) or 'pass'}; memory: an adapter costs {grown:.1f} MiB, its "
        f"tensors {own:.1f}, the encoder {shared:.0f}: {'pass' if grown < own + 0.1 * shared else 'FAIL'}",
        file=sys.stderr if as_json else sys.stdout,
    )


OWN, GROWN, BACKBONE, PER_GIB = (
    "tensors of an adapter, MiB", "memory an adapter, MiB", "encoder, MiB", "adapters per GiB",
)  # fmt: skip


def measure_size(report: Report, shop: Shop, bank: AdapterBank, requests: int, graph: bool) -> None:
    """Time completing, composing and searching over one catalogue."""
    n_items, catalog = len(shop.catalog), shop.catalog
    dataset = Dataset.build("made up", catalog, None, Bundles.build(map(str, range(len(shop.bundles))), shop.bundles))
    parts = split(dataset, "bundle", VALID / len(shop.bundles), VALID / len(shop.bundles))
    clock = time.perf_counter()
    fitted = BundleRecommender.fit(dataset, parts, bank, "a0", cache=MadeUpVectors(shop.vectors))
    print(f"{n_items:,} items: fitted in {time.perf_counter() - clock:.0f} s", file=sys.stderr)
    rng = np.random.default_rng(1)
    ids = [[str(row) for row in shop.bundles[one][:-1]] for one in rng.integers(len(shop.bundles), size=requests)]
    scorers = " + ".join(map(str, fitted.state.fusion.needs))
    report.add(n_items, "complete", timed(fitted.complete, ids), BARS.get(n_items), scorers)
    clock = time.perf_counter()
    first = fitted.with_retrieval(1)
    built = time.perf_counter() - clock
    same = np.mean([count_same(first, fitted, own) for own in ids])
    note = f"{same:.2%} of the ten the same, indexes built in {built:.0f} s"
    report.add(n_items, "complete, candidates first", timed(first.complete, ids), FIRST_BARS.get(n_items), note)
    for name, given in (("a basket", ids), ("an item", [own[:1] for own in ids])):
        took = timed(fitted.compose, given[: requests // 2])
        report.add(n_items, f"compose around {name}", took, COMPOSE_BARS.get(n_items), tail=True)

    queries = np.stack([shop.vectors[[int(row) for row in own[:2]]].mean(axis=0) for own in ids])
    exact = ExactIndex(shop.vectors)
    report.add(n_items, "search, exact", timed(lambda query: exact.search(query, 10), np.split(queries, len(queries))))
    if graph:
        search_graph(report, n_items, shop.vectors, queries, exact.search(queries, 10)[0])


def count_same(one: BundleRecommender, other: BundleRecommender, given: Sequence[str]) -> float:
    """Return which share of ten items is in the answers of both."""
    found, expected = ({item.item_id for item in made.complete(given)} for made in (one, other))
    return len(found & expected) / max(len(expected), 1)


def search_graph(
    report: Report, n_items: int, targets: NDArray[np.float32], queries: NDArray[np.float32], best: NDArray[np.int64]
) -> None:
    import faiss

    cores = os.cpu_count() or 1
    faiss.omp_set_num_threads(cores)
    clock = time.perf_counter()
    index = FaissIndex(targets, "hnsw")
    built = time.perf_counter() - clock
    faiss.omp_set_num_threads(1)
    found = index.search(queries, 10)[0]
    recall = np.mean([len({*mine} & {*true}) / 10 for mine, true in zip(found.tolist(), best.tolist(), strict=True)])
    note = f"recall@10 {recall:.3f}, built in {built:.0f} s on {cores} cores"
    took = timed(lambda query: index.search(query, 10), np.split(queries, len(queries)))
    report.add(n_items, "search, hnsw", took, note=note)


def measure_adapters(report: Report, backbone: Backbone, store: AdapterStore, requests: int) -> None:
    """Time fetching, loading and swapping, and weigh an adapter."""
    names = store.categories()
    AdapterBank(backbone, store).get(names[0])  # what is made once for all adapters is not an adapter's cost
    gc.collect()
    before = resident_mib()
    bank = AdapterBank(backbone, store, limit_mib=float("inf"))
    report.add(None, "adapter from disk", [timed(bank.get, [name], warm=0)[0] for name in names])
    grown = (resident_mib() - before) / len(names)
    own = bank.nbytes / len(names) / 2**20
    shared = sum(tensor.nbytes for tensor in backbone.model.state_dict().values()) / 2**20
    report.memory |= {OWN: own, GROWN: grown, BACKBONE: shared, PER_GIB: 1024 / grown}
    report.add(None, "adapter from memory", timed(bank.get, names * 5))

    titles = [[f"linen shirt w{number}"] for number in range(2 * requests)]
    alone, alternating = [], []
    for number, title in enumerate(titles):  # in turn, so that a drift of the machine hits both alike
        alone += timed(lambda texts: bank.encode(texts, names[0]), [title], warm=1)
        alternating += timed(lambda texts, name=names[number % 2 + 1]: bank.encode(texts, name), [title], warm=0)
    report.add(None, "encode a title, one adapter", alone)
    report.add(None, "encode a title, another each time", alternating)
    more = np.maximum(np.median(alternating, axis=0) - np.median(alone, axis=0), 0)
    report.add(None, "swap, the difference", [(float(more[0]), float(more[1]))], SWAP_BAR)


def store_adapters(folder: Path, backbone: Backbone, count: int) -> AdapterStore:
    """Store adapters as tuning by lora-fashion would, with random weights instead of trained ones."""
    recipe = load_recipe("lora-fashion")
    store = AdapterStore(folder)
    for number in range(count):
        attached = methods.attach(
            backbone.model, recipe.adapter, max_length=backbone.max_length, total_steps=1, seed=number
        )
        head = BundleHead(backbone.dim, recipe.task)
        noise = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in (*attached.trainable().values(), *head.parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.02)
        with store.writing(f"a{number}") as draft:
            attached.save(draft.path, backbone.base_name)
            save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, draft.path / HEAD_FILE)
            draft.commit(
                {
                    "method": recipe.adapter.method, "stored_as": attached.stored_as, "task": head.spec(),
                    "backbone": backbone.stamp(), "recipe": {}, "metrics": {}, "versions": {},
                    "data": {"name": "none", "digest": "0", "split_digest": "0"},
                }
            )  # fmt: skip
    return store


def timed(call: Callable[[Any], Any], arguments: Sequence[Any], warm: int = 3) -> list[Times]:
    """Return what each call took, after a few that do not count."""
    for argument in arguments[:warm]:
        call(argument)
    took = []
    for argument in arguments:
        clock, spent = time.perf_counter(), time.thread_time()
        call(argument)
        took.append((time.perf_counter() - clock, time.thread_time() - spent))
    return took


def shown(line: Line) -> str:
    items = "" if line.items is None else f"{line.items:,}"
    bar = "" if line.bar is None else f"  {'p95 ' if line.tail else ''}under {line.bar:g}: {verdict(line)}"
    note = f"  {line.on_note}" if line.on_note else ""
    times = f"p50 {line.p50:8.3f}  p95 {line.p95:8.3f}  cpu {line.cpu:8.3f} ms"
    return f"{items:>9}  {line.name:34} {times}{bar}{note}"


def verdict(line: Line) -> str:
    """Say whether a line keeps to its bar; where only the processor's median does, others were using the machine."""
    if line.bar is None or (line.p95 if line.tail else line.p50) < line.bar:
        return "pass"
    return "pass by the processor, on a busy machine" if line.cpu < line.bar else "FAIL"


def items_in(size: str) -> int:
    """Read 5k, 100k or 1m."""
    units = {"k": 1_000, "m": 1_000_000}
    number, unit = (size[:-1], units[size[-1].lower()]) if size[-1:].lower() in units else (size, 1)
    if not number.isdigit() or not int(number):
        raise SystemExit(f'--sizes: expected numbers of items such as 5k,100k,1m, found "{size}".')
    return int(number) * unit


def resident_mib() -> float:
    """Return the memory the process holds now; Linux only."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":  # the libraries read it when they are loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    main()
