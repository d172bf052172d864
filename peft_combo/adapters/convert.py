"""Conversion to LoRA of adapters of other methods: the same vectors from files that any LoRA runtime takes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_combo.adapters.deltas import Spectrum, read_changes, relative
from peft_combo.adapters.lora_files import write_lora
from peft_combo.callbacks import RunCallback
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import LiveAdapter
from peft_combo.encoder.methods.attached import CONFIG_FILE
from peft_combo.errors import BackboneError, Fault, PeftComboError
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.manifest import list_versions
from peft_combo.store.versions import AdapterRecord

MAX_ERROR = 1e-5
"""Of an update's norm: what is left out is within what float32 loses on the way through an encoder."""

# Vectors of an exact conversion differ by the order of additions; the same bound as for an adapter read back.
_SAME_VECTORS = 1e-4


class ConvertError(PeftComboError):
    """An adapter cannot be served as LoRA within the wanted error."""


@dataclass(frozen=True)
class Conversion:
    """What was converted and stored.

    Attributes:
        ranks: name of each changed module -> rank of its update.
        error: largest share of an update's norm that was left out, as measured on the stored factors.
        difference: largest difference in a component of the vector of a text, of `texts` different ones.
        bytes_before, bytes_after: of the stored files, heads included. bytes_merged: of the changed weights themselves
            in float32; where it is less, an update of so high a rank is better merged.
    """

    record: AdapterRecord
    source: str
    ranks: dict[str, int]
    error: float
    difference: float
    texts: int
    bytes_before: int
    bytes_after: int
    bytes_merged: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "record": self.record.reference, "path": str(self.record.path)}


def is_plain_lora(record: AdapterRecord) -> bool:
    """Say whether a stored adapter is plain LoRA already; AdaLoRA and PiSSA are stored so."""
    if record.manifest.stored_as != "lora":
        return False
    config = json.loads(record.read(CONFIG_FILE))
    return not (config.get("use_dora") or config.get("bias", "none") != "none")


@torch.no_grad()
def convert(
    live: LiveAdapter,
    backbone: Backbone,
    store: AdapterStore,
    *,
    texts: Sequence[str],
    rank: int | None = None,
    max_error: float = MAX_ERROR,
    callback: RunCallback | None = None,
) -> Conversion:
    """Store an adapter as plain LoRA, as the next version of its category, and measure how near it is.

    Each update is factored by singular values at the smallest rank that leaves out at most `max_error` of its norm, or
    no more than the rounding of the weight it is added to.

    Args:
        texts: encoded by both, to measure the difference.
        rank: refuse an update that needs more; None takes whatever is needed.
    Raises:
        ConvertError: the adapter is plain LoRA or a head alone, changes what LoRA has no place for, or needs a higher
            rank.
        BackboneError: it is no change of weights.
        StoreError: the store cannot be written.
    """
    callback = callback or RunCallback()
    if not texts:
        raise ConvertError("Expected texts to measure the difference on, found none. Name a file with --texts.")
    if rank is not None and rank < 1:
        raise ConvertError(f"rank: expected at least 1, found {rank}.")
    if not 0 < max_error < 1:
        raise ConvertError(f"max_error: expected a share above 0 and below 1, found {max_error:g}.")
    if is_plain_lora(live.record):
        raise ConvertError(f"{live.reference} is plain LoRA already: nothing to convert.")
    factors, error = _factor(live, backbone, rank, max_error, callback)

    manifest = live.record.manifest
    with store.writing(manifest.category) as draft:
        attached = write_lora(draft.path, backbone, factors, live.head, manifest.backbone.max_length)
        distinct = list(dict.fromkeys(texts))
        callback.on_stage("Comparing vectors", 2 * len(distinct))
        ours, theirs = (
            backbone.encode(distinct, one, progress=callback.on_advance) for one in (live.attached, attached)
        )
        difference = float(np.abs(ours - theirs).max())
        exact = max_error <= MAX_ERROR
        if exact and not difference <= _SAME_VECTORS:
            raise ConvertError(
                f"{live.reference} as LoRA gives other vectors (difference {difference:.1e}, allowed "
                f"{_SAME_VECTORS:.0e}); nothing was stored. Lower --max-error."
            )
        fields: dict[str, Any] = {
            "method": manifest.method,
            "stored_as": "lora",
            "task": manifest.task,
            "backbone": manifest.backbone,
            "recipe": manifest.recipe,
            "data": {
                **manifest.data.model_dump(mode="json"),
                "derived": {
                    "operation": "convert", "from": [{"adapter": live.reference, "digest": live.digest}],
                    "max_error": max_error, "error": error, "vector_difference": difference, "texts": len(distinct),
                },
            },
            "metrics": manifest.metrics if exact else {},  # equal vectors, equal figures
            "versions": list_versions(),
        }  # fmt: skip
        if manifest.imported is not None:
            fields["imported"] = manifest.imported
        record = draft.commit(fields)
    sizes = [sum(entry.bytes for entry in one.manifest.files.values()) for one in (live.record, record)]
    ranks = {name: right.shape[0] for name, (_, right) in factors.items()}
    merged = sum(4 * left.shape[0] * right.shape[1] for left, right in factors.values())
    return Conversion(record, live.reference, ranks, error, difference, len(distinct), sizes[0], sizes[1], merged)


def _factor(
    live: LiveAdapter, backbone: Backbone, rank: int | None, max_error: float, callback: RunCallback
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Return the factors of each update, and the largest share of a norm they leave out."""
    try:
        changes = read_changes(live.attached)
    except BackboneError as error:
        raise BackboneError(f"{live.reference} cannot be served as LoRA. {error}") from error
    if changes.other:
        names = list(changes.other)
        raise ConvertError(
            f"{live.reference} ({live.record.manifest.method}) also changes {len(names)} biases, norms or embeddings, "
            f"which a LoRA has no place for: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}. Serve it as it "
            f"is, or merged: peft-combo adapters export {live.reference} --to FOLDER"
        )
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    faults = []
    worst = 0.0
    callback.on_stage("Factoring", len(changes.linear))
    for name, delta in changes.linear.items():
        weight = backbone.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        spectrum = Spectrum.of(delta, weight.detach())
        needed = spectrum.rank(max_error)
        if rank is not None and needed > rank:
            left_out = math.sqrt(float(spectrum.values[rank:].square().sum())) / spectrum.norm
            faults.append(Fault(name, f"needs rank {needed}; at {rank} it loses {left_out:.1e} of its norm."))
        elif needed:
            factors[name] = spectrum.factors(needed)
            worst = max(worst, relative(spectrum.error(factors[name]), spectrum.norm))
        callback.on_advance(1)
    if faults:
        title = (
            f"{live.reference} is no LoRA of rank {rank} within an error of {max_error:g}. Raise --rank or --max-error:"
        )
        raise ConvertError.from_faults(title, faults, limit=5)
    if not factors:
        raise ConvertError(f"{live.reference} changes no weight: nothing to convert.")
    return factors, worst
