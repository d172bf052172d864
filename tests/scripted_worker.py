"""A worker of the service whose engine answers by a script; see `scripted_engine`."""

from __future__ import annotations

import sys

from scripted_engine import ScriptedEngine

from peft_combo.serving.processes import run_worker

if __name__ == "__main__":
    sys.exit(run_worker(int(sys.argv[1]), lambda config, state, on_note: ScriptedEngine(state)))  # type: ignore[arg-type]
