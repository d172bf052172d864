"""Export: a stored adapter as something that runs without us, and how near it is to the original.

Owns the folder that is written (merged encoder or graph, tokenizer, head, report, manifest last) and the measure of
parity: vectors, neighbours, completion, size and time, all engines side by side. Nothing that misses the wanted
agreement is left behind. Knows nothing of where texts and questions come from.

    out/
      model.safetensors | model.onnx     config.json  tokenizer.json  tokenizer_config.json
      head.safetensors  head.json        README.md    parity.json     export.json (last)
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from peft_combo import metrics
from peft_combo.adapters import onnx_graph as onnx_graphs
from peft_combo.adapters.onnx_graph import SCHEMES, Graph, Run
from peft_combo.callbacks import Watch
from peft_combo.data.queries import Queries
from peft_combo.encoder.architectures import bytes_of
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import LiveAdapter
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.encoder.heads.completion import completion_ranks
from peft_combo.encoder.index import ExactIndex
from peft_combo.encoder.methods.merge_weights import merged
from peft_combo.encoder.tokens import length_sorted_chunks
from peft_combo.errors import BackboneError, PeftComboError
from peft_combo.files import publish, sync, write
from peft_combo.store.manifest import installed_versions

Format = Literal["merged", "onnx", "onnx-int8"]

FORMAT = 1
MANIFEST = "export.json"
REPORT = "parity.json"
AGREEMENT: dict[Format, float] = {"merged": 0.99, "onnx": 0.99, "onnx-int8": 0.95}
"""The share of each text's ten nearest neighbours that has to stay, where nothing else is asked for."""
NEIGHBOURS = 10
BATCHES = (1, 32)

_FEWEST_TEXTS = 50  # with few more than ten, any ten neighbours agree
_MOST_TEXTS = 5_000  # compared; each is encoded by every engine
_MOST_QUERIES = 1_000  # texts whose neighbours are looked up among all
_ROUNDS = {1: 30, 32: 11}  # timed passes of each engine, the engines taking turns


class ExportError(PeftComboError):
    """An adapter cannot be exported as asked."""


@dataclass(frozen=True)
class Row:
    """One engine beside the adapter as it runs here.

    Attributes:
        distance_max, distance_mean: 1 - cosine between its vector of a text and ours.
        agreement: mean share of the ten nearest neighbours of a text that are the same.
        ndcg: NDCG@10 of the questions; None where there are none.
        batch_difference: largest difference in a component of a text's vector, alone and within a padded batch.
        nbytes: of the weights or the graph.
        p50_ms: batch size -> median milliseconds of a pass, tokenizing left out.
    """

    name: str
    distance_max: float
    distance_mean: float
    agreement: float
    ndcg: float | None
    batch_difference: float
    nbytes: int
    p50_ms: dict[int, float]


@dataclass(frozen=True)
class Export:
    """What was written, and how near it is.

    Attributes:
        scheme: how weights are kept; None in full precision.
        rows: first the adapter as it runs here, last what was written.
        texts: distinct texts compared. queries: those whose neighbours were looked up. questions: None without any.
    """

    reference: str
    format: Format
    folder: Path
    scheme: str | None
    rows: tuple[Row, ...]
    texts: int
    queries: int
    questions: int | None
    threads: int
    notes: tuple[str, ...]

    @property
    def written(self) -> Row:
        """The engine that was written."""
        return self.rows[-1]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            "adapter": self.reference,
            "format": self.format,
            "scheme": self.scheme,
            "texts": self.texts,
            "neighbour_queries": self.queries,
            "neighbours": NEIGHBOURS,
            "questions": self.questions,
            "threads": self.threads,
            "machine": platform.processor() or platform.machine(),
            "rows": [vars(row) for row in self.rows],
            "notes": list(self.notes),
        }


def export(
    live: LiveAdapter,
    backbone: Backbone,
    folder: str | Path,
    format: Format,
    *,
    texts: Sequence[str],
    questions: Queries | None = None,
    min_agreement: float | None = None,
    watch: Watch | None = None,
) -> Export:
    """Write an adapter as a folder that runs without this package, and measure what of it was kept.

    - ``merged``: an encoder for transformers and sentence-transformers, the adapter in its weights.
    - ``onnx``: one graph from token ids to unit vectors.
    - ``onnx-int8``: the same in 8 bits, by the quickest of `onnx_graphs.SCHEMES` that agrees enough.

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
    watch = Watch() if watch is None else watch
    wanted = AGREEMENT[format] if min_agreement is None else min_agreement
    if not 0 <= wanted <= 1:
        raise ExportError(f"min_agreement: expected a share from 0 to 1, found {wanted}.")
    if backbone.quantization != "none":
        raise BackboneError(
            f"An export starts from the encoder in full precision, this one was loaded in {backbone.quantization}. "
            "Load it with quantization none."
        )
    folder = Path(folder).expanduser().resolve()
    with _drafting(folder) as draft:
        if format != "merged":
            onnx_graphs.require_onnx()
        plain = _encoder(live, format)
        _write_tokenizer(draft, live, backbone, graph=format != "merged")
        (draft / HEAD_FILE).write_bytes(live.record.read(HEAD_FILE))
        _write_json(draft / "head.json", live.record.manifest.task)
        trial = _Trial(live, backbone, _read_back(draft, live, backbone), texts, questions, watch)
        trial.measure(
            "torch, adapter attached", _torch(backbone, live.attached.encoder), bytes_of(live.attached.encoder)
        )
        scheme, graph = None, None
        match format:
            case "merged":
                state = {name: tensor.contiguous() for name, tensor in plain.state_dict().items()}
                save_file(state, draft / "model.safetensors", metadata={"format": "pt"})
                _write_sentence_transformers(draft, live, backbone)
                loaded = Backbone.load(
                    str(draft), pooling=backbone.pooling, max_length=live.attached.max_length, device=backbone.device
                )
                trial.measure("torch, merged", _torch(loaded, loaded.model), bytes_of(loaded.model))
            case "onnx":
                graph = _written(_graph(plain, live, backbone), draft)
                trial.measure("onnx", onnx_graphs.session(draft / "model.onnx", trial.threads), graph.ByteSize())
            case "onnx-int8":
                scheme, graph = _smallest(_graph(plain, live, backbone), trial, wanted)
                _written(graph, draft)
            case _:
                assert_never(format)
        if trial.rows[-1].agreement < wanted:
            remedy = "Lower --min-agreement" + (", or export as onnx." if format == "onnx-int8" else ".")
            found = "; ".join(f"{row.name} {row.agreement:.4f}" for row in trial.rows[1:])
            raise ExportError(
                f"{live.reference} as {format}: expected at least {wanted:g} of the {NEIGHBOURS} nearest neighbours of "
                f"a text to stay, found {found} (mean over {trial.queries} texts). Nothing was written. " + remedy
            )
        done = Export(
            live.reference, format, folder, scheme, trial.timed(), len(trial.texts), trial.queries,
            None if trial.questions is None else len(trial.questions), trial.threads, tuple(trial.notes),
        )  # fmt: skip
        _write_json(draft / REPORT, done.to_json())
        (draft / "README.md").write_text(_card(done, live, backbone), encoding="utf-8")
        _seal(draft, done, live, graph)
    return done


# --- engines ----------------------------------------------------------------------------------------------------------


def _encoder(live: LiveAdapter, format: Format) -> nn.Module:
    """Return the encoder to write: with the adapter in its weights where that can be, as it is in a graph otherwise."""
    try:
        return merged(live.attached)
    except BackboneError as error:
        if format == "merged":
            raise BackboneError(f"{error} The format onnx takes it as it is.") from error
        return live.attached.encoder


def _torch(backbone: Backbone, encoder: nn.Module) -> Run:
    @torch.inference_mode()
    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        there, seen = (torch.from_numpy(part).to(backbone.device) for part in (ids, mask))
        hidden = encoder(input_ids=there, attention_mask=seen).last_hidden_state
        vectors: NDArray[np.float32] = backbone.pool(hidden, seen).cpu().numpy()
        return vectors

    return run


def _graph(encoder: nn.Module, live: LiveAdapter, backbone: Backbone) -> Graph:
    tokens = backbone.tokenize(["an example", "one"], live.attached.max_length)
    ids, mask = (part.to(backbone.device) for part in tokens.padded(np.arange(2), backbone.pad_id))
    return onnx_graphs.graph_of(encoder, backbone.pool, ids, mask)


def _smallest(graph: Graph, trial: _Trial, wanted: float) -> tuple[str, Graph]:
    """Return the first 8-bit scheme that agrees enough, or the last that was tried; measures all on the way."""
    trial.measure("onnx", onnx_graphs.session(graph, trial.threads), graph.ByteSize())
    naive = onnx_graphs.naive_int8(graph)
    trial.measure("onnx int8, naive dynamic", onnx_graphs.session(naive, trial.threads), naive.ByteSize())
    for scheme in SCHEMES:
        small = onnx_graphs.in_blocks(graph, scheme)
        row = trial.measure(f"onnx int8, {scheme.name}", onnx_graphs.session(small, trial.threads), small.ByteSize())
        if row.agreement >= wanted:
            break
    return scheme.name, small


class _Trial:
    """The texts and questions every engine answers, and what each made of them."""

    def __init__(
        self, live: LiveAdapter, backbone: Backbone, reader: Backbone, texts: Sequence[str],
        questions: Queries | None, watch: Watch,
    ) -> None:  # fmt: skip
        distinct = list(dict.fromkeys(texts))
        if len(distinct) < _FEWEST_TEXTS:
            raise ExportError(
                f"Parity needs at least {_FEWEST_TEXTS} different texts, found {len(distinct)}. Name more with --texts."
            )
        self.notes: list[str] = []
        if len(distinct) > _MOST_TEXTS:
            self.notes.append(f"Compared on {_MOST_TEXTS:,} of {len(distinct):,} texts, drawn once for all engines.")
            if questions is not None:
                self.notes.append("NDCG@10 needs the whole catalogue and was left out.")
                questions = None
            drawn = np.random.default_rng(0).choice(len(distinct), _MOST_TEXTS, replace=False)
            distinct = [distinct[row] for row in np.sort(drawn)]
        self.texts = distinct
        self.questions = questions
        self.threads = torch.get_num_threads()
        self._head = live.head
        self._dim, self._pad_id = backbone.dim, backbone.pad_id
        self._watch = watch
        # What was written is asked with the tokenizer that was written; the reference is what users have today.
        self._tokens = reader.tokenize(distinct)
        watch.stage(f"{live.reference} as it runs here", len(distinct))
        self._ours = backbone.encode(distinct, live.attached, progress=watch.advance)
        rows = {text: row for row, text in enumerate(distinct)}
        self._catalogue = None if questions is None else np.array([rows[text] for text in texts], np.int64)
        rng = np.random.default_rng(1)
        self._asked = np.sort(rng.choice(len(distinct), min(len(distinct), _MOST_QUERIES), replace=False))
        self._near = self._neighbours(self._ours)
        self._runs: list[Run] = []
        self.rows: list[Row] = []

    @property
    def queries(self) -> int:
        return len(self._asked)

    def measure(self, name: str, run: Run, nbytes: int) -> Row:
        """Encode all texts with an engine and compare."""
        self._watch.stage(name, len(self.texts))
        theirs = np.empty((len(self.texts), self._dim), np.float32)
        for chunk in length_sorted_chunks(self._tokens.lengths):
            theirs[chunk] = run(*self._padded(chunk))
            self._watch.advance(len(chunk))
        # In float64: 1 - cosine of float32 products ends at 1e-7, and may fall below 0.
        ours, other = self._ours.astype(np.float64), theirs.astype(np.float64)
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(other, axis=1)
        distance = 1 - np.clip((ours * other).sum(1) / lengths, -1, 1)
        near = self._neighbours(theirs)
        agreement = np.mean([len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(self._near, near, strict=True)])
        some = np.arange(min(32, len(self.texts)))
        together = run(*self._padded(some))
        alone = np.concatenate([run(*self._padded(some[row : row + 1])) for row in some])
        row = Row(
            name, float(distance.max()), float(distance.mean()), float(agreement), self._ndcg(theirs),
            float(np.abs(together - alone).max()), nbytes, {},
        )  # fmt: skip
        self._runs.append(run)
        self.rows.append(row)
        return row

    def timed(self) -> tuple[Row, ...]:
        """Return the rows with the time of a pass: all engines take turns on the same batches."""
        spent: dict[int, list[list[float]]] = {}
        for size in BATCHES:
            rng = np.random.default_rng(2)
            self._watch.stage(f"Timing batches of {size}", _ROUNDS[size])
            spent[size] = [[] for _ in self._runs]
            for turn in range(-1, _ROUNDS[size]):  # the first is to warm up
                batch = self._padded(rng.choice(len(self.texts), size))
                for times, run in zip(spent[size], self._runs, strict=True):
                    start = time.perf_counter()
                    run(*batch)
                    if turn >= 0:
                        times.append(1000 * (time.perf_counter() - start))
                self._watch.advance(int(turn >= 0))
        return tuple(
            replace(row, p50_ms={size: float(np.median(spent[size][place])) for size in BATCHES})
            for place, row in enumerate(self.rows)
        )

    def _padded(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids, mask = self._tokens.padded(rows, self._pad_id)
        return ids.numpy(), mask.numpy()

    def _neighbours(self, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the nearest other texts of those asked for, (Q, 10)."""
        found, _ = ExactIndex(vectors).search(vectors[self._asked], NEIGHBOURS, list(self._asked[:, None]))
        return found

    def _ndcg(self, vectors: NDArray[np.float32]) -> float | None:
        if self.questions is None or self._catalogue is None:
            return None
        ranks = completion_ranks(self._head, vectors[self._catalogue], self.questions)
        return float(metrics.per_query(ranks, "ndcg@10").mean())


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def _drafting(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder` that takes its name at the end, or goes."""
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ExportError(f"{folder} is there already. Name another folder with --to, or remove it first.")
        draft.mkdir(parents=True)
        yield draft
        os.rename(draft, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ExportError(f"The export cannot be written to {folder}: {reason}. Nothing was left there.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_tokenizer(draft: Path, live: LiveAdapter, backbone: Backbone, *, graph: bool) -> None:
    """Write tokenizer and config; the tokenizer cuts where the adapter was tuned to cut, whoever reads it."""
    config: Any = backbone.model.config
    config.save_pretrained(draft)
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.model_max_length = live.attached.max_length
    if graph:
        tokenizer.model_input_names = list(onnx_graphs.INPUTS)  # so that what it gives is what the graph takes
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.enable_truncation(live.attached.max_length)
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(draft)


def _read_back(draft: Path, live: LiveAdapter, backbone: Backbone) -> Backbone:
    """Return the backbone as it would be with the tokenizer that was written."""
    from transformers import AutoTokenizer

    return Backbone(
        str(draft), backbone.model, AutoTokenizer.from_pretrained(draft), backbone.pooling, live.attached.max_length
    )


def _write_sentence_transformers(draft: Path, live: LiveAdapter, backbone: Backbone) -> None:
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
    (draft / "1_Pooling").mkdir()
    _write_json(draft / "modules.json", modules)
    _write_json(draft / "1_Pooling" / "config.json", pooling)
    limits = {"max_seq_length": live.attached.max_length, "do_lower_case": False}
    _write_json(draft / "sentence_bert_config.json", limits)


def _written(graph: Graph, draft: Path) -> Graph:
    (draft / "model.onnx").write_bytes(graph.SerializeToString())
    return graph


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _seal(draft: Path, done: Export, live: LiveAdapter, graph: Graph | None) -> None:
    """Bring every file to the disk, and the manifest last."""
    files = {}
    for path in sorted(path for path in draft.rglob("*") if path.is_file()):
        publish(path, mode=draft.stat().st_mode & 0o666)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(draft).as_posix()] = {"sha256": digest, "bytes": path.stat().st_size}
    versions = installed_versions()
    if graph is not None:
        versions |= {name: metadata.version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    manifest = {
        "format": FORMAT,
        "exported_as": done.format,
        "scheme": done.scheme,
        "adapter": live.reference,
        "adapter_digest": live.digest,
        "backbone": live.record.manifest.backbone.model_dump(mode="json"),
        "max_length": live.attached.max_length,
        "graph": None
        if graph is None
        else {"inputs": onnx_graphs.INPUTS, "output": onnx_graphs.OUTPUT, "opsets": onnx_graphs.opsets(graph)},
        "created": datetime.now(UTC).replace(microsecond=0).isoformat(),
        "versions": versions,
        "files": files,
    }
    write(draft / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
    sync(draft)


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


def _card(done: Export, live: LiveAdapter, backbone: Backbone) -> str:
    """Say what the folder is, how to use it and how near it is."""
    program = _GRAPH_PROGRAM
    if done.format == "merged":
        program = _MERGED_PROGRAM.format(pooling=_MERGED_POOLING[backbone.pooling])
    columns = ("distance_max", "distance_mean", "agreement", "ndcg", "batch_difference")
    lines = [
        f"# {done.reference} as {done.format}",
        "",
        f"Texts (at most {live.attached.max_length} tokens) to vectors of {backbone.dim} numbers and unit length. "
        + ("`SentenceTransformer(folder)` loads it too." if done.format == "merged" else "")
        + (f" Weights in 8 bits: {done.scheme}; needs ONNX Runtime." if done.scheme else ""),
        "",
        "```python",
        program.rstrip(),
        "```",
        "",
        "The head (`head.safetensors`, described by `head.json`) reads with `safetensors.numpy.load_file`; "
        "`export.json` has the sha256 of every file.",
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
