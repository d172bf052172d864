"""The sequence task on cases small enough to work out by hand: nothing looks ahead, and the end is counted right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from peft_combo.data.queries import Queries
from peft_combo.encoder.heads import load_head
from peft_combo.encoder.heads.completion import BundleHead, rank_targets
from peft_combo.encoder.heads.sequence import SequenceHead
from peft_combo.errors import StoreError
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import BundleTask, SequenceTask
from peft_combo.tuning.loop import tune
from peft_combo.tuning.tasks import build_task
from peft_combo.tuning.tasks.sequence import (
    SequenceBatch,
    SequenceBatches,
    compute_sequence_logits,
    compute_sequence_loss,
    estimate_size_log_odds,
)

DIM = 8


def trained(**task: object) -> SequenceHead:
    """A head that has gone somewhere: every weight is moved off its start."""
    head = SequenceHead(DIM, SequenceTask.model_validate({"layers": 2, "width": 8, "attention_heads": 2, **task}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return head.eval()


def items(count: int = 7) -> Tensor:
    return functional.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(2)), dim=-1)


def batches(bundles: list[list[int]], n_items: int = 8, batch_size: int = 2, **task: object) -> SequenceBatches:
    return SequenceBatches(
        [np.array(rows, np.int32) for rows in bundles], np.arange(n_items), np.arange(n_items) % 2,
        SequenceTask.model_validate(task), batch_size, seed=0,
    )  # fmt: skip


# ---- the head ----


@pytest.mark.parametrize("projection", ["linear", "none"])
def test_an_untrained_head_scores_like_the_cosine_of_the_bundle_head(projection: str) -> None:
    head = SequenceHead(DIM, SequenceTask.model_validate({"layers": 3, "projection": projection}))
    plain = BundleHead(DIM, BundleTask())
    contexts = torch.tensor([[0, 1, 2], [3, -1, -1], [4, 5, -1]])
    torch.testing.assert_close(head.query(items(), contexts), plain.query(items(), contexts))
    torch.testing.assert_close(head.target(items()), plain.target(items()))
    torch.testing.assert_close(head.log_scale, plain.log_scale)


def test_what_follows_some_items_is_the_same_in_whatever_order_they_stand() -> None:
    head = trained()
    places = head.prefixes(items(), torch.tensor([[3, 1, 5, 0], [2, 6, -1, -1]]))
    for length, order in ((2, [1, 3]), (3, [5, 3, 1]), (4, [0, 1, 3, 5])):
        torch.testing.assert_close(head.query(items(), torch.tensor([order]))[0], places[0, length])
    torch.testing.assert_close(places[1, 2:], head.query(items(), torch.tensor([[6, -1, 2]])).expand(3, -1))
    # And it does depend on which they are.
    assert not torch.allclose(places[0, 2], places[0, 3], atol=1e-2)


def test_a_place_sees_neither_its_own_item_nor_a_later_one() -> None:
    head, sequence = trained(), torch.tensor([[3, 1, 5, 0]])
    for place in range(5):
        vectors = items().requires_grad_()
        head.prefixes(vectors, sequence)[0, place].sum().backward()  # type: ignore[no-untyped-call]
        assert vectors.grad is not None
        seen = {row for row, gradient in enumerate(vectors.grad) if bool((gradient != 0).any())}
        assert seen == set(sequence[0, :place].tolist())
    changed = items().clone()
    changed[[5, 0]] = items()[[2, 4]]
    before, after = head.prefixes(items(), sequence), head.prefixes(changed, sequence)
    torch.testing.assert_close(after[0, :3], before[0, :3], rtol=0, atol=0)
    assert not torch.allclose(after[0, 3], before[0, 3], atol=1e-2)


def test_an_empty_set_is_the_begin_token_whatever_items_there_are() -> None:
    head, empty = trained(), torch.empty(2, 0, dtype=torch.int64)
    torch.testing.assert_close(head.query(items(), empty), head.query(items(0), empty))
    torch.testing.assert_close(head.query(items(), empty)[0], head.prefixes(items(), torch.tensor([[4, 2]]))[0, 0])
    untrained = SequenceHead(DIM, SequenceTask())
    with torch.no_grad():
        untrained.begin.copy_(items()[3])
    torch.testing.assert_close(untrained.query(items(), empty), items()[[3, 3]])


@torch.no_grad()
def test_strength_goes_from_the_cosine_to_what_was_learned() -> None:
    head, contexts = trained(), torch.tensor([[0, 1, 2]])
    plain = BundleHead(DIM, BundleTask()).query(items(), contexts)
    apart = [
        float((head.interpolate(share).query(items(), contexts) - plain).norm()) for share in (1e-6, 0.1, 0.5, 1.0)
    ]
    assert apart[0] < 1e-4
    assert apart == sorted(apart)
    torch.testing.assert_close(head.interpolate(1.0).query(items(), contexts), head.query(items(), contexts))


def test_a_stored_head_is_rebuilt_and_drops_nothing_out() -> None:
    head = trained(head_dropout=0.5)
    with torch.no_grad():
        head.size_log_odds.uniform_()
    again = load_head(head.spec(), head.state_dict())
    assert isinstance(again, SequenceHead)
    contexts = torch.tensor([[0, 1], [3, -1]])
    for _ in range(2):
        torch.testing.assert_close(again.query(items(), contexts), head.query(items(), contexts), rtol=0, atol=0)
    torch.testing.assert_close(again.size_log_odds, head.size_log_odds)
    assert not again.training
    with pytest.raises(StoreError, match="does not match"):
        SequenceHead.from_spec({**head.spec(), "width": 16}, head.state_dict())


# ---- the end ----


def test_how_often_bundles_of_a_size_end_is_counted() -> None:
    # Of three bundles of at least 2 items two end there; the third has 3 items, or any number from 3 on.
    expected = [math.log(0.5 / 3.5), math.log(0.5 / 3.5), math.log(2.5 / 1.5), math.log(1.5 / 0.5)]
    assert estimate_size_log_odds([2, 2, 3], 3).tolist() == pytest.approx(expected)
    assert estimate_size_log_odds([2, 2, 7], 3).tolist() == pytest.approx(expected)


def test_how_probable_the_end_is_does_not_depend_on_the_number_of_items() -> None:
    head = trained()
    with torch.no_grad():
        head.size_log_odds.copy_(torch.linspace(-1, 1, len(head.size_log_odds)))
    sequences = torch.tensor([[0, 1, 2]])
    queries = head.prefixes(items(), sequences)[0]
    expected = head.completeness(queries, torch.arange(4)).sigmoid()
    for count in (3, 7):
        batch = SequenceBatch(np.arange(count), sequences, torch.zeros(4, count, dtype=torch.bool))
        logits = compute_sequence_logits(head, items(7)[:count], batch)
        torch.testing.assert_close(logits.softmax(-1)[:, -1], expected)


def test_the_loss_of_a_worked_case() -> None:
    # Two items at right angles, the bundle {0, 1} in this order, an end at log-odds 0: one half wherever it is asked.
    head = SequenceHead(2, SequenceTask(temperature=1.0))
    with torch.no_grad():
        head.begin.copy_(torch.tensor([1.0, 0.0]))
    axes = torch.eye(2)
    barred = torch.tensor([[False, True], [True, False], [False, False]])  # what is in the bundle is no wrong answer
    batch = SequenceBatch(np.arange(2), torch.tensor([[0, 1]]), barred)
    assert batch.targets.tolist() == [0, 1, 2]
    logits = compute_sequence_logits(head, axes, batch)
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([[0.5, 0, 0.5], [0, 0.5, 0.5], [0.25, 0.25, 0.5]]))
    assert compute_sequence_loss(logits, batch).item() == pytest.approx(math.log(2))


# ---- the batches ----


def test_every_place_of_every_order_is_asked_from_the_begin_to_the_end() -> None:
    made = batches([[0, 1, 2], [3, 4]], orders=3)
    batch = made.batch(0)
    assert batch.items.tolist() == [0, 1, 2, 3, 4]
    assert len(batch.sequences) == 6
    read = [tuple(int(batch.items[place]) for place in row if place >= 0) for row in batch.sequences]
    assert sorted(map(sorted, read)) == [[0, 1, 2]] * 3 + [[3, 4]] * 3
    answers = iter(batch.targets.tolist())
    for order in read:
        assert [next(answers) for _ in range(len(order) + 1)] == [*order, 5]
    assert next(answers, None) is None
    assert len(batch.barred) == 3 * 4 + 3 * 3
    orders = {tuple(row) for step in range(20) for row in made.batch(step).sequences.tolist() if -1 not in row}
    assert len(orders) == 6  # all orders of three items come up
    assert made.batch(3).sequences.tolist() == made.batch(3).sequences.tolist()


def test_only_fair_wrong_answers_count() -> None:
    # With item 0 the training bundles hold 1, and also 2. At the begin all of the own bundle is right.
    batch = batches([[0, 1], [0, 2]], orders=1).batch(0)
    rows = iter(zip(batch.targets.tolist(), batch.barred.tolist(), strict=True))
    for sequence in batch.sequences.tolist():
        first, second = sequence
        told = dict(next(rows) for _ in range(3))
        assert told[3] == [False, False, False]
        own = {first, second}
        assert {place for place, out in enumerate(told[first]) if out} == own - {first}
        also = {0, 1, 2} if first == 0 else own
        assert {place for place, out in enumerate(told[second]) if out} == also - {second}


# ---- the task ----


def test_it_learns_and_starts_where_the_bundle_task_starts(tiny_recipe: Callable[..., Any]) -> None:
    task = {"kind": "sequence", "width": 16, "temperature": 0.1}
    recipe = tiny_recipe(**{"task": task, "training.epochs": 6})
    result = tune(recipe)
    assert result.table.after.values["ndcg@10"] > result.table.before.values["ndcg@10"] + 0.05
    assert result.record.manifest.task["kind"] == "sequence"
    bundle_task, same = build_task(tiny_recipe()), build_task(recipe)
    vectors = functional.normalize(torch.randn(len(same.texts), 32), dim=-1).numpy()
    heads = BundleHead(32, BundleTask()).eval(), SequenceHead(32, SequenceTask()).eval()
    ranks = [one.predict(head, lambda rows: vectors) for one, head in zip((bundle_task, same), heads, strict=True)]
    np.testing.assert_array_equal(*ranks)


def test_it_begins_with_the_mean_item_of_the_training_bundles(tiny_recipe: Callable[..., Recipe]) -> None:
    task = build_task(tiny_recipe(task={"kind": "sequence"}))
    vectors = functional.normalize(torch.randn(len(task.texts), DIM), dim=-1).numpy()
    head = SequenceHead(DIM, SequenceTask())
    asked: list[Any] = []

    def frozen(rows: Any) -> Any:
        asked.append(rows)
        return vectors[rows]

    task.start(head, frozen)
    torch.testing.assert_close(head.begin, functional.normalize(torch.from_numpy(vectors[asked[0]].mean(0)), dim=0))
    assert head.size_log_odds[1] < head.size_log_odds[4]  # there are bundles of 2 to 4 items


def test_completion_is_measured_with_the_set_as_it_is() -> None:
    head, vectors = trained(), items().numpy()
    questions = Queries.leave_one_out([np.array([0, 3, 5], np.int32)], ["a"])
    backwards = Queries(questions.contexts[:, ::-1].copy(), questions.targets, questions.groups, questions.bundles)
    np.testing.assert_array_equal(rank_targets(head, vectors, questions), rank_targets(head, vectors, backwards))
