"""Encoder for serving: texts to vectors by torch, ONNX Runtime, in 8 bits, or with a pruned vocabulary.

Owns which engine answers which text, the folder that keeps it from one start to the next, and that none is opened that
lost more than the gate allows. The exports are `export`'s, how near they are is `parity`'s.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from peft_combo.adapters.export import Format, choose_gate, export, run_torch
from peft_combo.adapters.export_folder import MANIFEST, REPORT, ExportSource, read_back
from peft_combo.adapters.onnx_graph import Run, open_session, require_onnx
from peft_combo.adapters.parity import ParityRow
from peft_combo.adapters.pruning import Pruning
from peft_combo.callbacks import RunCallback
from peft_combo.data.queries import Queries
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import LiveAdapter
from peft_combo.encoder.tokens import Tokens, chunk_by_length
from peft_combo.files import literal_path

EncoderKind = Literal["torch", "onnx", "int8", "pruned"]

_FORMATS: dict[EncoderKind, Format] = {"onnx": "onnx", "int8": "onnx-int8", "pruned": "onnx"}


@dataclass(frozen=True, eq=False)
class Engine:
    """Token ids in, unit vectors out.

    Attributes:
        places: (V,) what the engine calls each id of the tokenizer, -1 for one it does not know; None for the same.
        pad_id: its padding.
    """

    run: Run
    pad_id: int
    places: NDArray[np.int32] | None = None

    def select(self, tokens: Tokens) -> NDArray[np.int64]:
        """Return the texts all of whose tokens it knows."""
        if self.places is None or not len(tokens):
            return np.arange(len(tokens))
        known = np.minimum.reduceat(self.places[tokens.ids], tokens.offsets[:-1]) >= 0  # no text is without tokens
        return np.flatnonzero(known)

    def translate(self, tokens: Tokens) -> Tokens:
        """Return the tokens by its own ids."""
        return tokens if self.places is None else Tokens(self.places[tokens.ids], tokens.offsets)


class ServingEncoder:
    """Texts in, unit vectors out; any number of threads may call it.

    Attributes:
        kind: how. folder: where it is kept; None for torch.
        rows: torch first, then what is used, as measured when it was made; empty for torch, which is the measure.
    """

    def __init__(
        self, kind: EncoderKind, reader: Backbone, engines: Sequence[Engine], folder: Path | None = None,
        rows: tuple[ParityRow, ...] = (),
    ) -> None:  # fmt: skip
        self.kind: EncoderKind = kind
        self.folder = folder
        self.rows = rows
        self._reader, self._engines = reader, tuple(engines)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode texts, equal ones once; each by the first engine that knows all its tokens, the last knows all.

        Returns:
            (B, D) float32, rows of unit length.
        """
        distinct = dict.fromkeys(texts)
        rows = {text: row for row, text in enumerate(distinct)}
        tokens = self._reader.tokenize(list(distinct))
        vectors = np.empty((len(distinct), self._reader.dim), np.float32)
        left = np.ones(len(distinct), bool)
        for engine in self._engines:
            own = engine.select(tokens)
            own = own[left[own]]
            left[own] = False
            translated = engine.translate(tokens)
            for chunk in chunk_by_length(tokens.lengths[own]):
                ids, mask = translated.pad(own[chunk], engine.pad_id)
                vectors[own[chunk]] = engine.run(ids.numpy(), mask.numpy())
        return vectors[[rows[text] for text in texts]]


def open_encoder(
    kind: EncoderKind, backbone: Backbone, live: LiveAdapter | None, *, folder: str | Path | None = None,
    texts: Sequence[str] = (), questions: Queries | None = None, min_agreement: float | None = None,
    max_ndcg_loss: float | None = None, pruning: Pruning | None = None, threads: int | None = None,
    callback: RunCallback | None = None,
) -> ServingEncoder:  # fmt: skip
    """Open the encoder that a service answers queries by; item vectors may stay those of torch.

    What is not torch is made by `adapters.export` at its first start, measured against torch on `texts`, and kept in
    `folder`; later starts check its files' sha256 and the figures it was stored with.

    Args:
        kind: ``torch``: as `Backbone.encode`. ``onnx``: one graph in full precision. ``int8``: the quickest 8-bit
            scheme that passes. ``pruned``: a graph whose vocabulary is cut to the tokens of `texts`; a
            text with others is left to torch, since read in smaller pieces it would get another vector.
        live: the adapter; None for the frozen encoder.
        folder: where encoders are kept, one folder each; needed for all but torch.
        texts: the catalogue's, row by row; at least 50 different ones. questions: validation queries over its rows.
        min_agreement, max_ndcg_loss: the gate; None takes the usual ones of `adapters.export`.
        pruning: of ``pruned``; None cuts the vocabulary alone, which changes no vector of the catalogue.
        threads: of an operator; None takes as many as torch has.
    Raises:
        ExportError: it loses more than the gate allows, in words and figures. OnnxMissing: the extra is not installed.
        BackboneError: the encoder cannot be written as a graph or pruned.
    """
    source = ExportSource.of(live, backbone)
    length = source.attached.max_length
    reader = Backbone(
        backbone.name, backbone.model, backbone.tokenizer, backbone.pooling, length, fingerprint="serving",
        text_prefix=backbone.text_prefix,
    )  # fmt: skip
    whole = Engine(run_torch(backbone, source.attached.encoder), backbone.pad_id)
    if kind == "torch":
        return ServingEncoder(kind, reader, [whole])
    if folder is None:
        raise ValueError(f"folder: expected the place where the {kind} encoder is kept, found None.")
    require_onnx()
    wanted = (pruning or Pruning(vocabulary=True)) if kind == "pruned" else Pruning()
    identity = {
        "adapter_digest": source.digest,
        "base": backbone.fingerprint,
        "pooling": backbone.pooling,
        "max_length": length,
        "format": _FORMATS[kind],
        "pruned": wanted.name,
        "texts": hashlib.sha256("\n".join(sorted(set(texts))).encode("utf-8", "surrogatepass")).hexdigest(),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    place = literal_path(folder).resolve() / f"{kind}-{key[:20]}"
    rows = _read_rows(place)
    gate = choose_gate(_FORMATS[kind], wanted, min_agreement, max_ndcg_loss)
    if rows is None or gate.find_losses(rows[-1], rows[0]):
        shutil.rmtree(place, ignore_errors=True)  # damaged, or short of today's gate: made anew, which says by how much
        place.parent.mkdir(parents=True, exist_ok=True)
        made = export(
            live, backbone, place, _FORMATS[kind], texts=texts, questions=questions, min_agreement=min_agreement,
            max_ndcg_loss=max_ndcg_loss, pruning=wanted, callback=callback,
        )  # fmt: skip
        rows = made.rows
    run = open_session(place / "model.onnx", threads or torch.get_num_threads())
    engines = [Engine(run, backbone.pad_id)]
    if wanted.vocabulary:
        cut = read_back(place, length, backbone)
        engines = [Engine(run, cut.pad_id, _find_places(backbone, cut)), whole]
    return ServingEncoder(kind, reader, engines, place, (rows[0], rows[-1]))


def _find_places(backbone: Backbone, cut: Backbone) -> NDArray[np.int32]:
    """Return the id of every token in a cut vocabulary, -1 for one that is not in it."""
    before, after = backbone.tokenizer.get_vocab(), cut.tokenizer.get_vocab()
    places = np.full(max(before.values()) + 1, -1, np.int32)
    for token, number in before.items():
        places[number] = after.get(token, -1)
    return places


def _read_rows(place: Path) -> tuple[ParityRow, ...] | None:
    """Return the figures of a kept encoder whose files are as they were written; None where there is none such."""
    try:
        manifest: dict[str, Any] = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            with (place / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return None
        return tuple(ParityRow(**row) for row in json.loads((place / REPORT).read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
