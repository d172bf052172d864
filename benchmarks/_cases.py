"""What benchmarks of several data sets ask for: which of them, and where their data lie."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Collection
from pathlib import Path

from _smoke import add_smoke


def parse_cases(parser: argparse.ArgumentParser, known: Collection[str], default: str = "all") -> argparse.Namespace:
    """Read the command line; a case that is not known, or data without a folder, ends the program with a message.

    Warnings and the log are silent from then on.

    Args:
        default: what is measured where no case is named, for the help text.
    """
    names = ", ".join(known)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {names}; default: {default}")
    parser.add_argument("--data-root", type=Path, default=os.environ.get("PEFT_COMBO_DATA"))
    add_smoke(parser)
    options = parser.parse_args()
    if unknown := [name for name in options.cases if name not in known]:
        parser.error(f"no case {', '.join(unknown)}; there are {names}")
    if options.data_root is None and not options.smoke:
        parser.error("name the folder of the data by --data-root or PEFT_COMBO_DATA")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    return options
