"""The bundle recommender: what the tuned encoder knows of texts and what counting knows of behaviour, in one answer.

Owns which scorers there are, how they are fitted without looking at held-out bundles, and the border where outside ids
become rows and back. Knows nothing of how an adapter was tuned, of files, or of the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.bank import AdapterBank
from peft_combo.composing import Composer, Composition, Options, co_counts
from peft_combo.constraints import Constraints
from peft_combo.data import Dataset, Split
from peft_combo.errors import DataError, did_you_mean
from peft_combo.fusion import Evidence, Fusion, comparable
from peft_combo.recipe import BundleTask
from peft_combo.scoring import CEASE, ItemKNN, Popularity, Scorer, TextCosine, UserKNN, tfidf_vectors
from peft_combo.slots import SlotTemplates
from peft_combo.tasks.bundle import BundleHead, Questions, completion_scores, target_vectors
from peft_combo.vectors import VectorCache

# CEASE inverts a dense item by item matrix; beyond so many items it no longer fits, and item-kNN speaks for behaviour.
_CEASE_ITEMS = 20_000
# A user is described by so many of the items taken last; older ones say more about a past than about a next purchase.
_HISTORY = 5

TUNED = "tuned text"


@dataclass(frozen=True)
class Suggestion:
    """One item that completes a bundle.

    Attributes:
        score: fused, comparable within one answer only.
        shares: what each scorer adds to the score; their sum is the score.
        together: of the given items those that training bundles held together with this one, and how often.
    """

    item_id: str
    title: str
    slot: str | None
    price: float | None
    score: float
    shares: dict[str, float]
    together: dict[str, int]


@dataclass(frozen=True)
class Recommendation:
    """One bundle.

    Attributes:
        items: outside ids, what was given included. added: those that are new.
        score: the composer's objective, the sum of `parts`.
        price: of the whole bundle; None where a price is unknown.
        evidence: per added item what speaks for it: counts, agreeing attributes, the slot rule with its support and
            confidence. Nothing in it is made up; where nothing was counted the entry is short.
    """

    items: tuple[str, ...]
    titles: tuple[str, ...]
    slots: tuple[str, ...]
    added: tuple[str, ...]
    score: float
    parts: dict[str, float]
    price: float | None
    evidence: tuple[dict[str, Any], ...]


class BundleRecommender:
    """Ranks, completes and composes bundles for items, a user or a text; safe to share between threads.

    Attributes:
        dataset: what it was fitted on.
        fusion: how scorers are weighed, with the validation table behind the choice.
        adapter: reference of the adapter that makes the item vectors; None for the frozen encoder.
    """

    def __init__(
        self, dataset: Dataset, bank: AdapterBank, adapter: str | None, head: BundleHead,
        vectors: NDArray[np.float32], frozen: NDArray[np.float32], scorers: Mapping[str, Scorer], fusion: Fusion,
        users: UserKNN | None, templates: SlotTemplates, history: Any,
    ) -> None:  # fmt: skip
        self.dataset = dataset
        self.bank = bank
        self.adapter = adapter
        self.fusion = fusion
        self.templates = templates
        self._head, self._vectors, self._frozen = head, vectors, frozen
        self._targets = target_vectors(head, vectors)
        self._scorers, self._users = scorers, users
        self._history: Any = sparse.csc_array(history)
        self._support = _support(history)
        self._leaves = _leaves(dataset)
        self._composer = Composer(dataset.catalog, templates, vectors=frozen, history=history)
        catalog = dataset.catalog
        self._user_rows = (
            {} if dataset.interactions is None else {u: r for r, u in enumerate(dataset.interactions.user_ids)}
        )
        self._prices = [None if np.isnan(price) else float(price) for price in catalog.prices]

    @classmethod
    def fit(
        cls,
        dataset: Dataset,
        parts: Split,
        bank: AdapterBank,
        adapter: str | None,
        *,
        text: str = "{title}",
        cache: VectorCache | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Self:
        """Fit scorers on the training bundles and the fusion on the validation bundles, then learn from all bundles.

        Weights are fitted while the scorers know training bundles only, as they will meet new ones; for serving the
        scorers are fitted once more on every bundle there is. Test bundles therefore serve but never choose.

        Args:
            adapter: ``"fashion"`` or ``"fashion@v2"``; None for the frozen encoder.
            text: template of the items' texts; that of the adapter's recipe.
            cache: keeps encoded catalogues on disk.
        Raises:
            StoreError: the adapter cannot be had.
            DataError: no validation bundle to fit the fusion on.
        """
        catalog = dataset.catalog
        texts = catalog.texts(text)

        def encoded(reference: str | None) -> NDArray[np.float32]:
            if cache is None:
                return bank.encode(texts, reference)
            return cache.vectors(bank, texts, reference, progress)

        frozen = encoded(None)
        vectors = frozen if adapter is None else encoded(adapter)
        head = bank.get(adapter).head if adapter is not None else BundleHead(bank.backbone.dim, BundleTask()).eval()
        if not len(parts.valid):
            raise DataError(
                f"{dataset.name!r} has no validation bundle to weigh the scorers on. Raise data.valid_fraction."
            )

        bundles = dataset.bundles
        questions = Questions.of(bundles, parts.valid)
        history = bundles.to_csr(len(catalog), parts.train)
        evidence = Evidence(questions.contexts, _support(history), _leaves(dataset))
        targets = target_vectors(head, vectors)
        scorers = _fitted(texts, history, targets)
        contexts = questions.to_csr(len(catalog))
        scores = {name: scorer.score_baskets(contexts) for name, scorer in scorers.items()}
        scores[TUNED] = completion_scores(head, vectors, targets, questions.contexts)
        fusion = Fusion.fit(scores, questions.targets, evidence, questions.clusters)

        everything = bundles.to_csr(len(catalog))
        needed = [name for name in scorers if name in fusion.needs]
        serving = _fitted(texts, everything, targets, needed)
        users = None
        if dataset.interactions is not None and (dataset.interactions.users >= 0).any():
            taken = dataset.interactions.to_csr(len(catalog))
            users = UserKNN().fit(
                sparse.csr_array((np.ones_like(taken.data), taken.indices, taken.indptr), taken.shape)
            )
        templates = SlotTemplates.learn(catalog, bundles.items)
        return cls(dataset, bank, adapter, head, vectors, frozen, serving, fusion, users, templates, everything)

    def complete(
        self,
        items: Sequence[str] = (),
        *,
        user: str | None = None,
        k: int = 10,
        constraints: Constraints | None = None,
    ) -> list[Suggestion]:
        """Return the items that best complete a bundle.

        Args:
            items: outside ids of what is there; may be empty where a user is given.
            user: outside id; without items the ones this user took last are the context.
            k: at most so many.
        Raises:
            DataError: an id is not known, or there is nothing to go by.
        """
        context = self._rows(items)
        base = context if len(context) else self._taken_last(user)
        raw, evidence = self._scores(base), self._evidence(base)
        scores = self._for_user(self.fusion.combine(raw, evidence)[0], evidence, user)
        allowed, _ = (constraints or Constraints()).allowed_items(self.dataset.catalog)
        ranked = np.where(allowed & ~np.isin(np.arange(len(scores)), context), scores, -np.inf)
        ranked[np.isnan(ranked)] = -np.inf
        best = np.argsort(-ranked, kind="stable")[:k]
        return [
            self._suggestion(int(row), float(ranked[row]), self.fusion.shares(raw, evidence, 0, int(row)), base)
            for row in best
            if np.isfinite(ranked[row])
        ]

    def compose(
        self,
        items: Sequence[str] = (),
        *,
        user: str | None = None,
        query: str | None = None,
        constraints: Constraints | None = None,
        required: Iterable[str] | None = None,
        forbidden: Iterable[str] | None = None,
        options: Options | None = None,
    ) -> list[Recommendation]:
        """Return bundles that hold `items`, or new ones for a user or a text.

        Relevance is the fused score beside the items (or what the user took last), plus the user's neighbours, plus
        the likeness to the text; compatibility of an item with the rest of a bundle is the tuned encoder's.

        Args:
            items: outside ids every bundle keeps.
            query: what is looked for, in words.
            required, forbidden: names of slots.
        Raises:
            DataError: an id or slot is not known, nothing is given to go by, or no bundle meets the constraints.
        """
        context = self._rows(items)
        if not (len(context) or user is not None or query is not None):
            raise DataError("Nothing to go by: give items, a user or a query.")
        parts = []
        if len(context) or user is not None:
            parts.append(self._relevance(context if len(context) else self._taken_last(user), user))
        if query is not None:
            parts.append(self._likeness(query))
        composer = self._composer
        if required is not None or forbidden is not None:
            edited = self.templates.with_rules(required=required, forbidden=forbidden)
            composer = Composer(self.dataset.catalog, edited, vectors=self._frozen, history=self._history)
        found = composer.compose(
            context, relevance=_summed(parts), compatibility=self._beside, constraints=constraints, options=options
        )
        return [self._recommendation(one) for one in found]

    def rank(
        self, bundles: Sequence[Sequence[str]], *, items: Sequence[str] = (), user: str | None = None
    ) -> list[Recommendation]:
        """Score given bundles with the composer's objective, best first.

        Args:
            bundles: outside ids; each holds `items` and at least one more.
            user: for whom; None judges by how well the items go together.
        Raises:
            DataError: an id is not known.
        """
        context = self._rows(items)
        relevance = None
        if len(context) or user is not None:
            relevance = self._relevance(context if len(context) else self._taken_last(user), user)
        ranked = self._composer.rank(
            [self._rows(bundle) for bundle in bundles], context=context, relevance=relevance, compatibility=self._beside
        )
        return [self._recommendation(one) for one in ranked]

    def search(self, query: str, k: int = 10) -> list[tuple[str, float]]:
        """Return the items whose text is most like `query`, with the cosine of the frozen encoder."""
        scores = self._likeness(query)
        return [
            (self.dataset.catalog.item_ids[row], float(scores[row])) for row in np.argsort(-scores, kind="stable")[:k]
        ]

    # Rows and scores from here on.

    def _rows(self, items: Sequence[str]) -> NDArray[np.int64]:
        index = self.dataset.catalog.index
        for item in items:
            if item not in index:
                close = did_you_mean(item, index)
                raise DataError(f'No item "{item}" among the {len(index):,} of {self.dataset.name}. {close}'.rstrip())
        return np.array(list(dict.fromkeys(index[item] for item in items)), np.int64)

    def _taken_last(self, user: str | None) -> NDArray[np.int64]:
        """Return the items a user took last, as the context they stand for."""
        if user is None:
            raise DataError("Nothing to go by: give items or a user.")
        row = self._user_row(user)
        interactions = self.dataset.interactions
        assert interactions is not None
        mine = np.flatnonzero(interactions.users == row)
        order = mine[np.argsort(np.nan_to_num(interactions.times[mine]), kind="stable")[::-1]]
        return np.array(list(dict.fromkeys(interactions.items[order].tolist()))[:_HISTORY], np.int64)

    def _user_row(self, user: str) -> int:
        if user not in self._user_rows:
            close = did_you_mean(user, self._user_rows)
            raise DataError(
                f'No user "{user}" among the {len(self._user_rows):,} of {self.dataset.name}. {close}'.rstrip()
            )
        return self._user_rows[user]

    def _scores(self, context: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        n_items = len(self.dataset.catalog)
        row = sparse.csr_array(
            (np.ones(len(context), np.float32), (np.zeros(len(context), int), context)), (1, n_items)
        )
        scores = {name: scorer.score_baskets(row) for name, scorer in self._scorers.items()}
        if TUNED in self.fusion.needs:
            scores[TUNED] = completion_scores(self._head, self._vectors, self._targets, context[None])
        return scores

    def _evidence(self, context: NDArray[np.int64]) -> Evidence:
        return Evidence(context[None], self._support, self._leaves)

    def _relevance(self, context: NDArray[np.int64], user: str | None) -> NDArray[np.float32]:
        evidence = self._evidence(context)
        return self._for_user(self.fusion.combine(self._scores(context), evidence)[0], evidence, user)

    def _for_user(self, scores: NDArray[np.float32], evidence: Evidence, user: str | None) -> NDArray[np.float32]:
        """Add what the user's neighbours took to fused scores (N,)."""
        if user is None or self._users is None:
            return scores
        neighbours, heard = comparable(self._users.score_users([self._user_row(user)]), evidence, self.fusion.form)
        # Not a weight that was fitted: the same voice as any one scorer. What neighbours cannot say changes nothing.
        return np.where(heard[0], scores + neighbours[0], scores).astype(np.float32)

    def _likeness(self, query: str) -> NDArray[np.float32]:
        """Return the cosine of every item with a text, by the frozen encoder: search asks for what is alike."""
        scores: NDArray[np.float32] = self._frozen @ self.bank.encode([query], None)[0]  # (N, D) @ (D,) -> (N,)
        return scores

    def _beside(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = completion_scores(self._head, self._vectors, self._targets, rows[None])[0]
        return scores

    def _suggestion(self, row: int, score: float, shares: dict[str, float], context: NDArray[np.int64]) -> Suggestion:
        catalog = self.dataset.catalog
        shares = dict(shares)
        rest = score - sum(shares.values())
        if abs(rest) > 1e-4:
            shares["user-kNN"] = rest
        slot = catalog.slots[row] or catalog.leaf(row)
        return Suggestion(
            catalog.item_ids[row], catalog.titles[row], slot, self._prices[row], score, shares,
            self._together(row, context),
        )  # fmt: skip

    def _together(self, row: int, context: NDArray[np.int64]) -> dict[str, int]:
        counts = co_counts(self._history, row, context)
        ids = self.dataset.catalog.item_ids
        return {ids[other]: int(count) for other, count in zip(context, counts, strict=True) if count}

    def _recommendation(self, one: Composition) -> Recommendation:
        catalog = self.dataset.catalog
        evidence = []
        for item in one.evidence:
            told: dict[str, Any] = {"item": catalog.item_ids[item.row], "slot": item.slot}
            if item.partner is not None and item.partner_count:
                told["together"] = {"with": catalog.item_ids[item.partner], "bundles": item.partner_count}
            if item.shared:
                told["agrees"] = dict(item.shared)
            if item.rule is not None:
                rule = item.rule
                told["rule"] = {
                    "given": rule.given, "slot": rule.slot, "support": rule.support, "of": rule.bundles,
                    "confidence": rule.confidence,
                }  # fmt: skip
            told["relevance"], told["compatibility"] = item.relevance, item.compatibility
            evidence.append(told)
        return Recommendation(
            tuple(catalog.item_ids[row] for row in one.items),
            tuple(catalog.titles[row] for row in one.items),
            one.slots,
            tuple(catalog.item_ids[row] for row in one.added), one.score, one.parts,
            None if np.isnan(one.price) else one.price, tuple(evidence),
        )  # fmt: skip


def _fitted(
    texts: Sequence[str], history: Any, targets: NDArray[np.float32], wanted: Sequence[str] | None = None
) -> dict[str, Scorer]:
    """Fit the scorers that know bundles; CEASE has the tuned vectors for extra rows."""
    makers: dict[str, Callable[[], Scorer]] = {
        "popularity": lambda: Popularity().fit(history),
        "item-kNN": lambda: ItemKNN(similarity="tfidf").fit(history),
        "TF-IDF title": lambda: TextCosine().fit(history, items=tfidf_vectors(texts)),
    }
    if len(texts) <= _CEASE_ITEMS:
        makers["CEASE tuned"] = lambda: CEASE().fit(history, items=targets)
        makers["CEASE TF-IDF"] = lambda: CEASE().fit(history, items=tfidf_vectors(texts))
    return {name: make() for name, make in makers.items() if wanted is None or name in wanted}


def _summed(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32] | None:
    """Add relevances of different origin, each as standard scores; unknown stays unknown only where all are."""
    if len(parts) < 2:
        return parts[0] if parts else None
    standard = [(part - np.nanmean(part)) / max(float(np.nanstd(part)), 1e-9) for part in parts]
    known = np.any([np.isfinite(part) for part in standard], axis=0)
    total = np.sum([np.nan_to_num(part, nan=0.0) for part in standard], axis=0)
    return np.where(known, total, np.nan).astype(np.float32)


def _support(history: Any) -> NDArray[np.int64]:
    return np.asarray((history != 0).sum(axis=0)).ravel().astype(np.int64)


def _leaves(dataset: Dataset) -> NDArray[np.int64] | None:
    names = [dataset.catalog.leaf(row) for row in range(len(dataset.catalog))]
    if not any(names):
        return None
    known = {name: place for place, name in enumerate(sorted({name for name in names if name}))}
    return np.array([known.get(name, -1) if name else -1 for name in names], np.int64)
