"""Text search: items and bundles for a query in words, by their titles and categories.

Owns how a text is compared with items and bundles, and how the ways to compare are weighed. Knows nothing of requests,
of users, of what goes together, or of how an encoder was tuned.

Each view v compares a query with an item, or with a bundle as a whole, by a cosine a_v. The score is a weighted sum of
standard scores over the items or the bundles x that are searched, so that no view counts for more because its numbers
are larger:

    score(q, x) = sum over v of w_v (a_v(q, x) - mean a_v(q, .)) / deviation a_v(q, .)

Weights are the same everywhere unless validation queries clearly prefer others; nothing else is learned of bundles.
Source: Fox and Shaw 1994 (CombSUM); Salton and Buckley 1988 (TF-IDF).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.data.language import Language, count_unspaced, split_characters, split_words
from peft_combo.data.model import Bundles, Dataset
from peft_combo.encoder.bank import AdapterBank
from peft_combo.recommender.item_index import ItemIndex, find_home, is_large
from peft_combo.scoring.base import Vectors, dense, unit_rows
from peft_combo.scoring.text import Tfidf, cut_plurals

Floats: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = NDArray[np.integer[Any]]
EncodeTexts: TypeAlias = Callable[[Sequence[str]], Floats]

WORDS, CHARACTERS, FROZEN_TITLE, FROZEN_ALL = "words", "characters", "frozen title", "frozen title and category"
# Where nothing is chosen: words at half of what each of the two texts counts. On intents of BundleRec clothing and
# electronics (docs/quality.md) R@10 .374 and .340; words at 3/4, 1/4 and 0: .371, .368 and .336; .339, .344 and .310.
# Runs of characters are a view of catalogues without spaces alone, and share the weight of words there.
_WEIGHTS = {WORDS: 0.5, CHARACTERS: 0.5, FROZEN_TITLE: 1.0, FROZEN_ALL: 1.0}
# What validation may choose for a tuned encoder, and for the words.
_TUNED_SHARES, _WORD_SHARES = (0.5, 1.0), (0.25, 1.0)
_DEPTH = 1000  # items that each view proposes, where an index finds them
_FLAT = 1e-6  # a view whose cosines all lie closer together says nothing of this query


# --- ways to compare --------------------------------------------------------------------------------------------------


class View(Protocol):
    """One way to compare texts: vectors of length 1, dense or CSR, of items, bundles and queries; 0 says nothing."""

    @property
    def items(self) -> Vectors:
        """(N, D)."""
        ...

    def pool(self, bundles: Sequence[Rows]) -> Vectors:
        """Return the vector of each bundle, (B, D), from the rows of its items."""
        ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of Q queries, (Q, D)."""
        ...


@dataclass(frozen=True, eq=False)
class WordView:
    """TF-IDF of words, 1 + ln(count) times rarity among the items; a bundle is the texts of its items as one.

    Attributes:
        texts: of the items, as `read` leaves them. read: what a text is turned into before its words are told.
    """

    texts: tuple[str, ...]
    read: Callable[[str], str]
    tfidf: Tfidf
    items: Vectors

    @cached_property
    def by_term(self) -> Any:
        """(T, N) CSR, the items by word; kept, for turning them round costs more than a query."""
        items: Any = self.items
        return items.T.tocsr()

    @classmethod
    def of(cls, texts: Sequence[str], read: Callable[[str], str] = cut_plurals) -> WordView:
        """Read the texts of N items, plural and singular being one word."""
        known = tuple(read(text) for text in texts)
        tfidf = Tfidf.fit(known, sublinear=True)
        return cls(known, read, tfidf, tfidf.vectors(known))

    def pool(self, bundles: Sequence[Rows]) -> Vectors:
        return self.tfidf.vectors([" ".join(self.texts[row] for row in rows) for rows in bundles])

    def encode(self, texts: Sequence[str]) -> Vectors:
        return self.tfidf.vectors([self.read(text) for text in texts])


@dataclass(frozen=True, eq=False)
class VectorView:
    """Vectors of an encoder, (N, D) of the items; a bundle is their mean.

    Attributes:
        encode_texts: encodes queries as the items' texts were encoded.
    """

    items: Floats
    encode_texts: EncodeTexts

    def pool(self, bundles: Sequence[Rows]) -> Vectors:
        means = [self.items[rows].mean(axis=0) for rows in bundles]
        return unit_rows(np.array(means, np.float32).reshape(len(bundles), self.items.shape[1]))

    def encode(self, texts: Sequence[str]) -> Vectors:
        return self.encode_texts(texts)


def read_words(text: str, language: Language = "auto") -> str:
    """Return the words of a text with one space between, plural and singular being one."""
    return cut_plurals(split_words(text, language))


def build_views(
    dataset: Dataset, bank: AdapterBank, frozen: Floats, described: Floats | None, tuned: Mapping[str, Floats]
) -> dict[str, View]:
    """Compare by words, by the frozen encoder on titles and on titles with category, and by each tuned encoder.

    Where no spaces part the words of most items, by runs of characters too.

    Args:
        frozen: (N, D) vectors of ``dataset.plain``. described: the same of ``dataset.described``; None leaves them out.
        tuned: per adapter of `bank` the (N, D) vectors of ``dataset.texts``.
    """

    def encode_by(adapter: str | None) -> EncodeTexts:
        @lru_cache(maxsize=4)  # two views ask the frozen encoder for the same query
        def encode(texts: tuple[str, ...]) -> Floats:
            return bank.encode(texts, adapter)

        return lambda texts: encode(tuple(texts))

    by_frozen = encode_by(None)
    said, language = dataset.described or dataset.plain, dataset.catalog.language
    views: dict[str, View] = {
        WORDS: WordView.of(said, partial(read_words, language=language)),
        FROZEN_TITLE: VectorView(frozen, by_frozen),
    }
    if 2 * count_unspaced(said, language) > len(said):
        views[CHARACTERS] = WordView.of(said, split_characters)
    if described is not None:
        views[FROZEN_ALL] = VectorView(described, by_frozen)
    return views | {name: VectorView(own, encode_by(name)) for name, own in tuned.items()}


# --- the search -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TextSearch:
    """Items and bundles for a text; safe to share between threads.

    Attributes:
        views: by name. weights: above 0; a view that has none is not asked.
        nearest: of views by vectors, what finds the best items without scoring all; none where items are few.
    """

    views: Mapping[str, View]
    weights: Mapping[str, float]
    nearest: Mapping[str, ItemIndex] = field(default_factory=dict)

    @classmethod
    def of(cls, views: Mapping[str, View], weights: Mapping[str, float] | None = None) -> TextSearch:
        """Weigh some views, as ever where nothing is said of weights.

        Raises:
            ValueError: a weight is of no view, negative or not finite, or no view has one.
        """
        given = {name: weight for name, weight in _WEIGHTS.items() if name in views} if weights is None else weights
        strange = [name for name, weight in given.items() if name not in views or not 0 <= weight < np.inf]
        if strange or not any(given.values()):
            known = ", ".join(views)
            raise ValueError(f"weights of a text search: expected numbers >= 0 of {known}, found {dict(given)}.")
        return cls(views, {name: float(weight) for name, weight in given.items() if weight > 0})

    def encode_ahead(self, queries: Sequence[str]) -> None:
        """Encode queries for every view that keeps what it encoded, so that scoring them later waits for no encoder."""
        for name in self.weights:
            if isinstance(view := self.views[name], VectorView):
                view.encode(queries)

    def with_indexes(self) -> TextSearch:
        """Return the same search with an index of each view by vectors, where there are so many items that it pays."""
        vectors = {name: view.items for name in self.weights if isinstance(view := self.views[name], VectorView)}
        if not any(is_large(len(own)) for own in vectors.values()):
            return self
        home = next((home for own in vectors.values() if (home := find_home(own)) is not None), None)
        return replace(self, nearest={name: ItemIndex.build(own, home) for name, own in vectors.items()})

    def find_items(
        self, query: str, k: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.int64], Floats]:
        """Return the k best items for a query and their scores, those of `score_items`; of equal ones the lower row.

        With indexes the items that are best by one view are scored by all, so of many items one may be missed that is
        good by all and best by none.

        Args:
            allowed: (N,) the items that may be found; None for all.
        """
        depth = max(_DEPTH, 4 * k)
        if self.nearest and 4 * depth <= len(next(iter(self.nearest.values())).vectors):
            rows, scores = self._score_best(query, depth, allowed)
        else:
            scores = np.asarray(self.score_items([query])[0], np.float32)
            rows = np.arange(len(scores)) if allowed is None else np.flatnonzero(allowed)
            scores = scores[rows]
        best = select_largest(scores, k)
        return rows[best], scores[best]

    def score_query(self, query: str, allowed: NDArray[np.bool_], depth: int | None) -> Floats:
        """Score every item for one query, (N,), or only the `depth` best that are allowed; all others have NaN."""
        if depth is None or not self.nearest:
            return np.asarray(self.score_items([query])[0], np.float32)
        return _spread(len(allowed), *self.find_items(query, depth, allowed))

    def score_alike(self, row: int, allowed: NDArray[np.bool_], depth: int | None) -> Floats:
        """Score every item by the cosine of its title with that of one item, (N,); see `score_query`."""
        view = self.views[FROZEN_TITLE]
        assert isinstance(view, VectorView)
        if depth is None or FROZEN_TITLE not in self.nearest:
            return np.asarray(view.items @ view.items[row], np.float32)
        rows, scores = self.nearest[FROZEN_TITLE].index.search(view.items[[row]], depth, allowed=allowed)
        return _spread(len(allowed), rows[rows >= 0], scores[rows >= 0])

    def score_items(self, queries: Sequence[str]) -> Floats:
        """Score every item for each query, (Q, N); higher is better."""
        items = {name: self.views[name].items for name in self.weights}
        return self._sum_views(queries, items, items)

    def _score_best(
        self, query: str, depth: int, allowed: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.int64], Floats]:
        """Score the items that are among the `depth` best by one view at least; rows ascending."""
        found, words = [], {}
        asked = {name: self.views[name].encode([query]) for name in self.weights}
        for name, own in asked.items():
            view = self.views[name]
            if isinstance(view, WordView):
                words[name] = _Hits.of(own, view)
                found.append(words[name].find_best(depth, allowed))
            else:
                rows, _ = self.nearest[name].index.search(dense(own), depth, allowed=allowed)
                found.append(rows[0][rows[0] >= 0])
        rows = np.unique(np.concatenate(found))
        total = np.zeros(len(rows), np.float32)
        for name, weight in self.weights.items():
            if name in words:
                values, (mean, deviation) = words[name].scores[rows], words[name].describe()
            else:
                values = _compare(asked[name], self.views[name].items[rows])[0]
                mean, deviation = self.nearest[name].describe(dense(asked[name])[0])
            if deviation > _FLAT:
                total += np.float32(weight / deviation) * (values - np.float32(mean))
        return rows, total

    def pool_bundles(self, bundles: Sequence[Rows]) -> dict[str, Vectors]:
        """Return what `score_bundles` reads of B bundles, from the rows of their items: by view (B, D)."""
        return {name: self.views[name].pool(bundles) for name in self.weights}

    def score_bundles(
        self, queries: Sequence[str], pooled: Mapping[str, Vectors], among: Mapping[str, Vectors] | None = None
    ) -> Floats:
        """Score bundles for each query, (Q, B); higher is better.

        Args:
            pooled: of `pool_bundles`. among: of the bundles that mean and deviation are taken over; None takes those
                that are scored.
        """
        return self._sum_views(queries, pooled, pooled if among is None else among)

    def _sum_views(
        self, queries: Sequence[str], vectors: Mapping[str, Vectors], among: Mapping[str, Vectors]
    ) -> Floats:
        found = {}
        for name in self.weights:
            asked = self.views[name].encode(queries)
            own = _compare(asked, vectors[name])
            found[name] = standardize(own, own if vectors is among else _compare(asked, among[name]))
        return _weigh(found, self.weights)


def _spread(count: int, rows: NDArray[np.int64], scores: Floats) -> Floats:
    spread = np.full(count, np.nan, np.float32)
    spread[rows] = scores
    return spread


def select_largest(scores: Floats, k: int) -> NDArray[np.int64]:
    """Return the places of the k largest, best first; of equals the earlier one."""
    if len(scores) > k:
        # The k-th largest and all that equal it, so that the order of equals is that of the rows.
        edge = np.partition(scores, len(scores) - k)[len(scores) - k]
        places = np.flatnonzero(scores >= edge)
    else:
        places = np.arange(len(scores))
    return places[np.argsort(-scores[places], kind="stable")][:k]


@dataclass(frozen=True, eq=False)
class _Hits:
    """The items that share a word with a query: (H,) rows, and (N,) their likeness, 0 for all others."""

    rows: NDArray[np.int64]
    scores: Floats

    @classmethod
    def of(cls, query: Vectors, view: WordView) -> _Hits:
        product: Any = query @ view.by_term  # (1, T) @ (T, N), sparse
        scores = np.zeros(product.shape[1], np.float32)
        scores[product.indices] = product.data
        return cls(np.sort(product.indices).astype(np.int64), scores)

    def find_best(self, depth: int, allowed: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        rows = self.rows if allowed is None else self.rows[allowed[self.rows]]
        values = self.scores[rows]
        return rows[np.argpartition(-values, depth)[:depth]] if len(rows) > depth else rows

    def describe(self) -> tuple[float, float]:
        """Return mean and standard deviation over all items."""
        values = self.scores[self.rows].astype(np.float64)
        mean = float(values.sum() / len(self.scores))
        return mean, max(float((values**2).sum()) / len(self.scores) - mean**2, 0.0) ** 0.5


def standardize(values: Floats, among: Floats | None = None) -> Floats:
    """Return standard scores by row, over `among` where given; 0 where all values of a row are alike."""
    base = values if among is None else among
    mean = base.mean(axis=1, keepdims=True, dtype=np.float64)
    deviation = base.std(axis=1, keepdims=True, dtype=np.float64)
    scale = np.where(deviation > _FLAT, 1 / np.maximum(deviation, _FLAT), 0.0)
    return np.asarray((values - mean.astype(np.float32)) * scale.astype(np.float32), np.float32)


def _compare(queries: Vectors, vectors: Vectors) -> Floats:
    product: Any = queries @ vectors.T  # (Q, D) @ (D, X) -> (Q, X)
    return np.asarray(dense(product), np.float32)


def _weigh(found: Mapping[str, Floats], weights: Mapping[str, float]) -> Floats:
    return np.asarray(sum(np.float32(weight) * found[name] for name, weight in weights.items() if weight), np.float32)


# --- queries with known answers, and the choice of weights ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TextQueries:
    """Bundles that are asked for by their intents.

    Attributes:
        texts: (Q) the intents. targets: (Q,) the place of the right bundle among the candidates. groups: (Q,) of whom.
        candidates: the item rows of each distinct bundle.
    """

    texts: tuple[str, ...]
    targets: NDArray[np.int64]
    groups: NDArray[np.str_]
    candidates: tuple[Rows, ...]

    @classmethod
    def of(cls, bundles: Bundles, rows: Rows, among: Rows | None = None) -> TextQueries:
        """Ask for the bundles of some rows by their intents; those without one are left out.

        Args:
            among: rows of the candidates, `rows` included; None for all bundles.
        """
        kept = np.arange(len(bundles)) if among is None else np.unique(among)
        first, numbers = find_distinct([bundles.items[row] for row in kept])
        asked = [int(row) for row in rows if bundles.intents[row]]
        return cls(
            tuple(bundles.intents[row] or "" for row in asked),
            numbers[np.searchsorted(kept, asked)],
            np.array([bundles.groups[row] for row in asked], np.str_),
            tuple(bundles.items[kept[place]] for place in first),
        )

    def __len__(self) -> int:
        return len(self.texts)


def find_distinct(bundles: Sequence[Rows]) -> tuple[list[int], NDArray[np.int64]]:
    """Number bundles by what they hold: the place where each distinct item set occurs first, and the number of each."""
    numbers: dict[frozenset[int], int] = {}
    first: list[int] = []
    for place, rows in enumerate(bundles):
        if numbers.setdefault(frozenset(rows.tolist()), len(first)) == len(first):
            first.append(place)
    return first, np.array([numbers[frozenset(rows.tolist())] for rows in bundles], np.int64)


def select_weights(views: Mapping[str, View], valid: TextQueries) -> dict[str, float]:
    """Choose the weights of the views on validation queries; the usual ones where there are none.

    Tries other shares of the words, and tuned encoders beside or in place of the frozen one. What is best by MRR is
    taken only where it is above the usual weights by more than two standard errors of the difference, for a few hundred
    queries tell some of so many weights apart by luck.

    Args:
        valid: validation queries; tuned encoders must not have seen their bundles.
    """
    usual = dict(TextSearch.of(views).weights)
    if not len(valid):
        return usual
    found = {
        name: standardize(_compare(view.encode(valid.texts), view.pool(valid.candidates)))
        for name, view in views.items()
    }

    def measure(weights: Mapping[str, float]) -> NDArray[np.float64]:
        return metrics.per_query(metrics.midranks(_weigh(found, weights), valid.targets), "mrr")

    plain = measure(usual)
    best, most = usual, 0.0
    for weights in _list_weights(views):
        gain = measure(weights) - plain
        if gain.mean() > most and gain.mean() > 2 * metrics.standard_error(gain, valid.groups):
            best, most = weights, float(gain.mean())
    return dict(TextSearch.of(views, best).weights)


def _list_weights(views: Mapping[str, View]) -> list[dict[str, float]]:
    """Name the weights that validation chooses from, beside the usual ones."""
    usual = {name: weight for name, weight in _WEIGHTS.items() if name in views}
    found = [{**usual, WORDS: share} for share in _WORD_SHARES if WORDS in usual]
    for name, share in itertools.product([name for name in views if name not in _WEIGHTS], _TUNED_SHARES):
        found.append({**usual, name: share})
        found += [{**usual, frozen: 0.0, name: share} for frozen in (FROZEN_TITLE, FROZEN_ALL) if frozen in usual]
    return found
