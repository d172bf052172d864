"""Constraints on bundles: budget, price, stock, attributes, categories, season and size, read as masks of items.

Owns the constraints a request may make and how they are read against the columns of a catalogue. Knows nothing of
scores, slots or how bundles are found.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.model import CATEGORY_SEPARATOR, Catalog
from peft_combo.data.traits import ALL_SEASONS
from peft_combo.errors import DataError, did_you_mean
from peft_combo.recommender.composing.columns import ItemColumns, KeptMasks, encode_values
from peft_combo.recommender.filters import Filter

_KEPT_BYTES = 8 * 2**20  # masks of categories and seasons


@dataclass(frozen=True)
class Constraints:
    """What a bundle must keep to; whatever is not given does not bind.

    All but `budget` and `size` speak of the items added: the context stays as it is. Names and values of attributes are
    compared without regard to case.

    Attributes:
        budget: most the whole bundle may cost, context included. An item without a known price is then not allowed.
        price_min: least an item may cost; an unknown price is not allowed.
        price_max: most an item may cost; an unknown price is not allowed.
        in_stock: only items of which some are left; an unknown stock counts as available.
        include: attribute -> values of which an item must have one; an unknown value is not allowed.
        exclude: attribute -> values an item must not have; an unknown value is allowed.
        categories: "A > B" paths of which one must begin the item's category path.
        without_categories: "A > B" paths none of which may begin it.
        season: the item's `season` must be this, one of `ALL_SEASONS`, or unknown.
        size: fewest and most items of the whole bundle; None takes the usual sizes of training bundles.
        exclude_items: rows that may not be added.
        filter: conditions on any column.
    """

    budget: float | None = None
    price_min: float | None = None
    price_max: float | None = None
    in_stock: bool = False
    include: Mapping[str, str | Collection[str]] = field(default_factory=dict)
    exclude: Mapping[str, str | Collection[str]] = field(default_factory=dict)
    categories: tuple[str, ...] = ()
    without_categories: tuple[str, ...] = ()
    season: str | None = None
    size: tuple[int, int] | None = None
    exclude_items: tuple[int, ...] = ()
    filter: Filter | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "price_min", "price_max"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise DataError(f"{name} must be a number of at least 0, found {value}.")
        if self.price_min is not None and self.price_max is not None and self.price_min > self.price_max:
            raise DataError(f"price_min {self.price_min} is above price_max {self.price_max}. Swap them.")
        if self.size is not None and not 1 <= self.size[0] <= self.size[1]:
            raise DataError(f"size must be (fewest, most) with 1 <= fewest <= most, found {self.size}.")

    def bar(self, rows: NDArray[np.int64]) -> Constraints:
        """Return the same constraints with more rows that may not be added."""
        return replace(self, exclude_items=(*self.exclude_items, *np.unique(rows).tolist()))


class CatalogIndex:
    """The catalogue as constraints read it: prices in whole cents, columns of text as numbers."""

    def __init__(self, catalog: Catalog, hidden: NDArray[np.bool_] | None = None) -> None:
        """Read a catalogue; `hidden` (N,) are items that no constraint allows."""
        self.catalog = catalog
        self._offered = None if hidden is None or not hidden.any() else ~hidden
        self.columns = ItemColumns(catalog)
        self._kept = KeptMasks(_KEPT_BYTES)

    def check(self, constraints: Constraints) -> dict[str, NDArray[np.bool_]]:
        """Per constraint given: (N,) True where it allows an item."""
        checks: dict[str, NDArray[np.bool_]] = {}
        cents = self.cents
        if self._offered is not None:
            checks["still offered"] = self._offered
        if constraints.budget is not None:
            checks["budget"] = cents >= 0
        if constraints.price_min is not None:
            checks["price_min"] = (cents >= 0) & (cents >= math.ceil(constraints.price_min * 100 - 1e-6))
        if constraints.price_max is not None:
            checks["price_max"] = (cents >= 0) & (cents <= math.floor(constraints.price_max * 100 + 1e-6))
        if constraints.in_stock:
            checks["in_stock"] = self.catalog.in_stock
        for name, values in constraints.include.items():
            checks[f"include {name}"] = self.match_values(name, values)
        for name, values in constraints.exclude.items():
            checks[f"exclude {name}"] = ~self.match_values(name, values)
        if constraints.categories:
            checks["categories"] = self._kept.get(
                constraints.categories, lambda: self.match_categories(constraints.categories)
            )
        if constraints.without_categories:
            checks["without_categories"] = ~self.match_categories(constraints.without_categories)
        if constraints.season is not None:
            fitting = self.match_values(
                "season", constraints.season
            )  # first, for it says where there is no such attribute
            codes, numbers = self.code_column("season")
            all_year = [number for value, number in numbers.items() if value in ALL_SEASONS]
            checks["season"] = fitting | np.isin(codes, [-1, *all_year])
        if constraints.exclude_items:
            rows = np.array(constraints.exclude_items, np.int64)
            outside = rows[(rows < 0) | (rows >= len(cents))]
            if len(outside):
                raise ValueError(f"exclude_items must lie in 0..{len(cents) - 1}, found {outside.tolist()}.")
            kept = np.ones(len(cents), bool)
            kept[rows] = False
            checks["exclude_items"] = kept
        if constraints.filter is not None:
            checks |= self.columns.match(constraints.filter)
        return checks

    @cached_property
    def cents(self) -> NDArray[np.int64]:
        """(N,) -1 where the price is unknown. Whole numbers, so that sums are exact."""
        prices = self.catalog.prices.astype(np.float64)
        return np.where(np.isfinite(prices), np.rint(np.nan_to_num(prices) * 100), -1).astype(np.int64)

    @cached_property
    def titles(self) -> NDArray[np.int64]:
        """(N,) equal numbers for equal titles; a title of nothing equals none, so it has a number of its own."""
        codes, known = encode_values([" ".join(title.casefold().split()) or None for title in self.catalog.titles])
        return np.where(codes < 0, len(known) + np.arange(len(codes)), codes)

    def code_column(self, name: str) -> tuple[NDArray[np.int64], dict[str, int]]:
        """An attribute as numbers, -1 unknown, and the number of each value; case does not count."""
        return self.columns.code(self._column(name))

    def match_values(self, name: str, values: str | Collection[str]) -> NDArray[np.bool_]:
        """(N,) True where an attribute has one of the values."""
        wanted = [values] if isinstance(values, str) else list(values)
        column = self._column(name)
        codes, numbers = self.code_column(column)
        for value in wanted:
            if value.casefold() not in numbers:
                spelled = sorted({text for text in self.catalog.attributes[column] if text})
                hint = did_you_mean(value, spelled) or did_you_mean(value.title(), spelled)
                shown = ", ".join(spelled[:12]) + (f" and {len(spelled) - 12} more" if len(spelled) > 12 else "")
                raise DataError(f'No item has {column} "{value}". Values: {shown}. {hint}'.rstrip())
        return np.isin(codes, [numbers[value.casefold()] for value in wanted])

    def match_categories(self, prefixes: Sequence[str]) -> NDArray[np.bool_]:
        """(N,) True where one of the category paths begins the item's."""
        codes, numbers = self._paths
        found = np.zeros(len(numbers) + 1, bool)  # the last place answers for -1, an item without a category
        for prefix in prefixes:
            wanted = CATEGORY_SEPARATOR.join(part.strip() for part in prefix.split(CATEGORY_SEPARATOR.strip()))
            under = [n for path, n in numbers.items() if path == wanted or path.startswith(wanted + CATEGORY_SEPARATOR)]
            if not under:
                steps = (path.split(CATEGORY_SEPARATOR) for path in numbers)
                known = {CATEGORY_SEPARATOR.join(path[: d + 1]) for path in steps for d in range(len(path))}
                raise DataError(f'No item is in category "{prefix}". {did_you_mean(wanted, sorted(known))}'.rstrip())
            found[under] = True
        return found[codes]

    @cached_property
    def _paths(self) -> tuple[NDArray[np.int64], dict[str, int]]:
        return encode_values([CATEGORY_SEPARATOR.join(path) or None for path in self.catalog.categories])

    def _column(self, name: str) -> str:
        attributes = self.catalog.attributes
        column = next((known for known in attributes if known.casefold() == name.casefold()), None)
        if column is None:
            known = ", ".join(attributes) or "none"
            raise DataError(
                f'The items have no attribute "{name}". Attributes: {known}. {did_you_mean(name, attributes)}'.rstrip()
            )
        return column
