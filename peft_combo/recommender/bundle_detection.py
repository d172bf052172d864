"""Detection of the bundles hidden in a session: which items belong together, by pairs, and the groups they form.

Owns the pair model, how pairs become groups and how both are chosen: on the sessions of training users, or on sessions
made up of training bundles where a shop has none. Knows nothing of requests.

Source: Sun et al. 2022, "Revisiting bundle recommendation" (the task); Sokal and Michener 1958 (average linkage).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from peft_combo.data.model import Dataset
from peft_combo.data.queries import assign_folds
from peft_combo.data.sessions import LabelledSession, list_sessions, make_up_sessions
from peft_combo.data.splits import Split
from peft_combo.errors import DataError
from peft_combo.metrics.detection import SetMatch, match_sets
from peft_combo.metrics.regression import fit_logistic
from peft_combo.recommender.fit_data import FitData
from peft_combo.recommender.pair_columns import PairReader
from peft_combo.recommender.text_ranking.columns import standardize_columns
from peft_combo.recommender.text_ranking.views import Floats

Linkage = Literal["average", "complete"]
Aim = Literal["whole", "sure"]
"""What the grouping is chosen by: agreement with whole bundles, or the mean of precision, recall and coverage."""

_LINKAGES: tuple[Linkage, ...] = ("average", "complete")
_THRESHOLDS = tuple(round(0.3 + 0.05 * step, 2) for step in range(14))  # 0.3 to 0.95
_FOLDS = 5
# Inverse of the ridge penalty of the pair model.
_STRENGTH = 0.03
# Below so many sessions bundles say more; so many are made up of them.
_FEWEST, _MADE_UP = 30, 1_000


@dataclass(frozen=True)
class Grouping:
    """How pairs become groups: clustered until no two clusters have `threshold` of probability between them.

    Attributes:
        linkage: between two clusters, the mean of their pairs or the least. threshold: in (0, 1).
    """

    linkage: Linkage = "average"
    threshold: float = 0.5

    def __str__(self) -> str:
        return f"{self.linkage} linkage, threshold {self.threshold:g}"

    def group(self, together: NDArray[np.float64]) -> list[frozenset[int]]:
        """Return groups of two or more places, disjoint; the surest pair alone where none reaches the threshold.

        Args:
            together: (S, S) symmetric, the probability that two items share a bundle; the diagonal is not read.
        """
        return cut_tree(_grow_tree(together, self.linkage), together, self.threshold)


@dataclass(frozen=True)
class Detected:
    """One group of items.

    Attributes:
        rows: of the catalogue, in the order given. belongs: per item the mean probability that it shares a bundle with
            each other one. score: their mean.
    """

    rows: tuple[int, ...]
    belongs: tuple[float, ...]
    score: float


@dataclass(frozen=True, eq=False)
class BundleDetector:
    """Finds bundles in sessions.

    Attributes:
        reader: the columns of pairs. centre, spread, weights: (F,) of the logistic regression on them, and its offset.
        groupings: per aim. learned_from: real sessions, or bundles alone. sessions: how many of these.
        scores: of the chosen grouping of each aim, out of fold on what it was chosen on.
    """

    reader: PairReader
    centre: Floats
    spread: Floats
    weights: Floats
    offset: float
    groupings: Mapping[Aim, Grouping]
    learned_from: Literal["sessions", "bundles"]
    sessions: int
    scores: Mapping[Aim, float]

    @classmethod
    def fit(cls, known: FitData, dataset: Dataset, parts: Split | None, *, alone: bool = False, seed: int = 0) -> Self:
        """Learn from the sessions of training users, or from training bundles where there are too few.

        Args:
            known: what may be seen: its bundles are counted, and are what sessions are made up of.
            parts: whose training sessions may be seen; None for all of them.
            alone: learn from bundles alone, whatever sessions there are.
        Raises:
            DataError: there is nothing to tell apart: fewer than two different bundles, and no sessions.
        """
        sessions = [] if alone else list_sessions(dataset, parts, "train")
        real = len(sessions) >= _FEWEST and _tell_apart(sessions)
        if not real:
            rows = [known.history.indices[start:stop] for start, stop in pairwise(known.history.indptr)]
            sessions = make_up_sessions(known.catalog, rows, known.groups, _MADE_UP, seed)
        if not _tell_apart(sessions):
            raise DataError(
                f"{dataset.name!r} has too few bundles to learn what tells them apart: expected two or more with "
                "different items. Add bundles, or a larger part of them to train on."
            )
        reader = PairReader.of(known.text_views, known.history, known.groups)
        pairs = [reader.read(one.items, one.left_out) for one in sessions]
        labels = [_label_pairs(one) for one in sessions]
        held = _predict_held_out(pairs, labels, sessions, seed)
        groupings, scores = _choose_groupings(held, sessions)
        centre, spread, weights, offset = _solve(pairs, labels)
        return cls(
            reader, centre, spread, weights, offset, groupings, "sessions" if real else "bundles", len(sessions), scores
        )

    @property
    def source(self) -> str:
        """What it learned from, in words."""
        return f"{self.sessions:,} sessions" + (" made of bundles" if self.learned_from == "bundles" else "")

    def link(self, items: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return how probable it is that two items of a session share a bundle: (S,) distinct rows -> (S, S)."""
        return _square(
            _predict(self.reader.read(items), self.centre, self.spread, self.weights, self.offset), len(items)
        )

    def detect(self, items: NDArray[np.int64], aim: Aim = "whole") -> list[Detected]:
        """Return the groups of a session, the surest first: (S,) distinct rows, at least two; never none."""
        together = self.link(items)
        np.fill_diagonal(together, np.nan)
        found = []
        for group in self.groupings[aim].group(together):
            places = sorted(group)
            belongs = np.nanmean(together[np.ix_(places, places)], axis=1)
            found.append(Detected(tuple(items[places].tolist()), tuple(map(float, belongs)), float(belongs.mean())))
        return sorted(found, key=lambda one: -one.score)


def cut_tree(tree: NDArray[np.float64], together: NDArray[np.float64], threshold: float) -> list[frozenset[int]]:
    """Cut a tree of `_grow_tree`; see `Grouping.group`."""
    labels = fcluster(tree, 1 - threshold, "distance")
    groups = [frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)]
    kept = [group for group in groups if len(group) > 1]
    if kept:
        return kept
    values = np.array(together, np.float64)
    np.fill_diagonal(values, -np.inf)
    return [frozenset(int(place) for place in np.unravel_index(values.argmax(), values.shape))]


def _grow_tree(together: NDArray[np.float64], how: Linkage) -> NDArray[np.float64]:
    distance = 1 - together
    np.fill_diagonal(distance, 0.0)
    tree: NDArray[np.float64] = linkage(squareform(np.maximum(distance, 0.0), checks=False), how)
    return tree


def _label_pairs(session: LabelledSession) -> NDArray[np.bool_]:
    labels: NDArray[np.bool_] = session.tell_pairs()[np.triu_indices(len(session.items), 1)]
    return labels


def _tell_apart(sessions: Sequence[LabelledSession]) -> bool:
    """Say whether some pairs share a bundle and some do not."""
    return len({bool(label) for one in sessions for label in np.unique(_label_pairs(one))}) == 2


def _square(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    full = np.zeros((size, size))
    full[np.triu_indices(size, 1)] = values
    return full + full.T


def _predict(columns: Floats, centre: Floats, spread: Floats, weights: Floats, offset: float) -> NDArray[np.float64]:
    standard = standardize_columns(columns, centre, spread)
    found: NDArray[np.float64] = 1 / (1 + np.exp(-(standard @ weights + offset).astype(np.float64)))
    return found


def _solve(pairs: Sequence[Floats], labels: Sequence[NDArray[np.bool_]]) -> tuple[Floats, Floats, Floats, float]:
    """Fit the logistic regression; a session counts as the root of its pairs, for these are not independent."""
    values = np.concatenate(list(pairs))
    counts = np.concatenate([np.full(len(own), len(own) ** -0.5) for own in labels])
    centre, spread = values.mean(axis=0), values.std(axis=0) + 1e-6
    standard = standardize_columns(values, centre, spread)
    offset, *weights = fit_logistic(standard, np.concatenate(list(labels)), 1 / _STRENGTH, counts)
    return centre, spread, np.array(weights, np.float32), float(offset)


def _predict_held_out(
    pairs: Sequence[Floats], labels: Sequence[NDArray[np.bool_]], sessions: Sequence[LabelledSession], seed: int
) -> list[NDArray[np.float64]]:
    """Predict the pairs of every session by a model that saw no session of its user: per session (S, S)."""
    fold_of = assign_folds(np.array([one.group for one in sessions]), _FOLDS, np.random.default_rng(seed))
    found: list[NDArray[np.float64]] = [np.empty(0)] * len(sessions)
    for fold in np.unique(fold_of):
        seen = [place for place in range(len(sessions)) if fold_of[place] != fold]
        if len(np.unique(np.concatenate([labels[place] for place in seen] or [np.empty(0, bool)]))) < 2:
            seen = list(range(len(sessions)))  # too few to hold any out
        solved = _solve([pairs[place] for place in seen], [labels[place] for place in seen])
        for place in np.flatnonzero(fold_of == fold).tolist():
            found[place] = _square(_predict(pairs[place], *solved), len(sessions[place].items))
    return found


def _choose_groupings(
    held: Sequence[NDArray[np.float64]], sessions: Sequence[LabelledSession]
) -> tuple[dict[Aim, Grouping], dict[Aim, float]]:
    """Choose linkage and threshold for each aim; of equals the first."""
    truths = [[one.find_places(bundle) for bundle in one.bundles] for one in sessions]
    aims: dict[Aim, Callable[[Sequence[SetMatch]], float]] = {"whole": score_agreement, "sure": score_hits}
    tried: dict[Grouping, list[SetMatch]] = {}
    for how in _LINKAGES:
        trees = [_grow_tree(together, how) for together in held]
        for threshold in _THRESHOLDS:
            tried[Grouping(how, threshold)] = [
                match_sets(cut_tree(tree, together, threshold), truth)
                for tree, together, truth in zip(trees, held, truths, strict=True)
            ]
    scores = {aim: {one: score(matches) for one, matches in tried.items()} for aim, score in aims.items()}
    chosen = {aim: max(own, key=own.__getitem__) for aim, own in scores.items()}
    return chosen, {aim: scores[aim][one] for aim, one in chosen.items()}


def score_agreement(matches: Sequence[SetMatch]) -> float:
    """Return the mean agreement of sessions."""
    return fmean(one.agreement for one in matches)


def score_hits(matches: Sequence[SetMatch]) -> float:
    """Return the mean of precision, recall and coverage, the last over all hits."""
    covered = [share for one in matches for share in one.coverage]
    return (
        fmean(one.precision for one in matches)
        + fmean(one.recall for one in matches)
        + (fmean(covered) if covered else 0.0)
    ) / 3
