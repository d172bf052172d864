"""Leakage canary: scorers that read text alone must fall to chance when texts are shuffled between items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.data.model import Dataset
from peft_combo.data.splits import Split
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
    order = np.random.default_rng(seed).permutation(len(dataset.catalog))
    history = dataset.bundles.to_csr(len(dataset.catalog), parts.train)
    vectors: dict[ScorerId, ItemVectors] = {ScorerId("TF-IDF title"): tfidf_vectors(dataset.words)}
    if frozen is not None:
        vectors[FROZEN] = frozen
    asks: dict[ScorerId, tuple[Fitted, Fitted]] = {}
    for scorer, own in vectors.items():
        asks[scorer] = (
            FittedScorer(TextCosine().fit(history, items=own)),
            FittedScorer(TextCosine().fit(history, items=own[order])),
        )
    for name, (own, head) in (tuned or {}).items():
        asks[ScorerId("tuned BERT", name)] = FittedHead.of(own, head), FittedHead.of(own[order], head)
    sizes = (test.contexts >= 0).sum(axis=1)
    chance = float(np.minimum(1, LIST / (len(dataset.catalog) - sizes)).mean())
    right, shuffled = {}, {}
    for scorer, (own_ask, other_ask) in asks.items():
        found = []
        for ask in (own_ask, other_ask):
            ranks = [metrics.midranks(ask(part), part.targets, part.excluded()) for part in split_blocks(test)]
            found.append(metrics.per_query(np.concatenate(ranks), "r@10"))
        low, _ = metrics.bootstrap_interval(found[1], test.groups, seed=seed)
        right[str(scorer)], shuffled[str(scorer)] = float(found[0].mean()), (float(found[1].mean()), low)
    return Canary(chance, right, shuffled, all(low <= chance for _, low in shuffled.values()))
