"""Result tables: metric rows, gains with interval and p-value, and the before/after report of a run.

Knows numbers only: a task fills it, the command line prints it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from peft_combo.metrics.charts import Bar, Bars
from peft_combo.metrics.significance import bootstrap_interval, paired_permutation


class _Named(Protocol):
    @property
    def name(self) -> str: ...


NamedT = TypeVar("NamedT", bound=_Named)


def find_row(rows: Iterable[NamedT], name: str) -> NamedT:
    """Return the row of a table that has a name.

    Raises:
        KeyError: there is none.
    """
    for row in rows:
        if row.name == name:
            return row
    raise KeyError(name)


@dataclass(frozen=True)
class ResultRow:
    """One line of the table: how well somebody answers the held-out questions.

    Attributes:
        values: metric -> its value over all questions. interval: 95 % of the table's metric.
    """

    name: str
    values: dict[str, float]
    interval: tuple[float, float]


@dataclass(frozen=True)
class Gain:
    """The table's metric of the tuned over the frozen encoder, question by question.

    Attributes:
        p: two-sided paired test that exchanges whole groups.
    """

    value: float
    interval: tuple[float, float]
    p: float

    @classmethod
    def between(cls, before: NDArray[np.float64], after: NDArray[np.float64], clusters: NDArray[Any]) -> Self:
        """Compare the values of single questions: (Q,), (Q,), and (Q,) what may not be divided."""
        return cls(
            float((after - before).mean()),
            bootstrap_interval(after - before, clusters),
            paired_permutation(after, before, clusters),
        )


@dataclass(frozen=True, eq=False)
class PerQuestion:
    """The table's metric question by question, for a paired test with other runs.

    Attributes:
        clusters: (Q,) what may be drawn or exchanged only as a whole: the group of each question.
        before, after: (Q,) of the frozen and the tuned encoder; their means are the table's figures.
    """

    clusters: NDArray[np.str_]
    before: NDArray[np.float64]
    after: NDArray[np.float64]


@dataclass(frozen=True)
class Detail:
    """A further small table that a task has to show: the usual confusions, one line per class."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]


@dataclass(frozen=True)
class ResultTable:
    """What a run was worth.

    Attributes:
        metric: the one that intervals and gain are of.
        rows: baselines first, then the frozen encoder, then the tuned one.
        questions: how many were asked, in so many independent `groups`.
        asked: what the questions were, in words. caveat: what a reader should know of the figures.
        per_question: where the metric is a mean over validation questions; None for F1 and its like, and where the
            table is of test examples, by which nothing may be chosen.
    """

    metric: str
    rows: tuple[ResultRow, ...]
    gain: Gain
    questions: int
    groups: int
    asked: str
    caveat: str
    details: tuple[Detail, ...] = ()
    per_question: PerQuestion | None = field(default=None, repr=False, compare=False)

    def chart(self, title: str) -> Bars:
        """Return the rows as bars of the table's metric with their intervals, the tuned one marked."""
        return Bars(
            title,
            [
                Bar(row.name, row.values[self.metric], *row.interval, marked=row is self.after)
                for row in self.rows
                if self.metric in row.values
            ],
            (self.asked, self.caveat),
        )

    @property
    def baselines(self) -> tuple[ResultRow, ...]:
        """The rows of whoever needs no encoder."""
        return self.rows[:-2]

    @property
    def before(self) -> ResultRow:
        """The frozen encoder."""
        return self.rows[-2]

    @property
    def after(self) -> ResultRow:
        """The tuned encoder."""
        return self.rows[-1]
