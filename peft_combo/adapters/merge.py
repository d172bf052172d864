"""Adapter merging (average, SVD, TIES, DARE): deltas combined, refactored as plain LoRA, measured beside parents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from peft_combo.adapters.deltas import MergeMethod, Spectrum, combine_changes, read_changes, relative
from peft_combo.adapters.lora_files import explain_unlike_backbones, write_lora
from peft_combo.adapters.validation import ValidationQueries, format_figures
from peft_combo.callbacks import RunCallback
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import LiveAdapter
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.errors import BackboneError, Fault, PeftComboError
from peft_combo.metrics.report import Gain, ResultRow
from peft_combo.recipe.task import BundleTask
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.manifest import list_versions
from peft_combo.store.versions import AdapterRecord

TIES_DENSITY = 0.2
"""Yadav et al. 2023 keep the largest fifth throughout, and find it robust (their section 6)."""
DARE_DENSITY = 0.5
"""The middle of the drop rates that Yu et al. 2024 choose from; what is dropped has to be made up for by scale."""


class MergeError(PeftComboError):
    """Adapters cannot be merged as asked."""


@dataclass(frozen=True)
class Merge:
    """What was merged and stored.

    Attributes:
        parents: reference and weight of each; the weights sum to one.
        density: share of values kept; None where the method keeps all.
        ranks: name of each changed module -> rank of its update.
        truncation: norm of what the ranks could not hold, over the norm of the whole merged change.
        rows: the frozen encoder, each parent, and last the merged one on the recipe's questions; empty if not measured.
        gain: of the merged over the frozen encoder; None if not measured.
    """

    record: AdapterRecord
    method: MergeMethod
    parents: tuple[tuple[str, float], ...]
    density: float | None
    ranks: dict[str, int]
    truncation: float
    rows: tuple[ResultRow, ...]
    gain: Gain | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "adapter": self.record.reference,
            "path": str(self.record.path),
            "method": self.method,
            "parents": [{"adapter": name, "weight": weight} for name, weight in self.parents],
            "density": self.density,
            "ranks": self.ranks,
            "truncation": self.truncation,
            "rows": [asdict(row) for row in self.rows],
            "gain": None if self.gain is None else asdict(self.gain),
            "notes": list(self.notes),
        }


@torch.no_grad()
def merge(
    parents: Sequence[LiveAdapter],
    backbone: Backbone,
    store: AdapterStore,
    into: str,
    *,
    method: MergeMethod = "average",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    validation: ValidationQueries | None = None,
    callback: RunCallback | None = None,
) -> Merge:
    """Store one adapter made of several, as the next version of the category `into`.

    Weights of the encoder are combined as `combine_changes` says and refactored: by ``average`` at whatever rank holds
    the mean exactly, otherwise at no more than `rank`. The heads' maps, which are added to the identity, are combined
    the same way and kept whole; what the heads multiply cosines by is averaged on a log scale.

    Args:
        weights: one a parent, above 0; only their ratios count. None weighs all alike.
        density: share of values that ``ties`` and ``dare`` keep; None takes the method's own.
        rank: most that an update may have; None takes, module by module, that of the widest parent. Not for
            ``average``.
        seed: for ``dare``.
        validation: measure frozen encoder, parents and result on these questions; None stores it as not measured.
    Raises:
        MergeError: the parents do not go together, an option does not fit the method, or nothing is left to store.
        BackboneError: a parent is no change of weights.
        StoreError: the store cannot be written.
    """
    callback = callback or RunCallback()
    shares = _check_shares(weights, len(parents))
    density = _check_density(method, density)
    if rank is not None and method == "average":
        raise MergeError("rank: average keeps the mean whole, at the rank it takes. Use the method svd to limit it.")
    if rank is not None and rank < 1:
        raise MergeError(f"rank: expected at least 1, found {rank}.")
    _refuse_unlike(parents)

    with store.writing(into) as draft:
        factors, truncation = _factor(parents, shares, method, density or 1.0, rank, seed, backbone, callback)
        head = _merge_head([one.head for one in parents], shares, method, density or 1.0, seed)
        manifests = [one.record.manifest for one in parents]
        attached = write_lora(draft.path, backbone, factors, head, manifests[0].backbone.max_length)
        ranks = {name: right.shape[0] for name, (_, right) in factors.items()}
        rows, gain = (
            ((), None) if validation is None else _measure(parents, attached, head, backbone, validation, callback)
        )
        notes = () if validation is None else tuple(_list_caveats(parents, validation))
        named = tuple((one.reference, share) for one, share in zip(parents, shares, strict=True))
        data = [m.data for m in manifests]
        record = draft.commit(
            {
                "method": f"merge-{method}",
                "stored_as": attached.stored_as,
                "task": head.spec(),
                "backbone": {**backbone.stamp(), "max_length": manifests[0].backbone.max_length},
                "recipe": {},
                "data": {
                    "name": f"merged from {', '.join(name for name, _ in named)}"[:1000],
                    # Where the parents learned from one split the result has seen its train part only.
                    "digest": data[0].digest if len({d.digest for d in data}) == 1 else "several",
                    "split_digest": data[0].split_digest if len({d.split_digest for d in data}) == 1 else "several",
                    "derived": {
                        "operation": "merge", "method": method, "density": density, "rank": rank,
                        "seed": seed if method == "dare" else None, "truncation": truncation,
                        "from": [
                            {"adapter": one.reference, "digest": one.digest, "weight": share}
                            for one, share in zip(parents, shares, strict=True)
                        ],
                    },
                },
                "metrics": {} if validation is None or gain is None else _build_metrics(rows, gain, validation, notes),
                "versions": list_versions(),
            }
        )  # fmt: skip
    return Merge(record, method, named, density, ranks, truncation, rows, gain, notes)


# --- what is refused --------------------------------------------------------------------------------------------------


def _check_shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if count < 2:
        raise MergeError(f"Expected at least 2 adapters to merge, found {count}.")
    if weights is None:
        return [1 / count] * count
    if len(weights) != count or not all(math.isfinite(w) and w > 0 for w in weights):
        told = ", ".join(f"{weight:g}" for weight in weights)
        raise MergeError(f"weights: expected {count} numbers above 0, one an adapter, found {told}.")
    return [weight / sum(weights) for weight in weights]


def _check_density(method: MergeMethod, density: float | None) -> float | None:
    own = {"ties": TIES_DENSITY, "dare": DARE_DENSITY}.get(method)
    if density is None:
        return own
    if own is None:
        raise MergeError(f"density: {method} keeps every value. A density goes with ties and dare.")
    if not 0 < density <= 1:
        raise MergeError(f"density: expected a share above 0 and at most 1, found {density:g}.")
    return density


def _refuse_unlike(parents: Sequence[LiveAdapter]) -> None:
    """Refuse, all reasons at once, what has no common scale to be combined on."""
    unlike = explain_unlike_backbones([one.record.manifest for one in parents])
    faults = [Fault("backbone", f"{said}.", "Tune one of them again with the other's.") for said in unlike]
    first, *others = parents
    for other in others:
        for name in ("projection", "pooling"):
            mine, theirs = (getattr(one.head.config, name) for one in (first, other))
            if mine != theirs:
                problem = f"{first.reference} has {name} {mine}, {other.reference} has {theirs}."
                faults.append(Fault("head", problem, f"Tune one of them again with the other's task.{name}."))
        if first.record.manifest.task.get("kind") != other.record.manifest.task.get("kind"):
            faults.append(Fault("task", f"{first.reference} and {other.reference} learned different tasks."))
    if faults:
        raise MergeError.from_faults("These adapters cannot be merged:", faults)


# --- combining --------------------------------------------------------------------------------------------------------


def _factor(
    parents: Sequence[LiveAdapter], shares: Sequence[float], method: MergeMethod, density: float, rank: int | None,
    seed: int, backbone: Backbone, callback: RunCallback,
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:  # fmt: skip
    """Return the factors of the combined change, by module, and the share of its norm that they leave out."""
    deltas = []
    for one in parents:
        try:
            changes = read_changes(one.attached)
        except BackboneError as error:
            raise BackboneError(f"{one.reference}: {error}") from error
        if changes.other:
            name = next(iter(changes.other))
            raise MergeError(
                f"{one.reference} also changes {len(changes.other)} biases, norms or embeddings ({name}), which a LoRA "
                "has no place for. Merge adapters of methods that change linear weights alone (lora, vera, loha ...)."
            )
        deltas.append(changes.linear)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    lost, whole = 0.0, 0.0
    result = combine_changes(deltas, shares, method, density, seed)
    callback.on_stage("Factoring", len(result))
    for name, delta in result.items():
        weight = backbone.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        spectrum = Spectrum.of(delta, weight.detach())
        kept = spectrum.rank()
        if method != "average":
            widest = rank or max(Spectrum.of(d[name], weight.detach()).rank() for d in deltas if name in d)
            kept = min(kept, widest)
        pair = spectrum.factors(kept)
        if kept:
            factors[name] = pair
        lost, whole = lost + spectrum.error(pair) ** 2, whole + spectrum.norm**2
        callback.on_advance(1)
    return factors, relative(math.sqrt(lost), math.sqrt(whole))


def _merge_head(
    heads: Sequence[BundleHead], shares: Sequence[float], method: MergeMethod, density: float, seed: int
) -> BundleHead:
    states = [{name: tensor.cpu() for name, tensor in head.state_dict().items()} for head in heads]
    scales = [float(state.pop("log_scale")) for state in states]
    state = combine_changes(states, shares, method, density, seed)
    state["log_scale"] = torch.tensor(sum(share * scale for share, scale in zip(shares, scales, strict=True)))
    # The first parent's other settings (temperature, negatives) were for training and say nothing of a merged head.
    first = heads[0].config
    spec = BundleTask(projection=first.projection, pooling=first.pooling).model_dump(mode="json")
    return BundleHead.from_spec({**spec, "dim": heads[0].dim}, state)


# --- measuring --------------------------------------------------------------------------------------------------------


def _measure(
    parents: Sequence[LiveAdapter], attached: AttachedAdapter, head: BundleHead, backbone: Backbone,
    validation: ValidationQueries, callback: RunCallback,
) -> tuple[tuple[ResultRow, ...], Gain]:  # fmt: skip
    callback.on_stage("Measuring", len(set(validation.texts)) * (2 + len(parents)))
    answered = {"frozen backbone": validation.ranks(
        BundleHead(backbone.dim, BundleTask()), backbone.encode(validation.texts, progress=callback.on_advance)
    )}  # fmt: skip
    compared: dict[str, tuple[AttachedAdapter, BundleHead]] = {
        **{one.reference: (one.attached, one.head) for one in parents}, "merged": (attached, head),
    }  # fmt: skip
    for name, (encoder, its_head) in compared.items():
        answered[name] = validation.ranks(
            its_head, backbone.encode(validation.texts, encoder, progress=callback.on_advance)
        )
    rows = tuple(validation.row(name, ranks) for name, ranks in answered.items())
    return rows, validation.gain(answered["frozen backbone"], answered["merged"])


def _list_caveats(parents: Sequence[LiveAdapter], validation: ValidationQueries) -> list[str]:
    found = {one.reference: validation.caveat(one.record.manifest) for one in parents}
    return [f"{name}: {said}." for name, said in found.items() if said]


def _build_metrics(
    rows: Sequence[ResultRow], gain: Gain, validation: ValidationQueries, notes: Sequence[str]
) -> Mapping[str, Any]:
    frozen, *parents, result = rows
    return {
        "before": format_figures(frozen),
        "after": format_figures(result),
        "baselines": {row.name: format_figures(row) for row in parents},
        "gain": {"value": gain.value, "low": gain.interval[0], "high": gain.interval[1], "p": gain.p},
        "protocol": " ".join((validation.protocol, *notes)),
    }
