"""The bundle task on cases small enough to work out by hand."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from peft_combo.data.queries import Queries
from peft_combo.encoder.heads.completion import BundleHead, project_targets, rank_targets, score_completion
from peft_combo.encoder.heads.sequence import SequenceHead
from peft_combo.errors import StoreError
from peft_combo.recipe.task import BundleTask, SequenceTask
from peft_combo.scoring.whitening import half_whiten
from peft_combo.tuning.tasks.bundle import BundleBatch, BundleBatches, compute_bundle_logits, compute_bundle_loss

# Four items on the axes of the plane: 0 and 2 point right, 1 points up, 3 points left.
VECTORS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])


def batches(bundles: list[list[int]], n_items: int = 8, batch_size: int = 2, **task: object) -> BundleBatches:
    return BundleBatches(
        [np.array(rows, np.int32) for rows in bundles], np.arange(n_items), np.arange(n_items) % 2,
        BundleTask.model_validate(task), batch_size, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_an_untrained_head_is_the_mean_and_the_identity(pooling: str) -> None:
    head = BundleHead(2, BundleTask.model_validate({"pooling": pooling}))
    query = head.query(VECTORS, torch.tensor([[0, 1], [3, -1]]))
    torch.testing.assert_close(query, torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [-1.0, 0.0]]))
    torch.testing.assert_close(head.target(VECTORS), VECTORS)


def test_attention_pooling_weighs_the_items() -> None:
    head = BundleHead(2, BundleTask(pooling="attention"))
    assert head.attention is not None
    with torch.no_grad():
        head.attention.weight.copy_(torch.tensor([[0.0, 100.0]]))  # looks at whatever points up
    torch.testing.assert_close(head.query(VECTORS, torch.tensor([[0, 1]])), torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_half_whitened_head_starts_from_the_cosine_of_half_whitened_vectors(pooling: str) -> None:
    rng = np.random.default_rng(3)
    vectors = (rng.normal(size=(50, 8)) * np.geomspace(9, 1, 8) + 2).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    head = BundleHead(8, BundleTask.model_validate({"pooling": pooling, "whitening": "half"})).eval()
    head.measure(vectors)
    contexts = np.array([[0, 1], [7, -1]])
    expected = half_whiten(vectors)
    means = np.array([expected[[0, 1]].mean(axis=0), expected[7]])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    scores = score_completion(head, vectors, project_targets(head, vectors), contexts)
    np.testing.assert_allclose(scores, means @ expected.T, atol=1e-5)
    again = BundleHead.from_spec(head.spec(), head.state_dict())
    np.testing.assert_array_equal(score_completion(again, vectors, project_targets(again, vectors), contexts), scores)
    far = copy.deepcopy(head)
    with torch.no_grad():
        for weight in far.step_weights():
            weight.fill_(0.1)
    back = far.interpolate(0)
    np.testing.assert_allclose(
        score_completion(back, vectors, project_targets(back, vectors), contexts), scores, atol=1e-6
    )


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_an_empty_context_has_no_scores_and_costs_no_other_query_its_own(pooling: str) -> None:
    head = BundleHead(2, BundleTask.model_validate({"pooling": pooling})).eval()
    vectors = VECTORS.numpy()
    contexts = np.array([[-1, -1], [0, -1], [-1, -1]])
    scores = score_completion(head, vectors, project_targets(head, vectors), contexts)
    assert np.isnan(scores[[0, 2]]).all()
    np.testing.assert_allclose(scores[1], [1.0, 0.0, 1.0, -1.0], atol=1e-6)


def test_a_sequence_head_scores_what_begins_a_bundle() -> None:
    head = SequenceHead(4, SequenceTask()).eval()
    vectors = np.eye(4, dtype=np.float32)
    scores = score_completion(head, vectors, project_targets(head, vectors), np.array([[-1, -1], [0, 1]]))
    assert np.isfinite(scores).all()


def test_the_loss_of_a_worked_case() -> None:
    # Context 0, answer 1, wrong answers 2 and 3 of which 2 is barred: similarities 0 (answer) and -1.
    head = BundleHead(2, BundleTask(temperature=1.0))
    batch = BundleBatch(
        np.arange(4), torch.tensor([[0]]), torch.tensor([1]), torch.tensor([[True, False, True, False]]), torch.ones(1)
    )
    assert compute_bundle_loss(compute_bundle_logits(head, VECTORS, batch), batch).item() == pytest.approx(
        math.log(1 + math.exp(-1)), abs=1e-6
    )


def test_every_item_of_every_bundle_is_asked_for_once_an_epoch() -> None:
    made = batches([[0, 1, 2], [3, 4], [5, 6]], batch_size=1)
    assert made.per_epoch == 3
    asked = []
    for step in range(3):
        batch = made.batch(step)
        for context, target in zip(batch.contexts, batch.targets, strict=True):
            rows = {int(batch.items[place]) for place in context if place >= 0}
            asked.append((frozenset(rows), int(batch.items[target])))
    assert sorted(asked, key=str) == sorted(
        [(frozenset(b) - {i}, i) for b in ({0, 1, 2}, {3, 4}, {5, 6}) for i in b], key=str
    )


def test_context_and_other_right_answers_are_barred_and_nothing_else() -> None:
    # With item 0 the training bundles hold 1, and also 2: neither is a wrong answer for the other.
    batch = batches([[0, 1], [0, 2]]).batch(0)
    assert batch.items.tolist() == [0, 1, 2]
    questions = zip(batch.contexts, batch.targets, batch.barred.tolist(), strict=True)
    barred = {(int(c[0]), int(t)): b for c, t, b in questions}
    assert barred[(0, 1)] == [True, False, True]
    assert barred[(0, 2)] == [True, True, False]
    assert barred[(1, 0)] == [False, True, False]


def test_copies_of_the_answer_are_barred() -> None:
    made = BundleBatches(
        [np.array([0, 1], np.int32), np.array([2, 3], np.int32)], np.array([0, 1, 2, 1]), np.zeros(4, np.int64),
        BundleTask(), 2, seed=0,
    )  # fmt: skip
    batch = made.batch(0)
    places = [i for i, t in enumerate(batch.targets.tolist()) if t == 1]
    assert [batch.barred[i].tolist() for i in places] == [[True, False, False, True]]


def test_the_parts_of_a_batch_make_the_whole() -> None:
    made = batches([[0, 1], [2, 3], [4, 5], [6, 7]], batch_size=4)
    whole = made.batch(5).items.tolist()
    assert sorted(np.concatenate([made.batch(5, part, 2).items for part in range(2)]).tolist()) == whole


@pytest.mark.parametrize("negatives", ["leaf", "random"])
def test_extra_negatives_come_from_the_catalogue_and_are_new(negatives: str) -> None:
    made = batches([[0, 2], [4, 2]], n_items=40, extra_negatives=5, negatives=negatives)
    batch = made.batch(0)
    extra = batch.items[3:].tolist()
    assert 0 < len(extra) <= 5
    assert not {0, 2, 4} & set(extra)
    if negatives == "leaf":
        assert all(row % 2 == 0 for row in extra)
    assert made.batch(0).items.tolist() == batch.items.tolist()
    assert made.batch(1).items.tolist() != batch.items.tolist()


def test_context_dropout_leaves_at_least_one() -> None:
    batch = batches([[0, 1, 2, 3], [4, 5, 6, 7]], context_dropout=0.9).batch(0)
    assert ((batch.contexts >= 0).sum(1) >= 1).all()
    assert (batch.contexts >= 0).sum() < 8 * 3


def test_completion_ranks_of_a_worked_case() -> None:
    # Item 0 asks for 2 (its twin: rank 1) and item 1 for 0: 0 and 2 tie below nothing, 3 is equal too: all at 0.
    head = BundleHead(2, BundleTask())
    questions = Queries.leave_one_out([np.array([0, 2], np.int32), np.array([1, 3], np.int32)], ["a", "b"])
    ranks = dict(zip(questions.targets.tolist(), rank_targets(head, VECTORS.numpy(), questions), strict=True))
    assert ranks[2] == 1
    assert ranks[0] == 1
    assert ranks[3] == 2  # from item 1: 0, 2 and 3 score the same, so all take the middle of places 1 to 3
    assert ranks[1] == 1  # from item 3: 1 scores 0, the others -1


def test_a_head_is_rebuilt_from_its_description() -> None:
    head = BundleHead(2, BundleTask(pooling="attention", temperature=0.1))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.5)
    again = BundleHead.from_spec(head.spec(), head.state_dict())
    contexts = torch.tensor([[0, 1], [3, -1]])
    torch.testing.assert_close(again.query(VECTORS, contexts), head.query(VECTORS, contexts))
    with pytest.raises(StoreError, match="does not match"):
        BundleHead.from_spec({**head.spec(), "dim": 3}, head.state_dict())


def test_strength_goes_from_the_identity_to_what_was_learned() -> None:
    head = BundleHead(2, BundleTask())
    assert head.target_projection is not None
    with torch.no_grad():
        head.target_projection.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    up = torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(head.interpolate(0.5).target(up), torch.tensor([[0.5, 1.0]]) / math.sqrt(1.25))
    torch.testing.assert_close(head.interpolate(1).target(up), head.target(up))


def test_a_sample_of_questions_is_part_of_them_and_always_the_same() -> None:
    bundles = [np.array([row, row + 1, row + 2], np.int32) for row in range(20)]
    questions = Queries.leave_one_out(bundles, [str(row) for row in range(20)])
    some = questions.sample(7, seed=3)
    assert len(some) == 7
    whole = {(tuple(c), int(t)) for c, t in zip(questions.contexts, questions.targets, strict=True)}
    assert {(tuple(c), int(t)) for c, t in zip(some.contexts, some.targets, strict=True)} <= whole
    np.testing.assert_array_equal(some.targets, questions.sample(7, seed=3).targets)
    assert questions.sample(1000, seed=3) is questions
