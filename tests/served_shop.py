"""A shop that can be served: tiny encoder, priced catalogue, and a store with two versions and an alias.

Built once for a session in some three seconds: what the tests of the service, its page and its benchmarks stand on.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from made_up import build_encoder, build_priced_shop

_REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Served:
    """Folders of a shop to serve.

    Attributes:
        recipe: a YAML file that names encoder, data and store. store: with tiny@v1, tiny@v2, and tiny@prod on v1.
        cache, fitted: of vectors and fitted recommenders, shared by whoever serves it.
    """

    folder: Path
    recipe: Path
    shop: Path
    store: Path
    cache: Path
    fitted: Path

    def settings(self, state: Path | str, **more: Any) -> dict[str, Any]:
        """Return values for `make_config`."""
        return {
            "recipe": str(self.recipe), "adapters": ("tiny@prod",), "state": str(state), "vectors": self.cache,
            "fitted": self.fitted, **more,
        }  # fmt: skip

    def command(self, state: Path | str, *more: str) -> list[str]:
        """Return a command line that serves it on a free port."""
        return [
            sys.executable, "-m", "peft_combo", "serve", "--recipe", str(self.recipe), "--adapter", "tiny@prod",
            "--state", str(state), "--cache", str(self.cache), "--fitted", str(self.fitted), "--port", "0", *more,
        ]  # fmt: skip


def build_served(folder: Path) -> Served:
    """Build the shop, and tune two versions of its adapter by a recipe of one epoch and one of two."""
    from peft_combo.recipe.parse import parse_recipe
    from peft_combo.store import AdapterStore
    from peft_combo.tuning import tune

    shop = folder / "shop"
    shop.mkdir()
    encoder = build_encoder(folder / "encoder")
    build_priced_shop(shop)
    raw: dict[str, Any] = {
        "category": "tiny", "store": str(folder / "adapters"),
        "backbone": {"model": str(encoder), "max_length": 16}, "data": {"source": "folder", "path": str(shop)},
        "adapter": {"method": "lora", "rank": 4, "top_layers": 2},
        "training": {"epochs": 1, "batch_size": 16, "learning_rate": 5e-3},
    }  # fmt: skip
    for epochs in (1, 2):
        recipe = parse_recipe({**raw, "name": "tiny", "training": {**raw["training"], "epochs": epochs}})
        tune(recipe, run_folder=folder / "runs" / str(epochs))
    AdapterStore(folder / "adapters").alias("tiny@v1", "prod")
    file = folder / "tiny.yaml"
    file.write_text(_write_yaml(raw))
    return Served(folder, file, shop, folder / "adapters", folder / "vectors", folder / "fitted")


def _write_yaml(raw: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(raw, sort_keys=False))


@contextmanager
def run_service(command: list[str], **environ: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start a service as a process of its own, and end it; gives its URL, once it can be asked."""
    process = start_service(command, **environ)
    try:
        yield read_url(process), process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


def start_service(command: list[str], folder: Path | None = None, **environ: str) -> subprocess.Popen[str]:
    """Start a service; `read_url` waits for it."""
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(_REPOSITORY), "PYTHONWARNINGS": "ignore", **environ},
    )  # fmt: skip


def read_url(process: subprocess.Popen[str]) -> str:
    """Wait for the line that tells where a service can be asked, and return its URL."""
    assert process.stdout is not None
    end = time.monotonic() + 120
    while time.monotonic() < end:
        line = process.stdout.readline()
        if found := re.search(r"https?://\S+?:\d+", line):
            return found[0]
        if not line:
            raise RuntimeError(f"The service ended with code {process.wait()} before it could be asked.")
    raise RuntimeError("The service was not ready within two minutes.")
