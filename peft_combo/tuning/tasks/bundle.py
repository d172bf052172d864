"""Bundle completion task: which items belong with the rest of a bundle.

Owns the head (set encoder, query and target projections), the batches, the loss and how completion is measured. Sees
items as rows and vectors; knows nothing of encoders or the training loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from peft_combo import metrics
from peft_combo.data.augmentation.variants import find_brands
from peft_combo.data.model import Dataset
from peft_combo.data.pictures import Picture
from peft_combo.data.pseudo_bundles import Mined, mine
from peft_combo.data.queries import Queries, pad_contexts
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import Split, split_as
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.base import HEAD_FILE as HEAD_FILE
from peft_combo.encoder.heads.completion import (
    BundleHead,
    CompletionHead,
    build_completion_row,
    rank_targets,
    step_scale,
)
from peft_combo.encoder.heads.picture_adapter import PictureAdapter
from peft_combo.encoder.heads.pictures import PictureView
from peft_combo.errors import DataError
from peft_combo.metrics.report import Gain, PerQuestion, ResultTable
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import BundleTask, CompletionTask
from peft_combo.scoring.base import Scorer
from peft_combo.scoring.neighbours import ItemKNN
from peft_combo.scoring.popularity import Popularity
from peft_combo.scoring.text import TextCosine, tfidf_vectors
from peft_combo.tuning.tasks.base import Encode, Epochs, Evaluation

# Logits of pairs that are no candidates: far below every real one, yet finite in float16.
_NEVER = -1e4
_SCORE_BLOCK = 256
# Queries asked while training; the table at the end asks all. At 2,000 the error of NDCG@10 is near 0.01.
_QUERIES_WHILE_TRAINING = 2000


@dataclass(frozen=True)
class BundleBatch:
    """Leave-one-out queries over the distinct items of some bundles.

    Attributes:
        items: (M,) distinct catalogue rows, ascending; first those of the bundles, then extra negatives.
        contexts: (Q, S) positions in `items`, -1 for none.
        targets: (Q,) position of the target.
        barred: (Q, M) True where an item is neither the target nor a fair negative.
        weights: (Q,) float32, what each query counts in the mean over the batch.
    """

    items: NDArray[np.int64]
    contexts: Tensor
    targets: Tensor
    barred: Tensor
    weights: Tensor


@dataclass(frozen=True)
class CompletionQuery:
    """What comes next? The context and the target are of one bundle.

    Attributes:
        context: rows, may be none. target: row. bundle: all rows of the bundle.
    """

    context: NDArray[np.int64]
    target: int
    bundle: NDArray[np.int64]


class Candidates:
    """Which bundles and items a batch is made of, and which of these are no fair negatives.

    All of it is a function of seed and place alone, so a run can go on anywhere.

    Args:
        bundles: training bundles, each an array of distinct catalogue rows.
        duplicates: (N,) equal numbers for items that are copies of each other; they are never each other's negatives.
        leaves: (N,) number of the category leaf of each item, for hard negatives.
    """

    def __init__(
        self,
        bundles: Sequence[NDArray[np.int32]],
        duplicates: NDArray[np.int64],
        leaves: NDArray[np.int64],
        config: CompletionTask,
        batch_size: int,
        seed: int,
    ) -> None:
        self.bundles = [np.sort(rows).astype(np.int64) for rows in bundles]
        self._epochs = Epochs(len(bundles), batch_size, seed)
        self._seed = seed
        self._duplicates = duplicates
        self._config = config
        n_items = len(duplicates)
        membership = sparse.csr_array(
            (
                np.ones(sum(map(len, self.bundles)), np.int8),
                np.concatenate(self.bundles),
                np.cumsum([0, *map(len, self.bundles)]),
            ),
            shape=(len(self.bundles), n_items),
        )
        self._bundles_of = membership.T.tocsr()  # (N, B)
        self._leaves = leaves
        order = np.argsort(leaves, kind="stable")
        self._by_leaf = np.split(order, np.flatnonzero(np.diff(leaves[order])) + 1) if n_items else []
        self._leaf_place = {int(leaves[rows[0]]): place for place, rows in enumerate(self._by_leaf)}

    @property
    def per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return self._epochs.per_epoch

    def share(self, step: int, part: int = 0, parts: int = 1) -> tuple[list[NDArray[np.int64]], np.random.Generator]:
        """Return the bundles of a step or of one of its parts, see `Epochs.share`, and what draws for them."""
        rng = np.random.default_rng([self._seed, *divmod(step, self.per_epoch), part])
        return [self.bundles[row] for row in self.rows(step, part, parts)], rng

    def rows(self, step: int, part: int = 0, parts: int = 1) -> NDArray[np.int64]:
        """Return which of `bundles` a step or one of its parts has."""
        return self._epochs.share(step, part, parts)

    def offer_items(self, bundles: Sequence[NDArray[np.int64]], rng: np.random.Generator) -> NDArray[np.int64]:
        """Return (M,) distinct rows: those of some bundles, ascending, then extra negatives."""
        own = np.unique(np.concatenate(bundles))
        return np.concatenate([own, self._extra(own, rng)])

    def find_barred(self, items: NDArray[np.int64], queries: Sequence[CompletionQuery]) -> NDArray[np.bool_]:
        """Return (Q, M), True where an item offered is neither the target nor a fair negative."""
        position = {int(row): place for place, row in enumerate(items)}
        mask = np.zeros((len(queries), len(items)), bool)
        for barred, query in zip(mask, queries, strict=True):
            # Everything that some training bundle holds together with this whole context is right as well.
            right = {*query.bundle.tolist(), *self._completions(query.context)} - {query.target}
            barred[[position[row] for row in right if row in position]] = True
        if self._config.mask_duplicates:
            copies = self._duplicates[items]
            own_targets = np.array([query.target for query in queries])
            mask |= (self._duplicates[own_targets][:, None] == copies) & (items != own_targets[:, None])
        return mask

    def _completions(self, context: NDArray[np.int64]) -> set[int]:
        shared: set[int] | None = None
        for row in context:
            start, stop = self._bundles_of.indptr[row], self._bundles_of.indptr[row + 1]
            holders = set(self._bundles_of.indices[start:stop].tolist())
            shared = holders if shared is None else shared & holders
        return {int(item) for bundle in shared or () for item in self.bundles[bundle]}

    def _extra(self, own: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw further negatives: from the leaves of the batch's items (hard), or from anywhere."""
        wanted = self._config.extra_negatives
        if not wanted:
            return np.empty(0, np.int64)
        match self._config.negatives:
            case "leaf":
                homes = rng.choice(self._leaves[own], size=4 * wanted)
                pools = [self._by_leaf[self._leaf_place[int(leaf)]] for leaf in homes]
                drawn = np.array([pool[int(rng.integers(len(pool)))] for pool in pools])
            case "random":
                drawn = rng.integers(len(self._duplicates), size=4 * wanted)
            case _:
                assert_never(self._config.negatives)
        fresh = drawn[~np.isin(drawn, own)]
        _, first = np.unique(fresh, return_index=True)
        return np.sort(fresh[np.sort(first)][:wanted]).astype(np.int64)


class BundleBatches:
    """Makes the batches of the bundle task; see `Candidates`.

    Args:
        pseudo: sets that stand for bundles, and how sure each is; see `data.pseudo_bundles`.
    """

    def __init__(
        self,
        bundles: Sequence[NDArray[np.int32]],
        duplicates: NDArray[np.int64],
        leaves: NDArray[np.int64],
        config: BundleTask,
        batch_size: int,
        seed: int,
        pseudo: Mined | None = None,
    ) -> None:
        sets = [*bundles, *(pseudo.items if pseudo is not None else ())]
        self._candidates = Candidates(sets, duplicates, leaves, config, batch_size, seed)
        self._config = config
        # A query weighs what its bundle does times what its target does.
        self._of_bundle = np.ones(len(sets), np.float32)
        if pseudo is not None and config.pseudo_bundles is not None:
            self._of_bundle[len(bundles) :] = config.pseudo_bundles.weight * pseudo.confidences
        counts = np.bincount(np.concatenate(bundles), minlength=len(duplicates))
        self._of_target = compute_inverse_propensities(counts, config.propensity_power, config.propensity_floor)

    @property
    def per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return self._candidates.per_epoch

    def batch(self, step: int, part: int = 0, parts: int = 1) -> BundleBatch:
        """Return the batch of optimizer step `step`, counted from 0 over all epochs, or one of its `parts`."""
        bundles, rng = self._candidates.share(step, part, parts)
        items = self._candidates.offer_items(bundles, rng)
        queries = [
            CompletionQuery(np.delete(rows, index), int(target), rows)
            for rows in bundles
            for index, target in enumerate(rows)
        ]
        contexts = [self._thin_context(query.context, rng) for query in queries]
        position = {int(row): place for place, row in enumerate(items)}
        places = pad_contexts([np.array([position[int(row)] for row in context]) for context in contexts])
        targets = np.array([position[query.target] for query in queries])
        barred = self._candidates.find_barred(items, queries)
        of_bundle = np.repeat(self._of_bundle[self._candidates.rows(step, part, parts)], list(map(len, bundles)))
        weights = of_bundle * self._of_target[items[targets]]
        return BundleBatch(items, *map(torch.from_numpy, (places, targets, barred, weights)))

    def _thin_context(self, context: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        if not (rate := self._config.context_dropout):
            return context
        kept = context[rng.random(len(context)) >= rate]
        return kept if len(kept) else context[[rng.integers(len(context))]]


def compute_inverse_propensities(counts: NDArray[np.int64], power: float, floor: float) -> NDArray[np.float32]:
    """Return what a target weighs so that popular items do not speak for all: one over its propensity.

    An item was seen in a bundle because it fits and because it was seen at all; the chance of the latter is taken to
    grow with its popularity, as ((count + 1) / (highest count + 1)) to a power.

    Args:
        counts: (N,) training bundles that hold each item.
        power: 0 weighs all alike.
        floor: no propensity is taken to be lower, so that no weight is above 1 / floor.
    Returns:
        (N,) float32, 1 for the most popular item.
    Source: Schnabel et al. 2016, "Recommendations as treatments", with weights normalised as in its SNIPS estimator;
        the propensity of implicit feedback and its floor as in Saito et al. 2020, "Unbiased recommender learning from
        missing-not-at-random implicit feedback".
    """
    propensities = ((counts + 1) / (counts.max(initial=0) + 1)) ** power
    return np.asarray(1 / np.maximum(propensities, floor), np.float32)


def compute_bundle_logits(head: BundleHead, vectors: Tensor, batch: BundleBatch) -> Tensor:
    """Score the candidates of a batch for each of its queries.

    Args:
        vectors: (M, D) vectors of ``batch.items``.
    Returns:
        (Q, M) float32, far below all others where an item is no candidate.
    """
    return compute_candidate_logits(head, head.query(vectors, batch.contexts.to(vectors.device)), vectors, batch.barred)


def compute_candidate_logits(head: CompletionHead, queries: Tensor, vectors: Tensor, barred: Tensor) -> Tensor:
    """Score (M, D) items for (Q, D) queries: (Q, M) float32, far below all others where an item is barred, (Q, M)."""
    logits = queries @ head.target(vectors).T * step_scale(head)  # (Q, D) @ (D, M) -> (Q, M)
    return logits.float().masked_fill(barred.to(vectors.device), _NEVER)


def compute_bundle_loss(logits: Tensor, batch: BundleBatch, smoothing: float = 0.0) -> Tensor:
    """Softmax cross-entropy of the left-out item against all fair candidates of the batch.

    Args:
        logits: (Q, M) of `compute_bundle_logits`.
        smoothing: this share of each target is spread evenly over the query's fair candidates, the target among
            them; nothing goes to what is barred.
    Returns:
        scalar, weighted mean over the queries.
    Source: InfoNCE, van den Oord et al. 2018, eq. 4; several positives by leaving the others out of the denominator,
        as in Khosla et al. 2020, eq. 2; smoothing as in Szegedy et al. 2016, section 7.
    """
    targets, weights = batch.targets.to(logits.device), batch.weights.to(logits.device)
    losses = functional.cross_entropy(logits, targets, reduction="none")  # (Q,)
    if smoothing:
        barred = batch.barred.to(logits.device)
        even = -logits.log_softmax(1).masked_fill(barred, 0.0).sum(1) / (~barred).sum(1)  # (Q,)
        losses = (1 - smoothing) * losses + smoothing * even
    return (weights * losses).sum() / weights.sum()


CompletionHeadT = TypeVar("CompletionHeadT", bound=CompletionHead)


class Completion(Generic[CompletionHeadT]):
    """What all tasks share, as the loop sees them (`base.Task`), that complete bundles: the data and the queries.

    The untrained head scores like cosine, so there is nothing to start it with, and the prediction of a query is the
    rank of its target. What validation chooses is how far the head goes from there (`CompletionHead.interpolated`).
    """

    per_token = False
    retokenized = False
    exclusive = True
    unit = "bundles"
    protocol = (
        "Validation bundles of held-out groups; every item of every bundle once the answer, ranked among the whole "
        "catalogue without the rest of its bundle, ties at mid-rank; 95 % interval by bootstrap over groups. The step "
        "was chosen on these bundles, so the tuned row is slightly flattered; the test bundles were not looked at."
    )

    def __init__(self, recipe: Recipe, config: CompletionTask, read: tuple[Dataset, Split] | None = None) -> None:
        self._strengths = config.strengths
        if read is None:
            found = open_dataset(recipe.data)
            read = found, split_as(found, recipe.data)
        self._dataset, self._parts = dataset, parts = read
        self.notes = [f"{dataset.name}: {note}" for note in dataset.notes]
        self.texts = dataset.texts
        self.brands = find_brands(dataset.catalog)
        self.examples = {"train": len(parts.train), "valid": len(parts.valid), "test": len(parts.test)}
        self.data = {
            "name": dataset.name,
            "digest": dataset.digest,
            "split_digest": parts.digest,
            "items": len(dataset.catalog),
            "bundles": self.examples,
        }
        self.pictures = _find_pictures(dataset, recipe)
        told: Sequence[str] = self.texts
        if self.pictures:  # items of one text are told apart by what they look like
            shown = ["" if picture is None else picture.key for picture in self.pictures]
            told = [f"{text}\n{key}" for text, key in zip(self.texts, shown, strict=True)]
        _, self._duplicates = np.unique(np.array(told), return_inverse=True)
        leaf_names = [dataset.catalog.leaf(row) or "" for row in range(len(self.texts))]
        _, self._leaves = np.unique(np.array(leaf_names), return_inverse=True)
        self._bundles = [dataset.bundles.items[row] for row in parts.train]
        self._queries = Queries.of(dataset.bundles, parts.valid)
        self._sampled_queries = self._queries.sample(_QUERIES_WHILE_TRAINING, recipe.seed)

    def start(self, head: CompletionHeadT, frozen: Encode) -> None:
        pass

    def evaluate(self, head: CompletionHeadT, encode: Encode, metric: str) -> Evaluation:
        vectors = encode(None)
        tried = {
            share: metrics.ranking_metrics(rank_targets(head.interpolate(share), vectors, self._sampled_queries))
            for share in (self._strengths if head.step_weights() else (1.0,))
        }
        strength = max(tried, key=lambda share: tried[share][metric])
        return Evaluation(tried[strength], {"strength": strength})

    def apply_choice(self, head: CompletionHeadT, choice: Mapping[str, float]) -> None:
        head.load_state_dict(head.interpolate(choice["strength"]).state_dict())

    def predict(self, head: CompletionHeadT, encode: Encode) -> NDArray[np.float64]:
        return rank_targets(head, encode(None), self._queries)

    def table(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> ResultTable:
        queries, clusters = self._queries, self._queries.groups
        history = self._dataset.bundles.to_csr(len(self.texts), self._parts.train)
        ranks = {
            "popularity": self._scorer_ranks(Popularity().fit(history)),
            "item-kNN": self._scorer_ranks(ItemKNN().fit(history)),
            "TF-IDF title": self._scorer_ranks(TextCosine().fit(history, items=tfidf_vectors(self._dataset.words))),
            "frozen backbone": before,
            "tuned": after,
        }
        rows = tuple(build_completion_row(name, values, clusters) for name, values in ranks.items())
        old, new = metrics.per_query(before, "ndcg@10"), metrics.per_query(after, "ndcg@10")
        gain = Gain.between(old, new, clusters)
        groups = len(set(clusters.tolist()))
        return ResultTable(
            "ndcg@10", rows, gain, len(queries), groups,
            asked=f"completing {self.examples['valid']} held-out validation bundles ({len(queries)} questions of "
            f"{groups} groups), each answer ranked among all {len(self.texts):,} items",
            caveat="The step was chosen on these bundles, so the tuned row is slightly flattered; "
            f"{self.examples['test']} test bundles were not looked at.",
            per_question=PerQuestion(clusters, old, new),
        )  # fmt: skip

    def _scorer_ranks(self, scorer: Scorer) -> NDArray[np.float64]:
        queries = self._queries
        contexts, excluded = queries.to_csr(len(self.texts)), queries.excluded()
        ranks = []
        for start in range(0, len(queries), _SCORE_BLOCK):
            block = slice(start, start + _SCORE_BLOCK)
            scores = scorer.score_baskets(contexts[block])
            ranks.append(metrics.midranks(scores, queries.targets[block], excluded[block]))
        return np.concatenate(ranks)


def _find_pictures(dataset: Dataset, recipe: Recipe) -> tuple[Picture | None, ...]:
    """Return the pictures of items where the recipe reads them.

    Raises:
        DataError: it does, and no item has one.
    """
    if recipe.backbone.image_model is None:
        return ()
    if not dataset.catalog.pictures:
        raise DataError(
            f"backbone.image_model is set, and no item of {dataset.name} has a picture. Give items an image column (a "
            "path in the data folder), or take --set backbone.image_model=null"
        )
    return dataset.catalog.pictures


class BundleCompletion(Completion[BundleHead]):
    """The bundle task as the loop sees it; see `base.Task`."""

    def __init__(self, recipe: Recipe, config: BundleTask, read: tuple[Dataset, Split] | None = None) -> None:
        super().__init__(recipe, config, read)
        self._config, self._image_rank, self._seed = config, recipe.backbone.image_rank, recipe.seed
        pseudo = None
        if config.pseudo_bundles is not None:
            pseudo = mine(self._dataset, self._parts, config.pseudo_bundles)
            self.notes += pseudo.notes
        self._batches = BundleBatches(
            self._bundles, self._duplicates, self._leaves, config, recipe.training.batch_size, recipe.seed, pseudo
        )

    @property
    def per_epoch(self) -> int:
        return self._batches.per_epoch

    def head(self, backbone: Backbone, max_length: int) -> BundleHead:
        if backbone.pictures is None:
            return BundleHead(backbone.dim, self._config)
        encoder, adapter = backbone.pictures, None
        if self._image_rank:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                adapter = PictureAdapter.suit(encoder.model, encoder.dim, self._image_rank)
        return BundleHead(backbone.dim, self._config, PictureView(encoder.dim, adapter))

    def start(self, head: BundleHead, frozen: Encode) -> None:
        if head.whitened:
            head.measure(frozen(None))

    def batch(self, step: int, part: int = 0, parts: int = 1) -> BundleBatch:
        return self._batches.batch(step, part, parts)

    def logits(self, head: BundleHead, encoded: Tensor, batch: BundleBatch) -> Tensor:
        return compute_bundle_logits(head, encoded, batch)

    def loss(self, logits: Tensor, batch: BundleBatch) -> Tensor:
        return compute_bundle_loss(logits, batch, self._config.label_smoothing)
