"""Digest of a dataset: sha256 over its items, interactions and bundles; equal digests mean equal data."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from peft_combo.data.model import Bundles, Catalog, Interactions


def compute_digest(catalog: Catalog, interactions: Interactions | None, bundles: Bundles) -> str:
    """Hash every column under its name, as JSON for text and little-endian bytes for numbers."""
    total = hashlib.sha256(b"peft-combo dataset 1\n")

    def text(name: str, values: Any) -> None:
        total.update(f"{name}\n".encode())
        total.update(json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))

    def numbers(name: str, values: NDArray[Any]) -> None:
        little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
        total.update(f"{name} {little.dtype.str} {little.shape}\n".encode())
        # Every NaN is written alike: its sign and payload bits differ between platforms.
        total.update((np.where(np.isnan(little), np.nan, little) if little.dtype.kind == "f" else little).tobytes())

    text("item_ids", catalog.item_ids)
    text("titles", catalog.titles)
    text("categories", catalog.categories)
    text("slots", catalog.slots)
    numbers("prices", catalog.prices)
    text("descriptions", catalog.descriptions)
    text("attributes", {name: catalog.attributes[name] for name in sorted(catalog.attributes)})
    if catalog.pictures:  # by their names and not their bytes: those of a folder are not read for this
        text("pictures", [picture and picture.key for picture in catalog.pictures])
    if interactions is not None:
        text("user_ids", interactions.user_ids)
        for name in ("users", "items", "weights", "times", "baskets"):
            numbers(name, getattr(interactions, name))
    text("bundle_ids", bundles.bundle_ids)
    numbers("sizes", bundles.sizes)
    numbers("members", np.concatenate([np.empty(0, np.int32), *bundles.items]))
    text("names", bundles.names)
    text("owners", bundles.owners)
    numbers("bundle_times", bundles.times)
    text("groups", bundles.groups)
    numbers("bundle_baskets", bundles.baskets)
    if bundles.intents != bundles.names:  # data that tells no intents beside names keeps the digest it had before
        text("intents", bundles.intents)
    return total.hexdigest()
