"""Warm start of a new category: stored adapters compared on its validation queries, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.adapters.validation import LEARNED, METRIC, ValidationQueries
from peft_combo.callbacks import RunCallback
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.errors import StoreError
from peft_combo.metrics.report import Gain, ResultRow
from peft_combo.recipe.task import BundleTask
from peft_combo.store.adapter_store import AdapterStore

SURE = 0.05
"""Advice needs a paired test below this, multiplied by the number of rows: the best of many is lucky."""


@dataclass(frozen=True)
class Start:
    """One adapter under one head, on the new category's questions.

    Attributes:
        head: its own, or the untrained one, which is cosine.
        gain: over the frozen encoder, question by question.
        alignment: see `measure_alignment`; of the adapter's vectors, so the same for both heads.
        caveat: what flatters it here; "" where nothing does.
    """

    adapter: str
    head: Literal["own", "identity"]
    row: ResultRow
    gain: Gain
    alignment: float
    caveat: str


@dataclass(frozen=True)
class Transfer:
    """What `transfer` found.

    Attributes:
        frozen: the encoder without adapter, and its `measure_alignment`.
        starts: best first.
        advised: what to hand to `tune --from`; None where nothing is surely better than the frozen encoder.
        protocol: how the figures came about.
        notes: adapters that were left out, and why.
    """

    frozen: ResultRow
    frozen_alignment: float
    starts: tuple[Start, ...]
    advised: str | None
    protocol: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def transfer(
    validation: ValidationQueries,
    backbone: Backbone,
    store: AdapterStore,
    references: Sequence[str] | None = None,
    callback: RunCallback | None = None,
) -> Transfer:
    """Ask stored adapters the validation questions of a category that none of them was tuned for.

    Args:
        references: adapters to try; None tries the newest of every category that fits the encoder.
    Raises:
        StoreError: an adapter that was named cannot be had, or none is left to try.
    """
    callback = callback or RunCallback()
    notes: list[str] = []
    tried = _find_fitting(store, backbone, notes) if references is None else list(dict.fromkeys(references))
    if not tried:
        raise StoreError(" ".join((f"No adapter in {store.path}/ to start from.", *notes)))
    bank = AdapterBank(backbone, store)
    identity = BundleHead(backbone.dim, BundleTask()).eval()
    callback.on_stage("Encoding the catalogue", len(set(validation.texts)) * (1 + len(tried)))
    members = validation.dataset.bundles.to_csr(len(validation.texts), validation.parts.train)

    vectors = backbone.encode(validation.texts, progress=callback.on_advance)
    before = validation.ranks(identity, vectors)
    frozen, frozen_alignment = validation.row("frozen backbone", before), measure_alignment(vectors, members)
    starts = []
    for reference in tried:
        live = bank.get(reference)
        vectors = backbone.encode(validation.texts, live.attached, progress=callback.on_advance)
        aligned, caveat = measure_alignment(vectors, members), validation.caveat(live.record.manifest)
        heads: tuple[tuple[Literal["own", "identity"], BundleHead], ...] = (("own", live.head), ("identity", identity))
        for name, head in heads:
            ranks = validation.ranks(head, vectors)
            row = validation.row(live.reference, ranks)
            starts.append(Start(live.reference, name, row, validation.gain(before, ranks), aligned, caveat))
    starts.sort(key=lambda start: -start.row.values[METRIC])
    better = [s.adapter for s in starts if s.gain.value > 0 and s.gain.p * len(starts) < SURE and s.caveat != LEARNED]
    return Transfer(
        frozen, frozen_alignment, tuple(starts), better[0] if better else None, validation.protocol, tuple(notes)
    )  # fmt: skip


def _find_fitting(store: AdapterStore, backbone: Backbone, notes: list[str]) -> list[str]:
    """Return the newest version of each category that was tuned on this encoder, and note the others."""
    newest = {record.category: record for record in store.list()}  # of a category the oldest comes first
    found = []
    for record in newest.values():
        stamp = record.manifest.backbone
        if stamp.fingerprint != backbone.fingerprint:
            notes.append(f"{record.reference} was left out: it was tuned on another encoder, {stamp.model}.")
        elif stamp.pooling != backbone.pooling:
            notes.append(f"{record.reference} was left out: it pools by {stamp.pooling}, not {backbone.pooling}.")
        else:
            found.append(record.reference)
    return found


def measure_alignment(vectors: NDArray[np.float32], members: sparse.csr_matrix[Any]) -> float:
    """Say how far items that share a bundle are alike as vectors: linear CKA with the membership of bundles.

    Only items of some bundle count. It needs no question and no head, and compares adapters on one catalogue alone.

    Args:
        vectors: (N, D). members: (B, N), of training bundles.
    Returns:
        from 0 to 1, higher is better; 0 where there is nothing to compare.
    Source: Kornblith et al. 2019, "Similarity of neural network representations revisited", section 3.
    """
    inside = np.flatnonzero(np.diff(members.tocsc().indptr))
    if len(inside) < 2:
        return 0.0
    x = vectors[inside].astype(np.float64)
    x -= x.mean(0)
    y = sparse.csr_array(members[:, inside].T.astype(np.float64))  # (n, B)
    shared = y.T @ x  # (B, D); centring x centres the product
    gram = sparse.csr_array(y @ y.T)  # (n, n), how many bundles two items share
    sums = np.asarray(gram.sum(axis=1)).ravel()
    # ||H G H||^2 for the centring matrix H, without making the centred gram, which is dense.
    spread = (
        float(gram.multiply(gram).sum()) - 2 * float(sums @ sums) / len(sums) + (float(sums.sum()) / len(sums)) ** 2
    )
    whole = float(np.linalg.norm(x.T @ x)) * float(np.sqrt(max(spread, 0.0)))
    return float(np.square(shared).sum()) / whole if whole > 0 else 0.0
