"""Active learning: what is most worth labelling, where a stored adapter is least sure, and nothing twice.

Owns how unsure an adapter is of a text or of a set of items, and how the unsure ones are spread. What has no label yet,
and the files to label it in, are for `data.unlabelled` to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax, xlogy

from peft_combo.data.model import Dataset
from peft_combo.data.queries import Queries, pad_contexts
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import LiveAdapter
from peft_combo.encoder.heads.classification import ClassificationHead
from peft_combo.encoder.heads.completion import (
    BundleHead,
    encode_contexts,
    project_targets,
    score_completion,
    step_scale,
)
from peft_combo.encoder.heads.tagging import EncodedWords, TaggingHead, encode_words
from peft_combo.errors import StoreError

# Texts or queries looked at together: states of 1,024 titles take some 30 MiB, scores of 256 queries over 100k
# items 100 MiB.
_READ_AT_ONCE = 1024
_QUERIES_AT_ONCE = 256
# Uncertainties are raised to this power before they weigh distances. They differ by a factor of two, distances by more:
# as they are, distance alone would choose, and at 4 the choice was the better one on BundleRec electronic titles.
_SHARPNESS = 4
# Items a pair is composed for: beyond, a seeded sample of the catalogue is asked.
_COMPOSED_FOR = 2000


@dataclass(frozen=True)
class LabelSuggestion:
    """Something worth labelling.

    Attributes:
        uncertainty: 0 where the adapter is sure, 1 where all answers are alike to it.
        shown: the text, or the titles of the items.
        guess: what the adapter would say, in words.
        rows: lines of the file to label it in.
    """

    uncertainty: float
    shown: str
    guess: str
    rows: tuple[dict[str, Any], ...]


def suggest_texts(
    backbone: Backbone,
    live: LiveAdapter,
    texts: Sequence[str],
    count: int,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[LabelSuggestion]:
    """Choose the texts that a classification or tagging adapter would learn most from.

    Args:
        texts: distinct ones without a label.
        count: at most so many are chosen.
        progress: called with the number of texts read since the last call.
    Returns:
        in the order they were chosen; for classification with an empty label to fill in, for tagging with the
        entities the adapter finds, to be put right.
    Raises:
        StoreError: the adapter was tuned for something else.
    """
    match live.task_head:
        case ClassificationHead() as head:
            vectors = backbone.encode(texts, live.attached, progress=progress)
            likely = head.probabilities(vectors)
            unsure = compute_margins(likely, exclusive=not head.config.multi_label)
            chosen = choose_spread(vectors, unsure, count, seed)
            return [_to_classify(texts[row], head, likely[row], float(unsure[row])) for row in chosen]
        case TaggingHead() as head:
            read: list[EncodedWords] = []
            for start in range(0, len(texts), _READ_AT_ONCE):
                some = texts[start : start + _READ_AT_ONCE]
                read += encode_words(backbone, live.attached, head, some)
                if progress is not None:
                    progress(len(some))
            # The mean over the words, so that a long title is not unsure for being long.
            unsure = np.array(
                [compute_margins(one.likely, exclusive=True).mean() if one.words else 0.0 for one in read]
            )
            states = np.array([one.state for one in read], np.float32).reshape(len(read), backbone.dim)
            lengths = np.linalg.norm(states, axis=1, keepdims=True)
            chosen = choose_spread(states / np.maximum(lengths, np.finfo(np.float32).tiny), unsure, count, seed)
            return [_to_tag(read[row], head, float(unsure[row])) for row in chosen]
        case head:
            raise StoreError(
                f"Adapter {live.reference} was tuned for {head.kind}; expected one tuned for classification or tagging "
                "where texts are to be labelled."
            )


def suggest_bundles(
    backbone: Backbone,
    live: LiveAdapter,
    dataset: Dataset,
    sets: Iterable[NDArray[np.int32]],
    count: int,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[LabelSuggestion]:
    """Choose the sets of items of which a bundle adapter would learn most, were it told whether they are bundles.

    Candidates are the sets that were bought together, and for every item (or a sample of them) the pair with the item
    that the adapter thinks completes it best. What is a bundle already is none.

    Args:
        sets: rows of items that were bought together, see `data.pseudo_bundles`.
    Returns:
        in the order they were chosen.
    Raises:
        StoreError: the adapter was tuned for something else.
    """
    head = live.head_as(BundleHead)
    texts = dataset.texts
    vectors = backbone.encode(texts, live.attached, progress=progress)
    targets = project_targets(head, vectors)
    known = {frozenset(rows.tolist()) for rows in dataset.bundles.items}
    candidates: dict[frozenset[int], NDArray[np.int32]] = {}
    for rows in (*sets, *_compose_pairs(head, vectors, targets, texts, seed)):
        candidates.setdefault(frozenset(rows.tolist()), np.sort(rows))
    fresh = [rows for items, rows in candidates.items() if items not in known]
    if not fresh:
        return []
    queries = Queries.leave_one_out(fresh, [""] * len(fresh))
    unsure_of_queries = np.concatenate(
        [
            _compute_completion_entropies(head, vectors, targets, queries.take(slice(start, start + _QUERIES_AT_ONCE)))
            for start in range(0, len(queries), _QUERIES_AT_ONCE)
        ]
    )
    unsure = np.bincount(queries.bundles, unsure_of_queries) / np.bincount(queries.bundles)
    with torch.inference_mode():
        wholes = (
            encode_contexts(head, vectors, pad_contexts([rows.astype(np.int64) for rows in fresh]))
            .float()
            .cpu()
            .numpy()
        )
    chosen = choose_spread(wholes, unsure, count, seed)
    return [
        _to_judge(f"suggested-{place}", dataset, fresh[row], float(unsure[row]))
        for place, row in enumerate(chosen, start=1)
    ]


def compute_margins(probabilities: NDArray[np.floating[Any]], exclusive: bool) -> NDArray[np.float64]:
    """Return how near the two likeliest answers are: (N, C) -> (N,), 0 for a sure answer, 1 for two that are alike.

    Args:
        exclusive: a row is one distribution over two classes or more; else each class is a yes or no, and their mean is
            returned.
    Source: Scheffer et al. 2001, "Active hidden Markov models for information extraction"; Settles 2009, section 3.1.
    """
    p = np.asarray(probabilities, np.float64)
    if not exclusive:
        return np.asarray((1 - np.abs(2 * p - 1)).mean(1), np.float64)
    best = np.partition(p, -2, axis=1)
    return np.asarray(1 - (best[:, -1] - best[:, -2]), np.float64)


def compute_entropies(probabilities: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return how evenly (N, C) distributions are spread: (N,), 0 for a sure answer, 1 where all are alike.

    Where thousands of items could be right, the two likeliest are always near; how many are in play says more.
    """
    p = np.asarray(probabilities, np.float64)
    return np.asarray(-xlogy(p, p).sum(1) / np.log(max(2, p.shape[1])), np.float64)


def choose_spread(vectors: NDArray[np.float32], weights: NDArray[np.float64], count: int, seed: int) -> list[int]:
    """Choose rows of great weight that lie far from each other.

    The first is drawn by its weight, each further one by weight times the squared distance to the nearest that was
    chosen: the seeding of k-means++, in which a copy of a chosen row has no chance.

    Args:
        vectors: (N, D). weights: (N,) from 0 to 1; they count sharpened.
        count: at most so many; fewer where nothing of any weight is left that is no copy.
        seed: another seed, another choice.
    Returns:
        distinct rows in the order of the choice.
    Source: Arthur and Vassilvitskii 2007 (k-means++); with uncertainty for the choice of what to label, Ash et al.
        2020, "Deep batch active learning by diverse, uncertain gradient lower bounds" (BADGE), where the length of
        the gradient is the weight.
    """
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    sharpened = np.asarray(weights, np.float64) ** _SHARPNESS
    chances = sharpened
    distances = np.full(len(vectors), np.inf)
    while len(chosen) < count and (total := chances.sum()) > 0:
        row = int(rng.choice(len(vectors), p=chances / total))
        chosen.append(row)
        distances = np.minimum(distances, ((vectors - vectors[row]) ** 2).sum(1, dtype=np.float64))
        # Unit vectors of equal texts differ by rounding, if at all.
        distances[distances < 1e-9] = 0.0
        chances = sharpened * distances
    return chosen


def _compose_pairs(
    head: BundleHead,
    vectors: NDArray[np.float32],
    targets: NDArray[np.float32],
    texts: Sequence[str],
    seed: int,
) -> list[NDArray[np.int32]]:
    """Pair items with what completes them best, copies of their own text left out."""
    rows = np.arange(len(texts))
    if len(rows) > _COMPOSED_FOR:
        rows = np.sort(np.random.default_rng(seed).choice(rows, _COMPOSED_FOR, replace=False))
    _, copies = np.unique(np.array(texts), return_inverse=True)
    pairs = []
    for start in range(0, len(rows), _QUERIES_AT_ONCE):
        some = rows[start : start + _QUERIES_AT_ONCE]
        scores = score_completion(head, vectors, targets, some[:, None])
        scores[copies[some][:, None] == copies] = -np.inf
        best = scores.argmax(1)
        there = np.isfinite(scores[np.arange(len(some)), best])
        pairs += list(np.stack([some[there], best[there]], 1).astype(np.int32))
    return pairs


def _compute_completion_entropies(
    head: BundleHead, vectors: NDArray[np.float32], targets: NDArray[np.float32], queries: Queries
) -> NDArray[np.float64]:
    """Return how unsure the head is of what completes each context: (Q,)."""
    logits = score_completion(head, vectors, targets, queries.contexts) * float(step_scale(head))
    for row, excluded in zip(logits, queries.excluded(), strict=True):
        row[excluded] = -np.inf
    return compute_entropies(softmax(logits, axis=1))


def _to_classify(text: str, head: ClassificationHead, likely: NDArray[np.float32], unsure: float) -> LabelSuggestion:
    best = np.argsort(-likely, kind="stable")[:3]
    guess = ", ".join(f"{head.labels[one]} {likely[one]:.2f}" for one in best)
    return LabelSuggestion(
        unsure, text, guess, ({"text": text, "label": "", "guess": guess, "uncertainty": round(unsure, 4)},)
    )


def _to_tag(read: EncodedWords, head: TaggingHead, unsure: float) -> LabelSuggestion:
    found = read.entities(head.tags)
    guess = ", ".join(f"{one.text} ({one.type})" for one in found) or "nothing"
    spans = [[one.start, one.end, one.type] for one in found]
    return LabelSuggestion(
        unsure, read.text, guess, ({"text": read.text, "spans": spans, "uncertainty": round(unsure, 4)},)
    )


def _to_judge(name: str, dataset: Dataset, rows: NDArray[np.int32], unsure: float) -> LabelSuggestion:
    titles = [dataset.catalog.titles[row] for row in rows]
    lines = tuple(
        {"bundle_id": name, "item_id": dataset.catalog.item_ids[row], "title": title, "uncertainty": round(unsure, 4)}
        for row, title in zip(rows, titles, strict=True)
    )
    return LabelSuggestion(unsure, " + ".join(titles), "", lines)
