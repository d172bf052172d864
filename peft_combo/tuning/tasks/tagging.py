"""Named-entity recognition task: which words of a text name something, and what.

Owns the head, the alignment of words with word pieces, entity-level measures, the baselines, and tagging new texts.
Where the tags come from is for `data.labels.tags` to know.

A word speaks through its first piece: that piece alone has a label, and its answer is the word's. Pieces further on and
special tokens have none, and there is no padding here to be taken for O: states come without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from peft_combo.data.labels.tags import OUTSIDE, TaggedText, entities
from peft_combo.data.labels.texts import split_texts
from peft_combo.data.task_data import read_tagged
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.tagging import TaggingHead, continue_tag, find_first_pieces, find_joined
from peft_combo.errors import DataError
from peft_combo.metrics.classification import (
    Counts,
    class_counts,
    f1_values,
    gain_interval,
    interval,
    micro_f1,
    permute_pairs,
    precision_recall_f1,
    totals,
)
from peft_combo.metrics.report import Detail, Gain, ResultRow, ResultTable
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import TaggingTask
from peft_combo.tuning.tasks.base import Encode, Epochs, Evaluation
from peft_combo.tuning.tasks.linear import Targets, compute_linear_loss, fit_best_linear

Tags = tuple[str, ...]


@dataclass(frozen=True)
class TagBatch:
    """Some texts, the places of the pieces that speak for a word among all their pieces, and those words' tags."""

    items: NDArray[np.int64]
    pieces: NDArray[np.int64]
    targets: Targets


class Tagging:
    """The tagging task as the loop sees it; see `base.Task`.

    Tuning starts from the head that is best over the frozen encoder, as in `classification`.
    """

    per_token = True
    retokenized = False
    brands = None
    exclusive = True
    unit = "texts"
    protocol = (
        "Test texts, none of which (but for case and spaces) occurs in training or validation. An entity counts where "
        "type, first and last word are all right; a tag I without a beginning begins one (CoNLL-2000). Step and "
        "regularisation were chosen on the validation texts; 95 % interval by bootstrap over texts, p by approximate "
        "randomisation."
    )

    def __init__(self, recipe: Recipe, config: TaggingTask) -> None:
        self._config = config
        found = read_tagged(recipe.data, config)
        self._texts = found.texts
        self.texts = [one.text for one in found.texts]
        parts = split_texts(self.texts, recipe.data)
        self._train, self._valid, self._test = parts.train, parts.valid, parts.test
        seen = Counter(kind for row in parts.train for kind, _, _ in entities(found.texts[row].tags))
        if not seen:
            raise DataError(f"The {len(parts.train):,} training texts of {found.name} name no entity.")
        self._types = sorted(seen)
        self._tags = (OUTSIDE, *(f"{prefix}-{kind}" for kind in self._types for prefix in "BI"))
        self._column = {tag: place for place, tag in enumerate(self._tags)}
        self._epochs = Epochs(len(parts.train), recipe.training.batch_size, recipe.seed)
        self._first: list[NDArray[np.int64]] = []
        self._joined: list[NDArray[np.bool_]] = []
        self._sizes = np.empty(0, np.int64)
        unseen = sorted({kind for one in found.texts for kind, _, _ in entities(one.tags)} - set(seen))
        self.notes = [*found.notes, *([f"no training text names: {', '.join(unseen)}"] if unseen else [])]
        self.examples = {"train": len(self._train), "valid": len(self._valid), "test": len(self._test)}
        self.data = {
            "name": found.name,
            "digest": found.digest,
            "split_digest": parts.digest,
            "texts": self.examples,
            "entities": dict(sorted(seen.items())),
        }

    @property
    def per_epoch(self) -> int:
        return self._epochs.per_epoch

    def head(self, backbone: Backbone, max_length: int) -> TaggingHead:
        pieces = backbone.pieces(self.texts, max_length)
        self._first = [find_first_pieces(one.words, own) for one, own in zip(self._texts, pieces, strict=True)]
        self._joined = [find_joined(one.words, own) for one, own in zip(self._texts, pieces, strict=True)]
        self._sizes = np.array([len(own) for own in pieces], np.int64)
        return TaggingHead(backbone.dim, self._tags, self._config)

    def start(self, head: TaggingHead, frozen: Encode) -> None:
        batch = self._batch(self._train)
        held = self._batch(self._valid)
        probe = fit_best_linear(
            frozen(self._train)[batch.pieces], batch.targets, frozen(self._valid)[held.pieces], held.targets
        )
        with torch.no_grad():
            head.linear.weight.copy_(torch.from_numpy(probe.weight))
            head.linear.bias.copy_(torch.from_numpy(probe.bias))

    def batch(self, step: int, part: int = 0, parts: int = 1) -> TagBatch:
        return self._batch(self._train[self._epochs.share(step, part, parts)])

    def logits(self, head: TaggingHead, encoded: Tensor, batch: TagBatch) -> Tensor:
        logits: Tensor = head(encoded[torch.from_numpy(batch.pieces).to(encoded.device)])
        return logits

    def loss(self, logits: Tensor, batch: TagBatch) -> Tensor:
        return compute_linear_loss(logits, batch.targets)

    def evaluate(self, head: TaggingHead, encode: Encode, metric: str) -> Evaluation:
        return Evaluation(
            _values([self._texts[row].tags for row in self._valid], self._predict(head, encode, self._valid))
        )

    def apply_choice(self, head: TaggingHead, choice: Mapping[str, float]) -> None:
        pass

    def predict(self, head: TaggingHead, encode: Encode) -> list[Tags]:
        return self._predict(head, encode, self._test)

    def table(self, before: list[Tags], after: list[Tags]) -> ResultTable:
        train, test = [self._texts[row] for row in self._train], [self._texts[row] for row in self._test]
        valid = [self._texts[row] for row in self._valid]
        gold = [one.tags for one in test]
        predictions = {
            "dictionary of the training entities": Dictionary.of(train).tag(test),
            "words around + logistic regression": _tag_by_window(train, valid, test, self._column),
            "frozen backbone": before,
            "tuned": after,
        }
        types = sorted({*self._types, *(kind for tags in gold for kind, _, _ in entities(tags))})
        counts = {name: count_entities(gold, said, types) for name, said in predictions.items()}
        rows = tuple(ResultRow(name, f1_values(totals(own)), interval(own, micro_f1)) for name, own in counts.items())
        old, new = counts["frozen backbone"], counts["tuned"]
        gain = Gain(
            rows[-1].values["f1"] - rows[-2].values["f1"],
            gain_interval(old, new, micro_f1),
            permute_pairs(old, new, micro_f1),
        )
        n = len(test)
        wanted = sum(len(entities(tags)) for tags in gold)
        details = [_per_type(types, totals(old), totals(new))]
        if fresh := _unseen(train, test):
            rows_of = tuple(
                (name, sum(entity in set(entities(said[place])) for place, entity in fresh) / len(fresh), len(fresh))
                for name, said in predictions.items()
            )
            details.append(Detail("Entities whose words name none in training", ("", "recall", "entities"), rows_of))
        return ResultTable(
            "f1", rows, gain, n, n,
            asked=f"the {wanted:,} entities of {n:,} held-out test texts ({', '.join(types)}), whole entities only",
            caveat=f"Step and regularisation were chosen on {len(valid):,} validation texts; no test text occurs in "
            "training or validation."
            + (" The tags come from a rule, so this is agreement with it." if self._config.tags == "slots" else ""),
            details=tuple(details),
        )  # fmt: skip

    def _batch(self, rows: NDArray[np.int64]) -> TagBatch:
        sizes = self._sizes[rows]
        starts = np.cumsum(sizes) - sizes
        pieces: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        wanted: list[int] = []
        for row, start in zip(rows, starts, strict=True):
            there = self._first[row] >= 0
            pieces.append(start + self._first[row][there])
            own = np.array([self._column.get(tag, 0) for tag in self._texts[row].tags], np.int64)
            wanted += own[there].tolist()
        right = np.array(wanted, np.int64)[:, None] == np.arange(len(self._tags))
        return TagBatch(rows, np.concatenate(pieces), Targets.of(right, exclusive=True))

    def _predict(self, head: TaggingHead, encode: Encode, rows: NDArray[np.int64]) -> list[Tags]:
        said = head.probabilities(encode(rows)[self._batch(rows).pieces]).argmax(1)
        return self._words(rows, said)

    def _words(self, rows: NDArray[np.int64], said: NDArray[np.int64]) -> list[Tags]:
        """Give each word of some texts its tag; a word without a piece was not seen, and says O."""
        place = 0
        predictions = []
        for row in rows:
            there = self._first[row] >= 0
            tags = np.zeros(len(there), np.int64)
            tags[there] = said[place : place + int(there.sum())]
            place += int(there.sum())
            names = [self._tags[tag] for tag in tags]
            for number in np.flatnonzero(self._joined[row]):
                names[number] = continue_tag(names[number - 1])
            predictions.append(tuple(names))
        return predictions


def count_entities(gold: Sequence[Tags], said: Sequence[Tags], types: Sequence[str]) -> Counts:
    """Count entities text by text: right where type, first and last word are, given, and wanted."""
    column = {kind: place for place, kind in enumerate(types)}
    predictions = []
    for wanted, given in zip(gold, said, strict=True):
        own, other = set(entities(wanted)), set(entities(given))
        predictions.append(
            [
                (column[kind], sum(e[0] == kind for e in own & other), sum(e[0] == kind for e in other),
                 sum(e[0] == kind for e in own))
                for kind in sorted({e[0] for e in own | other} & set(column))
            ]
        )  # fmt: skip
    return class_counts(predictions, len(types))


def _values(gold: Sequence[Tags], said: Sequence[Tags]) -> dict[str, float]:
    types = sorted({kind for tags in (*gold, *said) for kind, _, _ in entities(tags)})
    if not types:
        return dict.fromkeys(TaggingTask.metrics, 0.0)
    return f1_values(totals(count_entities(gold, said, types)))


def _per_type(types: Sequence[str], before: NDArray[np.float64], after: NDArray[np.float64]) -> Detail:
    precision, recall, f1 = precision_recall_f1(after)
    old = precision_recall_f1(before)[2]
    return Detail(
        "Type by type",
        ("", "entities", "F1 before", "F1", "precision", "recall"),
        tuple(
            (kind, int(after[k, 2]), float(old[k]), float(f1[k]), float(precision[k]), float(recall[k]))
            for k, kind in enumerate(types)
        ),
    )


def _unseen(train: Iterable[TaggedText], test: Sequence[TaggedText]) -> list[tuple[int, tuple[str, int, int]]]:
    """Return the test entities (text, entity) whose words together name no entity of training."""
    known = {words for one in train for words, _ in _list_entities(one)}
    return [
        (place, entity) for place, one in enumerate(test) for words, entity in _list_entities(one) if words not in known
    ]


def _list_entities(one: TaggedText) -> list[tuple[Tags, tuple[str, int, int]]]:
    words = tuple(token.casefold() for token in one.tokens)
    return [(words[entity[1] : entity[2]], entity) for entity in entities(one.tags)]


@dataclass(frozen=True)
class Dictionary:
    """Tags what was an entity in training, wherever its words stand: the longest entry first.

    Attributes:
        types: words of an entity -> its type; those that are an entity at least every second time they occur.
        longest: words in the longest entry.
    """

    types: Mapping[Tags, str]
    longest: int

    @classmethod
    def of(cls, texts: Sequence[TaggedText]) -> Dictionary:
        """Collect the entities of some texts."""
        named: dict[Tags, Counter[str]] = {}
        for one in texts:
            for words, (kind, _, _) in _list_entities(one):
                named.setdefault(words, Counter())[kind] += 1
        longest = max((len(words) for words in named), default=0)
        occurs: Counter[Tags] = Counter()
        for one in texts:
            words = tuple(token.casefold() for token in one.tokens)
            for size in range(1, longest + 1):
                occurs.update(run for at in range(len(words) - size + 1) if (run := words[at : at + size]) in named)
        types = {
            words: min(kinds, key=lambda kind: (-kinds[kind], kind))
            for words, kinds in named.items()
            if 2 * max(kinds.values()) >= occurs[words]
        }
        return cls(types, longest)

    def tag(self, texts: Sequence[TaggedText]) -> list[Tags]:
        """Tag the words of some texts."""
        return [self._tag(tuple(token.casefold() for token in one.tokens)) for one in texts]

    def _tag(self, words: Tags) -> Tags:
        tags = [OUTSIDE] * len(words)
        at = 0
        while at < len(words):
            for size in range(min(self.longest, len(words) - at), 0, -1):
                kind = self.types.get(words[at : at + size])
                if kind is not None:
                    tags[at : at + size] = [f"B-{kind}", *[f"I-{kind}"] * (size - 1)]
                    at += size
                    break
            else:
                at += 1
        return tuple(tags)


def _tag_by_window(
    train: Sequence[TaggedText], valid: Sequence[TaggedText], test: Sequence[TaggedText], column: Mapping[str, int]
) -> list[Tags]:
    """Tag each word by itself, its ending and its shape, and the two words on either side."""
    vocabulary: dict[str, int] = {}
    for one in train:
        for features in extract_word_features(one):
            for feature in features:
                vocabulary.setdefault(feature, len(vocabulary))
    model = fit_best_linear(
        _one_hot(train, vocabulary), _word_targets(train, column), _one_hot(valid, vocabulary),
        _word_targets(valid, column),
    )  # fmt: skip
    return _by_text(test, model.logits(_one_hot(test, vocabulary)).argmax(1), tuple(column))


def _word_targets(texts: Sequence[TaggedText], column: Mapping[str, int]) -> Targets:
    wanted = [column.get(tag, 0) for one in texts for tag in one.tags]
    return Targets.of(np.array(wanted)[:, None] == np.arange(len(column)), exclusive=True)


def extract_word_features(one: TaggedText) -> list[list[str]]:
    """Describe each word by itself, its ending and its shape, and the two words on either side."""
    words = ["<2", "<1", *(token.casefold() for token in one.tokens), ">1", ">2"]
    return [
        [
            *(f"{offset}={words[at + offset]}" for offset in (-2, -1, 0, 1, 2)),
            f"-1,0={words[at - 1]} {words[at]}", f"0,1={words[at]} {words[at + 1]}",
            f"ends={words[at][-3:]}", f"begins={words[at][:3]}",
            f"shape={token[:1].isupper():d}{token.isupper():d}{any(c.isdigit() for c in token):d}{'-' in token:d}",
        ]
        for at, token in enumerate(one.tokens, start=2)
    ]  # fmt: skip


def _one_hot(texts: Sequence[TaggedText], vocabulary: Mapping[str, int]) -> Any:
    indptr, indices = [0], []
    for one in texts:
        for features in extract_word_features(one):
            indices += [place for feature in features if (place := vocabulary.get(feature)) is not None]
            indptr.append(len(indices))
    return sparse.csr_array(
        (np.ones(len(indices), np.float32), np.array(indices, np.int64), np.array(indptr, np.int64)),
        shape=(len(indptr) - 1, len(vocabulary)),
    )


def _by_text(texts: Sequence[TaggedText], said: NDArray[np.int64], tags: Sequence[str]) -> list[Tags]:
    edges = np.cumsum([len(one.words) for one in texts])[:-1]
    return [tuple(tags[tag] for tag in own) for own in np.split(said, edges)]
