"""What `--smoke` of every benchmark stands on: the tests' made-up shop and tiny encoder, so that a run takes seconds.

A smoke run goes through the whole script and prints its table, on data that say nothing; it writes nothing into docs/.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from made_up import build_encoder, build_shop


@dataclass(frozen=True)
class Tiny:
    """A made-up world in a temporary folder.

    Attributes:
        folder: scratch of this run. shop: a data folder, also below `folder` as bundlerec/clothing.
        changes: overrides of a recipe that make its run tiny.
    """

    folder: Path
    shop: Path
    changes: tuple[str, ...]


def add_smoke(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark the option that every one has."""
    parser.add_argument("--smoke", action="store_true", help="seconds on tiny made-up data: does it still run?")


@contextmanager
def make_tiny() -> Iterator[Tiny]:
    """Build the world, and take it away at the end."""
    with tempfile.TemporaryDirectory(prefix="smoke-") as name:
        folder = Path(name)
        shop = folder / "bundlerec" / "clothing"
        shop.mkdir(parents=True)
        changes = (
            f"backbone.model={build_encoder(folder / 'encoder')}", "backbone.max_length=16", "training.epochs=1",
            f"store={folder / 'adapters'}",
        )  # fmt: skip
        yield Tiny(folder, build_shop(shop, above="Clothing > Women > All > "), changes)
