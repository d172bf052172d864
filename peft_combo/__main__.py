"""Entry point of ``peft-combo``, ``python -m peft_combo`` and ``accelerate launch -m peft_combo``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; whatever ends it is one message on stderr and an exit code (see `cli.guard`)."""
    try:
        from peft_combo.cli import app
        from peft_combo.cli.guard import run
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(run(app, sys.argv[1:]))


if __name__ == "__main__":
    main()
