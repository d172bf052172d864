"""Bundle generation item by item: beam search over catalogue rows with a head's probabilities.

Owns the search: which partial bundles are kept, how probable each is, and that no item comes twice. Knows rows, scores
and which rows may follow; nothing of texts, constraints or how the scores came about (`build_steps` asks a head).

A bundle is a set and may be written in any order, so what is kept are sets: the probability of one is the sum over all
orders of writing it that the search has met. With a beam as wide as the number of sets it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special

from peft_combo.data.queries import pad_contexts
from peft_combo.encoder.heads.completion import CompletionHead, encode_contexts, project_targets, step_scale
from peft_combo.encoder.heads.sequence import SequenceHead

Rows: TypeAlias = "NDArray[np.int64]"
Steps: TypeAlias = Callable[[Sequence[Rows]], "tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]] | None]"]
"""S sets of ascending rows, which may be empty -> (S, N) log-odds of what comes next, up to a constant in each row and
NaN where it cannot say; and (S,) log-odds that a set is complete, None from whoever cannot judge that."""

# Differences of log-probabilities below this come from the order of additions, and do not break ties.
_DIGITS = 9


@dataclass(frozen=True, eq=False)
class Sizes:
    """Any allowed rows, so many of them.

    Attributes:
        allowed: (N,). low, high: fewest and most rows to add; equal where the size is told.
    """

    allowed: NDArray[np.bool_]
    low: int
    high: int

    def followers(self, added: Sequence[int]) -> NDArray[np.bool_]:
        """Which rows may come after those added, (N,), so that a bundle can still be completed."""
        return self.allowed if len(added) < self.high else np.zeros_like(self.allowed)

    def complete(self, added: Sequence[int]) -> bool:
        """Whether a bundle may end here."""
        return len(added) >= self.low


@dataclass(frozen=True)
class Generated:
    """A bundle that was written.

    Attributes:
        added: the new rows, ascending. log_probability: natural; of adding these and no more, in any order.
    """

    added: tuple[int, ...]
    log_probability: float


def generate(
    steps: Steps,
    context: Sequence[int],
    limits: Sizes,
    *,
    beam: int = 16,
    count: int = 1,
    copies: NDArray[np.int64] | None = None,
) -> list[Generated]:
    """Write the most probable bundles that hold the context.

    At each step the rows that may follow, and the end where a bundle may end, share the probability; where nothing may
    follow, the end has it all. So where the size is told, the end plays no part; where it is open, a short bundle is as
    a rule the most probable, for every further item is one of many.

    Args:
        steps: asked once a step for all sets that are kept.
        context: distinct rows that are there already; may be empty if `steps` knows what to make of nothing.
        limits: hard; rows already held are never followers, whatever it says.
        beam: sets kept a step; 1 is greedy search.
        count: bundles wanted.
        copies: (N,) equal numbers for rows of which a bundle may hold one only; None looks at the rows alone.
    Returns:
        at most `count` distinct bundles, the most probable first, equally probable ones by their rows; fewer, or none,
        where the search ends without finding them.
    Raises:
        ValueError: beam or count is below 1; the size is open and `steps` cannot tell when a bundle is complete.
    Source: Graves 2012, "Sequence transduction with recurrent neural networks", section 3: beam search that adds up the
        ways which lead to the same result.
    """
    if beam < 1 or count < 1:
        raise ValueError(f"beam and count must be at least 1, found {beam} and {count}.")
    alive: dict[tuple[int, ...], float] = {(): 0.0}
    finished: list[Generated] = []
    while alive:
        following: dict[tuple[int, ...], _Ways] = {}
        for added, (rows, scores, end) in _score_next(steps, context, limits, copies, list(alive)).items():
            so_far = alive[added]
            if limits.complete(added):
                if not len(rows):
                    finished.append(Generated(added, so_far))
                elif end is None:
                    raise ValueError("whoever scores cannot tell when a bundle is complete: ask for one size.")
                else:
                    finished.append(Generated(added, so_far + float(special.log_expit(end))))
                    so_far += float(special.log_expit(-end))
            logs = scores.astype(np.float64)
            following[added] = _Ways(rows, so_far + (special.log_softmax(logs) if len(rows) else logs))
        finished.sort(key=_rank)
        del finished[count:]
        alive = _keep_best(following, beam)
        # All that is still to come shares what the sets alive have left.
        if len(finished) == count and alive and finished[-1].log_probability >= special.logsumexp(list(alive.values())):
            break
    return finished


def build_steps(head: CompletionHead, vectors: NDArray[np.float32]) -> Steps:
    """Let a head say what comes next in a catalogue, by its softmax over all items.

    Args:
        head: in evaluation mode. That of the sequence task also judges what is complete, and begins from nothing.
        vectors: (N, D) item vectors of its encoder.
    """
    targets = project_targets(head, vectors)
    scale = float(step_scale(head).detach())

    @torch.inference_mode()
    def steps(sets: Sequence[Rows]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        queries = encode_contexts(head, vectors, pad_contexts(sets))  # (S, D)
        ends = None
        if isinstance(head, SequenceHead):
            sizes = torch.tensor([len(rows) for rows in sets], device=queries.device)
            ends = head.completeness(queries, sizes).float().cpu().numpy()
        items: NDArray[np.float32] = queries.float().cpu().numpy() @ targets.T  # (S, D) @ (D, N) -> (S, N)
        return items * scale, ends

    return steps


def _score_next(
    steps: Steps, context: Sequence[int], limits: Sizes, copies: NDArray[np.int64] | None,
    sets: Sequence[tuple[int, ...]],
) -> dict[tuple[int, ...], tuple[Rows, NDArray[np.floating[Any]], float | None]]:  # fmt: skip
    """Return for each set of added rows what may follow, the scores of that, and the log-odds that it is complete."""
    found: dict[tuple[int, ...], tuple[Rows, NDArray[np.floating[Any]], float | None]] = {}
    free: dict[tuple[int, ...], Rows] = {}
    for added in sets:
        held = [*context, *added]
        may = limits.followers(added).copy()
        may[held] = False
        if copies is not None:
            may &= ~np.isin(copies, copies[held])
        free[added] = np.flatnonzero(may)
        found[added] = free[added][:0], np.empty(0), None
    open_sets = [added for added in sets if len(free[added])]
    if open_sets:
        items, ends = steps([np.array(sorted((*context, *added)), np.int64) for added in open_sets])
        for place, added in enumerate(open_sets):
            rows = free[added][np.isfinite(items[place, free[added]])]
            found[added] = rows, items[place, rows], None if ends is None else float(ends[place])
    return found


@dataclass(frozen=True, eq=False)
class _Ways:
    """How a set may go on: (R,) rows, ascending, and the log-probability of the way that ends with each."""

    rows: Rows
    logs: NDArray[np.float64]

    def select_best(self, count: int) -> list[int]:
        order = np.lexsort((self.rows, -np.round(self.logs, _DIGITS)))[:count]
        return [int(row) for row in self.rows[order]]

    def log_to(self, row: int) -> float:
        """Return minus infinity where no way leads there."""
        place = int(np.searchsorted(self.rows, row))
        found = place < len(self.rows) and self.rows[place] == row
        return float(self.logs[place]) if found else -math.inf


def _keep_best(following: Mapping[tuple[int, ...], _Ways], beam: int) -> dict[tuple[int, ...], float]:
    """Return the most probable sets of one row more; proposed are, of each set, its most probable continuations."""
    proposed = {tuple(sorted((*added, row))) for added, ways in following.items() for row in ways.select_best(beam)}
    grown = []
    for rows in proposed:
        # Each of its rows may be the last that was added.
        before = [(rows[:place] + rows[place + 1 :], row) for place, row in enumerate(rows)]
        logs = [following[one].log_to(row) for one, row in before if one in following]
        grown.append(Generated(rows, float(special.logsumexp(logs))))
    return {one.added: one.log_probability for one in sorted(grown, key=_rank)[:beam]}


def _rank(one: Generated) -> tuple[float, tuple[int, ...]]:
    return -round(one.log_probability, _DIGITS), one.added
