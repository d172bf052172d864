"""Vocabulary of an encoder cut to the tokens of some texts: the rows of its embeddings that no text needs are left out.

Owns the tokenizer that fits what is left, and the check that it reads those texts as before.
Source: Abdaoui et al. 2020, "Load what you need: smaller versions of multilingual BERT".
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from peft_combo.encoder.architectures import copy_sharing_weights
from peft_combo.encoder.backbone import Backbone
from peft_combo.errors import BackboneError


def cut_backbone(backbone: Backbone, texts: Sequence[str]) -> Backbone:
    """Return an encoder with the embeddings of the texts' tokens alone, single characters beside them.

    Texts of these tokens have the same vectors, so it keeps the fingerprint and takes the same adapters; a text with
    other tokens is read in smaller pieces, and its vector is another one.

    Raises:
        BackboneError: the tokenizer does not allow it.
    """
    fingerprint = backbone.fingerprint  # of the whole
    model = copy_sharing_weights(backbone.model)
    tokenizer, note = cut_vocabulary(model, backbone, texts, backbone.max_length)
    if backbone.quantization == "none":  # off the file they are mapped from, which holds the whole table
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    cut = Backbone(
        backbone.name, model, tokenizer, backbone.pooling, backbone.max_length, backbone.quantization, fingerprint,
        (*backbone.notes, f"Vocabulary cut to the catalogue's: {note}."), backbone.text_prefix,
    )  # fmt: skip
    cut.is_cut, cut.pictures = True, backbone.pictures
    return cut


def cut_vocabulary(model: nn.Module, backbone: Backbone, texts: Sequence[str], max_length: int) -> tuple[Any, str]:
    """Keep the embeddings of the catalogue's tokens; return the tokenizer that knows no others."""
    from transformers import AutoTokenizer

    tokenizer = backbone.tokenizer
    if not tokenizer.is_fast:
        raise BackboneError(f"Cutting the vocabulary needs a tokenizer.json, and {backbone.name} has none.")
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
        raise BackboneError(
            f"Cutting the vocabulary: the padding token of {backbone.name} is not among its first tokens."
        )
    _check_tokens(backbone, smaller, texts, max_length, places)
    return smaller, f"kept {len(rows):,} of {before:,} tokens"


def _keep_tokens(content: dict[str, Any], wanted: set[int], backbone: Backbone) -> dict[int, int]:
    """Cut a tokenizer.json to the wanted tokens and all single characters; return old id -> new id, in order."""
    model = content["model"]
    kind = model.get("type")
    if kind not in ("WordPiece", "Unigram", "WordLevel"):
        raise BackboneError(
            "Cutting the vocabulary knows WordPiece, Unigram and WordLevel, whose words read the same without the "
            f"tokens they do not use; {backbone.name} has {kind}."
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
            f"Cutting the vocabulary: the tokenizer of {backbone.name} reads texts otherwise once it is cut."
        )
