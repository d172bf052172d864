"""Model selection: every scorer in each of its settings, the best setting chosen on validation by NDCG@10.

Owns which scorers there are, what each is fitted on, and that validation picks their settings. The evaluation measures
these and the recommender serves them, so a figure of the one is a promise of the other. Knows nothing of fusion
weights, of how adapters are tuned, or of test bundles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo import metrics
from peft_combo.data.model import Dataset
from peft_combo.data.queries import Queries
from peft_combo.encoder.heads.completion import CompletionHead, project_targets
from peft_combo.errors import DataError, PeftComboError
from peft_combo.recommender.category_calibration import Calibration
from peft_combo.recommender.fit_data import FitData
from peft_combo.recommender.fitted_scorers import (
    _BESIDE,
    _PAST,
    _RATINGS,
    _SCORES,
    _VECTORS,
    Fitted,
    FittedCategories,
    FittedHead,
    FittedScorer,
    ItemVectors,
    build_ensemble,
    build_next_basket,
    build_past,
    build_rating,
    list_half_lives,
)
from peft_combo.recommender.relation_paths import lay_edges
from peft_combo.recommender.scorer_id import (
    ALIKE,
    BOUGHT,
    BY_CATEGORY,
    CEASE_BERT,
    ENSEMBLE,
    FROZEN,
    GRAPH,
    NEXT_BASKET,
    PEER,
    PICTURES,
    RANDOM,
    TEXT_RANKER,
    ScorerId,
)
from peft_combo.recommender.text_ranking import TextRanker
from peft_combo.scoring.base import Scorer
from peft_combo.scoring.factors import ALS
from peft_combo.scoring.linear import CEASE, EASE
from peft_combo.scoring.neighbours import ItemKNN, UserKNN
from peft_combo.scoring.paths import PathRanking
from peft_combo.scoring.popularity import CoOccurrence, Popularity, Random
from peft_combo.scoring.text import TextCosine, tfidf_vectors
from peft_combo.scoring.whitening import half_whiten

_QUERY_BLOCK = 256
ItemRows: TypeAlias = "sparse.csr_matrix[Any] | sparse.csr_array[Any, tuple[int, int]]"
# What is appended to a setting that also learns from baskets that are no bundles.
_WITH_BASKETS = "with baskets"
# Each setting of CEASE inverts a matrix of the size of the catalogue; on a large one only the best of them is tried.
_CEASE_SETTINGS = ((10.0, 3.0), (1.0, 0.3), (30.0, 10.0))
_MANY_ITEMS = 6_000


class Setting(Protocol):
    """A scorer in one setting, not yet fitted.

    Attributes:
        setting: tells it from the scorer's other settings; "" where there is one only.
    """

    @property
    def setting(self) -> str: ...

    def fit(self) -> Fitted:
        """Learn from what is known."""
        ...


@dataclass(frozen=True, eq=False)
class _Choice:
    setting: str
    scorer: Scorer
    history: ItemRows
    items: ItemVectors | None = None

    def fit(self) -> Fitted:
        # A copy: what a setting learned that is not chosen, for CEASE a matrix of items by items, is forgotten.
        return FittedScorer(copy.copy(self.scorer).fit(self.history, items=self.items))


@dataclass(frozen=True, eq=False)
class _Head:
    vectors: NDArray[np.float32]
    head: CompletionHead
    setting: str = ""

    def fit(self) -> Fitted:
        return FittedHead.of(self.vectors, self.head)


@dataclass(frozen=True, eq=False)
class _Ranker:
    known: FitData
    seed: int
    setting: str = ""

    def fit(self) -> Fitted:
        try:
            return TextRanker.fit(self.known.text_views, self.known.questions, self.seed)
        except ValueError as error:
            raise DataError(str(error)) from error


@dataclass(frozen=True, eq=False)
class _Past:
    known: FitData
    neighbours: bool
    setting: str = ""

    def fit(self) -> Fitted:
        return build_past(self.known, neighbours=self.neighbours, setting=self.setting)


@dataclass(frozen=True, eq=False)
class _NextBasket:
    known: FitData
    setting: str

    def fit(self) -> Fitted:
        return build_next_basket(self.known, self.setting)


@dataclass(frozen=True, eq=False)
class _Rating:
    known: FitData
    name: str
    setting: str

    def fit(self) -> Fitted:
        return build_rating(self.known, self.name, self.setting)


@dataclass(frozen=True, eq=False)
class _Ensemble:
    known: FitData
    setting: str

    def fit(self) -> Fitted:
        return build_ensemble(self.known, self.setting)


def list_scorers(known: FitData, owners: set[str], seed: int) -> dict[ScorerId, list[Setting]]:
    """Name the scorers, and for each the settings that validation chooses from; nothing is fitted yet.

    Args:
        users: groups of the queries that will be asked; what reads a user's past is named only where it knows one.
    """

    def counting(scorer: Scorer, setting: str = "") -> list[Setting]:
        choices: list[Setting] = [_Choice(setting, scorer, known.history)]
        if known.users is not None:
            choices.append(_Choice(f"{setting} with users".strip(), scorer, known.users))
        if known.baskets is not None:
            choices.append(_Choice(f"{setting} {_WITH_BASKETS}".strip(), scorer, known.weighted_baskets))
        return choices

    found: dict[ScorerId, list[Setting]] = {
        RANDOM: [_Choice("", Random(seed), known.history)],
        ScorerId("popularity"): counting(Popularity()),
        ScorerId("co-occurrence"): counting(CoOccurrence(), "conditional") + counting(CoOccurrence("lift"), "lift"),
        ScorerId("item-kNN"): counting(ItemKNN(), "cosine") + counting(ItemKNN(similarity="tfidf"), "tfidf"),
        ScorerId("user-kNN"): counting(UserKNN()),
        ScorerId("EASE"): [choice for l2 in (1.0, 10.0, 100.0) for choice in counting(EASE(l2), f"l2 {l2:g}")],
        ScorerId("ALS"): counting(ALS(seed=seed)),
        ScorerId("TF-IDF title"): _list_cosines(known, known.words),
        PEER: [
            *_list_linear(known, "words", known.words),
            *_list_linear(known, "words and pairs", tfidf_vectors(known.texts, longest=2)),
        ],
    }
    met = bool(owners & set(known.user_rows))
    if met:
        found[BOUGHT] = [_Past(known, neighbours=False)]
        found[ALIKE] = [_Past(known, neighbours=True)]
        if known.has_ratings:
            found[ALIKE] += [_Past(known, neighbours=True, setting=_RATINGS)]
        found[NEXT_BASKET] = [_NextBasket(known, setting) for setting in list_half_lives(known)]
    # CEASE may read the category path as well: a peer should know what we know.
    if known.categorised is not None:
        found[PEER] += _list_linear(known, "words and category", known.categorised)
    found[TEXT_RANKER] = [_Ranker(known, seed)]
    if known.relations is not None:
        names, edges = lay_edges(known.relations, known.catalog)
        found[GRAPH] = [_Choice("", PathRanking(names), known.history, edges)]
    return found | _list_encoders(known, met)


def _list_encoders(known: FitData, met: bool) -> dict[ScorerId, list[Setting]]:
    """Name the scorers that read vectors of an encoder, frozen or tuned."""
    found: dict[ScorerId, list[Setting]] = {}
    if known.frozen is not None and known.whitened is not None:
        label = "half-whitened" if known.described is None else "half-whitened, with category"
        found[FROZEN] = [
            *_list_cosines(known, known.frozen),
            _Choice(f"{label}, nearest to the mean", TextCosine("mean"), known.history, known.whitened),
        ]
    if known.pictures is not None:
        found[PICTURES] = _list_cosines(known, known.pictures)
    dense: dict[str, NDArray[np.float32]] = {}
    for name, (vectors, head) in known.tuned.items():
        found[ScorerId("tuned BERT", name)] = [_Head(vectors, head)]
        if name in known.general:
            dense[name] = project_targets(head, vectors)
    if len(dense) > 1:
        found[ENSEMBLE] = [_Ensemble(known, setting) for setting in (_SCORES, _VECTORS)]
    for name in known.rated:
        found[ScorerId("rated", name)] = [
            _Rating(known, name, setting) for setting in ((_PAST, _BESIDE) if met else (_BESIDE,))
        ]
    if not dense and known.frozen is not None:
        dense["frozen"] = known.frozen
    if dense:
        found[CEASE_BERT] = []
    for name, targets in dense.items():
        found[CEASE_BERT] += _list_linear(known, name, targets)
        if known.described is not None:  # what a title says, and what it says with its category before it
            own = targets if name in known.tuned else half_whiten(targets)
            views = np.hstack([own, half_whiten(known.described)])
            found[CEASE_BERT] += _list_linear(known, f"{name} beside title and category", views)
        if known.pictures is not None:
            own = targets if name in known.tuned else half_whiten(targets)
            found[CEASE_BERT] += _list_linear(known, f"{name} beside pictures", np.hstack([own, known.pictures]))
        for label, words in (("words", known.words), ("words and category", known.categorised)):
            if words is not None:
                # Rows are scaled to length 1 there, so each side has half the weight.
                beside: Any = sparse.hstack([words, sparse.csr_array(targets)], format="csr", dtype=np.float32)
                found[CEASE_BERT] += _list_linear(known, f"{name} beside {label}", sparse.csr_array(beside))
    return found


def _list_cosines(known: FitData, items: ItemVectors) -> list[Setting]:
    return [
        _Choice("nearest to the mean", TextCosine("mean"), known.history, items),
        _Choice("nearest to any", TextCosine("max"), known.history, items),
    ]


def _list_linear(known: FitData, label: str, items: ItemVectors) -> list[Setting]:
    grid = _CEASE_SETTINGS if len(known.texts) <= _MANY_ITEMS else _CEASE_SETTINGS[:1]
    rows: list[tuple[str, ItemRows, Sequence[tuple[float, float]]]] = [("", known.history, grid)]
    if known.baskets is not None:  # more rows, nearly always better: of bundles alone one setting is enough
        rows = [("", known.history, grid[:1]), (f" {_WITH_BASKETS}", known.weighted_baskets, grid)]
    return [
        _Choice(f"{label}, l2 {l2:g}, alpha {alpha:g}{suffix}", CEASE(l2, alpha), history, items)
        for suffix, history, settings in rows
        for l2, alpha in settings
    ]


@dataclass(frozen=True, eq=False)
class SelectedScorer:
    """A scorer in the setting that is best on validation.

    Attributes:
        scores: (Q, N) of the validation queries. ndcg: NDCG@10 of them.
    """

    setting: str
    fitted: Fitted
    scores: NDArray[np.float32]
    ndcg: float


def select_setting(choices: Sequence[Setting], valid: Queries) -> SelectedScorer:
    """Return the setting with the best NDCG@10 on validation, the first of equals."""
    best: SelectedScorer | None = None
    for choice in choices:
        fitted = choice.fit()
        scores = np.concatenate([fitted(part) for part in split_blocks(valid)])
        value = _ndcg(scores, valid)
        if best is None or value > best.ndcg:
            best = SelectedScorer(choice.setting, fitted, scores, value)
    assert best is not None
    return best


def select_settings(
    found: Mapping[ScorerId, Sequence[Setting]],
    valid: Queries,
    known: FitData,
    seed: int,
    done: Callable[[str], None],
    notes: list[str],
) -> dict[ScorerId, SelectedScorer]:
    """Pick a setting for each scorer; one that cannot be fitted is left out with a note.

    Where adapters are bound to categories, what they say together is calibrated here: its validation scores come from
    calibrations that were fitted without the query's group, so the fusion judges it like any other.
    """
    chosen: dict[ScorerId, SelectedScorer] = {}
    for name, choices in found.items():
        try:
            chosen[name] = select_setting(choices, valid)
        except PeftComboError as error:
            notes.append(f"{name}: left out. {error}")
        done(str(name))
    if ENSEMBLE in chosen:
        k = len(known.general)
        notes.append(
            f"{ENSEMBLE}: encodes the catalogue {k} times; a question costs {k} products with it ({_SCORES}) or one "
            f"({_VECTORS})"
        )
    if known.coverage is not None:
        heads = {name: chosen[ScorerId("tuned BERT", name)] for name in known.tuned}
        scores = {name: one.scores for name, one in heads.items()}
        calibration, crossed = Calibration.fit(
            scores, known.coverage, valid.targets, valid.contexts, valid.groups, seed=seed
        )
        fitted_heads = {name: one.fitted for name, one in heads.items() if isinstance(one.fitted, FittedHead)}
        fitted = FittedCategories(fitted_heads, known.coverage, calibration)
        chosen[BY_CATEGORY] = SelectedScorer("calibrated", fitted, crossed, _ndcg(crossed, valid))
        done(str(BY_CATEGORY))
    return chosen


def select_text_scorer(selected: Mapping[ScorerId, SelectedScorer]) -> ScorerId | None:
    """Return the scorer of adapters tuned on bundles that is best on validation; None where there is none."""
    tuned = [scorer for scorer in selected if scorer.reads_bundle_adapters]
    return max(tuned, key=lambda scorer: selected[scorer].ndcg, default=None)


def make_queries(
    dataset: Dataset, rows: NDArray[np.int32], limit: int, seed: int, name: str, notes: list[str]
) -> Queries:
    """Make the queries of some bundles, at most about `limit` of them."""
    sizes = dataset.bundles.sizes[rows]
    if sizes.sum() > limit:
        order = np.random.default_rng(seed).permutation(len(rows))
        kept = max(1, int(np.searchsorted(np.cumsum(sizes[order]), limit, side="right")))
        notes.append(f"{name}: {kept:,} of {len(rows):,} bundles were sampled, {limit:,} questions at most")
        rows = rows[np.sort(order[:kept])]
    return Queries.of(dataset.bundles, rows)


def split_blocks(queries: Queries) -> Iterator[Queries]:
    """Cut queries into parts whose scores fit memory with ease."""
    for start in range(0, len(queries), _QUERY_BLOCK):
        yield queries.take(slice(start, start + _QUERY_BLOCK))


def score_ndcg(fitted: Fitted, queries: Queries) -> float:
    """Return the mean NDCG@10 of a fitted scorer."""
    return _ndcg(np.concatenate([fitted(part) for part in split_blocks(queries)]), queries)


def _ndcg(scores: NDArray[np.float32], valid: Queries) -> float:
    ranks = metrics.midranks(scores, valid.targets, valid.excluded())
    return float(metrics.per_query(ranks, "ndcg@10").mean())
