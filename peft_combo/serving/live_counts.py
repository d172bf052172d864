"""What users bought while the service runs, counted by the scorers that can take in more rows without fitting anew.

Owns which purchases count, by user, and the recommender of a release that has counted them. Co-occurrence, neighbours,
popularity, ALS and (on small catalogues) EASE take rows in by `Scorer.update`, each in a copy: what was fitted stays as
it was. Weights of the fusion are not fitted anew.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from scipy import sparse

from peft_combo.data.model import Catalog
from peft_combo.recommender.fitted_scorers import Fitted, FittedScorer
from peft_combo.recommender.recommender import BundleRecommender
from peft_combo.recommender.scorer_id import ScorerId
from peft_combo.scoring import ALS, EASE, CoOccurrence, ItemKNN, Popularity, UserKNN
from peft_combo.scoring.base import Csr
from peft_combo.serving.release import Release
from peft_combo.serving.state import EventRow

_LIKED = 4.0  # a rating from here on counts as a purchase
_SMALL = 2_000  # items up to which the inverse of EASE is corrected: that takes the square of them


class LiveCounts:
    """Purchases since the releases were fitted; safe to share between threads."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._lock = threading.Lock()
        self._baskets: list[tuple[str, tuple[int, ...]]] = []  # of a user, rows of the catalogue
        self._started = 0  # grows when somebody was forgotten, so that all is counted anew
        # Per release: `_started` and how many baskets were counted, and the recommender that has.
        self._folded: weakref.WeakKeyDictionary[Release, tuple[int, int, BundleRecommender]] = (
            weakref.WeakKeyDictionary()
        )

    def add(self, events: Sequence[EventRow]) -> bool:
        """Take in events, those of one user as one basket; say whether any counts. New items are not counted yet."""
        found: dict[str, dict[int, None]] = {}
        for event in events:
            row = self._catalog.index.get(event.item_id)
            liked = event.kind == "rating" and event.value is not None and event.value >= _LIKED
            if row is not None and (event.kind == "purchase" or liked):
                found.setdefault(event.user_key, {})[row] = None
        with self._lock:
            self._baskets += [(user, tuple(rows)) for user, rows in found.items()]
        return bool(found)

    def forget(self, users: Collection[str]) -> bool:
        """Take out what users bought; say whether there was anything."""
        with self._lock:
            kept = [one for one in self._baskets if one[0] not in users]
            changed = len(kept) < len(self._baskets)
            self._baskets = kept
            self._started += changed
        return changed

    def fold(self, release: Release) -> BundleRecommender:
        """Return the recommender of a release with everything counted that was bought since."""
        with self._lock:
            baskets, started = list(self._baskets), self._started
            known = self._folded.get(release)
        if known is None or known[0] != started:
            known = (started, 0, release.base)
        _, counted, recommender = known
        if counted < len(baskets):
            recommender = _count(recommender, [rows for _, rows in baskets[counted:]])
            with self._lock:
                self._folded[release] = (started, len(baskets), recommender)
        return recommender


def _count(recommender: BundleRecommender, baskets: Sequence[Sequence[int]]) -> BundleRecommender:
    state, items = recommender.state, len(recommender.dataset.catalog)
    ends = np.cumsum([0, *map(len, baskets)])
    columns = np.array([row for rows in baskets for row in rows], np.int64)
    rows: Csr = sparse.csr_array((np.ones(len(columns), np.float32), columns, ends), shape=(len(baskets), items))
    serving: dict[ScorerId, Fitted] = {}
    for name, fitted in state.serving.items():
        if isinstance(fitted, FittedScorer) and _can_count(fitted, items):
            fitted = FittedScorer(copy.copy(fitted.scorer).update(rows))
        serving[name] = fitted
    retrieval = None if state.retrieval is None else state.retrieval.grow(serving, {*columns.tolist()})
    changed = replace(state, serving=serving, retrieval=retrieval)
    return BundleRecommender(
        recommender.dataset, recommender.bank, changed, composer=recommender.composer, like=recommender
    )


def _can_count(fitted: FittedScorer, items: int) -> bool:
    """Say whether a scorer takes rows in for much less than fitting costs."""
    scorer = fitted.scorer
    return isinstance(scorer, Popularity | CoOccurrence | ItemKNN | UserKNN | ALS) or (
        isinstance(scorer, EASE) and type(scorer) is EASE and items <= _SMALL
    )
