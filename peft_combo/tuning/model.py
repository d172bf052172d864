"""What learns: encoder and head behind one forward pass, and the probe that says whether every part of it would.

Owns the randomness of a pass, which is a function of the seed it is given. Changes no weight.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_combo.encoder.heads.base import TaskHead
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.tuning.item_encoder import ItemEncoder, Push
from peft_combo.tuning.tasks.base import AnyTask, Batch, RetokenizedBatch


class Trainee(nn.Module):
    """Encoder and head behind one forward, as data-parallel wrappers want it."""

    def __init__(
        self, task: AnyTask, items: ItemEncoder, attached: AttachedAdapter, head: TaskHead, r_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.encoder = items.encoder
        self.head = head
        self._task = task
        self._items = items
        self._attached = [attached]  # in a list, so that its modules are not registered a second time
        self._r_drop = r_drop

    def forward(self, batch: Batch, seed: int, push: Push | None = None) -> Tensor:
        """Return the scalar loss of a batch; `push` is added where states enter the layers that learn."""
        first = self._answers(batch, seed, seed, push)
        loss = self._task.loss(first, batch)
        if self._r_drop:
            second = self._answers(batch, seed, mixed(seed, 1), push)
            loss = (loss + self._task.loss(second, batch)) / 2
            loss = loss + self._r_drop * disagreement(first, second, self._task.exclusive)
        extra = self._attached[0].regularizer()
        return loss if extra is None else loss + extra

    def pushed(self, batch: Batch, seed: int) -> Push:
        """Return a push of nothing for the texts that `forward` would encode."""
        return self._items.pushed(batch.items, seed, _tokens(batch))

    def _answers(self, batch: Batch, seed: int, dropout: int, push: Push | None) -> Tensor:
        torch.manual_seed(mixed(dropout, self._items.process + 1))  # other texts, other masks
        encoded = self._items.encode(self.encoder, batch.items, seed=seed, push=push, tokens=_tokens(batch))
        torch.manual_seed(mixed(dropout, 0))  # the loss is the same on every process
        return self._task.logits(self.head, encoded, batch)


def _tokens(batch: Batch) -> NDArray[np.int64] | None:
    return batch.tokens if isinstance(batch, RetokenizedBatch) else None


def disagreement(first: Tensor, second: Tensor, exclusive: bool) -> Tensor:
    """Return the mean over questions of the symmetric Kullback-Leibler divergence of two answers, in nats.

    Args:
        first, second: (Q, C) log-odds, or (Q,) where each question is a yes or no.
        exclusive: whether a row is one softmax; else each number is a sigmoid of its own, and their divergences add up.
    Source: Liang et al. 2021, "R-Drop: regularized dropout for neural networks", eq. 2.
    """
    if exclusive:
        one, two = first.log_softmax(-1), second.log_softmax(-1)
        apart = (one.exp() - two.exp()) * (one - two)
    else:
        apart = (first.sigmoid() - second.sigmoid()) * (first - second)
    return 0.5 * apart.sum() / len(first)


def learning(attached: AttachedAdapter, head: TaskHead) -> dict[str, nn.Parameter]:
    """Return the parameters of adapter and head that learn, by name."""
    return {**{f"adapter: {k}": p for k, p in attached.trainable().items()},
            **{f"head: {k}": p for k, p in head.named_parameters() if p.requires_grad}}  # fmt: skip


def mixed(*numbers: int) -> int:
    """Return a 63-bit seed that any change of any number changes."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
