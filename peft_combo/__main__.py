"""Entry point of ``peft-combo``, ``python -m peft_combo`` and ``accelerate launch -m peft_combo``."""

from __future__ import annotations

import sys

from peft_combo.cli.app import app
from peft_combo.errors import PeftComboError


def main() -> None:
    """Run the command line; what a user can put right is one message on stderr and exit code 1."""
    try:
        app(prog_name="peft-combo")
    except PeftComboError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
