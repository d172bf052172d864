"""Export: a stored adapter as something that runs without us, and how near it is to the original.

Owns the order of an export: encoder, tokenizer, head, parity, report, manifest last. Nothing that misses the wanted
agreement is left behind. What lies in the folder is `export_folder`'s to say, how it is measured `parity`'s.

    out/
      model.safetensors | model.onnx     config.json  tokenizer.json  tokenizer_config.json
      head.safetensors  head.json        README.md    parity.json     export.json (last)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from peft_combo.adapters import onnx_graph as onnx_graphs
from peft_combo.adapters.export_folder import (
    Export,
    ExportSource,
    Format,
    build_manifest,
    read_back,
    write_head,
    write_report,
    write_sentence_transformers,
    write_tokenizer,
)
from peft_combo.adapters.onnx_graph import SCHEMES, Graph, Run
from peft_combo.adapters.parity import ExportError, ParityCheck, ParityGate
from peft_combo.adapters.pruning import Pruning, prune
from peft_combo.callbacks import RunCallback
from peft_combo.data.queries import Queries
from peft_combo.encoder.architectures import count_bytes
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import LiveAdapter
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.encoder.methods.merge_weights import merge_into_base
from peft_combo.errors import BackboneError
from peft_combo.files import StagedFolder, check_folder_target, literal_path, stage_folder

__all__ = ["AGREEMENT", "Export", "ExportError", "Format", "choose_scheme", "export"]

AGREEMENT: dict[Format, float] = {"merged": 0.99, "onnx": 0.99, "onnx-int8": 0.95}
"""The share of each text's ten nearest neighbours that has to stay, where nothing else is asked for."""


def export(
    live: LiveAdapter | None,
    backbone: Backbone,
    folder: str | Path,
    format: Format,
    *,
    texts: Sequence[str],
    questions: Queries | None = None,
    min_agreement: float | None = None,
    max_ndcg_loss: float | None = None,
    pruning: Pruning | None = None,
    callback: RunCallback | None = None,
) -> Export:
    """Write an adapter as a folder that runs without this package, and measure what of it was kept.

    - ``merged``: an encoder for transformers and sentence-transformers, the adapter in its weights.
    - ``onnx``: one graph from token ids to unit vectors.
    - ``onnx-int8``: the same in 8 bits, by the quickest of `onnx_graph.SCHEMES` that agrees enough.

    Args:
        live: the adapter; None exports the frozen encoder, without a head.
        folder: to be made; may be there if it is empty.
        texts: what parity is measured on, as a rule the catalogue's, row by row; of very many a sample.
        questions: completion questions over the rows of `texts`, for NDCG@10.
        min_agreement: the least share of equal neighbours; None takes `AGREEMENT`.
        max_ndcg_loss: NDCG@10 that may be lost at most; None takes that of `ParityGate`.
        pruning: what to take out first; its texts are `texts`.
    Raises:
        ExportError: the folder is taken or cannot be written, there are too few texts, or agreement or NDCG@10 is
            missed; nothing is left behind.
        BackboneError: the adapter cannot be merged, or the encoder not be written as a graph.
        OnnxMissing: the extra is not installed.
    """
    callback = RunCallback() if callback is None else callback
    pruning = pruning or Pruning()
    gate = choose_gate(format, pruning, min_agreement, max_ndcg_loss)
    if pruning.heads and format == "merged":
        raise ExportError(
            "--prune-heads leaves layers with different numbers of heads, for which config.json has no words. Export "
            "as onnx or onnx-int8."
        )
    if backbone.quantization != "none":
        raise BackboneError(
            f"An export starts from the encoder in full precision, this one was loaded in {backbone.quantization}. "
            "Load it with quantization none."
        )
    folder = literal_path(folder).resolve()
    with _stage_export(folder) as staged:
        if format != "merged":
            onnx_graphs.require_onnx()
        draft = staged.path
        source = ExportSource.of(live, backbone)
        written, notes = _build_encoder(source, backbone, format, texts, pruning, callback)
        length = source.attached.max_length
        write_tokenizer(draft, length, written, graph=format != "merged")
        if live is not None:
            write_head(draft, live)
        reader = read_back(draft, length, written)
        parity = ParityCheck(source.attached, source.head, backbone, reader, texts, questions, callback)
        attached = source.attached.encoder
        parity.measure("torch, adapter attached", run_torch(backbone, attached), count_bytes(attached), here=True)
        scheme, graph = _write_model(draft, format, length, written, parity, gate)
        if losses := gate.find_losses(parity.rows[-1], parity.rows[0]):
            raise _refuse_losses(source.reference, format, losses, parity, pruning, notes)
        done = Export(
            source.reference, format, folder, scheme, pruning.name or None, parity.time_passes(), len(parity.texts),
            parity.queries, None if parity.questions is None else len(parity.questions), parity.threads,
            (*notes, *parity.notes),
        )  # fmt: skip
        write_report(draft, done, source, backbone)
        staged.manifest = build_manifest(draft, done, source, backbone, graph)
    return done


def choose_gate(
    format: Format, pruning: Pruning, min_agreement: float | None, max_ndcg_loss: float | None
) -> ParityGate:
    """Return what an export may lose at most: what was asked for, else the usual of its format."""
    usual = AGREEMENT["onnx-int8"] if pruning.heads or pruning.layers else AGREEMENT[format]
    wanted = usual if min_agreement is None else min_agreement
    return ParityGate(wanted) if max_ndcg_loss is None else ParityGate(wanted, max_ndcg_loss)


def _refuse_losses(
    reference: str, format: Format, losses: list[str], parity: ParityCheck, pruning: Pruning, notes: tuple[str, ...]
) -> ExportError:
    """Say what an export lost, what every engine kept, and what may be done."""
    remedies = ["prune less"] if pruning.heads or pruning.layers else []
    remedies += ["export as onnx"] if format == "onnx-int8" else []
    remedies += ["lower --min-agreement or raise --max-ndcg-loss"]
    found = "; ".join(
        f"{row.name} {row.agreement:.4f}" + ("" if row.ndcg is None else f" (NDCG@10 {row.ndcg:.4f})")
        for row in parity.rows[1:]
    )
    told = f" Pruned: {'; '.join(notes)}." if notes else ""
    return ExportError(
        f"{reference} as {format}: expected {'; and '.join(losses)} (mean over {parity.queries} texts; neighbours "
        f"kept: {found}).{told} Nothing was written. To go on: {', or '.join(remedies)}."
    )


def _build_encoder(
    source: ExportSource, backbone: Backbone, format: Format, texts: Sequence[str], pruning: Pruning,
    callback: RunCallback,
) -> tuple[Backbone, tuple[str, ...]]:  # fmt: skip
    """Return the encoder to write as a backbone of its own, and what was taken out of it."""
    encoder = _choose_encoder(source.attached, "merged" if pruning else format)
    if pruning:
        return prune(backbone, encoder, texts, source.attached.max_length, pruning, callback)
    length = source.attached.max_length
    written = Backbone(
        backbone.name, encoder, backbone.tokenizer, backbone.pooling, length, fingerprint="export",
        text_prefix=backbone.text_prefix,
    )  # fmt: skip
    return written, ()


def _write_model(
    draft: Path, format: Format, max_length: int, written: Backbone, parity: ParityCheck, gate: ParityGate
) -> tuple[str | None, Graph | None]:
    """Write the model in the wanted format and measure it; return its 8-bit scheme and its graph, where it has them."""
    match format:
        case "merged":
            state = {name: tensor.contiguous() for name, tensor in written.model.state_dict().items()}
            save_file(state, draft / "model.safetensors", metadata={"format": "pt"})
            write_sentence_transformers(draft, max_length, written)
            loaded = Backbone.load(str(draft), pooling=written.pooling, max_length=max_length, device=written.device)
            parity.measure("torch, merged", run_torch(loaded, loaded.model), count_bytes(loaded.model))
            return None, None
        case "onnx":
            graph = _write_graph(_build_graph(written), draft)
            parity.measure("onnx", onnx_graphs.open_session(draft / "model.onnx", parity.threads), graph.ByteSize())
            return None, graph
        case "onnx-int8":
            scheme, graph = choose_scheme(_build_graph(written), parity, gate)
            return scheme, _write_graph(graph, draft)
        case _:
            assert_never(format)


def _choose_encoder(attached: AttachedAdapter, format: Format) -> nn.Module:
    """Return the encoder to write: with the adapter in its weights where that can be, as it is in a graph otherwise."""
    try:
        return merge_into_base(attached)
    except BackboneError as error:
        if format == "merged":
            raise BackboneError(f"{error} The format onnx takes it as it is.") from error
        return attached.encoder


def run_torch(backbone: Backbone, encoder: nn.Module) -> Run:
    """Return the engine of an encoder as it runs in PyTorch."""

    @torch.inference_mode()
    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        there, seen = (torch.from_numpy(part).to(backbone.device) for part in (ids, mask))
        hidden = encoder(input_ids=there, attention_mask=seen).last_hidden_state
        vectors: NDArray[np.float32] = backbone.pool(hidden, seen).cpu().numpy()
        return vectors

    return run


def _build_graph(written: Backbone) -> Graph:
    tokens = written.tokenize(["an example", "one"])
    ids, mask = (part.to(written.device) for part in tokens.pad(np.arange(2), written.pad_id))
    return onnx_graphs.build_graph(written.model, written.pool, ids, mask)


def choose_scheme(graph: Graph, parity: ParityCheck, gate: ParityGate) -> tuple[str, Graph]:
    """Return the first 8-bit scheme that agrees enough, or the last that was tried; measures all on the way."""
    parity.measure("onnx", onnx_graphs.open_session(graph, parity.threads), graph.ByteSize())
    naive = onnx_graphs.quantize_naively(graph)
    parity.measure("onnx int8, naive dynamic", onnx_graphs.open_session(naive, parity.threads), naive.ByteSize())
    for scheme in SCHEMES:
        small = onnx_graphs.quantize_blocks(graph, scheme)
        row = parity.measure(
            f"onnx int8, {scheme.name}", onnx_graphs.open_session(small, parity.threads), small.ByteSize()
        )
        if not gate.find_losses(row, parity.rows[0]):
            break
    return scheme.name, small


def _write_graph(graph: Graph, draft: Path) -> Graph:
    (draft / "model.onnx").write_bytes(graph.SerializeToString())
    return graph


def check_export(folder: Path, format: Format) -> None:
    """Refuse what `export` would refuse in the end, before the encoder is loaded.

    Raises:
        ExportError: the folder is taken. PeftComboError: it cannot be written.
        OnnxMissing: the extra is not installed.
    """
    folder = literal_path(folder).resolve()
    check_folder_target(folder)
    _refuse_contents(folder)
    if format != "merged":
        onnx_graphs.require_onnx()


@contextmanager
def _stage_export(folder: Path) -> Iterator[StagedFolder]:
    """Give a temporary folder beside `folder` that takes its name at the end, or goes; say what the disk refuses."""
    try:
        _refuse_contents(folder)
        with stage_folder(folder) as staged:
            yield staged
    except FileExistsError as error:
        raise _refuse_taken(folder) from error
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ExportError(f"The export cannot be written to {folder}: {reason}. Nothing was left there.") from error


def _refuse_contents(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise _refuse_taken(folder)


def _refuse_taken(folder: Path) -> ExportError:
    return ExportError(f"{folder} is there already. Name another folder with --to, or remove it first.")
