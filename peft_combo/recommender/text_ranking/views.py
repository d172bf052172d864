"""Text views of a catalogue: several ways to say how alike two items' texts and categories are.

Owns the words, word pieces, vectors and category paths that items are compared by, as rows per item: no table of items
by items is ever made. Reads texts, categories and the vectors of the frozen encoder; nothing of bundles or behaviour.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.data.language import count_unspaced
from peft_combo.data.model import Catalog
from peft_combo.machine import row_blocks
from peft_combo.scoring.base import binary, dense, unit_rows
from peft_combo.scoring.text import Tfidf
from peft_combo.scoring.whitening import half_whiten, multiply_self

Csr: TypeAlias = "sparse.csr_array[Any, tuple[int, int]]"
Floats: TypeAlias = NDArray[np.float32]

_WORD = re.compile(r"\w+")
# Components kept of latent semantic analysis, and of all dense views together.
_LATENT, _JOINT = 256, 256
# BM25 as Robertson and Zaragoza 2009 give it.
_K1, _B = 1.2, 0.75
# Neighbours of an item that are kept, and the items they are sought among on a large catalogue.
_NEAREST, _REFERENCES = 64, 10_000
_TEMPERATURE = 0.1
# Views that candidates are sought with come first.
_SCANNED = 4
_ITEM_COLUMNS = ("length of the title", "items of the first word", "items of the leaf", "depth")
# Words are told by the entropy of their leaves, as a share of the most it can be: below it they name a kind of thing.
_KIND = 0.6


@dataclass(frozen=True, eq=False)
class SparseViews:
    """Views that are sums over shared terms: likeness of i and j = sum over terms t of query[i, t] target[j, t].

    All views stand side by side in one matrix, so that a pair's likenesses are told in one pass over its terms.

    Attributes:
        names: of the views. query, target: (N, T) CSR, columns in the order of the views, sorted.
        ends: (V,) where the columns of each view end.
        bounds: (N, V + 1) where each view of an item begins in `target`'s data.
    """

    names: tuple[str, ...]
    query: Csr
    target: Csr
    ends: NDArray[np.int64]
    bounds: NDArray[np.int64]

    @classmethod
    def build(cls, views: Sequence[tuple[str, Csr, Csr]]) -> SparseViews:
        """Join views, each a name with its query and target rows."""
        ends = np.cumsum([0, *(query.shape[1] for _, query, _ in views)])
        query = sparse.csr_array(sparse.hstack([one for _, one, _ in views], format="csr", dtype=np.float32))
        target = sparse.csr_array(sparse.hstack([one for _, _, one in views], format="csr", dtype=np.float32))
        for matrix in (query, target):
            matrix.sum_duplicates()
            matrix.sort_indices()
        view_of = np.searchsorted(ends, target.indices, side="right") - 1
        row_of = np.repeat(np.arange(target.shape[0]), np.diff(target.indptr))
        counts = np.zeros((target.shape[0], len(views)), np.int64)
        np.add.at(counts, (row_of, view_of), 1)
        bounds = np.concatenate([np.zeros((len(counts), 1), np.int64), np.cumsum(counts, axis=1)], axis=1)
        return cls(
            tuple(name for name, _, _ in views), query, target, ends[1:],
            bounds + target.indptr[:-1, None].astype(np.int64),
        )  # fmt: skip

    def average(self, context: NDArray[np.int64], views: int) -> Csr:
        """Return the mean of the context's query rows in each of the first `views` views: (S,) -> (views, T')."""
        width, indptr = int(self.ends[views - 1]), self.query.indptr
        places = np.concatenate([np.arange(indptr[item], indptr[item + 1]) for item in context])
        terms = self.query.indices[places]
        inside = terms < width
        terms, weights = terms[inside], self.query.data[places[inside]] / np.float32(len(context))
        view_of = np.searchsorted(self.ends[:views], terms, side="right")
        order = np.argsort(view_of, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(view_of, minlength=views))]).astype(indptr.dtype)
        return sparse.csr_array((weights[order], terms[order], starts), (views, width))

    def pairs(self, context: NDArray[np.int64], rows: NDArray[np.int64]) -> Floats:
        """Return how alike each view finds the items: (S,) context, (C,) rows -> (V, S, C)."""
        starts, stops = self.target.indptr[rows], self.target.indptr[rows + 1]
        sizes = stops - starts
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        places = np.repeat(starts - offsets[:-1], sizes) + np.arange(offsets[-1])
        terms, weights = self.target.indices[places], self.target.data[places]
        # Where each view of each row begins among `places`.
        edges = self.bounds[rows] - starts[:, None] + offsets[:-1, None]
        asked = np.zeros(self.target.shape[1], np.float32)
        alike = np.empty((len(self.names), len(context), len(rows)), np.float32)
        running = np.zeros(len(places) + 1)
        for place, item in enumerate(context):
            own = slice(self.query.indptr[item], self.query.indptr[item + 1])
            asked[self.query.indices[own]] = self.query.data[own]
            np.cumsum(weights * asked[terms], out=running[1:])
            sums = running[edges]
            alike[:, place] = np.diff(sums, axis=1).T
            asked[self.query.indices[own]] = 0
        return alike


@dataclass(frozen=True, eq=False)
class Crowding:
    """How many close neighbours each item has in one view, which tells a rare match from a common one.

    Attributes:
        nearest: (N, K) float16 likenesses to its nearest other items, ascending.
        hubness: (N, 2) mean of the ten largest of these, and the soft maximum over all items.
        scale: items of the catalogue for each that neighbours were sought among.
    """

    nearest: NDArray[np.float16]
    hubness: Floats
    scale: float

    @classmethod
    def measure(cls, blocks: Iterator[tuple[slice, Floats]], items: int, own: NDArray[np.int64]) -> Crowding:
        """Read likenesses of all items with the reference items.

        Args:
            blocks: slices of rows with their (b, R) likenesses. own: (N,) the column that is the item itself, or -1.
        """
        nearest = np.empty((items, 0), np.float16)
        hubness = np.empty((items, 2), np.float32)
        scale = 1.0
        for block, alike in blocks:
            here = own[block]
            alike[np.flatnonzero(here >= 0), here[here >= 0]] = -1.0
            kept = min(_NEAREST, alike.shape[1])
            if not nearest.shape[1]:
                nearest = np.empty((items, kept), np.float16)
                scale = items / alike.shape[1]
            top = np.sort(np.partition(alike, alike.shape[1] - kept, axis=1)[:, -kept:], axis=1)
            nearest[block] = top
            hubness[block, 0] = top[:, -10:].mean(axis=1)
            hubness[block, 1] = _TEMPERATURE * np.log(np.exp(alike / _TEMPERATURE).mean(axis=1))
        return cls(nearest, hubness, scale)

    def reverse_ranks(self, alike: Floats, rows: NDArray[np.int64]) -> Floats:
        """Return ln(1 + place) of the context's items in each row's own list of neighbours: (S, C) -> (S, C)."""
        closer = (self.nearest[rows].astype(np.float32)[None] > alike[:, :, None] + 1e-3).sum(axis=2)
        return np.asarray(np.log1p(closer * self.scale), np.float32)


@dataclass(frozen=True, eq=False)
class TextViews:
    """All that a text ranker reads of a catalogue.

    Attributes:
        postings: (T', N) CSR, by term the targets of the sparse views that candidates are sought with.
        sparse: views told pair by pair. dense: per name (N, D) vectors of length 1; "joint" is sought with as well.
        words: (N, T) which words a title has. rarity: (T,) of each, ln(N / items with it). terms: the words.
        shared: (N,) depth of the category path, 0 for none.
        items: (N, I) what is said of an item by itself. item_names: of these columns.
        crowding: per view that is looked at from the other side.
    """

    postings: Csr
    sparse: SparseViews
    dense: dict[str, Floats]
    words: Csr
    rarity: Floats
    terms: tuple[str, ...]
    depth: Floats
    items: Floats
    item_names: tuple[str, ...]
    crowding: dict[str, Crowding]

    @property
    def scans(self) -> tuple[str, ...]:
        """Names of the sparse views that candidates are sought with, the first of all."""
        return self.sparse.names[:_SCANNED]

    def compare(self, context: NDArray[np.int64], rows: NDArray[np.int64]) -> dict[str, Floats]:
        """Return how alike each view finds items, (S,) and (C,) rows of the catalogue: per name (S, C).

        The sparse views, "kinship" (the share of their category paths that is one), and the dense ones.
        """
        alike: dict[str, Floats] = dict(zip(self.sparse.names, self.sparse.pairs(context, rows), strict=True))
        steps = self.depth[context][:, None] + self.depth[rows][None, :]
        alike["kinship"] = 2 * alike["category path"] / np.maximum(steps, 1)
        for name, vectors in self.dense.items():
            alike[name] = vectors[context] @ vectors[rows].T
        return alike

    @classmethod
    def of(
        cls, catalog: Catalog, text: str, frozen: Floats | None, described: Floats | None = None,
        pictures: Floats | None = None,
    ) -> TextViews:  # fmt: skip
        """Read a catalogue.

        Args:
            text: template of an item's text. frozen: (N, D) vectors of the encoder without adapter.
            described: (N, D) the same of the texts with their category path.
            pictures: (N, W) of items' pictures, 0 without one; one more dense view.
        """
        texts = catalog.split_words(catalog.texts(text))
        with_category = catalog.split_words(catalog.texts(text + " {category}"))
        fitted = Tfidf.fit(texts)
        words, said = fitted.vectors(texts), Tfidf.fit(with_category).vectors(with_category)
        pieces, okapi = _word_pieces(texts), _okapi(texts)
        leaves = catalog.leaf_numbers if catalog.leaf_numbers is not None else np.full(len(texts), -1)
        kind, across = _part_by_kind(words, leaves)
        digits = np.array([any(char.isdigit() for char in term) for term in fitted.terms], bool)
        tokens = [_WORD.findall(one.lower()) for one in texts]
        brand = _one_hot([own[0] if own else "" for own in tokens])
        makers = np.asarray(brand.sum(axis=0)).ravel()
        paths = _one_hot_paths(catalog)
        dense = _dense_views(said, frozen, described, pictures)
        maker, kind_of_leaf = (
            _one_hot([" ".join(own[:2]) for own in tokens]),
            _one_hot([str(leaf) if leaf >= 0 else "" for leaf in leaves]),
        )
        called = _one_hot([path[-1] if path else "" for path in catalog.categories])
        views: list[tuple[str, Csr, Csr]] = [
            ("words", words, words),
            ("words and category", said, said),
            ("word pieces", pieces, pieces),
            ("BM25", okapi[0], okapi[1]),
            ("words of a kind", kind, kind),
            ("words across kinds", across, across),
            ("words with digits", _keep_terms(words, digits), words),
            ("first word", brand, sparse.csr_array(brand / np.log2(1 + np.maximum(makers, 1))[None, :])),
            ("first two words", maker, maker),
            ("leaf", kind_of_leaf, kind_of_leaf),
            ("leaf's name", called, called),
            ("category path", paths, paths),
        ]
        count = np.asarray((words > 0).sum(axis=0)).ravel()
        depth = np.array([len(path) for path in catalog.categories], np.float32)
        of_leaf = np.bincount(leaves + 1, minlength=1)[leaves + 1]
        items = np.stack(
            [
                np.array([len(own) for own in tokens], np.float32),
                np.log(np.maximum(makers, 1))[brand.indices] if brand.nnz == len(texts) else np.zeros(len(texts)),
                np.log(of_leaf),
                depth,
            ],
            axis=1,
        ).astype(np.float32)
        crowding = {"words": _crowd_sparse(words), "joint": _crowd_dense(dense["joint"])}
        joined = SparseViews.build(views)
        postings = _transpose(joined.target[:, : joined.ends[_SCANNED - 1]])
        rarity = np.log(len(texts) / np.maximum(count, 1)).astype(np.float32)
        return cls(
            postings, joined, dense, words, rarity, fitted.terms, depth, items, _ITEM_COLUMNS, crowding
        )  # fmt: skip


def _dense_views(
    said: Csr, frozen: Floats | None, described: Floats | None, pictures: Floats | None
) -> dict[str, Floats]:
    from sklearn.decomposition import TruncatedSVD

    size = min(_LATENT, min(said.shape) - 1)
    found: dict[str, Floats] = {}
    if size > 0:
        latent = TruncatedSVD(size, random_state=0).fit_transform(said)
        found["latent words"] = dense(unit_rows(np.asarray(latent, np.float32)))
    if frozen is not None:
        found["encoder"] = half_whiten(frozen)
    if described is not None:
        found["encoder with category"] = half_whiten(described)
    if pictures is not None:
        found["pictures"] = pictures
    found["joint"] = _join(list(found.values()) or [np.zeros((said.shape[0], 1), np.float32)])
    return found


def _join(parts: Sequence[Floats]) -> Floats:
    """Return the first principal components of vectors side by side, rows of length 1, without a copy of them all."""
    items = len(parts[0])
    centres = [part.mean(axis=0) for part in parts]
    size = sum(part.shape[1] for part in parts)
    product = np.zeros((size, size))
    for block in row_blocks(items, size):
        beside = np.hstack([part[block] - centre for part, centre in zip(parts, centres, strict=True)])
        product += multiply_self(beside)
    axes = np.linalg.eigh(product)[1][:, ::-1][:, :_JOINT].astype(np.float32)
    joint = np.zeros((items, axes.shape[1]), np.float32)
    place = 0
    for part, centre in zip(parts, centres, strict=True):
        own = axes[place : place + part.shape[1]]
        joint += part @ own - centre @ own
        place += part.shape[1]
    return dense(unit_rows(joint))


def _word_pieces(texts: Sequence[str]) -> Csr:
    from sklearn.feature_extraction.text import TfidfVectorizer

    shortest = 2 if 2 * count_unspaced(texts) > len(texts) else 3  # a word of Chinese has two characters
    try:
        made = TfidfVectorizer(
            analyzer="char_wb", ngram_range=(shortest, 5), min_df=2, sublinear_tf=True, dtype=np.float32
        ).fit_transform(texts)
    except ValueError:  # no piece occurs twice
        return _empty(len(texts))
    return cast(Csr, sparse.csr_array(made))


def _empty(rows: int) -> Csr:
    return cast(Csr, sparse.csr_array((rows, 1), dtype=np.float32))


def _transpose(matrix: Csr) -> Csr:
    return cast(Csr, sparse.csr_array(matrix.T.tocsr()))


def _okapi(texts: Sequence[str]) -> tuple[Csr, Csr]:
    """Return the words of each text, over its BM25 with itself, and the BM25 weights of each text's words."""
    from sklearn.feature_extraction.text import CountVectorizer

    try:
        counts = sparse.csr_array(CountVectorizer(token_pattern=r"\w+", dtype=np.float32).fit_transform(texts))
    except ValueError:  # no text has a word
        return _empty(len(texts)), _empty(len(texts))
    frequency = np.bincount(counts.indices, minlength=counts.shape[1])
    rarity = np.log1p((len(texts) - frequency + 0.5) / (frequency + 0.5))
    lengths = np.asarray(counts.sum(axis=1)).ravel()
    norm = _K1 * (1 - _B + _B * lengths / max(lengths.mean(), 1e-9))
    rows = np.repeat(np.arange(len(texts)), np.diff(counts.indptr))
    weights = rarity[counts.indices] * counts.data * (_K1 + 1) / (counts.data + norm[rows])
    itself = np.bincount(rows, weights=weights, minlength=len(texts))
    asked = 1 / np.maximum(itself, 1e-9)[rows]

    def with_data(data: NDArray[Any]) -> Csr:
        return sparse.csr_array((data.astype(np.float32), counts.indices, counts.indptr), counts.shape)

    return with_data(asked), with_data(weights)


def _part_by_kind(words: Csr, leaves: NDArray[Any]) -> tuple[Csr, Csr]:
    """Part words into those that name a kind of thing (few leaves) and those that run across kinds: brands, colours."""
    by_leaf = _one_hot([str(leaf) for leaf in leaves])
    counts: Any = sparse.csr_array(_transpose(binary(words)) @ by_leaf)  # (T, L)
    total = np.asarray(counts.sum(axis=1)).ravel()
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    share = counts.data / total[rows]
    entropy = np.bincount(rows, weights=-share * np.log(share), minlength=counts.shape[0])
    spread = np.where(total > 1, entropy / np.log(np.maximum(total, 2)), 0.0)
    return _keep_terms(words, spread <= _KIND), _keep_terms(words, spread > _KIND)


def _keep_terms(matrix: Csr, columns: NDArray[np.bool_]) -> Csr:
    kept = columns[matrix.indices]
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))[kept]
    return sparse.csr_array((matrix.data[kept], (rows, matrix.indices[kept])), matrix.shape)


def _one_hot(names: Sequence[str]) -> Csr:
    """Return (N, names) with a 1 for each row's name; an empty name has none."""
    places: dict[str, int] = {}
    rows = [row for row, name in enumerate(names) if name]
    columns = [places.setdefault(name, len(places)) for name in names if name]
    return sparse.csr_array((np.ones(len(rows), np.float32), (rows, columns)), (len(names), max(1, len(places))))


def _one_hot_paths(catalog: Catalog) -> Csr:
    """Return (N, steps) with a 1 for each step of an item's category path, told by the whole path down to it."""
    places: dict[tuple[str, ...], int] = {}
    cells = [
        (row, places.setdefault(path[:end], len(places)))
        for row, path in enumerate(catalog.categories)
        for end in range(1, len(path) + 1)
    ]
    rows, columns = zip(*cells, strict=True) if cells else ((), ())
    shape = (len(catalog.categories), max(1, len(places)))
    return sparse.csr_array((np.ones(len(rows), np.float32), (rows, columns)), shape)


def _references(items: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the items that neighbours are sought among, and per item its place there or -1."""
    chosen = np.arange(items)
    if items > 2 * _REFERENCES:
        chosen = np.sort(np.random.default_rng(0).choice(items, _REFERENCES, replace=False))
    own = np.full(items, -1)
    own[chosen] = np.arange(len(chosen))
    return chosen, own


def _crowd_sparse(vectors: Csr) -> Crowding:
    chosen, own = _references(vectors.shape[0])
    others = _transpose(vectors[chosen])
    blocks = ((block, (vectors[block] @ others).toarray()) for block in row_blocks(vectors.shape[0], len(chosen)))
    return Crowding.measure(blocks, vectors.shape[0], own)


def _crowd_dense(vectors: Floats) -> Crowding:
    chosen, own = _references(len(vectors))
    blocks = ((block, vectors[block] @ vectors[chosen].T) for block in row_blocks(len(vectors), len(chosen)))
    return Crowding.measure(blocks, len(vectors), own)
