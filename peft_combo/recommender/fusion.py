"""Score fusion: weighted sum of normalised scores, weights and gates fitted on validation.

Owns what makes scores comparable, the evidence gates, how weights are fitted and the table of what was tried. Knows
scorers as arrays with names: not how they score, nor what an item is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Literal, Self, assert_never, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse, special

from peft_combo import metrics
from peft_combo.data.queries import assign_folds
from peft_combo.machine import row_blocks
from peft_combo.recommender.conditional_logit import Key, SampledCells, Scores, fit_conditional_logit, sample_cells
from peft_combo.recommender.evidence import GATES, Evidence, Gate, Gates, _find_missing

Form = Literal["damped", "z", "normal"]

# The line of the table that says what selecting one scorer is worth.
BEST_SINGLE = "best single scorer, picked on other questions"
# Prior spread of the one weight of the plain sum that the prior of all weights stands on, and of how far they may go
# from there; see `_Fit`. Small on purpose: few queries cannot tell scorers that are alike apart. docs/quality.md has
# what other spreads and another centre give.
_WEIGHT_SPREAD, _AWAY_SPREAD = 0.3, 0.1
# A plain sum holds at most so many scorers, one several times where that is better.
_MOST_SUMMED = 6
# Below this a weight moves no comparable score by anything that could change an order worth having.
_NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Tried:
    """One line of the validation table.

    Attributes:
        name: the label of the scorer, or how scorers were combined.
        ndcg: NDCG@10 on queries the weights were not fitted on.
        recall: R@10 of the same.
        gain: ndcg minus that of the best single scorer. error: its standard error, by group.
    """

    name: str
    ndcg: float
    recall: float
    gain: float
    error: float


@dataclass(frozen=True)
class Fusion(Generic[Key]):
    """A weighted sum of comparable scores, ``sum over scorers s, gates k of weight[s, k] gate_k(q, i) score_s(q, i)``.

    A scorer without a score for an item, but not for the whole query, adds its `silence` instead of a score: 0
    puts the item level with the scorer's average one, less than 0 below it; fitted like the rest.

    Attributes:
        form: how scores are made comparable within a query, context items left out: ``z`` is (x - mean) / deviation,
            ``damped`` sign(z) ln(1 + |z|), which keeps long-tailed scores from outvoting all others, ``normal`` the
            normal quantile of the mid-rank.
        weights: per scorer and gate, >= 0; scorers and gates without weight are left out.
        silence: per scorer, <= 0.
        chosen: the line of `table` this is.
        table: what was tried on validation, best first.
    """

    form: Form
    weights: Mapping[Key, Mapping[Gate, float]]
    silence: Mapping[Key, float]
    chosen: str
    table: tuple[Tried, ...] = ()

    @classmethod
    def fit(
        cls,
        scores: Scores[Key],
        targets: ArrayLike,
        evidence: Evidence,
        groups: ArrayLike,
        *,
        folds: int = 5,
        max_queries: int = 2000,
        seed: int = 0,
    ) -> Self:
        """Fit weights on validation queries and choose the simplest fusion that is worth it.

        Weights minimise the softmax cross-entropy of the answers, each of which may with a small probability have come
        from anywhere; they are non-negative and have a normal prior around a plain sum of few scorers, so few queries
        leave a fusion near it. Every way is judged on queries of groups it was not fitted on. Other forms and gates are
        taken only where they are above plain weights on damped scores by more than a standard error of NDCG@10. The
        best single scorer, picked on other questions, is taken where it is above all that by two standard errors, and
        where there are too few groups to fit weights, or no scorer is worth one.

        Args:
            scores: per scorer (Q, N), higher is better, NaN where it cannot say; fitted without these queries.
            targets: (Q,) the answers.
            groups: (Q,) the user or bundle of each query: never on both sides of a fold.
            max_queries: more than so many are sampled, whole groups at a time.
        Raises:
            ValueError: shapes differ, or there is no scorer or no query.
        Source: McFadden 1974 (conditional logit); Copas 1988 (contaminated likelihood); Caruana et al. 2004, section 2
            (the plain sum); Breiman et al. 1984, 3.4.3 (one standard error).
        """
        answers, labels = np.asarray(targets, np.int64), np.unique(np.asarray(groups), return_inverse=True)[1]
        _check(scores, evidence)
        if not len(answers) or len(answers) != len(labels) or len(answers) != len(evidence.contexts):
            raise ValueError(
                f"scores, targets, clusters and contexts must be of the same questions, at least one; found "
                f"{len(evidence.contexts)} contexts, {len(answers)} targets and {len(labels)} clusters."
            )
        rng = np.random.default_rng(seed)
        rows = _sample_groups(labels, max_queries, rng)
        scores = {name: np.ascontiguousarray(part[rows]) for name, part in scores.items()}
        answers, labels, evidence = answers[rows], np.unique(labels[rows], return_inverse=True)[1], evidence.take(rows)
        fold_of = assign_folds(labels, folds, rng)

        singles = {name: cls("damped", {name: {"always": 1.0}}, {}, str(name)) for name in scores}
        alone = {name: _ranks(part, answers, evidence) for name, part in scores.items()}
        best = max(alone, key=lambda name: float(_ndcg(alone[name]).mean()))
        ranks = {str(name): own for name, own in alone.items()}
        if len(scores) == 1 or labels.max() + 1 < 2 * folds:
            return cls._with_table(singles[best], str(best), ranks, alone[best], labels)
        selected = _rank_selected(alone, fold_of)

        sampled = sample_cells(scores.values(), answers, evidence, rng)
        found: dict[str, Self] = {}

        def attempt(name: str, form: Form, terms: Sequence[tuple[Key, Gate]]) -> str:
            fit = _Fit(form, terms, scores, evidence, sampled)
            found[name], ranks[name] = cls._cross_validate(name, fit, scores, answers, evidence, fold_of)
            return name

        chosen = attempt("weights on damped scores", "damped", [(name, "always") for name in scores])
        for form in ("z", "normal"):
            other = attempt(f"weights on {form} scores", form, [(name, "always") for name in scores])
            chosen = other if _beyond_noise(ranks[other], ranks[chosen], labels) else chosen
        form, used = found[chosen].form, found[chosen].needs
        if used:
            gates = [gate for gate in GATES if gate != "same leaf" or evidence.leaves is not None]
            gated = attempt(f"gated weights on {form} scores", form, [(name, gate) for name in used for gate in gates])
            chosen = gated if _beyond_noise(ranks[gated], ranks[chosen], labels) else chosen
        ranks[BEST_SINGLE] = selected
        if not found[chosen].needs or _beyond_noise(selected, ranks[chosen], labels, 2.0):
            return cls._with_table(singles[best], str(best), ranks, alone[best], labels)
        return cls._with_table(found[chosen], chosen, ranks, alone[best], labels)

    @property
    def needs(self) -> tuple[Key, ...]:
        """The scorers whose scores are looked at; the others need not be computed."""
        return tuple(name for name in {**self.weights, **self.silence})

    def combine(self, scores: Scores[Key], evidence: Evidence) -> NDArray[np.float32]:
        """Fuse scores.

        Args:
            scores: (Q, N) of at least the scorers in `needs`; NaN where one cannot say.
        Returns:
            (Q, N), comparable within a query; NaN for context items and where no scorer has a score.
        Raises:
            ValueError: a scorer is missing or a shape differs.
        """
        _check(scores, evidence, self.needs)
        fused = np.empty((len(evidence.contexts), len(evidence.item_support)), np.float32)
        for block in row_blocks(*fused.shape):
            fused[block] = sum_parts(fused[block].shape, self._parts(scores, evidence, block))
        return fused

    def explain(
        self, scores: Scores[Key], evidence: Evidence
    ) -> tuple[NDArray[np.float32], dict[Key, NDArray[np.float32]]]:
        """Fuse scores and tell what each scorer adds, in one pass; it all stays in memory, so for few queries.

        Returns:
            What `combine` gives, and per scorer of `needs` its (Q, N) share; the shares add up to the fused score, up
            to rounding, wherever there is one.
        Raises:
            ValueError: a scorer is missing or a shape differs.
        """
        _check(scores, evidence, self.needs)
        parts = list(self._parts(scores, evidence, slice(None)))
        fused = sum_parts((len(evidence.contexts), len(evidence.item_support)), parts)
        return fused, {name: part for name, (part, _) in zip(self.needs, parts, strict=True)}

    def state(self) -> dict[str, Any]:
        """Return everything as JSON values; scorers by their labels."""
        return {
            "form": self.form,
            "weights": {str(name): dict(gates) for name, gates in self.weights.items()},
            "silence": {str(name): value for name, value in self.silence.items()},
            "chosen": self.chosen,
            "table": [vars(line) for line in self.table],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], read: Callable[[str], Key]) -> Self:
        """Rebuild from `state`.

        Args:
            read: the scorer of a label.
        Raises:
            ValueError: the form or a gate is unknown, or a weight is negative or not finite.
        """
        weights = {
            read(name): {gate: float(w) for gate, w in gates.items()} for name, gates in state["weights"].items()
        }
        silence = {read(name): float(value) for name, value in state["silence"].items()}
        values = [*(w for gates in weights.values() for w in gates.values()), *silence.values()]
        if state["form"] not in get_args(Form) or any(
            gate not in GATES for gates in weights.values() for gate in gates
        ):
            raise ValueError(f"a fusion has one of the forms {get_args(Form)} and gates among {GATES}.")
        if not np.all(np.isfinite(values)) or any(w < 0 for gates in weights.values() for w in gates.values()):
            raise ValueError("the weights of a fusion are finite and not negative.")
        table = tuple(Tried(**line) for line in state["table"])
        return cls(state["form"], cast("Mapping[Key, Mapping[Gate, float]]", weights), silence, state["chosen"], table)

    def sum_gates(self, name: Key, gates: Gates, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the weight of a scorer, ``sum over gates k of weight[s, k] gate_k``, broadcastable as `Gates.of` is.

        Args:
            values: comparable scores that the margin is told from.
        """
        weight: NDArray[np.float32] = np.zeros((1, 1), np.float32)
        for gate, factor in self.weights.get(name, {}).items():
            weight = weight + np.float32(factor) * gates.of(gate, values)
        return weight

    def _parts(
        self, scores: Scores[Key], evidence: Evidence, block: slice
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """Yield per scorer of `needs` what it adds, (q, N), and where it was heard."""
        here = evidence.take(block)
        gates = Gates(here)
        for name in self.needs:
            values, has_score = make_comparable(scores[name][block], here, self.form)
            values *= self.sum_gates(name, gates, values)
            if (silence := self.silence.get(name)) and not has_score.all():
                values = np.where(_find_missing(has_score, here), np.float32(silence), values)
            yield values, has_score

    @classmethod
    def _cross_validate(
        cls, name: str, fit: _Fit[Key], scores: Scores[Key], answers: NDArray[np.int64], evidence: Evidence,
        fold_of: NDArray[np.int64],
    ) -> tuple[Self, NDArray[np.float64]]:  # fmt: skip
        """Fit on all queries; return that fusion, and the ranks by fusions fitted without the query's fold."""
        ranks = np.empty(len(answers))
        for fold in np.unique(fold_of):
            held = np.flatnonzero(fold_of == fold)
            partial = cls(fit.form, *fit.solve(fold_of != fold), name)
            fused = partial.combine({scorer: scores[scorer][held] for scorer in scores}, evidence.take(held))
            ranks[held] = _ranks(fused, answers[held], evidence.take(held))
        return cls(fit.form, *fit.solve(np.ones(len(answers), bool)), name), ranks

    @classmethod
    def _with_table(
        cls, chosen: Self, name: str, ranks: Mapping[str, NDArray[np.float64]], best: NDArray[np.float64],
        labels: NDArray[np.int64],
    ) -> Self:  # fmt: skip
        lines = []
        for tried, found in ranks.items():
            gains = _ndcg(found) - _ndcg(best)
            recall = float(metrics.per_query(found, "r@10").mean())
            error = metrics.standard_error(gains, labels)
            lines.append(Tried(tried, float(_ndcg(found).mean()), recall, float(gains.mean()), error))
        lines.sort(key=lambda line: -line.ndcg)
        return cls(chosen.form, chosen.weights, chosen.silence, name, tuple(lines))


def make_comparable(
    scores: NDArray[np.float32], evidence: Evidence, form: Form
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Bring the scores of each query to one scale; see `Fusion.form`.

    Args:
        scores: (q, N); NaN where the scorer cannot say.
    Returns:
        (q, N) float32, 0 where nothing was said, and (q, N) bool, where something was. Context items count as nothing
        said. A query whose known scores are all alike says nothing about any order: 0 throughout.
    """
    values = np.array(scores, np.float32)
    values[evidence.find_context_cells()] = np.nan
    has_score = np.isfinite(values)
    if form == "normal":
        return _rank_quantiles(values, has_score), has_score
    values = np.where(has_score, values, np.float32(0))
    count = np.maximum(np.count_nonzero(has_score, axis=1, keepdims=True), 1)
    mean = values.sum(axis=1, keepdims=True, dtype=np.float64) / count
    values -= mean.astype(np.float32)
    values *= has_score
    spread = np.sqrt(np.square(values).sum(axis=1, keepdims=True, dtype=np.float64) / count)
    values *= invert_spread(mean, spread)
    match form:
        case "z":
            return values, has_score
        case "damped":
            return damp(values), has_score
        case _:
            assert_never(form)


def invert_spread(mean: ArrayLike, spread: ArrayLike) -> NDArray[np.float32]:
    """Return what standardizes scores, 1 / spread; 0 where all are alike."""
    # Scores that are equal on paper differ in their last bits; that is no opinion.
    alike = np.asarray(spread) <= 1e-6 * np.abs(mean) + 1e-30
    return np.where(alike, 0, 1 / np.where(alike, 1, spread)).astype(np.float32)


def damp(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return sign(z) ln(1 + |z|) of standard scores, in their place."""
    size = np.abs(values)
    size += 1  # the logarithm of float32 is vectorised and log1p is not: a tenth of the time, to 1e-7
    return np.copysign(np.log(size, out=size), values, out=values)


def _rank_quantiles(values: NDArray[np.float32], has_score: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the normal quantile of each mid-rank among what was heard, (q, N); 0 elsewhere."""
    quantiles = np.zeros_like(values)
    np.copyto(values, np.inf, where=~has_score)  # behind all that was said; NaN would do, at ten times the time to sort
    for own, known, found in zip(values, has_score, quantiles, strict=True):
        count = int(np.count_nonzero(known))
        order = np.argsort(own)[:count]
        ordered = own[order]
        starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[:count])  # of runs of equal scores
        sizes = np.diff(starts, append=count)
        found[order] = np.repeat(_quantiles(count)[2 * starts + sizes - 1], sizes)
    return quantiles


@lru_cache(maxsize=4)
def _quantiles(count: int) -> NDArray[np.float32]:
    """Return the normal quantiles of 1, 2 ... 2 count - 1 out of 2 count: where mid-ranks, whole and half, can lie.

    Kept, because scorers are asked about one catalogue and speak of the same number of items again and again.
    """
    return np.asarray(special.ndtri(np.arange(1, 2 * count) / max(1, 2 * count)), np.float32)


def sum_parts(
    shape: tuple[int, ...], parts: Iterable[tuple[NDArray[np.float32], NDArray[np.bool_]]]
) -> NDArray[np.float32]:
    """Add up what scorers say; NaN where none was heard."""
    total, known = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for part, has_score in parts:
        total += part
        known |= has_score
    return np.where(known, total, np.float32(np.nan))


class _Fit(Generic[Key]):
    """The conditional logit over sampled candidates: one number per cell and term, and the solver.

    Maximises the mean of ln(share of the answer + doubt) under a normal prior of fixed spread around a plain sum of
    scorers, which matters for few queries and fades with many. Which scorers are summed is found step by step, each
    time the one that helps NDCG@10 most, one several times where that is better.

    Source: Caruana et al. 2004, "Ensemble selection from libraries of models", section 2 (with replacement).
    """

    def __init__(
        self, form: Form, terms: Sequence[tuple[Key, Gate]], scores: Scores[Key], evidence: Evidence,
        sampled: SampledCells,
    ) -> None:  # fmt: skip
        self.form = form
        self._terms = terms
        self._sample_groups = sampled
        names = tuple(dict.fromkeys(name for name, _ in terms))
        columns = np.empty((len(terms), len(sampled.rows)), np.float32)
        silence = np.zeros((len(names), len(sampled.rows)), np.float32)
        for block in row_blocks(len(evidence.contexts), len(evidence.item_support)):
            here = evidence.take(block)
            cells = slice(*np.searchsorted(sampled.rows, [block.start, block.stop]))
            rows, items = sampled.rows[cells] - block.start, sampled.columns[cells]
            gates = Gates(here)
            for place, name in enumerate(names):
                values, has_score = make_comparable(scores[name][block], here, form)
                silence[place, cells] = _find_missing(has_score, here)[rows, items]
                for term, (scorer, gate) in enumerate(terms):
                    if scorer == name:
                        factor = np.broadcast_to(gates.of(gate, values), values.shape)
                        columns[term, cells] = factor[rows, items] * values[rows, items]
        # A scorer that is never without a score has no silence to weigh.
        self._find_missing = [name for place, name in enumerate(names) if silence[place].any()]
        self._cells = np.concatenate([columns, silence[silence.any(axis=1)]])  # (P, M)
        self._precision = np.full(len(self._cells), _AWAY_SPREAD**-2.0)
        self._bounds = [(0.0, None)] * len(terms) + [(None, 0.0)] * len(self._find_missing)

    def solve(self, chosen: NDArray[np.bool_]) -> tuple[dict[Key, dict[Gate, float]], dict[Key, float]]:
        """Return weights and silence fitted on the chosen queries: (Q,) bool."""
        counts = self._sum_scorers(chosen)
        alone = np.array([_WEIGHT_SPREAD**-2.0])
        (scale,) = fit_conditional_logit(
            (counts @ self._cells)[None], self._sample_groups, chosen, alone, [(0.0, None)], np.zeros(1)
        )
        centre = scale * counts.astype(np.float64)
        theta = fit_conditional_logit(self._cells, self._sample_groups, chosen, self._precision, self._bounds, centre)
        weights: dict[Key, dict[Gate, float]] = {}
        for (name, gate), value in zip(self._terms, theta, strict=False):
            if value > _NEGLIGIBLE:
                weights.setdefault(name, {})[gate] = float(value)
        silence = dict(zip(self._find_missing, map(float, theta[len(self._terms) :]), strict=True))
        # A scorer without any weight is not asked at all, so neither is its silence.
        return weights, {name: value for name, value in silence.items() if name in weights}

    def _sum_scorers(self, chosen: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Return how often each term is in the plain sum that is best on the chosen queries: (P,)."""
        always = [place for place, (_, gate) in enumerate(self._terms) if gate == "always"]
        inside, starts, sizes = self._sample_groups.select(chosen)
        kept = self._cells[always][:, inside]
        total, best = np.zeros(kept.shape[1], np.float32), -1.0
        counts = np.zeros(len(self._cells), np.float32)
        found = counts.copy()
        for _ in range(_MOST_SUMMED):
            tried = [_measure_cells(total + one, starts, sizes) for one in kept]
            place = int(np.argmax(tried))
            total = total + kept[place]
            counts[always[place]] += 1
            if tried[place] > best:
                best, found = tried[place], counts.copy()
        return found


def _measure_cells(scores: NDArray[np.float32], starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> float:
    """Return the mean NDCG@10 of the first cell of each query among its cells: (M,) scores, (Q,), (Q,)."""
    own = np.repeat(scores[starts], sizes)
    ranks = np.add.reduceat(scores > own, starts) + (np.add.reduceat(scores == own, starts) + 1) / 2
    return float(_ndcg(ranks).mean())


def _ranks(scores: NDArray[np.float32], answers: NDArray[np.int64], evidence: Evidence) -> NDArray[np.float64]:
    barred = sparse.coo_array(
        (np.ones(len(evidence.find_context_cells()[0]), bool), evidence.find_context_cells()), shape=scores.shape
    )
    return metrics.midranks(scores, answers, barred)


def _rank_selected(ranks: Mapping[Key, NDArray[np.float64]], fold_of: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the ranks by the scorer that is best on the other folds."""
    found = np.empty(len(fold_of))
    for fold in np.unique(fold_of):
        held = fold_of == fold
        best = max(ranks.values(), key=lambda values: float(_ndcg(values[~held]).mean()))
        found[held] = best[held]
    return found


def _ndcg(ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    return metrics.per_query(ranks, "ndcg@10")


def _beyond_noise(
    ranks: NDArray[np.float64], than: NDArray[np.float64], labels: NDArray[np.int64], errors: float = 1.0
) -> bool:
    gains = _ndcg(ranks) - _ndcg(than)
    return bool(gains.mean() > errors * metrics.standard_error(gains, labels))


def _sample_groups(labels: NDArray[np.int64], limit: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return rows of whole groups, ascending, at most `limit` of them (or one group)."""
    if len(labels) <= limit:
        return np.arange(len(labels))
    order = rng.permutation(labels.max() + 1)
    fits = np.cumsum(np.bincount(labels)[order]) <= limit
    return np.flatnonzero(np.isin(labels, order[: max(1, int(fits.sum()))]))


def _check(scores: Scores[Key], evidence: Evidence, needed: Sequence[Key] = ()) -> None:
    missing = ", ".join(str(name) for name in needed if name not in scores)
    if missing or not scores:
        there = ", ".join(map(str, scores))
        raise ValueError(f"scores must hold {missing or 'a scorer'}, found {there or 'none'}.")
    shape = (len(evidence.contexts), len(evidence.item_support))
    wrong = {str(name): part.shape for name, part in scores.items() if part.shape != shape}
    if wrong:
        raise ValueError(f"scores must be {shape}, one row per context and one column per item, found {wrong}.")
