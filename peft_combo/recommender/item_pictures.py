"""Pictures of a catalogue as vectors beside those of its texts: of the frozen vision encoder, and of adapters.

Owns when pictures are read: where a vision encoder was loaded and items have any. Knows nothing of scorers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.model import Dataset
from peft_combo.data.pictures import read_pictures
from peft_combo.encoder.bank import AdapterBank, LiveAdapter
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.encoder.heads.pictures import WIDTH
from peft_combo.encoder.vectors import VectorCache
from peft_combo.scoring.whitening import reduce_vectors

if TYPE_CHECKING:
    from peft_combo.encoder.pixels import AdaptedPictures


def encode_looks(
    dataset: Dataset, bank: AdapterBank, cache: VectorCache | None, progress: Callable[[int], None] | None = None
) -> NDArray[np.float32] | None:
    """Return what the frozen vision encoder says of items, half-whitened: (N, `WIDTH`), 0 without a picture.

    None where there is no vision encoder, or no item has a picture.

    Raises:
        DataError: a picture cannot be read or decoded.
    """
    if bank.backbone.pictures is None or not dataset.catalog.pictures:
        return None
    frozen = bank.backbone.pictures.adapt(None, None)
    return reduce_vectors(_encode(dataset, frozen, cache, progress), WIDTH)


def append_pictures(
    texts: NDArray[np.float32], dataset: Dataset, live: LiveAdapter, cache: VectorCache | None,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """Put what an adapter says of pictures beside what it says of texts: (N, D) -> (N, D + `WIDTH`).

    As they are for an adapter that reads texts alone.

    Raises:
        DataError: a picture cannot be read or decoded.
    """
    head = live.task_head
    if live.pictures is None or not isinstance(head, BundleHead) or head.picture is None:
        return texts
    if not dataset.catalog.pictures:
        return np.pad(texts, ((0, 0), (0, WIDTH)))
    return np.hstack([texts, head.picture.reduce_all(_encode(dataset, live.pictures, cache, progress))])


def take_texts(vectors: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """Return the part of item vectors that is of their texts: (N, D + `WIDTH`) -> (N, D); (N, D) as they are."""
    return vectors if vectors.shape[1] == dim else np.ascontiguousarray(vectors[:, :dim])


def _encode(
    dataset: Dataset, encoder: AdaptedPictures, cache: VectorCache | None, progress: Callable[[int], None] | None
) -> NDArray[np.float32]:
    """Encode the pictures of items: (N, D) float32, 0 for none; the mapped file of a cache where all have one."""
    contents = read_pictures(dataset.catalog.pictures, dataset.name)
    there = [row for row, content in enumerate(contents) if content is not None]
    own = [content for content in contents if content is not None]
    vectors = encoder.encode(own, progress) if cache is None else cache.pictures(encoder, own, progress)
    if len(own) == len(contents):
        return vectors
    found = np.zeros((len(contents), encoder.dim), np.float32)
    found[there] = vectors
    return found
