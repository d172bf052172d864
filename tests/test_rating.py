"""The rating task: what it measures, what it draws, what it may not see, and that it goes through the loop."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import StopAt
from safetensors.torch import load_file
from scipy import sparse
from scipy.special import expit

from peft_combo.data.events import Events, read_rated, split_events
from peft_combo.data.leakage import rating_problem
from peft_combo.data.model import Interactions
from peft_combo.data.queries import Queries
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import split_as
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads import load_head
from peft_combo.encoder.heads.rating import RatingHead
from peft_combo.errors import DataError, RecipeError, StoreError
from peft_combo.metrics.classification import calibration_error
from peft_combo.metrics.probability import auc, auc_draws, by_user, log_losses, platt, reliability
from peft_combo.recipe.files import load_recipe
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import RatingTask
from peft_combo.recommender.fit_data import FitData
from peft_combo.recommender.rating import FittedRating, Rater, prepend_items, rate
from peft_combo.scoring.features import Counted, CrossFitted, log_popularity
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.loop import TuneResult, tune
from peft_combo.tuning.tasks import build_task
from peft_combo.tuning.tasks.negatives import Negatives
from peft_combo.tuning.tasks.rating import ItemRating, RatingBatch, compute_rating_logits, compute_rating_loss

MakeRecipe = Callable[..., Recipe]
DAY = 86_400


@pytest.fixture
def visits(tmp_path: Path) -> Path:
    """60 items in 6 styles; each of 60 users comes five times within 50 days and takes two items of one style."""
    dice = random.Random(7)
    folder = tmp_path / "visits"
    folder.mkdir()
    titles = [f"w{10 + number % 6 * 2 + number // 6 % 2} w{40 + number} w{120 + number % 7}" for number in range(60)]
    (folder / "items.csv").write_text("item_id,title\n" + "\n".join(f"i{n},{t}" for n, t in enumerate(titles)) + "\n")
    lines = []
    for user in range(60):
        own = dice.sample([number for number in range(60) if number % 6 == user % 6], 10)
        for visit in range(5):
            time = 1_700_000_000 + (10 * visit + user % 9) * DAY
            for place, item in enumerate(own[2 * visit : 2 * visit + 2]):
                lines.append(f"u{user},b{user}-{visit},i{item},{1 + (user + place) % 5},{time}")
    (folder / "interactions.csv").write_text("user_id,basket_id,item_id,quantity,timestamp\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture
def recipe(tiny_recipe: MakeRecipe, visits: Path) -> MakeRecipe:
    def make(method: str = "lora", **changes: Any) -> Recipe:
        given = {"task": {"kind": "rating"}, "data.path": str(visits), "data.split": "time", "training.epochs": 2,
                 "training.batch_size": 64, "training.learning_rate": 1e-2}  # fmt: skip
        return tiny_recipe(method, **{**given, **changes})

    return make


def run(recipe: Recipe, tmp_path: Path, **options: Any) -> TuneResult:
    return tune(recipe, run_folder=tmp_path / "run", **options)


def rating_of(recipe: Recipe) -> ItemRating:
    task = build_task(recipe)
    assert isinstance(task, ItemRating)
    return task


def test_auc_counts_ties_for_half() -> None:
    # Right: 0.8 and 0.4; wrong: 0.4 and 0.1. Of four pairs three are won and one is level.
    assert auc(np.array([0.8, 0.4, 0.4, 0.1]), np.array([True, True, False, False])) == 3.5 / 4
    assert auc(np.zeros(5), np.array([True, False, False, True, False])) == 0.5
    assert auc(np.array([1.0, 2.0]), np.array([True, True])) == 0.5


def test_a_sample_of_users_brings_all_their_pairs() -> None:
    rng = np.random.default_rng(5)
    scores, right, users = rng.normal(size=40).round(1), rng.random(40) < 0.5, rng.integers(0, 8, 40)
    drawn = auc_draws(scores, right, users, n=3, seed=2)
    again = np.random.default_rng(2)
    for found in drawn:
        times = again.multinomial(8, np.full(8, 1 / 8))[users]
        assert found == pytest.approx(auc(np.repeat(scores, times), np.repeat(right, times)))
    # One user is every sample, and what ranks alike differs in none.
    np.testing.assert_allclose(auc_draws(scores, right, np.zeros(40, np.int64), n=2), auc(scores, right))
    np.testing.assert_array_equal(auc_draws(scores, right, users), auc_draws(3 * scores + 1, right, users))


def test_log_loss_by_hand() -> None:
    logits = np.log([3.0, 1.0, 0.25])  # scores 3/4, 1/2, 1/5
    found = log_losses(logits, np.array([1, 0.5, 0], np.float32))
    np.testing.assert_allclose(found, [-np.log(0.75), -np.log(0.5), -np.log(0.8)])
    assert log_losses(np.array([-1e4]), np.array([1], np.float32))[0] == 1e4


def test_bins_add_up_to_the_calibration_error() -> None:
    confidence = np.array([0.1, 0.3, 0.3, 0.9])
    targets = np.array([0, 1, 0, 1], np.float32)
    # Two bins: three pairs of mean 0.7/3 and share 1/3, one of 0.9 and 1.
    rows = reliability(confidence, targets, 2)
    np.testing.assert_allclose(rows, [(0, 0.5, 3, 0.7 / 3, 1 / 3), (0.5, 1, 1, 0.9, 1)])
    by_hand = 3 / 4 * (1 / 3 - 0.7 / 3) + 1 / 4 * 0.1
    assert calibration_error(confidence, targets > 0, 2) == pytest.approx(by_hand)
    assert sum(row[2] / 4 * abs(row[3] - row[4]) for row in rows) == pytest.approx(by_hand)


def test_platt_scaling_finds_the_line_that_made_the_answers() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(5, 3, 40_000)
    slope, constant = platt(scores, (rng.random(40_000) < expit(0.5 * scores - 2)).astype(np.float32))
    assert slope == pytest.approx(0.5, abs=0.02)
    assert constant == pytest.approx(-2, abs=0.1)


def test_every_user_weighs_the_same() -> None:
    np.testing.assert_allclose(by_user(np.array([1.0, 0.0, 0.5, 0.3]), np.array([7, 7, 7, 2])), [0.3, 0.5])


def test_ratings_become_targets() -> None:
    stars = np.array([0, 1, 2, 5], np.float32)
    assert read_rated(stars, RatingTask()).tolist() == [1, 1, 1, 1]
    assert read_rated(stars, RatingTask(feedback="explicit")).tolist() == [0, 0, 0.25, 1]
    assert read_rated(stars, RatingTask(feedback="explicit", like_from=2)).tolist() == [0, 0, 1, 1]


def test_a_history_is_strictly_earlier_latest_first_and_of_what_was_liked() -> None:
    def made(config: RatingTask) -> list[tuple[int, int, list[int]]]:
        interactions = Interactions.build(
            ["a", "b"], users=[0, 0, 0, 0, 1, 0, -1, 0], items=[3, 1, 2, 4, 1, 3, 0, 5],
            weights=[5, 1, 5, 5, 5, 5, 5, 4], times=[10, 20, 30, 30, 5, 40, 1, 50],
        )  # fmt: skip
        events = Events.of(interactions, config)
        histories = events.histories(np.arange(len(events)), config.history)
        return [
            (int(user), int(item), [int(one) for one in history if one >= 0])
            for user, item, history in zip(events.users, events.items, histories, strict=True)
        ]

    # 2 and 4 were taken at one moment: neither tells of the other. The second 3 is not an event, nor is a stranger's 0.
    assert made(RatingTask()) == [
        (0, 3, []), (0, 1, [3]), (0, 2, [1, 3]), (0, 4, [1, 3]), (0, 5, [4, 2, 1, 3]), (1, 1, []),
    ]  # fmt: skip
    assert made(RatingTask(history=2))[4] == (0, 5, [4, 2])
    assert made(RatingTask(feedback="explicit"))[4] == (0, 5, [4, 2, 3])


def test_a_past_is_all_that_was_liked_up_to_now() -> None:
    interactions = Interactions.build(
        ["a", "b", "c"], users=[0, 0, 0, 2, 0], items=[3, 1, 2, 4, 3], weights=[5, 5, 1, 5, 5], times=[1, 2, 3, 4, 5]
    )
    events = Events.of(interactions, RatingTask(feedback="explicit"))
    users = np.array([2, 0, 1, -1])
    assert events.pasts(users, 3).tolist() == [[4, -1, -1], [1, 3, -1], [-1, -1, -1], [-1, -1, -1]]
    assert events.pasts(users, 1).tolist() == [[4], [1], [-1], [-1]]


def test_what_lies_beside_is_latest_and_nothing_stands_there_twice() -> None:
    latest = np.array([[7, 2, -1], [-1, -1, -1]])
    pasts = np.array([[4, 2, 5, -1], [1, 3, -1, -1]])
    assert prepend_items(latest, pasts, 3).tolist() == [[7, 2, -1, 4, -1, -1, -1], [-1, -1, -1, 1, 3, -1, -1]]
    assert prepend_items(latest, pasts, 1).tolist() == [[7, -1, -1, -1, -1, -1, -1], [-1, -1, -1, 1, -1, -1, -1]]


def test_nearness_is_what_other_users_say() -> None:
    # All ten took items 0 and 1; user 0 alone took 2 and 3.
    taken = np.zeros((10, 12), np.float32)
    taken[:, :2] = 1
    taken[0, 2:4] = 1
    liked = sparse.csr_array(taken)
    counted, floor = Counted.of(taken.sum(0).astype(np.int64), liked, 5), np.log(0.01)
    whole = counted.nearness(np.array([[2, -1], [0, -1]]))
    assert whole is not None
    assert whole[0, 3] == pytest.approx(np.log(1.01), abs=1e-5)  # they share their only row
    assert whole[0, 5] == pytest.approx(floor)
    apart = CrossFitted(liked, 5, seed=0)
    found = apart.nearness(np.array([0, 4]), np.array([[2, -1], [0, -1]]), np.array([0, 0, 1]), np.array([3, 1, 1]))
    np.testing.assert_allclose(found, [floor, floor, np.log(1.01)], atol=1e-5)
    assert Counted.of(taken.sum(0).astype(np.int64), liked, 0).nearness(np.array([[2]])) is None


def test_nearness_is_weighed_beside_the_text() -> None:
    head = RatingHead(2, RatingTask(neighbours=3, temperature=0.5))
    assert head.neighbours is not None
    with torch.no_grad():
        head.neighbours.fill_(4.0)
    found = head.logits(torch.tensor([0.5, 0.0]), torch.tensor([0.25, 1.0]), torch.tensor([0.0, -1.0]))
    assert found.tolist() == pytest.approx([1.25, -3.0])  # 0.5 / 0.5 + 0.25, and 1 - 4
    assert len(head.weights) == 4
    assert len(RatingHead(2, RatingTask()).weights) == 3


def test_negatives_come_as_often_as_said_and_never_of_what_was_taken() -> None:
    taken = sparse.csr_array(np.array([[1, 0, 0, 0], [0, 0, 0, 0]], np.float32))
    negatives = Negatives(taken, np.array([8, 0, 3, 8]), power=0.5)  # weights 3, 1, 2, 3
    np.testing.assert_allclose(negatives.share, np.array([3, 1, 2, 3]) / 9)
    rng = np.random.default_rng(1)
    drawn = [np.bincount(negatives.draw(np.full(30_000, user), rng), minlength=4) / 30_000 for user in (0, 1)]
    np.testing.assert_allclose(drawn[0], np.array([0, 1, 2, 3]) / 6, atol=0.01)
    np.testing.assert_allclose(drawn[1], np.array([3, 1, 2, 3]) / 9, atol=0.01)
    # User 0 has three items left, of which item 3 is drawn half of the time: 5 * 3 * 1/2 times one even draw.
    found = negatives.correction(np.array([0, 1]), np.array([3, 1]), 5)
    np.testing.assert_allclose(found, [-np.log(7.5), -np.log(5 * 4 / 9)], rtol=1e-6)
    # Drawn evenly, only how many are drawn is left to correct.
    even = Negatives(taken, np.zeros(4, np.int64), 0.0)
    np.testing.assert_allclose(even.correction(np.array([0, 1]), np.array([2, 2]), 1), [0, 0], atol=1e-6)
    with pytest.raises(DataError, match="1 users took every one of the 2 items"):
        Negatives(sparse.csr_array(np.ones((1, 2), np.float32)), np.zeros(2, np.int64), 0.0)


def test_the_correction_undoes_the_draw() -> None:
    """Without content, the log-odds that fit best are those of taking against an even draw, however items are drawn."""
    counts = np.array([70, 20, 10])
    negatives = Negatives(sparse.csr_array(np.zeros((1, 3), np.float32)), counts, power=1.0)
    users = np.zeros(300_000, np.int64)
    rng = np.random.default_rng(0)
    wrong = negatives.draw(users, rng)
    right = rng.choice(3, 100_000, p=counts / 100)
    items = np.concatenate([right, wrong])
    targets = torch.from_numpy(np.repeat([1.0, 0.0], [100_000, 300_000])).float()
    shift = torch.from_numpy(negatives.correction(np.zeros(len(items), np.int64), items, 3))
    free = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=50)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(free[items] + shift, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(free.detach().numpy(), np.log(counts / 100 * 3), atol=0.06)


@pytest.mark.parametrize("by", ["time", "user"])
def test_nothing_held_out_is_trained_on(by: str, recipe: MakeRecipe) -> None:
    task = rating_of(recipe(**{"data.split": by}))
    events, parts = task._events, task._parts
    held = np.concatenate([parts.valid, parts.test])
    assert not set(parts.seen) & set(held)
    assert set(parts.train) <= set(parts.seen)
    cells = {(int(events.users[row]), int(events.items[row])) for row in held}
    if by == "time":
        assert events.times[parts.seen].max() < events.times[parts.valid].min()
        assert events.times[parts.valid].max() < events.times[parts.test].min()
    else:
        owners = [set(events.users[rows].tolist()) for rows in (parts.seen, parts.valid, parts.test)]
        assert not owners[0] & (owners[1] | owners[2])
        assert not owners[1] & owners[2]
    # What a batch tells the head of an event: the event itself, a history from before it, draws blind to the future.
    barred = np.divmod(task._negatives._cells, len(task.texts))
    assert not cells & set(zip(*(part.tolist() for part in barred), strict=True))
    batch = task.batch(3)
    rows = task._train[task._epochs.share(3)]
    for number, row in enumerate(rows):
        told = batch.items[batch.histories[number][batch.histories[number] >= 0].numpy()]
        earlier = (events.users == events.users[row]) & (events.times < events.times[row])
        assert set(told) <= set(events.items[earlier])
    own = batch.targets == 1
    assert batch.items[batch.candidates[own].numpy()].tolist() == events.items[rows].tolist()
    assert int((~own).sum()) == 4 * len(rows)
    # Popularity counts what is seen, and nothing else.
    counts = np.bincount(events.items[parts.seen], minlength=len(task.texts))
    np.testing.assert_array_equal(task._counted.log_popularity, log_popularity(counts))


def test_the_loss_by_hand(recipe: MakeRecipe) -> None:
    head = RatingHead(2, RatingTask(projection="none", temperature=0.5))
    with torch.no_grad():
        head.popularity.fill_(3.0)
        head.constant.fill_(-1.0)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    batch = RatingBatch(
        np.arange(3), torch.tensor([[0, -1]]), torch.tensor([0, 0]), torch.tensor([2, 1]), torch.tensor([1.0, 0.0]),
        torch.tensor([0.0, 0.25]), torch.tensor([0.1, 0.0]), None,
    )  # fmt: skip
    # Log-odds 0.6 / 0.5 + 0.3 - 1 = 0.5 and 0 - 1 + 0.25 = -0.75.
    wanted = (np.log1p(np.exp(-0.5)) + np.log1p(np.exp(-0.75))) / 2
    assert float(compute_rating_loss(compute_rating_logits(head, vectors, batch), batch).detach()) == pytest.approx(
        wanted, rel=1e-6
    )
    counted = Counted(np.array([0, 0, 0.1], np.float32), None)
    scores = head.scores(vectors.numpy(), np.array([[0, -1]]), counted)
    np.testing.assert_allclose(scores, [[1, -1, 0.5]], atol=1e-6)
    # What validation chose changes the scores and not the loss.
    rating_of(recipe()).apply_choice(head, {"slope": 2.0, "shift": 0.5})
    assert float(compute_rating_loss(compute_rating_logits(head, vectors, batch), batch).detach()) == pytest.approx(
        wanted, rel=1e-6
    )
    scores = 2 * scores + 0.5
    again = load_head(head.spec(), head.state_dict())
    assert isinstance(again, RatingHead)
    np.testing.assert_array_equal(again.scores(vectors.numpy(), np.array([[0, -1]]), counted), scores)
    with pytest.raises(StoreError, match="does not match"):
        load_head({**head.spec(), "dim": 3, "projection": "linear"}, head.state_dict())


@pytest.mark.parametrize("neighbours", [0, 20])
def test_it_learns_is_stored_and_says_the_same_again(neighbours: int, recipe: MakeRecipe, tmp_path: Path) -> None:
    epochs = 2 if neighbours else 12  # who took both tells the styles at once
    made = recipe(**{"training.epochs": epochs, "data.split": "user", "training.learning_rate": 2e-2,
                     "task": {"kind": "rating", "neighbours": neighbours}})  # fmt: skip
    result = run(made, tmp_path)
    table = result.table
    names = [row.name for row in table.rows]
    counting = ["popularity", "item-kNN", "user-kNN"]  # ALS where its package is there
    counting += ["popularity and item-kNN"] if neighbours else []
    assert [name for name in names if name != "ALS"] == [*counting, "frozen backbone", "tuned"]
    assert set(table.after.values) == {"ndcg@10", "auc", "log_loss", "ece"}
    # Styles are taken alike, so popularity knows nothing, and one item in six is of the user's style.
    assert table.after.values["auc"] > table.rows[0].values["auc"] + 0.2
    assert table.gain.interval[0] <= table.gain.value <= table.gain.interval[1]
    details: Any = table.details
    gains, losses, bins = details
    assert [row[0] for row in gains.rows] == names[:-1]
    for row, told in zip(table.rows, gains.rows, strict=False):
        assert told[1:4] == (row.values["auc"], table.after.values["auc"], told[2] - told[1])
        assert told[4] <= told[3] <= told[5]
    assert losses.rows[0][1] == pytest.approx(table.after.values["log_loss"])
    pairs = sum(float(row[2]) for row in bins.rows)
    ece = sum(float(row[2]) * abs(float(row[3]) - float(row[4])) for row in bins.rows) / pairs
    assert ece == pytest.approx(table.after.values["ece"])
    stored: Any = result.record.manifest.metrics["after"]
    assert stored["auc"] == table.after.values["auc"]
    # Out of the files again: the same answers.
    backbone = Backbone.of(made.backbone)
    live = AdapterBank(backbone, AdapterStore(made.store)).get("tiny")
    task = rating_of(made)
    vectors = backbone.encode(task.texts, live.attached)
    again = task.predict(live.head_as(RatingHead), lambda rows: vectors)
    assert task.table(again, again).after.values == pytest.approx(table.after.values, abs=1e-5)


def test_a_run_that_died_goes_on_to_the_same_end(recipe: MakeRecipe, tmp_path: Path) -> None:
    made = recipe(**{"task.pooling": "attention", "training.accumulation": 2})
    straight = run(made, tmp_path / "straight")
    with pytest.raises(SystemExit):
        tune(made, run_folder=tmp_path / "run", callback=StopAt(7))
    resumed = run(made, tmp_path, resume=True)
    assert resumed.losses == straight.losses
    for name in ("head.safetensors", "adapter_model.safetensors"):
        theirs, ours = load_file(straight.record.path / name), load_file(resumed.record.path / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("like_from", [None, 3])
def test_ratings_are_learned_as_they_stand(like_from: float | None, recipe: MakeRecipe, tmp_path: Path) -> None:
    task = {"kind": "rating", "feedback": "explicit", "like_from": like_from}
    made = recipe(**{"task": task, "training.epochs": 1})
    batch = rating_of(made).batch(0)
    assert len(batch.targets) == len(batch.histories)  # nothing is drawn
    assert float(batch.correction.abs().sum()) == 0
    assert set(batch.targets.tolist()) == ({0, 1} if like_from else {0, 0.25, 0.5, 0.75, 1})
    assert run(made, tmp_path).table.metric == "ndcg@10"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task.like_from": 3}, r"task\.like_from: implicit feedback has no ratings"),
        ({"task.scale": [5, 1]}, r"task\.scale: expected the lowest rating before the highest, found 5 and 1"),
        ({"training.early_stopping": {"metric": "mrr"}}, r"expected one of ndcg@10, auc for task\.kind rating"),
    ],
)
def test_what_does_not_suit_the_task_is_refused(changes: dict[str, Any], told: str, recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe(**changes)


def test_data_that_cannot_be_rated_is_refused(recipe: MakeRecipe, tiny_shop: Path, visits: Path) -> None:
    with pytest.raises(DataError, match="has no interactions"):
        build_task(recipe(**{"data.path": str(tiny_shop), "data.split": "user"}))
    with pytest.raises(DataError, match=r"split by user or time, found data\.split: bundle"):
        build_task(recipe(**{"data.split": "bundle"}))
    timeless = Interactions.build(["a"], users=[0, 0], items=[0, 1], times=[1, np.nan])
    with pytest.raises(DataError, match="1 of 2 have none"):
        Events.of(timeless, RatingTask())
    alone = Events.of(Interactions.build(["a"], users=[0], items=[0], times=[1]), RatingTask())
    with pytest.raises(DataError, match="Too few events to split by time"):
        split_events(alone, ("a",), recipe().data)


def test_the_shipped_recipe_runs(tiny_bert: Path, visits: Path, tmp_path: Path) -> None:
    own = [f"backbone.model={tiny_bert}", f"store={tmp_path / 'store'}", "backbone.max_length=16", "training.epochs=1"]
    assert run(load_recipe("rating-home", own, visits), tmp_path).table.metric == "ndcg@10"
    assert AdapterStore(tmp_path / "store").verify() == []


def test_users_fall_into_the_parts_that_their_bundles_fall_into(recipe: MakeRecipe) -> None:
    """The owner of a test bundle has no event that a rating adapter of the same split was trained on or chosen by."""
    data = recipe(**{"data.split": "user", "data.min_bundle_size": 2}).data
    task = rating_of(recipe(**{"data.split": "user", "task": {"kind": "rating", "neighbours": 9}}))
    dataset = open_dataset(data)
    parts = split_as(dataset, data)
    interactions = dataset.interactions
    assert interactions is not None
    for held, rows in ((parts.test, (task._parts.seen, task._parts.valid)), (parts.valid, (task._parts.seen,))):
        owners = {dataset.bundles.owners[row] for row in held}
        assert owners
        met = {interactions.user_ids[user] for user in task._events.users[np.concatenate(rows)]}
        assert not owners & met
    # What the head was trained beside, and what it is served beside, is one count.
    known = FitData.of(dataset, parts.train, parts.train_interactions, None, {})
    head = RatingHead(4, RatingTask(neighbours=9))
    rater = Rater.of(np.ones((len(task.texts), 4), np.float32), head, known.interactions)
    np.testing.assert_array_equal(rater.counted.log_popularity, task._counted.log_popularity)
    histories = task._events.histories(task._valid.events[:5], 5)
    np.testing.assert_array_equal(rater.counted.nearness(histories), task._counted.nearness(histories))


def test_an_adapter_of_another_split_is_refused(recipe: MakeRecipe, tmp_path: Path) -> None:
    def tuned(by: str) -> Any:
        made = recipe("head", **{"data.split": by, "training.epochs": 1, "category": by})
        return run(made, tmp_path / by).record.manifest

    def parts_of(by: str, seed: int = 0) -> Any:
        data = recipe(**{"data.split": by, "data.split_seed": seed}).data
        return split_as(dataset, data)

    dataset = open_dataset(recipe().data)
    user, time = tuned("user"), tuned("time")
    assert rating_problem(user, dataset, parts_of("user")) == ""
    for parts in (parts_of("user", 1), parts_of("time")):
        assert "it was tuned on users of another split" in rating_problem(user, dataset, parts)
    parts = parts_of("time")
    first, last = (float(dataset.bundles.times[rows].min()) for rows in (parts.valid, parts.test))

    def until(train: float, valid: float) -> str:
        stamp = time.data.model_copy(update={"until": {"train": train, "valid": valid}})
        return rating_problem(time.model_copy(update={"data": stamp}), dataset, parts)

    assert set((time.data.model_extra or {})["until"]) == {"train", "valid"}
    assert until(first - 1, last - 1) == ""
    assert "after the first of them" in until(first, last - 1)
    assert "after the first of them" in until(first - 1, last)
    assert "after the first of them" in rating_problem(time, dataset, parts_of("user"))


def test_a_completion_is_asked_of_the_past_and_of_what_lies_beside() -> None:
    interactions = Interactions.build(["a", "b"], [0, 0, 1], [3, 1, 2], times=[1, 2, 3])
    vectors = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    head = RatingHead(4, RatingTask(history=2)).eval()
    rater = Rater.of(vectors, head, interactions)
    none = np.zeros(3, np.int64)
    questions = Queries(np.array([[0, -1], [0, 4], [1, -1]]), none, np.array(["a", "stranger", "a"]), none)
    told = [FittedRating(rater, beside)(questions) for beside in (False, True)]
    expected = head.scores(vectors, np.array([[1, 3], [0, 1], [0, 4], [1, 3]]), rater.counted)
    np.testing.assert_array_equal(np.isnan(told[0]).all(axis=1), [False, True, False])
    np.testing.assert_allclose(told[0][[0, 2]], expected[[0, 0]], atol=1e-6)
    np.testing.assert_allclose(told[1], expected[1:], atol=1e-6)
    for nothing in (None, interactions.take(np.array([], np.int64))):
        with pytest.raises(DataError, match="there are none that may be seen"):
            Rater.of(vectors, head, nothing)
    with pytest.raises(DataError, match="need a timestamp"):
        Rater.of(vectors, head, Interactions.build(["a"], [0], [1]))


def test_ratings_need_neither_bundles_nor_baskets(recipe: MakeRecipe, visits: Path, tmp_path: Path) -> None:
    lines = (visits / "interactions.csv").read_text().splitlines()
    cells = [line.split(",") for line in lines]
    text = "\n".join(",".join([one[0], *one[2:]]) for one in cells).replace("quantity", "rating")
    (visits / "interactions.csv").write_text(text + "\n")
    made = recipe("head", **{"training.epochs": 1, "data.split": "user"})
    dataset = open_dataset(made.data, "interactions")
    assert len(dataset.bundles) == 0
    result = run(made, tmp_path)
    live = AdapterBank(Backbone.of(made.backbone), AdapterStore(made.store)).get("tiny")
    vectors = Backbone.of(made.backbone).encode(dataset.catalog.texts(), live.attached)
    rater = Rater.of(vectors, live.head_as(RatingHead), dataset.interactions)
    assert result.record.manifest.data.name == dataset.name
    # The best ten without what the user took; the same by id and by title, in the order asked.
    found = rate(rater, dataset, user="u3", k=10)
    assert [one.probability for one in found] == sorted((one.probability for one in found), reverse=True)
    assert dataset.interactions is not None
    taken = dataset.interactions.items[dataset.interactions.users == dataset.interactions.user_ids.index("u3")]
    assert not {one.item_id for one in found} & {dataset.catalog.item_ids[row] for row in taken}
    assert rate(rater, dataset, user="u3", items=[found[4].title.upper(), found[1].item_id]) == [found[4], found[1]]
    # A stranger who liked the same, latest first, is told the same.
    history = [dataset.catalog.item_ids[row] for row in rater.pasts(["u3"])[0] if row >= 0]
    again = rate(rater, dataset, liked=history, items=[one.item_id for one in found])
    assert [one.probability for one in again] == pytest.approx([one.probability for one in found], abs=1e-6)
    for ask, expected in (
        ({"user": "u77"}, 'No user "u77" among the 60'), ({}, "Nothing to go by"),
        ({"liked": ["i99"]}, 'No item with the id or title "i99"'),
    ):  # fmt: skip
        with pytest.raises(DataError, match=expected):
            rate(rater, dataset, **ask)
