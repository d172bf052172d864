"""Negative sampling by popularity for the rating task, with the correction of its bias."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.events import Taken
from peft_combo.errors import DataError


class Negatives:
    """Draws items that a user did not take, the popular ones more often, and says by how much more often.

    Args:
        taken: (U, N) what each user is known to have taken; of train alone, or the draw would tell of held-out events.
        counts: (N,) train events of each item; an item is drawn in proportion to (count + 1) ** power.
    """

    def __init__(self, taken: Taken, counts: NDArray[np.int64], power: float) -> None:
        weight = (counts + 1.0) ** power
        self.share: NDArray[np.float64] = weight / weight.sum()
        self._upto = np.cumsum(self.share)
        self._n = taken.shape[1]
        rows, columns = taken.nonzero()
        self._cells = np.sort(rows.astype(np.int64) * self._n + columns)
        self._free_share = 1 - np.bincount(rows, weights=self.share[columns], minlength=taken.shape[0])
        self._free = self._n - np.bincount(rows, minlength=taken.shape[0])
        if len(full := np.flatnonzero(self._free <= 0)):
            raise DataError(
                f"{len(full)} users took every one of the {self._n} items, so there is nothing they declined. "
                "Give a larger catalogue, or leave these users out."
            )

    def draw(self, users: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw one item for each user, (M,) -> (M,), in proportion to its share among those the user did not take."""
        items = np.empty(len(users), np.int64)
        open_ = np.arange(len(users))
        while len(open_):
            drawn = np.minimum(np.searchsorted(self._upto, rng.random(len(open_)), "right"), self._n - 1)
            items[open_] = drawn
            open_ = open_[self._find_taken(users[open_], drawn)]
        return items

    def correction(self, users: NDArray[np.int64], items: NDArray[np.int64], each: int) -> NDArray[np.float32]:
        """Return what to add to the log-odds against one evenly drawn item, where `each` are drawn by share: (M,).

        Source: Yi et al. 2019, "Sampling-bias-corrected neural modeling", eq. 5, in the binary form of Gutmann and
            Hyvärinen 2010, "Noise-contrastive estimation", eq. 3: log-odds less the log of k times the noise.
        """
        drawn = self.share[items] / self._free_share[users]
        corrected: NDArray[np.float32] = -np.log(each * self._free[users] * drawn).astype(np.float32)
        return corrected

    def _find_taken(self, users: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.bool_]:
        cells = users * self._n + items
        if not len(self._cells):
            return np.zeros(len(cells), bool)
        place = np.minimum(np.searchsorted(self._cells, cells), len(self._cells) - 1)
        return np.asarray(self._cells[place] == cells)
