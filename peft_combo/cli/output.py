"""What commands print: tables, JSON, faults on stdout; progress and notes on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft_combo.callbacks import RunCallback
from peft_combo.errors import Fault, PeftComboError


class ConsoleWatch(RunCallback):
    """Shows a run on stderr: notes, one plan line, a bar with loss and validation metric.

    Where nobody reads any more (a closed terminal, a pipe that ended), it falls silent and the run goes on.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.main = get_rank() == 0
        self._console = Console(stderr=True, quiet=not self.main, soft_wrap=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[told]}"), console=self._console, transient=True,
            disable=not (self.main and self._console.is_terminal),
        )  # fmt: skip
        self._task: Any = None
        self._metric = ""
        self._told = {"loss": "", "valid": ""}

    def on_note(self, text: str) -> None:
        with self._printing():
            self._console.print(text, markup=False)

    def on_stage(self, name: str, total: int) -> None:
        with self._printing():
            if self._task is None:
                self._bar.start()
            before, self._task = self._task, self._bar.add_task(name, total=total, told="")
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
    import os

    return int(os.environ.get("RANK", "0"))


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


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], numbers: bool = False) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if numbers and place else "left", overflow="fold", no_wrap=numbers)
    for row in rows:
        table.add_row(*(str(cell).replace("[", r"\[") for cell in row))
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a pipe has no width; do not fold what a program will read
    console.print(table)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=_to_plain))


def _to_plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return value._asdict()
    return str(value)


def print_faults(prefix: str, faults: Sequence[Fault], fine: str) -> None:
    if not faults:
        print(fine)
        return
    raise PeftComboError.from_faults(f"{prefix}{len(faults)} fault{'s' if len(faults) > 1 else ''}:", faults)


def split_words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]
