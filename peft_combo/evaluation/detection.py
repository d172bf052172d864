"""Evaluation of bundle detection: which bundles of held-out users' sessions are found, and by whom.

Owns the protocol of that comparison and its table. Detectors are fitted and their grouping chosen on the sessions of
training users; no session of a held-out user is seen before it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.data.model import Dataset
from peft_combo.data.sessions import LabelledSession, list_sessions
from peft_combo.data.splits import Split
from peft_combo.errors import PeftComboError
from peft_combo.metrics.detection import SetMatch, match_sets
from peft_combo.metrics.report import find_row
from peft_combo.recommender.bundle_detection import Aim, BundleDetector
from peft_combo.recommender.fit_data import FitData

PROTOCOL = (
    "For each session of a held-out user its items in the catalogue are given, and the bundles hidden in it are asked "
    "for. A predicted bundle is a hit where a true one holds all of it. Precision is the share of predicted bundles "
    "that are hits, recall the share of true bundles that hold a predicted one, both a mean over sessions; coverage is "
    "the mean over hits of the hit's size over that of the smallest true bundle that holds it. Jaccard is the mean "
    "over true bundles of the most that any predicted one shares with it; agreement its harmonic mean with the same "
    "seen from the predicted bundles, a mean over sessions. Detectors are fitted, and their grouping chosen out of "
    "fold, on sessions of training users; the one of bundles alone on sessions made up of training bundles. 95 % "
    "intervals by bootstrap over users; p by paired permutation of users, two-sided, of the difference in agreement "
    "to the first row."
)
VALUES = ("precision", "recall", "coverage", "jaccard", "agreement")
DETECTOR, SURE, ALONE, CLOSEST, WHOLE = (
    "detector", "detector, sure", "detector of bundles alone", "closest pair by TF-IDF", "all items as one bundle",
)  # fmt: skip


@dataclass(frozen=True)
class DetectionRow:
    """One line of the table.

    Attributes:
        name: who detects. setting: how it groups and what it learned from; "" for a baseline.
        values: by `VALUES`; coverage is missing where nothing was hit. intervals: 95 %. predicted: bundles a session.
        p: of the difference in agreement to the first row; None for that row itself.
    """

    name: str
    setting: str
    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    predicted: float
    p: float | None


@dataclass(frozen=True)
class DetectionReport:
    """What the comparison found.

    Attributes:
        part: which sessions were measured. sessions: how many, of so many `users`, with so many true `bundles`.
    """

    protocol: str
    part: str
    sessions: int
    users: int
    bundles: int
    rows: tuple[DetectionRow, ...]

    def row(self, name: str) -> DetectionRow:
        """Return the line of that name; see `find_row`."""
        return find_row(self.rows, name)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Detections:
    """What every way predicts for the sessions of one split.

    Attributes:
        sessions: that were asked. predicted: by row, per session its groups of rows. settings: by row, how it
            groups and what it learned from.
    """

    sessions: tuple[LabelledSession, ...]
    predicted: dict[str, list[list[frozenset[int]]]]
    settings: dict[str, str]


def check_sessions(dataset: Dataset) -> None:
    """Refuse a dataset without sessions, before anything is fitted.

    Raises:
        PeftComboError: it has none.
    """
    if dataset.sessions is None:
        raise PeftComboError(
            f"{dataset.name!r} has no sessions to detect bundles in: expected session_item.csv, session_bundle.csv and "
            "user_session.csv beside the files of a BundleRec folder. Leave --sessions out."
        )


def detect_held_out(
    dataset: Dataset,
    parts: Split,
    known: FitData,
    part: Literal["valid", "test"] = "test",
    *,
    seed: int = 0,
    advance: Callable[[str], None] | None = None,
) -> Detections:
    """Detect the bundles of held-out sessions in every way there is.

    Args:
        known: of the training bundles alone.
        advance: told the name of each detector that is fitted.
    Raises:
        PeftComboError: the dataset has no sessions, or none in this part whose bundles are known.
    """
    check_sessions(dataset)
    sessions = list_sessions(dataset, parts, part)
    if not sessions:
        raise PeftComboError(f"No session of {dataset.name!r} has all its bundles in the {part} part of the split.")
    predicted: dict[str, list[list[frozenset[int]]]] = {}
    settings: dict[str, str] = {}
    ways: tuple[tuple[bool, tuple[tuple[str, Aim], ...]], ...] = (
        (False, ((DETECTOR, "whole"), (SURE, "sure"))),
        (True, ((ALONE, "whole"),)),
    )
    for alone, rows in ways:
        detector = BundleDetector.fit(known, dataset, parts, alone=alone, seed=seed)
        for name, aim in rows:
            predicted[name] = [[frozenset(found.rows) for found in detector.detect(one.items, aim)] for one in sessions]
            settings[name] = f"{detector.groupings[aim]}; {detector.source}"
            if advance is not None:
                advance(name)
    predicted[CLOSEST] = [[_find_closest(known, one.items)] for one in sessions]
    predicted[WHOLE] = [[frozenset(one.items.tolist())] for one in sessions]
    return Detections(tuple(sessions), predicted, settings)


def compare_detections(found: Sequence[Detections], part: str, seed: int = 0) -> DetectionReport:
    """Measure the detections of one split, or of several together: a user of two splits is one user.

    Args:
        part: which sessions they are of, in words.
    """
    sessions = [one for own in found for one in own.sessions]
    groups = np.array([one.group for one in sessions])
    rows: list[DetectionRow] = []
    first: NDArray[np.float64] | None = None
    for name in found[0].predicted:
        predicted = [mine for own in found for mine in own.predicted[name]]
        matches = [match_sets(mine, one.bundles) for mine, one in zip(predicted, sessions, strict=True)]
        agreement = np.array([one.agreement for one in matches])
        measured = _collect_values(matches, groups)
        rows.append(
            DetectionRow(
                name,
                " | ".join(dict.fromkeys(own.settings.get(name, "") for own in found)),
                {value: float(own.mean()) for value, (own, _) in measured.items()},
                {value: metrics.bootstrap_interval(own, of, seed=seed) for value, (own, of) in measured.items()},
                float(np.mean([len(mine) for mine in predicted])),
                None if first is None else metrics.paired_permutation(agreement, first, groups, seed=seed),
            )
        )
        first = agreement if first is None else first
    return DetectionReport(
        PROTOCOL, part, len(sessions), len(set(groups.tolist())), sum(len(one.bundles) for one in sessions),
        tuple(rows),
    )  # fmt: skip


def _collect_values(
    matches: Sequence[SetMatch], groups: NDArray[np.str_]
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.str_]]]:
    """Return by `VALUES` what was measured and the user of each; of coverage one value for each hit, if any."""
    found = {
        value: (np.array([getattr(one, value) for one in matches], np.float64), groups)
        for value in VALUES
        if value != "coverage"
    }
    shares = np.array([share for one in matches for share in one.coverage], np.float64)
    if len(shares):
        found["coverage"] = (shares, np.repeat(groups, [len(one.coverage) for one in matches]))
    return found


def _find_closest(known: FitData, items: NDArray[np.int64]) -> frozenset[int]:
    """Return the two items whose words are most alike by TF-IDF; of equals the first pair."""
    words = known.words[items]
    alike = (words @ words.T).toarray()
    alike[np.tril_indices(len(items))] = -1.0
    left, right = np.unravel_index(alike.argmax(), alike.shape)
    return frozenset((int(items[left]), int(items[right])))
