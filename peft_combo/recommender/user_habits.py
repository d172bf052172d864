"""Requests of a user alone: how much what they take again and again, and users with such habits, is worth there.

A fusion is weighed on bundles with one item missing, and says there what goes with the rest; asked with what a user
took last, it knows nothing of how often and how lately each of it was taken. Owns how the scorer of next baskets is
added to it for such requests, and that validation says by how much. Knows nothing of requests themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.data.model import Bundles
from peft_combo.data.queries import Queries, pad_contexts
from peft_combo.recommender.evidence import Evidence
from peft_combo.recommender.fit_data import FitData
from peft_combo.recommender.fitted_scorers import Fitted, build_next_basket
from peft_combo.recommender.fusion import Form, make_comparable

HISTORY = 5
"""So many of the items that a user took last are the context of a request that gives none; older ones say more about a
past than about what goes with a next purchase."""
_WEIGHTS = (1.0, 3.0, 10.0)
_FEWEST_USERS, _MOST_QUESTIONS = 20, 1_500


@dataclass(frozen=True, eq=False)
class UserHabits:
    """The scorer of next baskets beside a fusion.

    Attributes:
        fitted: what it says of queries. setting: of it. weight: of its comparable scores, > 0.
    """

    fitted: Fitted
    setting: str
    weight: float

    @classmethod
    def of(cls, known: FitData, setting: str, weight: float) -> Self:
        """Fit it on what is known."""
        return cls(build_next_basket(known, setting), setting, weight)

    def share(self, queries: Queries, evidence: Evidence, form: Form) -> NDArray[np.float32]:
        """Return what is added to fused scores: (Q, N), 0 where it cannot say."""
        values, has_score = make_comparable(self.fitted(queries), evidence, form)
        return np.where(has_score, np.float32(self.weight) * values, np.float32(0))


def choose_habits(
    known: FitData, bundles: Bundles, valid: NDArray[np.int32], fused: Fitted, fitted: Fitted, form: Form
) -> float:
    """Return the weight that is best on what validation users took for the first time, 0 where none is worth it.

    Asked is each such item of a validation bundle of a user who is known, given the items the user took last, among
    all the user never took. A weight has to gain more than a standard error of NDCG@10 over none; of those the best.

    Args:
        known: what the scorers were fitted on. fused: what the fusion says. fitted: what next baskets say.
    """
    if known.interactions is None:
        return 0.0
    queries, barred = _ask(known, bundles, valid)
    if len(set(queries.groups.tolist())) < _FEWEST_USERS:
        return 0.0
    gains: dict[float, list[NDArray[np.float64]]] = {weight: [] for weight in (0.0, *_WEIGHTS)}
    for start in range(0, len(queries), 256):
        part, evidence = (
            queries.take(slice(start, start + 256)),
            known.evidence(queries.take(slice(start, start + 256))),
        )
        scores, habit = fused(part), UserHabits(fitted, "", 1.0).share(part, evidence, form)
        for weight, own in gains.items():
            added = scores + np.float32(weight) * habit
            own.append(metrics.per_query(metrics.midranks(added, part.targets, barred[start : start + 256]), "ndcg@10"))
    values = {weight: np.concatenate(own) for weight, own in gains.items()}
    best = max(_WEIGHTS, key=lambda weight: float(values[weight].mean()))
    gain = values[best] - values[0.0]
    return best if gain.mean() > metrics.standard_error(gain, queries.groups) else 0.0


def find_alone(
    asked: Sequence[tuple[NDArray[np.int64], str | None]], taken: tuple[NDArray[np.int64], NDArray[np.int64]],
    user_rows: Mapping[str, int],
) -> NDArray[np.bool_]:  # fmt: skip
    """Tell which contexts are nothing but what their user took last: (Q,).

    Args:
        taken: of `Interactions.list_taken`.
    """
    items, starts = taken

    def is_last(context: NDArray[np.int64], user: str | None) -> bool:
        row = -1 if user is None else user_rows.get(user, -1)
        return row >= 0 and np.array_equal(context, items[starts[row] : starts[row + 1]][:HISTORY])

    return np.array([is_last(context, user) for context, user in asked], bool)


def _ask(known: FitData, bundles: Bundles, rows: NDArray[np.int32]) -> tuple[Queries, list[NDArray[np.int64]]]:
    """Return the questions, and per question what is no candidate."""
    assert known.interactions is not None
    items, starts = known.interactions.list_taken(len(known.catalog))
    contexts, targets, owners, barred = [], [], [], []
    for row in rows.tolist():
        user = known.user_rows.get(bundles.groups[row], -1)
        if user < 0:
            continue
        taken = items[starts[user] : starts[user + 1]]
        new = np.setdiff1d(bundles.items[row].astype(np.int64), taken)
        for target in new.tolist():
            contexts.append(taken[:HISTORY])
            targets.append(target)
            owners.append(bundles.groups[row])
            barred.append(np.concatenate([taken, new[new != target]]))
        if len(targets) >= _MOST_QUESTIONS:
            break
    none = np.zeros(len(targets), np.int64)
    return Queries(pad_contexts(contexts), np.array(targets, np.int64), np.array(owners, str), none), barred
