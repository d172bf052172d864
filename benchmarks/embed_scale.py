"""Embedding by workers: texts a second of one process, of one worker and of two, and what a killed worker changes.

    python benchmarks/embed_scale.py                            # 8,000 titles, local processes and Ray, some minutes
    python benchmarks/embed_scale.py --texts 200000 --on ray --workers 1,2,4,8

The texts are titles of the demo catalogue, each with a number so that no two are equal. Every way writes them into a
vector cache of its own: digests, blocks and the final file are part of the time, the start of workers and the loading
of the encoder are not, for they are paid once (`start` says what they took). Every process has one thread, so that a
ratio is one of workers and not of threads; all ways take turns in one run, so that they share whatever else the machine
does.

The last run of each kind has a worker ended by `kill -9` at the first block that comes back; `difference` is the
largest coordinate's from the single process.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _smoke import add_smoke, make_tiny
from numpy.typing import NDArray

from peft_combo.data.sources import open_dataset
from peft_combo.distributed import LocalExecutor, RayExecutor
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.loading import count_gpus
from peft_combo.encoder.vectors import VectorCache, embed
from peft_combo.recipe.files import load_recipe
from peft_combo.store.adapter_store import AdapterStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=8_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--on", default="local,ray")
    parser.add_argument("--workers", default="1,2")
    add_smoke(parser)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if options.smoke:
        with make_tiny() as tiny:
            run(str(tiny.folder / "encoder"), str(tiny.shop), 300, 1, ["local"], [1])
        return
    run("embedded", None, options.texts, options.rounds, options.on.split(","), [*map(int, options.workers.split(","))])


def run(model: str, data: str | None, count: int, rounds: int, kinds: list[str], sizes: list[int]) -> None:
    """Print a line for each way."""
    titles = open_dataset(load_recipe("lora-fashion", (), data).data).catalog.texts("{title}")
    texts = [f"{titles[place % len(titles)]} {place // len(titles)}" for place in range(count)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bank = AdapterBank(Backbone.load(model), AdapterStore(folder / "adapters"))
        print(
            f"{count:,} texts, {os.cpu_count()} cores, {count_gpus()} GPUs, load {os.getloadavg()[0]:.1f} at the start"
        )
        print(f"{'':24}{'texts/s':>9}{'ratio':>8}{'start s':>9}{'difference':>12}")
        for kind in kinds:
            _compare(bank, texts, folder, kind, sizes, rounds)


def _compare(bank: AdapterBank, texts: list[str], folder: Path, kind: str, sizes: list[int], rounds: int) -> None:
    """Print the lines of one kind of executor; those of different sizes take turns with the single process."""
    opened: dict[int, Any] = {}
    starts: dict[int, float] = {}
    for size in sizes:
        clock = time.perf_counter()
        # One cluster for all: the first executor starts it, with room for every worker of the others.
        opened[size] = _open(kind, size if kind == "local" else max(sizes))
        opened[size].size = size
        warm = [f"warm {place}" for place in range(8 * size)]
        embed(bank, warm, None, folder / f"warm-{kind}-{size}", executor=opened[size])
        starts[size] = time.perf_counter() - clock
    seconds: dict[int, list[float]] = {size: [] for size in (0, *sizes)}
    for turn in range(rounds):
        for size in (0, *sizes):
            target = folder / f"{kind}-{size}-{turn}"
            clock = time.perf_counter()
            embed(bank, texts, None, target, executor=opened.get(size))
            seconds[size].append(time.perf_counter() - clock)
    alone = _read(bank, texts, folder / f"{kind}-0-0")
    single = statistics.median(seconds[0])
    print(f"{'one process':24}{len(texts) / single:9,.0f}{1:8.2f}")
    for size in sizes:
        taken = statistics.median(seconds[size])
        away = np.abs(_read(bank, texts, folder / f"{kind}-{size}-0") - alone).max()
        told = f"{kind}, {size} worker{'s' if size > 1 else ''}"
        print(f"{told:24}{len(texts) / taken:9,.0f}{single / taken:8.2f}{starts[size]:9.1f}{away:12.1e}")
    if max(sizes) > 1:  # one alone leaves nobody to take over
        _kill(bank, texts, folder / f"{kind}-killed", opened[max(sizes)], kind, alone)
    for executor in reversed(opened.values()):
        executor.close()


def _kill(
    bank: AdapterBank, texts: list[str], folder: Path, executor: Any, kind: str, alone: NDArray[np.float32]
) -> None:
    """Encode once more, and end a worker when the first block is back."""
    done: list[int] = []

    def end_one(rows: int) -> None:
        if not done:
            os.kill(executor.pids[0], signal.SIGKILL)
        done.append(rows)

    clock = time.perf_counter()
    encoded = embed(bank, texts, None, folder, executor=executor, progress=end_one)
    taken = time.perf_counter() - clock
    away = np.abs(_read(bank, texts, folder) - alone).max()
    told = f"{kind}, one killed"
    print(f"{told:24}{encoded / taken:9,.0f}{'':8}{'':9}{away:12.1e}   {len(done)} blocks, none twice in the file")
    assert sum(done) == encoded == len(texts)
    assert away <= 1e-6, away


def _open(kind: str, size: int) -> Any:
    return LocalExecutor(size, gpus=count_gpus()) if kind == "local" else RayExecutor(size)


def _read(bank: AdapterBank, texts: list[str], folder: Path) -> NDArray[np.float32]:
    return VectorCache(folder).vectors(bank, texts, None)


if __name__ == "__main__":
    main()
