"""Who completes held-out bundles best, and how sure we may be: the table of scorers, baselines and their fusion.

Owns the protocol: what is fitted on what, which settings validation may choose, and that the test bundles are looked
at once. Sees encoders as the vectors they gave; knows nothing of how adapters are trained or stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from peft_combo import metrics
from peft_combo.data.model import Dataset
from peft_combo.data.queries import Questions
from peft_combo.data.splits import Split
from peft_combo.errors import PeftComboError
from peft_combo.evaluation.composition import CompositionReport, compare
from peft_combo.metrics.charts import Bar, Bars, draw
from peft_combo.recommender.category_calibration import Areas
from peft_combo.recommender.fit_data import Known, Rated, Tuned
from peft_combo.recommender.fitted_scorers import Fitted, FittedHead, FittedScorer, ItemVectors
from peft_combo.recommender.fusion import Fusion
from peft_combo.recommender.model_selection import (
    asked,
    best_text,
    blocks,
    families,
    picked_all,
)
from peft_combo.recommender.scorer_id import FROZEN, FUSION, PEER, RANDOM, ScorerId
from peft_combo.scoring.base import unit_rows
from peft_combo.scoring.text import TextCosine, tfidf_vectors

PROTOCOL = (
    "Every item of every held-out bundle once the answer, ranked among the whole catalogue without the rest of its "
    "bundle, ties at mid-rank. Scorers are fitted on training bundles alone, with the interactions of training users "
    'where validation prefers it; "bought before", "users alike" and "rated" read what the owner of a bundle took in '
    'these, nothing where users are held out as a whole, and "rated" may count the rest of the bundle as taken last. '
    "Settings and fusion weights are chosen on "
    "validation bundles; test bundles are scored once. 95 % intervals by bootstrap over groups; p by paired "
    "permutation of groups, two-sided."
)

_LIST = 10
_NEAR_DUPLICATE = 0.95
# Scores of the validation questions are held in memory for all rows at once: 1.5e8 float32 are 600 MB.
_HELD_CELLS = 150_000_000


@dataclass(frozen=True)
class Slice:
    """A part of the test questions.

    Attributes:
        p: of the difference in NDCG@10 to CEASE-TFIDF on these questions; None for that row itself.
    """

    questions: int
    ndcg: float
    recall: float
    p: float | None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: the scorer.
        setting: what validation chose for it; "" where there was no choice.
        valid_ndcg: NDCG@10 on validation, of the chosen setting and so a little flattered; for a fusion, of weights
            fitted on other clusters.
        values: the headline metrics on test. intervals: 95 %, of ``ndcg@10`` and ``r@10``.
        p: by the name of another row, of the difference in NDCG@10 to it.
        slices: by name, such as ``cold target`` or ``cross-leaf``.
        quality: of the lists of ten: ``coverage`` (share of the catalogue that some list holds), ``popularity`` (mean
            percentile of support, 50 is the middle item), ``diversity`` (1 - mean cosine of frozen vectors within a
            list), ``near-duplicates`` (share of pairs within a list with cosine above 0.95).
        fill_in: fill-in-the-blank, the share of questions whose answer is scored above three random items of its own
            slot (its own leaf where there are no slots), a tie counting in part; None where items have neither.
    """

    name: str
    setting: str
    valid_ndcg: float
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    p: dict[str, float]
    slices: dict[str, Slice]
    quality: dict[str, float]
    fill_in: float | None


@dataclass(frozen=True, eq=False)
class Answers:
    """What became of each test question, for further tests; not part of the JSON.

    Attributes:
        clusters: (Q,) the group of each question. slices: by name, (Q,) bool.
        ranks: per row (Q,), 1 = best. fill_ins: per row (Q,) in [0, 1]; NaN where there are no three others to choose.
    """

    clusters: NDArray[np.str_]
    slices: Mapping[str, NDArray[np.bool_]]
    ranks: Mapping[str, NDArray[np.float64]]
    fill_ins: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        lines: one per scorer, in the order of the table.
        fusion: as fitted on validation; its `table` holds what was tried.
        counts: items, bundles, questions and groups of the parts.
        notes: rows that are missing and why, and what was sampled.
        composition: how whole bundles are composed; None where it was not asked for.
    """

    dataset: str
    data_digest: str
    split_digest: str
    seed: int
    protocol: str
    counts: dict[str, int]
    lines: tuple[Row, ...]
    fusion: Fusion[ScorerId]
    notes: tuple[str, ...]
    answers: Answers = field(repr=False, compare=False)
    composition: CompositionReport | None = None

    def row(self, name: str) -> Row:
        """Return the line of that name.

        Raises:
            KeyError: there is none.
        """
        for line in self.lines:
            if line.name == name:
                return line
        raise KeyError(name)

    def rows(self) -> list[dict[str, Any]]:
        """Return the table as flat records, one per scorer."""
        return [
            {
                "name": line.name,
                "setting": line.setting,
                **line.values,
                "ndcg@10 low": line.intervals["ndcg@10"][0],
                "ndcg@10 high": line.intervals["ndcg@10"][1],
                **{f"p vs {name}": p for name, p in line.p.items()},
                **{f"{name} ndcg@10": part.ndcg for name, part in line.slices.items()},
                **line.quality,
                **({} if line.fill_in is None else {"fill-in": line.fill_in}),
            }
            for line in self.lines
        ]

    def to_json(self) -> dict[str, Any]:
        """Return everything but the single answers as JSON values; what could not be measured is None."""
        rows = [asdict(line) for line in self.lines]
        for row in rows:
            row["quality"] = {name: None if np.isnan(value) else value for name, value in row["quality"].items()}
        return {
            "dataset": self.dataset,
            "data_digest": self.data_digest,
            "split_digest": self.split_digest,
            "seed": self.seed,
            "protocol": self.protocol,
            "counts": self.counts,
            "rows": rows,
            "fusion": self.fusion.state(),
            "notes": list(self.notes),
            "composition": None if self.composition is None else self.composition.to_json(),
        }


def evaluate(
    dataset: Dataset,
    parts: Split,
    *,
    frozen: NDArray[np.float32] | None = None,
    tuned: Tuned | None = None,
    rated: Rated | None = None,
    areas: Areas | None = None,
    text: str = "{title}",
    seed: int = 0,
    max_questions: int = 5000,
    compose: bool = False,
    advance: Callable[[str], None] | None = None,
) -> Report:
    """Fit every scorer on train, choose on validation, measure on test once.

    Args:
        frozen: (N, D) vectors of the encoder without adapter; None leaves its rows out.
        tuned: per adapter its (N, D) item vectors and its head. They must have been tuned on ``parts.train``.
        rated: the same of rating adapters, which must not have seen the owners of test bundles: `rating_problem`.
        areas: which of them is for which items, see `Areas.of`; adds the row of all of them together.
        text: template of what the word-based rows read.
        seed: of sampling, bootstrap and permutations.
        max_questions: more test questions than so many are sampled, whole bundles at a time.
        compose: also compose whole bundles, see `composition`; takes as long again or longer.
        advance: told the name of each row that is done.
    Raises:
        PeftComboError: the split has no validation or no test bundles.
    """
    if not len(parts.valid) or not len(parts.test):
        raise PeftComboError(
            f"An evaluation needs validation and test bundles; the split of {dataset.name!r} has {len(parts.valid)} "
            f"and {len(parts.test)}. Raise data.valid_fraction and data.test_fraction."
        )
    advance = advance or (lambda name: None)
    n_items = len(dataset.catalog)
    notes: list[str] = []
    known = Known.of(dataset, parts.train, parts.train_interactions, text, frozen, tuned or {}, areas, rated)

    # What is asked.
    owners = {dataset.bundles.groups[row] for row in parts.valid}
    found = families(known, owners, seed)
    valid = asked(
        dataset, parts.valid, min(2000, max(100, _HELD_CELLS // (len(found) * n_items))), seed, "valid", notes
    )
    test = asked(dataset, parts.test, max_questions, seed, "test", notes)

    # Fit each row in each of its settings, and keep the one that is best on validation.
    picked = picked_all(found, valid, known, seed, advance, notes)
    asks = {name: one.fitted for name, one in picked.items()}
    settings = {name: one.setting for name, one in picked.items()}
    on_valid = {name: one.ndcg for name, one in picked.items()}

    # Fuse; the floor of the table has nothing to contribute.
    candidates = {name: one.scores for name, one in picked.items() if name != RANDOM}
    fusion = Fusion.fit(candidates, valid.targets, known.evidence(valid), valid.clusters, seed=seed)
    text_scorer = best_text(picked)
    side = picked[text_scorer].fitted if text_scorer else None
    picked.clear()
    candidates.clear()
    on_valid[FUSION] = next(line.ndcg for line in fusion.table if line.name == fusion.chosen)
    settings[FUSION] = fusion.chosen

    # Test, once.
    ranks, lists, fill_ins = _tested(asks, fusion, test, known, _choices(dataset, test, seed))
    advance(str(FUSION))
    sliced = _slices(dataset, known, test)
    vectors: ItemVectors = known.words if known.frozen is None else unit_rows(known.frozen)
    lines = tuple(
        Row(
            name=str(name),
            setting=settings[name],
            valid_ndcg=on_valid[name],
            values=metrics.ranking_metrics(found),
            intervals={
                metric: metrics.bootstrap_interval(metrics.per_query(found, metric), test.clusters, seed=seed)
                for metric in ("ndcg@10", "r@10")
            },
            p={
                str(other): _p(found, ranks[other], test.clusters, seed)
                for other in (PEER, FROZEN)
                if other in ranks and other != name
            },
            slices=_sliced(name, ranks, sliced, test.clusters, seed),
            quality=_quality(lists[name], known.support, vectors),
            fill_in=None if np.isnan(fill_ins[name]).all() else float(np.nanmean(fill_ins[name])),
        )
        for name, found in ranks.items()
    )
    counts = {
        "items": n_items,
        "train bundles": len(parts.train),
        "valid bundles": len(parts.valid),
        "test bundles": len(parts.test),
        "valid questions": len(valid),
        "test questions": len(test),
        "test groups": len(set(test.clusters.tolist())),
    }
    answers = Answers(
        test.clusters, sliced, {str(name): own for name, own in ranks.items()},
        {str(name): own for name, own in fill_ins.items()},
    )  # fmt: skip
    composition = None
    if compose:
        if side is None and frozen is not None:
            side = FittedHead.untuned(frozen)
        composition = compare(dataset, parts, known, asks, fusion, side, valid, test, seed, advance)
    return Report(
        dataset.name, dataset.digest, parts.digest, seed, PROTOCOL, counts, lines, fusion, tuple(notes), answers,
        composition,
    )  # fmt: skip


def _choices(dataset: Dataset, test: Questions, seed: int) -> NDArray[np.int64]:
    """Draw three wrong answers from the answer's slot (or leaf), none of its bundle: (Q, 3), -1 where there are not."""
    catalog = dataset.catalog
    kinds: Sequence[str | None] = catalog.slots
    if not any(kinds):
        kinds = [catalog.leaf(row) for row in range(len(catalog))]
    members: dict[str, list[int]] = {}
    for row, kind in enumerate(kinds):
        if kind:
            members.setdefault(kind, []).append(row)
    rng = np.random.default_rng(seed)
    drawn = np.full((len(test), 3), -1, np.int64)
    for place, (target, context) in enumerate(zip(test.targets, test.contexts, strict=True)):
        others = np.setdiff1d(members.get(kinds[target] or "", []), np.append(context, target))
        if len(others) >= 3:
            drawn[place] = rng.choice(others, 3, replace=False)
    return drawn


def _tested(
    asks: Mapping[ScorerId, Fitted], fusion: Fusion[ScorerId], test: Questions, known: Known, choices: NDArray[np.int64]
) -> tuple[dict[ScorerId, NDArray[np.float64]], dict[ScorerId, NDArray[np.int64]], dict[ScorerId, NDArray[np.float64]]]:
    """Score the test questions, a block at a time.

    Returns:
        per row the rank of each answer (Q,); the first ten of each list (Q, 10), -1 where fewer are known; how far each
        answer is picked out of its `choices` (Q,).
    """
    ranks: dict[ScorerId, list[NDArray[np.float64]]] = {name: [] for name in (*asks, FUSION)}
    lists: dict[ScorerId, list[NDArray[np.int64]]] = {name: [] for name in ranks}
    fill_ins: dict[ScorerId, list[NDArray[np.float64]]] = {name: [] for name in ranks}
    start = 0
    for part in blocks(test):
        scores = {name: ask(part) for name, ask in asks.items()}
        scores[FUSION] = fusion.combine(scores, known.evidence(part))
        excluded = part.excluded()
        offered = choices[start : start + len(part)]
        for name, values in scores.items():
            ranks[name].append(metrics.midranks(values, part.targets, excluded))
            lists[name].append(_first(values, part))
            fill_ins[name].append(_picked(values, part.targets, offered))
        start += len(part)
    return (
        {name: np.concatenate(found) for name, found in ranks.items()},
        {name: np.concatenate(found) for name, found in lists.items()},
        {name: np.concatenate(found) for name, found in fill_ins.items()},
    )


def _picked(scores: NDArray[np.float32], targets: NDArray[np.int64], choices: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return 1 where the answer is above all its choices, 1 / ties where level with the best, 0 below; NaN without."""
    values = np.where(np.isnan(scores), -np.inf, scores)
    mine = np.take_along_axis(values, targets[:, None], axis=1)
    others = np.take_along_axis(values, np.maximum(choices, 0), axis=1)
    found = np.where((others > mine).any(axis=1), 0.0, 1 / (1 + (others == mine).sum(axis=1)))
    return np.where(choices[:, 0] >= 0, found, np.nan)


def _first(scores: NDArray[np.float32], questions: Questions) -> NDArray[np.int64]:
    values = np.where(np.isnan(scores), -np.inf, scores)
    rows, places = np.nonzero(questions.contexts >= 0)
    values[rows, questions.contexts[rows, places]] = -np.inf
    depth = min(_LIST, values.shape[1])
    best = np.argpartition(-values, depth - 1, axis=1)[:, :depth]
    return np.where(np.isfinite(np.take_along_axis(values, best, axis=1)), best, -1)


def _slices(dataset: Dataset, known: Known, test: Questions) -> dict[str, NDArray[np.bool_]]:
    warm = known.support[test.targets] > 0
    sizes = (test.contexts >= 0).sum(axis=1) + 1
    parts = {"warm target": warm, "cold target": ~warm}
    if known.leaves is not None:
        same = np.concatenate(
            [known.evidence(part).same_leaf()[np.arange(len(part)), part.targets] for part in blocks(test)]
        )
        what = "leaf" if any(dataset.catalog.categories) else "slot"
        parts |= {f"same-{what}": same, f"cross-{what}": ~same}
    if known.areas is not None:
        crossing = known.areas.crossing(test.contexts, test.targets)
        parts |= {"same-category": ~crossing, "cross-category": crossing}
    return parts | {"size 2": sizes == 2, "size 3": sizes == 3, "size 4+": sizes >= 4}


def _sliced(
    name: ScorerId, ranks: Mapping[ScorerId, NDArray[np.float64]], parts: Mapping[str, NDArray[np.bool_]],
    clusters: NDArray[np.str_], seed: int,
) -> dict[str, Slice]:  # fmt: skip
    found = {}
    for part, chosen in parts.items():
        if chosen.any():
            mine = ranks[name][chosen]
            p = None
            if PEER in ranks and name != PEER:
                p = _p(mine, ranks[PEER][chosen], clusters[chosen], seed)
            found[part] = Slice(
                int(chosen.sum()),
                float(metrics.per_query(mine, "ndcg@10").mean()),
                float(metrics.per_query(mine, "r@10").mean()),
                p,
            )
    return found


def _p(a: NDArray[np.float64], b: NDArray[np.float64], clusters: NDArray[np.str_], seed: int) -> float:
    return metrics.paired_permutation(
        metrics.per_query(a, "ndcg@10"), metrics.per_query(b, "ndcg@10"), clusters, seed=seed
    )


def _quality(lists: NDArray[np.int64], support: NDArray[np.int64], vectors: ItemVectors) -> dict[str, float]:
    """Measure lists of ten; see `Row.quality`."""
    shown = lists[lists >= 0]
    if not shown.size:
        return {"coverage": 0.0, "popularity": float("nan"), "diversity": float("nan"), "near-duplicates": float("nan")}
    percentile = 100 * (stats.rankdata(support) - 0.5) / len(support)
    cosines = 0.0
    close = pairs = 0
    for rows in lists:
        members = rows[rows >= 0]
        if len(members) < 2:
            continue
        chosen: Any = vectors[members]
        product = chosen @ chosen.T
        alike = np.asarray(product if isinstance(product, np.ndarray) else product.toarray())
        alike = alike[np.triu_indices(len(members), 1)]
        cosines += float(alike.sum())
        close += int((alike > _NEAR_DUPLICATE).sum())
        pairs += len(alike)
    return {
        "coverage": len(np.unique(shown)) / len(support),
        "popularity": float(percentile[shown].mean()),
        "diversity": 1 - cosines / pairs if pairs else float("nan"),
        "near-duplicates": close / pairs if pairs else float("nan"),
    }


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


def canary(
    dataset: Dataset,
    parts: Split,
    *,
    frozen: NDArray[np.float32] | None = None,
    tuned: Tuned | None = None,
    text: str = "{title}",
    seed: int = 0,
    max_questions: int = 5000,
) -> Canary:
    """Shuffle texts between items; rows that read nothing else must fall to chance on the test questions.

    A row that does not has seen the answers somewhere else: in the order of the catalogue, in what was excluded, or in
    a history that holds the test bundles.
    """
    test = asked(dataset, parts.test, max_questions, seed, "test", [])
    order = np.random.default_rng(seed).permutation(len(dataset.catalog))
    history = dataset.bundles.to_csr(len(dataset.catalog), parts.train)
    vectors: dict[ScorerId, ItemVectors] = {ScorerId("TF-IDF title"): tfidf_vectors(dataset.catalog.texts(text))}
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
    chance = float(np.minimum(1, _LIST / (len(dataset.catalog) - sizes)).mean())
    right, shuffled = {}, {}
    for scorer, (own_ask, other_ask) in asks.items():
        found = []
        for ask in (own_ask, other_ask):
            ranks = [metrics.midranks(ask(part), part.targets, part.excluded()) for part in blocks(test)]
            found.append(metrics.per_query(np.concatenate(ranks), "r@10"))
        low, _ = metrics.bootstrap_interval(found[1], test.clusters, seed=seed)
        right[str(scorer)], shuffled[str(scorer)] = float(found[0].mean()), (float(found[1].mean()), low)
    return Canary(chance, right, shuffled, all(low <= chance for _, low in shuffled.values()))


def plot(report: Report, path: Path, metric: str = "ndcg@10") -> None:
    """Draw the rows as bars with their intervals: ``.html`` (nothing needed) or ``.png`` (extra `plot`).

    Raises:
        PeftComboError: another ending, or a PNG without matplotlib.
    """
    if metric not in ("ndcg@10", "r@10"):
        raise PeftComboError(f"A chart shows ndcg@10 or r@10, which have intervals; found {metric!r}.")
    bars = [
        Bar(line.name, line.values[metric], *line.intervals[metric], marked=line.name == str(FUSION))
        for line in report.lines
    ]
    title = f"{report.dataset}: {metric.upper()} on {report.counts['test questions']:,} test questions, 95 % intervals"
    made_of = f"data {report.data_digest[:12]}, split {report.split_digest[:12]}, seed {report.seed}"
    draw(Bars(title, bars, (report.protocol, made_of)), path)
