"""Tagging head: BIO labels for the words of a text (token classification, named-entity recognition)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peft_combo.data.labels.tags import Entity, entities, words_of
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.base import TaskHead, rebuild_head
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.recipe.task import TaggingTask

# Texts whose states are held at once, and whose entities are remembered.
_TAGGED_AT_ONCE = 1024
_REMEMBERED = 200_000


class TaggingHead(TaskHead):
    """A linear layer over the state of a word's first piece."""

    kind = "tagging"

    def __init__(self, dim: int, tags: Sequence[str], config: TaggingTask) -> None:
        super().__init__()
        self.dim = dim
        self.tags = tuple(tags)
        self.config = config
        self.linear = nn.Linear(dim, len(self.tags))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.dropout = nn.Dropout(config.head_dropout)

    def forward(self, states: Tensor) -> Tensor:
        """Score (T, D) states: (T, number of tags) logits."""
        logits: Tensor = self.linear(self.dropout(states))
        return logits

    @torch.inference_mode()
    def probabilities(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return how likely each tag is: (T, D) -> (T, number of tags)."""
        logits = self(torch.from_numpy(states).to(self.linear.weight.device)).float()
        probabilities: NDArray[np.float32] = logits.softmax(-1).cpu().numpy()
        return probabilities

    def spec(self) -> dict[str, Any]:
        return {**self.config.model_dump(mode="json"), "dim": self.dim, "tag_set": list(self.tags)}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], weights: Mapping[str, Tensor]) -> TaggingHead:
        """Rebuild a stored head, in evaluation mode.

        Raises:
            StoreError: the weights are not those of such a head.
        """
        fields = {key: value for key, value in spec.items() if key not in ("dim", "tag_set")}
        return rebuild_head(
            lambda: cls(int(spec["dim"]), [str(tag) for tag in spec["tag_set"]], TaggingTask.model_validate(fields)),
            weights,
        )


def find_first_pieces(words: Sequence[tuple[int, int]], pieces: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Find the first piece of each word.

    Args:
        words: where each word starts and ends in the text.
        pieces: the same for each piece of the tokenizer; (0, 0) for special tokens.
    Returns:
        (W,) place of the piece, -1 for a word that has none of its own: it was cut off, the tokenizer knows no part of
        it, or it lies in the piece of the word before, as Chinese characters do in pieces of SentencePiece.
    """
    found = _cover(words, pieces)
    return np.where(find_joined(words, pieces), -1, found)


def find_joined(words: Sequence[tuple[int, int]], pieces: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Find the words that begin in the very piece that the word before begins in: (W,)."""
    found = _cover(words, pieces)
    return np.concatenate([np.zeros(min(1, len(found)), bool), (found[1:] >= 0) & (found[1:] == found[:-1])])


def _cover(words: Sequence[tuple[int, int]], pieces: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Return for each word the piece that its start lies in, or the first that begins in it; -1 for none."""
    place = 0
    found = np.full(len(words), -1, np.int64)
    for number, (start, end) in enumerate(words):
        while place < len(pieces) and (pieces[place][0] == pieces[place][1] or pieces[place][1] <= start):
            place += 1
        if place < len(pieces) and pieces[place][0] < end:
            found[number] = place
    return found


def continue_tag(tag: str) -> str:
    """Return the tag of a word that goes on with the word before: I-Shoe after B-Shoe or I-Shoe, O after O."""
    return f"I-{tag[2:]}" if tag.startswith("B-") else tag


@dataclass(frozen=True, eq=False)
class EncodedWords:
    """A new text as a tagging adapter sees it.

    Attributes:
        words: where each word starts and ends.
        likely: (W, number of tags) how likely each tag is; a word that was cut off is O for sure.
        state: (D,) mean over the words that were not; 0 where there are none.
    """

    text: str
    words: tuple[tuple[int, int], ...]
    likely: NDArray[np.float32]
    state: NDArray[np.float32]

    def entities(self, tags: Sequence[str]) -> list[Entity]:
        """Return what the likeliest tags name, in order."""
        return [
            Entity(
                kind, self.text[self.words[begin][0] : self.words[end - 1][1]], self.words[begin][0],
                self.words[end - 1][1], float(self.likely[begin:end].max(1).min()),
            )
            for kind, begin, end in entities([tags[tag] for tag in self.likely.argmax(1)])
        ]  # fmt: skip


def encode_words(
    backbone: Backbone, adapter: AttachedAdapter, head: TaggingHead, texts: Sequence[str]
) -> list[EncodedWords]:
    """Read new texts with the adapter and the head of one stored tagging adapter."""
    pieces = backbone.pieces(texts, adapter.max_length)
    states = np.split(backbone.states(texts, adapter), np.cumsum([len(own) for own in pieces])[:-1])
    read = []
    for text, own, state in zip(texts, pieces, states, strict=True):
        words = words_of(text)
        first = find_first_pieces(words, own)
        seen = state[first[first >= 0]]
        likely = np.zeros((len(words), len(head.tags)), np.float32)
        likely[:, 0] = 1.0
        likely[first >= 0] = head.probabilities(seen)
        for number in np.flatnonzero(find_joined(words, own)):
            likely[number] = _continue(likely[number - 1], head.tags)
        read.append(EncodedWords(text, words, likely, seen.sum(0) / max(1, len(seen))))
    return read


def _continue(likely: NDArray[np.float32], tags: Sequence[str]) -> NDArray[np.float32]:
    """Return how likely the tags of a word are that goes on with the word before: (number of tags,)."""
    going_on = np.zeros_like(likely)
    for place, tag in enumerate(tags):
        there = tags.index(continue_tag(tag)) if continue_tag(tag) in tags else place
        going_on[there] += likely[place]
    return going_on


def tag_texts(
    backbone: Backbone, adapter: AttachedAdapter, head: TaggingHead, texts: Sequence[str]
) -> list[list[Entity]]:
    """Find the entities of new texts.

    Args:
        adapter, head: of one stored tagging adapter.
    Returns:
        for each text its entities, in order.
    """
    return [one.entities(head.tags) for one in encode_words(backbone, adapter, head, texts)]


class AdapterTagger:
    """A stored tagging adapter as a `data.labels.tags.Tagger`; safe to share between threads.

    It remembers what it said of the texts it saw last: titles are asked about again with every query.
    """

    def __init__(self, backbone: Backbone, adapter: AttachedAdapter, head: TaggingHead) -> None:
        self._backbone, self._adapter, self._head = backbone, adapter, head
        self._known: dict[str, list[Entity]] = {}

    def __call__(self, texts: Sequence[str]) -> list[list[Entity]]:
        known = self._known
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if len(known) + len(missing) > _REMEMBERED:
            known = self._known = {}
            missing = list(dict.fromkeys(texts))
        for start in range(0, len(missing), _TAGGED_AT_ONCE):
            some = missing[start : start + _TAGGED_AT_ONCE]
            known.update(zip(some, tag_texts(self._backbone, self._adapter, self._head, some), strict=True))
        return [known[text] for text in texts]
