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
from peft_combo.encoder.bank import LiveAdapter
from peft_combo.encoder.heads.completion import rank_targets
from peft_combo.encoder.index import ExactIndex
from peft_combo.encoder.tokens import chunk_by_length
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
class ParityRow:
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


class ParityCheck:
    """The texts and questions every engine answers, and what each made of them.

    Args:
        reader: the backbone with the tokenizer that was written.
        texts: the catalogue's, row by row; of very many a sample is compared.
        questions: completion questions over the rows of `texts`, for NDCG@10; None without any.
    Raises:
        ExportError: there are too few different texts.
    """

    def __init__(
        self, live: LiveAdapter, backbone: Backbone, reader: Backbone, texts: Sequence[str],
        questions: Queries | None, callback: RunCallback,
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
        self._watch = callback
        # What was written is asked with the tokenizer that was written; the reference is what users have today.
        self._tokens = reader.tokenize(distinct)
        callback.on_stage(f"{live.reference} as it runs here", len(distinct))
        self._ours = backbone.encode(distinct, live.attached, progress=callback.on_advance)
        rows = {text: row for row, text in enumerate(distinct)}
        self._catalogue = None if questions is None else np.array([rows[text] for text in texts], np.int64)
        rng = np.random.default_rng(1)
        self._asked = np.sort(rng.choice(len(distinct), min(len(distinct), _MOST_QUERIES), replace=False))
        self._near = self._neighbours(self._ours)
        self._runs: list[Run] = []
        self.rows: list[ParityRow] = []

    @property
    def queries(self) -> int:
        return len(self._asked)

    def measure(self, name: str, run: Run, nbytes: int) -> ParityRow:
        """Encode all texts with an engine and compare."""
        self._watch.on_stage(name, len(self.texts))
        theirs = np.empty((len(self.texts), self._dim), np.float32)
        for chunk in chunk_by_length(self._tokens.lengths):
            theirs[chunk] = run(*self._pad(chunk))
            self._watch.on_advance(len(chunk))
        # In float64: 1 - cosine of float32 products ends at 1e-7, and may fall below 0.
        ours, other = self._ours.astype(np.float64), theirs.astype(np.float64)
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(other, axis=1)
        distance = 1 - np.clip((ours * other).sum(1) / lengths, -1, 1)
        near = self._neighbours(theirs)
        agreement = np.mean([len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(self._near, near, strict=True)])
        some = np.arange(min(32, len(self.texts)))
        together = run(*self._pad(some))
        alone = np.concatenate([run(*self._pad(some[row : row + 1])) for row in some])
        row = ParityRow(
            name, float(distance.max()), float(distance.mean()), float(agreement), self._ndcg(theirs),
            float(np.abs(together - alone).max()), nbytes, {},
        )  # fmt: skip
        self._runs.append(run)
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
                batch = self._pad(rng.choice(len(self.texts), size))
                for times, run in zip(spent[size], self._runs, strict=True):
                    start = time.perf_counter()
                    run(*batch)
                    if turn >= 0:
                        times.append(1000 * (time.perf_counter() - start))
                self._watch.on_advance(int(turn >= 0))
        return tuple(
            replace(row, p50_ms={size: float(np.median(spent[size][place])) for size in BATCHES})
            for place, row in enumerate(self.rows)
        )

    def _pad(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids, mask = self._tokens.pad(rows, self._pad_id)
        return ids.numpy(), mask.numpy()

    def _neighbours(self, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the nearest other texts of those asked for, (Q, 10)."""
        found, _ = ExactIndex(vectors).search(vectors[self._asked], NEIGHBOURS, list(self._asked[:, None]))
        return found

    def _ndcg(self, vectors: NDArray[np.float32]) -> float | None:
        if self.questions is None or self._catalogue is None:
            return None
        ranks = rank_targets(self._head, vectors[self._catalogue], self.questions)
        return float(metrics.per_query(ranks, "ndcg@10").mean())
