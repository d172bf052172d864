"""How well adapters, their peers and their fusion complete bundles of real data.

    PEFT_COMBO_DATA=PATH OMP_NUM_THREADS=2 python benchmarks/quality.py                 # three splits, about an hour
    PEFT_COMBO_DATA=PATH OMP_NUM_THREADS=2 python benchmarks/quality.py --quick clothing  # one split, minutes

PATH holds `bundlerec/clothing`, `bundlerec/electronic`, `online_retail` and `polyvore`; `--data-root` says the same.
For each data set and split: tune an adapter by its recipe (on training bundles; validation chooses the step), then
`peft_combo.evaluate`. The table shows means over the splits; p is of a paired permutation test over the
questions of all splits together, users being exchanged as a whole. BundleRec and Polyvore are divided by user (for
Polyvore each outfit stands alone), Online Retail by time, which has one split only. `clothing_categories` asks whether
adapters of single categories, brought to one scale, are worth more than one adapter for all and none at all, above all
where the answer is of another category than everything in its bundle. `--set task.temperature=0.07`
changes every recipe; `--recipe clothing=FILE` takes another one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _smoke import add_smoke, make_tiny
from safetensors.torch import load_file

from peft_combo import metrics
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.evaluation.canary import run_canary
from peft_combo.evaluation.completion import evaluate
from peft_combo.evaluation.report import Report
from peft_combo.recipe.files import load_recipe
from peft_combo.recommender import Workspace
from peft_combo.recommender.category_calibration import CategoryCoverage
from peft_combo.recommender.scorer_id import BY_CATEGORY, FROZEN, FUSION, PEER, ScorerId
from peft_combo.tuning.loop import tune


@dataclass(frozen=True)
class Case:
    """One data set: its folder below the root, the recipe, what of it is changed, and which row is to beat whom.

    Attributes:
        categories: paths that get an adapter of their own, beside the one for all.
    """

    folder: str
    recipe: str
    changes: tuple[str, ...]
    seeds: tuple[int, ...]
    peers: tuple[str, ...]
    row: str = str(FUSION)
    categories: tuple[str, ...] = ()


_CLOTHES = "Clothing, Shoes & Jewelry > "
CASES = {
    "clothing": Case(
        "bundlerec/clothing", "lora-fashion", ("data.split=user",), (10, 11, 12), (str(PEER), str(FROZEN))
    ),
    "electronic": Case("bundlerec/electronic", "lora-electronics", (), (10, 11, 12), (str(PEER), str(FROZEN))),
    "online_retail": Case("online_retail", "lora-home", ("data.split=time",), (0,), ("EASE", str(PEER))),
    "polyvore": Case("polyvore", "lora-fashion", ("data.split=user",), (10, 11, 12), (str(FROZEN), "TF-IDF title")),
    "clothing_categories": Case(
        "bundlerec/clothing",
        "lora-fashion",
        ("data.split=user",),
        (10, 11, 12),
        (str(ScorerId("tuned BERT", "all")), str(FROZEN)),
        str(BY_CATEGORY),
        tuple(_CLOTHES + name for name in ("Women", "Men", "Novelty, Costumes & More")),
    ),
}
COLUMNS = ("r@1", "r@5", "r@10", "r@20", "ndcg@10", "mrr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--data-root", type=Path, default=os.environ.get("PEFT_COMBO_DATA"))
    parser.add_argument("--quick", action="store_true", help="the first split only")
    parser.add_argument("--recipe", action="append", default=[], metavar="CASE=RECIPE")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="write all reports here")
    add_smoke(parser)
    options = parser.parse_args()
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.smoke:
        case = CASES["clothing"]
        with make_tiny() as tiny:
            report = one_split("clothing", case, case.recipe, tiny.shop, (*case.changes, *tiny.changes), 10)
        show("clothing", [report], case)
        return
    if options.data_root is None:
        parser.error("name the folder of the data by --data-root or PEFT_COMBO_DATA")
    recipes = dict(pair.split("=", 1) for pair in options.recipe)

    written: dict[str, Any] = {}
    for name in options.cases or CASES:
        case = CASES[name]
        folder = Path(options.data_root) / case.folder
        if not folder.exists():
            print(f"\n{name}: not measured, there is no {folder}")
            continue
        reports = []
        for seed in case.seeds[:1] if options.quick else case.seeds:
            changes = (*case.changes, *options.changes)
            reports.append(one_split(name, case, recipes.get(name, case.recipe), folder, changes, seed))
            if options.json:
                written.setdefault(name, []).append(reports[-1].to_json())
                options.json.write_text(json.dumps(written, indent=1))
        show(name, reports, case)


def one_split(
    name: str, case: Case, recipe_name: str, folder: Path, changes: tuple[str, ...], seed: int
) -> Report:  # fmt: skip
    """Tune on the training part of one split, and evaluate on its test part."""
    clock = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        changes = (*changes, f"data.split_seed={seed}", f"store={scratch}/adapters")
        recipe = load_recipe(recipe_name, changes, data=folder)
        space = Workspace.of(recipe)
        dataset, parts = space.dataset, space.split
        narrowed = {path.split(" > ")[-1].split(",")[0].lower(): path for path in case.categories}
        runs = {"all" if narrowed else recipe.adapter.method: recipe}
        for short, path in narrowed.items():
            only = (*changes, f"category={short}", f"data.category_filter={path}")
            runs[short] = load_recipe(recipe_name, only, data=folder)
        results = {short: tune(run, run_folder=Path(scratch) / short) for short, run in runs.items()}
        tuned_in = time.perf_counter() - clock
        backbone, texts = space.backbone, space.dataset.texts
        tuned = {
            short: (
                backbone.encode(texts, backbone.attach(result.record)),
                BundleHead.from_spec(result.record.manifest.task, load_file(result.record.path / HEAD_FILE)),
            )
            for short, result in results.items()
        }
    frozen = backbone.encode(dataset.plain)
    described = None if dataset.described is None else backbone.encode(dataset.described)
    coverage = CategoryCoverage.of(
        dataset.catalog, {short: result.record.manifest.recipe for short, result in results.items()}
    )
    report = evaluate(dataset, parts, frozen=frozen, described=described, tuned=tuned, coverage=coverage, seed=seed)
    alive = run_canary(dataset, parts, frozen=frozen, tuned=tuned, seed=seed).alive
    print(
        f"{name}, split {seed} ({parts.digest[:12]}): tuned in {tuned_in:.0f} s ("
        f"{', '.join(f'{short} {result.chosen}' for short, result in results.items())}), all in "
        f"{time.perf_counter() - clock:.0f} s; fusion: {report.fusion.chosen}; canary: "
        f"{'shuffled texts are at chance' if alive else 'SHUFFLED TEXTS ARE ABOVE CHANCE'}",
        flush=True,
    )
    for note in report.notes:
        print(f"  {note}")
    return report


def show(name: str, reports: list[Report], case: Case) -> None:
    """Print means over the splits, and what is significant over all their questions."""
    counts = ", ".join(f"{report.counts['test questions']:,}" for report in reports)
    print(f"\n{name}: {reports[0].counts['items']:,} items, {counts} test questions; mean of {len(reports)} split(s)")
    slices = [
        part
        for part in ("cold target", "cross-leaf", "cross-slot", "cross-category")
        if part in reports[0].answers.slices
    ]
    fill_in = reports[0].row(str(FUSION)).fill_in is not None
    heads = [*COLUMNS, *(f"{part}" for part in slices), *(["fill-in"] if fill_in else []), "coverage"]
    print(f"{'':20}" + "".join(f"{head:>12}" for head in heads) + "   setting")
    rows = [row.name for row in reports[0].lines if all(row.name in report.answers.ranks for report in reports)]
    for row in rows:
        lines = [report.row(row) for report in reports]
        cells = [np.mean([line.values[column] for line in lines]) for column in COLUMNS]
        cells += [np.mean([line.slices[part].ndcg for line in lines if part in line.slices]) for part in slices]
        cells += [np.mean([line.fill_in for line in lines if line.fill_in is not None])] if fill_in else []
        cells += [np.mean([line.quality["coverage"] for line in lines])]
        setting = " | ".join(dict.fromkeys(line.setting for line in lines))
        print(f"{row:20}" + "".join(f"{cell:12.4f}" for cell in cells) + f"   {setting}")
    print("  slices show NDCG@10")
    for peer in case.peers:
        for measure in ("ndcg@10", "r@10"):
            compare(reports, case.row, peer, measure, None)
        for part in slices:
            compare(reports, case.row, peer, "ndcg@10", part)
        if fill_in:
            compare_fill_ins(reports, case.row, peer)


def compare(reports: list[Report], row: str, peer: str, measure: str, part: str | None) -> None:
    """Print a row's lead over a peer, with a 95 % interval and p, over the questions of all splits."""
    gains, clusters = [], []
    for report in reports:
        answers = report.answers
        keep = slice(None) if part is None else answers.slices[part]
        mine = metrics.per_query(answers.ranks[row], measure)[keep]
        gains.append(mine - metrics.per_query(answers.ranks[peer], measure)[keep])
        clusters.append(answers.groups[keep])
    if sum(map(len, gains)):  # a slice may be empty
        what = f"{measure}{'' if part is None else f', {part}'}"
        verdict(what, row, peer, np.concatenate(gains), np.concatenate(clusters))


def compare_fill_ins(reports: list[Report], row: str, peer: str) -> None:
    """Print a row's lead in fill-in-the-blank."""
    gains = np.concatenate([r.answers.fill_ins[row] - r.answers.fill_ins[peer] for r in reports])
    clusters = np.concatenate([report.answers.groups for report in reports])
    verdict("fill-in", row, peer, gains[~np.isnan(gains)], clusters[~np.isnan(gains)])


def verdict(what: str, row: str, peer: str, gains: np.ndarray[Any, Any], clusters: np.ndarray[Any, Any]) -> None:
    low, high = metrics.bootstrap_interval(gains, clusters)
    p = metrics.paired_permutation(gains, np.zeros_like(gains), clusters)
    print(f"  {row} - {peer}, {what}: {gains.mean():+.4f} [{low:+.4f}, {high:+.4f}], p = {p:.4f}")


if __name__ == "__main__":
    main()
