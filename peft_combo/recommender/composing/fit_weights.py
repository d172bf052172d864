"""Weights of the composition objective, one set for each kind of request, fitted on validation.

Owns the choice of the composer's weights on validation. Knows nothing of how bundles are searched for.

What a weight is worth depends on what relevance knows. Beside a basket it has read all that is there, beside one item
it says little of the second thing to add, and beside a text or a user's past it says nothing of what goes together. So
each kind of request is put to validation bundles as it will be asked:

    item     each bundle is composed from one of its items; recall of the others
    basket   one item of a bundle is missing, two or more are there; NDCG@10 of the missing one
    query    one item is missing, relevance is the likeness to the bundle's name, or to the text of one of its items
             where it has none; NDCG@10
    user     one item is missing, relevance is that beside other bundles of the same group; NDCG@10

Weights are chosen one after the other. Compatibility and slots count as little as is within one standard error of the
best (of the paired difference): a few hundred bundles name a best by luck, and relevance alone, the plain list, is hard
to beat. Agreement and redundancy count as much as is within half a standard error of the best, redundancy only while it
is no worse than relevance alone: order that costs nothing measurable is kept. Agreement never counts for nothing, for
who asks for a bundle wants it for one person, nor does compatibility beside a text and a user, however few bundles
there were to ask. Where every value is as good, the greatest is taken.
Source: Breiman et al. 1984, the one-standard-error rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.data.queries import Queries, pad_contexts
from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.openings import Openings, compose_openings, measure_recall
from peft_combo.recommender.composing.options import Compatibility, ModeWeights, ObjectiveWeights, Options
from peft_combo.recommender.fitted_scorers import Fitted, score_beside
from peft_combo.recommender.model_selection import split_blocks

GRID: Mapping[str, tuple[float, ...]] = {
    "compatibility": (0.0, 0.25, 0.5, 1.0),
    "slots": (0.0, 0.01, 0.05, 0.1, 0.2, 0.35, 0.5),
    "agreement": (0.06, 0.1, 0.2, 0.4),
    "redundancy": (0.0, 0.25, 0.5),
}
_KEPT = ("agreement", "redundancy")  # what counts as much as costs nothing
LEAST_COMPATIBILITY = 0.25  # beside a text or a user's past
_ZERO = ObjectiveWeights(compatibility=0.0, slots=0.0, agreement=0.0, redundancy=0.0)
_QUERIES = 400
_OPENINGS = 200
_LEAST = 20  # queries of a kind; with fewer the weights of the next best kind serve
_BLOCK = 128  # queries whose parts are computed at once
_RECENT = 5  # items of other bundles that stand for a user's past


def fit_weights(
    composer: Composer,
    valid: Queries,
    relevance: Fitted,
    compatibility: Fitted | None,
    texts: NDArray[np.float32] | None = None,
    *,
    vectors: NDArray[np.float32] | None = None,
    seed: int = 0,
) -> ModeWeights:
    """Choose the weights of every kind of request; relevance counts 1 in each.

    Args:
        composer: with templates and agreement of training bundles; its own weights do not matter.
        valid: validation queries; of more than 400 a seeded sample is asked, and 200 bundles are composed at most.
        relevance, compatibility: what the composer will be given, fitted on training bundles.
        texts: (B, D) unit vectors of the validation bundles' names, by `valid.bundles`; NaN where a bundle has none.
        vectors: (N, D) item vectors of the same encoder; None weighs queries like users, and these like baskets.
    """
    item = fit_item_weights(composer, valid, relevance, compatibility, seed=seed)
    queries = valid.sample(_QUERIES, seed)
    several = queries.take(np.flatnonzero((queries.contexts >= 0).sum(axis=1) > 1))
    if len(several) < _LEAST:
        several = queries

    def choose(asked: Queries, score: Callable[[slice], NDArray[np.float32]]) -> ObjectiveWeights:
        blocks = [slice(start, start + _BLOCK) for start in range(0, len(asked), _BLOCK)]
        parts = [_Part.of(composer, asked.take(block), score(block), compatibility) for block in blocks]
        axes = [axis for axis in GRID if axis != "compatibility" or compatibility is not None]
        return _choose(lambda weights: np.concatenate([part.measure(weights) for part in parts]), axes)

    basket = choose(several, lambda block: relevance(several.take(block)))
    query = user = basket
    told, past = _find_past(queries, valid)
    if len(told) >= _LEAST:
        user = choose(told, lambda block: relevance(past.take(block)))
    if vectors is not None:
        asked_for = _find_texts(queries, texts, vectors)
        query = choose(queries, lambda block: asked_for[block] @ vectors.T)
    return ModeWeights(query=_add_compatibility(query), user=_add_compatibility(user), basket=basket, item=item)


def fit_item_weights(
    composer: Composer, valid: Queries, relevance: Fitted, compatibility: Fitted | None, *, seed: int = 0
) -> ObjectiveWeights:
    """Choose the weights for bundles around one item, by the recall of validation bundles as a whole."""
    openings = Openings.of(valid, seed)
    if len(openings) > _OPENINGS:
        openings = openings.take(np.sort(np.random.default_rng(seed).choice(len(openings), _OPENINGS, replace=False)))
    scores = np.concatenate([relevance(part) for part in split_blocks(openings.queries)])
    judge = make_judge(compatibility)

    def measure(weights: ObjectiveWeights) -> NDArray[np.float64]:
        # The beam, for looking at every bundle of a small catalogue, time and again, would take most of a fit.
        options = Options(k=1, weights=weights, seed=seed, exact_limit=0)
        return measure_recall(compose_openings(openings, composer, scores, judge, options), openings)

    return _choose(measure, [axis for axis in GRID if axis != "compatibility" or compatibility is not None])


def _add_compatibility(weights: ObjectiveWeights) -> ObjectiveWeights:
    """Return weights for what says nothing of how items go together, so that something does."""
    return replace(weights, compatibility=max(weights.compatibility, LEAST_COMPATIBILITY))


def make_judge(fitted: Fitted | None) -> Compatibility | None:
    """Return a scorer as a composer asks for it; None for none."""
    return None if fitted is None else lambda sets, rows: score_beside(fitted, sets, rows)


def _choose(measure: Callable[[ObjectiveWeights], NDArray[np.float64]], axes: Sequence[str]) -> ObjectiveWeights:
    """Choose one weight after the other, see the module.

    Args:
        measure: what each validation query gains under some weights, (Q,).
    """
    known: dict[ObjectiveWeights, NDArray[np.float64]] = {}

    def gain(weights: ObjectiveWeights) -> NDArray[np.float64]:
        if weights not in known:
            known[weights] = measure(weights)
        return known[weights]

    def falls_short(weights: ObjectiveWeights, best: ObjectiveWeights, errors: float) -> bool:
        less = gain(best) - gain(weights)
        return bool(less.mean() > errors * less.std() / max(1, len(less)) ** 0.5 + 1e-9)

    chosen, floor = _ZERO, float(gain(_ZERO).mean())
    for axis in axes:
        tried = [replace(chosen, **{axis: value}) for value in GRID[axis]]
        best = max(tried, key=lambda weights: gain(weights).mean())
        if all(np.array_equal(gain(weights), gain(best)) for weights in tried):
            chosen = tried[-1]
        elif axis in _KEPT:
            least = min(floor, float(gain(best).mean())) - 1e-9 if axis == "redundancy" else -np.inf
            kept = [one for one in tried if not falls_short(one, best, 0.5) and gain(one).mean() >= least]
            chosen = kept[-1]
        else:
            chosen = next(one for one in tried if not falls_short(one, best, 1.0))
    return chosen


class _Part:
    """Queries with one item missing, and the parts of the objective of every item for the place."""

    def __init__(self, queries: Queries, parts: Mapping[str, NDArray[np.floating[Any]]]) -> None:
        self.queries, self.parts, self.excluded = queries, parts, queries.excluded()

    @classmethod
    def of(
        cls, composer: Composer, queries: Queries, relevance: NDArray[np.float32], compatibility: Fitted | None
    ) -> Self:
        contexts = [row[row >= 0] for row in queries.contexts]
        beside = None if compatibility is None else compatibility(queries)
        own = composer.score_completions(contexts, relevance, beside)
        return cls(queries, {name: part.astype(np.float32) for name, part in own.items()})

    def measure(self, weights: ObjectiveWeights) -> NDArray[np.float64]:
        """NDCG@10 of the missing items, (Q,)."""
        scores = sum(getattr(weights, name) * part for name, part in self.parts.items() if getattr(weights, name))
        ranks = metrics.midranks(np.asarray(scores, np.float32), self.queries.targets, self.excluded)
        return metrics.per_query(ranks, "ndcg@10")


def _find_past(queries: Queries, valid: Queries) -> tuple[Queries, Queries]:
    """Find the queries whose group has other bundles: the queries, and those where items of these are the context."""
    items: dict[str, dict[int, set[int]]] = {}
    for group, bundle, target in zip(
        valid.groups.tolist(), valid.bundles.tolist(), valid.targets.tolist(), strict=True
    ):
        items.setdefault(group, {}).setdefault(bundle, set()).add(target)
    places, contexts = [], []
    for place, (group, bundle) in enumerate(zip(queries.groups.tolist(), queries.bundles.tolist(), strict=True)):
        own = items[group][bundle]
        past = [row for other, rows in items[group].items() if other != bundle for row in sorted(rows - own)]
        if past:
            places.append(place)
            contexts.append(np.array(past[:_RECENT], np.int64))
    told = queries.take(np.array(places, np.int64))
    return told, replace(told, contexts=pad_contexts(contexts))


def _find_texts(
    queries: Queries, texts: NDArray[np.float32] | None, vectors: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return what is asked for in words, as vectors: (Q, D)."""
    found = vectors[queries.contexts[:, 0]]  # the first item that is there
    if texts is not None:
        named = np.isfinite(texts[queries.bundles]).all(axis=1)
        found[named] = texts[queries.bundles[named]]
    return found
