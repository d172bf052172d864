"""Parity of an export: vectors, neighbours, NDCG@10, size and latency of several engines, side by side.

Owns how an engine is compared with the adapter as it runs here, and how engines are timed. Knows nothing of what is
written, or of where texts and questions come from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.adapters.onnx_graph import Run
from peft_combo.callbacks import RunCallback
from peft_combo.data.queries import Queries
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.completion import CompletionHead, rank_targets
from peft_combo.encoder.index import ExactIndex
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.encoder.tokens import Tokens, chunk_by_length
from peft_combo.errors import PeftComboError

NEIGHBOURS = 10
BATCHES = (1, 32)

_FEWEST_TEXTS = 50  # with few more than ten, any ten neighbours agree
_MOST_TEXTS = 5_000  # compared; each is encoded by every engine
_MOST_QUERIES = 1_000  # texts whose neighbours are looked up among all
_ROUNDS = {1: 30, 32: 11}  # timed passes of each engine, the engines taking turns


class ExportError(PeftComboError):
    """An adapter cannot be exported as asked."""


@dataclass(frozen=True)
class ParityGate:
    """What another engine may lose at most against the adapter as it runs here.

    Attributes:
        agreement: the least share of a text's ten nearest neighbours that has to stay, in the mean.
        ndcg_loss: NDCG@10 of the validation queries it may lose at most.
    """

    agreement: float
    ndcg_loss: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.agreement <= 1:
            raise ExportError(f"min_agreement: expected a share from 0 to 1, found {self.agreement}.")
        if not 0 <= self.ndcg_loss <= 1:
            raise ExportError(f"max_ndcg_loss: expected a loss from 0 to 1, found {self.ndcg_loss}.")

    def find_losses(self, row: ParityRow, reference: ParityRow) -> list[str]:
        """Return what speaks against an engine, each with its figure; nothing where it is near enough."""
        losses = []
        if row.agreement < self.agreement:
            losses.append(
                f"at least {self.agreement:g} of the {NEIGHBOURS} nearest neighbours of a text to stay, found "
                f"{row.name} {row.agreement:.4f}"
            )
        if row.ndcg is not None and reference.ndcg is not None and reference.ndcg - row.ndcg > self.ndcg_loss:
            losses.append(
                f"at most {self.ndcg_loss:g} NDCG@10 to be lost, found {row.name} {row.ndcg:.4f} after "
                f"{reference.ndcg:.4f}"
            )
        return losses


@dataclass(frozen=True)
class ParityRow:
    """One engine beside the adapter as it runs here.

    Attributes:
        distance_max, distance_mean: 1 - cosine between its vector of a text and ours.
        agreement: mean share of the ten nearest neighbours of a text that are the same.
        crossed: the same where only the query is its vector, and what is searched are ours, as a service does.
        ndcg: NDCG@10 of the questions; None where there are none.
        batch_difference: largest difference in a component of a text's vector, alone and within a padded batch.
        nbytes: of the weights or the graph.
        p50_ms: batch size -> median milliseconds of a pass, tokenizing left out.
    """

    name: str
    distance_max: float
    distance_mean: float
    agreement: float
    crossed: float
    ndcg: float | None
    batch_difference: float
    nbytes: int
    p50_ms: dict[int, float]


class ParityCheck:
    """The texts and questions every engine answers, and what each made of them.

    Args:
        attached: the adapter as it runs here. head: asks the questions; None leaves them out.
        reader: the backbone with the tokenizer that was written.
        texts: the catalogue's, row by row; of very many a sample is compared.
        questions: completion questions over the rows of `texts`, for NDCG@10; None without any.
    Raises:
        ExportError: there are too few different texts.
    """

    def __init__(
        self, attached: AttachedAdapter, head: CompletionHead | None, backbone: Backbone, reader: Backbone,
        texts: Sequence[str], questions: Queries | None, callback: RunCallback,
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
        if head is None and questions is not None:
            self.notes.append("NDCG@10 was left out: the adapter is for another task than completion.")
            questions = None
        self.texts = distinct
        self.questions = questions
        self.threads = torch.get_num_threads()
        self._head = head
        self._dim = backbone.dim
        self._watch = callback
        # What was written is asked with the tokenizer that was written; the reference is what users have today.
        self._read = reader.tokenize(distinct), reader.pad_id
        self._read_here = backbone.tokenize(distinct, attached.max_length), backbone.pad_id
        callback.on_stage("The adapter as it runs here", len(distinct))
        self._ours = backbone.encode(distinct, attached, progress=callback.on_advance)
        rows = {text: row for row, text in enumerate(distinct)}
        self._catalogue = None if questions is None else np.array([rows[text] for text in texts], np.int64)
        rng = np.random.default_rng(1)
        self._asked = np.sort(rng.choice(len(distinct), min(len(distinct), _MOST_QUERIES), replace=False))
        self._near = self._neighbours(self._ours)
        self._runs: list[tuple[Run, tuple[Tokens, int]]] = []
        self.rows: list[ParityRow] = []

    @property
    def queries(self) -> int:
        return len(self._asked)

    def measure(self, name: str, run: Run, nbytes: int, *, here: bool = False) -> ParityRow:
        """Encode all texts with an engine and compare; `here`: it takes the ids of today's tokenizer."""
        read = self._read_here if here else self._read
        self._watch.on_stage(name, len(self.texts))
        theirs = np.empty((len(self.texts), self._dim), np.float32)
        for chunk in chunk_by_length(read[0].lengths):
            theirs[chunk] = run(*_pad(read, chunk))
            self._watch.on_advance(len(chunk))
        # In float64: 1 - cosine of float32 products ends at 1e-7, and may fall below 0.
        ours, other = self._ours.astype(np.float64), theirs.astype(np.float64)
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(other, axis=1)
        distance = 1 - np.clip((ours * other).sum(1) / lengths, -1, 1)
        near = self._neighbours(theirs)
        crossed = self._neighbours(self._ours, theirs)
        some = np.arange(min(32, len(self.texts)))
        together = run(*_pad(read, some))
        alone = np.concatenate([run(*_pad(read, some[row : row + 1])) for row in some])
        row = ParityRow(
            name, float(distance.max()), float(distance.mean()), _count_shared(self._near, near),
            _count_shared(self._near, crossed), self._ndcg(theirs), float(np.abs(together - alone).max()), nbytes, {},
        )  # fmt: skip
        self._runs.append((run, read))
        self.rows.append(row)
        return row

    def time_passes(self) -> tuple[ParityRow, ...]:
        """Return the rows with the time of a pass: all engines take turns on the same batches."""
        spent: dict[int, list[list[float]]] = {}
        for size in BATCHES:
            rng = np.random.default_rng(2)
            self._watch.on_stage(f"Timing batches of {size}", _ROUNDS[size])
            spent[size] = [[] for _ in self._runs]
            for turn in range(-1, _ROUNDS[size]):  # the first is to warm up
                drawn = rng.choice(len(self.texts), size)
                for times, (run, read) in zip(spent[size], self._runs, strict=True):
                    batch = _pad(read, drawn)
                    start = time.perf_counter()
                    run(*batch)
                    if turn >= 0:
                        times.append(1000 * (time.perf_counter() - start))
                self._watch.on_advance(int(turn >= 0))
        return tuple(
            replace(row, p50_ms={size: float(np.median(spent[size][place])) for size in BATCHES})
            for place, row in enumerate(self.rows)
        )

    def _neighbours(
        self, vectors: NDArray[np.float32], queries: NDArray[np.float32] | None = None
    ) -> NDArray[np.int64]:
        """Return the nearest other texts of those asked for, (Q, 10)."""
        asked = (vectors if queries is None else queries)[self._asked]
        found, _ = ExactIndex(vectors).search(asked, NEIGHBOURS, list(self._asked[:, None]))
        return found

    def _ndcg(self, vectors: NDArray[np.float32]) -> float | None:
        if self.questions is None or self._catalogue is None or self._head is None:
            return None
        ranks = rank_targets(self._head, vectors[self._catalogue], self.questions)
        return float(metrics.per_query(ranks, "ndcg@10").mean())


def _pad(read: tuple[Tokens, int], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    tokens, pad_id = read
    ids, mask = tokens.pad(rows, pad_id)
    return ids.numpy(), mask.numpy()


def _count_shared(near: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    """Return the mean share of neighbours that two searches have in common, (Q, 10) each."""
    return float(np.mean([len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(near, other, strict=True)]))
