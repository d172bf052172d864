"""Fixed encoder: one adapter version (or none) on one backbone, here or in the process of a worker.

Owns what vectors depend on, which is the name they are kept under, and how a worker elsewhere comes to the same
encoder: it is told names and digests, loads by itself, and refuses where it would have loaded something else.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.errors import StoreError
from peft_combo.files import literal_path
from peft_combo.store.adapter_store import AdapterStore


@dataclass(frozen=True)
class FixedEncoder:
    """Who encodes, fetched once, so that a refresh of the bank cannot come between.

    Attributes:
        reference: the adapter's version; None is the frozen encoder.
        fields: all that vectors depend on; `key` is their digest.
    """

    backbone: Backbone
    attached: AttachedAdapter | None
    fields: dict[str, str | int | None]
    reference: str | None
    store: str

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.backbone.dim

    @cached_property
    def key(self) -> str:
        """sha256 of `fields`: the name under which vectors are kept."""
        return hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> NDArray[np.float32]:
        """Return the vectors of texts, (B, D), rows of unit length."""
        return self.backbone.encode(texts, self.attached, progress=progress)

    def build_share(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return what `encode_share` is given to encode these texts somewhere else."""
        return {"encoder": self._told, "texts": list(texts)}

    @cached_property
    def _told(self) -> str:
        backbone = self.backbone
        folder = literal_path(backbone.name)
        return json.dumps(
            {
                "model": str(folder.resolve()) if folder.is_dir() else backbone.name, "pooling": backbone.pooling,
                "max_length": backbone.max_length, "quantization": backbone.quantization, "store": self.store,
                "reference": self.reference, "key": self.key, "text_prefix": backbone.text_prefix,
            }
        )  # fmt: skip


def find_encoder(bank: AdapterBank, reference: str | None) -> FixedEncoder:
    """Return what a reference means in a bank at this moment; None is the frozen encoder.

    Raises:
        StoreError: the adapter cannot be had.
    """
    live = None if reference is None else bank.get(reference)
    backbone = bank.backbone
    fields: dict[str, str | int | None] = {
        "adapter": None if live is None else live.digest,
        # The fingerprint is of the weights alone; these three change vectors too.
        "backbone": backbone.fingerprint,
        "pooling": backbone.pooling,
        "max_length": backbone.max_length if live is None else live.attached.max_length,
        "quantization": backbone.quantization,
    }
    return FixedEncoder(
        backbone, None if live is None else live.attached, fields, None if live is None else live.reference,
        str(bank.store.path.absolute()),
    )  # fmt: skip


def encode_share(share: Mapping[str, Any]) -> NDArray[np.float32]:
    """Encode the texts of a share (`FixedEncoder.build_share`) in the process of a worker.

    The encoder is loaded at the first share, onto the GPU where there is one, and stays.

    Returns:
        (B, D) float32.
    Raises:
        StoreError: the adapter is not stored where this worker runs, or anything there is not the same.
        BackboneError: the encoder cannot be loaded here.
    """
    return _open_encoder(share["encoder"]).encode(share["texts"])


@lru_cache(maxsize=1)
def _open_encoder(told: str) -> FixedEncoder:
    if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        torch.set_num_threads(int(threads))  # a program that had loaded torch before it was told reads no environment
    wanted = json.loads(told)
    backbone = Backbone.load(
        wanted["model"], pooling=wanted["pooling"], max_length=wanted["max_length"],
        quantization=wanted["quantization"], text_prefix=wanted["text_prefix"],
    )  # fmt: skip
    found = find_encoder(AdapterBank(backbone, AdapterStore(wanted["store"])), wanted["reference"])
    if found.key != wanted["key"]:
        raise StoreError(
            f"The worker on {socket.gethostname()} has another encoder or another {wanted['reference'] or 'base'} than "
            f"who asked it ({wanted['model']}, {wanted['store']}): its vectors would not fit the others. Put the same "
            "files there, or on a disk that all machines see."
        )
    return found
