"""What the benchmarks of the service stand on: a shop to serve, tiny or real, as a process of its own on loopback."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from served_shop import Served, build_served, read_url, run_service, start_service

__all__ = ["Served", "make_served", "read_url", "run_service", "start_service"]


@contextmanager
def make_served() -> Iterator[Served]:
    """Build the tiny shop, and take it away at the end."""
    with tempfile.TemporaryDirectory(prefix="served-") as name:
        yield build_served(Path(name))
