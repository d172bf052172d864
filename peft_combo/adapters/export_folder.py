"""The folder of an export: tokenizer, configuration, head, model card and manifest beside the model.

Owns what lies in the folder and under which name. Knows nothing of how the model was made or measured.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from peft_combo.adapters import onnx_graph as onnx_graphs
from peft_combo.adapters.onnx_graph import Graph
from peft_combo.adapters.parity import BATCHES, NEIGHBOURS, ParityRow
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import LiveAdapter
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.encoder.heads.completion import BundleHead, CompletionHead
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.errors import BackboneError
from peft_combo.recipe.task import BundleTask
from peft_combo.store.manifest import list_versions

Format = Literal["merged", "onnx", "onnx-int8"]

FORMAT = 1
MANIFEST = "export.json"
REPORT = "parity.json"


@dataclass(frozen=True)
class Export:
    """What was written, and how near it is.

    Attributes:
        scheme: how weights are kept; None in full precision.
        pruned: what was taken out, in words; None where nothing was.
        rows: first the adapter as it runs here, last what was written.
        texts: distinct texts compared. queries: those whose neighbours were looked up. questions: None without any.
    """

    reference: str
    format: Format
    folder: Path
    scheme: str | None
    pruned: str | None
    rows: tuple[ParityRow, ...]
    texts: int
    queries: int
    questions: int | None
    threads: int
    notes: tuple[str, ...]

    @property
    def written(self) -> ParityRow:
        """The engine that was written."""
        return self.rows[-1]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            "adapter": self.reference,
            "format": self.format,
            "scheme": self.scheme,
            "pruned": self.pruned,
            "texts": self.texts,
            "neighbour_queries": self.queries,
            "neighbours": NEIGHBOURS,
            "questions": self.questions,
            "threads": self.threads,
            "machine": platform.processor() or platform.machine(),
            "rows": [vars(row) for row in self.rows],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, eq=False)
class ExportSource:
    """What is exported: a stored adapter in its encoder, or the frozen encoder alone.

    Attributes:
        digest: of the adapter; of the encoder's weights where there is none.
        head: asks completion questions; untrained it is plain cosine. None for an adapter of another task.
    """

    reference: str
    digest: str
    attached: AttachedAdapter
    head: CompletionHead | None
    live: LiveAdapter | None

    @classmethod
    def of(cls, live: LiveAdapter | None, backbone: Backbone) -> ExportSource:
        """Name a loaded adapter, or for None the frozen encoder, as what is to be exported."""
        if live is not None:
            head = live.task_head if isinstance(live.task_head, CompletionHead) else None
            return cls(live.reference, live.digest, live.attached, head, live)
        model = backbone.model
        bare = AttachedAdapter(
            model, model, model, first_layer=backbone.layers, max_length=backbone.max_length, stored_as="head"
        )
        cosine = BundleHead(backbone.dim, BundleTask()).eval()
        return cls("the frozen encoder", backbone.fingerprint, bare, cosine, None)


def write_head(folder: Path, live: LiveAdapter) -> None:
    """Write the head's tensors and what kind of head it is."""
    (folder / HEAD_FILE).write_bytes(live.record.read(HEAD_FILE))
    _write_json(folder / "head.json", live.record.manifest.task)


def write_report(folder: Path, done: Export, source: ExportSource, backbone: Backbone) -> None:
    """Write the figures, and a card that says what the folder is and how to use it."""
    _write_json(folder / REPORT, done.to_json())
    (folder / "README.md").write_text(_render_card(done, source, backbone), encoding="utf-8")


def write_tokenizer(folder: Path, max_length: int, backbone: Backbone, *, graph: bool) -> None:
    """Write tokenizer and config; the tokenizer cuts where the adapter was tuned to cut, and puts the prefix before a
    text, whoever reads it.
    """
    config: Any = backbone.model.config
    config.save_pretrained(folder)
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.model_max_length = max_length
    if graph:
        tokenizer.model_input_names = list(onnx_graphs.INPUTS)  # so that what it gives is what the graph takes
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.enable_truncation(max_length)
        tokenizer.backend_tokenizer.no_padding()
        if backbone.text_prefix:
            _put_prefix(tokenizer.backend_tokenizer, backbone.text_prefix)
    elif backbone.text_prefix:
        raise BackboneError(
            f"An export puts the text prefix into tokenizer.json, and {backbone.name} has none: take an encoder with a "
            "fast tokenizer."
        )
    tokenizer.save_pretrained(folder)


def _put_prefix(tokenizer: Any, prefix: str) -> None:
    """Have a tokenizer of the tokenizers library put a prefix before every text."""
    from tokenizers import normalizers

    first = normalizers.Prepend(prefix)
    own = tokenizer.normalizer
    tokenizer.normalizer = first if own is None else normalizers.Sequence([first, own])


def read_back(folder: Path, max_length: int, backbone: Backbone) -> Backbone:
    """Return the backbone as it would be with the tokenizer that was written."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return Backbone(str(folder), backbone.model, tokenizer, backbone.pooling, max_length)


def write_sentence_transformers(folder: Path, max_length: int, backbone: Backbone) -> None:
    """Write the modules that sentence-transformers makes an encoder of: transformer, pooling, normalization."""
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": place, "name": str(place), "path": f"{place}_{kind}" if place else "",
         "type": f"sentence_transformers.models.{kind}"}
        for place, kind in enumerate(kinds)
    ]  # fmt: skip
    pooling = {
        "word_embedding_dimension": backbone.dim,
        "pooling_mode_cls_token": backbone.pooling == "cls",
        "pooling_mode_mean_tokens": backbone.pooling == "mean",
    }
    (folder / "1_Pooling").mkdir()
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "1_Pooling" / "config.json", pooling)
    limits = {"max_seq_length": max_length, "do_lower_case": False}
    _write_json(folder / "sentence_bert_config.json", limits)


def build_manifest(
    folder: Path, done: Export, source: ExportSource, backbone: Backbone, graph: Graph | None
) -> tuple[str, bytes]:
    """Return the manifest's name and content: sha256 of every file, versions, and what was exported."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = {"sha256": digest, "bytes": path.stat().st_size}
    versions = list_versions()
    if graph is not None:
        versions |= {name: metadata.version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    manifest = {
        "format": FORMAT,
        "exported_as": done.format,
        "scheme": done.scheme,
        "pruned": done.pruned,
        "adapter": source.reference,
        "adapter_digest": source.digest,
        "backbone": backbone.stamp()
        if source.live is None
        else source.live.record.manifest.backbone.model_dump(mode="json"),
        "max_length": source.attached.max_length,
        "graph": None
        if graph is None
        else {"inputs": onnx_graphs.INPUTS, "output": onnx_graphs.OUTPUT, "opsets": onnx_graphs.list_opsets(graph)},
        "created": datetime.now(UTC).replace(microsecond=0).isoformat(),
        "versions": versions,
        "files": files,
    }
    return MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


_MERGED_PROGRAM = """\
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    states = model(**inputs).last_hidden_state
{pooling}
vectors = torch.nn.functional.normalize(pooled, dim=-1).numpy()
"""
_MERGED_POOLING = {
    "mean": "mask = inputs['attention_mask'].unsqueeze(-1)\npooled = (states * mask).sum(1) / mask.sum(1)",
    "cls": "pooled = states[:, 0]",
}
_GRAPH_PROGRAM = """\
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(folder + "/model.onnx")
inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
(vectors,) = session.run(["vector"], dict(inputs))
"""


def _render_card(done: Export, source: ExportSource, backbone: Backbone) -> str:
    """Say what the folder is, how to use it and how near it is."""
    program = _GRAPH_PROGRAM
    if done.format == "merged":
        program = _MERGED_PROGRAM.format(pooling=_MERGED_POOLING[backbone.pooling])
    columns = ("distance_max", "distance_mean", "agreement", "crossed", "ndcg", "batch_difference")
    lines = [
        f"# {done.reference} as {done.format}",
        "",
        f"Texts (at most {source.attached.max_length} tokens) to vectors of {backbone.dim} numbers and unit length. "
        + ("`SentenceTransformer(folder)` loads it too." if done.format == "merged" else "")
        + (f" Weights in 8 bits: {done.scheme}; needs ONNX Runtime." if done.scheme else "")
        + (f" Pruned: {done.pruned}." if done.pruned else ""),
        "",
        "```python",
        program.rstrip(),
        "```",
        "",
        *_describe_files(source),
        "",
        f"| | {' | '.join(columns)} | MiB | {' | '.join(f'ms, batch {size}' for size in BATCHES)} |",
        "|---|" + "---:|" * (len(columns) + 1 + len(BATCHES)),
    ]
    for row in done.rows:
        cells = [getattr(row, name) for name in columns]
        cells += [row.nbytes / 2**20, *(row.p50_ms[size] for size in BATCHES)]
        lines.append(f"| {row.name} | {' | '.join('' if cell is None else f'{cell:.3g}' for cell in cells)} |")
    lines += [
        "",
        f"Measured on {done.texts:,} texts, neighbours of {done.queries:,} of them; threads: {done.threads}. "
        "`parity.json` has the rest.",
    ]
    return "\n".join(lines) + "\n"


def _describe_files(source: ExportSource) -> list[str]:
    files = "`export.json` has the sha256 of every file."
    if source.live is None:
        return [files]
    return [
        "The head (`head.safetensors`, described by `head.json`) reads with `safetensors.numpy.load_file`; " + files
    ]
