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
    Format,
    build_manifest,
    read_back,
    write_head,
    write_report,
    write_sentence_transformers,
    write_tokenizer,
)
from peft_combo.adapters.onnx_graph import SCHEMES, Graph, Run
from peft_combo.adapters.parity import NEIGHBOURS, ExportError, ParityCheck
from peft_combo.callbacks import RunCallback
from peft_combo.data.queries import Queries
from peft_combo.encoder.architectures import count_bytes
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import LiveAdapter
from peft_combo.encoder.methods.merge_weights import merge_into_base
from peft_combo.errors import BackboneError
from peft_combo.files import StagedFolder, check_folder_target, literal_path, stage_folder

__all__ = ["AGREEMENT", "Export", "ExportError", "Format", "choose_scheme", "export"]

AGREEMENT: dict[Format, float] = {"merged": 0.99, "onnx": 0.99, "onnx-int8": 0.95}
"""The share of each text's ten nearest neighbours that has to stay, where nothing else is asked for."""


def export(
    live: LiveAdapter,
    backbone: Backbone,
    folder: str | Path,
    format: Format,
    *,
    texts: Sequence[str],
    questions: Queries | None = None,
    min_agreement: float | None = None,
    callback: RunCallback | None = None,
) -> Export:
    """Write an adapter as a folder that runs without this package, and measure what of it was kept.

    - ``merged``: an encoder for transformers and sentence-transformers, the adapter in its weights.
    - ``onnx``: one graph from token ids to unit vectors.
    - ``onnx-int8``: the same in 8 bits, by the quickest of `onnx_graph.SCHEMES` that agrees enough.

    Args:
        folder: to be made; may be there if it is empty.
        texts: what parity is measured on, as a rule the catalogue's, row by row; of very many a sample.
        questions: completion questions over the rows of `texts`, for NDCG@10.
        min_agreement: the least share of equal neighbours; None takes `AGREEMENT`.
    Raises:
        ExportError: the folder is taken or cannot be written, there are too few texts, or agreement is missed; nothing
            is left behind.
        BackboneError: the adapter cannot be merged, or the encoder not be written as a graph.
        OnnxMissing: the extra is not installed.
    """
    callback = RunCallback() if callback is None else callback
    wanted = AGREEMENT[format] if min_agreement is None else min_agreement
    if not 0 <= wanted <= 1:
        raise ExportError(f"min_agreement: expected a share from 0 to 1, found {wanted}.")
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
        encoder = _choose_encoder(live, format)
        write_tokenizer(draft, live, backbone, graph=format != "merged")
        write_head(draft, live)
        parity = ParityCheck(live, backbone, read_back(draft, live, backbone), texts, questions, callback)
        attached = live.attached.encoder
        parity.measure("torch, adapter attached", run_torch(backbone, attached), count_bytes(attached))
        scheme, graph = _write_model(draft, format, encoder, live, backbone, parity, wanted)
        if parity.rows[-1].agreement < wanted:
            remedy = "Lower --min-agreement" + (", or export as onnx." if format == "onnx-int8" else ".")
            found = "; ".join(f"{row.name} {row.agreement:.4f}" for row in parity.rows[1:])
            raise ExportError(
                f"{live.reference} as {format}: expected at least {wanted:g} of the {NEIGHBOURS} nearest neighbours of "
                f"a text to stay, found {found} (mean over {parity.queries} texts). Nothing was written. " + remedy
            )
        done = Export(
            live.reference, format, folder, scheme, parity.time_passes(), len(parity.texts), parity.queries,
            None if parity.questions is None else len(parity.questions), parity.threads, tuple(parity.notes),
        )  # fmt: skip
        write_report(draft, done, live, backbone)
        staged.manifest = build_manifest(draft, done, live, graph)
    return done


def _write_model(
    draft: Path, format: Format, encoder: nn.Module, live: LiveAdapter, backbone: Backbone, parity: ParityCheck,
    wanted: float,
) -> tuple[str | None, Graph | None]:  # fmt: skip
    """Write the model in the wanted format and measure it; return its 8-bit scheme and its graph, where it has them."""
    match format:
        case "merged":
            state = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
            save_file(state, draft / "model.safetensors", metadata={"format": "pt"})
            write_sentence_transformers(draft, live, backbone)
            loaded = Backbone.load(
                str(draft), pooling=backbone.pooling, max_length=live.attached.max_length, device=backbone.device
            )
            parity.measure("torch, merged", run_torch(loaded, loaded.model), count_bytes(loaded.model))
            return None, None
        case "onnx":
            graph = _write_graph(_build_graph(encoder, live, backbone), draft)
            parity.measure("onnx", onnx_graphs.open_session(draft / "model.onnx", parity.threads), graph.ByteSize())
            return None, graph
        case "onnx-int8":
            scheme, graph = choose_scheme(_build_graph(encoder, live, backbone), parity, wanted)
            return scheme, _write_graph(graph, draft)
        case _:
            assert_never(format)


def _choose_encoder(live: LiveAdapter, format: Format) -> nn.Module:
    """Return the encoder to write: with the adapter in its weights where that can be, as it is in a graph otherwise."""
    try:
        return merge_into_base(live.attached)
    except BackboneError as error:
        if format == "merged":
            raise BackboneError(f"{error} The format onnx takes it as it is.") from error
        return live.attached.encoder


def run_torch(backbone: Backbone, encoder: nn.Module) -> Run:
    """Return the engine of an encoder as it runs in PyTorch."""

    @torch.inference_mode()
    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        there, seen = (torch.from_numpy(part).to(backbone.device) for part in (ids, mask))
        hidden = encoder(input_ids=there, attention_mask=seen).last_hidden_state
        vectors: NDArray[np.float32] = backbone.pool(hidden, seen).cpu().numpy()
        return vectors

    return run


def _build_graph(encoder: nn.Module, live: LiveAdapter, backbone: Backbone) -> Graph:
    tokens = backbone.tokenize(["an example", "one"], live.attached.max_length)
    ids, mask = (part.to(backbone.device) for part in tokens.pad(np.arange(2), backbone.pad_id))
    return onnx_graphs.build_graph(encoder, backbone.pool, ids, mask)


def choose_scheme(graph: Graph, parity: ParityCheck, wanted: float) -> tuple[str, Graph]:
    """Return the first 8-bit scheme that agrees enough, or the last that was tried; measures all on the way."""
    parity.measure("onnx", onnx_graphs.open_session(graph, parity.threads), graph.ByteSize())
    naive = onnx_graphs.quantize_naively(graph)
    parity.measure("onnx int8, naive dynamic", onnx_graphs.open_session(naive, parity.threads), naive.ByteSize())
    for scheme in SCHEMES:
        small = onnx_graphs.quantize_blocks(graph, scheme)
        row = parity.measure(
            f"onnx int8, {scheme.name}", onnx_graphs.open_session(small, parity.threads), small.ByteSize()
        )
        if row.agreement >= wanted:
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
