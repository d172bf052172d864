"""Who may complete a bundle: every scorer in each of its settings, and what is known when they are fitted.

Owns which scorers there are, what each is fitted on, and that validation picks their settings. The evaluation measures
these and the recommender serves them, so a figure of the one is a promise of the other. Knows nothing of fusion
weights, of how adapters are tuned, or of test bundles.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from peft_combo import metrics
from peft_combo.categories import Areas, Calibration
from peft_combo.data import Catalog, Dataset, Interactions
from peft_combo.errors import PeftComboError
from peft_combo.fusion import Evidence, Fusion
from peft_combo.rated import FittedRating, Rater
from peft_combo.scoring import (
    ALS,
    CEASE,
    EASE,
    CoOccurrence,
    ItemKNN,
    Popularity,
    Random,
    Scorer,
    TextCosine,
    UserKNN,
    tfidf_vectors,
)
from peft_combo.task_configs import BundleTask
from peft_combo.tasks.bundle import (
    BundleHead,
    CompletionHead,
    Questions,
    completion_scores,
    context_queries,
    padded,
    target_vectors,
)
from peft_combo.tasks.rating import RatingHead

RANDOM, PEER, FROZEN, TUNED, BY_CATEGORY = "random", "CEASE-TFIDF", "frozen BERT", "tuned BERT", "tuned by category"

RATED, ENSEMBLE = "rated", "ensemble"
BOUGHT, ALIKE = "bought before", "users alike"
# Settings of the two: what a rating adapter tells from, and what is averaged over several adapters of bundles.
_PAST, _BESIDE = "owner's past", "bundle and past"
_SCORES, _VECTORS = "mean of scores", "mean of vectors"

_QUERY_BLOCK = 256
# Each setting of CEASE inverts a matrix of the size of the catalogue; on a large one only the best of them is tried.
_CEASE_SETTINGS = ((10.0, 3.0), (1.0, 0.3), (30.0, 10.0))
_MANY_ITEMS = 6_000

ItemVectors: TypeAlias = "NDArray[np.float32] | sparse.csr_array[Any, tuple[int, int]]"
Tuned: TypeAlias = Mapping[str, tuple[NDArray[np.float32], CompletionHead]]
Rated: TypeAlias = Mapping[str, tuple[NDArray[np.float32], RatingHead]]


class Fitted(Protocol):
    """A scorer that has learned what it may: called with (Q) questions, it gives (Q, N) scores, NaN for silence."""

    def __call__(self, questions: Questions) -> NDArray[np.float32]: ...


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
class Known:
    """All that scorers may be fitted on.

    Attributes:
        history: (B, N) bundles. users: (B + U, N), with the interactions of users below, where the bundles were not
            made from the same baskets; None where there are none.
        past: (U, N) what each user took before, of the interactions alone; user_rows: the row of each user who took
            anything.
        support: (N,) bundles that hold each item.
        text: template of what the word-based scorers read.
        frozen: (N, D) vectors of the encoder without adapter. tuned: per adapter its (N, D) vectors and its head.
        rated: the same of rating adapters. interactions: those of `past` with their times; None where there are none.
        areas: which adapter is at home with which items; None where no adapter is bound to a category.
    """

    history: sparse.csr_matrix[Any]
    users: sparse.csr_matrix[Any] | None
    past: sparse.csr_matrix[Any]
    user_rows: dict[str, int]
    support: NDArray[np.int64]
    leaves: NDArray[np.int64] | None
    catalog: Catalog
    text: str
    frozen: NDArray[np.float32] | None
    tuned: Tuned = field(default_factory=dict)
    areas: Areas | None = None
    rated: Rated = field(default_factory=dict)
    interactions: Interactions | None = None

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        bundles: NDArray[Any] | None,
        interactions: NDArray[Any] | None,
        text: str,
        frozen: NDArray[np.float32] | None,
        tuned: Tuned,
        areas: Areas | None = None,
        rated: Rated | None = None,
    ) -> Known:
        """Gather what some rows say.

        Args:
            bundles, interactions: rows that may be seen; None sees all.
            text: template of what the word-based scorers read.
        """
        catalog = dataset.catalog
        history = dataset.bundles.to_csr(len(catalog), bundles)
        users = seen = None
        past = history[:0]
        user_rows: dict[str, int] = {}
        if dataset.interactions is not None and (interactions is None or len(interactions)):
            seen = dataset.interactions if interactions is None else dataset.interactions.take(interactions)
            past = seen.to_csr(len(catalog))
            active = np.flatnonzero(np.diff(past.indptr))
            user_rows = {dataset.interactions.user_ids[row]: int(row) for row in active}
            if (dataset.bundles.baskets < 0).all():
                users = sparse.csr_matrix(sparse.vstack([history, past[active]]))
        return cls(
            history, users, past, user_rows,
            np.bincount(history.indices, minlength=len(catalog)).astype(np.int64),
            catalog.leaf_numbers, catalog, text, frozen, tuned, areas, rated or {}, seen,
        )  # fmt: skip

    @cached_property
    def texts(self) -> list[str]:
        """The text of each item."""
        return self.catalog.texts(self.text)

    @cached_property
    def words(self) -> sparse.csr_array[Any, tuple[int, int]]:
        """(N, V) TF-IDF of single words."""
        return tfidf_vectors(self.texts)

    @cached_property
    def categorised(self) -> sparse.csr_array[Any, tuple[int, int]] | None:
        """The same with the category path among the words; None where no item has one."""
        return tfidf_vectors(self.catalog.texts(self.text + " {category}")) if any(self.catalog.categories) else None

    @property
    def general(self) -> Tuned:
        """The adapters of bundles that speak of all items."""
        bound = () if self.areas is None else self.areas.members
        return {name: one for name, one in self.tuned.items() if name not in bound}

    def evidence(self, questions: Questions) -> Evidence:
        """Return what fusion gates read of some questions."""
        return Evidence(questions.contexts, self.support, self.leaves)


@dataclass(frozen=True, eq=False)
class FittedScorer:
    """A scorer of `scoring`, asked with the context alone."""

    scorer: Scorer

    def __call__(self, questions: Questions) -> NDArray[np.float32]:
        return self.scorer.score_baskets(questions.to_csr(len(self.scorer.support)))


@dataclass(frozen=True, eq=False)
class FittedHead:
    """An adapter's head over the vectors of its encoder; it comes fitted."""

    vectors: NDArray[np.float32]
    head: CompletionHead
    targets: NDArray[np.float32]

    @classmethod
    def of(cls, vectors: NDArray[np.float32], head: CompletionHead) -> FittedHead:
        return cls(vectors, head, target_vectors(head, vectors))

    @classmethod
    def untuned(cls, vectors: NDArray[np.float32]) -> FittedHead:
        """Return what the frozen encoder says, the cosine with the mean: (N, D) its vectors."""
        return cls.of(vectors, BundleHead(vectors.shape[1], BundleTask()).eval())

    def __call__(self, questions: Questions) -> NDArray[np.float32]:
        return completion_scores(self.head, self.vectors, self.targets, questions.contexts)

    def among(self, questions: Questions, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Score some items only: (C,) rows -> (Q, C). Few are gathered first, of many all are scored as they lie."""
        if 4 * len(rows) >= len(self.targets):
            return self(questions)[:, rows]
        return completion_scores(self.head, self.vectors, self.targets[rows], questions.contexts)


@dataclass(frozen=True, eq=False)
class FittedEnsemble:
    """Several adapters of all items as one voice: the mean of their scores, or the score of their mean vectors.

    The mean vectors of k adapters over one encoder also compare the query of each with the targets of the others:
    their score is the mean of all k * k cosines. Either way the catalogue is encoded, and kept, k times, and a question
    is pooled k times; it then costs k products with a matrix of the catalogue where scores are averaged, one where
    vectors are.

    Attributes:
        heads: what each adapter says. targets: (N, D) the mean of theirs; None where scores are averaged.
    """

    heads: tuple[FittedHead, ...]
    targets: NDArray[np.float32] | None

    @classmethod
    def of(cls, heads: Sequence[FittedHead], *, vectors: bool) -> FittedEnsemble:
        """Join adapters; `vectors` averages these and not the scores."""
        return cls(tuple(heads), _mean([one.targets for one in heads]) if vectors else None)

    def __call__(self, questions: Questions) -> NDArray[np.float32]:
        if self.targets is None:
            return _mean([one(questions) for one in self.heads])
        return self._queries(questions) @ self.targets.T  # (Q, D) @ (D, N) -> (Q, N)

    def among(self, questions: Questions, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Score some items only: (C,) rows -> (Q, C)."""
        if self.targets is None:
            return _mean([one.among(questions, rows) for one in self.heads])
        return self._queries(questions) @ self.targets[rows].T

    def _queries(self, questions: Questions) -> NDArray[np.float32]:
        with torch.inference_mode():
            every = [context_queries(one.head, one.vectors, questions.contexts) for one in self.heads]
            return _mean([one.float().cpu().numpy() for one in every])


def _mean(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.asarray(np.mean(np.stack(parts), axis=0), np.float32)


@dataclass(frozen=True, eq=False)
class FittedCategories:
    """Several adapters, each speaking of the items it is at home with, on one scale."""

    heads: Mapping[str, FittedHead]
    areas: Areas
    calibration: Calibration

    def __call__(self, questions: Questions) -> NDArray[np.float32]:
        return self.calibration.combine({name: head(questions) for name, head in self.heads.items()}, self.areas)


@dataclass(frozen=True, eq=False)
class FittedPast:
    """What the owner of a question took before, or what users like them took; silent about owners it never met."""

    past: sparse.csr_matrix[Any]
    user_rows: Mapping[str, int]
    alike: UserKNN | None

    def __call__(self, questions: Questions) -> NDArray[np.float32]:
        scores = np.full((len(questions), self.past.shape[1]), np.nan, np.float32)
        rows = np.array([self.user_rows.get(str(group), -1) for group in questions.clusters], np.int64)
        met = np.flatnonzero(rows >= 0)
        if self.alike is not None:
            scores[met] = self.alike.score_users(rows[met])
        else:
            scores[met] = np.log1p(np.maximum(self.past[rows[met]].toarray(), 0))
        return scores


@dataclass(frozen=True, eq=False)
class _Choice:
    setting: str
    scorer: Scorer
    history: sparse.csr_matrix[Any]
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
class _Past:
    known: Known
    neighbours: bool
    setting: str = ""

    def fit(self) -> Fitted:
        return past_of(self.known, neighbours=self.neighbours)


@dataclass(frozen=True, eq=False)
class _Rating:
    known: Known
    name: str
    setting: str

    def fit(self) -> Fitted:
        return rating_of(self.known, self.name, self.setting)


@dataclass(frozen=True, eq=False)
class _Ensemble:
    known: Known
    setting: str

    def fit(self) -> Fitted:
        return ensemble_of(self.known, self.setting)


def rating_of(known: Known, name: str, setting: str) -> FittedRating:
    """Return a rating adapter over what is known, as it was or will be set.

    Raises:
        DataError: there are no interactions with times that may be seen.
    """
    return FittedRating(Rater.of(*known.rated[name], known.interactions), beside=setting == _BESIDE)


def ensemble_of(known: Known, setting: str) -> FittedEnsemble:
    """Return the adapters of all items as one voice."""
    heads = [FittedHead.of(vectors, head) for vectors, head in known.general.values()]
    return FittedEnsemble.of(heads, vectors=setting == _VECTORS)


def past_of(known: Known, *, neighbours: bool) -> FittedPast:
    """Return what reads the past of the owner of a question, or with `neighbours` that of users alike."""
    past = known.past
    taken = sparse.csr_array((np.ones_like(past.data), past.indices, past.indptr), past.shape)
    return FittedPast(past, known.user_rows, UserKNN().fit(taken) if neighbours else None)


def families(
    known: Known, owners: set[str], seed: int, also: Mapping[str, Scorer] | None = None
) -> dict[str, list[Setting]]:
    """Name the scorers, and for each the settings that validation chooses from; nothing is fitted yet.

    Args:
        owners: groups of the questions that will be asked; what reads a user's past is named only where it knows one.
        also: further scorers of bundles.
    """

    def counting(scorer: Scorer, setting: str = "") -> list[Setting]:
        choices: list[Setting] = [_Choice(setting, scorer, known.history)]
        if known.users is not None:
            choices.append(_Choice(f"{setting} with users".strip(), scorer, known.users))
        return choices

    def cosine(items: ItemVectors) -> list[Setting]:
        return [
            _Choice("nearest to the mean", TextCosine("mean"), known.history, items),
            _Choice("nearest to any", TextCosine("max"), known.history, items),
        ]

    def closed_form(label: str, items: ItemVectors) -> list[Setting]:
        grid = _CEASE_SETTINGS if len(known.texts) <= _MANY_ITEMS else _CEASE_SETTINGS[:1]
        return [
            _Choice(f"{label}, l2 {l2:g}, alpha {alpha:g}", CEASE(l2, alpha), known.history, items)
            for l2, alpha in grid
        ]

    found: dict[str, list[Setting]] = {
        RANDOM: [_Choice("", Random(seed), known.history)],
        "popularity": counting(Popularity()),
        "co-occurrence": counting(CoOccurrence(), "conditional") + counting(CoOccurrence("lift"), "lift"),
        "item-kNN": counting(ItemKNN(), "cosine") + counting(ItemKNN(similarity="tfidf"), "tfidf"),
        "user-kNN": counting(UserKNN()),
        "EASE": [choice for l2 in (1.0, 10.0, 100.0) for choice in counting(EASE(l2), f"l2 {l2:g}")],
        "ALS": counting(ALS(seed=seed)),
        "TF-IDF title": cosine(known.words),
        PEER: closed_form("words", known.words) + closed_form("words and pairs", tfidf_vectors(known.texts, longest=2)),
    }
    met = bool(owners & set(known.user_rows))
    if met:
        found[BOUGHT] = [_Past(known, neighbours=False)]
        found[ALIKE] = [_Past(known, neighbours=True)]
    # CEASE may read the category path as well: a peer should know what we know.
    if known.categorised is not None:
        found[PEER] += closed_form("words and category", known.categorised)
    if known.frozen is not None:
        found[FROZEN] = cosine(known.frozen)
    dense: dict[str, NDArray[np.float32]] = {}
    for name, (vectors, head) in known.tuned.items():
        found[f"{TUNED} {name}"] = [_Head(vectors, head)]
        if name in known.general:
            dense[name] = target_vectors(head, vectors)
    if len(dense) > 1:
        found[ENSEMBLE] = [_Ensemble(known, setting) for setting in (_SCORES, _VECTORS)]
    for name in known.rated:
        found[f"{RATED} {name}"] = [
            _Rating(known, name, setting) for setting in ((_PAST, _BESIDE) if met else (_BESIDE,))
        ]
    if not dense and known.frozen is not None:
        dense["frozen"] = known.frozen
    if dense:
        found["CEASE-BERT"] = []
    for name, targets in dense.items():
        found["CEASE-BERT"] += closed_form(name, targets)
        for label, words in (("words", known.words), ("words and category", known.categorised)):
            if words is not None:
                # Rows are scaled to length 1 there, so each side has half the weight.
                beside: Any = sparse.hstack([words, sparse.csr_array(targets)], format="csr", dtype=np.float32)
                found["CEASE-BERT"] += closed_form(f"{name} beside {label}", sparse.csr_array(beside))
    for name, scorer in (also or {}).items():
        found[name] = [_Choice("", scorer, known.history)]
    return found


@dataclass(frozen=True, eq=False)
class Picked:
    """A scorer in the setting that is best on validation.

    Attributes:
        scores: (Q, N) of the validation questions. ndcg: NDCG@10 of them.
    """

    setting: str
    fitted: Fitted
    scores: NDArray[np.float32]
    ndcg: float


def fused(fusion: Fusion, asks: Mapping[str, Fitted], known: Known) -> Fitted:
    """Return what a fusion makes of the scorers it needs, by name in `asks`."""

    def ask(questions: Questions) -> NDArray[np.float32]:
        return fusion.combine({name: asks[name](questions) for name in fusion.needs}, known.evidence(questions))

    return ask


def pick(choices: Sequence[Setting], valid: Questions) -> Picked:
    """Return the setting with the best NDCG@10 on validation, the first of equals."""
    best: Picked | None = None
    for choice in choices:
        fitted = choice.fit()
        scores = np.concatenate([fitted(part) for part in blocks(valid)])
        value = _ndcg(scores, valid)
        if best is None or value > best.ndcg:
            best = Picked(choice.setting, fitted, scores, value)
    assert best is not None
    return best


def picked_all(
    found: Mapping[str, Sequence[Setting]],
    valid: Questions,
    known: Known,
    seed: int,
    done: Callable[[str], None],
    notes: list[str],
) -> dict[str, Picked]:
    """Pick a setting for each scorer; one that cannot be fitted is left out with a note.

    Where adapters are bound to categories, what they say together is calibrated here: its validation scores come from
    calibrations that were fitted without the question's group, so the fusion judges it like any other.
    """
    chosen: dict[str, Picked] = {}
    for name, choices in found.items():
        try:
            chosen[name] = pick(choices, valid)
        except PeftComboError as error:
            notes.append(f"{name}: left out. {error}")
        done(name)
    if ENSEMBLE in chosen:
        k = len(known.general)
        notes.append(
            f"{ENSEMBLE}: encodes the catalogue {k} times; a question costs {k} products with it ({_SCORES}) or one "
            f"({_VECTORS})"
        )
    if known.areas is not None:
        heads = {name: chosen[f"{TUNED} {name}"] for name in known.tuned}
        scores = {name: one.scores for name, one in heads.items()}
        calibration, crossed = Calibration.fit(
            scores, known.areas, valid.targets, valid.contexts, valid.clusters, seed=seed
        )
        fitted_heads = {name: one.fitted for name, one in heads.items() if isinstance(one.fitted, FittedHead)}
        fitted = FittedCategories(fitted_heads, known.areas, calibration)
        chosen[BY_CATEGORY] = Picked("calibrated", fitted, crossed, _ndcg(crossed, valid))
        done(BY_CATEGORY)
    return chosen


def best_text(picked: Mapping[str, Picked]) -> str:
    """Return the name of the tuned scorer that is best on validation; "" where there is none."""
    tuned = [name for name in picked if name in (BY_CATEGORY, ENSEMBLE) or name.startswith(TUNED)]
    return max(tuned, key=lambda name: picked[name].ndcg, default="")


def beside(fitted: Fitted, sets: Sequence[NDArray[np.int64]], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Score rows beside sets of items of no owner: S sets of rows, (C,) rows -> (S, C); a `composing.Compatibility`."""
    none = np.zeros(len(sets), np.int64)
    questions = Questions(padded(sets), none, np.full(len(sets), ""), none)
    if isinstance(fitted, FittedHead | FittedEnsemble):
        return fitted.among(questions, rows)
    return fitted(questions)[:, rows]


def asked(dataset: Dataset, rows: NDArray[np.int32], limit: int, seed: int, name: str, notes: list[str]) -> Questions:
    """Make the questions of some bundles, at most about `limit` of them."""
    sizes = dataset.bundles.sizes[rows]
    if sizes.sum() > limit:
        order = np.random.default_rng(seed).permutation(len(rows))
        kept = max(1, int(np.searchsorted(np.cumsum(sizes[order]), limit, side="right")))
        notes.append(f"{name}: {kept:,} of {len(rows):,} bundles were sampled, {limit:,} questions at most")
        rows = rows[np.sort(order[:kept])]
    return Questions.of(dataset.bundles, rows)


def blocks(questions: Questions) -> Iterator[Questions]:
    """Cut questions into parts whose scores fit memory with ease."""
    for start in range(0, len(questions), _QUERY_BLOCK):
        yield questions.take(slice(start, start + _QUERY_BLOCK))


def _ndcg(scores: NDArray[np.float32], valid: Questions) -> float:
    ranks = metrics.midranks(scores, valid.targets, valid.excluded())
    return float(metrics.per_query(ranks, "ndcg@10").mean())
