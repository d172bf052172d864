"""Where the charts of commands go: into the run folder of the recipe, or to the file that `--plot` names.

A chart that nobody asked for is no reason to fail: where it cannot be written a line says so. With `--json`, for a
program, there is one only where it was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft_combo.cli.output import print_line
from peft_combo.errors import PeftComboError

PLOT_HELP = "Chart to write, .html, .svg or .png; default an .html in the run folder, with --json none."


def write_chart(draw: Callable[[Path], None], asked: Path | None, usual: Path, as_json: bool) -> None:
    """Write a chart and print where it is.

    Args:
        draw: writes it to a path. asked: the file of `--plot`. usual: where it goes without one.
    Raises:
        PeftComboError: it was asked for and cannot be written.
    """
    if asked is not None:
        draw(asked)
    elif as_json:
        return
    else:
        try:
            draw(usual)
        except PeftComboError as error:
            print_line(f"No chart: {error}")
            return
    if not as_json:
        print_line(f"Chart: {asked or usual}")
