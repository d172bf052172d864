"""How well bundles of real data, and their items, are found by their intents.

    PEFT_COMBO_DATA=PATH OMP_NUM_THREADS=2 python benchmarks/text_queries.py                 # validation, minutes
    PEFT_COMBO_DATA=PATH OMP_NUM_THREADS=2 python benchmarks/text_queries.py --tune          # with tuned encoders
    PEFT_COMBO_DATA=PATH OMP_NUM_THREADS=2 python benchmarks/text_queries.py --part test --seeds 10 11 12

PATH holds `bundlerec/clothing` and `bundlerec/electronic`; `--data-root` says the same. For each data set and split
`evaluation.evaluate_queries`, on the validation bundles or, once, on the test bundles. The table shows means over the
queries of all splits; intervals and p are of users over these. With `--tune` the shipped recipe is tuned on the
training bundles of each split first, and its encoder joins.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _cases import parse_cases
from _smoke import make_tiny

from peft_combo import metrics
from peft_combo.evaluation.text_queries import BASELINE, TESTED, VALUES, QueryReport, evaluate_queries
from peft_combo.recipe.files import load_recipe
from peft_combo.recommender import Workspace
from peft_combo.recommender.text_search import build_views
from peft_combo.tuning.loop import tune

CASES = {
    "clothing": ("bundlerec/clothing", "lora-fashion"),
    "electronic": ("bundlerec/electronic", "lora-electronics"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("valid", "test"), default="valid")
    parser.add_argument("--seeds", type=int, nargs="+", default=[60, 61, 62], help="of the splits by user")
    parser.add_argument("--tune", action="store_true", help="tune an adapter on each split; its encoder joins")
    parser.add_argument("--json", type=Path, help="write all reports here")
    options = parse_cases(parser, CASES)
    if options.smoke:
        with make_tiny() as tiny:
            add_intents(tiny.shop)
            show("clothing", [search_split(tiny.shop, "lora-fashion", 0, "valid", tiny.changes, tuned=True)])
        return
    written: dict[str, Any] = {}
    for name in options.cases or CASES:
        folder, recipe = Path(options.data_root) / CASES[name][0], CASES[name][1]
        if not folder.exists():
            print(f"\n{name}: not measured, there is no {folder}")
            continue
        reports = [search_split(folder, recipe, seed, options.part, (), options.tune) for seed in options.seeds]
        show(name, reports)
        if options.json:
            written[name] = [report.to_json() for report in reports]
            options.json.write_text(json.dumps(written, indent=1))


def search_split(
    folder: Path, recipe_name: str, seed: int, part: str, changes: Sequence[str], tuned: bool
) -> QueryReport:  # fmt: skip
    """Measure one split, with an encoder tuned on its training part if wanted."""
    clock = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        whole = (*changes, "data.split=user", f"data.split_seed={seed}", f"store={scratch}/adapters")
        space = Workspace.of(load_recipe(recipe_name, whole, data=folder), cache=Path(scratch) / "vectors")
        dataset, parts = space.dataset, space.split
        names = [tune(space.recipe, run_folder=Path(scratch) / "run").record.reference] if tuned else []
        frozen = space.encode_catalog()
        vectors = {name: space.encode_catalog(name) for name in names}
        views = build_views(dataset, space.bank, frozen, space.encode_described(frozen), vectors)
        rows = parts.valid if part == "valid" else parts.test
        report = evaluate_queries(dataset, parts, views, rows=rows, seed=seed)
    print(
        f"{dataset.name}, split {seed} ({parts.digest[:12]}), {part}: {report.counts['queries']} queries, "
        f"{report.counts['candidates']} candidates, {time.perf_counter() - clock:.0f} s; weights {report.weights}",
        flush=True,
    )
    return report


def show(name: str, reports: list[QueryReport]) -> None:
    """Print means over the queries of the splits, and p of differences to the baseline over all of them."""
    groups = np.concatenate([report.groups for report in reports])
    rows = [row.name for row in reports[0].rows]

    def join(row: str, value: str) -> np.ndarray[Any, Any]:
        return np.concatenate([report.per_query[row][value] for report in reports])

    print(f"\n{name}: {len(groups):,} queries of {len(reports)} split(s)")
    print(f"{'':28}" + "".join(f"{value:>10}" for value in VALUES) + f"{'95 %, r@10':>18}   p: {', '.join(TESTED)}")
    for row in rows:
        cells = "".join(f"{join(row, value).mean():10.3f}" for value in VALUES)
        low, high = metrics.bootstrap_interval(join(row, "r@10"), groups)
        ps = [metrics.paired_permutation(join(row, value), join(BASELINE, value), groups) for value in TESTED]
        told = "" if row == BASELINE else ", ".join(f"{p:.4f}" for p in ps)
        print(f"{row:28}{cells}{f'{low:.3f} to {high:.3f}':>18}   {told}")


def add_intents(shop: Path) -> None:
    """Let every bundle of the made-up shop be asked for by the title of its first item."""
    titles = dict(line.split(",")[:2] for line in (shop / "items.csv").read_text().splitlines()[1:])
    members = [line.split(",") for line in (shop / "bundles.csv").read_text().splitlines()[1:]]
    first = dict(reversed([(bundle, item) for bundle, item in members]))
    header, *rows = (shop / "bundle_meta.csv").read_text().splitlines()
    lines = [f"{header},intent", *(f"{row},{titles[first[row.split(',')[0]]]}" for row in rows)]
    (shop / "bundle_meta.csv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
