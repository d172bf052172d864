"""Rating task: click-through prediction, how likely a user takes an item, as a score in [0, 1].

Owns the batches of events with their histories, the loss, what is measured and the baselines; wrong answers are drawn
by `negatives`. Sees items as rows and vectors; knows nothing of encoders or the training loop.

A user is the pooled vectors of the latest items they took, not one long text: a few thousand item texts serve all
users, so equal texts are encoded once and the cache of the frozen layers holds, where one text for every user and
moment would be encoded afresh at each step. A history is counted in whole items and never cut within a title.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor
from torch.nn import functional

from peft_combo import metrics
from peft_combo.data.augmentation.variants import find_brands
from peft_combo.data.events import Events, split_events
from peft_combo.data.sources import open_dataset
from peft_combo.data.task_data import needs_of
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.completion import project_targets
from peft_combo.encoder.heads.rating import RatingHead
from peft_combo.errors import DataError, PeftComboError
from peft_combo.metrics.classification import calibration_error
from peft_combo.metrics.probability import _BINS, auc, auc_draws, by_user, log_losses, platt, reliability
from peft_combo.metrics.report import Detail, Gain, ResultRow, ResultTable
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import RatingTask
from peft_combo.scoring.base import Scorer
from peft_combo.scoring.factors import ALS
from peft_combo.scoring.features import Counted, CrossFitted, baskets_of
from peft_combo.scoring.neighbours import ItemKNN, UserKNN
from peft_combo.tuning.tasks.base import Encode, Epochs, Evaluation
from peft_combo.tuning.tasks.negatives import Negatives

# Events that are asked about while training and for the table; each ranks the whole catalogue.
_QUERIES_WHILE_TRAINING, _QUERIES = 1000, 5000
_QUERY_BLOCK = 512
# The head over the frozen encoder is fitted until validation has seen no gain for so many epochs.
_PROBE_EPOCHS, _PROBE_PATIENCE = 10, 2
# Batches from which the few weights of the head are fitted before all else: thousands of pairs.
_BATCHES_FOR_WEIGHTS = 4
# Popularity and neighbours weighed against each other, as the head weighs them, but without any text.
_COUNTING = "popularity and item-kNN"

Logits: TypeAlias = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Turns (Q, S) histories into (Q, N) log-odds."""


@dataclass(frozen=True)
class RatingBatch:
    """Some events and what was drawn against them.

    Attributes:
        items: (M,) distinct catalogue rows.
        histories: (B, S) positions in `items`, -1 for none.
        events, candidates: (P,) which history is asked about the item at which position.
        targets: (P,) in [0, 1]. correction: (P,) see `Negatives.correction`. log_popularity: (P,).
        nearness: (P,) see `CrossFitted`; None where the head reads no neighbours.
    """

    items: NDArray[np.int64]
    histories: Tensor
    events: Tensor
    candidates: Tensor
    targets: Tensor
    correction: Tensor
    log_popularity: Tensor
    nearness: Tensor | None


def compute_rating_logits(head: RatingHead, vectors: Tensor, batch: RatingBatch) -> Tensor:
    """Return (P,) log-odds of the pairs of a batch; `vectors` are the (M, D) ones of ``batch.items``."""
    device = vectors.device
    users = head.towers.query(vectors, batch.histories.to(device))[batch.events.to(device)]  # (P, D)
    items = head.towers.target(vectors)[batch.candidates.to(device)]  # (P, D)
    nearness = None if batch.nearness is None else batch.nearness.to(device)
    return head.logits((users * items).sum(1).float(), batch.log_popularity.to(device), nearness)


def compute_rating_loss(logits: Tensor, batch: RatingBatch) -> Tensor:
    """Binary cross-entropy over (P,) log-odds, a scalar; what was drawn by popularity is corrected for."""
    corrected = logits + batch.correction.to(logits.device)
    return functional.binary_cross_entropy_with_logits(corrected, batch.targets.to(logits.device))


@dataclass(frozen=True, eq=False)
class RatingQueries:
    """Held-out events and the pairs that are judged.

    Attributes:
        histories: (Q, S). users, items: (Q,). liked: (Q,) whether the event's item is a target.
        events, candidates, targets: (P,) see `RatingBatch`, the candidates as catalogue rows.
        excluded: for each liked event, what is no candidate of its ranking.
    """

    histories: NDArray[np.int64]
    users: NDArray[np.int64]
    items: NDArray[np.int64]
    liked: NDArray[np.bool_]
    events: NDArray[np.int64]
    candidates: NDArray[np.int64]
    targets: NDArray[np.float32]
    excluded: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class RatingPredictions:
    """What a model says: (L,) ranks of the liked items, from 1, and (P,) log-odds of the pairs."""

    ranks: NDArray[np.float64]
    logits: NDArray[np.float64]


class ItemRating:
    """The rating task as the loop sees it; see `base.Task`.

    Tuning starts from the head that is best over the frozen encoder, as the classification task does and for the same
    reason. With implicit feedback the score is the chance that an item is the one taken rather than one drawn evenly
    from those the user did not take; whatever is drawn in training is corrected for.
    """

    per_token = False
    retokenized = False
    exclusive = False
    unit = "events"

    def __init__(self, recipe: Recipe, config: RatingTask) -> None:
        self._config = config
        self._recipe = recipe
        dataset = open_dataset(recipe.data, needs_of(config))
        assert dataset.interactions is not None  # they were needed
        self._events = events = Events.of(dataset.interactions, config)
        self._parts = parts = split_events(events, dataset.interactions.user_ids, recipe.data)
        self._user_ids = np.array(dataset.interactions.user_ids)
        self.texts = dataset.texts
        self.brands = find_brands(dataset.catalog)
        self._shape = (len(self._user_ids), len(self.texts))
        self.notes = [f"{dataset.name}: {note}" for note in dataset.notes]
        self.notes.append(
            f"{len(events):,} events (each user and item once) of {len(dataset.interactions):,} interactions"
        )
        self._train = _sample_rows(parts.train, config.max_events, recipe.seed)
        counts = np.bincount(events.items[parts.seen], minlength=len(self.texts))
        self._liked = events.build_liked(parts.seen, self._shape)
        self._counted = Counted.of_events(events, parts.seen, self._shape, config.neighbours)
        self._apart = CrossFitted(self._liked, config.neighbours, recipe.seed) if config.neighbours else None
        self._everyones = events.matrix(np.arange(len(events)), self._shape)
        self._negatives = Negatives(events.matrix(parts.seen, self._shape), counts, config.popularity_power)
        self._epochs = Epochs(len(self._train), recipe.training.batch_size, recipe.seed)
        self._valid, self._test = (
            self._build_queries(_sample_rows(rows, most, recipe.seed))
            for rows, most in ((parts.valid, _QUERIES_WHILE_TRAINING), (parts.test, _QUERIES))
        )
        if not self._valid.liked.any() or not self._test.liked.any():
            raise DataError("No held-out event is a liked one, so nothing can be ranked. Lower task.like_from.")
        self.examples = {"train": len(self._train), "valid": len(parts.valid), "test": len(parts.test)}
        self.data = {
            "name": dataset.name,
            "digest": dataset.digest,
            "split_digest": parts.digest,
            "items": len(self.texts),
            "events": self.examples,
            # The latest moments that were learned from and chosen by; what came after them was not.
            "until": {"train": float(events.times[parts.seen].max()), "valid": float(events.times[parts.valid].max())},
        }

    @property
    def protocol(self) -> str:
        pairs = "one evenly drawn item the user never took beside each" if self._config.implicit else "as rated"
        return (
            f"Test events, split by {self._recipe.data.split}, each with the user's earlier ones as the question. AUC, "
            f"log-loss and ECE (15 bins) over pairs ({pairs}). NDCG@10: each liked item among the full catalogue "
            "without the user's other items, ties at mid-rank, first averaged by user; 95 % interval by bootstrap over "
            "users, p by sign flips of users. Step, frozen head, the settings of rows that only count and the "
            "calibration of every row (Platt scaling) were chosen on validation."
        )

    @property
    def per_epoch(self) -> int:
        return self._epochs.per_epoch

    def head(self, backbone: Backbone, max_length: int) -> RatingHead:
        return RatingHead(backbone.dim, self._config)

    def start(self, head: RatingHead, frozen: Encode) -> None:
        training, vectors = self._recipe.training, frozen(None)
        parameters = [p for p in head.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=training.head_learning_rate or training.learning_rate, weight_decay=training.weight_decay
        )

        metric = self._recipe.metric
        self._fit_weights(head, vectors)

        def now() -> Evaluation:
            return self.evaluate(head, lambda rows: vectors, metric)

        best, best_state, waited = now(), copy.deepcopy(head.state_dict()), 0
        for epoch in range(_PROBE_EPOCHS):
            for step in range(epoch * self.per_epoch, (epoch + 1) * self.per_epoch):
                loss = self._frozen_loss(head, vectors, self.batch(step))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            if (found := now()).values[metric] > best.values[metric]:
                best, best_state, waited = found, copy.deepcopy(head.state_dict()), 0
            else:
                waited += 1
            if waited == _PROBE_PATIENCE:
                break
        optimizer.zero_grad()
        head.load_state_dict(best_state)
        self.apply_choice(head, best.choice)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> RatingBatch:
        events, rows = self._events, self._train[self._epochs.share(step, part, parts)]
        rng = np.random.default_rng([self._recipe.seed, step, part])
        which, candidates, targets = self._pairs(rows, self._negatives, rng, self._config.negatives)
        users = events.users[rows][which]
        correction = (
            self._negatives.correction(users, candidates, self._config.negatives)
            if self._config.implicit
            else np.zeros(len(candidates), np.float32)
        )
        histories = events.histories(rows, self._config.history)
        items = np.unique(np.concatenate([histories[histories >= 0], candidates]))
        places = np.where(histories >= 0, np.searchsorted(items, histories), -1)
        return RatingBatch(
            items, torch.from_numpy(places), torch.from_numpy(which),
            torch.from_numpy(np.searchsorted(items, candidates)), torch.from_numpy(targets),
            torch.from_numpy(correction), torch.from_numpy(self._counted.log_popularity[candidates]),
            None if self._apart is None
            else torch.from_numpy(self._apart.nearness(events.users[rows], histories, which, candidates)),
        )  # fmt: skip

    def logits(self, head: RatingHead, encoded: Tensor, batch: RatingBatch) -> Tensor:
        return compute_rating_logits(head, encoded, batch)

    def loss(self, logits: Tensor, batch: RatingBatch) -> Tensor:
        return compute_rating_loss(logits, batch)

    def evaluate(self, head: RatingHead, encode: Encode, metric: str) -> Evaluation:
        raw = copy.deepcopy(head)
        self.apply_choice(raw, {})
        predictions = self._predict(self._valid, self._build_scorer(raw, encode(None)))
        slope, shift = platt(predictions.logits, self._valid.targets)
        found = self._values(self._valid, predictions)
        # A slope that turns the order round would belie the ranking, so such a head stays as it is.
        choice = {"slope": slope, "shift": shift} if slope > 0 else {}
        return Evaluation({name: found[name] for name in self._config.metrics}, choice)

    def apply_choice(self, head: RatingHead, choice: Mapping[str, float]) -> None:
        head.slope.fill_(choice.get("slope", 1.0))
        head.shift.fill_(choice.get("shift", 0.0))

    def predict(self, head: RatingHead, encode: Encode) -> RatingPredictions:
        return self._predict(self._test, self._build_scorer(head, encode(None)))

    def table(self, before: RatingPredictions, after: RatingPredictions) -> ResultTable:
        queries = self._test
        baselines = self._baselines()
        predictions = {**baselines, "frozen backbone": before, "tuned": after}
        users = queries.users[queries.liked]
        ndcg = {name: by_user(metrics.per_query(one.ranks, "ndcg@10"), users) for name, one in predictions.items()}
        people = np.arange(len(np.unique(users)))
        rows = tuple(
            ResultRow(name, self._values(queries, one), metrics.bootstrap_interval(ndcg[name], people))
            for name, one in predictions.items()
        )
        old, new = ndcg["frozen backbone"], ndcg["tuned"]
        gain = Gain.between(old, new, people)
        losses = [log_losses(one.logits, queries.targets) for one in (before, after)]
        users_of_pairs = queries.users[queries.events]
        low, high = metrics.bootstrap_interval(losses[1] - losses[0], users_of_pairs)
        p = metrics.paired_permutation(losses[1], losses[0], users_of_pairs)
        drop = (float(losses[0].mean()), float(losses[1].mean()), float((losses[1] - losses[0]).mean()), low, high, p)
        return ResultTable(
            "ndcg@10", rows, gain, len(queries.items), len(people),
            asked=f"{len(queries.items):,} held-out test events, {len(queries.targets):,} pairs judged and "
            f"{int(queries.liked.sum()):,} liked items ranked among all {len(self.texts):,}",
            caveat="Candidates are the full catalogue; every user weighs the same in NDCG@10. Step and frozen head "
            f"were chosen on {len(self._valid.items):,} validation events, and no test event was trained on.",
            details=(
                Detail(
                    "AUC of the tuned row less that of another",
                    ("row", "its AUC", "tuned", "difference", "low", "high"),
                    self._auc_gains(predictions),
                ),
                Detail("Log-loss, lower is better", ("before", "tuned", "difference", "low", "high", "p"), (drop,)),
                Detail(
                    "How far the tuned score can be taken at its word",
                    ("score from", "to", "pairs", "mean score", "share taken"),
                    reliability(expit(after.logits), queries.targets),
                ),
            ),
        )  # fmt: skip

    def _frozen_loss(self, head: RatingHead, vectors: NDArray[np.float32], batch: RatingBatch) -> Tensor:
        encoded = torch.from_numpy(vectors[batch.items]).to(head.constant.device)
        return compute_rating_loss(compute_rating_logits(head, encoded, batch), batch)

    def _fit_weights(self, head: RatingHead, vectors: NDArray[np.float32]) -> None:
        """Weigh text against counts: a few numbers, which steps made for thousands would hardly move."""
        optimizer = torch.optim.LBFGS(head.weights, line_search_fn="strong_wolfe")
        batches = self._first_batches()

        def closure() -> float:
            head.zero_grad()
            total = 0.0
            for batch in batches:
                loss = self._frozen_loss(head, vectors, batch) / len(batches)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            return total

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        head.zero_grad()

    def _first_batches(self) -> list[RatingBatch]:
        return [self.batch(step) for step in range(min(self.per_epoch, _BATCHES_FOR_WEIGHTS))]

    def _baselines(self) -> dict[str, RatingPredictions]:
        """Answer as counting alone does; of a scorer with several settings, in the one that is best on validation."""
        metric, n_items = self._recipe.metric, self._shape[1]

        def popularity(histories: NDArray[np.int64]) -> NDArray[np.float32]:
            return np.repeat(self._counted.log_popularity[None], len(histories), axis=0)

        def score_with(scorer: Scorer) -> Logits:
            return lambda histories: np.nan_to_num(scorer.score_baskets(baskets_of(histories, n_items)), nan=0.0)

        settings: dict[str, tuple[Scorer, ...]] = {
            "item-kNN": (ItemKNN(), ItemKNN(similarity="tfidf"), ItemKNN(k=1000, similarity="tfidf")),
            "user-kNN": (UserKNN(), UserKNN(k=300)),
            "ALS": (ALS(seed=self._recipe.seed),),
        }
        predictions = {"popularity": self._calibrate(popularity)}
        for name, scorers in settings.items():
            try:
                models = [score_with(scorer.fit(self._liked)) for scorer in scorers]
            except PeftComboError:  # ALS without its package
                continue
            valid = [self._values(self._valid, self._predict(self._valid, model))[metric] for model in models]
            predictions[name] = self._calibrate(models[int(np.argmax(valid))])
        if self._apart is not None:
            predictions[_COUNTING] = self._calibrate(self._fit_counting())
        return predictions

    def _fit_counting(self) -> Logits:
        """Weigh popularity and neighbours on training pairs as the head does: all it has but the texts."""
        batches = self._first_batches()
        nearness = torch.cat([batch.nearness for batch in batches if batch.nearness is not None])
        popularity, correction, targets = (
            torch.cat([getattr(batch, name) for batch in batches])
            for name in ("log_popularity", "correction", "targets")
        )
        weights = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = weights[0] * popularity + weights[1] * nearness + weights[2]
            loss = functional.binary_cross_entropy_with_logits(logits + correction, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        first, second, constant = weights.detach().tolist()

        def model(histories: NDArray[np.int64]) -> NDArray[np.float32]:
            near = self._counted.nearness(histories)
            assert near is not None
            return np.asarray(first * self._counted.log_popularity + second * near + constant, np.float32)

        return model

    def _auc_gains(self, predictions: Mapping[str, RatingPredictions]) -> tuple[tuple[str | float, ...], ...]:
        queries = self._test
        right, users = queries.targets >= 0.5, queries.users[queries.events]
        drawn = {name: auc_draws(one.logits, right, users) for name, one in predictions.items()}
        whole = {name: auc(one.logits, right) for name, one in predictions.items()}
        rows = []
        for name in (name for name in predictions if name != "tuned"):
            low, high = np.quantile(drawn["tuned"] - drawn[name], [0.025, 0.975])
            gain = whole["tuned"] - whole[name]
            rows.append((name, whole[name], whole["tuned"], gain, float(low), float(high)))
        return tuple(rows)

    def _pairs(
        self, rows: NDArray[np.int64], negatives: Negatives, rng: np.random.Generator, each: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Return for some events which of them, which item, which target: themselves, then what was drawn."""
        which, own, targets = np.arange(len(rows)), self._events.items[rows], self._events.targets[rows]
        if not self._config.implicit:
            return which, own, targets
        drawn = np.repeat(which, each)
        items = negatives.draw(self._events.users[rows][drawn], rng)
        return (
            np.concatenate([which, drawn]), np.concatenate([own, items]),
            np.concatenate([targets, np.zeros(len(drawn), np.float32)]),
        )  # fmt: skip

    def _build_queries(self, rows: NDArray[np.int64]) -> RatingQueries:
        events, everyones = self._events, self._everyones
        # Nothing of this is trained on, so what a user takes later may be known here: it is no wrong answer.
        evenly = Negatives(everyones, np.zeros(self._shape[1], np.int64), 0.0) if self._config.implicit else None
        rng = np.random.default_rng([self._recipe.seed, len(rows)])
        which, candidates, targets = self._pairs(rows, evenly or self._negatives, rng, 1)
        liked = events.targets[rows] >= 0.5
        excluded = []
        for row in rows[liked]:
            user = events.users[row]
            own = everyones.indices[everyones.indptr[user] : everyones.indptr[user + 1]].astype(np.int64)
            excluded.append(own[own != events.items[row]])
        return RatingQueries(
            events.histories(rows, self._config.history), events.users[rows], events.items[rows], liked, which,
            candidates, targets, tuple(excluded),
        )  # fmt: skip

    def _build_scorer(self, head: RatingHead, vectors: NDArray[np.float32]) -> Logits:
        targets = project_targets(head.towers, vectors)
        return lambda histories: head.scores(vectors, histories, self._counted, targets)

    def _predict(self, queries: RatingQueries, model: Logits) -> RatingPredictions:
        place = np.cumsum(queries.liked) - 1
        ranks, logits = np.empty(int(queries.liked.sum())), np.empty(len(queries.events))
        for start in range(0, len(queries.items), _QUERY_BLOCK):
            stop = min(start + _QUERY_BLOCK, len(queries.items))
            scores = model(queries.histories[start:stop])
            pairs = np.flatnonzero((queries.events >= start) & (queries.events < stop))
            logits[pairs] = scores[queries.events[pairs] - start, queries.candidates[pairs]]
            liked = np.flatnonzero(queries.liked[start:stop])
            own = place[start:stop][liked]
            excluded = [queries.excluded[one] for one in own]
            ranks[own] = metrics.midranks(scores[liked], queries.items[start:stop][liked], excluded)
        return RatingPredictions(ranks, logits)

    def _calibrate(self, model: Logits) -> RatingPredictions:
        """Answer as a model without probabilities does after Platt scaling on the validation pairs."""
        slope, constant = platt(self._predict(self._valid, model).logits, self._valid.targets)
        found = self._predict(self._test, model)
        return RatingPredictions(found.ranks, slope * found.logits + constant)

    def _values(self, queries: RatingQueries, predictions: RatingPredictions) -> dict[str, float]:
        return {
            "ndcg@10": float(
                by_user(metrics.per_query(predictions.ranks, "ndcg@10"), queries.users[queries.liked]).mean()
            ),
            "auc": auc(predictions.logits, queries.targets >= 0.5),
            "log_loss": float(log_losses(predictions.logits, queries.targets).mean()),
            "ece": calibration_error(expit(predictions.logits), queries.targets, _BINS),  # type: ignore[arg-type]
        }


def _sample_rows(rows: NDArray[np.int64], most: int | None, seed: int) -> NDArray[np.int64]:
    if most is None or len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
