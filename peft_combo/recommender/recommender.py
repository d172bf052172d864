"""Bundle recommender: completes, composes, ranks, detects and searches, from fused scorers and a tuned encoder.

Owns what answers a request, and the border where outside ids become rows and back. Knows nothing of how scorers were
fitted or an adapter tuned, or of the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.data.knowledge.rule_set import RuleSet
from peft_combo.data.labels.tags import Tagger
from peft_combo.data.model import Dataset
from peft_combo.data.sessions import check_session_items
from peft_combo.data.splits import Split
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.vectors import VectorCache
from peft_combo.errors import DataError
from peft_combo.recommender import explanations
from peft_combo.recommender.bundle_detection import BundleDetector
from peft_combo.recommender.bundle_search import BundleSearch
from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.composing.evidence import Composition, count_together
from peft_combo.recommender.composing.options import OneOf, Options
from peft_combo.recommender.explanations import FusedScores, describe_bundle, describe_item
from peft_combo.recommender.fit_state import FitState, fit_scorers
from peft_combo.recommender.fused_scorer import FusedScorer
from peft_combo.recommender.item_ranking import (
    ItemRanking,
    join_scores,
    measure_excess,
    push_away,
    sum_standard,
)
from peft_combo.recommender.query import parse_query
from peft_combo.recommender.query_items import (
    QueryMatch,
    add_budget,
    apply_matches,
    check_count,
    check_query,
    match_items,
)
from peft_combo.recommender.results import BundleMatch, DetectedBundle, Recommendation, Suggestion
from peft_combo.recommender.retrieval import RETRIEVAL_ROWS
from peft_combo.recommender.scorer_id import NOT_LIKE, TEXT_SEARCH
from peft_combo.recommender.user_habits import HISTORY


class BundleRecommender:
    """Ranks, completes and composes bundles for items, a user or a text; safe to share between threads.

    Attributes:
        dataset: what it was fitted on.
        bank: the encoder, with and without adapters.
        state: what fitting found: scorers, fusion, weights, and notes on what was left out.
        templates: slots of the bundles it was fitted on.
    """

    def __init__(
        self, dataset: Dataset, bank: AdapterBank, state: FitState, *, composer: Composer | None = None,
        like: BundleRecommender | None = None,
    ) -> None:  # fmt: skip
        """Answer from what fitting found.

        Args:
            composer: of this catalogue; None learns one. like: a recommender of the same users, events and bundles.
        """
        assert state.known.frozen is not None
        self.dataset, self.bank, self.state = dataset, bank, state
        self._scorer: FusedScorer = FusedScorer(state, None if like is None else like._scorer)
        self._bundle_search = BundleSearch(dataset, state.search)
        self._history: Any = sparse.csc_array(state.known.history)
        self.composer = composer or Composer.learn(
            dataset.catalog, dataset.bundles.items, vectors=state.known.frozen, history=state.known.history,
            rules=RuleSet.of(dataset.knowledge, dataset.catalog),
        )  # fmt: skip
        self.templates = self.composer.templates

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

    def with_retrieval(self, from_rows: int = RETRIEVAL_ROWS) -> Self:
        """Return a recommender that retrieves candidates before it scores, or this one of fewer than `from_rows` items.

        Candidates are the best items of each scorer, found by an index where its scores are inner products; their
        scores are those that they have among all items. Building indexes pays where many requests follow; the vector
        cache keeps them. Text queries, rejected items, bundles and long lists go by the scores of all items as before.
        """
        state = self.state.with_retrieval(from_rows)
        same = state is self.state
        return self if same else type(self)(self.dataset, self.bank, state, composer=self.composer, like=self)

    def complete(
        self,
        items: Sequence[str] = (),
        *,
        user: str | None = None,
        query: str | None = None,
        k: int = 10,
        constraints: Constraints | None = None,
        required: Iterable[str] | None = None,
        forbidden: Iterable[str] | None = None,
        not_like: Sequence[str] = (),
        exclude: Sequence[str] = (),
        exclude_seen: bool = True,
        explain: bool = False,
    ) -> list[Suggestion]:
        """Return the items that best complete a bundle.

        Args:
            items: outside ids of what is there; may be empty where a user or a query is given.
            user: outside id; without items the ones this user took last are the context.
            query: what is looked for, in words: counts as much as all else together.
            k: at most so many.
            required: slots of which an item fills one. forbidden: slots that no item fills.
            not_like: outside ids of rejected items: never shown, and what is like them comes later.
            exclude: outside ids that are not shown.
            exclude_seen: do not show what the user took before.
            explain: also tell what each given item adds, which costs one more scoring for each, and what texts have in
                common.
        Raises:
            DataError: an id or slot is not known, there is nothing to go by, or k is below 1.
        """
        check_count(k)
        ranking = self.rank_items(
            items, user=user, query=query, constraints=constraints, required=required, forbidden=forbidden,
            not_like=not_like, exclude=exclude, exclude_seen=exclude_seen, depth=k,
        )  # fmt: skip
        return self.describe_items(ranking, ranking.take(k), explain=explain)

    def rank_items(
        self, items: Sequence[str] = (), *, user: str | None = None, query: str | None = None,
        constraints: Constraints | None = None, required: Iterable[str] | None = None,
        forbidden: Iterable[str] | None = None, not_like: Sequence[str] = (), exclude: Sequence[str] = (),
        exclude_seen: bool = True, fused: FusedScores | None = None, depth: int | None = None,
    ) -> ItemRanking:  # fmt: skip
        """Rank all items, of which `complete` shows the first; see there.

        Args:
            fused: scores in place of those for items and user.
            depth: so many of the best will do: where items are many, others then have no score. None scores all.
        """
        check_query(query)
        given = self.dataset.find_items(items)
        if not (len(given) or user is not None or query is not None or fused is not None):
            raise DataError("Nothing to go by: give items or a user, or a query.")
        narrowed = self._narrow(constraints, given, user, not_like, exclude, exclude_seen)
        allowed = self.composer.find_allowed(narrowed, required=required, forbidden=forbidden, beside=given)
        context = self.find_context(given, user)
        if fused is None and (len(context) or user is not None):
            plain = query is None and not len(not_like)  # else scores of all items are what these are compared with
            (fused,) = self.score_contexts([(context, user)], depth if plain else None, allowed)
        likeness: NDArray[np.float32] | None = None
        if query is not None:
            alone = fused is None and not len(not_like)
            likeness = self.state.search.score_query(query, allowed, depth if alone else None)
        return self._rank_by(join_scores(fused, likeness), context, user, allowed, not_like)

    def replace(
        self,
        items: Sequence[str],
        swap: str,
        *,
        user: str | None = None,
        k: int = 10,
        constraints: Constraints | None = None,
        not_like: Sequence[str] = (),
        exclude: Sequence[str] = (),
        exclude_seen: bool = True,
        explain: bool = False,
    ) -> list[Suggestion]:
        """Return what could take the place of one item of a bundle, the rest kept: items of its slot, best first.

        Ranked by how well they go with the rest, or by likeness to the item where it is alone.

        Args:
            items: outside ids of the bundle, `swap` among them.
        Raises:
            DataError: an id is not known, `swap` is not of the bundle, or there is a budget and a price is not known.
        """
        check_count(k)
        ranking = self.rank_replacements(
            items, swap, user=user, constraints=constraints, not_like=not_like, exclude=exclude,
            exclude_seen=exclude_seen, depth=k,
        )  # fmt: skip
        return self.describe_items(ranking, ranking.take(k), explain=explain)

    def rank_replacements(
        self, items: Sequence[str], swap: str, *, user: str | None = None, constraints: Constraints | None = None,
        not_like: Sequence[str] = (), exclude: Sequence[str] = (), exclude_seen: bool = True,
        fused: FusedScores | None = None, depth: int | None = None,
    ) -> ItemRanking:  # fmt: skip
        """Rank all items that could replace one; see `replace`, and `rank_items` for `fused` and `depth`."""
        whole = self.dataset.find_items(items)
        (row,) = self.dataset.find_items([swap]).tolist()
        if row not in whole:
            raise DataError(f"{swap} is to be replaced and is not of the bundle {', '.join(items) or 'of nothing'}.")
        rest = whole[whole != row]
        narrowed = self._narrow(constraints, whole, user, not_like, exclude, exclude_seen)
        allowed = self.composer.find_replacements(int(row), rest, narrowed)
        if len(rest) and fused is None:
            (fused,) = self.score_contexts([(rest, user)], None if len(not_like) else depth, allowed)
        elif fused is None:
            alike = self.state.search.score_alike(int(row), allowed, None if len(not_like) else depth)
            fused = FusedScores(alike, {TEXT_SEARCH: alike})
        return self._rank_by(fused, rest, user, allowed, not_like)

    def describe_items(self, ranking: ItemRanking, rows: Sequence[int], *, explain: bool = False) -> list[Suggestion]:
        """Return rows of a ranking in the words of callers; see `complete` for `explain`."""
        context, user, catalog = ranking.context, ranking.user, self.dataset.catalog
        because: dict[int, dict[str, float]] = {}
        if explain and len(context) > 1 and not {TEXT_SEARCH, NOT_LIKE} & ranking.fused.parts.keys():
            because = self._name_credits(self._scorer.credit_context(context, user, rows, ranking.fused.scores))
        reasons = self._scorer.explain(context, rows, ranking.fused) if explain else {}
        return [
            describe_item(
                catalog, row, ranking.fused, self._count_together(row, context), because.get(row, {}),
                reasons.get(row, {}),
            )
            for row in rows
        ]  # fmt: skip

    def _rank_by(
        self, fused: FusedScores, context: NDArray[np.int64], user: str | None, allowed: NDArray[np.bool_],
        not_like: Sequence[str],
    ) -> ItemRanking:  # fmt: skip
        rejected = self.dataset.find_items(not_like)
        if len(rejected):
            assert self.state.known.frozen is not None
            fused = push_away(fused, self.state.known.frozen, rejected)
        return ItemRanking(context, user, fused, allowed & np.isfinite(fused.scores))

    def _narrow(
        self, constraints: Constraints | None, given: NDArray[np.int64], user: str | None, not_like: Sequence[str],
        exclude: Sequence[str], exclude_seen: bool,
    ) -> Constraints:  # fmt: skip
        """Return constraints that also bar what is given, rejected or excluded, and what the user took before."""
        barred = [given, self.dataset.find_items([*not_like, *exclude])]
        if exclude_seen and user is not None:
            barred.append(self._find_taken(user))
        return (constraints or Constraints()).bar(np.concatenate(barred))

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
        not_like: Sequence[str] = (),
        exclude: Sequence[str] = (),
        exclude_seen: bool = True,
        fused: FusedScores | None = None,
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
            not_like: what no bundle holds beside `items`, as for `complete`; likewise `exclude` and `exclude_seen`.
            fused: scores in place of those for items and user.
            explain: also tell what each item of a bundle adds to the others.
        Raises:
            DataError: an id or slot is not known, nothing is given to go by, or no bundle meets the constraints.
        """
        context = self.dataset.find_items(items)
        if not (len(context) or user is not None or query is not None or fused is not None):
            raise DataError("Nothing to go by: give items, a user or a query.")
        check_query(query)
        fused = fused or self._score_for(context, user)
        relevance = [] if fused is None else [fused.scores]
        matches: list[QueryMatch] = []
        if query is not None:
            if tagger is not None:
                parsed = parse_query(query, tagger)
                constraints, query = add_budget(constraints or Constraints(), parsed.budget), parsed.text
                if options is None or options.mode == "complement":
                    matches = match_items(parsed.items, tagger, self.state.search, self.dataset.catalog.titles)
            relevance.append(apply_matches(self.state.search.score_items([query])[0], matches))
        if len(rejected := self.dataset.find_items(not_like)):
            assert self.state.known.frozen is not None
            relevance.append(-measure_excess(self.state.known.frozen, rejected))
        constraints = self._narrow(constraints, context[:0], user, not_like, exclude, exclude_seen)
        composer = self.composer
        if required is not None or forbidden is not None:
            composer = composer.with_templates(self.templates.with_rules(required=required, forbidden=forbidden))
        options = self._add_weights(options or Options(), len(context), query=query is not None)
        composed = composer.compose(
            context, one_of=[OneOf(one.item.name, one.rows) for one in matches], relevance=sum_standard(relevance),
            compatibility=self._scorer.score_beside, constraints=constraints, options=options,
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
        check_query(query)
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
        ranked = self.composer.rank(
            rows, context=context, relevance=sum_standard(relevance), compatibility=self._scorer.score_beside,
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
            check_count(k)
        rows = self.dataset.find_items(items)
        check_session_items(items)
        return [
            explanations.describe_detected(self.dataset.catalog, one)
            for one in self._detector.detect(rows, "sure" if sure else "whole")[:k]
        ]

    @cached_property
    def _detector(self) -> BundleDetector:
        """Made when first asked for; as scorers that serve do, it learns from all there is."""
        return BundleDetector.fit(self.state.known, self.dataset, None)

    def search(self, query: str, k: int = 10) -> list[tuple[str, float]]:
        """Return the items whose title and category are most like `query`, with the scores of `text_search`."""
        check_count(k)
        check_query(query)
        rows, scores = self.state.search.find_items(query, k)
        ids = self.dataset.catalog.item_ids
        return [(ids[row], score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)]

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
        check_count(k)
        check_query(query)
        return self._bundle_search.find(query, k, bundles)

    # Ids become rows.

    def find_context(self, given: NDArray[np.int64], user: str | None) -> NDArray[np.int64]:
        """Return the rows that stand for a request: what is given, else what the user took last."""
        return given if len(given) or user is None else self._find_taken(user)[:HISTORY]

    def _find_taken(self, user: str) -> NDArray[np.int64]:
        """Return the items a user took, each once, latest first."""
        row = self.dataset.find_user(user)
        items, starts = self._scorer.taken
        return items[starts[row] : starts[row + 1]]

    # Rows become scores.

    def _score_for(self, context: NDArray[np.int64], user: str | None) -> FusedScores | None:
        """Score all items for a context, or for what the user took last; None where there is neither."""
        if not len(context) and user is None:
            return None
        return self.score_context(self.find_context(context, user), user)

    def score_context(self, context: NDArray[np.int64], user: str | None = None) -> FusedScores:
        """Score all items for one context, (S,) rows, and keep what each scorer gave."""
        return self.score_contexts([(context, user)])[0]

    def score_contexts(
        self, asked: Sequence[tuple[NDArray[np.int64], str | None]], depth: int | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> list[FusedScores]:  # fmt: skip
        """Score items for several contexts of several users at once, which costs less than one after the other.

        Args:
            depth: so many of the best `allowed` items will do, see `with_retrieval`; None scores all items.
        """
        for _, user in asked:
            if user is not None:
                self.dataset.find_user(user)
        return self._scorer.score(asked) if depth is None else self._scorer.score_best(asked, depth, allowed)

    def _add_weights(self, options: Options, n_items: int, *, query: bool) -> Options:
        """Return options with the weights of this kind of request, where they name none."""
        if options.weights is not None:
            return options
        return replace(options, weights=self.state.weights.select(n_items, query=query))

    # Scores become explanations.

    def _name_credits(self, credits: Mapping[int, Mapping[int, float]]) -> dict[int, dict[str, float]]:
        ids = self.dataset.catalog.item_ids
        return {row: {ids[other]: value for other, value in own.items()} for row, own in credits.items()}

    def _count_together(self, row: int, context: NDArray[np.int64]) -> dict[str, int]:
        counts = count_together(self._history, row, context)
        ids = self.dataset.catalog.item_ids
        return {ids[other]: int(count) for other, count in zip(context, counts, strict=True) if count}

    def _describe(
        self, composed: Sequence[Composition], fused: FusedScores | None, explain: bool,
        matches: Sequence[QueryMatch] = (),
    ) -> list[Recommendation]:  # fmt: skip
        because = [
            self._name_credits(self._scorer.credit_members(one)) if explain and len(one.items) > 2 else {}
            for one in composed
        ]
        return [
            describe_bundle(self.dataset.catalog, one, fused, own, matches)
            for one, own in zip(composed, because, strict=True)
        ]
