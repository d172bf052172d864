"""Sequence task: bundles written item by item (next-item prediction), and when to stop.

Owns the decoder, its batches and its loss. What is a fair negative and how completion is measured are those of the
bundle task. Sees items as rows and vectors; knows nothing of encoders, the training loop
or the search (`composing.generation`).

A bundle is a set. So the decoder has no positions and looks at the items before it as they are, not at what it made of
them: what it says after some items does not depend on their order.
Training reads every bundle in random orders, anew in each batch, with teacher forcing at every place: from nothing but
the begin token, after the first item, and so on, until the bundle is complete.

An item is its text and nothing else, so a new one is written as readily. A learned embedding of each item beside it was
tried on BundleRec clothing, over the frozen encoder. On validation NDCG@10 rose by 0.006 to 0.018 (three splits), but
only because items that no training bundle holds rose as a group and took three quarters of each list in place of half:
there they are 95 % of the answers (see `evidence.GATES`). For all other answers it fell by 38 to 52 % (two splits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from peft_combo.data.model import Dataset
from peft_combo.data.queries import pad_contexts
from peft_combo.data.splits import Split
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.sequence import SequenceHead
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import SequenceTask
from peft_combo.tuning.tasks.base import Encode
from peft_combo.tuning.tasks.bundle import Candidates, Completion, CompletionQuery, compute_candidate_logits


@dataclass(frozen=True)
class SequenceBatch:
    """Bundles in random orders.

    Attributes:
        items: (M,) distinct catalogue rows, ascending; first those of the bundles, then extra negatives.
        sequences: (B, L) positions in `items`, -1 behind the end.
        barred: (Q, M) for each of the Q queries, True where an item is neither the target nor a fair negative.
    """

    items: NDArray[np.int64]
    sequences: Tensor
    barred: Tensor

    @property
    def has_query(self) -> Tensor:
        """(B, L + 1) True where there is a query: what follows the first t items. Those are Q, row by row."""
        lengths = (self.sequences >= 0).sum(1, keepdim=True)  # (B, 1)
        return torch.arange(self.sequences.shape[1] + 1) <= lengths

    @property
    def targets(self) -> Tensor:
        """(Q,) position of the target; M where that is the end."""
        following = functional.pad(self.sequences, (0, 1), value=-1)  # (B, L + 1)
        return torch.where(following >= 0, following, len(self.items))[self.has_query]


class SequenceBatches:
    """Makes the batches of the sequence task; see `Candidates`."""

    def __init__(
        self,
        bundles: Sequence[NDArray[np.int32]],
        duplicates: NDArray[np.int64],
        leaves: NDArray[np.int64],
        config: SequenceTask,
        batch_size: int,
        seed: int,
    ) -> None:
        self._candidates = Candidates(bundles, duplicates, leaves, config, batch_size, seed)
        self._orders = config.orders

    @property
    def per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return self._candidates.per_epoch

    def batch(self, step: int, part: int = 0, parts: int = 1) -> SequenceBatch:
        """Return the batch of optimizer step `step`, counted from 0 over all epochs, or one of its `parts`."""
        bundles, rng = self._candidates.share(step, part, parts)
        items = self._candidates.offer_items(bundles, rng)
        position = {int(row): place for place, row in enumerate(items)}
        orders = [rng.permutation(rows) for rows in bundles for _ in range(self._orders)]
        sequences = pad_contexts([np.array([position[int(row)] for row in rows]) for rows in orders])
        barred = []
        for rows in orders:
            next_queries = [CompletionQuery(rows[:place], int(target), rows) for place, target in enumerate(rows)]
            # Whether a bundle is complete is asked apart from which item would be next, so nothing is barred there.
            barred += [self._candidates.find_barred(items, next_queries), np.zeros((1, len(items)), bool)]
        return SequenceBatch(items, torch.from_numpy(sequences), torch.from_numpy(np.concatenate(barred)))


def compute_sequence_logits(head: SequenceHead, vectors: Tensor, batch: SequenceBatch) -> Tensor:
    """Score the candidates of a batch for each of its queries, and the end.

    The end is a decision of its own, taken first: its log-odds are against all items together, so how probable it is
    does not depend on how many items a batch offers, or later the catalogue.

    Args:
        vectors: (M, D) vectors of ``batch.items``.
    Returns:
        (Q, M + 1) float32, the end last; its softmax is P(end), and (1 - P(end)) P(item) of each item.
    """
    has_query = batch.has_query.to(vectors.device)
    queries = head.prefixes(vectors, batch.sequences.to(vectors.device))[has_query]  # (Q, D)
    sizes = torch.nonzero(has_query)[:, 1]
    items = compute_candidate_logits(head, queries, vectors, batch.barred)
    end = head.completeness(queries, sizes).float() + items.logsumexp(1)
    return torch.cat([items, end[:, None]], 1)


def compute_sequence_loss(logits: Tensor, batch: SequenceBatch) -> Tensor:
    """Softmax cross-entropy of what comes next, at every place of every sequence: a scalar, mean over the queries.

    Args:
        logits: (Q, M + 1) of `compute_sequence_logits`.
    """
    return functional.cross_entropy(logits, batch.targets.to(logits.device))


class SequenceGeneration(Completion[SequenceHead]):
    """The sequence task as the loop sees it; see `base.Task`."""

    def __init__(self, recipe: Recipe, config: SequenceTask, read: tuple[Dataset, Split] | None = None) -> None:
        super().__init__(recipe, config, read)
        self._config = config
        self._batches = SequenceBatches(
            self._bundles, self._duplicates, self._leaves, config, recipe.training.batch_size, recipe.seed
        )

    @property
    def per_epoch(self) -> int:
        return self._batches.per_epoch

    def head(self, backbone: Backbone, max_length: int) -> SequenceHead:
        return SequenceHead(backbone.dim, self._config)

    def start(self, head: SequenceHead, frozen: Encode) -> None:
        """Let the begin token be the mean member of a training bundle, and count at which sizes bundles end."""
        vectors = torch.from_numpy(frozen(np.concatenate(self._bundles).astype(np.int64)))
        with torch.no_grad():
            head.begin.copy_(functional.normalize(vectors.mean(0), dim=0))
            head.size_log_odds.copy_(estimate_size_log_odds([len(rows) for rows in self._bundles], self._config.sizes))

    def batch(self, step: int, part: int = 0, parts: int = 1) -> SequenceBatch:
        return self._batches.batch(step, part, parts)

    def logits(self, head: SequenceHead, encoded: Tensor, batch: SequenceBatch) -> Tensor:
        return compute_sequence_logits(head, encoded, batch)

    def loss(self, logits: Tensor, batch: SequenceBatch) -> Tensor:
        return compute_sequence_loss(logits, batch)


def estimate_size_log_odds(sizes: Sequence[int], longest: int) -> Tensor:
    """Return the log-odds that a bundle which has so many items has no more.

    Args:
        sizes: of the training bundles. longest: the last size; it stands for all above.
    Returns:
        (longest + 1,) float32.
    Source: Krichevsky and Trofimov 1981: half an observation is added on either side, so that nothing is impossible.
    """
    counts = np.bincount(np.minimum(sizes, longest), minlength=longest + 1)
    ended, went_on = counts.astype(np.float64), counts[::-1].cumsum()[::-1] - counts
    return torch.from_numpy(np.log((ended + 0.5) / (went_on + 0.5)).astype(np.float32))
