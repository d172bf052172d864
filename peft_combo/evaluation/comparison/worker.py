"""Worker of a comparison: one run in a process of its own, so that its time and peak memory are its own.

``python -m peft_combo.comparing.one FOLDER`` reads ``recipe.yaml`` and ``sample.json`` there and leaves
``result.json``, or ``failed.txt`` with what a user can put right.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from peft_combo.callbacks import RunCallback
from peft_combo.encoder.backbone import Backbone
from peft_combo.errors import PeftComboError
from peft_combo.evaluation.comparison.result import BATCHES, FAILED, RECIPE, RESULT, SAMPLE, Result
from peft_combo.files import write_text
from peft_combo.recipe.files import load_recipe
from peft_combo.recipe.model import Recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.versions import AdapterRecord
from peft_combo.tuning.loop import TuneResult, tune

_REPEATS = 21


class _Best(RunCallback):
    """Remembers the validation metric of the best step, and of the last one for runs that keep the last."""

    def __init__(self, metric: str) -> None:
        self._metric = metric
        self._best: float | None = None
        self._last = float("nan")

    @property
    def value(self) -> float:
        return self._last if self._best is None else self._best

    def on_evaluate(self, step: int, values: Mapping[str, float], best: bool) -> None:
        self._last = values[self._metric]
        if best:
            self._best = self._last


def main() -> None:
    folder = Path(sys.argv[1])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        recipe = load_recipe(folder / RECIPE)
        callback = _Best(recipe.metric)
        tuned = tune(recipe, run_folder=folder / "run", callback=callback)
        result = _result(recipe, tuned, callback, json.loads((folder / SAMPLE).read_text(encoding="utf-8")))
        write_text(folder / RESULT, result.model_dump_json())
    except PeftComboError as error:
        write_text(folder / FAILED, str(error))
        sys.exit(1)


def _end_with_parent() -> None:
    """Die where the comparison does: its end of the pipe closes, however it ends."""
    # os.read, not sys.stdin: a reader that still holds the lock of a buffered stream upsets the interpreter's exit.
    while os.read(0, 1):
        pass
    os._exit(3)


def _result(recipe: Recipe, tuned: TuneResult, callback: _Best, sample: Sequence[str]) -> Result:
    table, record = tuned.table, tuned.record
    asked = table.per_question
    encode_ms, frozen_ms, load_ms = _serving(recipe, record, sample)
    return Result(
        metric=table.metric if asked is not None else recipe.metric,
        value=table.after.values[table.metric] if asked is not None else callback.value,
        clusters=None if asked is None else tuple(asked.clusters.tolist()),
        before=None if asked is None else tuple(asked.before.tolist()),
        after=None if asked is None else tuple(asked.after.tolist()),
        asked=table.asked if asked is not None else f"{tuned.plan.examples['valid']:,} validation {tuned.plan.unit}",
        adapter_parameters=tuned.plan.adapter_parameters,
        head_parameters=tuned.plan.head_parameters,
        stored_bytes=sum(entry.bytes for entry in record.manifest.files.values()),
        steps=len(tuned.losses),
        seconds=tuned.seconds,
        peak_mib=tuned.peak_mib,
        encode_ms=encode_ms,
        frozen_ms=frozen_ms,
        load_ms=load_ms,
        machine=f"{os.cpu_count()} cores, {tuned.plan.processes} x {tuned.plan.device}, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}",
        adapter=str(record.path),
    )


def _serving(
    recipe: Recipe, record: AdapterRecord, sample: Sequence[str]
) -> tuple[dict[int, float], dict[int, float], float]:
    """Return the milliseconds of encoding 1 and 32 texts, with the adapter and frozen, and of loading the adapter."""
    backbone = Backbone.of(recipe.backbone)
    store = AdapterStore(recipe.store)
    load = _median_ms([lambda: backbone.attach(store.open(record.reference))], repeats=5)[0]
    attached = backbone.attach(record)
    encode, frozen = {}, {}
    for size in BATCHES:
        texts = [sample[place % len(sample)] for place in range(size)]
        # In turn, so that what else the machine does meanwhile falls on both alike.
        encode[size], frozen[size] = _median_ms(
            [lambda texts=texts: backbone.encode(texts, attached), lambda texts=texts: backbone.encode(texts)],  # type: ignore[misc]
            repeats=_REPEATS,
        )
    return encode, frozen, load


def _median_ms(jobs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return for each job the median time in milliseconds, after one run that does not count."""
    for job in jobs:
        job()
    times: list[list[float]] = [[] for _ in jobs]
    for _ in range(repeats):
        for job, taken in zip(jobs, times, strict=True):
            clock = time.perf_counter()
            job()
            taken.append(1000 * (time.perf_counter() - clock))
    return [float(np.median(taken)) for taken in times]


if __name__ == "__main__":
    main()
