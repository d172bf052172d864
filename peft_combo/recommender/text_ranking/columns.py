"""Columns of a question: what each text view says of the candidates, beside its context and within the question.

Owns how candidates are found and how likenesses to several context items become one number. Reads no support.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peft_combo.recommender.text_ranking.views import Floats, TextViews

# CandidateColumns that each view puts forward.
DEPTH = 50
LOOKS_ALIKE = "looks alike"
# Columns are in deviations; farther ones are outliers.
_FAR = 6.0
_LEAST = ("words", "words and category", "joint", "encoder", "kinship", "place in its own list, words",
          "place in its own list, joint")  # fmt: skip


@dataclass(frozen=True, eq=False)
class CandidateColumns:
    """The candidates of one question.

    Attributes:
        rows: (C,) of the catalogue. columns: (C, F). base: (N,) sum of z-scores of all views, -inf for the context.
    """

    rows: NDArray[np.int64]
    columns: Floats
    base: Floats


def scan(views: TextViews, context: NDArray[np.int64]) -> Floats:
    """Score the whole catalogue by the mean likeness of each view that candidates are sought with: (V, N)."""
    found = (views.sparse.average(context, len(views.scans)) @ views.postings).toarray()
    vectors = views.dense["joint"]
    return np.vstack([found, vectors @ vectors[context].mean(axis=0)]).astype(np.float32, copy=False)


def gather(views: TextViews, context: NDArray[np.int64]) -> CandidateColumns:
    """Find the candidates of a context and tell them apart: (S,) rows of the catalogue, at least one."""
    scores = scan(views, context)
    items = len(views.depth)
    others = items - len(np.unique(context))
    scores[:, context] = 0
    mean = scores.sum(axis=1, dtype=np.float64) / max(others, 1)
    spread = np.sqrt(np.maximum(np.einsum("vn,vn->v", scores, scores, dtype=np.float64) / max(others, 1) - mean**2, 0))
    factors = 1 / (spread + 1e-9)
    base = factors.astype(np.float32) @ scores - np.float32(factors @ mean)
    scores = np.vstack([scores, base])
    scores[:, context] = -np.inf
    depth = min(DEPTH, others)
    rows = np.empty(0, np.int64)
    if depth:
        rows = np.unique(np.argpartition(scores, items - depth, axis=1)[:, items - depth :])
    # A copy: fitting keeps this of every question, and a view would keep the scores of all views.
    return CandidateColumns(rows, _tell_apart(views, context, rows, scores), scores[-1].copy())


def name_columns(views: TextViews) -> tuple[str, ...]:
    """Return the names of the columns, in order."""
    spread = [
        f"{name}, {how}"
        for name in _list_pairs(views)
        for how in ("mean", "best", "least")
        if how != "least" or name in _LEAST
    ]
    within = [f"{name}, {how}" for name in (*views.scans, "joint", "all views") for how in ("rank", "gap")]
    hubs = [f"hubness, {name}, {how}" for name in views.crowding for how in ("nearest", "soft")]
    return (*spread, *within, "all views", *views.item_names, *hubs)


def describe_column(name: str, views: TextViews, context: NDArray[np.int64], row: int) -> str:
    """Say in words what a column of `name_columns` finds in an item beside a context."""
    view = name.rsplit(", ", 1)[0].removeprefix("place in its own list, ").removeprefix("hubness, ")
    if name.startswith("hubness") or view in views.item_names:
        return "few items are like it"
    if view in ("leaf", "leaf's name"):
        return "same category"
    if view in ("category path", "kinship"):
        return "near categories"
    if view in ("first word", "first two words"):
        return "same first words (brand)"
    if view == "pictures":
        return LOOKS_ALIKE
    if view in ("latent words", "encoder", "encoder with category", "joint"):
        return "texts mean alike"
    shared = _find_shared_words(views, context, row)
    return f"titles share {' and '.join(map(repr, shared))}" if shared else "titles are spelled alike"


def _find_shared_words(views: TextViews, context: NDArray[np.int64], row: int) -> list[str]:
    """Return the two rarest words that an item's text shares with any of a context's."""
    beside = views.words[context].indices
    shared = np.intersect1d(views.words[[row]].indices, beside)
    rarest = shared[np.argsort(-views.rarity[shared], kind="stable")][:2]
    return [views.terms[term] for term in rarest]


def _list_pairs(views: TextViews) -> list[str]:
    """Name what is told of pairs, in the order of the columns."""
    reverse = [f"place in its own list, {name}" for name in views.crowding]
    return [*views.sparse.names, "kinship", "rarest shared word", *views.dense, *reverse]


def standardize_columns(columns: Floats, centre: Floats, spread: Floats) -> Floats:
    """Bring (M, F) columns to a mean of 0 and a deviation of 1 by (F,) of each, outliers cut off at six deviations."""
    return np.asarray(np.clip((columns - centre) / spread, -_FAR, _FAR), np.float32)


def _tell_apart(views: TextViews, context: NDArray[np.int64], rows: NDArray[np.int64], scores: Floats) -> Floats:
    """Return the columns of candidates; `scores` are (V + 1, N) of the views they were sought with and their sum."""
    alike = views.compare(context, rows)
    alike["rarest shared word"] = _rarest(views, context, rows)
    for name, crowd in views.crowding.items():
        alike[f"place in its own list, {name}"] = -crowd.reverse_ranks(alike[name], rows)
    columns: list[Floats] = []
    for name in _list_pairs(views):
        values = alike[name]
        columns += [values.mean(axis=0), values.max(axis=0)]
        if name in _LEAST:
            columns.append(values.min(axis=0))
    for values, ordered in zip(scores[:, rows], np.sort(scores, axis=1), strict=True):
        place = len(ordered) - np.searchsorted(ordered, values, side="right")
        columns += [np.log1p(place).astype(np.float32), values - ordered[-1]]
    columns.append(scores[-1, rows])
    columns += list(views.items[rows].T)
    for crowd in views.crowding.values():
        columns += list(crowd.hubness[rows].T)
    return np.stack(columns, axis=1).astype(np.float32) if len(rows) else np.empty((0, len(columns)), np.float32)


def _rarest(views: TextViews, context: NDArray[np.int64], rows: NDArray[np.int64]) -> Floats:
    """Return the rarity of the rarest word that each pair shares, 0 for none: (S, C)."""
    words = views.words[rows]
    found = np.zeros((len(context), len(rows)), np.float32)
    asked = np.zeros(words.shape[1], np.float32)
    filled = np.flatnonzero(np.diff(words.indptr))
    for place, item in enumerate(context):
        own = views.words.indices[views.words.indptr[item] : views.words.indptr[item + 1]]
        asked[own] = views.rarity[own]
        if len(filled):
            found[place, filled] = np.maximum.reduceat(asked[words.indices], words.indptr[:-1][filled])
        asked[own] = 0
    return found
