"""Table of a comparison: means over seeds, intervals over queries, paired tests with Holm's correction.

Owns the statistics, the choice of a winner and the chart. Knows nothing of how a result came about.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.errors import PeftComboError
from peft_combo.evaluation.comparison.result import Result
from peft_combo.evaluation.comparison.variants import Variant
from peft_combo.metrics.charts import Plane, Point
from peft_combo.metrics.report import Gain
from peft_combo.metrics.significance import holm
from peft_combo.recipe.model import Recipe

SIGNIFICANT = 0.05
PROTOCOL = (
    "Means over the seeds. The interval and p are over questions, each averaged over the seeds, drawn and exchanged as "
    "whole groups; what another seed would change is the spread (standard deviation of the means). p: paired "
    "permutation against the best row, two-sided, corrected for the number of rows by Holm. Validation chose the step "
    "of each run and chooses between them, so the best row is flattered; the test data has no part in it."
)


@dataclass(frozen=True)
class Line:
    """One variant.

    Attributes:
        value: the metric on validation, mean over the seeds. by_seed: under each of them.
        interval: 95 %, over questions. spread: standard deviation over seeds. gain: over the frozen encoder. p: of the
            difference to the best, after Holm; each None where it cannot be said.
        adapter_parameters, head_parameters: numbers that are trained. stored_mib: the files of adapter and head.
        seconds: mean of a run. peak_mib: the most any run took.
        encode_ms, frozen_ms: by number of texts, median with the adapter and without. load_ms: to load the adapter.
    """

    label: str
    value: float
    by_seed: tuple[float, ...]
    interval: tuple[float, float] | None
    spread: float | None
    gain: Gain | None
    p: float | None
    adapter_parameters: int
    head_parameters: int
    stored_mib: float
    seconds: float
    peak_mib: float
    encode_ms: dict[int, float]
    frozen_ms: dict[int, float]
    load_ms: float

    def slowdown(self, size: int) -> float:
        """Return how many times longer so many texts take with the adapter than without; both were timed in turn."""
        return self.encode_ms[size] / self.frozen_ms[size]

    def cells(self) -> tuple[str, ...]:
        """Return the line as it stands in a table, the label first."""
        return (
            self.label,
            f"{self.value:.4f}",
            "" if self.interval is None else "{:.4f} to {:.4f}".format(*self.interval),
            "" if self.spread is None else f"{self.spread:.4f}",
            "" if self.gain is None else f"{self.gain.value:+.4f}",
            "" if self.p is None else f"{self.p:.4f}",
            f"{self.adapter_parameters:,}",
            f"{self.stored_mib:.2f}",
            f"{self.seconds / 60:.1f}",
            f"{self.peak_mib:,.0f}",
            *(f"{value:.1f} ({self.slowdown(size):.2f})" for size, value in self.encode_ms.items()),
            f"{self.load_ms:.0f}",
        )


@dataclass(frozen=True)
class Failed:
    """A variant without a figure, and why."""

    label: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        lines: the best first. failed: those without a figure.
        cheapest: the label with the fewest adapter parameters among the best and those not significantly worse; None
            where significance cannot be said.
        asked: what the questions were. machine: what the times were measured on.
        recipes: by label, as it was compared but for the seed.
        answers: by label the metric of each question, (Q,), mean over the seeds; clusters: (Q,) what may not be
            divided. Empty where the metric is no mean over questions.
    """

    metric: str
    seeds: tuple[int, ...]
    asked: str
    machine: str
    lines: tuple[Line, ...]
    failed: tuple[Failed, ...]
    cheapest: str | None
    recipes: Mapping[str, Recipe] = field(repr=False)
    answers: Mapping[str, NDArray[np.float64]] = field(repr=False, default_factory=dict)
    clusters: NDArray[np.str_] = field(repr=False, default_factory=lambda: np.array([], np.str_))

    @property
    def best(self) -> Line:
        """The line with the highest mean."""
        return self.lines[0]

    def against(self, label: str, others: Collection[str] | None = None) -> dict[str, Gain]:
        """Compare others with one row, question by question; p corrected for their number by Holm.

        Args:
            others: labels; None takes all.
        Raises:
            PeftComboError: the row has no answers to single questions.
        """
        if label not in self.answers:
            raise PeftComboError(
                f'There are no answers to single questions for "{label}". Known: {", ".join(self.answers) or "none"}.'
            )
        found = {
            other: Gain.between(self.answers[label], mine, self.clusters)
            for other, mine in self.answers.items()
            if other != label and (others is None or other in others)
        }
        corrected = holm([gain.p for gain in found.values()])
        return {other: replace(gain, p=p) for (other, gain), p in zip(found.items(), corrected, strict=True)}

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, recipes included."""
        return {
            "metric": self.metric,
            "seeds": list(self.seeds),
            "asked": self.asked,
            "machine": self.machine,
            "protocol": PROTOCOL,
            "rows": [asdict(line) for line in self.lines],
            "failed": {one.label: one.reason for one in self.failed},
            "best": self.best.label,
            "cheapest not significantly worse": self.cheapest,
            "recipes": {label: recipe.model_dump(mode="json") for label, recipe in self.recipes.items()},
        }


def comparison_of(
    variants: Sequence[Variant], results: Mapping[str, Sequence[Result]], failed: tuple[Failed, ...],
    seeds: tuple[int, ...],
) -> Comparison:  # fmt: skip
    """Put the results of the variants, by label and under the same seeds each, into one table.

    Raises:
        PeftComboError: they are not measured by the same metric.
    """
    first = results[variants[0].label][0]
    for variant in variants:
        other = results[variant.label][0]
        if (other.metric, other.clusters) != (first.metric, first.clusters):
            raise PeftComboError(
                f'"{variant.label}" ({other.metric}) is not measured as "{variants[0].label}" is ({first.metric}), or '
                "not on the same questions; the two cannot be compared."
            )
    means = {one.label: float(np.mean([run.value for run in results[one.label]])) for one in variants}
    order = sorted(means, key=lambda label: -means[label])
    after = {label: _mean_answers([run.after for run in results[label]]) for label in order}
    corrected = _against_the_best(after, first.clusters, order)
    lines = tuple(_line(label, results[label], after[label], corrected.get(label)) for label in order)
    not_worse = [line for line in lines if line is lines[0] or (line.p is not None and line.p > SIGNIFICANT)]
    cheapest = min(not_worse, key=lambda line: (line.adapter_parameters, -line.value)).label
    return Comparison(
        metric=first.metric,
        seeds=seeds,
        asked=first.asked,
        machine=first.machine,
        lines=lines,
        failed=failed,
        cheapest=cheapest if first.clusters is not None else None,
        recipes={variant.label: variant.recipe for variant in variants},
        answers={label: one for label, one in after.items() if one is not None},
        clusters=np.array(first.clusters or (), np.str_),
    )


def _mean_answers(answers: Sequence[tuple[float, ...] | None]) -> NDArray[np.float64] | None:
    known = [one for one in answers if one is not None]
    return np.mean(np.array(known, np.float64), axis=0) if len(known) == len(answers) else None


def _against_the_best(
    after: Mapping[str, NDArray[np.float64] | None], clusters: Sequence[str] | None, order: Sequence[str]
) -> dict[str, float]:
    best, others = after[order[0]], order[1:]
    if best is None or clusters is None:
        return {}
    ps = []
    for label in others:
        mine = after[label]
        assert mine is not None
        ps.append(metrics.paired_permutation(mine, best, np.array(clusters)))
    return dict(zip(others, holm(ps), strict=True))


def _line(label: str, runs: Sequence[Result], after: NDArray[np.float64] | None, p: float | None) -> Line:
    values = [run.value for run in runs]
    before = _mean_answers([run.before for run in runs])
    interval, gain = None, None
    if after is not None and before is not None:
        clusters = np.array(runs[0].clusters)
        interval = metrics.bootstrap_interval(after, clusters)
        gain = Gain.between(before, after, clusters)
    return Line(
        label=label,
        value=float(np.mean(values)),
        by_seed=tuple(values),
        interval=interval,
        spread=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        gain=gain,
        p=p,
        adapter_parameters=runs[0].adapter_parameters,
        head_parameters=runs[0].head_parameters,
        stored_mib=runs[0].stored_bytes / 2**20,
        seconds=float(np.mean([run.seconds for run in runs])),
        peak_mib=max(run.peak_mib for run in runs),
        encode_ms={size: float(np.mean([run.encode_ms[size] for run in runs])) for size in runs[0].encode_ms},
        frozen_ms={size: float(np.mean([run.frozen_ms[size] for run in runs])) for size in runs[0].frozen_ms},
        load_ms=float(np.mean([run.load_ms for run in runs])),
    )


def chart(comparison: Comparison) -> Plane:
    """Draw quality, with its interval, against the adapter's parameters; none counts as one."""
    points = [
        Point(
            line.label, max(1, line.adapter_parameters), line.value, *(line.interval or (line.value, line.value)),
            marked=line is comparison.best,
        )
        for line in comparison.lines
    ]  # fmt: skip
    seeds = ", ".join(map(str, comparison.seeds))
    return Plane(
        title=f"{comparison.metric.upper()} on validation against trained parameters, 95 % intervals, seeds {seeds}",
        x_label="parameters of the adapter, logarithmic; the head's, equal for all, are not counted",
        y_label=comparison.metric,
        points=points,
        notes=(comparison.asked + ".", PROTOCOL, comparison.machine),
    )
