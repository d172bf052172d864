"""A whole service over a made-up shop, in this process: two tuned versions, a state, an address and an admin key."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from made_up import build_priced_shop

ALIAS = "tiny@prod"


@dataclass(frozen=True)
class ServedShop:
    """A service that runs.

    Attributes:
        url: its address, without a slash at the end.
        admin_key: a key with every scope.
        context: what its calls share: service, state, configuration.
    """

    url: str
    admin_key: str
    context: Any


def tune_versions(encoder: Path, folder: Path) -> Path:
    """Tune tiny@v1 and tiny@v2 on the priced shop, let tiny@prod be v1, and return the recipe of both.

    `folder` gets shop, store and recipe.
    """
    from conftest import make_tiny_recipe

    from peft_combo import AdapterStore, tune
    from peft_combo.recipe.files import write_recipe

    (folder / "shop").mkdir()
    build_priced_shop(folder / "shop")
    for epochs in (1, 6):
        recipe = make_tiny_recipe(encoder, folder / "shop", folder / "store", **{"training.epochs": epochs})
        tune(recipe, run_folder=folder / f"run-{epochs}")
    AdapterStore(folder / "store").alias("tiny@v1", "prod")
    write_recipe(recipe, folder / "recipe.yaml")
    return folder / "recipe.yaml"


@contextmanager
def serve_shop(encoder: Path, folder: Path, **changes: Any) -> Iterator[ServedShop]:
    """Serve the shop of `tune_versions` at a free port of loopback until the block ends."""
    from peft_combo.serving.app import make_app, make_context
    from peft_combo.serving.config import make_config
    from peft_combo.serving.connections import bind, make_server
    from peft_combo.serving.service import Service
    from peft_combo.serving.state import State

    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        tune_versions(encoder, folder)
    config = make_config(
        {
            "recipe": str(recipe), "store": folder / "store", "adapters": (ALIAS,), "vectors": folder / "vectors",
            "fitted": folder / "fitted", "state": str(folder / "state"), "port": 0, **changes,
        }
    )  # fmt: skip
    state = State.open(config.state)
    context = make_context(config, Service.open(config, state, lambda note: None), state)
    key = state.add_key("boss", frozenset({"read", "write", "admin"}))
    bound, started = bind(config), threading.Event()
    server = make_server(make_app(context), config, started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    with bound:
        thread.start()
        try:
            assert started.wait(30), "the server did not start"
            yield ServedShop(f"http://127.0.0.1:{bound.getsockname()[1]}", key, context)
        finally:
            server.should_exit = True
            thread.join(30)
