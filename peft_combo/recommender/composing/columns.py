"""Columns of a catalogue as codes and numbers, and the items that meet a condition, kept for the next request.

Owns how a column of any name is read and compared. Knows nothing of bundles or scores.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.model import CATEGORY_SEPARATOR, Catalog
from peft_combo.errors import DataError, did_you_mean, shorten
from peft_combo.recommender.filters import Condition, Filter

Mask = NDArray[np.bool_]
BUILT_IN = ("item_id", "title", "category", "leaf", "slot", "price", "description")
_KEPT_BYTES = 32 * 2**20


class ItemColumns:
    """The columns of a catalogue, each encoded when it is first asked for; safe to share between threads."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._codes: dict[str, tuple[NDArray[np.int64], dict[str, int]]] = {}
        self._numbers: dict[str, NDArray[np.float64]] = {}
        self._masks = KeptMasks(_KEPT_BYTES)

    def match(self, asked: Filter) -> dict[str, Mask]:
        """Per condition (N,) True where it allows an item; an item without a value meets none.

        Raises:
            DataError: there is no such column, a range is asked of words, or no item has any of the values that all
                must have.
        """
        checks = {}
        for condition in asked.must:
            checks[f"filter {_describe(condition)}"] = self._meet(condition, strict=True)
        for condition in asked.must_not:
            checks[f"filter without {_describe(condition)}"] = ~self._meet(condition, strict=False)
        return checks

    def _meet(self, condition: Condition, *, strict: bool) -> Mask:
        column = self._find(condition.column)
        found = self._masks.get((column, condition), lambda: self._compute(column, condition))
        if strict and condition.any and not condition.ranges and not found.any():
            raise self._explain_values(column, condition.any)
        return found

    def _compute(self, column: str, condition: Condition) -> Mask:
        found = np.ones(len(self.catalog), bool)
        if condition.any is not None:
            found &= self._match_values(column, condition.any)
        for name, bound in condition.ranges.items():
            numbers = self.read_numbers(column)
            with np.errstate(invalid="ignore"):
                match name:
                    case "gt":
                        found &= numbers > bound
                    case "gte":
                        found &= numbers >= bound
                    case "lt":
                        found &= numbers < bound
                    case _:
                        found &= numbers <= bound
        return found

    def _match_values(self, column: str, values: Sequence[str | float | bool]) -> Mask:
        if column == "price":
            numbers = self.read_numbers(column)
            wanted = [_parse_number(value) for value in values]
            return np.isin(numbers, [value for value in wanted if value is not None])
        if column == "item_id":
            found = np.zeros(len(self.catalog), bool)
            index = self.catalog.index
            found[[index[str(value)] for value in values if str(value) in index]] = True
            return found
        codes, numbers_of = self.code(column)
        if column == "category":
            wanted_paths = tuple(_fold_path(str(value)) for value in values)
            below = tuple(path + CATEGORY_SEPARATOR.casefold() for path in wanted_paths)
            chosen = [number for path, number in numbers_of.items() if path in wanted_paths or path.startswith(below)]
        else:
            chosen = [numbers_of[text] for value in values for text in _spell(value) if text in numbers_of]
        hit = np.zeros(len(numbers_of) + 1, bool)  # the last place answers for -1, unknown
        hit[chosen] = True
        return hit[codes]

    def code(self, column: str) -> tuple[NDArray[np.int64], dict[str, int]]:
        """A column as numbers, -1 unknown, and the number of each value; case does not count."""
        if column not in self._codes:
            self._codes[column] = encode_values([value.casefold() if value else None for value in self._read(column)])
        return self._codes[column]

    def read_numbers(self, column: str) -> NDArray[np.float64]:
        """(N,) a column as numbers, NaN where it has none; prices in whole cents of a hundred.

        Raises:
            DataError: nothing in it is a number.
        """
        if column == "price":
            return np.asarray(np.round(self.catalog.prices.astype(np.float64), 2), np.float64)
        if column not in self._numbers:
            codes, numbers = self.code(column)
            of_value = np.array([*(_parse_number(value) for value in numbers), None], np.float64)
            self._numbers[column] = of_value[codes]
        found = self._numbers[column]
        if len(found) and np.isnan(found).all():
            raise DataError(f'A range was asked of the column "{column}", in which nothing is a number. Use any.')
        return found

    def _read(self, column: str) -> Sequence[str | None]:
        catalog = self.catalog
        match column:
            case "title":
                return catalog.titles
            case "category":
                return [CATEGORY_SEPARATOR.join(path) for path in catalog.categories]
            case "leaf":
                return [catalog.leaf(row) for row in range(len(catalog))]
            case "slot":
                return catalog.slots
            case "description":
                return catalog.descriptions
            case _:
                return catalog.attributes[column]

    def _find(self, name: str) -> str:
        known = (*BUILT_IN, *self.catalog.attributes)
        column = next((one for one in known if one.casefold() == name.casefold()), None)
        if column is None:
            raise DataError(
                f'The items have no column "{shorten(name)}". Columns: {", ".join(known)}. '
                f"{did_you_mean(name, known)}".rstrip()
            )
        return column

    def _explain_values(self, column: str, values: Sequence[str | float | bool]) -> DataError:
        known = sorted({value for value in self._read(column) if value}) if column not in ("price", "item_id") else []
        said = " or ".join(f'"{shorten(str(value))}"' for value in values[:5])
        hint = next((hint for value in values[:5] if (hint := did_you_mean(str(value), known[:20_000]))), "")
        return DataError(f"No item has {column} {said}. {hint}".rstrip())


class KeptMasks:
    """Masks by key, those asked for longest ago going first when there are too many bytes."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, Mask] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], Mask]) -> Mask:
        """Return what is kept under a key, or compute and keep it; nobody may write into it."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        found = compute()
        found.flags.writeable = False
        with self._lock:
            if key not in self._kept:
                self._kept[key] = found
                self._bytes += found.nbytes
            while self._bytes > self._most and len(self._kept) > 1:
                _, gone = self._kept.popitem(last=False)
                self._bytes -= gone.nbytes
        return found


def encode_values(values: Iterable[str | None]) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Number values, -1 for none, in the order they come."""
    numbers: dict[str, int] = {}
    codes = [-1 if value is None else numbers.setdefault(value, len(numbers)) for value in values]
    return np.array(codes, np.int64), numbers


def _fold_path(path: str) -> str:
    return CATEGORY_SEPARATOR.join(part.strip() for part in path.split(CATEGORY_SEPARATOR.strip())).casefold()


def _spell(value: str | float | bool) -> tuple[str, ...]:
    """Return how a value may be written in a column of words: 38 as 38 and 38.0."""
    if isinstance(value, bool):
        return (str(value).casefold(), str(int(value)))
    if isinstance(value, float | int):
        return (f"{value:g}", str(float(value)))
    return (value.casefold(),)


def _parse_number(value: str | float | bool) -> float | None:
    try:
        found = float(value)
    except ValueError:
        return None
    return found if np.isfinite(found) else None


def _describe(condition: Condition) -> str:
    signs = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
    told = [f"{condition.column} {signs[name]} {bound:g}" for name, bound in condition.ranges.items()]
    if condition.any is not None:
        told.append(f"{condition.column} = {'|'.join(shorten(str(value), 30) for value in condition.any[:5])}")
    return " and ".join(told)
