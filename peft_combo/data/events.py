"""User-item events: who took or rated what and when, divided by user or by time."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.data.model import Interactions
from peft_combo.errors import DataError
from peft_combo.recipe.model import DataConfig
from peft_combo.recipe.task import RatingTask

Taken: TypeAlias = "sparse.csr_array[Any, tuple[int, int]]"
"""(U, N) float32, 1 where the user took the item."""


@dataclass(frozen=True, eq=False)
class Events:
    """Who took (or rated) what, every user and item once, at the first time.

    Attributes:
        users, items: (E,) places in `Interactions.user_ids` and rows of the catalogue.
        times: (E,) seconds. targets: (E,) float32 in [0, 1].
        liked: (L,) items of the events that count as liked, in the same order.
        spans: (E, 2) from where to where in `liked` stands what the user liked strictly earlier.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    times: NDArray[np.float64]
    targets: NDArray[np.float32]
    liked: NDArray[np.int64]
    spans: NDArray[np.int64]

    @classmethod
    def of(cls, interactions: Interactions, config: RatingTask) -> Events:
        """Make the events of known users, in order of user and time.

        Raises:
            DataError: an interaction has no time, so nobody can say what came before it.
        """
        known = interactions.take((interactions.users >= 0) & ((interactions.weights > 0) | (not config.implicit)))
        if unknown := int(np.isnan(known.times).sum()):
            raise DataError(
                f"Ratings need a timestamp on every interaction; {unknown:,} of {len(known):,} have none. "
                "Give interactions a timestamp column."
            )
        order = np.lexsort((known.items, known.times, known.users))
        pairs = known.users[order].astype(np.int64) * (int(interactions.items.max(initial=0)) + 1) + known.items[order]
        order = order[np.sort(np.unique(pairs, return_index=True)[1])]
        users, items = known.users[order].astype(np.int64), known.items[order].astype(np.int64)
        times, targets = known.times[order], read_rated(known.weights[order], config)
        moments, moment = np.unique(times, return_inverse=True)
        place = users * len(moments) + moment  # ascending
        liked = targets >= 0.5
        spans = [np.searchsorted(users[liked], users), np.searchsorted(place[liked], place)]
        return cls(users, items, times, targets, items[liked], np.stack(spans, 1).astype(np.int64))

    def __len__(self) -> int:
        return len(self.users)

    @property
    def asked(self) -> NDArray[np.bool_]:
        """(E,) whether there is a history to tell from."""
        return np.asarray(self.spans[:, 1] > self.spans[:, 0])

    def histories(self, rows: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
        """Return what the users of these events liked earlier, latest first: (Q, longest) items, -1 for none."""
        first, stop = self.spans[rows].T
        return self._latest(first, stop, longest)

    def pasts(self, users: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
        """Return what users, -1 for none, liked up to now, latest first: (Q, longest) items, -1 for none."""
        likers = self.users[self.targets >= 0.5]
        return self._latest(np.searchsorted(likers, users), np.searchsorted(likers, users, "right"), longest)

    def build_liked(self, rows: NDArray[np.int64], shape: tuple[int, int]) -> Taken:
        """Return (U, N) float32 with a 1 where one of these events is that the user liked the item."""
        return self.matrix(rows[self.targets[rows] >= 0.5], shape)

    def matrix(self, rows: NDArray[np.int64], shape: tuple[int, int]) -> Taken:
        """Return (U, N) float32 with a 1 where one of these events is the user's with the item."""
        return sparse.csr_array((np.ones(len(rows), np.float32), (self.users[rows], self.items[rows])), shape=shape)

    def _latest(self, first: NDArray[np.int64], stop: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
        back = stop[:, None] - 1 - np.arange(longest)  # (Q, S)
        return np.where(back >= first[:, None], np.append(self.liked, -1)[np.maximum(back, -1)], -1)


@dataclass(frozen=True, eq=False)
class Parts:
    """Rows of `Events` per part; no row is in two, and every one has a history.

    Attributes:
        seen: all train events, also those without a history: what popularity and item-kNN count.
    """

    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    test: NDArray[np.int64]
    seen: NDArray[np.int64]
    digest: str


def split_events(events: Events, user_ids: tuple[str, ...], config: DataConfig) -> Parts:
    """Divide events by user, or by time.

    By "user", all events of a user go to one part. By "time", the latest are held out: train ends strictly before
    validation begins and validation before test, for all users alike, so nothing learned comes from after a question.

    Raises:
        DataError: the split is neither, or a part would be empty.
    """
    valid, test = config.valid_fraction, config.test_fraction
    if config.split == "user":
        keys = [f"{config.split_seed}:{user}".encode("utf-8", "surrogatepass") for user in user_ids]
        drawn = np.array([int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64 for key in keys])
        place = drawn[events.users]
        part = np.where(place < test, "test", np.where(place < test + valid, "valid", "train"))
    elif config.split == "time":
        ordered, count = np.sort(events.times), len(events)
        starts = [int(count * (1 - test)), int(count * (1 - test - valid))]
        test_start, valid_start = (ordered[start] if count else np.inf for start in starts)
        part = np.where(events.times >= test_start, "test", np.where(events.times >= valid_start, "valid", "train"))
    else:
        raise DataError(
            f"Ratings are split by user or time, found data.split: {config.split}. Set data.split to user or time."
        )
    rows = {name: np.flatnonzero((part == name) & events.asked) for name in ("train", "valid", "test")}
    if empty := [name for name, own in rows.items() if not len(own)]:
        raise DataError(
            f"Too few events to split by {config.split}: none with an earlier one of the same user is left for "
            f"{' and '.join(empty)}. Give more interactions, or larger data.valid_fraction and data.test_fraction."
        )
    digest = hashlib.sha256(f"peft-combo rating split 1\n{config.split}\n".encode())
    for own in rows.values():
        digest.update(f"{len(own)}\n".encode() + own.astype("<i8").tobytes())
    return Parts(rows["train"], rows["valid"], rows["test"], np.flatnonzero(part == "train"), digest.hexdigest())


def read_rated(weights: NDArray[np.float32], config: RatingTask) -> NDArray[np.float32]:
    """Turn what interactions weigh into targets in [0, 1]: 1 for all, ratings on their scale, or liked and not."""
    if config.implicit:
        return np.ones(len(weights), np.float32)
    if config.like_from is not None:
        return np.asarray(weights >= config.like_from, np.float32)
    low, high = config.scale
    return np.asarray(np.clip((weights - low) / (high - low), 0, 1), np.float32)
