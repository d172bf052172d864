"""What suggested labels are worth: titles chosen by `data suggest` against random ones, at the same budget.

    python benchmarks/suggest.py --data FOLDER          # the folder of: peft-combo data get bundlerec-clothing

The recipe's labelled titles play the unlabelled pool. Each seed starts from the same random titles for every way of
choosing; each round fits the head over the frozen encoder anew (logistic regression, its penalty chosen on the
validation titles), chooses titles to label and adds them. Encoder, classes and test titles never change, so the only
difference is which titles were labelled. Some minutes on one core, most of it for encoding once.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from _smoke import add_smoke, make_tiny
from numpy.typing import NDArray
from scipy.special import softmax

from peft_combo.data.labels.texts import split_texts
from peft_combo.data.task_data import read_labelled
from peft_combo.encoder.backbone import Backbone
from peft_combo.metrics.classification import macro_f1
from peft_combo.recipe.files import load_recipe
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import ClassificationTask
from peft_combo.tuning.active_learning import choose_spread, compute_margins
from peft_combo.tuning.tasks.linear import Targets, fit_best_linear

Choose = Callable[[NDArray[np.float32], NDArray[np.float64], int, int], list[int]]
"""Chooses so many rows of a pool by its (N, D) vectors, (N,) uncertainties and a seed."""

WAYS: dict[str, Choose] = {
    "random": lambda vectors, unsure, count, seed: (
        np.random.default_rng(seed).permutation(len(vectors))[:count].tolist()
    ),
    "most unsure": lambda vectors, unsure, count, seed: np.argsort(-unsure, kind="stable")[:count].tolist(),
    "suggested": choose_spread,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--recipe", default="classify-fashion")
    parser.add_argument("--start", type=int, default=200, help="titles labelled at first")
    parser.add_argument("--add", type=int, default=100, help="titles added a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    add_smoke(parser)
    arguments = parser.parse_args()
    if arguments.smoke:
        small = ["--start", "12", "--add", "6", "--rounds", "1", "--seeds", "2"]
        with make_tiny() as tiny:
            changes = (*tiny.changes, "data.valid_fraction=0.2", "data.test_fraction=0.2", "task.min_texts=2")
            run(parser.parse_args(small), load_recipe(arguments.recipe, changes, tiny.shop))
        return
    if arguments.data is None:
        parser.error("name the folder of the data by --data")
    run(arguments, load_recipe(arguments.recipe, (), arguments.data))


def run(arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Choose titles in every way, and print the table."""
    assert isinstance(recipe.task, ClassificationTask)
    assert not recipe.task.multi_label
    found = read_labelled(recipe.data, recipe.task)
    parts = split_texts(found.texts, recipe.data)
    counts = Counter(found.labels[row][0] for row in parts.train)
    classes = sorted(label for label, count in counts.items() if count >= recipe.task.min_texts)
    column = {label: place for place, label in enumerate(classes)}
    right = np.array([column.get(label, -1) for (label,) in found.labels])
    train, valid, test = (rows[right[rows] >= 0] for rows in (parts.train, parts.valid, parts.test))
    vectors = Backbone.of(recipe.backbone).encode(found.texts)
    features = vectors * np.float32(vectors.shape[1] ** 0.5)

    def targets(rows: NDArray[np.int64]) -> Targets:
        return Targets.of(right[rows][:, None] == np.arange(len(classes)), exclusive=True)

    def logits(labelled: NDArray[np.int64]) -> NDArray[np.float32]:
        model = fit_best_linear(features[labelled], targets(labelled), features[valid], targets(valid))
        return model.logits(features)

    def measured(scores: NDArray[np.float32]) -> tuple[float, float]:
        said, is_so = scores[test].argmax(1), right[test]
        hits = np.bincount(said[said == is_so], minlength=len(classes))
        given, wanted = (np.bincount(one, minlength=len(classes)) for one in (said, is_so))
        sums = np.stack([hits, given, wanted], 1).astype(np.float64)
        return float(macro_f1(sums)), float((said == is_so).mean())

    results: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in WAYS}
    for seed in range(arguments.seeds):
        start = np.random.default_rng(seed).choice(train, arguments.start, replace=False)
        for name, choose in WAYS.items():
            labelled, values = start, []
            for number in range(arguments.rounds + 1):
                scores = logits(labelled)
                values.append(measured(scores))
                if number < arguments.rounds:
                    pool = np.setdiff1d(train, labelled)
                    unsure = compute_margins(softmax(scores[pool], axis=1), exclusive=True)
                    chosen = choose(vectors[pool], unsure, arguments.add, 1000 * seed + number)
                    labelled = np.concatenate([labelled, pool[chosen]])
            results[name].append(values)
    whole = measured(logits(train))

    print(f"{found.name}: {len(classes)} classes, {len(train):,} titles to choose from, {len(test):,} test titles")
    print(f"macro F1 / accuracy, mean of {arguments.seeds} seeds (standard deviation); all labels: "
          f"{whole[0]:.3f} / {whole[1]:.3f}")  # fmt: skip
    budgets = [arguments.start + number * arguments.add for number in range(arguments.rounds + 1)]
    print(f"{'':>12} " + " ".join(f"{budget:>23}" for budget in budgets))
    for name, values in results.items():
        mean, deviation = np.mean(values, axis=0), np.std(values, axis=0, ddof=1)  # (rounds + 1, 2)
        cells = (f"{m[0]:.3f} ({s[0]:.3f}) / {m[1]:.3f}" for m, s in zip(mean, deviation, strict=True))
        print(f"{name:>12} " + " ".join(f"{cell:>23}" for cell in cells))
    if arguments.json is not None:
        told = {"budgets": budgets, "all": whole, "runs": results}
        arguments.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
