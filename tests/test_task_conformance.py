"""Every task does what the training loop takes for granted: batches, loss, baseline, stored head, metrics, plan."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import build_encoder

from peft_combo.callbacks import RunCallback
from peft_combo.encoder.heads import load_head
from peft_combo.errors import DataError
from peft_combo.recipe.model import Recipe
from peft_combo.tuning.model import collect_trained_parameters
from peft_combo.tuning.plan import plan
from peft_combo.tuning.processes import build_accelerator
from peft_combo.tuning.setup import Setup
from peft_combo.tuning.tasks import build_task
from peft_combo.tuning.tasks.base import AnyTask

TASKS = ("bundle", "sequence", "rating", "classification", "tagging", "masked", "matching")
# What each task says where a folder has items and nothing else, or too few of them.
REFUSALS = {
    "bundle": "bundles", "sequence": "bundles", "rating": "interactions", "classification": "label",
    "tagging": "tags", "masked": "text", "matching": "answers",
}  # fmt: skip

MakeTask = Callable[..., AnyTask]
MakeRecipe = Callable[..., Recipe]

each_task = pytest.mark.parametrize("kind", TASKS)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_shop: Path) -> dict[str, Path]:
    """Where each task's data lies: items in 6 styles of two words, and bundles, visits or tags of one style."""
    visits, tagged = tmp_path_factory.mktemp("visits"), tmp_path_factory.mktemp("tagged")
    dice = random.Random(7)
    titles = [f"w{10 + n % 6 * 2 + n // 6 % 2} w{40 + n} w{120 + n % 7}" for n in range(60)]
    (visits / "items.csv").write_text("item_id,title\n" + "".join(f"i{n},{t}\n" for n, t in enumerate(titles)))
    lines = ["user_id,item_id,timestamp"]
    for user in range(40):
        for place, item in enumerate(dice.sample([n for n in range(60) if n % 6 == user % 6], 8)):
            lines.append(f"u{user},i{item},{1_700_000_000 + 86_400 * (6 * place + user % 5)}")
    (visits / "interactions.csv").write_text("\n".join(lines) + "\n")
    texts = [
        {"tokens": [f"w{dice.randrange(40, 100)}", f"w{10 + row % 4}", f"w{row + 5}"],
         "tags": ["O", ("B-Clo", "B-Shoe")[row % 2], "O"]}
        for row in range(120)
    ]  # fmt: skip
    (tagged / "tags.jsonl").write_text("\n".join(map(json.dumps, texts)))
    asked = tmp_path_factory.mktemp("asked")
    pairs = [f"w{10 + row % 30} w{50 + row} w{7 + row % 5},w{10 + row % 30} w{150 + row % 30}" for row in range(120)]
    (asked / "answers.csv").write_text("question,answer\n" + "\n".join(pairs) + "\n")
    return {**dict.fromkeys(TASKS, tiny_shop), "rating": visits, "tagging": tagged, "matching": asked}


@pytest.fixture
def make(tiny_recipe: MakeRecipe, folders: dict[str, Path]) -> MakeRecipe:
    """Make the recipe of a task: ``make("rating", seed=2)``."""

    def of(kind: str, **changes: Any) -> Recipe:
        section = {"task": {"kind": kind}, "data.path": str(folders[kind]), "training.epochs": 1}
        return tiny_recipe(**{**section, **changes})

    return of


def build_setup(recipe: Recipe, folder: Path) -> Setup:
    """Put together what a run works on, its head fitted over the frozen encoder."""
    return Setup.build(recipe, build_accelerator(recipe, folder), build_task(recipe), RunCallback())


def nudge(setup: Setup) -> None:
    """Move every trained weight off its start, where a zero would hide another one's gradient."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in collect_trained_parameters(setup.attached, setup.head).values():
            parameter.add_(0.02 * torch.randn_like(parameter))


def assert_same(one: Any, other: Any, tolerance: float = 0.0) -> None:
    """Compare batches or predictions, whatever they are made of."""
    assert type(one) is type(other)
    if is_dataclass(one):
        for part in fields(one):
            assert_same(getattr(one, part.name), getattr(other, part.name), tolerance)
    elif isinstance(one, torch.Tensor | np.ndarray):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=tolerance)
    else:
        assert one == other


def count_examples(batch: Any, kind: str) -> Counter[Hashable]:
    """Return the training examples that a batch is made of, each with how often it is in it."""
    match kind:
        case "bundle":
            sets = Counter(
                frozenset([*context[context >= 0].tolist(), int(target)])
                for context, target in zip(batch.contexts, batch.targets, strict=True)
            )
            # Every member of a bundle is the target once.
            return Counter({_rows(batch, own): count / len(own) for own, count in sets.items()})  # type: ignore[dict-item]
        case "sequence":
            return Counter(_rows(batch, frozenset(one[one >= 0].tolist())) for one in batch.sequences)
        case "rating":
            liked = batch.targets >= 0.5
            return Counter(
                (_rows(batch, batch.histories[event].tolist()), int(batch.items[item]))
                for event, item in zip(batch.events[liked], batch.candidates[liked], strict=True)
            )
        case "matching":
            return Counter(batch.items[: len(batch.targets)].tolist())
        case _:
            return Counter(batch.items.tolist())


def _rows(batch: Any, places: Any) -> Hashable:
    ordered = sorted(places) if isinstance(places, frozenset) else places
    return tuple(int(batch.items[place]) if place >= 0 else -1 for place in ordered)


def train_examples(task: Any, kind: str) -> Counter[Hashable]:
    """Return the training examples as they were read."""
    match kind:
        case "bundle" | "sequence":
            return Counter(tuple(sorted(rows.tolist())) for rows in task._bundles)
        case "rating":
            histories = task._events.histories(task._train, task._config.history)
            items = task._events.items[task._train]
            return Counter((tuple(own.tolist()), int(item)) for own, item in zip(histories, items, strict=True))
        case _:
            return Counter(task._train.tolist())


@pytest.fixture
def ready(make: MakeRecipe, tmp_path: Path) -> Callable[[str], Setup]:
    """Make what a run of a task works on."""
    return lambda kind: build_setup(make(kind), tmp_path)


@each_task
def test_data_that_is_not_there_or_not_enough_is_refused_with_what_was_expected(
    kind: str, make: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="nowhere"):
        build_task(make(kind, **{"data.path": str(tmp_path / "nowhere")}))
    (tmp_path / "items.csv").write_text("item_id,title\ni0,w1 w2\ni1,w3 w4\n")
    with pytest.raises(DataError, match=REFUSALS[kind]):
        build_task(make(kind, **{"data.path": str(tmp_path)}))


@each_task
def test_a_batch_is_a_function_of_seed_and_step(kind: str, ready: Callable[[str], Setup], make: MakeRecipe) -> None:
    setup, other = ready(kind), ready(kind)
    wanted = other.task.batch(setup.task.per_epoch + 1)  # the very first that this one is asked
    for step in range(setup.task.per_epoch + 1):
        setup.task.batch(step, 0, 2)
    assert_same(setup.task.batch(setup.task.per_epoch + 1), wanted)
    seeded = build_setup(make(kind, seed=5), Path("unused"))
    assert count_examples(seeded.task.batch(0), kind) != count_examples(setup.task.batch(0), kind)


@each_task
def test_an_epoch_sees_every_example_once_and_the_next_in_another_order(
    kind: str, ready: Callable[[str], Setup]
) -> None:
    task = ready(kind).task
    orders = 2 if kind == "sequence" else 1  # of each bundle, by the default of `task.orders`
    wanted = train_examples(task, kind)
    assert wanted.total() == task.examples["train"]
    for epoch in range(2):
        seen: Counter[Hashable] = Counter()
        for step in range(task.per_epoch):
            seen += count_examples(task.batch(epoch * task.per_epoch + step), kind)
        assert seen == Counter({one: orders * count for one, count in wanted.items()})
    assert count_examples(task.batch(0), kind) != count_examples(task.batch(task.per_epoch), kind)


@each_task
def test_the_parts_of_a_step_cover_its_batch(kind: str, ready: Callable[[str], Setup]) -> None:
    task = ready(kind).task
    whole = count_examples(task.batch(1), kind)
    assert count_examples(task.batch(1, 0, 2), kind) + count_examples(task.batch(1, 1, 2), kind) == whole


@each_task
def test_the_loss_is_finite_and_reaches_head_and_adapter(kind: str, ready: Callable[[str], Setup]) -> None:
    setup = ready(kind)
    setup.measure_baseline()
    nudge(setup)
    loss = setup.model(setup.task.batch(0), seed=3)
    assert loss.shape == ()
    assert torch.isfinite(loss)
    loss.backward()
    trained = collect_trained_parameters(setup.attached, setup.head)
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert all(bool(p.grad.isfinite().all()) for p in trained.values() if p.grad is not None)
    assert {name.split(":")[0] for name in trained} == {"adapter", "head"}


@each_task
def test_an_untrained_adapter_predicts_what_the_frozen_encoder_does(kind: str, ready: Callable[[str], Setup]) -> None:
    setup = ready(kind)
    frozen, _ = setup.measure_baseline()
    assert_same(setup.predict(), frozen, tolerance=1e-5)
    table = setup.task.table(frozen, setup.predict())
    assert table.gain.value == pytest.approx(0, abs=1e-6)
    assert [row.name for row in table.rows][-2:] == ["frozen backbone", "tuned"]


@each_task
def test_a_head_rebuilt_from_its_specification_answers_the_same(kind: str, ready: Callable[[str], Setup]) -> None:
    setup = ready(kind)
    setup.measure_baseline()
    nudge(setup)
    setup.task.apply_choice(setup.head, setup.evaluate().choice)
    rebuilt = load_head(json.loads(json.dumps(setup.head.spec())), setup.head.state_dict())
    assert type(rebuilt) is type(setup.head)
    assert rebuilt.spec() == setup.head.spec()
    assert_same(setup.task.predict(rebuilt, setup.encode), setup.predict())


@each_task
def test_the_validation_metrics_are_those_the_recipe_may_name(kind: str, ready: Callable[[str], Setup]) -> None:
    setup = ready(kind)
    setup.measure_baseline()
    values = setup.evaluate().values
    assert set(values) == set(setup.recipe.task.metrics)
    assert all(np.isfinite(value) for value in values.values())
    assert setup.recipe.metric in values


@each_task
def test_a_dry_run_counts_what_the_run_trains(
    kind: str, make: MakeRecipe, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # More words than the 2,048 of the stand-in for an encoder: the head of the masked task has a bias for each.
    encoder = build_encoder(tmp_path_factory.mktemp("many-words"), vocab_size=2500)
    recipe = make(kind, **{"backbone.model": str(encoder)})
    dry, setup = plan(recipe), build_setup(recipe, tmp_path)
    assert dry.head_parameters == sum(p.numel() for p in setup.head.parameters() if p.requires_grad)
    assert dry.adapter_parameters == sum(p.numel() for p in setup.attached.trainable().values())
    assert (dry.steps, dry.examples) == (setup.total, setup.task.examples)
