"""What N items, M interactions and C categories take: memory, hours and money, from measured unit costs.

    python benchmarks/scale_plan.py --items 50000000 --interactions 1000000000 --categories 1000 --gpus 8
    python benchmarks/scale_plan.py --items 2000000 --interactions 30000000 --categories 40 --cores 64
    python benchmarks/scale_plan.py --check            # measures two points here and compares the plan with them

Every unit cost is printed with where it was measured; all can be given. Prices are the reader's: the defaults are round
numbers to multiply with. What is not in it: copying data to the machines, and whatever waits for a queue.

--check encodes and tunes on this machine: unit costs from small runs, the plan's figures for larger ones, and what
those took: one thread, and seconds of the processor, which others on the machine do not make longer.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from _smoke import add_smoke, make_tiny

from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.shards import embed_shards
from peft_combo.machine import LIMITS
from peft_combo.recipe.files import load_recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.loop import tune

_GIB = 2**30
_NEIGHBOURS = 200  # kept of each item


@dataclass(frozen=True)
class Costs:
    """Unit costs; the comments say where they were measured (embedded encoder, titles of the demo)."""

    texts_per_gpu: float = 37_508  # texts/s of an H100, docs/gpu.md
    texts_per_core: float = 237  # texts/s of one thread, --check; 16 threads of one process give 1,828, docs/gpu.md
    worker_ratio: float = 0.88  # of that, once it is handed out and written: Ray in benchmarks/embed_scale.py
    vector_bytes: int = 384 * 4  # in shards, float32
    index_bytes: int = 384 + 12  # a vector in an index of 8-bit codes, with its id and list
    interaction_bytes: int = 32  # user, item, basket, time, and its cell in the sparse matrix
    neighbour_bytes: int = 8  # item and count
    tune_fixed: float = 9.6  # s of a tuning run whatever its data: loading, baselines, storing (a core, --check)
    tune_bundle: float = 0.0126  # s of a bundle in an epoch, LoRA in the top layer (a core, --check)
    tune_items: float = 1 / 237  # s of an item: it is encoded once below the adapter
    adapter_bytes: int = 2 * 2**20  # stored, with its head: `peft-combo adapters list`
    worker_bytes: int = 609 * 2**20  # resident, of a process that encodes 2,000 texts on a CPU


@dataclass(frozen=True)
class Demand:
    """What is asked for."""

    items: int
    interactions: int
    categories: int
    bundles: int  # of a category
    epochs: int
    gpus: int
    cores: int
    gpu_hour: float
    core_hour: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=50_000_000)
    parser.add_argument("--interactions", type=int, default=1_000_000_000)
    parser.add_argument("--categories", type=int, default=1000)
    parser.add_argument("--bundles", type=int, default=2000, help="of a category")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--cores", type=int, default=16)
    parser.add_argument("--gpu-hour", type=float, default=3.0, help="price of a GPU for an hour")
    parser.add_argument("--core-hour", type=float, default=0.05, help="price of a core for an hour")
    for name, value in vars(Costs()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--check", action="store_true", help="measure two points here")
    add_smoke(parser)
    options = vars(parser.parse_args())
    costs = Costs(**{name: options[name] for name in vars(Costs())})
    demand = Demand(**{name: options[name] for name in Demand.__dataclass_fields__})
    torch.set_num_threads(1)
    if options["smoke"]:
        print_plan(demand, costs)
        with make_tiny() as tiny:
            changes = (*tiny.changes, "training.batch_size=8")
            check(str(tiny.folder / "encoder"), changes, tiny.shop, costs, (100, 400), ((40, 1), (60, 3), (80, 4)))
    elif options["check"]:
        check("embedded", (), None, costs, (1000, 3000), ((150, 1), (300, 4), (600, 6)))
    else:
        print_plan(demand, costs)


def print_plan(demand: Demand, costs: Costs) -> None:
    """Print assumptions, then a line for each stage."""
    print("assumed: " + ", ".join(f"{name} {value:,.5g}" for name, value in vars(costs).items()))
    print("asked:   " + ", ".join(f"{name} {value:,}" for name, value in vars(demand).items()))
    rate = demand.gpus * costs.texts_per_gpu if demand.gpus else demand.cores * costs.texts_per_core
    hours = demand.items / (rate * costs.worker_ratio) / 3600
    hourly = demand.gpus * demand.gpu_hour if demand.gpus else demand.cores * demand.core_hour
    workers = demand.gpus or math.ceil(demand.cores / 4)
    adapter_hours = demand.categories * tune_seconds(demand.items // demand.categories, demand, costs) / 3600
    lines = [
        ("encode the catalogue once", hours, hours * hourly, workers * costs.worker_bytes,
         demand.items * costs.vector_bytes),
        ("  again after 1 % is new", hours / 100, hours * hourly / 100, 0, 0),
        ("index, 8-bit codes", 0.0, 0.0, demand.items * costs.index_bytes, demand.items * costs.index_bytes),
        ("interactions in memory", 0.0, 0.0, demand.interactions * costs.interaction_bytes, 0),
        (f"neighbours, {_NEIGHBOURS} an item", 0.0, 0.0, 0, demand.items * _NEIGHBOURS * costs.neighbour_bytes),
        ("tune an adapter a category", adapter_hours / demand.cores, adapter_hours * demand.core_hour,
         demand.cores * costs.worker_bytes, demand.categories * costs.adapter_bytes),
    ]  # fmt: skip
    print(f"\n{'':30}{'hours':>10}{'money':>12}{'memory GiB':>12}{'disk GiB':>10}")
    for name, spent, money, memory, disk in lines:
        print(f"{name:30}{spent:10,.2f}{money:12,.2f}{memory / _GIB:12,.1f}{disk / _GIB:10,.1f}")
    if demand.items > LIMITS.inverted_items:
        whole = demand.items**2 * 16 / _GIB
        print(
            f"EASE and CEASE over all items would invert a matrix of {whole:,.0f} GiB: by category (up to "
            f"{LIMITS.inverted_items:,} items each) or neighbours instead."
        )


def tune_seconds(items: int, demand: Demand, costs: Costs) -> float:
    """Return the seconds of one tuning run on a core."""
    return costs.tune_fixed + items * costs.tune_items + demand.bundles * demand.epochs * costs.tune_bundle


# --- two measured points ----------------------------------------------------------------------------------------------


class _Titles:
    """So many different titles."""

    def __init__(self, titles: list[str], count: int) -> None:
        self.rows = count
        self._texts = [f"{titles[place % len(titles)]} {place // len(titles)}" for place in range(count)]

    def blocks(self, size: int):  # type: ignore[no-untyped-def]
        return (self._texts[start : start + size] for start in range(0, self.rows, size))


def check(
    model: str, changes: tuple[str, ...], shop: Path | None, costs: Costs, texts: tuple[int, int],
    runs: tuple[tuple[int, int], ...],
) -> None:  # fmt: skip
    """Measure small runs, plan larger ones, and print both.

    Args:
        texts: encoded to measure, and planned. runs: bundles and epochs: two to measure, and the one planned.
    """
    from peft_combo.data.sources import open_dataset

    data = None if shop is None else str(shop)
    print(f"\nchecked here: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, one thread")
    print(f"{'':34}{'planned':>12}{'measured':>12}{'ratio':>8}")
    titles = open_dataset(load_recipe("lora-fashion", (), data).data).catalog.texts("{title}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bank = AdapterBank(Backbone.load(model, device="cpu"), AdapterStore(folder / "adapters"))
        embed_shards(bank, _Titles(titles, 100), None, folder / "warm")
        seconds, sizes = [], []
        for count in texts:
            clock = time.process_time()
            embed_shards(bank, _Titles(titles, count), None, folder / str(count))
            seconds.append(time.process_time() - clock)
            sizes.append(sum(file.stat().st_size for file in (folder / str(count)).iterdir()))
        here = replace(costs, texts_per_core=texts[0] / seconds[0], vector_bytes=bank.backbone.dim * 4)
        _print_point(f"encode {texts[1]:,} texts, s", texts[1] / here.texts_per_core, seconds[1])
        _print_point("  their disk, KiB", texts[1] * here.vector_bytes / 1024, sizes[1] / 1024)

        taken = []
        for place, (bundles, epochs) in enumerate(runs):
            keys = (f"data.max_bundles={bundles}", f"training.epochs={epochs}", "training.early_stopping=null")
            recipe = load_recipe("lora-fashion", (*changes, *keys, f"store={folder}/store{place}"), data)
            clock = time.process_time()
            tune(recipe, run_folder=folder / f"run{place}")
            taken.append(time.process_time() - clock)
        each = (taken[1] - taken[0]) / (runs[1][0] * runs[1][1] - runs[0][0] * runs[0][1])
        fixed = taken[0] - each * runs[0][0] * runs[0][1]
        planned = fixed + each * runs[2][0] * runs[2][1]
        _print_point(f"tune {runs[2][0]} bundles, {runs[2][1]} epochs, s", planned, taken[2])
        print(f"unit costs here: texts_per_core {here.texts_per_core:,.0f}, tune_fixed with this catalogue's items "
              f"{fixed:,.1f}, tune_bundle {each:.4f}")  # fmt: skip


def _print_point(name: str, planned: float, measured: float) -> None:
    print(f"{name:34}{planned:12,.2f}{measured:12,.2f}{planned / measured:8.2f}")


if __name__ == "__main__":
    main()
