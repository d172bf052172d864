"""Promotions under load: does an answer ever fail, mix two releases, or come much later while one is swapped in?

    python benchmarks/serve_promotions.py                      # 1,000 promotions, a made-up shop, some ten minutes
    python benchmarks/serve_promotions.py --promotions 100 --threads 4 --json

Two versions of an adapter take turns behind one alias, in one process, through `Service`, while threads ask for
completions with words, searches and bundles without a pause. Every promotion builds its release anew from the store and
the folder of fitted recommenders (nothing is kept for a rollback), warms it up and swaps it in. Reported:

- failed: answers that raised. mixed: answers whose digest is of one release and whose results of another; the results
  of each release alone were noted before.
- p99 of the time of an answer while no promotion runs, and while they do: a build takes a core of its own away, so on a
  machine with few cores most of what is seen is that. "swap" is the exchange itself, which is all that requests meet.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _smoke import add_smoke
from served_shop import Served, build_served

from peft_combo.serving.answers import Answer
from peft_combo.serving.config import make_config
from peft_combo.serving.requests import ServiceRequest
from peft_combo.serving.service import Service
from peft_combo.serving.state import State

ALIAS = "tiny@prod"
REQUESTS = (
    ("complete", {"items": ["p0", "p6"], "k": 20}),
    ("complete", {"items": ["p1"], "query": "w12 w31", "k": 20}),
    ("search", {"query": "w14 w40", "k": 20}),
    ("compose", {"items": ["p2"], "k": 3}),
)


@dataclass
class Load:
    """What threads saw: when each answer came, how long it took, and what was wrong."""

    service: Service
    alone: dict[tuple[str, int], tuple[str, list[Any]]]
    took: list[tuple[float, float]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not self.stop.is_set():
            place = int(rng.integers(len(REQUESTS)))
            started = time.perf_counter()
            try:
                answer = ask(self.service, place)
            except Exception as error:
                self.failed.append(f"{type(error).__name__}: {error}")
                continue
            self.took.append((started, time.perf_counter() - started))
            digest, shown = self.alone[answer.origin.release, place]
            if digest != answer.origin.digest or not same(shown, digest_results(answer)):
                self.mixed.append(answer.request_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--promotions", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--quiet", type=float, default=20.0, help="seconds of load before the first promotion")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    add_smoke(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.smoke:
        options.promotions, options.threads, options.quiet = 4, 2, 0.3
    with tempfile.TemporaryDirectory(prefix="promotions-") as name:
        figures = measure(build_served(Path(name)), Path(name), options.promotions, options.threads, options.quiet)
    if options.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:34} {value:,.3f}" if isinstance(value, float) else f"{name:34} {value:,}"
                        for name, value in figures.items()))  # fmt: skip
    if figures["failed"] or figures["mixed"]:
        sys.exit(1)


def measure(served: Served, folder: Path, promotions: int, threads: int, quiet: float) -> dict[str, int | float]:
    """Ask while promotions happen, and compare with before."""
    state = State.open(folder / "state")
    settings = served.settings(folder / "state", store=served.store, follow="told")
    service = Service.open(make_config(settings), state, lambda note: None)
    service._deployments._keep = False
    alone: dict[tuple[str, int], tuple[str, list[Any]]] = {}
    for version in ("v2", "v1"):
        service.promote(ALIAS, version)
        for place in range(len(REQUESTS)):
            answer = ask(service, place)
            alone[answer.origin.release, place] = (answer.origin.digest, digest_results(answer))
    load = Load(service, alone)
    workers = [threading.Thread(target=load.run, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    time.sleep(quiet)
    began = time.perf_counter()
    for number in range(promotions):
        service.promote(ALIAS, ("v2", "v1")[number % 2])
    ended = time.perf_counter()
    load.stop.set()
    for worker in workers:
        worker.join()
    swaps = [one for one in service.measure().swaps if one.result == "promoted"]
    service.close()
    state.close()
    before = 1e3 * np.array([took for at, took in load.took if at + took < began])
    during = 1e3 * np.array([took for at, took in load.took if began <= at < ended])
    p99_before, p99_during = (float(np.quantile(one, 0.99)) if len(one) else 0.0 for one in (before, during))
    return {
        "promotions": promotions, "answers during them": len(during), "failed": len(load.failed),
        "mixed": len(load.mixed), "p50 before, ms": float(np.median(before)) if len(before) else 0.0,
        "p50 during, ms": float(np.median(during)) if len(during) else 0.0, "p99 before, ms": p99_before,
        "p99 during, ms": p99_during, "p99 during / before": p99_during / p99_before if p99_before else 0.0,
        "build of a release, ms (median)": float(np.median([one.build_ms for one in swaps])),
        "swap, ms (median)": float(np.median([one.swap_ms for one in swaps])),
    }  # fmt: skip


def ask(service: Service, place: int) -> Answer:
    route, values = REQUESTS[place]
    return getattr(service, route)(ServiceRequest(**values))  # type: ignore[no-any-return, arg-type]


def digest_results(answer: Answer) -> list[Any]:
    return [(tuple(one.get("items", [one.get("item_id")])), one["score"]) for one in answer.results]


def same(expected: list[Any], found: list[Any]) -> bool:
    return [ids for ids, _ in expected] == [ids for ids, _ in found] and bool(
        np.allclose([score for _, score in expected], [score for _, score in found], atol=1e-4)
    )


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":  # the libraries read it when they are loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    main()
