"""Entry point of a worker process: ``python -m peft_combo.serving.worker SOCKET``; see `processes`."""

from __future__ import annotations

import sys

from peft_combo.serving.processes import run_worker
from peft_combo.serving.service import Service


def main() -> None:
    """Run a worker over a socket that the supervisor listens with."""
    sys.exit(run_worker(int(sys.argv[1]), Service.open))


if __name__ == "__main__":
    main()
