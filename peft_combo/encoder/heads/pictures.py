"""Picture view of the bundle head: features of pictures become one more part of an item's vector.

Owns how many components are kept, how they are weighed against the text, and what stands for a picture that is not
there. Knows nothing of how pictures are encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from peft_combo.encoder.heads.picture_adapter import PictureAdapter
from peft_combo.scoring.whitening import measure_reduction

WIDTH = 128
"""Components of a picture beside those of a text: the most telling of some hundred that photographs of a shop have."""


class PictureView(nn.Module):
    """Reduces features of pictures, and weighs them beside texts.

    Attributes:
        dim: width of the features. adapter: what learned of the pictures; None where the vision encoder stays frozen.
        angle: the text's part of an item is scaled by its cosine, the picture's by its sine; equal at the start.
    """

    centre: Tensor
    change: Tensor

    def __init__(self, dim: int, adapter: PictureAdapter | None) -> None:
        super().__init__()
        self.dim, self.adapter = dim, adapter
        self.angle = nn.Parameter(torch.tensor(torch.pi / 4))
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("change", torch.eye(dim, WIDTH))

    def measure(self, features: NDArray[np.float32]) -> None:
        """Measure on (N, D) features of a catalogue what is kept of them; rows of 0 are items without a picture."""
        for buffer, value in zip((self.centre, self.change), measure_reduction(features, WIDTH), strict=True):
            buffer.copy_(torch.from_numpy(value))

    def reduce(self, features: Tensor) -> Tensor:
        """Reduce features that passed the adapter: (M, D) -> (M, `WIDTH`) of unit length; 0 stays 0."""
        there = features.abs().amax(dim=1, keepdim=True) > 0
        reduced = (functional.normalize(features, dim=-1) - self.centre) @ self.change
        return functional.normalize(reduced, dim=-1) * there

    @torch.inference_mode()
    def reduce_all(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Reduce stored features, which a bottleneck has still to move: (N, D) -> (N, `WIDTH`)."""
        own = torch.from_numpy(np.require(features, requirements=["C", "W"])).to(self.angle.device)
        there = own.abs().amax(dim=1, keepdim=True) > 0
        moved = own if self.adapter is None else self.adapter.shift(own) * there
        reduced: NDArray[np.float32] = self.reduce(moved).cpu().numpy()
        return reduced

    def join(self, texts: Tensor, pictures: Tensor) -> Tensor:
        """Put both parts of items side by side: (M, D) and (M, `WIDTH`) -> (M, D + `WIDTH`).

        A picture that is not there is a part of 0, which after centring is what the mean picture would be.
        """
        return torch.cat([texts * self.angle.cos(), pictures * self.angle.sin()], dim=-1)

    def spec(self) -> dict[str, Any]:
        """Return what `from_spec` needs besides the weights."""
        return {"dim": self.dim, "adapter": None if self.adapter is None else self.adapter.spec()}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> PictureView:
        """Make the view that `spec` described, without its weights."""
        adapter = None if spec["adapter"] is None else PictureAdapter.from_spec(spec["adapter"])
        return cls(int(spec["dim"]), adapter)
