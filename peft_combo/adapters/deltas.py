"""Weight deltas: what an adapter changes in the encoder, and such a change factored as a plain LoRA by SVD.

Owns how changes are read, combined and factored. Knows tensors only: nothing of stores, heads' meaning or texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.encoder.methods.merge_weights import merge_into_base

MergeMethod = Literal["average", "svd", "ties", "dare"]

_UNIT_ROUNDOFF = 2.0**-24  # of float32


@dataclass(frozen=True, eq=False)
class Changes:
    """What differs from the frozen encoder.

    Attributes:
        linear: name of a linear module -> (O, I) float32, what is added to its weight.
        other: name of a parameter -> what is added to it: biases, norms, embeddings.
    """

    linear: dict[str, Tensor]
    other: dict[str, Tensor]


@torch.no_grad()
def read_changes(attached: AttachedAdapter) -> Changes:
    """Return what an adapter changes, on the CPU; nothing for a head alone.

    A change is the merged weight less the frozen one, so it is known up to the rounding of a float32 weight.

    Raises:
        BackboneError: the adapter is no change of weights, or the weights are quantised.
    """
    frozen = dict(attached.base.named_parameters())
    weights = {f"{name}.weight": name for name, m in attached.base.named_modules() if isinstance(m, nn.Linear)}
    changes = Changes({}, {})
    for name, parameter in merge_into_base(attached).named_parameters():
        if parameter is frozen[name]:
            continue
        delta = (parameter.float() - frozen[name].float()).cpu()
        if name in weights:
            changes.linear[weights[name]] = delta
        elif delta.any():
            changes.other[name] = delta
    return changes


def combine_changes(
    changes: Sequence[Mapping[str, Tensor]], shares: Sequence[float], method: MergeMethod, density: float, seed: int
) -> dict[str, Tensor]:
    """Make one change of several; a name that one of them lacks is a change of zero there.

    - ``average`` and ``svd``: the mean, weighted by `shares`. (They differ in how the result is factored.)
    - ``ties``: of each only the `density` largest values count; at every place the sign with the larger weighted sum
      wins, and the result is the mean of the values that have it.
    - ``dare``: every value is kept by chance, with probability `density`, and divided by it; then the mean.

    Args:
        shares: weights that sum to one.
        density: share of values kept, in (0, 1]; of no meaning for the first two.
        seed: of the chances.
    Source: Yadav et al. 2023, TIES-Merging, section 4 and algorithm 1; Yu et al. 2024, DARE, section 3.2.
    """
    names = list(dict.fromkeys(name for change in changes for name in change))
    match method:
        case "average" | "svd":
            kept = [dict(change) for change in changes]
        case "ties":
            kept = [_keep_largest(change, density) for change in changes]
        case "dare":
            generator = torch.Generator().manual_seed(seed)
            kept = [_keep_by_chance(change, density, generator) for change in changes]
        case _:
            assert_never(method)
    result = {}
    for name in names:
        like = next(change[name] for change in kept if name in change)
        stack = torch.stack([change.get(name, torch.zeros_like(like)) for change in kept])  # (T, ...)
        weights = torch.tensor(shares, dtype=stack.dtype).reshape(-1, *[1] * like.ndim)
        total = (weights * stack).sum(0)
        if method == "ties":
            agrees = stack * total.sign() > 0
            total = (weights * stack * agrees).sum(0)
            voters = (weights * agrees).sum(0)
            total = torch.where(voters > 0, total / voters.clamp_min(torch.finfo(stack.dtype).tiny), 0.0)
        result[name] = total
    return result


def _keep_largest(change: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Set all but the largest values to zero, over the whole change as the paper does, not module by module."""
    if not change or density == 1:
        return dict(change)
    sizes = torch.cat([delta.abs().flatten() for delta in change.values()])
    bound = sizes.kthvalue(len(sizes) - max(1, round(density * len(sizes))) + 1).values
    return {name: torch.where(delta.abs() >= bound, delta, 0.0) for name, delta in change.items()}


def _keep_by_chance(change: Mapping[str, Tensor], density: float, generator: torch.Generator) -> dict[str, Tensor]:
    # Sorted, so that the draw does not hang on the order in which modules were read.
    return {
        name: change[name] * (torch.rand(change[name].shape, generator=generator) < density) / density
        for name in sorted(change)
    }


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A change of one weight by its singular values.

    Attributes:
        left, values, right: its decomposition, (O, K), (K,), (K, I) float64.
        norm: Frobenius norm. rounding: how far a float32 weight with the change in it may be off by rounding alone.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    norm: float
    rounding: float

    @classmethod
    def of(cls, delta: Tensor, weight: Tensor) -> Spectrum:
        """Decompose a change (O, I) of the frozen `weight`."""
        left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
        moved = float(torch.linalg.norm(weight.cpu().double() + delta))
        return cls(left, values, right, float(values.square().sum().sqrt()), _UNIT_ROUNDOFF * moved)

    def rank(self, max_error: float = 0.0) -> int:
        """Return the smallest rank that leaves out at most `max_error` of the norm, or what rounding hides anyway.

        Source: Eckart and Young 1936: the error of the best approximation is the norm of the values left out.
        """
        tails = self.values.square().flip(0).cumsum(0).sqrt()  # tails[k]: the last k + 1 left out
        return len(self.values) - int((tails <= max(max_error * self.norm, self.rounding)).sum())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return B (O, R) and A (R, I) in float32, of equal norms, whose product is nearest to the change."""
        root = self.values[:rank].sqrt()
        return (self.left[:, :rank] * root).float(), (root[:, None] * self.right[:rank]).float()

    def error(self, factors: tuple[Tensor, Tensor]) -> float:
        """Return the Frobenius norm of what the product of two factors leaves of the change."""
        left, right = factors
        whole = (self.left * self.values) @ self.right
        return float(torch.linalg.norm(whole - left.double() @ right.double()))


def relative(part: float, whole: float) -> float:
    """Return ``part / whole``; 0 of nothing is 0."""
    return part / whole if whole > 0 else 0.0 if part == 0 else math.inf
