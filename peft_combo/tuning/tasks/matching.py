"""Matching task: which answer template a question is to be answered with.

Owns the batches, the contrastive loss and what is measured. Questions and answers are encoded alike; where they come
from is for `data` to know.

Source of the loss: van den Oord et al. 2018, "Representation learning with contrastive predictive coding" (InfoNCE),
the answers of a batch being each other's wrong ones, as in Karpukhin et al. 2020, "Dense passage retrieval".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from peft_combo import metrics
from peft_combo.data.labels.answers import read_answers, split_answers
from peft_combo.data.language import split_words
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.matching import MatchingHead
from peft_combo.metrics.report import Gain, PerQuestion, ResultRow, ResultTable
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import MatchingTask
from peft_combo.scoring.text import Tfidf
from peft_combo.tuning.tasks.base import Encode, Epochs, Evaluation


@dataclass(frozen=True)
class MatchingBatch:
    """Some questions and their answers.

    Attributes:
        items: (Q + A,) numbers of texts: questions, then distinct answers. targets: (Q,) place of each one's answer.
    """

    items: NDArray[np.int64]
    targets: NDArray[np.int64]


class AnswerMatching:
    """The matching task as the loop sees it; see `base.Task`.

    The prediction of a question is the rank of its answer among all templates, those of training included.
    """

    per_token = False
    retokenized = False
    exclusive = True
    brands = None
    unit = "questions"
    protocol = (
        "Test questions, whose answer templates (task.unseen: answers) or whose wordings (questions) occur in neither "
        "training nor validation; each one's template ranked among all by the cosine of their vectors, ties at "
        "mid-rank; 95 % interval by bootstrap over templates. The step was chosen on validation questions."
    )

    def __init__(self, recipe: Recipe, config: MatchingTask) -> None:
        self._config = config
        pairs = read_answers(recipe.data)
        parts = split_answers(pairs, recipe.data, config.unseen)
        self.notes = list(pairs.notes)
        self.texts = [*pairs.questions, *pairs.answers]
        self._answers = len(pairs.questions) + np.arange(len(pairs.answers))
        self._of = pairs.of
        self._train, self._valid, self._test = parts.train, parts.valid, parts.test
        self._language = recipe.data.language
        self._epochs = Epochs(len(self._train), recipe.training.batch_size, recipe.seed)
        self.examples = {"train": len(self._train), "valid": len(self._valid), "test": len(self._test)}
        self.data = {
            "name": pairs.name, "digest": pairs.digest, "split_digest": parts.digest, "texts": self.examples,
            "answers": len(pairs.answers),
        }  # fmt: skip

    @property
    def per_epoch(self) -> int:
        return self._epochs.per_epoch

    def head(self, backbone: Backbone, max_length: int) -> MatchingHead:
        return MatchingHead(backbone.dim, self._config)

    def start(self, head: MatchingHead, frozen: Encode) -> None:
        pass

    def batch(self, step: int, part: int = 0, parts: int = 1) -> MatchingBatch:
        questions = self._train[self._epochs.share(step, part, parts)]
        answers, targets = np.unique(self._of[questions], return_inverse=True)
        return MatchingBatch(np.concatenate([questions, self._answers[answers]]), targets.astype(np.int64))

    def logits(self, head: MatchingHead, encoded: Tensor, batch: MatchingBatch) -> Tensor:
        count = len(batch.targets)
        logits: Tensor = head(encoded[:count], encoded[count:])
        return logits

    def loss(self, logits: Tensor, batch: MatchingBatch) -> Tensor:
        targets = torch.from_numpy(batch.targets).to(logits.device)
        return functional.cross_entropy(logits, targets, label_smoothing=self._config.label_smoothing)

    def evaluate(self, head: MatchingHead, encode: Encode, metric: str) -> Evaluation:
        return Evaluation(_measure(self._rank(encode, self._valid)))

    def apply_choice(self, head: MatchingHead, choice: Mapping[str, float]) -> None:
        pass

    def predict(self, head: MatchingHead, encode: Encode) -> NDArray[np.float64]:
        return self._rank(encode, self._test)

    def table(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> ResultTable:
        clusters = self._of[self._test].astype(str)
        ranks = {"TF-IDF cosine": self._tfidf(), "frozen backbone": before, "tuned": after}
        rows = []
        for name, own in ranks.items():
            interval = metrics.bootstrap_interval(metrics.per_query(own, "mrr"), clusters)
            rows.append(ResultRow(name, _measure(own), interval))
        old, new = metrics.per_query(before, "mrr"), metrics.per_query(after, "mrr")
        n, answers = len(self._test), len(set(clusters.tolist()))
        return ResultTable(
            "mrr", tuple(rows), Gain.between(old, new, clusters), n, answers,
            asked=f"the answer of {n:,} test questions, ranked among all {len(self._answers):,} templates, of which "
            f"{answers} answer them; their {'answers' if self._config.unseen == 'answers' else 'wordings'} were not "
            "seen in training",
            caveat=f"The step was chosen on {len(self._valid):,} other questions.",
            per_question=PerQuestion(clusters, old, new),
        )  # fmt: skip

    def _rank(self, encode: Encode, questions: NDArray[np.int64]) -> NDArray[np.float64]:
        vectors, answers = encode(questions), encode(self._answers)
        return metrics.midranks(vectors @ answers.T, self._of[questions])  # (Q, D) @ (D, A) -> (Q, A)

    def _tfidf(self) -> NDArray[np.float64]:
        """Rank by shared words; rarity is counted over all templates and the training questions."""
        texts = [split_words(text, self._language) for text in self.texts]
        answers = [texts[row] for row in self._answers]
        words = Tfidf.fit([*answers, *(texts[row] for row in self._train)], sublinear=True)
        asked, told = words.vectors([texts[row] for row in self._test]), words.vectors(answers)
        return metrics.midranks((asked @ told.T).toarray(), self._of[self._test])


def _measure(ranks: NDArray[np.float64]) -> dict[str, float]:
    return {name: float(metrics.per_query(ranks, name).mean()) for name in MatchingTask.metrics}
