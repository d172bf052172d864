"""Differentiable all-gather of ragged shares across processes, for losses over the whole batch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class _GatherShares(torch.autograd.Function):
    """All-gather of shares of any length; row `i` of the whole is row `source[i]` of the shares padded and joined."""

    @staticmethod
    def forward(
        context: torch.autograd.function.FunctionCtx, share: Tensor, source: Tensor, longest: int, process: int,
        processes: int,
    ) -> Tensor:  # fmt: skip
        own = torch.nonzero(torch.div(source, longest, rounding_mode="floor") == process)[:, 0]
        context.own = own[torch.argsort(source[own])]  # type: ignore[attr-defined]
        context.processes = processes  # type: ignore[attr-defined]
        padded = share.new_zeros(longest, share.shape[1])
        padded[: len(share)] = share
        parts = [torch.empty_like(padded) for _ in range(processes)]
        torch.distributed.all_gather(parts, padded)
        return torch.cat(parts)[source]  # (W * longest, D) -> (total, D)

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        own, processes = context.own, context.processes  # type: ignore[attr-defined]
        # Every process computes the whole loss from the whole gather, so its own rows of the gradient are complete.
        # Data-parallel training then averages over processes, which share the rows out: hence the factor.
        return gradient[own] * processes, None, None, None, None


def gather_shares(share: Tensor, sizes: NDArray[np.int64], process: int, processes: int) -> Tensor:
    """Put together what all processes made of their texts; process ``p`` has ``texts[p::processes]``.

    The loss behind it must be the same on every process, as it is where each works on the whole batch.

    Args:
        share: (rows of this process's texts, D). sizes: (K,) rows that each of all texts has.
    Returns:
        (sum of sizes, D), the first text's rows first; the same on every process.
    """
    if processes == 1:
        return share
    longest = max(1, *(int(sizes[p::processes].sum()) for p in range(processes)))
    starts = np.empty(len(sizes), np.int64)
    for p in range(processes):
        own = sizes[p::processes]
        starts[p::processes] = p * longest + np.cumsum(own) - own
    source = torch.from_numpy(_concatenate_ranges(starts, sizes)).to(share.device)
    gathered: Tensor = _GatherShares.apply(share, source, longest, process, processes)  # type: ignore[no-untyped-call]
    return gathered


def _concatenate_ranges(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``starts[0], starts[0] + 1, ...`` of `sizes[0]` numbers, then the same for the next, as one array."""
    ends = np.cumsum(sizes)
    return np.repeat(starts - ends + sizes, sizes) + np.arange(int(sizes.sum()))
