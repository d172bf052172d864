"""Tokenization: texts as padded token ids, in length-sorted chunks of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A chunk of so many token positions keeps the matrix products of a small BERT large enough to run at the processor's
# full rate while its activations (1.5k floats a position in the widest layer) stay in the cache: on two cores 512 to
# 1024 encode 1.6 times as many texts a second as 8192.
CHUNK_TOKENS = 1024
# A GPU has thousands of units to keep busy and waits for every launch: chunks as large as its memory bears.
GPU_CHUNK_TOKENS = 32_768


def choose_chunk_tokens(device: torch.device) -> int:
    """Return how many token positions are encoded at once where a model lies on `device`."""
    return CHUNK_TOKENS if device.type == "cpu" else GPU_CHUNK_TOKENS


@dataclass(frozen=True)
class Tokens:
    """Token ids of many texts, unpadded.

    Attributes:
        ids: (T,) int32, all texts one after the other.
        offsets: (B + 1,) int64; text ``b`` is ``ids[offsets[b]:offsets[b + 1]]``.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(B,) number of tokens of each text, special tokens included."""
        return np.diff(self.offsets)

    def pad(self, rows: NDArray[np.int64], pad_id: int, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Return ids and attention mask of `rows`, both (len(rows), width or longest) int64, padded on the right."""
        lengths = self.lengths[rows]
        width = int(lengths.max()) if width is None else width
        position = np.arange(width)
        mask = position < lengths[:, None]  # (R, W)
        source = np.minimum(self.offsets[rows][:, None] + position, len(self.ids) - 1)
        ids = np.where(mask, self.ids[source], pad_id).astype(np.int64)
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def chunk_by_length(lengths: NDArray[np.int64], chunk_tokens: int = CHUNK_TOKENS) -> Iterator[NDArray[np.int64]]:
    """Yield positions grouped by similar length, each group of at most `chunk_tokens` padded tokens, longest first.

    A group also ends where a text is an eighth shorter than its longest, once it is large enough to be worth a pass:
    padding stays below some per cent. Every position comes exactly once; the order is a function of `lengths` alone.
    Longest first, so that what does not fit into memory fails at once.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        width = max(int(lengths[order[start]]), 1)
        stop = min(start + max(1, chunk_tokens // width), len(order))
        worth = start + -(-chunk_tokens // (3 * width))
        if worth < stop:
            much_shorter = lengths[order[worth:stop]] < width - width // 8
            stop = worth + int(np.argmax(much_shorter)) if much_shorter.any() else stop
        yield order[start:stop]
        start = stop
