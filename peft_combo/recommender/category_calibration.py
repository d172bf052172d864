"""Calibration of category adapters: which items each covers, and one scale for the scores of all of them.

Owns the areas of a catalogue, what an adapter's manifest says about its own, and the calibration that makes scores of
different adapters comparable. Sees adapters as arrays of scores with names; nothing of encoders or requests.

A context of several categories is encoded by each adapter as a whole, and each adapter's scores count only for the
items it is at home with: the query "what goes with this basket" is asked once in the language of each category.
Scores of different adapters are on different scales, so a candidate i of area a gets

    score(q, i) = own_a s_a(q, i) + shared_a s_0(q, i) + offset_a

with s_a of the area's adapter, s_0 of the adapter that was tuned on all categories, and three numbers per area that are
fitted on validation queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.leakage import _find_claimed
from peft_combo.data.model import CATEGORY_SEPARATOR, Catalog
from peft_combo.data.queries import assign_folds
from peft_combo.errors import DataError
from peft_combo.recommender.conditional_logit import Scores, fit_conditional_logit, sample_cells
from peft_combo.recommender.evidence import Evidence

# Prior spread of the three numbers, on scores of deviation 1: with few queries an area stays near the others.
_SPREAD = 0.5


@dataclass(frozen=True, eq=False)
class CategoryCoverage:
    """Which adapter is at home with which items.

    Attributes:
        members: the adapters bound to a category, in order. shared: the one that speaks of all items, where there is
            one.
        of_item: (N,) place in `members`, -1 for items that none of them covers.
    """

    members: tuple[str, ...]
    shared: str | None
    of_item: NDArray[np.int64]

    @classmethod
    def of(cls, catalog: Catalog, recipes: Mapping[str, Mapping[str, Any]]) -> Self | None:
        """Read from the recipes that adapters were tuned by which items each is for.

        An adapter is bound where its data was narrowed (``data.category_filter`` or ``data.departments``); of two that
        claim an item the one with the longer path has it.

        Args:
            recipes: per adapter its recipe, as its manifest holds it.
        Returns:
            None where no adapter is bound.
        Raises:
            DataError: two adapters speak of all items, or one is bound to a category that no item is in.
        """
        claims = {name: paths for name, recipe in recipes.items() if (paths := _find_claimed(recipe))}
        general = [name for name in recipes if name not in claims]
        if not claims:
            return None
        if len(general) > 1:
            raise DataError(
                f"{' and '.join(general)} were both tuned on all categories; beside adapters of single categories "
                "there is room for one such adapter."
            )
        lower = [tuple(part.casefold() for part in path) for path in catalog.categories]
        of_item, depth = np.full(len(catalog), -1, np.int64), np.zeros(len(catalog), np.int64)
        for place, (name, paths) in enumerate(claims.items()):
            inside = [max((len(path) for path in paths if own[: len(path)] == path), default=0) for own in lower]
            longest = np.array(inside, np.int64)
            if not longest.any():
                told = " or ".join(f'"{CATEGORY_SEPARATOR.join(path)}"' for path in paths)
                raise DataError(f"Adapter {name} is for {told}, but no item of this catalogue is in it.")
            wins = longest > depth
            of_item[wins], depth[wins] = place, longest[wins]
        return cls(tuple(claims), general[0] if general else None, of_item)

    def find_crossing(self, contexts: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which answers are of another area than every item of their context: (Q, S), (Q,) -> (Q,)."""
        here = np.where(contexts >= 0, self.of_item[contexts], -2)
        same: NDArray[np.bool_] = (here == self.of_item[targets][:, None]).any(axis=1)
        return ~same


@dataclass(frozen=True)
class Calibration:
    """What makes the scores of several adapters comparable.

    Attributes:
        scale: per adapter the mean and deviation of its scores, which are brought to 0 and 1 first.
        own, shared, offset: per bound adapter; `shared` also under "" for items that no bound adapter covers.
    """

    scale: Mapping[str, tuple[float, float]]
    own: Mapping[str, float]
    shared: Mapping[str, float]
    offset: Mapping[str, float]

    @staticmethod
    def fit(
        scores: Scores[str],
        coverage: CategoryCoverage,
        targets: NDArray[np.int64],
        contexts: NDArray[np.int64],
        groups: Sequence[str] | NDArray[np.str_],
        *,
        folds: int = 5,
        seed: int = 0,
    ) -> tuple[Calibration, NDArray[np.float32]]:
        """Fit by conditional logit on validation queries.

        Args:
            scores: per adapter (Q, N) of the validation queries.
            groups: (Q,) what may not stand on both sides of a fold.
        Returns:
            the calibration, and (Q, N) scores of the same queries by calibrations that did not see their group.
        Source: McFadden 1974 (conditional logit); per-class scale and offset as in Platt 1999.
        """
        scale = {name: (float(np.nanmean(part)), max(float(np.nanstd(part)), 1e-9)) for name, part in scores.items()}
        rng = np.random.default_rng(seed)
        support = np.zeros(len(coverage.of_item), np.int64)
        sampled = sample_cells(scores.values(), targets, Evidence(contexts, support), rng)
        rows, columns = sampled.rows, sampled.columns
        place = coverage.of_item[columns]
        standard = {name: _standardise(part[rows, columns], scale[name]) for name, part in scores.items()}
        terms: list[tuple[str, str]] = []
        cells: list[NDArray[np.float32]] = []
        for number, name in enumerate(coverage.members):
            here = (place == number).astype(np.float32)
            terms += [("own", name), ("offset", name)]
            cells += [here * standard[name], here]
            if coverage.shared is not None:
                terms.append(("shared", name))
                cells.append(here * standard[coverage.shared])
        if coverage.shared is not None:
            terms.append(("shared", ""))
            cells.append((place < 0).astype(np.float32) * standard[coverage.shared])
        # Where both scorers have a score they start from half each, the shared one alone from the whole.
        start = {"own": 0.5 if coverage.shared is not None else 1.0, "shared": 0.5, "offset": 0.0}
        centre = np.array([1.0 if term == ("shared", "") else start[term[0]] for term in terms])
        free = [(None, None) if kind == "offset" else (0.0, None) for kind, _ in terms]
        matrix, precision = np.stack(cells), np.full(len(terms), _SPREAD**-2.0)

        def solve(chosen: NDArray[np.bool_]) -> Calibration:
            theta = fit_conditional_logit(matrix, sampled, chosen, precision, free, centre)
            found: dict[str, dict[str, float]] = {"own": {}, "shared": {}, "offset": {}}
            for (kind, name), value in zip(terms, theta, strict=True):
                found[kind][name] = float(value)
            return Calibration(scale, found["own"], found["shared"], found["offset"])

        fold_of = assign_folds(np.asarray(groups), folds, rng)
        crossed = np.empty((len(targets), len(coverage.of_item)), np.float32)
        for fold in np.unique(fold_of):
            held = fold_of == fold
            one = solve(~held) if (~held).any() else solve(held)
            crossed[held] = one.combine({name: part[held] for name, part in scores.items()}, coverage)
        return solve(np.ones(len(targets), bool)), crossed

    def combine(self, scores: Scores[str], coverage: CategoryCoverage) -> NDArray[np.float32]:
        """Return (Q, N) scores on one scale; NaN for items that no adapter is for."""
        (first, *_) = scores.values()
        found = np.full(first.shape, np.nan, np.float32)
        general = (
            None if coverage.shared is None else _standardise(scores[coverage.shared], self.scale[coverage.shared])
        )
        for number, name in enumerate(coverage.members):
            here = coverage.of_item == number
            found[:, here] = self.own[name] * _standardise(scores[name][:, here], self.scale[name]) + self.offset[name]
            if general is not None:
                found[:, here] += self.shared[name] * general[:, here]
        if general is not None:
            rest = coverage.of_item < 0
            found[:, rest] = self.shared[""] * general[:, rest]
        return found

    def state(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        scale = {name: list(pair) for name, pair in self.scale.items()}
        return {**{name: dict(value) for name, value in vars(self).items()}, "scale": scale}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Rebuild from `state`."""
        numbers = {
            name: {str(key): float(value) for key, value in state[name].items()} for name in ("own", "shared", "offset")
        }
        scale = {str(key): (float(mean), float(spread)) for key, (mean, spread) in state["scale"].items()}
        return cls(scale, numbers["own"], numbers["shared"], numbers["offset"])


def _standardise(values: NDArray[np.float32], scale: tuple[float, float]) -> NDArray[np.float32]:
    return ((values - np.float32(scale[0])) / np.float32(scale[1])).astype(np.float32)
