"""Try every adapter method in every architecture, and write docs/conformance.md.

Run:  python benchmarks/conformance.py        (about a minute on one core; no network, no real model)
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from _smoke import add_smoke  # first: it finds the tests' folder
from conformance_cases import Matrix, counts, page  # the tests' own cases: one statement of what is tried

PAGE = Path(__file__).resolve().parent.parent / "docs" / "conformance.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_smoke(parser)
    smoke = parser.parse_args().smoke
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder))
        if smoke:
            print(page(matrix.finding, ("lora", "prefix", "head"), ("BERT", "DistilBERT")))
            return
        PAGE.write_text(page(matrix.finding), encoding="utf-8")
        told = ", ".join(f"{count} {kind}" for kind, count in counts(matrix.finding).items())
    print(f"{PAGE}: {told}, in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
