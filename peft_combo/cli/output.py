"""What commands print: lines, tables, JSON, errors and faults; progress and notes on stderr.

The only place that writes to the terminal. A text from outside is printed literally here: no markup is read in it, its
control characters are escaped, and what the stream's encoding cannot show is replaced.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft_combo.callbacks import RunCallback
from peft_combo.errors import Fault, PeftComboError, is_printable, make_printable, shorten

if TYPE_CHECKING:
    from rich.console import Console

_NAME_WIDTH = 28  # characters of the names beside figures; on a terminal longer ones are folded
_LINE_LIMIT = 4096  # characters; the longest path there is
_quiet = False


class ConsoleWatch(RunCallback):
    """Shows a run on stderr: notes, one plan line, a bar with loss and validation metric.

    Where nobody reads any more (a closed terminal, a pipe that ended), it falls silent and the run goes on.
    """

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.main = get_rank() == 0
        heard = self.main and not _quiet
        self._console = _make_console(stderr=True, quiet=not heard, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[told]}", markup=False), console=self._console, transient=True,
            disable=not (heard and self._console.is_terminal),
        )  # fmt: skip
        self._task: Any = None
        self._metric = ""
        self._told = {"loss": "", "valid": ""}

    def on_note(self, text: str) -> None:
        with self._printing():
            self._console.print(make_printable(text))

    def on_stage(self, name: str, total: int) -> None:
        with self._printing():
            if self._task is None:
                self._bar.start()
            before, self._task = self._task, self._bar.add_task(make_printable(name), total=total, told="")
            if before is not None:
                self._bar.remove_task(before)

    def on_advance(self, units: int) -> None:
        if self._task is not None:
            with self._printing():
                self._bar.advance(self._task, units)

    def on_plan(self, summary: str, metric: str) -> None:
        self._metric = metric
        self.on_note(f"Plan: {summary}")

    def on_step_end(self, step: int, loss: float) -> None:
        self._told["loss"] = f"loss {loss:.3f}"
        if self._task is not None:
            with self._printing():
                self._bar.update(self._task, advance=1, told="  ".join(filter(None, self._told.values())))

    def on_evaluate(self, step: int, values: Mapping[str, float], best: bool) -> None:
        self._told["valid"] = f"valid {format_metric_name(self._metric)} {values[self._metric]:.4f}"
        self.on_note(f"step {step}: {self._told['loss']}, {self._told['valid']}{' *' if best else ''}")

    def close(self) -> None:
        with self._printing():
            self._bar.stop()

    @contextmanager
    def _printing(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._bar.disable = self._console.quiet = True


@contextmanager
def console_watch() -> Iterator[ConsoleWatch]:
    callback = ConsoleWatch()
    try:
        yield callback
    finally:
        callback.close()


def get_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def set_quiet(quiet: bool) -> None:
    """Keep notes and progress off stderr, or let them through again; every command line says which."""
    global _quiet
    _quiet = quiet


def format_metric(metrics: Mapping[str, Any], when: str, name: str) -> str:
    values = metrics.get(when)
    value = values.get(name) if isinstance(values, Mapping) else None
    value = value.get("value") if isinstance(value, Mapping) else value
    return f"{value:.3f}" if isinstance(value, int | float) else "?"


def format_metric_name(name: str) -> str:
    """Write a metric as people do: NDCG@10, macro F1."""
    return name.upper() if "@" in name or name == "mrr" else name.replace("_", " ").replace("f1", "F1")


def format_figure(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_figure(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        return "; ".join(map(format_figure, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_line(text: object = "") -> None:
    """Print one line; a line end within it is escaped as any control character is."""
    _write(f"{make_printable(str(text))}\n")


def print_text(text: str) -> None:
    """Print a document, such as a model card, with its line ends and tabs."""
    _write(re.sub(r"[^\r\n\t]+|\r(?!\n)", lambda found: make_printable(found[0]), text))


def print_error(error: object) -> None:
    """Print an error on stderr, line by line."""
    if sys.stderr is not None:
        sys.stderr.write("".join(f"{shorten(line, _LINE_LIMIT)}\n" for line in str(error).split("\n")))


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[Any]], numbers: bool = False, best: int | None = None
) -> None:
    """Print rows in columns.

    Args:
        numbers: columns but the first are figures, which are never cut or folded, however narrow the terminal is.
        best: place of the row that stands out, in bold where the terminal can.
    """
    from rich.measure import Measurement
    from rich.table import Table

    console = _make_console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(header):
        justify: Any = "right" if numbers and place else "left"
        names = numbers and not place
        table.add_column(
            make_printable(name), justify=justify, overflow="fold", no_wrap=numbers and not names,
            max_width=_NAME_WIDTH if names and console.is_terminal else None,
        )  # fmt: skip
    for place, row in enumerate(rows):
        table.add_row(*(make_printable(str(cell)) for cell in row), style="bold" if place == best else None)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a pipe has no width; do not fold what a program will read
    if numbers:
        console.width = max(console.width, Measurement.get(console, console.options.update(width=1000), table).maximum)
    _print_rich(console, table)


def print_marked(parts: Sequence[tuple[str, str | None]]) -> None:
    """Print one line made of parts, each in its style ("bold red") where it has one."""
    from rich.text import Text

    _print_rich(_make_console(soft_wrap=True), Text.assemble(*((make_printable(t), style or "") for t, style in parts)))


def print_json(value: Any) -> None:
    """Print JSON that any parser reads: no NaN; escaped what is not printable or not in the stream's encoding."""
    text = json.dumps(_make_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"

    def is_shown(char: str) -> bool:
        return is_printable(char) and char.encode(encoding, "ignore") != b""

    _write(
        re.sub(r"[^ -~\n]", lambda found: found[0] if is_shown(found[0]) else json.dumps(found[0])[1:-1], text) + "\n"
    )


def _make_finite(value: Any) -> Any:
    """Return a value with None in place of every NaN and infinity, which JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _make_finite(inner) for key, inner in value.items()}
    return [_make_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _make_console(**options: Any) -> Console:
    """Make a console; under NO_COLOR (https://no-color.org) it writes plain text, without bold as well."""
    from rich.console import Console

    if os.environ.get("NO_COLOR"):
        options["color_system"] = None
    return Console(markup=False, emoji=False, highlight=False, **options)


def _print_rich(console: Console, renderable: Any) -> None:
    with console.capture() as captured:
        console.print(renderable)
    _write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))  # a table fills its last column


def _write(text: str) -> None:
    if sys.stdout is not None:  # a program without a console, or one started with >&-
        sys.stdout.write(text)


def print_faults(prefix: str, faults: Sequence[Fault], fine: str) -> None:
    if not faults:
        print_line(fine)
        return
    raise PeftComboError.from_faults(f"{prefix}{len(faults)} fault{'s' if len(faults) > 1 else ''}:", faults)


def split_words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]
