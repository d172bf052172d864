"""TF-IDF vectors, and cosine similarity of the context with every item.

Owns TF-IDF weighting and the cosine between a context and every item. The vectors may as well come from an
encoder: `TextCosine` does not ask.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.machine import row_blocks
from peft_combo.scoring.base import (
    Csr,
    HistoryScorer,
    Learned,
    Vectors,
    binary,
    dense,
    mask_missing,
    stack,
    support_of,
    unit_rows,
)

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Tfidf:
    """TF-IDF over words and, if wanted, runs of words, fitted on one set of texts and usable on another.

    weight = tf * (ln((1 + n) / (1 + df)) + 1), rows scaled to length 1; tf is the count, or 1 + ln(count) if sublinear.
    On titles single words rank best alone, pairs help some models.

    Attributes:
        terms: the vocabulary in column order, sorted; words of a run have one space between.
    Source: Salton and Buckley 1988; scikit-learn's TfidfVectorizer, whose smoothed idf keeps a term that is in every
        text at weight 1.
    """

    terms: tuple[str, ...]
    _vectorizer: Any

    @classmethod
    def fit(cls, texts: Iterable[str], longest: int = 1, sublinear: bool = False) -> Self:
        """Collect the terms of the texts: words, and runs of up to `longest` of them.

        Raises:
            ValueError: `longest` is below 1.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer

        if longest < 1:
            raise ValueError(f"longest must be >= 1, found {longest}.")
        vectorizer = TfidfVectorizer(
            token_pattern=r"\w+", ngram_range=(1, longest), sublinear_tf=sublinear, dtype=np.float32
        )
        known = list(texts)
        if not any(_WORD.search(text) for text in known):  # scikit-learn refuses an empty vocabulary
            return cls((), None)
        vectorizer.fit(known)
        return cls(tuple(vectorizer.get_feature_names_out().tolist()), vectorizer)

    def vectors(self, texts: Sequence[str]) -> Csr:
        """Weigh the known terms of each text: (T, V) float32, rows of length 1; all zero where no term is known."""
        if self._vectorizer is None or not texts:
            return cast(Csr, sparse.csr_array((len(texts), len(self.terms)), dtype=np.float32))
        weighed: Any = self._vectorizer.transform(texts)
        return cast(Csr, sparse.csr_array(weighed))


def tfidf_vectors(texts: Sequence[str], longest: int = 1) -> Csr:
    """TF-IDF vectors of the very texts it is fitted on; see `Tfidf`.

    Returns:
        (T, V) float32 CSR, rows of length 1, terms in sorted order.
    """
    return Tfidf.fit(texts, longest).vectors(texts)


@dataclass(frozen=True)
class TextVectors(Learned):
    """Attributes:
    vectors: (N, D) rows of length 1, or 0 where an item has no text; dense or CSR.
    """

    vectors: Vectors

    @cached_property
    def has_text(self) -> NDArray[np.bool_]:
        """(N,) which items have one; kept, for it takes as long as to score them."""
        return has_vector(self.vectors)

    def cosines(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Cosine of every item with queries of length 1: (q, D) -> (q, N).

        The queries are dense even where the vectors are sparse: that reads the vectors once, as they lie in memory.
        """
        cosines: NDArray[np.float32] = dense(cast(Any, self.vectors) @ queries.T).T  # (N, D) @ (D, q) -> (N, q)
        return cosines

    def average(self, inside: Csr) -> NDArray[np.float32]:
        """The mean of the vectors of each context, scaled to length 1: (q, N) of 1 and 0 -> (q, D)."""
        # Up to a factor that the unit length undoes.
        return cast("NDArray[np.float32]", dense(unit_rows(cast(Any, inside) @ self.vectors)))


@dataclass(eq=False)
class TextCosine(HistoryScorer[TextVectors]):
    """Cosine between the context and every item, over vectors that are given.

    - ``mean``: with the mean of the context's unit vectors.
    - ``max``: the best cosine with any one item of the context.

    NaN: an item whose vector is zero; every item where that holds for the whole context. The history is kept only for
    `score_users`; an update appends to it, and takes vectors anew where there are new items.

    Attributes:
        context: as above.
    """

    context: Literal["mean", "max"] = "mean"
    _learned_type: ClassVar[type[Learned]] = TextVectors

    def __post_init__(self) -> None:
        if self.context not in ("mean", "max"):
            raise ValueError(f'context must be "mean" or "max", found {self.context!r}.')

    def _learn(self, history: Csr, items: Vectors | None, times: NDArray[np.float64] | None) -> TextVectors:
        if items is None:
            raise ValueError("TextCosine needs items, an (N, D) vector per item: fit(history, items=vectors).")
        return TextVectors(history, support_of(history), unit_rows(items))

    def _extend(
        self, known: TextVectors, rows: Csr, items: Vectors | None, times: NDArray[np.float64] | None
    ) -> TextVectors:
        if items is None and rows.shape[1] > known.history.shape[1]:
            raise ValueError("TextCosine.update with new items needs items, the vectors of all of them.")
        history = stack(known.history, rows)
        return TextVectors(history, support_of(history), known.vectors if items is None else unit_rows(items))

    def embed(self, contexts: Csr) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return what is compared with every item where `context` is ``mean``, and of which contexts it says anything.

        Args:
            contexts: (Q, N).
        Returns:
            (Q, D) of length 1, and (Q,) bool.
        Raises:
            RuntimeError: nothing was fitted yet.
        """
        known, inside = self._require_fitted("embed"), binary(contexts)
        return known.average(inside), inside @ known.has_text.astype(np.float32) > 0

    def _score(self, known: TextVectors, contexts: Csr) -> NDArray[np.float32]:
        has_text = known.has_text
        inside = binary(contexts)
        familiar = inside @ has_text.astype(np.float32) > 0
        scores = np.empty(contexts.shape, np.float32)
        if self.context == "mean":
            for block in row_blocks(contexts.shape[0], max(known.vectors.shape)):
                scores[block] = known.cosines(known.average(inside[block]))
        else:
            longest = int(np.diff(contexts.indptr).max(initial=1))
            for block in row_blocks(contexts.shape[0], contexts.shape[1] * longest):
                ends = contexts.indptr[block.start : block.stop + 1]
                chosen, own = contexts.indices[ends[0] : ends[-1]], np.flatnonzero(np.diff(ends))
                if len(own):
                    cosines = known.cosines(dense(known.vectors[chosen]))  # (C, N)
                    if not has_text[chosen].all():
                        cosines[~has_text[chosen]] = -np.inf
                    scores[block][own] = np.maximum.reduceat(cosines, ends[own] - ends[0], axis=0)
        return mask_missing(scores, familiar, has_text)


def cut_plurals(text: str) -> str:
    """Return the words of a text in lower case, a plural s cut off, with one space between: "Beach dresses" asks for a
    "beach dresse", and so does a title of dresses.

    On queries for bundles this finds more than whole words do, and no less than a stemmer of English would need a
    package for.
    """
    words = _WORD.findall(text.lower())
    return " ".join(word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words)


def has_vector(vectors: Vectors) -> NDArray[np.bool_]:
    """Tell which rows are not zero: (N,)."""
    if isinstance(vectors, sparse.csr_array):
        return np.diff(vectors.indptr) > 0
    filled: NDArray[np.bool_] = np.any(vectors != 0, axis=1)
    return filled
