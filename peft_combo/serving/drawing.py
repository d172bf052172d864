"""Drawing of lists of single items by an exploration policy, with what is known of every item by now.

Owns which lists are drawn, what seeds them, and a memory of the state's counters of items, in front of it. How a list
is drawn from scores is `exploration`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from peft_combo.serving.exploration import CANDIDATES, Exploration, ExplorationPolicy, Thompson, explore, parse_policy
from peft_combo.serving.state import State
from peft_combo.serving.state.rows import LIST_ROUTES

_USUAL_VIEWS = 200.0  # the policy's own rate counts as if it had been found on so many


class ListDrawer:
    """Draws lists; safe to share between threads.

    Args:
        policy: as `parse_policy` reads it; None draws nothing, and rankings are shown as they are.
    """

    def __init__(self, policy: str | None, state: State) -> None:
        self._policy: ExplorationPolicy | None = None if policy is None else parse_policy(policy)
        self._state, self._seq = state, 0
        self._counts: dict[str, tuple[int, int]] = {}  # item -> rewarded, shown
        self._rewarded = self._shown = 0

    def refresh(self) -> None:
        """Read the counters that changed, where the policy goes by them; one thread at a time."""
        if not isinstance(self._policy, Thompson):
            return
        for row in self._state.item_counts_since(self._seq):
            rewarded, shown = self._counts.get(row.item_id, (0, 0))
            self._rewarded += row.rewarded - rewarded
            self._shown += row.shown - shown
            self._counts[row.item_id] = row.rewarded, row.shown
            self._seq = row.seq

    def draws(self, route: str, k: int) -> bool:
        """Tell whether a list is drawn."""
        return self._policy is not None and route in LIST_ROUTES and k <= CANDIDATES

    def draw(self, items: Sequence[str], scores: NDArray[np.float32], k: int, request_id: str) -> Exploration:
        """Draw a list of candidates, (N,) ids and scores; the same request, scores and counters give it again."""
        assert self._policy is not None
        policy = self._policy
        if isinstance(policy, Thompson):
            counts = np.array([self._counts.get(item, (0, 0)) for item in items], np.float64).reshape(-1, 2)
            rate = (self._rewarded + policy.rate * _USUAL_VIEWS) / (self._shown + _USUAL_VIEWS)
            policy = replace(policy, clicks=counts[:, 0], views=counts[:, 1], rate=min(rate, 0.99))
        # By a keyed hash, so that a client that chooses its request ids does not choose its lists.
        return explore(scores, k, policy, self._state.identify(f"list of request {request_id}"))
