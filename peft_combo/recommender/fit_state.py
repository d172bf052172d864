"""Fitting of a recommender: settings, fusion and weights chosen on validation, then scorers fitted on all bundles.

Owns the order of that work and the value it results in, which is what a recommender answers from and what is stored.
Knows nothing of requests, or of how an adapter was tuned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.leakage import rating_problem
from peft_combo.data.model import Dataset
from peft_combo.data.queries import Queries
from peft_combo.data.splits import Split
from peft_combo.encoder.bank import AdapterBank, LiveAdapter
from peft_combo.encoder.index import FaissMissing
from peft_combo.encoder.vectors import VectorCache
from peft_combo.errors import DataError
from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.fit_weights import fit_weights
from peft_combo.recommender.composing.options import ModeWeights
from peft_combo.recommender.fit_data import FitData, TextSide, encode_catalog
from peft_combo.recommender.fitted_scorers import Fitted, FittedHead, build_past, fuse_scorers
from peft_combo.recommender.fusion import Fusion
from peft_combo.recommender.item_index import find_home
from peft_combo.recommender.item_pictures import take_texts
from peft_combo.recommender.model_selection import list_scorers, make_queries, select_settings, select_text_scorer
from peft_combo.recommender.retrieval import Retrieval
from peft_combo.recommender.scorer_id import NEXT_BASKET, RANDOM, ScorerId
from peft_combo.recommender.text_search import TextQueries, TextSearch, build_views, select_weights
from peft_combo.recommender.user_habits import UserHabits, choose_habits

# Validation queries that settings and weights are chosen on.
_QUERIES = 2_000
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FitState:
    """What fitting found: all that a recommender answers from, beside its data and encoder.

    Attributes:
        adapters: those that make item vectors, as they were when it was fitted; none for the frozen encoder.
        known: what the serving scorers were fitted on.
        fusion: how scorers are weighed, with the validation table behind the choice.
        settings: of each scorer the fusion needs, and of the text side, the setting that validation selected.
        serving: the scorers the fusion needs, fitted on all bundles.
        text_scorer: which scorer the text side is; None for the frozen encoder.
        text_side: judges how well an item goes with a set by its text alone.
        neighbours: what users alike took, where the fusion could not weigh it; None elsewhere.
        weights: of a composed bundle's objective by kind of request, as validation chose them.
        search: finds items and bundles by words; the weights of its views are those that validation intents chose.
        split_digest: of the split that settings and weights were chosen on.
        notes: what was left out, and why.
        habits: what a user takes next, added where a request gives a user and no items; None where validation found
            it not worth adding.
        retrieval: finds candidates before scoring; None scores all items.
    """

    adapters: tuple[LiveAdapter, ...]
    known: FitData
    fusion: Fusion[ScorerId]
    settings: Mapping[ScorerId, str]
    serving: Mapping[ScorerId, Fitted]
    text_scorer: ScorerId | None
    text_side: Fitted
    neighbours: Fitted | None
    weights: ModeWeights
    search: TextSearch
    split_digest: str
    notes: tuple[str, ...]
    habits: UserHabits | None = None
    retrieval: Retrieval | None = None

    def with_retrieval(self, from_rows: int) -> FitState:
        """Return it with indexes for `retrieval`; see `BundleRecommender.with_retrieval`."""
        if self.retrieval is not None or len(self.known.support) < from_rows:
            return self
        assert self.known.frozen is not None
        try:
            return replace(self, retrieval=Retrieval.build(self.serving, find_home(self.known.frozen)))
        except FaissMissing as error:
            _LOG.warning("Every request scores all %d items. %s", len(self.known.support), error)
            return self


def fit_scorers(
    dataset: Dataset,
    parts: Split,
    bank: AdapterBank,
    adapters: str | Sequence[str] | None,
    *,
    seed: int = 0,
    cache: VectorCache | None = None,
    progress: Callable[[int], None] | None = None,
    done: Callable[[str], None] | None = None,
) -> FitState:
    """Choose settings and fusion on the validation bundles, then learn from all bundles; see `BundleRecommender.fit`.

    Raises:
        StoreError: an adapter cannot be had.
        DataError: no validation bundle to fit the fusion on, or the adapters do not go together.
    """
    if not len(parts.valid):
        raise DataError(
            f"{dataset.name!r} has no validation bundle to weigh the scorers on. Raise data.valid_fraction."
        )
    side = encode_catalog(dataset, bank, adapters, cache, progress)
    notes = _leakage_notes(side, dataset, parts)

    # Every scorer in every setting, fitted on training bundles; the best setting on validation stays.
    known = side.gather(dataset, parts.train, parts.train_interactions)
    valid = make_queries(dataset, parts.valid, _QUERIES, seed, "valid", notes)
    users = {dataset.bundles.groups[row] for row in parts.valid}
    choices = {scorer: settings for scorer, settings in list_scorers(known, users, seed).items() if scorer != RANDOM}
    selected = select_settings(choices, valid, known, seed, done or (lambda name: None), notes)

    # Weights of the fusion and of the composer's objective, while the scorers know training bundles only.
    scores = {scorer: one.scores for scorer, one in selected.items()}
    fusion = Fusion.fit(scores, valid.targets, known.evidence(valid), valid.groups, seed=seed)
    scores.clear()
    text_scorer = select_text_scorer(selected)
    text_side = selected[text_scorer].fitted if text_scorer else FittedHead.of_frozen(side.frozen)
    seen = [dataset.bundles.items[row] for row in parts.train]
    composer = Composer.learn(dataset.catalog, seen, vectors=side.frozen, history=known.history)
    relevance = fuse_scorers(fusion, {scorer: one.fitted for scorer, one in selected.items()}, known)
    habit_weight = 0.0
    if NEXT_BASKET in selected:
        next_basket = selected[NEXT_BASKET].fitted
        habit_weight = choose_habits(known, dataset.bundles, parts.valid, relevance, next_basket, fusion.form)
    search = _choose_search(dataset, parts, bank, side)
    words = _AskedInWords.of(search, dataset, parts.valid)
    weights = fit_weights(composer, valid, relevance, text_side, words, seed=seed)

    # For serving, once more on every bundle there is.
    everything = side.gather(dataset)
    settings = {scorer: selected[scorer].setting for scorer in fusion.needs}
    serving = _refit(everything, settings, seed, {scorer: selected[scorer].fitted for scorer in settings})
    if text_scorer:
        settings[text_scorer] = selected[text_scorer].setting
    # What was not weighed, because no validation user was met before, still speaks for a user who is known.
    weighed = not known.user_rows.keys().isdisjoint(users)
    neighbours = None if weighed or not everything.user_rows else build_past(everything, neighbours=True)
    return FitState(
        side.live, everything, fusion, settings, serving, text_scorer, text_side, neighbours, weights,
        search.with_indexes(), parts.digest, tuple(notes),
        UserHabits.of(everything, selected[NEXT_BASKET].setting, habit_weight) if habit_weight else None,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _AskedInWords:
    """Queries asked by what their bundle is called, or by the title of an item that is there where it has no name.

    Attributes:
        names: by the items of a bundle.
    """

    search: TextSearch
    names: Mapping[frozenset[int], str | None]
    titles: Sequence[str]

    @classmethod
    def of(cls, search: TextSearch, dataset: Dataset, rows: NDArray[np.int32]) -> _AskedInWords:
        """Take the names of some bundles."""
        bundles = dataset.bundles
        names = {frozenset(bundles.items[row].tolist()): bundles.intents[row] for row in rows.tolist()}
        return cls(search, names, dataset.catalog.titles)

    def __call__(self, queries: Queries) -> NDArray[np.float32]:
        texts = []
        for context, target in zip(queries.contexts, queries.targets.tolist(), strict=True):
            rows = context[context >= 0].tolist()
            texts.append(self.names.get(frozenset([*rows, target])) or self.titles[rows[0]])
        return self.search.score_items(texts)


def _choose_search(dataset: Dataset, parts: Split, bank: AdapterBank, side: TextSide) -> TextSearch:
    """Choose the weights of the text search on validation intents."""
    tuned = {name: take_texts(own, bank.backbone.dim) for name, (own, _) in side.tuned.items()}
    views = build_views(dataset, bank, side.frozen, side.described, tuned)
    valid = TextQueries.of(dataset.bundles, parts.valid, among=np.concatenate([parts.train, parts.valid]))
    return TextSearch.of(views, select_weights(views, valid))


def _leakage_notes(side: TextSide, dataset: Dataset, parts: Split) -> list[str]:
    """Say which adapters may have learned from the validation bundles that they are weighed on."""
    notes = [
        f"{one.reference} was tuned on another split, so it may have seen the validation bundles and weigh too much"
        for one in side.live
        if one.reference in side.tuned
        and one.record.manifest.data.split_digest != parts.digest
        and side.coverage is None
    ]
    manifests = (one.record.manifest for one in side.live if one.reference in side.rated)
    return notes + [problem for manifest in manifests if (problem := rating_problem(manifest, dataset, parts))]


def _refit(
    known: FitData, settings: Mapping[ScorerId, str], seed: int, as_before: Mapping[ScorerId, Fitted]
) -> dict[ScorerId, Fitted]:
    """Fit each scorer in the setting that was selected for it; what does not learn from bundles stays as it was."""
    choices = list_scorers(known, set(known.user_rows), seed)
    return {
        scorer: as_before[scorer]
        if scorer.stays_fitted
        else next(choice for choice in choices[scorer] if choice.setting == setting).fit()
        for scorer, setting in settings.items()
    }
