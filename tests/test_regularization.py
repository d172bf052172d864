"""What keeps training from learning by heart: each switch does what its paper says, and a killed run repeats it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import StopAt
from safetensors.torch import load_file
from torch import nn

from peft_combo.callbacks import RunCallback
from peft_combo.encoder import methods
from peft_combo.encoder.architectures import set_training
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.base import TaskHead
from peft_combo.errors import RecipeError, TuningError
from peft_combo.recipe.model import Averaging, Recipe, TrainingConfig
from peft_combo.tuning.adversarial import Perturbation, add_adversarial_gradients, count_passes
from peft_combo.tuning.augmentation import TextVariants
from peft_combo.tuning.averaging import WeightAverage
from peft_combo.tuning.extensions import build_extensions
from peft_combo.tuning.item_encoder import ItemEncoder
from peft_combo.tuning.loop import tune
from peft_combo.tuning.model import TrainingModel, collect_trained_parameters
from peft_combo.tuning.optimizer import Group, build_parameter_groups
from peft_combo.tuning.r_drop import compute_disagreement
from peft_combo.tuning.step import Passes, StepExtensions
from peft_combo.tuning.tasks import build_task

MakeRecipe = Callable[..., Recipe]


class Run:
    """The parts of a run, as the loop puts them together, after some steps have moved every weight."""

    def __init__(self, recipe: Recipe, variants: TextVariants | None = None) -> None:
        self.recipe = recipe
        self.task = build_task(recipe)
        backbone = Backbone.of(recipe.backbone)
        self.attached = methods.attach(backbone.model, recipe.adapter, max_length=16, total_steps=9, seed=0)
        self.head: TaskHead = self.task.head(backbone, 16)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in (*self.attached.trainable().values(), *self.head.parameters()):
                parameter.add_(0.05 * torch.randn_like(parameter))
        self.items = ItemEncoder(backbone, self.attached, self.task.texts, extra_texts=tuple(variants or ()))
        self.extensions = self.extend(recipe.training, variants)
        self.model = TrainingModel(self.task, self.items, self.attached, self.head, self.extensions)
        self.batch = self.task.batch(0)
        set_training(self.attached.inner, self.attached.first_layer, False)

    def extend(self, config: TrainingConfig, variants: TextVariants | None = None) -> StepExtensions:
        parameters = collect_trained_parameters(self.attached, self.head)
        return build_extensions(config, self.items, parameters, variants, self.task.exclusive)

    def gradients(self, config: TrainingConfig) -> tuple[float, list[torch.Tensor]]:
        self.model.zero_grad(set_to_none=True)
        passes = Passes(self.model, self.model, lambda one: one.backward())
        loss = self.extend(config).add_gradients(passes, self.batch, 3)
        return loss, [p.grad.clone() for p in self.attached.trainable().values() if p.grad is not None]


# --- R-Drop -----------------------------------------------------------------------------------------------------------


def test_disagreement_by_hand() -> None:
    one, two = torch.log(torch.tensor([[0.5, 0.5]])), torch.log(torch.tensor([[0.8, 0.2]]))
    forth = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    back = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    assert compute_disagreement(one, two, True).item() == pytest.approx((forth + back) / 2, abs=1e-6)
    # A yes or no with the same chances is the same question.
    odds = [torch.tensor([0.0]), torch.tensor([math.log(4)])]
    assert compute_disagreement(*odds, False).item() == pytest.approx((forth + back) / 2, abs=1e-6)
    assert compute_disagreement(one, one, True).item() == 0
    # What is no candidate in either pass adds nothing.
    barred = [torch.cat([x, torch.full((1, 1), -1e4)], 1) for x in (one, two)]
    assert compute_disagreement(*barred, True).item() == pytest.approx((forth + back) / 2, abs=1e-6)


def test_r_drop_adds_what_two_passes_disagree_by(tiny_recipe: MakeRecipe) -> None:
    run = Run(tiny_recipe(**{"training.r_drop": 2.0, "adapter.dropout": 0.3}))
    run.attached.inner.train()
    torch.manual_seed(5)
    seen: list[torch.Tensor] = []
    honest = run.task.logits
    run.task.logits = lambda *a: seen.append(honest(*a)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    loss = run.model(run.batch, 3)
    first, second = seen
    assert not torch.equal(first, second)
    wanted = (run.task.loss(first, run.batch) + run.task.loss(second, run.batch)) / 2
    wanted = wanted + 2.0 * compute_disagreement(first, second, True)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_r_drop_without_dropout_is_refused(tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"training.r_drop.*without dropout.*encoder_dropout"):
        tiny_recipe(**{"training.r_drop": 1.0, "adapter.dropout": 0.0})


# --- rates and freezing -----------------------------------------------------------------------------------------------


def rates(recipe: Recipe) -> dict[int | None, set[tuple[float, float]]]:
    """Return (rate, waits) of each layer's weights, None for the head."""
    run = Run(recipe)
    names = {id(p): name for name, p in run.attached.trainable().items()}
    found: dict[int | None, set[tuple[float, float]]] = {}
    for group in build_parameter_groups(recipe.training, run.attached, run.head):
        for parameter in group.parameters:
            name = names.get(id(parameter))
            layer = None if name is None else int(name.split("layer.")[1].split(".")[0])
            found.setdefault(layer, set()).add((round(group.rate, 6), round(group.waits, 6)))
    return found


def test_each_layer_learns_at_a_share_of_the_one_above(tiny_recipe: MakeRecipe) -> None:
    changes = {"adapter.top_layers": 3, "training.layer_decay": 0.5, "training.head_learning_rate": 0.1}
    found = rates(tiny_recipe(**changes))
    assert found == {2: {(0.005, 0)}, 1: {(0.0025, 0)}, 0: {(0.00125, 0)}, None: {(0.1, 0)}}


def test_layers_join_from_the_top(tiny_recipe: MakeRecipe) -> None:
    changes = {"adapter.top_layers": 3, "training.freezing": {"schedule": "gradual", "share": 0.4}}
    found = rates(tiny_recipe(**changes))
    assert found == {2: {(0.005, 0)}, 1: {(0.005, 0.2)}, 0: {(0.005, 0.4)}, None: {(0.005, 0)}}
    group = Group([], 0.1, 0.0, waits=0.4)
    assert [group.rate_at(0.5, step, 10) for step in (0, 3, 4, 9)] == [0, 0, 0.05, 0.05]


def test_who_waits_does_not_move(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        **{
            "training.freezing": {"schedule": "head-first", "share": 0.5},
            "training.checkpoint_every": 1,
            "training.early_stopping": None,
        }
    )
    half = build_task(recipe).per_epoch * 2
    with pytest.raises(SystemExit):
        tune(recipe, run_folder=tmp_path, callback=StopAt(half + 1))
    (folder,) = tmp_path.glob("step-*")
    adapter, head = (load_file(folder / f"{name}.safetensors") for name in ("adapter", "head"))
    assert all(not tensor.any() for name, tensor in adapter.items() if "lora_B" in name)  # as it was drawn
    assert head["query_projection.weight"].any()
    straight = tune(recipe, run_folder=tmp_path, resume=True)
    stored = load_file(straight.record.path / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in stored.items() if "lora_B" in name)


def test_one_layer_cannot_join_one_by_one(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match=r"gradual.*top_layers.*head-first"):
        tune(tiny_recipe(**{"adapter.top_layers": 1, "training.freezing": {}}), run_folder=tmp_path)


# --- adversarial ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_a_push_enters_where_learning_begins(cached: bool, tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(**{"adapter.top_layers": 2 if cached else None})
    run = Run(recipe)
    assert (run.items.cached_bytes > 0) == cached
    rows = np.array([5, 3, 5, 0])
    plain = run.items.encode(run.items.encoder, rows)
    selection = run.items.select(rows)
    states, text = run.items.entering_states(selection)
    selection = replace(selection, added=torch.zeros_like(states))
    torch.testing.assert_close(run.items.encode_selection(run.items.encoder, selection), plain)
    assert selection.added is not None
    selection.added[text == 1, :4] += 0.5  # the second text is item 3's
    moved = run.items.encode_selection(run.items.encoder, selection)
    assert [bool((a - b).abs().max() > 1e-4) for a, b in zip(moved, plain, strict=True)] == [False, True, False, False]


class Flat(nn.Module):
    """A loss that is a fixed direction times the push: the worst push of a length is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[torch.Tensor] = []

    def entering_states(self, batch: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([[6.0, 0.0], [0.0, 8.0], [2.0, 0.0]]), torch.tensor([0, 0, 1])  # of lengths 10 and 2

    def forward(self, batch: Any, seed: int, added: torch.Tensor | None = None) -> torch.Tensor:
        if added is None:
            return self.weight
        self.seen.append(added.detach().clone())
        direction = torch.tensor([[3.0, 0.0], [0.0, 4.0], [-1.0, 0.0]])
        return self.weight * (1 + (added * direction).sum())


@pytest.mark.parametrize("kind", ["fgm", "pgd", "freelb"])
def test_pushes_go_where_the_loss_grows_and_no_farther(kind: str) -> None:
    flat: Any = Flat()
    config = TrainingConfig.model_validate(
        {"adversarial": {"kind": kind, "epsilon": 0.1, "steps": 4, "step_size": 1.0}}
    )
    assert config.adversarial is not None
    passes = Passes(flat, flat, lambda one: one.backward())
    loss = add_adversarial_gradients(config.adversarial, passes, None, 0)  # type: ignore[arg-type]
    # Lengths of a tenth of 10 and of 2, along (3, 0, 0, 4) / 5 and (-1, 0).
    worst = torch.tensor([[0.6, 0.0], [0.0, 0.8], [-0.2, 0.0]])
    if kind == "freelb":
        assert loss == pytest.approx(np.mean([1 + _gain(push) for push in flat.seen]), rel=1e-6)
        assert _gain(flat.seen[-1]) > _gain(flat.seen[0])
    else:
        # A random start leaves a little across the gradient, which the pushes of pgd make smaller and smaller.
        torch.testing.assert_close(flat.seen[-1], worst, atol=1e-6 if kind == "fgm" else 0.05, rtol=0)
        assert loss == pytest.approx((1 + 1 + 5 + 0.2) / 2, rel=1e-6 if kind == "fgm" else 1e-3)
    assert flat.weight.grad == pytest.approx(loss)  # of what was learned from, and nothing else
    for push in flat.seen:
        assert float(push[:2].norm()) <= 1 + 1e-5
        assert float(push[2].norm()) <= 0.2 + 1e-5
    assert len(flat.seen) == {"fgm": 2, "pgd": 5, "freelb": 4}[kind]
    assert count_passes(config) == {"fgm": 2, "pgd": 6, "freelb": 4}[kind]


def _gain(push: torch.Tensor) -> float:
    return float(3 * push[0, 0] + 4 * push[1, 1] - push[2, 0])


def test_the_worst_push_is_worse_than_any_other(tiny_recipe: MakeRecipe) -> None:
    run = Run(tiny_recipe())
    plain = run.model(run.batch, 3).item()
    push = Perturbation.around(*run.model.entering_states(run.batch, 3))
    dice = torch.Generator().manual_seed(0)
    random = []
    for _ in range(5):
        noise = torch.randn(push.added.shape, generator=dice)
        with torch.no_grad():
            push.added.copy_(noise * (0.05 * push.sizes / push.lengths(noise))[push.text, None])
        random.append(run.model(run.batch, 3, push.added).item())
    total, _ = run.gradients(TrainingConfig.model_validate({"adversarial": {"epsilon": 0.05}}))
    assert 2 * total - plain > max(random)  # the mean of a clean and a pushed pass


def test_looking_for_a_push_leaves_no_gradient(tiny_recipe: MakeRecipe) -> None:
    run = Run(tiny_recipe())
    short = {"epsilon": 1e-7}
    _, plain = run.gradients(TrainingConfig())
    for kind in ("fgm", "pgd", "freelb"):
        _, pushed = run.gradients(TrainingConfig.model_validate({"adversarial": {"kind": kind, **short}}))
        for one, two in zip(plain, pushed, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


# --- averaging --------------------------------------------------------------------------------------------------------


def test_averages_by_hand() -> None:
    weight = nn.Parameter(torch.zeros(1))
    plain = WeightAverage(Averaging(kind="swa", start=0.5), {"w": weight})
    running = WeightAverage(Averaging(kind="ema", start=0.5, decay=0.75), {"w": weight})
    for step, value in enumerate((9.0, 2.0, 4.0, 9.0), 1):
        weight.data.fill_(value)
        for average in (plain, running):
            average.after_step(step / 4, evaluated=step != 3)
    # swa: evaluated and in the second half are 2 and 9. ema: 2, then 0.75 * 2 + 0.25 * 4, then 0.75 * 2.5 + 0.25 * 9.
    assert (plain.mean["w"].item(), running.mean["w"].item()) == (5.5, 4.125)
    with plain.for_evaluation():
        assert weight.item() == 5.5
    assert weight.item() == 9.0


def test_the_mean_is_what_is_evaluated_and_stored(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    states: list[dict[str, torch.Tensor]] = []
    recipe = tiny_recipe(
        **{
            "training.averaging": {"start": 0.6},
            "training.early_stopping": None,
            "task.strengths": [1.0],
            "training.checkpoint_every": 1,
        }
    )
    folder = tmp_path / "run"
    per_epoch = build_task(recipe).per_epoch

    class Keep(RunCallback):
        def on_evaluate(self, step: int, values: Any, best: bool) -> None:
            if step > per_epoch * 2:
                states.append({})

        def on_step_end(self, step: int, loss: float) -> None:
            # The checkpoint of the step before is there by now.
            if (step - 1) % per_epoch == 0 and step - 1 >= 0.6 * 4 * per_epoch:
                states[-1] = load_file(folder / f"step-{step - 1:08d}" / "head.safetensors")

    result = tune(recipe, run_folder=folder, callback=Keep())
    stored = load_file(result.record.path / "head.safetensors")["query_projection.weight"]
    third = states[0]["query_projection.weight"]
    # The mean of two points, the third epoch's and the last: twice the mean less the third is the last.
    last = 2 * stored - third
    assert not torch.allclose(stored, third, atol=1e-4)
    without = tune(
        tiny_recipe(**{"training.early_stopping": None, "task.strengths": [1.0]}), run_folder=tmp_path / "plain"
    )
    torch.testing.assert_close(
        last, load_file(without.record.path / "head.safetensors")["query_projection.weight"], atol=1e-5, rtol=1e-4
    )


# --- other wordings ---------------------------------------------------------------------------------------------------


def test_training_sees_other_wordings_and_evaluation_does_not(tiny_recipe: MakeRecipe) -> None:
    texts = build_task(tiny_recipe()).texts
    wordings = [[f"{text} w190"] if row % 2 else [] for row, text in enumerate(texts)]
    run, plain = Run(tiny_recipe(), TextVariants(texts, wordings, 1.0)), Run(tiny_recipe())
    rows = np.arange(6)
    with torch.no_grad():
        shown = run.extensions.choose_texts(run.items.select(rows), 1)
        seen = run.items.encode_selection(run.items.encoder, shown)
        straight = plain.items.encode(plain.items.encoder, rows)
        torch.testing.assert_close(run.items.encode(run.items.encoder, rows), straight)
    same = [bool(torch.allclose(a, b, atol=1e-5)) for a, b in zip(seen, straight, strict=True)]
    assert same == [True, False] * 3
    np.testing.assert_allclose(
        run.items.catalogue(run.items.encoder), plain.items.catalogue(plain.items.encoder), atol=1e-5
    )


# --- all of it at once ------------------------------------------------------------------------------------------------


def test_a_run_with_every_switch_goes_on_exactly_after_it_died(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        **{
            "training.r_drop": 0.5,
            "training.layer_decay": 0.8,
            "training.freezing": {"share": 0.2},
            "training.adversarial": {"kind": "freelb", "steps": 2},
            "training.averaging": {"kind": "ema", "start": 0.1, "decay": 0.9},
        }
    )
    straight = tune(recipe, run_folder=tmp_path / "straight")
    with pytest.raises(SystemExit):
        tune(recipe, run_folder=tmp_path / "run", callback=StopAt(8))
    resumed = tune(recipe, run_folder=tmp_path / "run", resume=True)
    assert resumed.losses == straight.losses
    assert resumed.table == straight.table
    for name in ("adapter_model.safetensors", "head.safetensors"):
        ours, theirs = load_file(resumed.record.path / name), load_file(straight.record.path / name)
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_a_recipe_s_wordings_are_trained_on_and_told(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    notes: list[str] = []

    class Listen(RunCallback):
        def on_note(self, text: str) -> None:
            notes.append(text)

    recipe = tiny_recipe(**{"augmentation": {"word_drop": 0.4, "share": 1.0}, "training.epochs": 2})
    altered = tune(recipe, run_folder=tmp_path / "altered", callback=Listen())
    plain = tune(tiny_recipe(**{"training.epochs": 2}), run_folder=tmp_path / "plain")
    assert altered.losses != plain.losses
    assert altered.table.before == plain.table.before
    assert any("texts are seen altered as well" in note for note in notes)
    again = tune(recipe, run_folder=tmp_path / "again", rewrite=lambda texts: [f"{text} w199" for text in texts])
    assert again.losses != altered.losses


def test_words_with_labels_are_not_altered(tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"augmentation: task.kind tagging labels single words"):
        tiny_recipe(task={"kind": "tagging"}, augmentation={"word_drop": 0.1})
