"""What learns: encoder and head behind one forward pass, and the probe that says whether every part of it would.

Owns the randomness of a pass, which is a function of the seed it is given. Changes no weight.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_combo.architectures import set_training
from peft_combo.errors import TuningError
from peft_combo.item_encoder import ItemEncoder, Push
from peft_combo.methods import AttachedAdapter
from peft_combo.recipe import Recipe
from peft_combo.tasks.base import AnyTask, Batch, RetokenizedBatch, TaskHead


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


def probe(
    trainee: nn.Module, attached: AttachedAdapter, head: TaskHead, batch: Batch, recipe: Recipe
) -> tuple[float, int]:
    """Make sure that every trained tensor gets a gradient, and measure a forward and backward pass.

    All trained tensors are moved off their start first: a LoRA whose B is zero gives A no gradient, and a method that
    the encoder silently ignores would look just like it.

    Returns:
        seconds of a pass, and the bytes that its forward half keeps for its backward half.
    Raises:
        TuningError: a trained tensor gets no gradient.
    """
    trained = learning(attached, head)
    start = {name: p.detach().clone() for name, p in trained.items()}
    set_training(attached.inner, attached.cut, False)
    head.eval()
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    trainee.zero_grad(set_to_none=True)
    kept = _Kept(trainee)
    with torch.autograd.graph.saved_tensors_hooks(kept.note, _same):
        loss: Tensor = trainee(batch, recipe.seed)
    loss.backward()  # type: ignore[no-untyped-call]
    silent = [name for name, p in trained.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    trainee.zero_grad(set_to_none=True)
    clock = time.perf_counter()  # the first pass also paid for memory that the second finds ready
    trainee(batch, recipe.seed).backward()
    seconds = time.perf_counter() - clock
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
    trainee.zero_grad(set_to_none=True)
    if silent:
        raise TuningError(
            f"{len(silent)} of {len(trained)} trained tensors get no gradient, so they would be stored untrained: "
            f"{', '.join(silent[:3])}{' ...' if len(silent) > 3 else ''}. The method {recipe.adapter.method} does not "
            f"reach this encoder's output; use another method or other adapter.targets."
        )
    return seconds, kept.bytes


class _Kept:
    """Adds up what autograd keeps, each piece of memory once and the module's own weights not at all."""

    def __init__(self, module: nn.Module) -> None:
        own = (*module.parameters(), *module.buffers())
        self._known = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.bytes = 0

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # What is kept is alive until the backward pass, so its address is nobody else's.
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def _same(tensor: Any) -> Any:
    return tensor
