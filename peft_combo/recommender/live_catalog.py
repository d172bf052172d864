"""Items that came after a recommender was fitted: found at once, scored cold by their texts, without fitting anew.

Owns how a fitted recommender is given more rows. A tuned encoder speaks of a new item as of any other, by its vector. A
scorer that reads texts in ways that were made of the whole catalogue (rarity of words, neighbours) speaks of it as of
the items it is most like; scorers that count say nothing of it, as of every item that no bundle holds. Nothing is
changed in place: requests under way keep the recommender they have.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.data.knowledge.rule_set import RuleSet
from peft_combo.data.model import Catalog
from peft_combo.encoder.heads.completion import CompletionHead, project_targets
from peft_combo.encoder.index import ExactIndex
from peft_combo.recommender.category_calibration import CategoryCoverage
from peft_combo.recommender.fit_state import FitState
from peft_combo.recommender.fitted_scorers import (
    Fitted,
    FittedCategories,
    FittedEnsemble,
    FittedHead,
    LengthenedScorer,
)
from peft_combo.recommender.recommender import BundleRecommender
from peft_combo.recommender.scorer_id import CEASE_BERT, FROZEN, PEER, TEXT_RANKER, WORDS, ScorerId
from peft_combo.recommender.text_search import FROZEN_TITLE, TextSearch, VectorView, View, WordView
from peft_combo.recommender.user_habits import UserHabits

Floats = NDArray[np.float32]

TITLE, DESCRIBED = "", "title and category"
"""Names of the frozen encoder's vectors of an item, beside the references of adapters."""

# A new item is spoken of as so many of the items that are most like it. Those that no bundle holds stand for it where a
# scorer also counts; with fewer than this of them it has no score there.
_LIKE, _FEWEST = 8, 32
_SPARE = 1024  # rows of a buffer that later items go into without copying all vectors again


@dataclass(frozen=True, eq=False)
class LiveItem:
    """An item as it is now.

    Attributes:
        vectors: per name of `TITLE`, `DESCRIBED` and adapters the (D,) vector of its text; none where an item that was
            there before keeps its text.
    """

    item_id: str
    title: str
    category: tuple[str, ...] = ()
    slot: str | None = None
    price: float | None = None
    description: str = ""
    attributes: Mapping[str, str | None] = field(default_factory=dict)
    vectors: Mapping[str, Floats] = field(default_factory=dict)


def make_catalog(items: Sequence[LiveItem], columns: Collection[str]) -> Catalog:
    """Return a catalogue of items, with these columns beside the usual ones."""
    return Catalog.build(
        [one.item_id for one in items], [one.title for one in items], [one.category for one in items],
        [one.slot for one in items], [np.nan if one.price is None else one.price for one in items],
        [one.description for one in items], {name: [one.attributes.get(name) for one in items] for name in columns},
    )  # fmt: skip


class VectorBuffers:
    """Room behind the vectors of a recommender: more rows cost their own copying, not that of all.

    What was given out is never written to: a row that is there stays as it is, and is replaced in a copy.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[int, tuple[Floats, Floats, int]] = {}  # id of the base -> base, buffer, rows filled

    def extend(self, base: Floats, more: Floats, moved: Mapping[int, Floats], *, again: bool) -> Floats:
        """Return (N, D) base with (M, D) more rows and some of its own replaced.

        Args:
            again: rows that were given out may differ from those of the last call, so that all is copied.
        """
        rows = len(base) + len(more)
        with self._lock:
            known = self._kept.get(id(base))
            if known is None or again or moved or rows > len(known[1]):
                buffer = np.empty((rows + _SPARE, base.shape[1]), np.float32)
                buffer[: len(base)] = base
                filled = len(base)
                for row, vector in moved.items():
                    buffer[row] = vector
            else:
                _, buffer, filled = known
            if rows > filled:
                buffer[filled:rows] = more[filled - len(base) :]
            self._kept[id(base)] = (base, buffer, max(rows, filled))
            return buffer[:rows]


def extend_recommender(
    base: BundleRecommender, items: Sequence[LiveItem], hidden: Collection[str], buffers: VectorBuffers,
    *, again: bool = False,
) -> BundleRecommender:  # fmt: skip
    """Return a recommender that also knows items that came later, shows changed ones as they are now, and hides some.

    Args:
        base: as it was fitted; never one that was extended.
        items: new and changed items, each once, new ones in an order that later calls keep.
        hidden: ids that are never shown.
        buffers: of this base.
        again: texts of items that were new before may have changed since the last call.
    """
    catalog = base.dataset.catalog
    new = [one for one in items if one.item_id not in catalog.index]
    changed = {catalog.index[one.item_id]: one for one in items if one.item_id in catalog.index}
    return _Extension(base, new, changed, buffers, again).build(hidden)


class _Extension:
    def __init__(
        self, base: BundleRecommender, new: Sequence[LiveItem], changed: Mapping[int, LiveItem],
        buffers: VectorBuffers, again: bool,
    ) -> None:  # fmt: skip
        self.base, self.new, self.changed, self.buffers, self.again = base, new, changed, buffers, again
        self.known = base.state.known
        self.size = len(base.dataset.catalog)
        self.total = self.size + len(new)
        self.moved = {row: one for row, one in changed.items() if one.vectors}
        self.catalog = self._extend_catalog()
        self._done: dict[int, Any] = {}

    def build(self, hidden: Collection[str]) -> BundleRecommender:
        base, state = self.base, self.base.state
        assert self.known.frozen is not None
        self.frozen = self._grow(self.known.frozen, TITLE)
        described = None if self.known.described is None else self._grow(self.known.described, DESCRIBED)
        tuned = {name: (self._grow(own, name), head) for name, (own, head) in self.known.tuned.items()}
        names = {id(self.known.frozen): TITLE, id(self.known.described): DESCRIBED}
        self._names = names | {id(own): name for name, (own, _) in self.known.tuned.items()}
        coverage = self._cover()
        known = replace(
            self.known, history=self._widen(self.known.history), past=self._widen(self.known.past), users=None,
            baskets=None,
            support=np.concatenate([self.known.support, np.zeros(len(self.new), np.int64)]),
            leaves=self.catalog.leaf_numbers, catalog=self.catalog, frozen=self.frozen, described=described,
            tuned=tuned, coverage=coverage, pictures=self._lengthen(self.known.pictures),
        )  # fmt: skip
        self._nearest = self._find_nearest()
        serving = {scorer: self._extend(one, scorer) for scorer, one in state.serving.items()}
        made = FitState(
            state.adapters, known, state.fusion, state.settings, serving, state.text_scorer,
            self._extend(state.text_side, state.text_scorer),
            None if state.neighbours is None else LengthenedScorer(state.neighbours, self.size, self.total, None, None),
            state.weights, self._extend_search(), state.split_digest, state.notes,
            None if state.habits is None else self._extend_habits(state.habits),
            None if state.retrieval is None else state.retrieval.grow(serving, self.moved),
        )  # fmt: skip
        index = self.catalog.index
        gone = np.zeros(self.total, bool)
        gone[[index[item] for item in hidden if item in index]] = True
        rules = RuleSet.of(base.dataset.knowledge, self.catalog)
        composer = base.composer.extend(self.catalog, self.frozen, known.history, self.changed.keys(), gone, rules)
        dataset = replace(base.dataset, catalog=self.catalog)
        return BundleRecommender(dataset, base.bank, made, composer=composer, like=base)

    def _extend_catalog(self) -> Catalog:
        catalog = self.base.dataset.catalog
        columns = dict.fromkeys([*catalog.attributes, *(name for one in self.new for name in one.attributes)])
        columns |= dict.fromkeys(name for one in self.changed.values() for name in one.attributes)
        more = make_catalog(self.new, columns)

        def put(own: tuple[Any, ...], name: str, added: tuple[Any, ...]) -> tuple[Any, ...]:
            values = list(own)
            for row, one in self.changed.items():
                values[row] = getattr(one, name)
            return (*values, *added)

        prices = np.concatenate([catalog.prices, more.prices])
        for row, one in self.changed.items():
            prices[row] = np.nan if one.price is None else one.price
        attributes = {}
        for name in columns:
            values = list(catalog.attributes.get(name, (None,) * self.size))
            for row, one in self.changed.items():
                values[row] = one.attributes.get(name)
            attributes[name] = (*values, *more.attributes[name])
        return Catalog.build(
            (*catalog.item_ids, *more.item_ids), put(catalog.titles, "title", more.titles),
            put(catalog.categories, "category", more.categories), put(catalog.slots, "slot", more.slots), prices,
            put(catalog.descriptions, "description", more.descriptions), attributes,
            (*catalog.pictures, *(None for _ in self.new)) if catalog.pictures else (),
        )  # fmt: skip

    def _grow(self, own: Floats, name: str) -> Floats:
        moved = {}
        for row, one in self.moved.items():  # its text is another one, its picture the same
            moved[row] = np.concatenate([one.vectors[name], own[row, len(one.vectors[name]) :]])
        return self._put_rows(own, self._stack(name, own.shape[1]), moved)

    def _put_rows(self, own: Floats, more: Floats, moved: Mapping[int, Floats]) -> Floats:
        if id(own) not in self._done:
            self._done[id(own)] = self.buffers.extend(own, more, moved, again=self.again)
        found: Floats = self._done[id(own)]
        return found

    def _stack(self, name: str, width: int) -> Floats:
        vectors = [one.vectors[name] for one in self.new]
        found = np.zeros((len(vectors), width), np.float32)  # of its picture nothing is known
        for row, vector in zip(found, vectors, strict=True):
            row[: len(vector)] = vector
        return found

    def _lengthen(self, pictures: Floats | None) -> Floats | None:
        return None if pictures is None else np.pad(pictures, ((0, len(self.new)), (0, 0)))

    def _widen(self, matrix: sparse.csr_matrix[Any]) -> sparse.csr_matrix[Any]:
        return sparse.csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=(matrix.shape[0], self.total))

    def _cover(self) -> CategoryCoverage | None:
        if self.known.coverage is None:
            return None
        recipes = {one.reference: one.record.manifest.recipe for one in self.base.state.adapters}
        return CategoryCoverage.of(self.catalog, {name: recipes[name] for name in self.known.tuned})

    def _find_nearest(self) -> dict[bool, tuple[NDArray[np.int64], Floats] | None]:
        """Return for each new item the rows most like it and their weights, (M, K) both: of all, and of unsold ones."""
        assert self.known.frozen is not None
        own = self.frozen[self.size :]
        nearest: dict[bool, tuple[NDArray[np.int64], Floats] | None] = {True: None, False: None}
        kept = self.base.state.search.nearest.get(FROZEN_TITLE)
        index = ExactIndex(self.known.frozen) if kept is None else kept.index
        unsold = self.known.support == 0
        for counts, least in ((False, 1), (True, _FEWEST)):
            if len(own) and (unsold.sum() if counts else self.size) >= least:
                rows, alike = index.search(own, _LIKE, allowed=unsold if counts else None)  # (M, K) both
                nearest[counts] = (rows, np.maximum(alike, 1e-3).astype(np.float32))
        return nearest

    def _extend(self, fitted: Fitted, scorer: ScorerId | None) -> Fitted:
        match fitted:
            case FittedHead():
                return self._extend_head(fitted)
            case FittedEnsemble():
                heads = tuple(self._extend_head(one) for one in fitted.heads)
                averaged = fitted.targets is not None
                return FittedEnsemble.of(heads, vectors=averaged)
            case FittedCategories():
                coverage = self._cover()
                assert coverage is not None
                heads_of = {name: self._extend_head(one) for name, one in fitted.heads.items()}
                return FittedCategories(heads_of, coverage, fitted.calibration)
            case _:
                nearest = None
                if scorer in (TEXT_RANKER, WORDS, FROZEN):
                    nearest = self._nearest[False]
                elif scorer in (PEER, CEASE_BERT):
                    nearest = self._nearest[True]
                return LengthenedScorer(fitted, self.size, self.total, nearest, self._nearest[False])

    def _extend_habits(self, habits: UserHabits) -> UserHabits:
        return replace(habits, fitted=LengthenedScorer(habits.fitted, self.size, self.total, None, None))

    def _extend_head(self, fitted: FittedHead) -> FittedHead:
        name = self._names[id(fitted.vectors)]
        vectors = self._grow(fitted.vectors, name)
        more = project_targets(fitted.head, vectors[self.size :]) if self.new else np.empty((0, 0), np.float32)
        moved = self._project_moved(fitted.head, vectors)
        targets = self._put_rows(fitted.targets, more.reshape(-1, fitted.targets.shape[1]), moved)
        return FittedHead(vectors, fitted.head, targets)

    def _project_moved(self, head: CompletionHead, vectors: Floats) -> dict[int, Floats]:
        if not self.moved:
            return {}
        made = project_targets(head, vectors[list(self.moved)])
        return dict(zip(self.moved, made, strict=True))

    def _extend_search(self) -> TextSearch:
        search, dataset = self.base.state.search, self.base.dataset
        template = dataset.plain_template + (" {category}" if dataset.described is not None else "")
        views: dict[str, View] = {}
        for name, view in search.views.items():
            if isinstance(view, VectorView):
                # The texts' part of an adapter that reads pictures is an array of its own, called like the adapter.
                own = self._grow(view.items, self._names.get(id(view.items), name))
                views[name] = VectorView(own, view.encode_texts)
            elif isinstance(view, WordView):
                views[name] = self._extend_words(view, template)
            else:
                views[name] = view
        nearest = {
            name: one.grow(self._grow(one.vectors, self._names.get(id(one.vectors), name)), self.moved)
            for name, one in search.nearest.items()
        }
        return TextSearch(views, search.weights, nearest)

    def _extend_words(self, view: WordView, template: str) -> WordView:
        later = [*self.moved.values(), *self.new]
        columns = self.base.dataset.catalog.attributes.keys()
        texts = [view.read(text) for text in make_catalog(later, columns).texts(template)] if later else []
        order = np.arange(self.total)
        order[list(self.moved)] = self.size + np.arange(len(self.moved))
        order[self.size :] += len(self.moved)
        items: Any = view.items
        both: Any = sparse.vstack([items, view.tfidf.vectors(texts)], format="csr")
        said = (*view.texts, *texts)
        return WordView(tuple(said[row] for row in order.tolist()), view.read, view.tfidf, both[order])
