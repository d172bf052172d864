"""Rating scorer: how likely users are to take each item, from what they took and what lies beside it.

Owns how a head is put over a catalogue and the interactions that may be seen there, and how it answers the queries
that completions are measured by. Knows nothing of tuning, fusion or stores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from peft_combo.data.events import Events
from peft_combo.data.model import Dataset, Interactions
from peft_combo.data.queries import Queries
from peft_combo.encoder.heads.completion import project_targets
from peft_combo.encoder.heads.rating import RatingHead
from peft_combo.errors import DataError, did_you_mean
from peft_combo.scoring.features import Counted


@dataclass(frozen=True, eq=False)
class Rater:
    """A rating head over a catalogue.

    Attributes:
        vectors: (N, D) of the head's encoder. targets: (N, D) what the head makes of them.
        counted: popularity and neighbours of the interactions that may be seen.
        events: these interactions. user_rows: the row of each user in them.
    """

    vectors: NDArray[np.float32]
    head: RatingHead
    targets: NDArray[np.float32]
    counted: Counted
    events: Events
    user_rows: Mapping[str, int]

    @classmethod
    def of(cls, vectors: NDArray[np.float32], head: RatingHead, interactions: Interactions | None) -> Rater:
        """Count what may be seen.

        Args:
            interactions: those that may be seen and no others.
        Raises:
            DataError: there are none, or they have no times.
        """
        if interactions is None or not len(interactions):
            raise DataError("Ratings are told from interactions, and there are none that may be seen. Add the table.")
        events = Events.of(interactions, head.config)
        shape = (len(interactions.user_ids), len(vectors))
        counted = Counted.of_events(events, np.arange(len(events)), shape, head.config.neighbours)
        rows = {user: row for row, user in enumerate(interactions.user_ids)}
        return cls(vectors, head, project_targets(head.towers, vectors), counted, events, rows)

    def pasts(self, users: Sequence[str] | NDArray[np.str_]) -> NDArray[np.int64]:
        """Return what users liked, latest first: (Q, S) rows, -1 for none; a stranger liked nothing."""
        rows = np.array([self.user_rows.get(str(user), -1) for user in users], np.int64)
        return self.events.pasts(rows, self.head.config.history)

    def __call__(self, histories: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return calibrated log-odds: (Q, S) rows, -1 for none -> (Q, N); NaN where a history is empty."""
        scores = np.full((len(histories), len(self.vectors)), np.nan, np.float32)
        told = (histories >= 0).any(axis=1)
        if told.any():
            scores[told] = self.head.scores(self.vectors, histories[told], self.counted, self.targets)
        return scores


@dataclass(frozen=True, eq=False)
class FittedRating:
    """A rating adapter as a scorer of completions; NaN where there is nothing to score by.

    Attributes:
        beside: whether the items of the query count as taken last, before the owner's past; else the past alone
            speaks.
    """

    rater: Rater
    beside: bool

    def __call__(self, queries: Queries) -> NDArray[np.float32]:
        pasts = self.rater.pasts(queries.groups)
        return self.rater(
            prepend_items(queries.contexts, pasts, self.rater.head.config.history) if self.beside else pasts
        )


def prepend_items(latest: NDArray[np.int64], pasts: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """Put items before pasts, each item once and at most `longest` in all: (Q, C) and (Q, S) -> (Q, C + S).

    What is too much or stands there twice becomes -1; the order of what is left is that of time, latest first.
    """
    again = (pasts[:, :, None] == latest[:, None, :]).any(axis=2)
    whole = np.concatenate([latest, np.where(again, -1, pasts)], axis=1)
    there = whole >= 0
    return np.where(there & (np.cumsum(there, axis=1) <= longest), whole, -1)


@dataclass(frozen=True)
class RatedItem:
    """How likely somebody is to take an item.

    Attributes:
        probability: that the item is the one taken, beside one evenly drawn from what was not (implicit feedback); the
            expected rating from 0 to 1 (explicit).
    """

    item_id: str
    title: str
    probability: float


def rate(
    rater: Rater, dataset: Dataset, *, liked: Sequence[str] = (), user: str | None = None, items: Sequence[str] = (),
    k: int = 10,
) -> list[RatedItem]:  # fmt: skip
    """Tell how likely somebody is to take items.

    Args:
        liked: ids or titles of what they liked, latest first; counts as later than what is known of `user`.
        user: outside id.
        items: ids or titles of what is rated, in this order; without any the `k` most likely items come, best first,
            without what was liked or is known to be taken.
    Raises:
        DataError: an item or user is not known, or there is nothing to go by.
    """
    catalog = dataset.catalog
    latest = _rows(dataset, liked)
    if user is not None and user not in rater.user_rows:
        close = did_you_mean(user, rater.user_rows)
        raise DataError(f'No user "{user}" among the {len(rater.user_rows):,} of {dataset.name}. {close}'.rstrip())
    history = prepend_items(latest[None], rater.pasts([user or ""]), rater.head.config.history)
    scores = rater(history)[0]
    if np.isnan(scores).all():
        raise DataError("Nothing to go by: give items that were liked, or a user who liked any.")
    if items:
        rows = _rows(dataset, items)
    else:
        taken = rater.events.items[rater.events.users == rater.user_rows[user]] if user is not None else latest[:0]
        scores[np.concatenate([latest, taken])] = -np.inf
        rows = np.argsort(-scores, kind="stable")[:k]
        rows = rows[np.isfinite(scores[rows])]
    return [RatedItem(catalog.item_ids[row], catalog.titles[row], float(expit(scores[row]))) for row in rows]


def _rows(dataset: Dataset, names: Sequence[str]) -> NDArray[np.int64]:
    """Return the rows of items given by id or, where that is no id, by title."""
    index = dataset.catalog.index
    titles: dict[str, int] = {}
    if not all(name in index for name in names):
        titles = {_fold_title(title): row for row, title in reversed(list(enumerate(dataset.catalog.titles)))}
    rows = []
    for name in names:
        row = index.get(name, titles.get(_fold_title(name)))
        if row is None:
            close = did_you_mean(name, [*index, *dataset.catalog.titles])
            raise DataError(
                f'No item with the id or title "{name}" among the {len(index):,} of {dataset.name}. {close}'.rstrip()
            )
        rows.append(row)
    return np.array(list(dict.fromkeys(rows)), np.int64)


def _fold_title(title: str) -> str:
    return " ".join(title.casefold().split())
