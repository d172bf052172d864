"""Picture encoder: bytes of pictures in, vectors of unit length out, frozen or under an adapter.

Owns batching, the device, and the name under which vectors are kept. Nothing is ever switched: an adapted encoder is a
value beside the frozen one, so requests under way keep what they have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_combo.data.pictures import PictureError, require_pillow
from peft_combo.encoder.heads.picture_adapter import PictureAdapter
from peft_combo.encoder.pixels.loading import VisionModel, load_vision
from peft_combo.errors import DataError

_CHUNK = 32  # pictures run at a time


class PictureEncoder:
    """A frozen vision encoder.

    Attributes:
        name: what it was loaded from. dim: width of its vectors. model: (B, 3, H, W) -> (B, dim).
    """

    def __init__(self, name: str, vision: VisionModel, device: str | torch.device = "cpu") -> None:
        self.name, self.dim = name, vision.dim
        self.model: nn.Module = vision.model.to(device)
        self.device = torch.device(device)
        self._vision = vision

    @classmethod
    def load(cls, name: str, device: str | torch.device = "cpu") -> PictureEncoder:
        """Load "embedded-efficientnet", or a transformers vision encoder by its folder.

        Raises:
            DataError: Pillow is not installed.
            BackboneError: it is not there, not whole, or no vision encoder.
        """
        require_pillow()
        return cls(name, load_vision(name), device)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over how pictures are prepared and every weight by name, shape and bytes."""
        digest = hashlib.sha256(self._vision.settings.encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
        return digest.hexdigest()

    def prepare_all(self, contents: Sequence[bytes]) -> list[Tensor]:
        """Return the pixels of pictures, each (3, H, W) float32.

        Raises:
            DataError: the bytes are no picture, or damaged.
        """
        try:
            return [self._vision.prepare(content) for content in contents]
        except PictureError as error:
            raise DataError(f"A picture {error}. Find it with: peft-combo data check --data FOLDER") from error

    def run(self, pixels: Sequence[Tensor], forward: Callable[[Tensor], Tensor]) -> Tensor:
        """Pass prepared pictures, B of (3, H, W), in batches of equal size through `forward`: (B, dim)."""
        sizes: dict[tuple[int, ...], list[int]] = {}
        for row, one in enumerate(pixels):
            sizes.setdefault(tuple(one.shape), []).append(row)
        order, parts = [], []
        for rows in sizes.values():
            for start in range(0, len(rows), _CHUNK):
                chunk = rows[start : start + _CHUNK]
                order += chunk
                parts.append(forward(torch.stack([pixels[row] for row in chunk]).to(self.device)))
        if not parts:
            return torch.empty(0, self.dim, device=self.device)
        return torch.cat(parts)[torch.from_numpy(np.argsort(order)).to(self.device)]

    def adapt(self, adapter: PictureAdapter | None, digest: str | None) -> AdaptedPictures:
        """Return the encoder under an adapter; None is the frozen one.

        Args:
            digest: of the stored artefact that the adapter is from.
        Raises:
            StoreError: the adapter is not of this encoder's shape.
        """
        return AdaptedPictures(self, self.model if adapter is None else adapter.merge_into(self.model), adapter, digest)


@dataclass(frozen=True, eq=False)
class AdaptedPictures:
    """A vision encoder as it encodes, as `encoder.vectors.VectorCache` asks for it."""

    encoder: PictureEncoder
    model: nn.Module
    adapter: PictureAdapter | None
    digest: str | None

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.encoder.dim

    @cached_property
    def fields(self) -> dict[str, str | int | None]:
        """All that `encode` depends on; a bottleneck comes after it, so its features are the frozen encoder's."""
        merged = self.adapter is not None and self.adapter.kind == "lora"
        return {"pictures": self.encoder.fingerprint, "adapter": self.digest if merged else None}

    @cached_property
    def key(self) -> str:
        """sha256 of `fields`: the name under which vectors are kept."""
        return hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()

    def encode(self, contents: Sequence[bytes], progress: Callable[[int], None] | None = None) -> NDArray[np.float32]:
        """Return the pooled features of pictures, (B, dim) float32, below a bottleneck.

        Raises:
            DataError: the bytes are no picture, or damaged.
        """
        found = np.empty((len(contents), self.dim), np.float32)
        with torch.inference_mode():
            for start in range(0, len(contents), 4 * _CHUNK):
                block = slice(start, start + 4 * _CHUNK)
                pixels = self.encoder.prepare_all(contents[block])
                found[block] = self.encoder.run(pixels, self.model).float().cpu().numpy()
                if progress is not None:
                    progress(len(pixels))
        return found
