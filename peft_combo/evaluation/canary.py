"""Leakage canary: scorers that read text alone must fall to chance when texts are shuffled between items."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from peft_combo import metrics
from peft_combo.data.model import Dataset
from peft_combo.data.splits import Split
from peft_combo.encoder.heads.completion import CompletionHead
from peft_combo.evaluation.measures import LIST
from peft_combo.recommender.fit_data import Tuned
from peft_combo.recommender.fitted_scorers import Fitted, FittedHead, FittedScorer, ItemVectors
from peft_combo.recommender.model_selection import make_queries, split_blocks
from peft_combo.recommender.scorer_id import FROZEN, ScorerId
from peft_combo.scoring.text import TextCosine, tfidf_vectors


@dataclass(frozen=True)
class Canary:
    """How the rows that read text alone do with each item given another item's text.

    Attributes:
        chance: R@10 of a blind guess.
        right: per row R@10 with each item's own text. shuffled: with another's; low end of its 95 % interval beside it.
            A row above chance by one permutation is asked by four more, and these are its mean and interval.
        alive: every shuffled row is at chance, so no row finds an answer by anything but text.
    """

    chance: float
    right: dict[str, float]
    shuffled: dict[str, tuple[float, float]]
    alive: bool


def run_canary(
    dataset: Dataset,
    parts: Split,
    *,
    frozen: NDArray[np.float32] | None = None,
    tuned: Tuned | None = None,
    seed: int = 0,
    max_queries: int = 5000,
) -> Canary:
    """Shuffle texts between items; rows that read nothing else must fall to chance on the test queries.

    A row that does not has seen the answers somewhere else: in the order of the catalogue, in what was excluded, or in
    a history that holds the test bundles.
    """
    test = make_queries(dataset, parts.test, max_queries, seed, "test", [])
    rng = np.random.default_rng(seed)
    order, *more = (rng.permutation(len(dataset.catalog)) for _ in range(5))
    history = dataset.bundles.to_csr(len(dataset.catalog), parts.train)
    vectors: dict[ScorerId, ItemVectors] = {ScorerId("TF-IDF title"): tfidf_vectors(dataset.words)}
    if frozen is not None:
        vectors[FROZEN] = frozen

    def read_texts(own: ItemVectors) -> Callable[[NDArray[np.int64]], Fitted]:
        return lambda rows: FittedScorer(TextCosine().fit(history, items=own[rows]))

    def read_vectors(own: NDArray[np.float32], head: CompletionHead) -> Callable[[NDArray[np.int64]], Fitted]:
        return lambda rows: FittedHead.of(own[rows], head)

    asks = {scorer: read_texts(own) for scorer, own in vectors.items()}
    asks |= {ScorerId("tuned BERT", name): read_vectors(own, head) for name, (own, head) in (tuned or {}).items()}

    def recall(ask: Fitted) -> NDArray[np.float64]:
        ranks = [metrics.midranks(ask(part), part.targets, part.excluded()) for part in split_blocks(test)]
        return metrics.per_query(np.concatenate(ranks), "r@10")

    sizes = (test.contexts >= 0).sum(axis=1)
    chance = float(np.minimum(1, LIST / (len(dataset.catalog) - sizes)).mean())
    right, shuffled = {}, {}
    for scorer, build in asks.items():
        right[str(scorer)] = float(recall(build(np.arange(len(dataset.catalog)))).mean())
        found = recall(build(order))
        low, _ = metrics.bootstrap_interval(found, test.groups, seed=seed)
        mean = float(found.mean())
        if low > chance:
            # One permutation is one draw: what a head prefers whatever is asked may be on an item that many buy.
            means = [mean, *(float(recall(build(own)).mean()) for own in more)]
            mean = float(np.mean(means))
            low = mean - float(stats.t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / len(means) ** 0.5)
        shuffled[str(scorer)] = mean, low
    return Canary(chance, right, shuffled, all(low <= chance for _, low in shuffled.values()))
