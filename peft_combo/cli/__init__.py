"""The command line: words in, library calls, tables out.

Results go to stdout (a table, or JSON with ``--json``), progress and notes to stderr. Imports of everything heavy stand
inside the commands, so that ``--help`` and the recipe commands answer at once. One module for each group of commands;
importing it registers them, and the order here is the order of the help.
"""

from __future__ import annotations

# ruff: noqa: F401, I001
from peft_combo.cli import tune
from peft_combo.cli import embed
from peft_combo.cli import evaluate
from peft_combo.cli import uplift
from peft_combo.cli import retune
from peft_combo.cli import compare
from peft_combo.cli import recommend
from peft_combo.cli import tag
from peft_combo.cli import rate
from peft_combo.cli import due
from peft_combo.cli import recipes
from peft_combo.cli import adapters
from peft_combo.cli import export
from peft_combo.cli import adapter_tools
from peft_combo.cli import data
from peft_combo.cli import label
from peft_combo.cli import serve
from peft_combo.cli import doctor
from peft_combo.cli.app import app

__all__ = ["app"]
