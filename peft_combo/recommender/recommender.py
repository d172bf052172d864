"""Bundle recommender: completes, composes, ranks, detects and searches, from fused scorers and a tuned encoder.

Owns what answers a request, and the border where outside ids become rows and back. Knows nothing of how scorers were
fitted or an adapter tuned, or of the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.data.labels.tags import Tagger
from peft_combo.data.model import Dataset
from peft_combo.data.queries import Queries
from peft_combo.data.sessions import check_session_items
from peft_combo.data.splits import Split
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.vectors import VectorCache
from peft_combo.errors import DataError
from peft_combo.recommender.bundle_detection import BundleDetector
from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.composing.evidence import Composition, count_together
from peft_combo.recommender.composing.options import OneOf, Options
from peft_combo.recommender.explanations import FusedScores, describe_bundle, describe_detected, describe_item
from peft_combo.recommender.fit_state import FitState, fit_scorers
from peft_combo.recommender.fitted_scorers import score_beside
from peft_combo.recommender.fusion import make_comparable
from peft_combo.recommender.query import parse_query
from peft_combo.recommender.query_items import QueryMatch, apply_matches, match_items, select_largest
from peft_combo.recommender.results import BundleMatch, DetectedBundle, Recommendation, Suggestion
from peft_combo.recommender.scorer_id import TEXT_RANKER, ScorerId
from peft_combo.recommender.text_ranking import TextRanker
from peft_combo.recommender.text_search import find_distinct
from peft_combo.scoring.base import Vectors

# A user is described by so many of the items taken last; older ones say more about a past than about a next purchase.
_HISTORY = 5


class BundleRecommender:
    """Ranks, completes and composes bundles for items, a user or a text; safe to share between threads.

    Attributes:
        dataset: what it was fitted on.
        bank: the encoder, with and without adapters.
        state: what fitting found: scorers, fusion, weights, and notes on what was left out.
        templates: slots of the bundles it was fitted on.
    """

    def __init__(self, dataset: Dataset, bank: AdapterBank, state: FitState) -> None:
        assert state.known.frozen is not None
        self.dataset, self.bank, self.state = dataset, bank, state
        self._history: Any = sparse.csc_array(state.known.history)
        self._composer = Composer.learn(
            dataset.catalog, dataset.bundles.items, vectors=state.known.frozen, history=state.known.history
        )
        self.templates = self._composer.templates

    @classmethod
    def fit(
        cls,
        dataset: Dataset,
        parts: Split,
        bank: AdapterBank,
        adapters: str | Sequence[str] | None,
        *,
        seed: int = 0,
        cache: VectorCache | None = None,
        progress: Callable[[int], None] | None = None,
        done: Callable[[str], None] | None = None,
    ) -> Self:
        """Choose settings and fusion on the validation bundles, then learn from all bundles.

        Weights are fitted while the scorers know training bundles only, as they will meet new ones; for serving the
        scorers are fitted once more on every bundle there is. Test bundles therefore serve but never choose. What is
        weighed is what `evaluation.evaluate` measures.

        Args:
            adapters: ``"fashion"`` or ``"fashion@v2"``, or several: adapters tuned on one category speak of its items,
                one tuned on all categories speaks of all (see `category_calibration`). None for the frozen encoder.
            cache: keeps encoded catalogues on disk.
            progress: told how many texts were encoded. done: told the label of each scorer that is fitted.
        Raises:
            StoreError: an adapter cannot be had.
            DataError: no validation bundle to fit the fusion on, or the adapters do not go together.
        """
        state = fit_scorers(dataset, parts, bank, adapters, seed=seed, cache=cache, progress=progress, done=done)
        return cls(dataset, bank, state)

    def complete(
        self,
        items: Sequence[str] = (),
        *,
        user: str | None = None,
        k: int = 10,
        constraints: Constraints | None = None,
        explain: bool = False,
    ) -> list[Suggestion]:
        """Return the items that best complete a bundle.

        Args:
            items: outside ids of what is there; may be empty where a user is given.
            user: outside id; without items the ones this user took last are the context.
            k: at most so many.
            explain: also tell what each given item adds, which costs one more scoring for each, and what texts have in
                common.
        Raises:
            DataError: an id is not known, there is nothing to go by, or k is below 1.
        """
        _check_count(k)
        given = self.dataset.find_items(items)
        context = given if len(given) else self._find_recent(user)
        fused = self._score_all(context, user)
        allowed = self._composer.find_allowed(constraints or Constraints()) & np.isfinite(fused.scores)
        allowed[given] = False
        candidates = np.flatnonzero(allowed)
        first = candidates[select_largest(fused.scores[candidates], k)].tolist()
        because = self._credit_context(context, user, first, fused.scores) if explain and len(context) > 1 else {}
        ranker = self.state.serving.get(TEXT_RANKER)
        reasons = ranker.explain(context, first) if explain and isinstance(ranker, TextRanker) else {}
        catalog = self.dataset.catalog
        return [
            describe_item(
                catalog, row, fused, self._count_together(row, context), because.get(row, {}), reasons.get(row, {})
            )
            for row in first
        ]

    def compose(
        self,
        items: Sequence[str] = (),
        *,
        user: str | None = None,
        query: str | None = None,
        tagger: Tagger | None = None,
        constraints: Constraints | None = None,
        required: Iterable[str] | None = None,
        forbidden: Iterable[str] | None = None,
        options: Options | None = None,
        explain: bool = False,
    ) -> list[Recommendation]:
        """Return bundles that hold `items`, or new ones for a user or a text.

        Relevance is the fused score beside the items (or what the user took last), plus the user's neighbours, plus
        the likeness to the text; compatibility of an item with the rest of a bundle is the tuned encoder's.

        Args:
            items: outside ids every bundle keeps.
            query: what is looked for, in words.
            tagger: takes the query apart (`query.parse_query`): every bundle then holds one item for each thing it
                names and the catalogue has, found by the words on that thing, and a budget it states counts where the
                constraints have none. None compares items with the query as a whole; so do substitutes.
            required: slots that every bundle fills.
            forbidden: slots that no bundle fills.
            explain: also tell what each item of a bundle adds to the others.
        Raises:
            DataError: an id or slot is not known, nothing is given to go by, or no bundle meets the constraints.
        """
        context = self.dataset.find_items(items)
        if not (len(context) or user is not None or query is not None):
            raise DataError("Nothing to go by: give items, a user or a query.")
        _check_query(query)
        fused = self._score_for(context, user)
        relevance = [] if fused is None else [fused.scores]
        matches: list[QueryMatch] = []
        if query is not None:
            if tagger is not None:
                parsed = parse_query(query, tagger)
                constraints, query = _add_budget(constraints or Constraints(), parsed.budget), parsed.text
                if options is None or options.mode == "complement":
                    matches = match_items(parsed.items, tagger, self.state.search, self.dataset.catalog.titles)
            relevance.append(apply_matches(self.state.search.score_items([query])[0], matches))
        composer = self._composer
        if required is not None or forbidden is not None:
            edited = self.templates.with_rules(required=required, forbidden=forbidden)
            composer = composer.with_templates(edited)
        options = self._add_weights(options or Options(), len(context), query=query is not None)
        composed = composer.compose(
            context, one_of=[OneOf(one.item.name, one.rows) for one in matches], relevance=_sum_standard(relevance),
            compatibility=self._score_beside, constraints=constraints, options=options,
        )  # fmt: skip
        return self._describe(composed, fused, explain, matches)

    def rank(
        self,
        bundles: Sequence[Sequence[str]],
        *,
        items: Sequence[str] = (),
        user: str | None = None,
        query: str | None = None,
        explain: bool = False,
    ) -> list[Recommendation]:
        """Score given bundles with the composer's objective, best first; see `search_bundles` for words alone.

        Args:
            bundles: outside ids; each holds `items` and at least one more.
            user: for whom. query: what is looked for, in words. Without either, it is how well the items go together
                that counts.
            explain: as for `compose`.
        Raises:
            DataError: an id is not known, the query is empty, or a bundle lacks an item of `items` or has none beside
                them.
        """
        _check_query(query)
        context = self.dataset.find_items(items)
        rows = [self.dataset.find_items(bundle) for bundle in bundles]
        for bundle, own in zip(bundles, rows, strict=True):
            if not {*own} > {*context}:
                expected = f"a bundle with {', '.join(items)} and at least one more item" if items else "a bundle"
                raise DataError(f"Expected {expected}, found {', '.join(bundle) or 'an empty one'}.")
        fused = self._score_for(context, user)
        relevance = [] if fused is None else [fused.scores]
        if query is not None:
            relevance.append(self.state.search.score_items([query])[0])
        ranked = self._composer.rank(
            rows, context=context, relevance=_sum_standard(relevance), compatibility=self._score_beside,
            options=self._add_weights(Options(), len(context), query=query is not None),
        )  # fmt: skip
        return self._describe(ranked, fused, explain)

    def detect_bundles(self, items: Sequence[str], k: int | None = None, *, sure: bool = False) -> list[DetectedBundle]:
        """Return the bundles hidden in a session's items, the surest first: disjoint, each of two items or more.

        Which items belong together is told by their texts, categories and known bundles, learned from the sessions of
        the dataset, or from its bundles where it has none. There is always one; items that fit none are left out.

        Args:
            items: outside ids of what a user looked at or took in one go; one given twice counts once.
            k: at most so many; None for all.
            sure: smaller and surer ones, more of which lie inside one bundle, in place of those most like whole ones.
        Raises:
            DataError: an id is not known, there are fewer than two items, k is below 1, or the dataset has too few
                bundles to learn from.
        """
        if k is not None:
            _check_count(k)
        rows = self.dataset.find_items(items)
        check_session_items(items)
        return [
            describe_detected(self.dataset.catalog, one)
            for one in self._detector.detect(rows, "sure" if sure else "whole")[:k]
        ]

    @cached_property
    def _detector(self) -> BundleDetector:
        """Made when first asked for; as scorers that serve do, it learns from all there is."""
        return BundleDetector.fit(self.state.known, self.dataset, None)

    def search(self, query: str, k: int = 10) -> list[tuple[str, float]]:
        """Return the items whose title and category are most like `query`, with the scores of `text_search`.

        Raises:
            DataError: the query is empty, or k is below 1.
        """
        _check_count(k)
        _check_query(query)
        scores = self.state.search.score_items([query])[0]
        return [(self.dataset.catalog.item_ids[row], float(scores[row])) for row in select_largest(scores, k)]

    def search_bundles(
        self, query: str, k: int = 10, *, bundles: Sequence[Sequence[str]] | None = None
    ) -> list[BundleMatch]:
        """Return the bundles whose items are most like `query`, on the mean; how well they go together is not asked.

        Args:
            bundles: outside ids of the items of each; None searches the bundles of the dataset, of those that hold the
                same items the first.
        Raises:
            DataError: the query is empty, k is below 1, an id is not known, or a given bundle is empty.
        """
        _check_count(k)
        _check_query(query)
        catalog, known = self.dataset.catalog, self.dataset.bundles
        search, (distinct, pooled) = self.state.search, self._known_bundles
        found: list[tuple[str | None, NDArray[Any], str | None]]
        if bundles is None:
            found = [(known.bundle_ids[row], known.items[row], known.names[row]) for row in distinct]
            scores = search.score_bundles([query], pooled)[0]
        else:
            if any(not bundle for bundle in bundles):
                raise DataError("Expected bundles with items, found an empty one.")
            given = [self.dataset.find_items(bundle) for bundle in bundles]
            found = [(None, rows, None) for rows in given]
            among = pooled if len(distinct) > 1 else None
            scores = search.score_bundles([query], search.pool_bundles(given), among)[0]
        matches = []
        for place in select_largest(scores, k):
            bundle_id, rows, name = found[place]
            ids, titles = zip(*((catalog.item_ids[row], catalog.titles[row]) for row in rows), strict=True)
            matches.append(BundleMatch(bundle_id, ids, titles, name, float(scores[place])))
        return matches

    @cached_property
    def _known_bundles(self) -> tuple[list[int], dict[str, Vectors]]:
        """The rows of the dataset's distinct bundles, ready to be searched."""
        items = self.dataset.bundles.items
        distinct, _ = find_distinct(items)
        return distinct, self.state.search.pool_bundles([items[row] for row in distinct])

    # Ids become rows.

    def _find_recent(self, user: str | None) -> NDArray[np.int64]:
        """Return the items a user took last, as the context they stand for."""
        if user is None:
            raise DataError("Nothing to go by: give items or a user.")
        row = self.dataset.find_user(user)
        interactions = self.dataset.interactions
        assert interactions is not None
        mine = np.flatnonzero(interactions.users == row)
        order = mine[np.argsort(np.nan_to_num(interactions.times[mine]), kind="stable")[::-1]]
        return np.array(list(dict.fromkeys(interactions.items[order].tolist()))[:_HISTORY], np.int64)

    # Rows become scores.

    def _score_for(self, context: NDArray[np.int64], user: str | None) -> FusedScores | None:
        """Score all items for a context, or for what the user took last; None where there is neither."""
        if not len(context) and user is None:
            return None
        return self._score_all(context if len(context) else self._find_recent(user), user)

    def _score_all(self, context: NDArray[np.int64], user: str | None) -> FusedScores:
        """Score all items for one context, and keep what each scorer gave."""
        if user is not None:
            self.dataset.find_user(user)
        query = _make_queries(context[None], user)
        fused, parts = self.state.fusion.explain(self._score_parts(query), self.state.known.evidence(query))
        scores: NDArray[np.float32] = self._add_neighbours(fused, query)[0]
        return FusedScores(scores, {scorer: part[0] for scorer, part in parts.items()})

    def _score_parts(self, queries: Queries) -> dict[ScorerId, NDArray[np.float32]]:
        return {scorer: self.state.serving[scorer](queries) for scorer in self.state.fusion.needs}

    def _add_neighbours(self, scores: NDArray[np.float32], queries: Queries) -> NDArray[np.float32]:
        """Add what users alike took to fused scores (Q, N), where the fusion could not weigh that itself."""
        if self.state.neighbours is None or not any(queries.groups):
            return scores
        evidence = self.state.known.evidence(queries)
        neighbours, has_score = make_comparable(self.state.neighbours(queries), evidence, self.state.fusion.form)
        # Not a weight that was fitted: as much as any one scorer. What neighbours cannot say changes nothing.
        return np.where(has_score, scores + neighbours, scores).astype(np.float32)

    def _score_beside(self, sets: Sequence[NDArray[np.int64]], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return score_beside(self.state.text_side, sets, rows)

    def _add_weights(self, options: Options, n_items: int, *, query: bool) -> Options:
        """Return options with the weights of this kind of request, where they name none."""
        if options.weights is not None:
            return options
        return replace(options, weights=self.state.weights.select(n_items, query=query))

    # Scores become explanations.

    def _credit_context(
        self, context: NDArray[np.int64], user: str | None, rows: Sequence[int], scores: NDArray[np.float32]
    ) -> dict[int, dict[str, float]]:
        """Tell what each item of a context adds to the scores of `rows`: all at once, one query without each."""
        without = _make_queries(np.stack([np.delete(context, place) for place in range(len(context))]), user)
        fused = self.state.fusion.combine(self._score_parts(without), self.state.known.evidence(without))
        less = self._add_neighbours(fused, without)
        ids = self.dataset.catalog.item_ids
        return {
            row: {
                ids[item]: float(scores[row] - less[place, row])
                for place, item in enumerate(context)
                if np.isfinite(less[place, row])
            }
            for row in rows
        }

    def _credit_members(self, one: Composition) -> dict[int, dict[str, float]]:
        """Tell what each item of a bundle adds to how well an added one goes with the rest: the loss without it."""
        sets: list[NDArray[np.int64]] = []
        for row in one.added:
            rest = np.array([other for other in one.items if other != row], np.int64)
            sets += [rest, *(np.delete(rest, place) for place in range(len(rest)))]
        scores = self._score_beside(sets, np.array(one.added, np.int64))  # (A (1 + R), A)
        step = len(one.items)
        ids = self.dataset.catalog.item_ids
        credits = {}
        for place, row in enumerate(one.added):
            whole, *less = scores[place * step : (place + 1) * step, place]
            others = [other for other in one.items if other != row]
            credits[row] = {ids[other]: float(whole - part) for other, part in zip(others, less, strict=True)}
        return credits

    def _count_together(self, row: int, context: NDArray[np.int64]) -> dict[str, int]:
        counts = count_together(self._history, row, context)
        ids = self.dataset.catalog.item_ids
        return {ids[other]: int(count) for other, count in zip(context, counts, strict=True) if count}

    def _describe(
        self, composed: Sequence[Composition], fused: FusedScores | None, explain: bool,
        matches: Sequence[QueryMatch] = (),
    ) -> list[Recommendation]:  # fmt: skip
        because = [self._credit_members(one) if explain and len(one.items) > 2 else {} for one in composed]
        return [
            describe_bundle(self.dataset.catalog, one, fused, own, matches)
            for one, own in zip(composed, because, strict=True)
        ]


def _make_queries(contexts: NDArray[np.int64], user: str | None) -> Queries:
    """Return queries of one user, or of none: (Q, S) rows."""
    none = np.zeros(len(contexts), np.int64)
    return Queries(contexts, none, np.array([user or ""] * len(contexts)), none)


def _check_count(k: int) -> None:
    if k < 1:
        raise DataError(f"k: expected at least 1, found {k}.")


def _check_query(query: str | None) -> None:
    if query is not None and not query.strip():
        raise DataError("The query is empty: expected words such as linen dress. Leave it out to go by the rest.")


def _add_budget(constraints: Constraints, budget: float | None) -> Constraints:
    return constraints if constraints.budget is not None else replace(constraints, budget=budget)


def _sum_standard(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32] | None:
    """Add relevances of different origin, each as standard scores; unknown stays unknown only where all are."""
    if len(parts) < 2:
        return parts[0] if parts else None
    standard = [(part - np.nanmean(part)) / max(float(np.nanstd(part)), 1e-9) for part in parts]
    known = np.any([np.isfinite(part) for part in standard], axis=0)
    total = np.sum([np.nan_to_num(part, nan=0.0) for part in standard], axis=0)
    return np.where(known, total, np.nan).astype(np.float32)
