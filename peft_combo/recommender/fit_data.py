"""What a recommender is fitted on: training history, item vectors, adapters and ratings, without held-out users."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.data.assemble import list_basket_items
from peft_combo.data.knowledge.relations import Relations
from peft_combo.data.model import Catalog, Dataset, Interactions
from peft_combo.data.queries import Queries
from peft_combo.encoder.bank import AdapterBank, LiveAdapter
from peft_combo.encoder.heads.completion import CompletionHead
from peft_combo.encoder.heads.rating import RatingHead
from peft_combo.encoder.vectors import VectorCache
from peft_combo.recommender.category_calibration import CategoryCoverage
from peft_combo.recommender.evidence import Evidence
from peft_combo.recommender.item_pictures import append_pictures, encode_looks
from peft_combo.recommender.text_ranking import TextViews
from peft_combo.scoring.base import dense, unit_rows
from peft_combo.scoring.popularity import SECONDS_PER_DAY
from peft_combo.scoring.text import tfidf_vectors
from peft_combo.scoring.whitening import half_whiten

Tuned: TypeAlias = Mapping[str, tuple[NDArray[np.float32], CompletionHead]]
Rated: TypeAlias = Mapping[str, tuple[NDArray[np.float32], RatingHead]]


@dataclass(frozen=True, eq=False)
class FitData:
    """All that scorers may be fitted on.

    Attributes:
        history: (B, N) bundles. users: (B + U, N), with the interactions of users below, where the bundles were not
            made from the same baskets; None where there are none.
        past: (U, N) what each user took before, of the interactions alone; user_rows: the row of each user who took
            anything.
        support: (N,) bundles that hold each item.
        text: template of what the word-based scorers read, `Dataset.plain_template`.
        frozen: (N, D) vectors of the encoder without adapter. described: the same of the texts with their category
            path; None where there is no other. tuned: per adapter its (N, D) vectors and its head.
        rated: the same of rating adapters. interactions: those of `past` with their times; None where there are none.
        areas: which adapter is at home with which items; None where no adapter is bound to a category.
        pictures: (N, W) what the frozen vision encoder says of pictures, 0 without one; None where none are read.
        groups: (B,) the user (or bundle) that each row of `history` belongs to.
        relations: between items; None where the data tell none.
        baskets: (B + K, N) of 0 and 1, the bundles and below them what was bought together and is no bundle: baskets of
            `interactions` of other sizes than bundles have, or left out of them; None where there are none.
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
    coverage: CategoryCoverage | None = None
    rated: Rated = field(default_factory=dict)
    interactions: Interactions | None = None
    groups: tuple[str, ...] = ()
    described: NDArray[np.float32] | None = None
    pictures: NDArray[np.float32] | None = None
    relations: Relations | None = None
    baskets: sparse.csr_matrix[Any] | None = None

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        bundles: NDArray[Any] | None,
        interactions: NDArray[Any] | None,
        frozen: NDArray[np.float32] | None,
        tuned: Tuned,
        coverage: CategoryCoverage | None = None,
        rated: Rated | None = None,
        described: NDArray[np.float32] | None = None,
        pictures: NDArray[np.float32] | None = None,
    ) -> FitData:
        """Gather what some rows say.

        Args:
            bundles, interactions: rows that may be seen; None sees all.
        """
        catalog = dataset.catalog
        history = dataset.bundles.to_csr(len(catalog), bundles)
        users = seen = baskets = None
        past = history[:0]
        user_rows: dict[str, int] = {}
        if dataset.interactions is not None and (interactions is None or len(interactions)):
            seen = dataset.interactions if interactions is None else dataset.interactions.take(interactions)
            past = seen.to_csr(len(catalog))
            active = np.flatnonzero(np.diff(past.indptr))
            user_rows = {dataset.interactions.user_ids[row]: int(row) for row in active}
            if (dataset.bundles.baskets < 0).all():
                users = sparse.csr_matrix(sparse.vstack([history, past[active]]))
            own = dataset.bundles.baskets if bundles is None else dataset.bundles.baskets[bundles]
            if (other := _gather_baskets(seen, own, len(catalog))).shape[0]:
                baskets = sparse.csr_matrix(sparse.vstack([history, other]))
        return cls(
            history, users, past, user_rows,
            np.bincount(history.indices, minlength=len(catalog)).astype(np.int64),
            catalog.leaf_numbers, catalog, dataset.plain_template, frozen, tuned, coverage, rated or {}, seen,
            tuple(dataset.bundles.groups if bundles is None else (dataset.bundles.groups[row] for row in bundles)),
            described, pictures, None if dataset.knowledge is None else dataset.knowledge.relations, baskets,
        )  # fmt: skip

    @cached_property
    def texts(self) -> list[str]:
        """The text of each item, its words apart."""
        return self.catalog.split_words(self.catalog.texts(self.text))

    @cached_property
    def words(self) -> sparse.csr_array[Any, tuple[int, int]]:
        """(N, V) TF-IDF of single words."""
        return tfidf_vectors(self.texts)

    @cached_property
    def categorised(self) -> sparse.csr_array[Any, tuple[int, int]] | None:
        """The same with the category path among the words; None where no item has one."""
        if not any(self.catalog.categories):
            return None
        return tfidf_vectors(self.catalog.split_words(self.catalog.texts(self.text + " {category}")))

    @cached_property
    def text_views(self) -> TextViews:
        """What a text ranker reads of the items."""
        return TextViews.of(self.catalog, self.text, self.frozen, self.described, self.pictures)

    @cached_property
    def whitened(self) -> NDArray[np.float32] | None:
        """What the frozen encoder says, half-whitened: (N, D) or, with category paths read as well, (N, 2 D)."""
        if self.frozen is None:
            return None
        views = [half_whiten(one) for one in (self.frozen, self.described) if one is not None]
        return dense(unit_rows(np.hstack(views)))

    @cached_property
    def questions(self) -> Queries:
        """Leave-one-out queries of the bundles in `history`."""
        rows = np.split(self.history.indices, self.history.indptr[1:-1])
        return Queries.leave_one_out([one.astype(np.int32) for one in rows], self.groups)

    @cached_property
    def weighted_baskets(self) -> sparse.csr_array[Any, tuple[int, int]]:
        """(B + K, N) float32 `baskets`, the pairs of a row of n items weighing 2 / sqrt(n - 1).

        A basket of n items has n (n - 1) / 2 pairs; weighed alike, a few large ones would outvote all others. Products
        of two cells of a row carry its weight; a row of five items, a usual bundle, keeps the weight 1.
        """
        assert self.baskets is not None
        sizes = np.diff(self.baskets.indptr)
        factors = np.sqrt(2.0 / np.sqrt(np.maximum(sizes - 1, 1)))
        values = np.repeat(factors, sizes).astype(np.float32)
        return sparse.csr_array((values, self.baskets.indices, self.baskets.indptr), self.baskets.shape)

    @property
    def taken(self) -> sparse.csr_array[Any, tuple[int, int]]:
        """(U, N) float32, 1 where a user took an item."""
        return sparse.csr_array((np.ones_like(self.past.data), self.past.indices, self.past.indptr), self.past.shape)

    @property
    def has_ratings(self) -> bool:
        """Whether the weights of interactions are ratings: a rating adapter was tuned on them as such."""
        return any(head.config.feedback == "explicit" for _, head in self.rated.values())

    @property
    def ratings(self) -> sparse.csr_array[Any, tuple[int, int]]:
        """(U, N) float32, the mean of what a user rated an item."""
        assert self.interactions is not None
        times = replace(self.interactions, weights=np.ones_like(self.interactions.weights)).to_csr(len(self.catalog))
        return sparse.csr_array((self.past.data / times.data, self.past.indices, self.past.indptr), self.past.shape)

    def count_baskets(self, half_life_days: float | None) -> sparse.csr_array[Any, tuple[int, int]]:
        """Return (U, N) float32, the baskets of a user that hold an item, as of the latest purchase of all.

        Args:
            half_life_days: in so many days a basket loses half its weight; None counts all alike. One without a time
                is as old as the oldest.
        """
        assert self.interactions is not None
        known = self.interactions.take(self.interactions.users >= 0)
        # What has no basket was taken by itself; a basket holds an item once, however many lines it has.
        alone = known.baskets < 0
        places = np.where(alone, -1 - np.arange(len(known)), known.baskets)
        _, first = np.unique(np.column_stack([known.users, places, known.items]), axis=0, return_index=True)
        known = known.take(np.sort(first))
        weights = np.ones(len(known))
        if half_life_days is not None and np.isfinite(known.times).any():
            age = np.nanmax(known.times) - known.times
            weights = np.exp2(-np.nan_to_num(age, nan=np.nanmax(age)) / (half_life_days * SECONDS_PER_DAY))
        cells = (known.users, known.items)
        return sparse.coo_array((weights.astype(np.float32), cells), shape=self.past.shape).tocsr()

    @property
    def general(self) -> Tuned:
        """The adapters of bundles that speak of all items."""
        bound = () if self.coverage is None else self.coverage.members
        return {name: one for name, one in self.tuned.items() if name not in bound}

    def evidence(self, queries: Queries) -> Evidence:
        """Return what fusion gates read of some queries."""
        return Evidence(queries.contexts, self.support, self.leaves)


def _gather_baskets(interactions: Interactions, bundles: NDArray[np.int64], n_items: int) -> sparse.csr_array[Any, Any]:
    """Return baskets of two items or more that are none of `bundles`, (K, N) float32 of 0 and 1."""
    pairs = list_basket_items(interactions, n_items)
    pairs = pairs[~np.isin(pairs[:, 0], bundles)]
    _, rows, sizes = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
    found = sparse.csr_array((np.ones(len(pairs), np.float32), (rows, pairs[:, 1])), shape=(len(sizes), n_items))
    return found[np.flatnonzero(sizes > 1)]


@dataclass(frozen=True, eq=False)
class TextSide:
    """What encoders say of a catalogue.

    Attributes:
        live: the adapters. frozen: (N, D). described: the same of texts with category paths; None where there is no
            other. tuned: per adapter of bundles its (N, D) vectors and its head. rated: the same of rating adapters.
        coverage: which adapter is for which items, where some are for a category.
        pictures: (N, W) of the frozen vision encoder; None where none are read.
    """

    live: tuple[LiveAdapter, ...]
    frozen: NDArray[np.float32]
    described: NDArray[np.float32] | None
    tuned: dict[str, tuple[NDArray[np.float32], CompletionHead]]
    rated: dict[str, tuple[NDArray[np.float32], RatingHead]]
    coverage: CategoryCoverage | None
    pictures: NDArray[np.float32] | None = None

    def gather(
        self, dataset: Dataset, bundles: NDArray[Any] | None = None, interactions: NDArray[Any] | None = None
    ) -> FitData:
        """Gather what some rows say beside the encoders; see `FitData.of`."""
        return FitData.of(
            dataset, bundles, interactions, self.frozen, self.tuned, self.coverage, self.rated, self.described,
            self.pictures,
        )  # fmt: skip


def encode_catalog(
    dataset: Dataset, bank: AdapterBank, adapters: str | Sequence[str] | None,
    cache: VectorCache | None, progress: Callable[[int], None] | None,
) -> TextSide:  # fmt: skip
    """Encode a catalogue with and without adapters.

    Raises:
        StoreError: an adapter cannot be had, or was tuned for neither bundles nor ratings.
        DataError: the adapters do not go together.
    """
    references = () if adapters is None else (adapters,) if isinstance(adapters, str) else tuple(adapters)
    live = tuple(bank.get(reference) for reference in references)
    # Any other head is refused before anything is encoded.
    raters = {one.reference: one.task_head for one in live if isinstance(one.task_head, RatingHead)}
    heads = {one.reference: one.head_as(CompletionHead) for one in live if one.reference not in raters}
    coverage = CategoryCoverage.of(
        dataset.catalog, {one.reference: one.record.manifest.recipe for one in live if one.reference in heads}
    )

    def encode(reference: str | None, texts: Sequence[str] = dataset.texts) -> NDArray[np.float32]:
        if cache is None:
            return bank.encode(texts, reference)
        return cache.vectors(bank, texts, reference, progress)

    def encode_items(reference: str) -> NDArray[np.float32]:
        return append_pictures(encode(reference), dataset, bank.get(reference), cache, progress)

    frozen = encode(None, dataset.plain)
    described = encode_described(dataset, frozen, lambda texts: encode(None, texts))
    rated = {name: (encode(name), head) for name, head in raters.items()}
    return TextSide(
        live, frozen, described, {name: (encode_items(name), head) for name, head in heads.items()}, rated, coverage,
        encode_looks(dataset, bank, cache, progress),
    )  # fmt: skip


def encode_described(
    dataset: Dataset, frozen: NDArray[np.float32], encode: Callable[[Sequence[str]], NDArray[np.float32]]
) -> NDArray[np.float32] | None:
    """Encode texts with category paths, (N, D), those only that a category changes; None where there is none.

    Args:
        frozen: (N, D) vectors of ``dataset.plain``. encode: the frozen encoder.
    """
    if dataset.described is None:
        return None
    rows = [row for row, text in enumerate(dataset.described) if text != dataset.plain[row]]
    described = np.array(frozen)
    if rows:
        described[rows] = encode(dataset.read_frozen[1])
    return described
