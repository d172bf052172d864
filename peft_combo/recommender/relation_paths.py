"""Relations as a scorer's edges, and the paths that lead to an item in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from peft_combo.data.knowledge.relations import Relations, lay_out
from peft_combo.data.model import Catalog
from peft_combo.scoring.paths import Path, PathRanking, Step

SAME_CATEGORY = "same category"


def lay_edges(relations: Relations, catalog: Catalog) -> tuple[list[str], Any]:
    """Return the relation of each edge, (E,), and which items are at its head and tail, (N, 2 E) as `PathRanking` has.

    Every leaf of the category tree is an edge from its items to themselves.
    """
    names: list[str] = []
    heads: list[Any] = []
    tails: list[Any] = []
    for relation, steps in lay_out(relations, catalog).items():
        names += [relation] * len(steps.names)
        heads.append(steps.heads)
        tails.append(steps.tails.T)
    leaves = catalog.leaf_numbers
    if leaves is not None:
        rows = np.flatnonzero(leaves >= 0)
        shape = (len(catalog), int(leaves.max()) + 1)
        of_leaf = sparse.csr_array((np.ones(len(rows), np.float32), (rows, leaves[rows])), shape=shape)
        names += [SAME_CATEGORY] * shape[1]
        heads.append(of_leaf)
        tails.append(of_leaf)
    return names, sparse.csr_array(sparse.hstack([*heads, *tails], format="csr"))


def explain_paths(
    scorer: PathRanking, catalog: Catalog, context: NDArray[np.int64], rows: Sequence[int]
) -> dict[int, dict[str, float]]:
    """Say for each row by which relations items of a context lead to it, and what that adds to the scorer's own score.

    Args:
        context: (S,) rows of the catalogue that the scorer was fitted on; others are left out.
    """
    known = len(scorer.support)
    context = context[context < known]
    return {
        row: {
            describe_path(path, catalog.titles[item]): share
            for (item, path), share in scorer.explain(context, row).items()
        }
        if row < known
        else {}
        for row in rows
    }


def describe_path(path: Path, title: str) -> str:
    """Say in words how an item leads to the one that is spoken of: "is accessory of Camera X"."""
    if len(path) == 1:
        relation, back = path[0]
        if relation == SAME_CATEGORY:
            return f"{relation} as {title}"
        return f"{relation} {title}" if back else f"{title} {relation} it"
    return f"{_say(path[0], 'another item', title)}, and {_say(path[1], 'it', 'that')}"


def _say(step: Step, there: str, here: str) -> str:
    """Say one step from `here` to `there`."""
    relation, back = step
    if relation == SAME_CATEGORY:
        return f"{there} has the same category as {here}"
    return f"{there} {relation} {here}" if back else f"{here} {relation} {there}"
