"""Filters on item columns: conditions that items must or must not meet, as data and as written on a command line.

Owns what a condition may say and how it is read from words. Knows nothing of catalogues, requests or scores.
"""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from peft_combo.errors import DataError, shorten

_Value = Annotated[str, StringConstraints(max_length=1000)] | float | bool
# "price<50", "brand=Nike|Puma", "stock>=1", "colour!=red"; the longest sign first.
_WORDS = re.compile(r"\s*(?P<column>[^<>=!]+?)\s*(?P<sign><=|>=|!=|<|>|=)\s*(?P<value>.*?)\s*", re.DOTALL)


class Condition(BaseModel):
    """One condition on one column of items.

    Columns are item_id, title, category (a path "A > B" holds all below it), leaf, slot, price, description and every
    further column of the items. Case does not count.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    column: str = Field(min_length=1, max_length=200, description="Column of the items, as in price or brand.")
    any: tuple[_Value, ...] | None = Field(
        default=None, max_length=1000, strict=False, description="Values of which an item has one."
    )
    gt: float | None = Field(default=None, description="More than this.")
    gte: float | None = Field(default=None, description="At least this.")
    lt: float | None = Field(default=None, description="Less than this.")
    lte: float | None = Field(default=None, description="At most this.")

    @model_validator(mode="after")
    def _say_something(self) -> Self:
        if self.any is None and not self.ranges:
            raise ValueError("a condition needs any, gt, gte, lt or lte")
        return self

    @property
    def ranges(self) -> dict[str, float]:
        """The bounds that are given."""
        found = {"gt": self.gt, "gte": self.gte, "lt": self.lt, "lte": self.lte}
        return {name: value for name, value in found.items() if value is not None}


class Filter(BaseModel):
    """What every item must and must not be; an item whose value is not known meets no condition."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    must: tuple[Condition, ...] = Field(
        default=(), max_length=100, strict=False, description="Conditions that items meet, all of them."
    )
    must_not: tuple[Condition, ...] = Field(
        default=(), max_length=100, strict=False, description="Conditions of which items meet none."
    )


def parse_filter(words: list[str]) -> Filter:
    """Read conditions as they are written on a command line: ``price<50``, ``brand=Nike|Puma``, ``colour!=red``.

    Raises:
        DataError: one has no sign, or compares with something that is no number.
    """
    must: list[Condition] = []
    must_not: list[Condition] = []
    for text in words:
        found = _WORDS.fullmatch(text)
        if found is None or not found["value"]:
            raise DataError(
                f"Expected a condition such as price<50, brand=Nike|Puma or colour!=red, found {shorten(text)!r}."
            )
        column, sign, value = found["column"], found["sign"], found["value"]
        if sign in ("=", "!="):
            values = tuple(part.strip() for part in value.split("|"))
            (must if sign == "=" else must_not).append(Condition(column=column, any=values))
            continue
        try:
            bound = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}[sign]
            must.append(Condition.model_validate({"column": column, bound: float(value)}))
        except ValueError as error:
            raise DataError(f"{shorten(text)}: expected a number after {sign}, found {shorten(value)!r}.") from error
    return Filter(must=tuple(must), must_not=tuple(must_not))
