"""Encoder for serving: texts to vectors by torch, ONNX Runtime, in 8 bits, or with a pruned vocabulary.

Owns which engine answers, the folder that keeps it from one start to the next, and that none is opened that lost more
than the gate allows. The exports are `export`'s, how near they are is `parity`'s.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
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
from peft_combo.encoder.tokens import chunk_by_length
from peft_combo.files import literal_path

EncoderKind = Literal["torch", "onnx", "int8", "pruned"]

_FORMATS: dict[EncoderKind, Format] = {"onnx": "onnx", "int8": "onnx-int8", "pruned": "onnx"}


class ServingEncoder:
    """Texts in, unit vectors out, by one engine; any number of threads may call it.

    Attributes:
        kind: the engine. folder: where it is kept; None for torch.
        rows: torch first, then what is used, as measured when it was made; empty for torch, which is the measure.
    """

    def __init__(
        self, kind: EncoderKind, reader: Backbone, run: Run, folder: Path | None = None,
        rows: tuple[ParityRow, ...] = (),
    ) -> None:  # fmt: skip
        self.kind: EncoderKind = kind
        self.folder = folder
        self.rows = rows
        self._reader, self._run = reader, run

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode texts, equal ones once.

        Returns:
            (B, D) float32, rows of unit length.
        """
        distinct = dict.fromkeys(texts)
        rows = {text: row for row, text in enumerate(distinct)}
        tokens = self._reader.tokenize(list(distinct))
        vectors = np.empty((len(distinct), self._reader.dim), np.float32)
        for chunk in chunk_by_length(tokens.lengths):
            ids, mask = tokens.pad(chunk, self._reader.pad_id)
            vectors[chunk] = self._run(ids.numpy(), mask.numpy())
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
            scheme that passes. ``pruned``: a graph whose vocabulary is cut to the tokens of `texts`.
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
    if kind == "torch":
        reader = Backbone(
            backbone.name, backbone.model, backbone.tokenizer, backbone.pooling, length, fingerprint="serving"
        )
        return ServingEncoder(kind, reader, run_torch(backbone, source.attached.encoder))
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
    return ServingEncoder(kind, read_back(place, length, backbone), run, place, (rows[0], rows[-1]))


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
