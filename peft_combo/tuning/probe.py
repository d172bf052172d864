"""Gradient probe: one forward and backward pass; does every trained tensor get one, and what costs a step?"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from peft_combo.encoder.architectures import set_training
from peft_combo.encoder.heads.base import TaskHead
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.errors import TuningError
from peft_combo.recipe.model import Recipe
from peft_combo.tuning.model import collect_trained_parameters
from peft_combo.tuning.resources import wait_for_gpu
from peft_combo.tuning.tasks.base import Batch


def probe(
    model: nn.Module, attached: AttachedAdapter, head: TaskHead, batch: Batch, recipe: Recipe
) -> tuple[float, int]:
    """Make sure that every trained tensor gets a gradient, and measure a forward and backward pass.

    All trained tensors are moved off their start first: a LoRA whose B is zero gives A no gradient, and a method that
    the encoder silently ignores would look just like it.

    Returns:
        seconds of a pass, and the bytes that its forward half keeps for its backward half.
    Raises:
        TuningError: a trained tensor gets no gradient.
    """
    trained = collect_trained_parameters(attached, head)
    start = {name: p.detach().clone() for name, p in trained.items()}
    set_training(attached.inner, attached.first_layer, False)
    head.eval()
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.zero_grad(set_to_none=True)
    kept = _Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.note, _same):
        loss: Tensor = model(batch, recipe.seed)
    loss.backward()  # type: ignore[no-untyped-call]
    idle = [name for name, p in trained.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    model.zero_grad(set_to_none=True)
    wait_for_gpu()
    clock = time.perf_counter()  # the first pass also paid for memory that the second finds ready
    model(batch, recipe.seed).backward()
    wait_for_gpu()
    seconds = time.perf_counter() - clock
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
    model.zero_grad(set_to_none=True)
    if idle:
        raise TuningError(
            f"{len(idle)} of {len(trained)} trained tensors get no gradient, so they would be stored untrained: "
            f"{', '.join(idle[:3])}{' ...' if len(idle) > 3 else ''}. The method {recipe.adapter.method} does not "
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
        if tensor.is_sparse:  # SHiRA's, which has no storage of its own
            self.bytes += tensor._indices().nbytes + tensor._values().nbytes
            return tensor
        storage = tensor.untyped_storage()
        # What is kept is alive until the backward pass, so its address is nobody else's.
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def _same(tensor: Any) -> Any:
    return tensor
