"""The encoder by itself: embeddings, tags, classes, answer templates and ratings of an adapter.

Owns what heads say of texts that are sent. Knows adapters by reference; nothing of releases' recommenders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.labels.tags import noun_entities
from peft_combo.data.model import Dataset
from peft_combo.encoder.bank import AdapterBank, LiveAdapter
from peft_combo.encoder.heads.classification import ClassificationHead
from peft_combo.encoder.heads.rating import RatingHead
from peft_combo.encoder.heads.tagging import AdapterTagger, TaggingHead
from peft_combo.encoder.vectors import VectorCache
from peft_combo.recommender.rating import Rater, rate
from peft_combo.recommender.text_search import select_largest
from peft_combo.serving.batching import EncodeBatcher
from peft_combo.serving.errors import BadRequest
from peft_combo.serving.recent import Recent

_KEPT = 4  # taggers and raters kept, by adapter


class TextTasks:
    """What adapters say of texts, through the batcher where the vector of a text is all that is needed."""

    def __init__(self, bank: AdapterBank, batcher: EncodeBatcher, dataset: Dataset, cache: VectorCache) -> None:
        self._bank, self._batcher, self._dataset, self._cache = bank, batcher, dataset, cache
        self._made: Recent[str, Any] = Recent(_KEPT)

    def embed(self, texts: Sequence[str], adapter: LiveAdapter | None) -> NDArray[np.float32]:
        """Return unit vectors (B, D)."""
        _check_texts(texts)
        return self._batcher.encode(texts, adapter)

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Return how many tokens texts have, special ones included."""
        return int(np.sum(self._bank.backbone.tokenize(list(texts)).lengths))

    def tag(self, texts: Sequence[str], adapter: LiveAdapter | None) -> list[list[dict[str, Any]]]:
        """Return the entities of each text; without an adapter by a list of fashion nouns."""
        _check_texts(texts)
        if adapter is None:
            found = noun_entities(texts)
        else:
            head = adapter.head_as(TaggingHead)
            tagger = self._made.get_or_make(
                adapter.digest, lambda: AdapterTagger(self._bank.backbone, adapter.attached, head)
            )
            found = tagger(texts)
        return [[asdict(one) for one in own] for own in found]

    def classify(self, texts: Sequence[str], adapter: LiveAdapter) -> list[list[dict[str, Any]]]:
        """Return for each text every label with its probability, likeliest first; `chosen` says which are given."""
        _check_texts(texts)
        head = adapter.head_as(ClassificationHead)
        likely = head.probabilities(self._batcher.encode(texts, adapter))
        given = head.classes(likely)
        return [
            sorted(
                (
                    {"label": label, "score": float(score), "chosen": bool(chosen)}
                    for label, score, chosen in zip(head.labels, scores, own, strict=True)
                ),
                key=lambda one: -float(one["score"]),
            )
            for scores, own in zip(likely, given, strict=True)
        ]

    def match(self, text: str, templates: Sequence[str], adapter: LiveAdapter | None, k: int) -> list[dict[str, Any]]:
        """Return the templates most like a text, by cosine."""
        _check_texts([text, *templates])
        if not templates:
            raise BadRequest("templates: expected answer templates, found none.")
        vectors = self._batcher.encode([text, *templates], adapter)
        scores = vectors[1:] @ vectors[0]
        return [
            {"index": int(place), "template": templates[place], "score": float(scores[place])}
            for place in select_largest(scores, k)
        ]

    def rate(
        self, adapter: LiveAdapter, user: str | None, liked: Sequence[str], items: Sequence[str], k: int
    ) -> list[dict[str, Any]]:
        """Return how likely somebody is to take items of the dataset."""
        head = adapter.head_as(RatingHead)

        def make() -> Rater:
            vectors = self._cache.vectors(self._bank, self._dataset.texts, adapter.reference)
            return Rater.of(vectors, head, self._dataset.interactions)

        rater = self._made.get_or_make(adapter.digest, make)
        return [asdict(one) for one in rate(rater, self._dataset, liked=liked, user=user, items=items, k=k)]


def _check_texts(texts: Sequence[str]) -> None:
    if not texts:
        raise BadRequest("Expected texts, found none.")
    for place, text in enumerate(texts):
        if not text.strip():
            raise BadRequest(f"Text {place}: expected words, found none.")
