"""`watch`: the share of a class of texts over time, and an alarm when it rises."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from peft_combo.cli.app import JsonOption, StoreOption, app
from peft_combo.cli.complete import complete_adapter
from peft_combo.cli.output import console_watch, print_json, print_line, print_table
from peft_combo.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from peft_combo.evaluation.opinion import WatchReport, Window
    from peft_combo.metrics.quantification import ErrorRates


@app.command(short_help="Watch the share of negative texts over time.")
def watch(
    file: Annotated[Path, typer.Argument(help="Table of text and timestamp, or of label and timestamp.")],
    label: Annotated[str, typer.Option("--class", help="Class whose share is watched.")] = "negative",
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            autocompletion=complete_adapter,
            help="Classification adapter, as in reviews-zh; default the labels.",
        ),
    ] = None,
    window: Annotated[str, typer.Option("--window", help="Window of time, day or week.")] = "week",
    baseline: Annotated[int, typer.Option("--baseline", min=1, help="First windows, which say what is usual.")] = 8,
    rise: Annotated[float, typer.Option("--rise", min=0.01, max=0.99, help="Rise of the share to be found.")] = 0.1,
    arl: Annotated[
        float, typer.Option("--arl", min=2, max=10_000, help="Mean number of windows to a false alarm.")
    ] = 100.0,
    store: StoreOption = Path("adapters"),
    as_json: JsonOption = False,
) -> None:
    """Watch the share of negative texts per day or week, corrected for errors; exit code 4 says alarm.

    The errors of an adapter are measured on the test texts of its own recipe, which it never learned from.
    """
    if window not in ("day", "week"):
        raise DataError(f'Expected --window day or week, found "{window}".')
    times, given, rates = _read(file, label, adapter, store)

    from peft_combo.evaluation.opinion import watch_share

    found = watch_share(times, given, window=cast("Window", window), baseline=baseline, rise=rise, arl=arl, rates=rates)
    if as_json:
        print_json(found.to_json())
    else:
        _print_report(found, window, label, rates)
    if found.alarm is not None:
        raise typer.Exit(4)


def _read(
    file: Path, label: str, adapter: str | None, store: Path
) -> tuple[NDArray[Any], NDArray[Any], ErrorRates | None]:
    """Return the time of each text and whether it is of the class, and the error rates of who says so."""
    import numpy as np

    from peft_combo.data.labels.timed import read_timed

    timed = read_timed(file, "label" if adapter is None else "text")
    if adapter is None:
        return timed.times, np.array([cell == label for cell in timed.cells]), None
    with console_watch() as callback:
        from peft_combo.recommender.workspace import Workspace

        space = Workspace.of_adapter(adapter, store=store, task="classification", on_note=callback.on_note)
        told: Any = space.records[0].manifest.task.get("classes")
        classes = [str(name) for name in told or ()]
        if label not in classes:  # told before torch is loaded
            found = f'{adapter} knows no class "{label}". Classes: {", ".join(classes)}. Name one with --class.'
            raise DataError(f"{found} {did_you_mean(label, classes)}".rstrip())

        from peft_combo.encoder.heads.classification import ClassificationHead
        from peft_combo.evaluation.opinion import measure_rates
        from peft_combo.tuning.tasks.classification import read_test_texts

        live = space.bank.get(adapter)
        head = live.head_as(ClassificationHead)

        def classify(texts: list[str]) -> NDArray[Any]:
            vectors = space.bank.backbone.encode(texts, live.attached, progress=callback.on_advance)
            return head.classes(head.probabilities(vectors))[:, head.labels.index(label)]

        texts, labels = read_test_texts(space.recipe)
        callback.on_stage("Classifying", len(texts) + len(timed.cells))
        rates = measure_rates(classify(texts), [label in own for own in labels])
        return timed.times, classify(list(timed.cells)), rates


def _print_report(found: WatchReport, window: str, label: str, rates: ErrorRates | None) -> None:
    rows = [
        (
            one.start, f"{one.texts:,}", f"{one.given:,}", f"{one.share:.1%}", f"{one.low:.1%} to {one.high:.1%}",
            "baseline" if one.cusum is None else f"{one.cusum:.2f}" + (" alarm" if one.cusum >= found.limit else ""),
        )
        for one in found.windows
    ]  # fmt: skip
    print_table((window, "texts", label, "share", "95 %", "CUSUM"), rows)
    if rates is not None:
        print_line(
            f"Corrected for errors: {rates.true_rate:.1%} of {rates.positives:,} texts of the class get it, and "
            f"{rates.false_rate:.1%} of {rates.negatives:,} others."
        )
    print_line(
        f"Usual {found.usual:.1%}. The chart looks for a rise by {found.rise:.0%}; limit {found.limit:.2f}, at which a "
        f"false alarm comes once in {found.arl:g} {window}s on the mean."
    )
    print_line(f"Alarm in the {window} of {found.alarm}." if found.alarm else "No alarm.")
