"""Text classification task: which class a text is of, or which classes apply to it.

Owns the head, its loss, what is measured and the baselines. Sees texts as numbers and vectors; where the labels come
from is for `data` to know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peft_combo.data.labels.texts import split_texts
from peft_combo.data.language import count_unspaced, split_characters, split_words
from peft_combo.data.model import CATEGORY_SEPARATOR
from peft_combo.data.task_data import read_labelled
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.classification import ClassificationHead, _choose_classes, _probabilities
from peft_combo.errors import DataError
from peft_combo.metrics.classification import (
    Counts,
    calibration_error,
    class_counts,
    gain_interval,
    interval,
    macro_f1,
    micro_f1,
    permute_pairs,
    precision_recall_f1,
    totals,
)
from peft_combo.metrics.report import Detail, Gain, ResultRow, ResultTable
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import ClassificationTask
from peft_combo.scoring.text import Tfidf
from peft_combo.tuning.tasks.base import Encode, Epochs, Evaluation
from peft_combo.tuning.tasks.linear import Targets, compute_linear_loss, fit_best_linear

# Where several classes may apply, validation chooses from how much on they do.
_THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
_SHOWN_CONFUSIONS = 10
_SHOWN_CLASSES = 30


@dataclass(frozen=True)
class TextBatch:
    """Some texts, and what they are to be told as."""

    items: NDArray[np.int64]
    targets: Targets


@dataclass(frozen=True)
class ClassificationPredictions:
    """What a model says of the queries: how likely each class is, and which it gives, both (Q, C)."""

    probabilities: NDArray[np.float32]
    given: NDArray[np.bool_]


class Classification:
    """The classification task as the loop sees it; see `base.Task`.

    Tuning starts from the head that is best over the frozen encoder (logistic regression), so what it is compared with
    is what a probe alone can do, and the first steps do not spoil the encoder for a random head. Source of the order:
    Kumar et al. 2022, "Fine-tuning can distort pretrained features and underperform out-of-distribution" (LP-FT).
    """

    per_token = False
    retokenized = False
    brands = None
    unit = "texts"
    protocol = (
        "Test texts, none of which (but for case and spaces) occurs in training or validation. Step, strength of "
        "regularisation and thresholds were chosen on the validation texts. Macro F1 is the mean over classes, ECE the "
        "expected calibration error over 15 bins; 95 % interval by bootstrap over texts, p by approximate "
        "randomisation."
    )

    def __init__(self, recipe: Recipe, config: ClassificationTask) -> None:
        self._config = config
        found = read_labelled(recipe.data, config)
        parts = split_texts(found.texts, recipe.data)
        notes = [*found.notes]
        counted = Counter(label for place in parts.train for label in found.labels[place])
        self._classes = sorted(label for label, count in counted.items() if count >= config.min_texts)
        if len(self._classes) < 2:
            raise DataError(
                f"A classification needs two classes with {config.min_texts} training texts each; {found.name} has "
                f"{len(self._classes)} ({len(counted):,} classes in all). Lower task.min_texts, or give more texts."
            )
        column = {label: place for place, label in enumerate(self._classes)}
        right = np.zeros((len(found.texts), len(column)), bool)
        for row, labels in enumerate(found.labels):
            right[row, [column[label] for label in labels if label in column]] = True
        if rare := len({label for labels in found.labels for label in labels}) - len(column):
            lost = int((~right.any(1)).sum())
            notes.append(
                f"{rare:,} classes with under {config.min_texts} training texts left out, {lost:,} texts with them"
            )
        self.texts = list(found.texts)
        self._language = recipe.data.language
        self._right = right
        known: NDArray[np.bool_] = np.asarray(right.any(1))
        self._train, self._valid, self._test = (part[known[part]] for part in (parts.train, parts.valid, parts.test))
        if not len(self._valid) or not len(self._test):
            raise DataError(f"{found.name} has too few texts: none of the known classes is left to validate or test.")
        self._targets, self._held = (
            Targets.of(
                right[rows], exclusive=not config.multi_label, smoothing=config.label_smoothing,
                balanced=config.class_weights == "balanced",
            )
            for rows in (self._train, self._valid)
        )  # fmt: skip
        self._epochs = Epochs(len(self._train), recipe.training.batch_size, recipe.seed)
        self.notes = notes
        self.examples = {"train": len(self._train), "valid": len(self._valid), "test": len(self._test)}
        self.data = {
            "name": found.name,
            "digest": found.digest,
            "split_digest": parts.digest,
            "texts": self.examples,
            "classes": len(self._classes),
        }

    @property
    def per_epoch(self) -> int:
        return self._epochs.per_epoch

    def head(self, backbone: Backbone, max_length: int) -> ClassificationHead:
        return ClassificationHead(backbone.dim, self._classes, self._config)

    def start(self, head: ClassificationHead, frozen: Encode) -> None:
        scale = np.float32(head.dim**0.5)
        valid = frozen(self._valid) * scale
        probe = fit_best_linear(frozen(self._train) * scale, self._targets, valid, self._held)
        with torch.no_grad():
            head.linear.weight.copy_(torch.from_numpy(probe.weight))
            head.linear.bias.copy_(torch.from_numpy(probe.bias))
        self.apply_choice(head, self._choice(_probabilities(probe.logits(valid), self.exclusive), "macro_f1")[1])

    def batch(self, step: int, part: int = 0, parts: int = 1) -> TextBatch:
        rows = self._epochs.share(step, part, parts)
        return TextBatch(self._train[rows], self._targets.take(rows))

    def logits(self, head: ClassificationHead, encoded: Tensor, batch: TextBatch) -> Tensor:
        logits: Tensor = head(encoded)
        return logits

    def loss(self, logits: Tensor, batch: TextBatch) -> Tensor:
        return compute_linear_loss(logits, batch.targets)

    def evaluate(self, head: ClassificationHead, encode: Encode, metric: str) -> Evaluation:
        values, choice = self._choice(head.probabilities(encode(self._valid)), metric)
        return Evaluation(values, choice)

    def apply_choice(self, head: ClassificationHead, choice: Mapping[str, float]) -> None:
        head.threshold.fill_(choice.get("threshold", 0.5))

    def predict(self, head: ClassificationHead, encode: Encode) -> ClassificationPredictions:
        probabilities = head.probabilities(encode(self._test))
        return ClassificationPredictions(probabilities, head.classes(probabilities))

    def table(self, before: ClassificationPredictions, after: ClassificationPredictions) -> ResultTable:
        predictions = {
            "most frequent class": self._most_frequent(),
            **{name: self._tfidf(read) for name, read in self._readings.items()},
            "frozen backbone": before,
            "tuned": after,
        }
        counts = {name: self._counts(one.given, self._test) for name, one in predictions.items()}
        rows = []
        for name, one in predictions.items():
            values = {**self._values(one.given, self._test), "ece": self._calibration(one)}
            rows.append(ResultRow(name, values, interval(counts[name], macro_f1)))
        old, new = counts["frozen backbone"], counts["tuned"]
        gain = Gain(
            rows[-1].values["macro_f1"] - rows[-2].values["macro_f1"],
            gain_interval(old, new, macro_f1),
            permute_pairs(old, new, macro_f1),
        )
        n = len(self._test)
        return ResultTable(
            "macro_f1", tuple(rows), gain, n, n,
            asked=f"the {'classes' if self._config.multi_label else 'class'} of {n:,} held-out test texts, "
            f"{len(self._classes)} classes",
            caveat=f"Step and regularisation were chosen on {len(self._valid):,} validation texts; no test text occurs "
            "in training or validation.",
            details=(*self._confusions(after), self._per_class(old, new)),
        )  # fmt: skip

    @property
    def exclusive(self) -> bool:
        return not self._config.multi_label

    def _choice(self, probabilities: NDArray[np.float32], metric: str) -> tuple[dict[str, float], dict[str, float]]:
        """Return the validation metrics, at the threshold that is best for `metric` where there is one to choose."""
        if self.exclusive:
            return self._values(_choose_classes(probabilities, True, 0.5), self._valid), {}
        tried = {t: self._values(_choose_classes(probabilities, False, t), self._valid) for t in _THRESHOLDS}
        threshold = max(tried, key=lambda one: tried[one][metric])
        return tried[threshold], {"threshold": threshold}

    def _values(self, given: NDArray[np.bool_], rows: NDArray[np.int64]) -> dict[str, float]:
        right = self._right[rows]
        sums = np.stack([(given & right).sum(0), given.sum(0), right.sum(0)], 1).astype(np.float64)  # (C, 3)
        return {
            "accuracy": float((given == right).all(1).mean()),
            "micro_f1": float(micro_f1(sums)),
            "macro_f1": float(macro_f1(sums)),
        }

    def _counts(self, given: NDArray[np.bool_], rows: NDArray[np.int64]) -> Counts:
        right = self._right[rows]
        return class_counts(
            [
                [(int(c), int(own[c] and said[c]), int(said[c]), int(own[c])) for c in np.flatnonzero(own | said)]
                for own, said in zip(right, given, strict=True)
            ],
            len(self._classes),
        )

    def _calibration(self, predictions: ClassificationPredictions) -> float:
        right = self._right[self._test]
        if not self.exclusive:  # each class is a query of its own
            return calibration_error(predictions.probabilities.ravel(), right.ravel())
        best = predictions.probabilities.argmax(1)
        return calibration_error(predictions.probabilities.max(1), right[np.arange(len(best)), best])

    def _most_frequent(self) -> ClassificationPredictions:
        """Say the same of every text: the most frequent class, with its share in training as the confidence."""
        share = self._right[self._train].mean(0).astype(np.float32)
        probabilities = np.repeat(share[None], len(self._test), axis=0)
        return ClassificationPredictions(probabilities, _choose_classes(probabilities, True, 0.5))

    @property
    def _readings(self) -> dict[str, tuple[Callable[[str], str], int]]:
        """What texts are turned into for TF-IDF, and how many terms make a run: words, and where no spaces part them
        characters too.
        """
        own: dict[str, tuple[Callable[[str], str], int]] = {
            "TF-IDF + logistic regression": (partial(split_words, language=self._language), 2)
        }
        if 2 * count_unspaced(self.texts, self._language) > len(self.texts):
            own["TF-IDF of characters + logistic regression"] = (split_characters, 1)
        return own

    def _tfidf(self, reading: tuple[Callable[[str], str], int]) -> ClassificationPredictions:
        read, longest = reading
        train, valid, test = (
            [read(self.texts[row]) for row in rows] for rows in (self._train, self._valid, self._test)
        )
        words = Tfidf.fit(train, longest=longest, sublinear=True)
        features = words.vectors(valid)
        model = fit_best_linear(words.vectors(train), self._targets, features, self._held)
        _, choice = self._choice(_probabilities(model.logits(features), self.exclusive), "macro_f1")
        probabilities = _probabilities(model.logits(words.vectors(test)), self.exclusive)
        return ClassificationPredictions(
            probabilities, _choose_classes(probabilities, self.exclusive, choice.get("threshold", 0.5))
        )

    def _confusions(self, predictions: ClassificationPredictions) -> tuple[Detail, ...]:
        if not self.exclusive:
            return ()
        right, said = self._right[self._test].argmax(1), predictions.given.argmax(1)
        pairs = Counter((int(r), int(s)) for r, s in zip(right, said, strict=True) if r != s)
        of = Counter(right.tolist())
        names = _shorten_classes(self._classes)
        rows = tuple((names[r], names[s], count, of[r]) for (r, s), count in pairs.most_common(_SHOWN_CONFUSIONS))
        if not rows:
            return ()
        return (Detail("What the tuned encoder confuses most", ("is", "taken for", "times", "of"), rows),)

    def _per_class(self, old: Counts, new: Counts) -> Detail:
        before, after = totals(old), totals(new)
        precision, recall, f1 = precision_recall_f1(after)
        order = np.argsort(-after[:, 2], kind="stable")[:_SHOWN_CLASSES]
        more = len(self._classes) - len(order)
        names = _shorten_classes(self._classes)
        return Detail(
            "Class by class" + (f", the {len(order)} most frequent of {len(self._classes)}" if more else ""),
            ("", "texts", "F1 before", "F1", "precision", "recall"),
            tuple(
                (names[c], int(after[c, 2]), float(precision_recall_f1(before)[2][c]), float(f1[c]),
                 float(precision[c]), float(recall[c]))
                for c in order
            ),
        )  # fmt: skip


def read_test_texts(recipe: Recipe) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the test texts of a recipe, which no adapter of it learned from, and the labels of each.

    Raises:
        DataError: the recipe is for another task, or its data cannot be read.
    """
    if not isinstance(recipe.task, ClassificationTask):
        raise DataError(f"Expected an adapter of a classification task, found one of task.kind: {recipe.task.kind}.")
    found = read_labelled(recipe.data, recipe.task)
    rows = split_texts(found.texts, recipe.data).test.tolist()
    return [found.texts[row] for row in rows], [found.labels[row] for row in rows]


def _shorten_classes(classes: Sequence[str]) -> list[str]:
    """Drop the part of the category path that all classes share."""
    paths = [name.split(CATEGORY_SEPARATOR) for name in classes]
    while all(len(path) > 1 and path[0] == paths[0][0] for path in paths):
        paths = [path[1:] for path in paths]
    return [CATEGORY_SEPARATOR.join(path) for path in paths]
