"""The service with an engine that answers by a script, for smoke runs: it loads no encoder, so it starts at once."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


@contextmanager
def run_scripted(**settings: Any) -> Iterator[str]:
    """Serve in a process of its own, open for every scope, and give its URL."""
    from peft_combo.serving.config import make_config
    from peft_combo.serving.connections import bind

    with tempfile.TemporaryDirectory(prefix="scripted-") as state:
        values = {"recipe": "none", "state": state, "open": ["read", "write", "admin"], "port": 0, **settings}
        bound = bind(make_config(values))
        bound.listen()
        process = multiprocessing.get_context("fork").Process(target=_serve, args=(values, bound), daemon=True)
        process.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            process.terminate()
            process.join(20)
            bound.close()


def _serve(values: dict[str, Any], bound: Any) -> None:
    from scripted_engine import ScriptedEngine

    from peft_combo.serving.app import make_app, make_context
    from peft_combo.serving.config import make_config
    from peft_combo.serving.connections import make_server
    from peft_combo.serving.state import State

    config = make_config(values)
    state = State.open(config.state)
    make_server(make_app(make_context(config, ScriptedEngine(state), state)), config).run(sockets=[bound])
