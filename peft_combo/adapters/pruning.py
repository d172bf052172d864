"""Pruning of an encoder: vocabulary cut to a catalogue's tokens, attention heads and layers taken out by importance.

Owns what is taken out and the tokenizer that fits what is left. Knows nothing of how good the rest is: `parity`
measures it, and an export refuses what has lost too much.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
        tokenizer, note = _cut_vocabulary(model, backbone, texts, max_length)
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


# --- vocabulary -------------------------------------------------------------------------------------------------------


def _cut_vocabulary(model: nn.Module, backbone: Backbone, texts: Sequence[str], max_length: int) -> tuple[Any, str]:
    """Keep the embeddings of the catalogue's tokens; return the tokenizer that knows no others."""
    from transformers import AutoTokenizer

    tokenizer = backbone.tokenizer
    if not tokenizer.is_fast:
        raise BackboneError(f"--prune-vocabulary needs a tokenizer.json, and {backbone.name} has none.")
    used = np.unique(backbone.tokenize(list(texts), max_length).ids)
    with tempfile.TemporaryDirectory(prefix="vocabulary-") as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        places = _keep_tokens(content, {int(token) for token in used} | set(tokenizer.all_special_ids), backbone)
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        (Path(folder) / "vocab.txt").unlink(missing_ok=True)  # where there is one, it would be read before the rest
        smaller = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    config: Any = model.config
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    before = embedding.num_embeddings
    rows = torch.tensor(list(places), device=embedding.weight.device)
    table = nn.Embedding(len(rows), embedding.embedding_dim, device="meta")
    table.weight = nn.Parameter(embedding.weight[rows].clone(), requires_grad=False)
    table.padding_idx = None if embedding.padding_idx is None else places[embedding.padding_idx]
    model.set_input_embeddings(table)  # type: ignore[operator]
    config.vocab_size = len(rows)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, places.get(getattr(config, name)))
    if table.padding_idx != embedding.padding_idx:  # RoBERTa's kin count positions from it
        raise BackboneError(f"--prune-vocabulary: the padding token of {backbone.name} is not among its first tokens.")
    _check_tokens(backbone, smaller, texts, max_length, places)
    return smaller, f"kept {len(rows):,} of {before:,} tokens"


def _keep_tokens(content: dict[str, Any], wanted: set[int], backbone: Backbone) -> dict[int, int]:
    """Cut a tokenizer.json to the wanted tokens and all single characters; return old id -> new id, in order."""
    model = content["model"]
    kind = model.get("type")
    if kind not in ("WordPiece", "Unigram", "WordLevel"):
        raise BackboneError(
            "--prune-vocabulary knows WordPiece, Unigram and WordLevel, whose words read the same without the tokens "
            f"they do not use; {backbone.name} has {kind}."
        )
    words = {word: n for n, (word, _) in enumerate(model["vocab"])} if kind == "Unigram" else dict(model["vocab"])
    prefix = "▁" if kind == "Unigram" else model.get("continuing_subword_prefix", "")
    added = {entry["content"]: int(entry["id"]) for entry in content["added_tokens"]}
    kept = wanted | {number for word, number in words.items() if len(word.removeprefix(prefix)) <= 1}
    kept |= {number for word, number in added.items() if word not in words or number in wanted}
    if kind == "Unigram" and model.get("unk_id") is not None:
        kept.add(int(model["unk_id"]))
    places = {old: new for new, old in enumerate(sorted(kept))}
    if kind == "Unigram":
        model["vocab"] = [pair for number, pair in enumerate(model["vocab"]) if number in places]
        if model.get("unk_id") is not None:
            model["unk_id"] = places[int(model["unk_id"])]
    else:
        model["vocab"] = {word: places[number] for word, number in words.items() if number in places}
    content["added_tokens"] = [
        {**entry, "id": places[int(entry["id"])]} for entry in content["added_tokens"] if int(entry["id"]) in places
    ]
    content["truncation"] = content["padding"] = None
    content["post_processor"] = _move_ids(content.get("post_processor"), places)
    return places


def _move_ids(part: Any, places: dict[int, int]) -> Any:
    """Return a post-processor with every token id where it is now: "ids": [101] and ["[SEP]", 102]."""
    if isinstance(part, dict):
        return {
            key: [places[number] for number in value] if key == "ids" else _move_ids(value, places)
            for key, value in part.items()
        }
    if isinstance(part, list):
        if len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], int):
            return [part[0], places[part[1]]]
        return [_move_ids(one, places) for one in part]
    return part


def _check_tokens(
    backbone: Backbone, smaller: Any, texts: Sequence[str], max_length: int, places: dict[int, int]
) -> None:
    """Refuse a tokenizer that reads the catalogue otherwise than before."""
    twin = Backbone(
        backbone.name, backbone.model, smaller, backbone.pooling, max_length, fingerprint="pruned",
        text_prefix=backbone.text_prefix,
    )  # fmt: skip
    before, after = (one.tokenize(list(texts), max_length) for one in (backbone, twin))
    moved = np.array([places.get(int(token), -1) for token in before.ids], np.int64)
    if not (np.array_equal(before.offsets, after.offsets) and np.array_equal(moved, after.ids)):
        raise BackboneError(
            f"--prune-vocabulary: the tokenizer of {backbone.name} reads texts otherwise once its vocabulary is cut."
        )
