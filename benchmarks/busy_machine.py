"""What a busy machine costs a run, with OpenMP's threads as they are by default and as the command line sets them.

    python benchmarks/busy_machine.py            # some ten minutes; leave the machine alone meanwhile
    python benchmarks/busy_machine.py --rounds 5 --neighbours 2

Threads that spin at a barrier take the processor from the one they wait for, once there are more of them than free
cores. Each figure is the time of one epoch of `peft-combo tune --recipe lora-fashion`, start and end of the process
within, median over the rounds, as a ratio of the default on the quiet machine; rounds are interleaved, so a drift of
the machine hits all alike. Busy means that so many other processes compute meanwhile, one thread each. On 2 cores with
2 such neighbours, 3 rounds:

    threads       quiet     busy   busy / quiet
    default        1.00     3.42           3.42
    ours           0.99     1.84           1.85

- default: OMP_WAIT_POLICY=active, what libgomp does where it is told nothing, and a thread for each core.
- ours: what `peft_combo.__main__` chooses: OMP_WAIT_POLICY=passive, and as many threads as a quota allows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from _smoke import add_smoke, make_tiny

SPIN = "while True: sum(range(100_000))"
CHOSEN = ("OMP_", "GOMP_", "KMP_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--neighbours", type=int, default=os.cpu_count() or 1, help="processes beside; default cores")
    add_smoke(parser)
    options = parser.parse_args()
    with make_tiny() if options.smoke else nullcontext() as tiny:
        words = ["--recipe", "lora-fashion", "--set", "training.epochs=1"]
        if tiny is not None:
            words += ["--data", str(tiny.shop), *(word for one in tiny.changes for word in ("--set", one))]
        if options.smoke:  # one setting, one thread: spinning ones would hold up whatever runs beside a smoke run
            report(words, 1, 1, 1, ("default",))
        else:
            report(words, options.rounds, options.neighbours, os.cpu_count() or 1)


def report(
    words: list[str], rounds: int, neighbours: int, threads: int, names: tuple[str, ...] = ("default", "ours")
) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(CHOSEN)}
    spinning = clean | {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": str(threads)}
    settings = {name: spinning if name == "default" else clean for name in names}
    times: dict[tuple[str, bool], list[float]] = {}
    for _ in range(rounds):
        for busy in (False, True):
            with keep_busy(neighbours if busy else 0):
                for name, environ in settings.items():
                    times.setdefault((name, busy), []).append(time_tuning(words, environ))
    middle = {key: statistics.median(taken) for key, taken in times.items()}
    base = middle["default", False]
    print(f"{threads} cores, {neighbours} neighbours, {rounds} rounds; the default on the quiet machine: {base:.1f} s")
    print(f"{'threads':10} {'quiet':>8} {'busy':>8} {'busy / quiet':>14}")
    for name in settings:
        quiet, busy = middle[name, False], middle[name, True]
        print(f"{name:10} {quiet / base:8.2f} {busy / base:8.2f} {busy / quiet:14.2f}")


def time_tuning(words: list[str], environ: dict[str, str]) -> float:
    """Return the seconds of tuning an adapter for one epoch into a store that is empty."""
    with tempfile.TemporaryDirectory(prefix="busy-") as folder:
        started = time.perf_counter()
        places = ("--store", str(Path(folder) / "adapters"), "--run-folder", str(Path(folder) / "run"))
        command = [sys.executable, "-m", "peft_combo", "tune", *words, *places]
        subprocess.run(command, env=environ, check=True, capture_output=True)
        return time.perf_counter() - started


@contextmanager
def keep_busy(count: int) -> Iterator[None]:
    """Let so many processes compute while the block runs."""
    running = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
