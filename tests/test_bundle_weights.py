"""What a question of the bundle task counts: less where its bundle is unsure, more where its answer is rarely seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_combo.data.model import Bundles, Catalog, Dataset, Interactions
from peft_combo.data.pseudo_bundles import Mined
from peft_combo.data.splits import Split
from peft_combo.recipe.parse import parse_recipe
from peft_combo.recipe.task import BundleTask
from peft_combo.tuning.tasks.bundle import (
    BundleBatch,
    BundleBatches,
    BundleCompletion,
    compute_bundle_loss,
    compute_inverse_propensities,
)

BUNDLES = [np.array([0, 1], np.int32), np.array([0, 2], np.int32), np.array([0, 3], np.int32)]
PSEUDO = Mined((np.array([4, 5], np.int32),), np.array([0.4], np.float32), ())


def batch_of(weights: list[float], barred: list[list[bool]] | None = None) -> BundleBatch:
    questions = len(weights)
    none = [[False] * 4] * questions
    return BundleBatch(
        np.arange(4), torch.zeros(questions, 1, dtype=torch.long), torch.ones(questions, dtype=torch.long),
        torch.tensor(barred or none), torch.tensor(weights),
    )  # fmt: skip


def weights_of(pseudo: Mined | None = None, **task: Any) -> dict[int, set[float]]:
    """Return the weights of the questions of one batch that has all bundles, by answer."""
    made = BundleBatches(
        BUNDLES, np.arange(6), np.zeros(6, np.int64), BundleTask.model_validate(task), 10, seed=0, pseudo=pseudo
    )
    batch = made.batch(0)
    found: dict[int, set[float]] = {}
    for target, weight in zip(batch.targets.tolist(), batch.weights.tolist(), strict=True):
        found.setdefault(int(batch.items[target]), set()).add(round(weight, 5))
    return found


def test_propensities_of_a_worked_case() -> None:
    # 15 bundles, 3 and none: propensities 1, 1/2 and 1/4 at the square root, and a floor that only the last feels.
    counts = np.array([15, 3, 0])
    np.testing.assert_allclose(compute_inverse_propensities(counts, 0.5, 0.1), [1, 2, 4])
    np.testing.assert_allclose(compute_inverse_propensities(counts, 0.5, 0.4), [1, 2, 2.5])
    np.testing.assert_allclose(compute_inverse_propensities(counts, 0.0, 0.1), [1, 1, 1])
    assert compute_inverse_propensities(counts, 0.5, 0.1).dtype == np.float32


def test_without_a_power_or_pseudo_bundles_all_questions_weigh_the_same() -> None:
    assert weights_of() == {0: {1.0}, 1: {1.0}, 2: {1.0}, 3: {1.0}}


def test_a_question_weighs_by_its_answer() -> None:
    # Item 0 is in three bundles, the others in one: (3 + 1) / (1 + 1) = 2.
    assert weights_of(propensity_power=1.0) == {0: {1.0}, 1: {2.0}, 2: {2.0}, 3: {2.0}}


def test_a_pseudo_bundle_is_asked_too_and_weighs_by_its_confidence() -> None:
    found = weights_of(PSEUDO, pseudo_bundles={"weight": 0.5})
    assert found == {0: {1.0}, 1: {1.0}, 2: {1.0}, 3: {1.0}, 4: {0.2}, 5: {0.2}}
    # Its items count in no real bundle, and what they weigh for that multiplies with the confidence: 0.2 * 4.
    both = weights_of(PSEUDO, pseudo_bundles={"weight": 0.5}, propensity_power=1.0)
    assert both[4] == {0.8}


def test_the_loss_is_the_weighted_mean_and_its_scale_is_none() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 0.0, 0.0]])
    first, second = (-logits.log_softmax(1)[row, 1].item() for row in range(2))
    assert compute_bundle_loss(logits, batch_of([3.0, 1.0])).item() == pytest.approx((3 * first + second) / 4)
    assert compute_bundle_loss(logits, batch_of([6.0, 2.0])).item() == pytest.approx((3 * first + second) / 4)
    assert compute_bundle_loss(logits, batch_of([1.0, 1.0])).item() == pytest.approx((first + second) / 2)
    one, two = batch_of([1.0]), batch_of([1.0, 0.0])
    assert compute_bundle_loss(logits[:1], one).item() == pytest.approx(compute_bundle_loss(logits, two).item())


def test_smoothing_spreads_over_fair_candidates_only() -> None:
    # Answer at 0, one fair wrong answer at 1, and two that are barred: softmax over 0 and 1 alone.
    logits = torch.tensor([[1.0, 0.0, -1e4, -1e4]])
    right, wrong = math.log(1 + math.e), math.log(1 + math.exp(-1))  # -log p of either
    batch = batch_of([1.0], [[False, False, True, True]])
    assert compute_bundle_loss(logits, batch, 0.2).item() == pytest.approx(
        0.8 * right + 0.2 * (right + wrong) / 2, abs=1e-6
    )
    # With nothing barred it is what PyTorch has under the same name.
    free = torch.tensor([[1.0, 0.5, -1.0, 2.0]])
    theirs = torch.nn.functional.cross_entropy(free, torch.tensor([1]), label_smoothing=0.3)
    torch.testing.assert_close(compute_bundle_loss(free, batch_of([1.0]), 0.3), theirs)


def test_the_task_learns_from_what_was_bought_together() -> None:
    # Users 0 to 39 have a bundle each; the first thirty, whose bundles are for training, bought 1 and 2 together.
    catalog = Catalog.build([f"i{row}" for row in range(50)], [f"w{row}" for row in range(50)])
    owners = [f"u{user}" for user in range(40)]
    bundles = Bundles.build([f"b{row}" for row in range(40)], [[row + 5, row + 6] for row in range(40)], owners=owners)
    events = Interactions.build(
        owners, [*range(30), *range(30), *range(40)], [1] * 30 + [2] * 30 + [3] * 40,
        times=[*[0.0] * 60, *[1e9] * 40],
    )  # fmt: skip
    rows = np.arange(40, dtype=np.int32)
    parts = Split(rows[:30], rows[30:35], rows[35:], rows[:0], np.flatnonzero(events.users < 30), "")
    recipe = parse_recipe(
        {
            "name": "r", "category": "c", "data": {"source": "demo"}, "adapter": {"method": "head"},
            "task": {"pseudo_bundles": {"weight": 1.0}}, "training": {"batch_size": 100},
        }
    )  # fmt: skip
    assert isinstance(recipe.task, BundleTask)
    task = BundleCompletion(recipe, recipe.task, (Dataset.build("shop", catalog, events, bundles), parts))
    batch = task.batch(0)
    assert {1, 2} <= set(batch.items.tolist())
    assert 3 not in batch.items
    assert "pseudo-bundles: 1 set of items out of 60 purchases, confidence 0.89 to 0.89" in task.notes
    assert task.examples["train"] == 30  # real ones


def test_a_run_with_all_of_it_goes_through(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    from peft_combo.tuning.loop import tune

    changes = {"task.label_smoothing": 0.1, "task.propensity_power": 0.5, "task.pseudo_bundles": {"most": 5}}
    done = tune(tiny_recipe("head", **{"training.epochs": 1, **changes}), run_folder=tmp_path / "run")
    assert done.table.after.values["ndcg@10"] > 0
