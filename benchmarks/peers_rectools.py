"""RecTools beside us, on the very same completion questions: ItemKNN (TFIDF, BM25, cosine), EASE, PopularModel.

    PEFT_COMBO_DATA=PATH python benchmarks/peers_rectools.py --environment rectools-env clothing
    PEFT_COMBO_DATA=PATH python benchmarks/peers_rectools.py --environment rectools-env clothing electronic --part test

RecTools wants other versions of NumPy than we do, so it lives in an environment of its own: where the folder named by
`--environment` is none yet, it is made, and RecTools installed into it. Questions go there as .npz and scores come back
as .npz. Models are fitted on training bundles, as users; settings of RecTools' models and of ours are chosen on
validation questions.

`--part valid`, the default, looks at no test bundle: the questions are those of the split's validation users, and what
is chosen is chosen on some of the training users, who then train nobody. R@10 and NDCG@10 with ties at mid-rank, 95 %
intervals by bootstrap over users, p of paired permutations of users against our fusion. Ours are without an adapter.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
from _cases import parse_cases
from _smoke import make_tiny
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.data.model import Dataset
from peft_combo.data.queries import Queries
from peft_combo.data.splits import Split, split
from peft_combo.evaluation.completion import evaluate
from peft_combo.recipe.files import load_recipe
from peft_combo.recommender import Workspace
from peft_combo.recommender.scorer_id import FUSION

RECIPES = {"clothing": "lora-fashion", "electronic": "lora-electronics"}
# The worker was written for 0.19, which was tried with NumPy 1.26.
REQUIREMENTS = ("rectools==0.19.0", "numpy<2")
WORKER = Path(__file__).with_name("_rectools_worker.py")
# The share of training users that settings are chosen on where validation users are measured.
_INNER = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, help="folder of RecTools' environment, made where it is none")
    parser.add_argument("--part", choices=("valid", "test"), default="valid", help="whose questions are measured")
    parser.add_argument("--seed", type=int, default=60, help="of the user split")
    parser.add_argument("--cache", type=Path, help="folder of item vectors that are kept")
    options = parse_cases(parser, RECIPES)
    if options.smoke:
        smoke(options.environment)
        return
    if options.environment is None:
        parser.error("name the folder of RecTools' environment by --environment; it is made where it is none")
    python = prepare_environment(options.environment)
    with tempfile.TemporaryDirectory(prefix="rectools-") as scratch:
        for name in options.cases or RECIPES:
            recipe = load_recipe(RECIPES[name], data=Path(options.data_root) / "bundlerec" / name)
            space = Workspace.of(recipe, cache=options.cache or Path(scratch))
            parts = split(space.dataset, "user", seed=options.seed)
            if options.part == "valid":
                parts = shift_parts(space.dataset, parts, options.seed)
            print(f"{name}, user split {options.seed}, {options.part} users")
            measure(space, parts, python, Path(scratch))


def prepare_environment(folder: Path) -> Path:
    """Return the interpreter of an environment with RecTools, making it where it is none."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    there = subprocess.run([python, "-c", "import rectools.models"], capture_output=True, check=False).returncode == 0
    if not there:  # new, or an installation that was cut off
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return python.absolute()


def shift_parts(dataset: Dataset, parts: Split, seed: int) -> Split:
    """Return a split that measures the validation users and chooses on some training users; test users are in none."""
    groups = np.array([dataset.bundles.groups[row] for row in parts.train])
    names = np.unique(groups)
    inner = np.random.default_rng(seed).permutation(names)[: max(1, round(_INNER * len(names)))]
    chosen = np.isin(groups, inner)
    seen = parts.train_interactions
    if dataset.interactions is not None:
        users = np.array([*dataset.interactions.user_ids, ""])[dataset.interactions.users[seen]]
        seen = seen[~np.isin(users, inner)]
    return replace(
        parts, train=parts.train[~chosen], valid=parts.train[chosen], test=parts.valid, train_interactions=seen
    )


def measure(space: Workspace, parts: Split, python: Path | None, scratch: Path) -> None:
    """Print our rows, and those of RecTools where its interpreter is given."""
    dataset = space.dataset
    frozen = space.encode_catalog()
    report = evaluate(dataset, parts, frozen=frozen, described=space.encode_described(frozen))
    queries = {part: Queries.of(dataset.bundles, getattr(parts, part)) for part in ("valid", "test")}
    ranks = {name: (own, report.row(name).setting) for name, own in report.answers.ranks.items()}
    if python is None:
        print("RecTools' rows are skipped: no --environment was named")
    else:
        export_questions(scratch / "questions.npz", dataset, parts, queries)
        subprocess.run([python, WORKER, scratch / "questions.npz", scratch / "scores.npz"], check=True)
        ranks |= read_ranks(scratch / "scores.npz", queries, len(dataset.catalog))
    groups = queries["test"].groups
    best = metrics.per_query(ranks[str(FUSION)][0], "ndcg@10")
    print(f"{len(groups):,} questions of {len(np.unique(groups)):,} users, {len(dataset.catalog):,} items")
    print(f"{'':24}{'R@10':>8}{'NDCG@10':>9}  95 % interval   p     setting")
    for name, (own, setting) in ranks.items():
        ndcg = metrics.per_query(own, "ndcg@10")
        low, high = metrics.bootstrap_interval(ndcg, groups)
        p = "" if name == str(FUSION) else f"{metrics.paired_permutation(ndcg, best, groups):.4f}"
        recall = metrics.per_query(own, "r@10").mean()
        print(f"{name:24}{recall:8.3f}{ndcg.mean():9.4f}  {low:.3f} to {high:.3f}  {p:6}  {setting}", flush=True)
    print()


def export_questions(path: Path, dataset: Dataset, parts: Split, queries: dict[str, Queries]) -> None:
    """Write what RecTools is told: training bundles, and of every question the context; no answer leaves this side."""
    rows = {"train": [dataset.bundles.items[row] for row in parts.train]}
    rows |= {part: [context[context >= 0] for context in own.contexts] for part, own in queries.items()}
    arrays = {"items": np.array(len(dataset.catalog))}
    for part, own in rows.items():
        arrays[f"{part}_indptr"] = np.concatenate([[0], np.cumsum([len(one) for one in own])]).astype(np.int64)
        arrays[f"{part}_indices"] = np.concatenate([np.empty(0, np.int64), *own]).astype(np.int64)
    np.savez_compressed(path, **arrays)


def read_ranks(path: Path, queries: dict[str, Queries], items: int) -> dict[str, tuple[NDArray[np.float64], str]]:
    """Return by row the ranks (Q,) of the test questions' answers in the setting that is best on validation."""
    with np.load(path, allow_pickle=False) as read:
        told = {name: read[name] for name in read.files}
    best: dict[str, tuple[float, NDArray[np.float64], str]] = {}
    for place, (name, setting) in enumerate(zip(told["names"].tolist(), told["settings"].tolist(), strict=True)):
        found = {}
        for part, own in queries.items():
            scores = np.full((len(own), items), np.nan, np.float32)
            scores[told[f"{part}_{place}_question"], told[f"{part}_{place}_item"]] = told[f"{part}_{place}_score"]
            found[part] = metrics.midranks(scores, own.targets, own.excluded())
        valid = float(metrics.per_query(found["valid"], "ndcg@10").mean())
        if name not in best or valid > best[name][0]:
            best[name] = (valid, found["test"], setting)
    return {name: (ranks, setting) for name, (_, ranks, setting) in best.items()}


def smoke(environment: Path | None) -> None:
    """Run on the made-up shop, and read back scores whose ranks are known; RecTools itself only where it is named."""
    none = np.zeros(2, np.int64)
    asked = Queries(np.array([[0], [1]]), np.array([2, 3]), np.array(["u", "v"]), none)
    with make_tiny() as tiny:
        told = {"names": np.array(["known", "known"]), "settings": np.array(["worse", "better"])}
        # Of five items the answers 2 and 3; an item that has no score comes after all that have one.
        for place, scores in enumerate(
            ([[0, 4, 0.9], [1, 4, 0.9]], [[0, 2, 0.9], [0, 4, 0.1], [1, 4, 0.5], [1, 3, 0.5]])
        ):
            columns = np.array(scores).T
            for part in ("valid", "test"):
                told |= {
                    f"{part}_{place}_question": columns[0].astype(np.int64),
                    f"{part}_{place}_item": columns[1].astype(np.int64), f"{part}_{place}_score": columns[2],
                }  # fmt: skip
        np.savez_compressed(tiny.folder / "known.npz", **told)
        ranks, setting = read_ranks(tiny.folder / "known.npz", {"valid": asked, "test": asked}, 5)["known"]
        assert (ranks.tolist(), setting) == ([1.0, 1.5], "better"), (ranks, setting)
        print("read back: scores of a known answer give its ranks")
        space = Workspace.of(load_recipe("lora-fashion", tiny.changes, data=tiny.shop), cache=tiny.folder / "vectors")
        parts = split(space.dataset, "user", 0.2, 0.2)
        shifted = shift_parts(space.dataset, parts, 0)
        assert not set(shifted.test) & {*shifted.train, *shifted.valid, *parts.test}
        queries = {part: Queries.of(space.dataset.bundles, getattr(shifted, part)) for part in ("valid", "test")}
        export_questions(tiny.folder / "questions.npz", space.dataset, shifted, queries)
        with np.load(tiny.folder / "questions.npz", allow_pickle=False) as read:
            assert int(read["train_indptr"][-1]) == sum(len(space.dataset.bundles.items[row]) for row in shifted.train)
            assert not any("target" in name for name in read.files)
        python = None if environment is None else prepare_environment(environment)
        measure(space, shifted, python, tiny.folder)


if __name__ == "__main__":
    sys.exit(main())
