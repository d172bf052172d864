"""Item pictures in a tuning run: features of the frozen vision encoder kept, or run anew where its layers learn.

Owns which picture belongs to which item and what stands for a missing one. Equal pictures are encoded once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peft_combo.encoder.heads.pictures import WIDTH, PictureView
from peft_combo.encoder.pixels import PictureEncoder

_LOOK = 256  # pictures of a catalogue prepared at a time


class ItemPictures:
    """Encodes pictures of items with the view of a head as it is; see `PictureView`.

    Attributes:
        distinct: number of distinct pictures. cached_bytes: of pixels kept because layers learn; 0 where none are.
    """

    def __init__(
        self,
        encoder: PictureEncoder,
        view: PictureView,
        contents: Sequence[bytes | None],
        *,
        cache_limit_bytes: int = 2**30,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Encode every picture once with the frozen encoder, and measure on them what the view keeps.

        Raises:
            DataError: a picture cannot be decoded.
        """
        self._encoder, self._view = encoder, view
        places: dict[bytes, int] = {}
        self._contents: list[bytes] = []
        rows = []
        for content in contents:
            if content is None:
                rows.append(-1)
                continue
            digest = hashlib.sha256(content).digest()
            if digest not in places:
                places[digest] = len(self._contents)
                self._contents.append(content)
            rows.append(places[digest])
        self._place = np.array(rows, np.int64)  # (N,) of each item's picture among the distinct ones, -1 for none
        features = encoder.adapt(None, None).encode(self._contents, progress)
        view.measure(features)
        self._features = torch.from_numpy(features).to(view.angle.device)
        self._runs = view.adapter is not None and view.adapter.kind == "lora"
        self._pixels: list[Tensor] | None = None
        self.cached_bytes = 0
        if self._runs and self._contents:
            pixels = encoder.prepare_all(self._contents[:1])
            self.cached_bytes = len(self._contents) * pixels[0].nbytes
            if self.cached_bytes <= cache_limit_bytes:
                self._pixels = encoder.prepare_all(self._contents)
            else:
                self.cached_bytes = 0

    @property
    def distinct(self) -> int:
        return len(self._contents)

    def encode(self, items: NDArray[np.int64]) -> Tensor:
        """Encode the pictures of items, with gradients where the caller has them on: (M,) rows -> (M, `WIDTH`)."""
        place = self._place[items]
        wanted, own = np.unique(place[place >= 0], return_inverse=True)
        reduced = self._view.reduce(self._adapt(wanted))
        found = reduced.new_zeros(len(items), WIDTH)
        there = torch.from_numpy(np.flatnonzero(place >= 0)).to(found.device)
        return found.index_copy(0, there, reduced[torch.from_numpy(own).to(found.device)])

    @torch.inference_mode()
    def catalogue(self, items: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Encode the pictures of `items`, or of all, without gradients."""
        rows = np.arange(len(self._place)) if items is None else items
        parts = [self.encode(rows[start : start + _LOOK]).cpu().numpy() for start in range(0, len(rows), _LOOK)]
        return np.concatenate(parts) if parts else np.empty((0, WIDTH), np.float32)

    def _adapt(self, wanted: NDArray[np.int64]) -> Tensor:
        """Return the features of distinct pictures after the adapter: (K,) -> (K, D)."""
        adapter = self._view.adapter
        if adapter is None or not self._runs:
            features = self._features[torch.from_numpy(wanted).to(self._features.device)]
            return features if adapter is None else adapter.shift(features)
        if self._pixels is not None:
            pixels = [self._pixels[place] for place in wanted]
        else:
            pixels = self._encoder.prepare_all([self._contents[place] for place in wanted])
        return self._encoder.run(pixels, lambda chunk: adapter.encode(self._encoder.model, chunk))
