"""Try every adapter method in every architecture, and write docs/conformance.md.

Run:  python benchmarks/conformance.py        (about a minute on one core; no network, no real model)
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

from conformance_cases import Matrix, counts, page  # noqa: E402  (the tests' own cases: one statement of what is tried)


def main() -> None:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder))
        target = REPOSITORY / "docs" / "conformance.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text(page(matrix.finding), encoding="utf-8")
        told = ", ".join(f"{count} {kind}" for kind, count in counts(matrix.finding).items())
    print(f"{target}: {told}, in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
