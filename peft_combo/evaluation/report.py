"""Report of an evaluation: one row per scorer with intervals, slices and list quality; JSON, flat records and chart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo.errors import PeftComboError
from peft_combo.evaluation.composition import CompositionReport
from peft_combo.evaluation.detection import DetectionReport
from peft_combo.metrics.charts import Bar, Bars, draw
from peft_combo.metrics.report import find_row
from peft_combo.recommender.fusion import Fusion
from peft_combo.recommender.scorer_id import FUSION, ScorerId


@dataclass(frozen=True)
class Slice:
    """A part of the test queries.

    Attributes:
        p: of the difference in NDCG@10 to CEASE-TFIDF on these queries; None for that row itself.
    """

    questions: int  # named so in the JSON
    ndcg: float
    recall: float
    p: float | None


@dataclass(frozen=True)
class CompletionRow:
    """One line of the table.

    Attributes:
        name: the scorer.
        setting: what validation chose for it; "" where there was no choice.
        valid_ndcg: NDCG@10 on validation, of the chosen setting and so a little flattered; for a fusion, of weights
            fitted on other groups.
        values: the headline metrics on test. intervals: 95 %, of ``ndcg@10`` and ``r@10``.
        p: by the name of another row, of the difference in NDCG@10 to it.
        slices: by name, such as ``cold target`` or ``cross-leaf``; ``cold among cold`` has cold candidates
            alone, ``among distractors`` the answer and the items that no bundle holds.
        quality: of the lists of ten: ``coverage`` (share of the catalogue that some list holds), ``popularity`` (mean
            percentile of support, 50 is the middle item), ``diversity`` (1 - mean cosine of frozen vectors within a
            list), ``near-duplicates`` (share of pairs within a list with cosine above 0.95).
        fill_in: fill-in-the-blank, the share of queries whose answer is scored above three random items of its own
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
class QueryResults:
    """What became of each test query, for further tests; not part of the JSON.

    Attributes:
        groups: (Q,) the group of each query. slices: by name, (Q,) bool.
        ranks: per row (Q,), 1 = best. fill_ins: per row (Q,) in [0, 1]; NaN where there are no three others to choose.
    """

    groups: NDArray[np.str_]
    slices: Mapping[str, NDArray[np.bool_]]
    ranks: Mapping[str, NDArray[np.float64]]
    fill_ins: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        lines: one per scorer, in the order of the table.
        fusion: as fitted on validation; its `table` holds what was tried.
        counts: items, bundles, queries and groups of the parts.
        notes: rows that are missing and why, and what was sampled.
        composition: how whole bundles are composed; None where it was not asked for.
        detection: how bundles are found in sessions; None where it was not asked for.
    """

    dataset: str
    data_digest: str
    split_digest: str
    seed: int
    protocol: str
    counts: dict[str, int]
    lines: tuple[CompletionRow, ...]
    fusion: Fusion[ScorerId]
    notes: tuple[str, ...]
    answers: QueryResults = field(repr=False, compare=False)
    composition: CompositionReport | None = None
    detection: DetectionReport | None = None

    def row(self, name: str) -> CompletionRow:
        """Return the line of that name; see `find_row`."""
        return find_row(self.lines, name)

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
            "detection": None if self.detection is None else self.detection.to_json(),
        }


def write_verdict(report: Report) -> str:
    """Say in one sentence how well the fusion completes bundles, and whether it beats those it is tested against."""
    line = report.row(str(FUSION))
    low, high = line.intervals["ndcg@10"]
    told: dict[str, list[str]] = {}
    for name, p in line.p.items():
        other, probability = report.row(name).values["ndcg@10"], f"p = {p:.4f}"
        better = line.values["ndcg@10"] > other
        word = "level with" if p >= 0.05 else "better than" if better else "worse than"
        told.setdefault(word, []).append(f"{name} ({other:.3f}, {probability})")
    compared = ", ".join(f"{word} {' and '.join(names)}" for word, names in told.items())
    best = max(report.lines, key=lambda one: one.values["ndcg@10"])
    ahead = "" if best is line else f"; the highest is {best.name} ({best.values['ndcg@10']:.3f})"
    return (
        f"The fusion has the missing item among its first ten for {line.values['r@10']:.0%} of the questions, NDCG@10 "
        f"{line.values['ndcg@10']:.3f} [{low:.3f}, {high:.3f}]{': ' if compared else ''}{compared}{ahead}."
    )


def plot(report: Report, path: Path, metric: str = "ndcg@10") -> None:
    """Draw the rows as bars with their intervals: ``.html`` or ``.png``.

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
