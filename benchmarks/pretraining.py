"""What reading a catalogue's texts without labels is worth to the tasks that follow, on BundleRec clothing.

    python benchmarks/pretraining.py --data-root FOLDER [--seeds 0,1] [--split 30] [--folder runs/pretraining]

FOLDER (or the variable PEFT_COMBO_DATA) holds ``bundlerec/clothing``. For each seed the recipe pretrain-fashion is run
on the catalogue's titles; then each task is tuned twice with the same settings, from nothing and from that adapter.
Everything is measured on validation. Writes docs/pretraining.md, but for its last section, which people write; what
was finished before is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _smoke import add_smoke, make_tiny
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.cli.output import ConsoleWatch
from peft_combo.encoder.backbone import Backbone
from peft_combo.errors import PeftComboError
from peft_combo.files import write_text
from peft_combo.recipe.files import load_recipe
from peft_combo.recipe.model import Recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.versions import AdapterRecord
from peft_combo.tuning.continual import start_pretrained
from peft_combo.tuning.loop import tune
from peft_combo.tuning.tasks import build_task

PAGE = Path(__file__).resolve().parent.parent / "docs" / "pretraining.md"
TEXTS = "fashion-text"
READING = ("training.epochs=5",)
DEEP = "adapter.top_layers=3"  # as deep as the pretrained adapter, which the comparison without it is given too
BY_HAND = "## What follows"
FEW = ("data.valid_fraction=0.3", "data.test_fraction=0.65")


@dataclass(frozen=True)
class Case:
    """One task: its recipe, and what is changed of it for both sides."""

    name: str
    recipe: str
    changes: tuple[str, ...]


CASES = (
    Case("bundles", "lora-fashion", (DEEP, "training.epochs=6", "data.text={title}", "task.whitening=none")),
    Case("shelves, few labels", "classify-fashion", (*FEW, "task.min_texts=3", "training.epochs=8")),
    Case("shelves, all labels", "classify-fashion", ("training.epochs=4",)),
)


class Best(ConsoleWatch):
    """Remembers the validation metric of the step that was kept."""

    def __init__(self, metric: str) -> None:
        super().__init__()
        self._metric = metric
        self.value = float("nan")

    def on_evaluate(self, step: int, values: Mapping[str, float], best: bool) -> None:
        super().on_evaluate(step, values, best)
        if best:
            self.value = values[self._metric]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("PEFT_COMBO_DATA"))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--split", type=int, default=30, help="data.split_seed")
    parser.add_argument("--folder", type=Path, default=Path("runs/pretraining"))
    add_smoke(parser)
    options = parser.parse_args()
    if options.smoke:
        with make_tiny() as tiny:
            evenly = ("data.valid_fraction=0.2", "data.test_fraction=0.2")
            shelves = [replace(case, changes=(*case.changes, *evenly, "task.min_texts=2")) for case in CASES[1:]]
            print(page({0: measured(tiny.shop, 30, 0, tiny.folder / "runs", (CASES[0], *shelves), tiny.changes)}))
        return
    if options.data_root is None:
        parser.error("name the folder of the data by --data-root or PEFT_COMBO_DATA")
    data = Path(options.data_root) / "bundlerec" / "clothing"
    seeds = [int(word) for word in options.seeds.split(",")]
    found = {
        seed: measured(data, options.split, seed, options.folder / f"split{options.split}-seed{seed}") for seed in seeds
    }
    written = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    text = page(found) + "".join(written.partition(f"\n{BY_HAND}")[1:])
    write_text(PAGE, text)
    print(text)


def measured(
    data: Path, split: int, seed: int, folder: Path, cases: Sequence[Case] = CASES, changes: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return what one seed gives, case by case; runs only what `folder` does not hold; `changes` go over all else."""
    store = AdapterStore(folder / "adapters")
    last = (*changes, f"data.split_seed={split}", f"seed={seed}", f"store={json.dumps(str(folder / 'adapters'))}")
    reading = load_recipe("pretrain-fashion", (*READING, *last), str(data)).ready()
    found: dict[str, Any] = {"reading": kept(folder / "reading.json", partial(read, reading, folder))}
    record = store.open(TEXTS)
    for case in cases:
        recipe = load_recipe(case.recipe, (*case.changes, *last), str(data)).ready()
        name = case.name.replace(", ", "-").replace(" ", "-")
        plain = kept(folder / f"{name}-plain.json", partial(tuned, recipe, None, folder / name))
        start = kept(folder / f"{name}-started.json", partial(tuned, recipe, record, folder / f"{name}-started"))
        found[case.name] = {"plain": plain, "started": start}
    return found


def kept(file: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a file holds; where there is none, what `run` finds."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(run()))
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def read(recipe: Recipe, folder: Path) -> dict[str, Any]:
    result = tune(recipe, run_folder=folder / "reading", callback=ConsoleWatch())
    gain = result.table.gain
    return {
        "rows": {row.name: row.values for row in result.table.rows},
        "gain": [gain.value, *gain.interval],
        "asked": result.table.asked,
        "texts": dict(result.plan.examples),
        "seconds": result.seconds,
    }


def tuned(recipe: Recipe, start: AdapterRecord | None, run_folder: Path) -> dict[str, Any]:
    """Tune one side, and for bundles also ask the encoder it starts from."""
    callback = Best(recipe.metric)
    task, began = None, {}
    if start is not None:
        found = start_pretrained(recipe, start.reference)
        assert found is not None
        recipe, task = found.recipe, found.task
        if recipe.task.kind == "bundle":
            began = {"began": untuned(recipe, start).tolist()}
    result = tune(recipe, run_folder=run_folder, callback=callback, task=task, start=start)
    told: dict[str, Any] = {"best": callback.value, "metric": recipe.metric, "examples": dict(result.plan.examples)}
    if (each := result.table.per_question) is not None:
        told |= {"frozen": each.before.tolist(), "values": each.after.tolist(), "clusters": each.clusters.tolist()}
    return told | began | {"seconds": result.seconds}


def untuned(recipe: Recipe, start: AdapterRecord) -> NDArray[np.float64]:
    """Return the NDCG@10 of plain cosine over the pretrained encoder, question by question."""
    backbone = Backbone.of(recipe.backbone)
    adapter = backbone.attach(start)
    task = build_task(recipe)
    head = task.head(backbone, adapter.max_length).eval()
    vectors = backbone.encode(task.texts, adapter)
    ranks = task.predict(head, lambda rows: vectors if rows is None else vectors[rows])
    return metrics.per_query(ranks, "ndcg@10")


def page(found: dict[int, dict[str, Any]]) -> str:
    """Return docs/pretraining.md."""
    seeds = list(found)
    first = found[seeds[0]]
    command = " ".join(["python", "benchmarks/pretraining.py", "--data-root", "FOLDER", *sys.argv[3:]])
    lines = [HEADER.format(command=command), "## Reading", ""]
    reading = first["reading"]
    texts = reading["texts"]
    lines += [
        f"{texts['train']:,} titles to read, {texts['valid']:,} to validate, {texts['test']:,} to test; "
        f"{reading['asked']}, seed {seeds[0]}. Set for this: {' '.join(READING)}.", "",
        "| | log-likelihood | perplexity | right | among the first five |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in reading["rows"].items():
        cells = (f"{row[key]:.3f}" for key in ("log_likelihood", "perplexity", "token_accuracy", "top5_accuracy"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    value, low, high = reading["gain"]
    lines += [
        "", f"Tuned over frozen: {value:+.3f} nats a token ({low:+.3f} to {high:+.3f}), in "
        f"{reading['seconds'] / 60:.0f} minutes.", "", "## Bundles", "",
        "| seed | frozen encoder, cosine | pretrained, cosine | tuned from nothing | tuned from the pretrained | "
        "difference | 95 % interval | p |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    sides: list[NDArray[np.float64]] = []
    for seed in seeds:
        plain, started = found[seed]["bundles"]["plain"], found[seed]["bundles"]["started"]
        values = [np.array(one) for one in (plain["frozen"], started["began"], plain["values"], started["values"])]
        sides.append(np.stack(values))
        lines.append(f"| {seed} | {bundles(values, np.array(plain['clusters']))} |")
    if len(seeds) > 1:
        mean = list(np.mean(sides, axis=0))
        lines.append(f"| mean | {bundles(mean, np.array(first['bundles']['plain']['clusters']))} |")
    lines += [
        "", "## Shelves", "", "| labels | seed | training texts | from nothing | from the pretrained | difference |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for case in CASES[1:]:
        for seed in seeds:
            plain, started = found[seed][case.name]["plain"], found[seed][case.name]["started"]
            lines.append(
                f"| {case.name.partition(', ')[2]} | {seed} | {plain['examples']['train']:,} | {plain['best']:.4f} | "
                f"{started['best']:.4f} | {started['best'] - plain['best']:+.4f} |"
            )
    return "\n".join(lines) + "\n"


def bundles(values: list[NDArray[np.float64]], clusters: NDArray[Any]) -> str:
    """Return the cells of a line: frozen, pretrained, tuned from nothing and from it, and the last two compared."""
    plain, started = values[2], values[3]
    low, high = metrics.bootstrap_interval(started - plain, clusters)
    p = metrics.paired_permutation(started, plain, clusters)
    cells = [*(f"{one.mean():.4f}" for one in values), f"{(started - plain).mean():+.4f}"]
    return " | ".join([*cells, f"{low:+.4f} to {high:+.4f}", f"{p:.4f}"])


HEADER = """# Reading the catalogue first

Written by `{command}`; FOLDER holds `bundlerec/clothing`.

`peft-combo tune --recipe pretrain-fashion` tunes an adapter to fill in masked words of the catalogue's titles (Devlin
et al. 2019; whole words). It needs no label and no bundle. Another task then starts from it, with a head of its own:

    peft-combo tune --recipe pretrain-fashion --data PATH
    peft-combo tune --recipe classify-fashion --data PATH --from fashion-text

Rank and layers have to be those of the pretrained adapter; where they are not, the error says which keys to set. What
comes out is one adapter. The other way, merging the first into the frozen weights and stacking the second on them, was
not taken: every encoder that serves it would have to be merged the same way, and adapters of one encoder could no
longer share its weights.

**Protocol.** Titles are divided by a hash of each title into those that are read, those that choose the step and those
that test the reading. The tasks divide bundles and labels by their own rule, so titles of items that a task holds out
may have been read, though nothing that is said of them: the figures are for a catalogue that is known when it is tuned
(transductive). Both sides of a comparison have the same adapter, batches and passes; the pretrained one has read the
titles besides. Validation questions only: each run keeps the step that is best on them, so both sides are flattered
alike, and the test parts of the tasks were not looked at. Bundles: NDCG@10 among the whole catalogue; difference
question by question, interval and p over whole groups. "Pretrained, cosine" is the pretrained adapter before any task,
with the mean over tokens that it was not tuned for. Shelves: macro F1 of the category in four levels, without interval;
the few labels are one text in twenty, and classes of three texts count.
"""


if __name__ == "__main__":
    try:
        main()
    except PeftComboError as error:
        sys.exit(str(error))
