"""Task protocol: batches, loss, evaluation and baselines, as the tuning loop asks for them.

Owns the protocol and the values that cross it. Knows nothing of any one task, of encoders or of the loop: a task sees
texts by number and what was made of them, vectors or the states of their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from peft_combo.data.pictures import Picture
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.base import HeadT
from peft_combo.metrics.report import ResultTable

Encode: TypeAlias = Callable[[NDArray[np.int64] | None], NDArray[np.float32]]
"""Encodes texts by number, or all where None, without gradients: (M, D) vectors of unit length, or for a task that is
`per_token` (T, D) states, those of the first text first."""


@dataclass(frozen=True)
class Evaluation:
    """How good the weights are at a moment.

    Attributes:
        values: validation metric -> value, higher is better.
        choice: what validation chose for the head, for `apply_choice`.
    """

    values: Mapping[str, float]
    choice: Mapping[str, float] = field(default_factory=dict)


class Batch(Protocol):
    """One micro-batch; beyond this a task's own business."""

    @property
    def items(self) -> NDArray[np.int64]:
        """(M,) numbers of the texts to encode."""


@runtime_checkable
class RetokenizedBatch(Batch, Protocol):
    """A micro-batch in which some tokens of the texts were exchanged."""

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(T,) ids to run in place of the items' own, one text behind the other; the items' texts are distinct."""


@runtime_checkable
class PicturedTask(Protocol):
    """A task whose head may read pictures beside texts."""

    @property
    def pictures(self) -> Sequence[Picture | None]:
        """Of each text's item; none where no item has one."""


BatchT = TypeVar("BatchT", bound=Batch)
PredictionsT = TypeVar("PredictionsT")


class Task(Protocol[HeadT, BatchT, PredictionsT]):
    """What is learned.

    The loop calls, in this order: `head`, `start`, `predict` of the frozen encoder, then `batch`, `logits` and `loss`
    for every step and `evaluate` now and then, then `apply_choice`, `predict` of the tuned encoder and `table`.

    Nothing here has a random state: a batch is a function of seed and place, and every process computes the same.

    Attributes:
        texts: what is encoded; everything else speaks of texts by their place here.
        brands: brand of each text where it is known, for augmentation; None where no text has one.
        per_token: whether the head works on the state of every token, not on one vector a text.
        retokenized: whether its batches exchange tokens of the texts (`RetokenizedBatch`).
        exclusive: whether a row of logits is one softmax over its answers; else each is a sigmoid of its own.
        unit: what an example is, in the plural ("bundles").
        examples: part (train, valid, test) -> how many examples.
        per_epoch: optimizer steps an epoch.
        data: name, digest, split digest and counts, for the manifest.
        notes: what was dropped or derived while reading.
        protocol: how the table was measured, for the manifest.
    """

    @property
    def texts(self) -> Sequence[str]: ...
    @property
    def brands(self) -> Sequence[str | None] | None: ...
    @property
    def per_token(self) -> bool: ...
    @property
    def retokenized(self) -> bool: ...
    @property
    def exclusive(self) -> bool: ...
    @property
    def unit(self) -> str: ...
    @property
    def examples(self) -> Mapping[str, int]: ...
    @property
    def per_epoch(self) -> int: ...
    @property
    def data(self) -> Mapping[str, Any]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def protocol(self) -> str: ...

    def head(self, backbone: Backbone, max_length: int) -> HeadT:
        """Build the untrained head, and whatever depends on how texts are cut into at most `max_length` tokens."""

    def start(self, head: HeadT, frozen: Encode) -> None:
        """Make `head` as good as it gets over the frozen encoder: what tuning starts from and is compared with."""

    def batch(self, step: int, part: int = 0, parts: int = 1) -> BatchT:
        """Return the batch of optimizer step `step`, counted from 0 over all epochs, or one of its `parts`."""

    def logits(self, head: HeadT, encoded: Tensor, batch: BatchT) -> Tensor:
        """Answer a batch, with gradients: (Q, C) log-odds, or (Q,) where each query is a yes or no.

        Args:
            encoded: the vectors or states of ``batch.items``.
        """

    def loss(self, logits: Tensor, batch: BatchT) -> Tensor:
        """Return the scalar loss of what `logits` answered."""

    def evaluate(self, head: HeadT, encode: Encode, metric: str) -> Evaluation:
        """Return the validation metrics of the weights as they are, the head's own settings chosen for `metric`."""

    def apply_choice(self, head: HeadT, choice: Mapping[str, float]) -> None:
        """Put into `head` what `evaluate` chose."""

    def predict(self, head: HeadT, encode: Encode) -> PredictionsT:
        """Answer the queries of the table, one by one."""

    def table(self, before: PredictionsT, after: PredictionsT) -> ResultTable:
        """Compare the tuned with the frozen encoder and with whoever needs no encoder."""


AnyTask: TypeAlias = Task[Any, Any, Any]


class Epochs:
    """Divides examples over optimizer steps; what a step sees is a function of seed and place alone.

    Args:
        count: examples. batch_size: examples a step, over all its parts.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        # A short rest at the end is spread over the other steps, so all weigh alike.
        self.per_epoch = max(1, round(count / min(batch_size, count)))

    def share(self, step: int, part: int = 0, parts: int = 1) -> NDArray[np.int64]:
        """Return the examples of step `step`, counted from 0 over all epochs, or of one of its `parts`."""
        epoch, place = divmod(step, self.per_epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(self._count)
        return np.array_split(np.array_split(order, self.per_epoch)[place], parts)[part]
