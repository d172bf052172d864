"""How well the bundles hidden in shopping sessions are found: the detector, bundles alone, and two baselines.

    PEFT_COMBO_DATA=PATH python benchmarks/sessions.py                      # clothing and electronic, minutes
    PEFT_COMBO_DATA=PATH python benchmarks/sessions.py clothing --seeds 60  # one split

PATH holds `bundlerec/clothing` and `bundlerec/electronic`; `--data-root` says the same. Measures *validation* sessions
of the user splits of these seeds, all of them together; no test part is looked at. Whatever is fitted or chosen is so
on sessions of training users. Vectors are those of the recipe's frozen encoder, without any adapter.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from _cases import parse_cases
from _smoke import make_tiny
from made_up import add_sessions

from peft_combo.cli.evaluate import print_detection
from peft_combo.data.model import Dataset
from peft_combo.data.splits import split
from peft_combo.evaluation.detection import DetectionReport, compare_detections, detect_held_out
from peft_combo.recipe.files import load_recipe
from peft_combo.recommender import Workspace
from peft_combo.recommender.fit_data import FitData

RECIPES = {"clothing": "lora-fashion", "electronic": "lora-electronics"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[60, 61, 62], help="of the user splits")
    parser.add_argument("--cache", type=Path, help="folder of item vectors that are kept")
    parser.add_argument("--json", type=Path, help="write all reports here")
    options = parse_cases(parser, RECIPES)
    if options.smoke:
        with make_tiny() as tiny:
            space = open_space("clothing", tiny.shop, tiny.folder / "vectors", tiny.changes)
            measure("clothing", space, add_sessions(space.dataset), [10])
        return
    written = {}
    with tempfile.TemporaryDirectory(prefix="sessions-") as scratch:
        for name in options.cases or RECIPES:
            folder = Path(options.data_root) / "bundlerec" / name
            space = open_space(name, folder, options.cache or Path(scratch), ())
            written[name] = measure(name, space, space.dataset, options.seeds).to_json()
    if options.json is not None:
        options.json.write_text(json.dumps(written, indent=1) + "\n")


def open_space(name: str, folder: Path, cache: Path, changes: tuple[str, ...]) -> Workspace:
    return Workspace.of(load_recipe(RECIPES[name], changes, data=folder), cache=cache)


def measure(name: str, space: Workspace, dataset: Dataset, seeds: list[int]) -> DetectionReport:
    """Detect the bundles of the validation sessions of every split, and print the table of all together."""
    clock = time.perf_counter()
    frozen = space.encode_catalog()
    described = space.encode_described(frozen)
    found = []
    for seed in seeds:
        parts = split(dataset, "user", seed=seed)
        known = FitData.of(dataset, parts.train, parts.train_interactions, frozen, {}, described=described)
        found.append(detect_held_out(dataset, parts, known, "valid", seed=seed))
        print(f"{name}, split {seed} ({parts.digest[:12]}): {len(found[-1].sessions)} sessions", flush=True)
    report = compare_detections(found, "validation")
    print_detection(report)
    print(f"{name}: {len(seeds)} split(s) in {time.perf_counter() - clock:.0f} s\n", flush=True)
    return report


if __name__ == "__main__":
    main()
