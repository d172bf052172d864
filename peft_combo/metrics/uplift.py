"""Uplift: the effect of an offer on what follows, from data in which nobody drew who got it.

Owns the doubly robust estimate, what it is for parts of the data, how far the groups overlap, and how strong something
unmeasured would have to be to explain it. Knows numbers only. The scores of each row are those of
`metrics.off_policy`: the value of offering to all less that of offering to nobody, under propensities of what was done.

An effect is identified where whoever was and was not made the offer differ in nothing that moves the outcome but what
the covariates say, where anyone could have been in either group, and where one's offer does not move another's outcome.
No figure here can show that the first and the last hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from scipy.stats import norm

from peft_combo.metrics.off_policy import RewardModel, split_ratios, weigh_places
from peft_combo.metrics.regression import fit_logistic, fit_ridge, predict_linear
from peft_combo.metrics.significance import standard_error

Floats = NDArray[np.float64]

_BINS = 10
_FEWEST = 20
_WIDE_GAP = 0.1  # of standardized means: Austin 2009


@dataclass(frozen=True)
class Effect:
    """An effect, its standard error by unit, and its interval."""

    value: float
    error: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Overlap:
    """How far those with and without the offer are alike.

    Attributes:
        bins: from, to, rows without the offer, rows with it, by propensity.
        trimmed: share of rows whose propensity was too near 0 or 1 and that are in no estimate.
        gaps: per covariate the difference of means in standard deviations, as it is and by inverse propensities.
        effective_size: Kish's, of those with and without the offer.
    """

    bins: tuple[tuple[float, float, int, int], ...]
    trimmed: float
    gaps: Mapping[str, tuple[float, float]]
    effective_size: tuple[float, float]


@dataclass(frozen=True)
class SegmentEffect:
    """The effect in one part of the data.

    Attributes:
        effect: of its rows alone. shrunk: drawn towards the mean of all segments as far as its error is large beside
            what segments differ by.
    """

    name: str
    rows: int
    effect: Effect
    shrunk: Effect


@dataclass(frozen=True)
class Uplift:
    """What an offer did, per row.

    Attributes:
        effect: doubly robust, over rows that were not trimmed. naive: difference of the two means, all rows.
        without: mean outcome there would be without any offer, of the same rows.
        e_value: how strongly, as a risk ratio with both offer and outcome, something unmeasured would have to be bound
            to explain the effect away; and the same for the end of its interval that is nearer to 0. 1 is nothing.
        segments: by name. spread: standard deviation of the effects of segments beyond their errors; None without.
        slope: of the scores on the effects that covariates foretell (see `_foretell`), 1 where these are right and 0
            where they say nothing; None where there is no covariate.
        rows, units: how many. doubts: what speaks against relying on it, in words.
    """

    effect: Effect
    naive: Effect
    without: float
    e_value: tuple[float, float]
    overlap: Overlap
    segments: tuple[SegmentEffect, ...]
    spread: float | None
    slope: Effect | None
    rows: int
    units: int
    doubts: tuple[str, ...]


def estimate_uplift(
    outcomes: ArrayLike, offered: ArrayLike, covariates: ArrayLike, units: ArrayLike, *,
    names: Sequence[str] | None = None, segments: ArrayLike | None = None, folds: int = 5, trim: float = 0.02,
    penalty: float = 1.0, level: float = 0.95, seed: int = 0,
) -> Uplift:  # fmt: skip
    """Estimate the mean effect of an offer.

    Propensities (logistic) and outcomes (ridge, one for each group) of a fold are those of models that saw no unit of
    it. The estimate is right where either is.

    Args:
        outcomes: (M,). offered: (M,) whether the row had the offer. covariates: (M, F) as they were before it.
        units: (M,) what is independent of each other: a customer, all of whose rows are in one fold.
        names: (F,) of the covariates. segments: (M,) part of the data a row is in, such as its bundle; both regressions
            know it. None for no parts.
        trim: rows with a propensity below it or above 1 - it are left out, so the effect is of those who could have
            been in either group.
        penalty: of both regressions, on standardized columns.
    Raises:
        ValueError: shapes do not fit, a value is not finite, or a group is too small.
    Source: Robins, Rotnitzky and Zhao 1994 (AIPW); Chernozhukov et al. 2018, "Double/debiased machine learning" (cross-
        fitting); Crump et al. 2009 (trimming); VanderWeele and Ding 2017 (E-value).
    """
    earned, treated, table, owner = _check(outcomes, offered, covariates, units)
    labels = [f"covariate {place + 1}" for place in range(table.shape[1])] if names is None else list(names)
    if len(labels) != table.shape[1]:
        raise ValueError(f"names: expected {table.shape[1]}, found {len(labels)}.")
    table = (table - table.mean(0)) / np.where(table.std(0) > 0, table.std(0), 1.0)
    columns = table if segments is None else np.hstack([table, _mark_segments(np.asarray(segments))])
    rng = np.random.default_rng(seed)
    fold_of = (rng.permutation(owner.max() + 1) % folds)[owner]
    propensity, without, with_it = (np.empty(len(earned)) for _ in range(3))
    for fold in range(folds):
        held, seen = fold_of == fold, fold_of != fold
        if min(treated[seen].sum(), (~treated)[seen].sum()) < 2:
            raise ValueError("Too few units to cross-fit: outside of one fold a group has fewer than two rows.")
        propensity[held] = expit(predict_linear(columns[held], fit_logistic(columns[seen], treated[seen], penalty)))
        for group, told in ((~treated, without), (treated, with_it)):
            told[held] = predict_linear(columns[held], fit_ridge(columns[seen & group], earned[seen & group], penalty))
    kept = (propensity >= trim) & (propensity <= 1 - trim)
    if min(treated[kept].sum(), (~treated)[kept].sum()) < _FEWEST:
        raise ValueError(
            f"Those with and without the offer do not overlap: at a trim of {trim} {treated[kept].sum()} and "
            f"{(~treated)[kept].sum()} rows are left, and {_FEWEST} of each are the least."
        )
    of_all = _score(earned, treated, propensity, with_it, without, True)[kept]
    of_none = _score(earned, treated, propensity, with_it, without, False)[kept]
    scores, clusters = of_all - of_none, owner[kept]
    effect = _conclude(scores, clusters, level)
    parts: tuple[SegmentEffect, ...] = ()
    spread = None
    if segments is not None:
        parts, spread = _split_effect(scores, clusters, np.asarray(segments)[kept], level)
    overlap = _measure_overlap(table, treated, propensity, kept, labels)
    return Uplift(
        effect, _difference(earned, treated, owner, level), float(of_none.mean()),
        _explain_away(effect, float(of_none.mean()), earned[kept]), overlap, parts, spread,
        _foretell(scores, table[kept], clusters, fold_of[kept], penalty, level) if table.shape[1] else None,
        len(earned), int(owner.max()) + 1, _list_doubts(overlap),
    )  # fmt: skip


def _mark_segments(segments: NDArray[np.generic]) -> Floats:
    """Return a column for each segment but the first, in deviations: (M, S - 1)."""
    names = np.unique(segments)[1:]
    marks = (segments[:, None] == names).astype(np.float64)
    return np.asarray((marks - marks.mean(0)) / np.maximum(marks.std(0), 1e-9), np.float64)


def _score(
    earned: Floats, treated: NDArray[np.bool_], propensity: Floats, with_it: Floats, without: Floats, offer: bool
) -> Floats:
    """Return the doubly robust score (M,) of offering to all, or to nobody, by `metrics.off_policy`."""
    logged = np.where(treated, propensity, 1 - propensity)
    weights = weigh_places(np.clip(logged, 1e-12, 1), treated == offer, "position")
    told = RewardModel(shown=np.where(treated, with_it, without), expected=with_it if offer else without)
    return split_ratios(earned[:, None], weights, "dr", "position", told)[0][:, 0]


def _conclude(scores: Floats, clusters: NDArray[np.int64], level: float) -> Effect:
    value, error = float(scores.mean()), standard_error(scores, clusters)
    reach = float(norm.ppf((1 + level) / 2)) * error
    return Effect(value, error, (value - reach, value + reach))


def _difference(earned: Floats, treated: NDArray[np.bool_], owner: NDArray[np.int64], level: float) -> Effect:
    """Return the difference of the two means, as scores whose mean it is."""
    share = treated.mean()
    means = earned[treated].mean(), earned[~treated].mean()
    centred = np.where(treated, (earned - means[0]) / share, -(earned - means[1]) / (1 - share))
    return _conclude(centred + means[0] - means[1], owner, level)


def _split_effect(
    scores: Floats, clusters: NDArray[np.int64], segments: NDArray[np.generic], level: float
) -> tuple[tuple[SegmentEffect, ...], float | None]:
    """Return the effect of each segment, shrunk to the mean of all; segments of too few units are left out.

    Source: Efron and Morris 1975; DerSimonian and Laird 1986 (variance between segments).
    """
    named = [(str(name), segments == name) for name in np.unique(segments)]
    own = {
        name: (_conclude(scores[inside], clusters[inside], level), int(inside.sum()))
        for name, inside in named
        if len(np.unique(clusters[inside])) >= _FEWEST
    }
    if len(own) < 2:
        return tuple(SegmentEffect(name, rows, one, one) for name, (one, rows) in own.items()), None
    values = np.array([one.value for one, _ in own.values()])
    variances = np.maximum(np.square([one.error for one, _ in own.values()]), 1e-12)
    weights = 1 / variances
    mean = float((weights * values).sum() / weights.sum())
    excess = float((weights * np.square(values - mean)).sum()) - (len(values) - 1)
    between = max(0.0, excess / float(weights.sum() - np.square(weights).sum() / weights.sum()))
    centre = float((values / (variances + between)).sum() / (1 / (variances + between)).sum())
    pull = between / (between + variances)
    errors = np.sqrt(pull * variances + np.square(1 - pull) / (1 / (variances + between)).sum())
    reach = float(norm.ppf((1 + level) / 2))
    found = []
    for (name, (one, rows)), share, error in zip(own.items(), pull.tolist(), errors.tolist(), strict=True):
        value = share * one.value + (1 - share) * centre
        found.append(
            SegmentEffect(name, rows, one, Effect(value, error, (value - reach * error, value + reach * error)))
        )
    return tuple(found), float(np.sqrt(between))


def _foretell(
    scores: Floats, table: Floats, clusters: NDArray[np.int64], fold_of: NDArray[np.int64], penalty: float,
    level: float,
) -> Effect:  # fmt: skip
    """Return the slope of the scores on what a regression of them, fitted without the fold, foretells of each row.

    Source: Kennedy 2020, "Towards optimal doubly robust estimation of heterogeneous causal effects" (DR-learner);
    Chernozhukov et al. 2018, "Generic machine learning inference" (the slope of the best linear predictor).
    """
    told = np.empty(len(scores))
    for fold in np.unique(fold_of):
        held = fold_of == fold
        told[held] = predict_linear(table[held], fit_ridge(table[~held], scores[~held], penalty))
        told[held] -= told[held].mean()
    power = float(np.square(told).mean())
    if not power > 1e-12 * max(1.0, float(np.square(scores).mean())):
        return Effect(0.0, float("inf"), (-float("inf"), float("inf")))
    centred = scores - scores.mean()
    slope = float((told * centred).mean()) / power
    influence = told * (centred - slope * told) / power
    return _conclude(influence + slope, clusters, level)


def _explain_away(effect: Effect, without: float, earned: Floats) -> tuple[float, float]:
    """Return the E-values of the effect and of its interval's end near 0.

    A rate in [0, 1] has a risk ratio; of any other outcome exp(0.91 d) stands for it, d in standard deviations.
    """
    low, high = effect.interval
    near = 0.0 if low <= 0 <= high else low if low > 0 else high
    spread = float(earned.std()) or 1.0
    rate = bool(np.isin(earned, (0.0, 1.0)).all())

    def bound(value: float) -> float:
        ratio = (without + value) / without if rate and without > 0 and without + value > 0 else 0.0
        ratio = ratio or float(np.exp(0.91 * value / spread))
        ratio = max(ratio, 1 / ratio)
        return ratio + float(np.sqrt(ratio * (ratio - 1)))

    return bound(effect.value), bound(near)


def _measure_overlap(
    table: Floats, treated: NDArray[np.bool_], propensity: Floats, kept: NDArray[np.bool_], names: Sequence[str]
) -> Overlap:
    edges = np.linspace(0, 1, _BINS + 1)
    place = np.minimum((propensity * _BINS).astype(np.int64), _BINS - 1)
    counts = [np.bincount(place[group], minlength=_BINS) for group in (~treated, treated)]
    weights = np.where(treated, 1 / np.maximum(propensity, 1e-12), 1 / np.maximum(1 - propensity, 1e-12)) * kept
    before = table[treated].mean(0) - table[~treated].mean(0)
    after = [weights[group] @ table[group] / weights[group].sum() for group in (treated, ~treated)]
    sizes = [float(weights[group].sum() ** 2 / np.square(weights[group]).sum()) for group in (treated, ~treated)]
    gaps = {name: (float(a), float(b)) for name, a, b in zip(names, before, after[0] - after[1], strict=True)}
    bins = [
        (round(float(edges[one]), 2), round(float(edges[one + 1]), 2), int(counts[0][one]), int(counts[1][one]))
        for one in range(_BINS)
    ]
    return Overlap(tuple(bins), float(1 - kept.mean()), gaps, (sizes[0], sizes[1]))


def _list_doubts(overlap: Overlap) -> tuple[str, ...]:
    doubts = []
    if overlap.trimmed > 0.1:
        doubts.append(
            f"{overlap.trimmed:.0%} of the rows could hardly have been in the other group and were left out: the "
            "effect is not that of them"
        )
    if wide := [name for name, (_, after) in overlap.gaps.items() if abs(after) > _WIDE_GAP]:
        doubts.append(f"groups still differ after weighting in {', '.join(wide[:5])}")
    if min(overlap.effective_size) < 5 * _FEWEST:
        doubts.append(
            f"an effective {min(overlap.effective_size):.0f} rows in a group, and {5 * _FEWEST} are the least"
        )
    return tuple(doubts)


def _check(
    outcomes: ArrayLike, offered: ArrayLike, covariates: ArrayLike, units: ArrayLike
) -> tuple[Floats, NDArray[np.bool_], Floats, NDArray[np.int64]]:
    earned, given = np.asarray(outcomes, np.float64), np.asarray(offered)
    table, labels = np.asarray(covariates, np.float64), np.asarray(units)
    shapes = (earned.shape, given.shape, labels.shape)
    if earned.ndim != 1 or len(set(shapes)) > 1 or table.ndim != 2 or len(table) != len(earned) or not len(earned):
        raise ValueError(
            f"Expected (M,) outcomes, offers and units and (M, F) covariates, found {shapes}, {table.shape}."
        )
    if not np.all(np.isfinite(earned)) or not np.all(np.isfinite(table)):
        raise ValueError("outcomes and covariates must be finite.")
    if not np.isin(given, (0, 1)).all():
        raise ValueError("offered: expected 0 or 1 in every row.")
    treated = given.astype(bool)
    if min(treated.sum(), (~treated).sum()) < _FEWEST:
        raise ValueError(
            f"Expected {_FEWEST} rows or more with the offer and without, found {treated.sum()} and {(~treated).sum()}."
        )
    return earned, treated, table, np.unique(labels, return_inverse=True)[1].astype(np.int64)
