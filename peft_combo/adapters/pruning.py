"""Pruning of an encoder: vocabulary cut to a catalogue's tokens, attention heads and layers taken out by importance.

Owns what is taken out and the tokenizer that fits what is left. Knows nothing of how good the rest is: `parity`
measures it, and an export refuses what has lost too much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_combo.callbacks import RunCallback
from peft_combo.encoder.architectures import (
    copy_sharing_weights,
    find_architecture,
    find_layers,
    lower_view,
    upper_view,
)
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.methods.attached import set_module
from peft_combo.encoder.vocabulary import cut_vocabulary
from peft_combo.errors import BackboneError

# Texts on which heads and layers are weighed: as many passes as there are heads, so few; drawn once.
_SAMPLE = 64


@dataclass(frozen=True)
class Pruning:
    """What to take out of an encoder.

    Attributes:
        vocabulary: the embeddings of tokens that no text of the catalogue has. Single characters stay, so any word can
            still be read, in smaller pieces; a text all of whose tokens stay has the same vector.
        heads: so many attention heads, those without which vectors change least.
        layers: so many layers, one after the other by the same measure.
    """

    vocabulary: bool = False
    heads: int = 0
    layers: int = 0

    def __post_init__(self) -> None:
        for name in ("heads", "layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, found {getattr(self, name)}.")

    def __bool__(self) -> bool:
        return self.vocabulary or self.heads > 0 or self.layers > 0

    @property
    def name(self) -> str:
        """What is taken out, in words."""
        parts = ["vocabulary"] if self.vocabulary else []
        parts += [
            f"{n} {what}{'s' if n > 1 else ''}" for n, what in ((self.heads, "head"), (self.layers, "layer")) if n
        ]
        return " and ".join(parts)


@torch.inference_mode()
def prune(
    backbone: Backbone, encoder: nn.Module, texts: Sequence[str], max_length: int, pruning: Pruning,
    callback: RunCallback | None = None,
) -> tuple[Backbone, tuple[str, ...]]:  # fmt: skip
    """Return an encoder without what is not needed, as a backbone of its own, and what was taken out in words.

    Args:
        backbone: whose tokenizer and pooling it has. encoder: with the adapter in its weights; left as it is.
        texts: the catalogue's, whose tokens stay and on which heads and layers are weighed.
    Raises:
        BackboneError: the tokenizer or the architecture does not allow it, or nothing would be left.
    Source: Michel et al. 2019, "Are sixteen heads really better than one?" (heads by ablation); Abdaoui et al. 2020,
        "Load what you need: smaller versions of multilingual BERT" (vocabulary).
    """
    callback = callback or RunCallback()
    model = copy_sharing_weights(encoder)
    drawn = np.random.default_rng(3).permutation(len(texts))[:_SAMPLE]
    ids, mask = backbone.tokenize([texts[row] for row in drawn], max_length).pad(np.arange(len(drawn)), backbone.pad_id)
    sample = ids.to(backbone.device), mask.to(backbone.device)
    notes = []
    if pruning.layers:
        notes.append(_take_layers(model, backbone, sample, pruning.layers, callback))
    if pruning.heads:
        notes.append(_take_heads(model, backbone, sample, pruning.heads, callback))
    tokenizer = backbone.tokenizer
    if pruning.vocabulary:
        tokenizer, note = cut_vocabulary(model, backbone, texts, max_length)
        notes.append(note)
    pruned = Backbone(
        backbone.name, model, tokenizer, backbone.pooling, max_length, fingerprint="pruned",
        text_prefix=backbone.text_prefix,
    )  # fmt: skip
    return pruned, tuple(notes)


# --- layers and heads -------------------------------------------------------------------------------------------------


def _encode(model: nn.Module, backbone: Backbone, sample: tuple[Tensor, Tensor]) -> Tensor:
    ids, mask = sample
    return backbone.pool(model(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


def _take_layers(
    model: nn.Module, backbone: Backbone, sample: tuple[Tensor, Tensor], count: int, callback: RunCallback
) -> str:
    """Take out layers one by one, each time the one whose absence changes vectors least."""
    architecture = find_architecture(model)
    depth = len(find_layers(model))
    if not architecture.splittable or count >= depth:
        raise BackboneError(
            f"--prune-layers {count}: {backbone.name} has {depth} layers, and at least one has to stay."
            if architecture.splittable
            else f"--prune-layers: the layers of {backbone.name} share their weights or states and cannot be taken out."
        )
    whole = _encode(model, backbone, sample)
    numbers = list(range(depth))
    left = list(find_layers(model))
    callback.on_stage("Weighing layers", sum(depth - n for n in range(count)))
    distance = 0.0
    for _ in range(count):
        trials = []
        for place in range(len(left)):
            set_module(model, architecture.layers, nn.ModuleList(left[:place] + left[place + 1 :]))
            trials.append(float((1 - (_encode(model, backbone, sample) * whole).sum(1)).mean()))
            callback.on_advance(1)
        place = int(np.argmin(trials))
        distance = trials[place]
        del left[place], numbers[place]
    set_module(model, architecture.layers, nn.ModuleList(left))
    config: Any = model.config
    config.num_hidden_layers = len(left)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in numbers]
    gone = sorted(set(range(depth)) - set(numbers))
    return f"took out layers {', '.join(map(str, gone))} of 0..{depth - 1} (1 - cosine {distance:.3f} on a sample)"


def _take_heads(
    model: nn.Module, backbone: Backbone, sample: tuple[Tensor, Tensor], count: int, callback: RunCallback
) -> str:
    """Take out the heads whose absence, one at a time, changes vectors least; one of each layer stays."""
    layers = find_layers(model)
    parts = [_find_attention(layer, backbone) for layer in layers]
    heads = [int(attention.num_attention_heads) for attention, _ in parts]
    if count > sum(heads) - len(heads):
        raise BackboneError(
            f"--prune-heads {count}: {backbone.name} has {sum(heads)} heads in {len(heads)} layers, and one of each "
            f"layer has to stay: at most {sum(heads) - len(heads)}."
        )
    whole = _encode(model, backbone, sample)
    ids, mask = sample
    callback.on_stage("Weighing heads", sum(heads))
    lost: dict[tuple[int, int], float] = {}
    for number, (attention, out) in enumerate(parts):
        below = lower_view(model, number)(input_ids=ids, attention_mask=mask).last_hidden_state
        above = upper_view(model, number)
        width, kept = int(attention.attention_head_size), out.weight
        for head in range(heads[number]):
            weight = kept.clone()
            weight[:, head * width : (head + 1) * width] = 0
            out.weight = nn.Parameter(weight, requires_grad=False)
            vectors = backbone.pool(above(inputs_embeds=below, attention_mask=mask).last_hidden_state, mask)
            lost[number, head] = float((1 - (vectors * whole).sum(1)).mean())
            callback.on_advance(1)
        out.weight = kept
    gone: dict[int, list[int]] = {}
    for number, head in sorted(lost, key=lambda one: lost[one]):
        own = gone.setdefault(number, [])
        if sum(map(len, gone.values())) < count and len(own) < heads[number] - 1:
            own.append(head)
    for number, own in gone.items():
        _cut_heads(*parts[number], own)
    distance = float((1 - (_encode(model, backbone, sample) * whole).sum(1)).mean())
    left = "/".join(str(heads[number] - len(gone.get(number, []))) for number in range(len(heads)))
    return f"took out {count} of {sum(heads)} heads, {left} left by layer (1 - cosine {distance:.3f} on a sample)"


def _find_attention(layer: nn.Module, backbone: Backbone) -> tuple[Any, nn.Linear]:
    """Return a layer's self-attention, as BERT and its kin have it, and the linear module behind it."""
    try:
        attention, out = layer.get_submodule("attention.self"), layer.get_submodule("attention.output.dense")
    except AttributeError:
        attention, out = None, None
    if not hasattr(attention, "attention_head_size") or not isinstance(out, nn.Linear):
        raise BackboneError(
            f"--prune-heads knows the attention of BERT, RoBERTa, XLM-R, CamemBERT and ELECTRA, and {backbone.name} is "
            f"a {backbone.model_type}. Take --prune-layers or --prune-vocabulary."
        )
    return attention, out


def _cut_heads(attention: Any, out: nn.Linear, gone: list[int]) -> None:
    width = int(attention.attention_head_size)
    left = [head for head in range(int(attention.num_attention_heads)) if head not in gone]
    rows = torch.cat([torch.arange(head * width, (head + 1) * width) for head in left]).to(out.weight.device)
    for name in ("query", "key", "value"):
        setattr(attention, name, _take_rows(getattr(attention, name), rows))
    smaller = nn.Linear(len(rows), out.out_features, device="meta")
    smaller.weight = nn.Parameter(out.weight[:, rows].clone(), requires_grad=False)
    smaller.bias = out.bias
    out.in_features, out.weight = len(rows), smaller.weight
    attention.num_attention_heads, attention.all_head_size = len(left), len(rows)


def _take_rows(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    smaller = nn.Linear(linear.in_features, len(rows), device="meta")
    smaller.weight = nn.Parameter(linear.weight[rows].clone(), requires_grad=False)
    smaller.bias = nn.Parameter(linear.bias[rows].clone(), requires_grad=False)
    return smaller
