"""Traits of items that bundles may agree on: attributes, category levels, and classes of words such as gender and age.

Owns what an item says of itself beyond its slot and price, read off the catalogue, and the small lexicon of words
behind the classes. Knows nothing of bundles, scores or how much agreeing is worth.

A class of words is read where the catalogue has no attribute of its name: from the category path first, which shops
keep with more care, then from the title. Two values of a class in one text ("for men and women") say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.model import Catalog

_WORD = re.compile(r"[^\W_]+")
ALL_SEASONS = frozenset({"all", "all-year", "all year", "all seasons", "all-season", "any", "year-round"})

# Class -> word -> value. Possessives are cut before looking up: "women's" and "womens" are looked up as "women".
_WORDS: Mapping[str, Mapping[str, str]] = {
    "gender": {
        **dict.fromkeys(("women", "woman", "ladies", "lady", "female", "girl", "girls"), "female"),
        **dict.fromkeys(("men", "man", "gents", "gentlemen", "gentleman", "male", "boy", "boys"), "male"),
    },
    "age": {
        **dict.fromkeys(("women", "woman", "ladies", "men", "man", "gents", "gentlemen", "adult", "adults"), "adult"),
        **dict.fromkeys(("girl", "girls", "boy", "boys", "kid", "kids", "child", "children", "youth"), "child"),
        **dict.fromkeys(("baby", "babies", "infant", "infants", "newborn", "newborns", "toddler", "toddlers"), "baby"),
    },
    "season": {"summer": "summer", "winter": "winter", "spring": "spring", "autumn": "autumn"},
    "size system": {"petite": "petite", "tall": "tall", "maternity": "maternity"},
}
# Class -> pattern in lower case whose first group is the value.
_PATTERNS: Mapping[str, re.Pattern[str]] = {
    "size system": re.compile(r"\b(plus[- ]size)\b"),
    "skin type": re.compile(r"\b(dry|oily|normal|sensitive|combination)(?:[- ]to[- ]\w+)? skin\b"),
    "voltage": re.compile(r"\b(\d{1,3}(?:\.\d+)? ?-?v)(?:olts?)?\b"),
    "size": re.compile(r"\bsize:? (x{0,3}[sl]|m|\d{1,2}(?:\.5)?)\b"),
}
CLASSES = tuple(dict.fromkeys((*_WORDS, *_PATTERNS)))
# Other names under which a catalogue gives a class as an attribute.
_SYNONYMS = {"gender": ("sex",), "age": ("age group", "age_group"), "size system": ("size_system",),
             "skin type": ("skin_type",), "voltage": ("volts",)}  # fmt: skip
# Levels of the category path that may say what bundles agree on; deeper ones and leaves tell what an item is.
_LEVELS = 2


@dataclass(frozen=True, eq=False)
class Traits:
    """What items say of themselves.

    Attributes:
        names: (T,) of the traits. codes: (T, N) the number of each item's value, -1 for none.
        values: per trait its values, in the words of the catalogue or the lexicon.
    """

    names: tuple[str, ...]
    codes: NDArray[np.int32]
    values: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, catalog: Catalog) -> Self:
        """Read the traits of N items; one that fewer than two items have, or that all share, is left out."""
        columns: dict[str, Sequence[str | None]] = {
            name: [_read_attribute(name, value) for value in column]
            for name, column in catalog.attributes.items()
            if name.casefold() != "stock"
        }
        columns |= _read_classes(catalog, columns)
        columns |= _read_levels(catalog)
        encoded = {name: _encode(column) for name, column in columns.items()}
        kept = {name: one for name, one in encoded.items() if len(one[1]) > 1}
        codes = np.stack([one[0] for one in kept.values()]) if kept else np.empty((0, len(catalog)), np.int32)
        return cls(tuple(kept), codes, tuple(one[1] for one in kept.values()))

    def extend(self, catalog: Catalog, rows: Sequence[int]) -> Traits:
        """Return the traits of a longer catalogue, in which some rows are new or changed; no value is new."""
        part = catalog.take(rows)
        columns: dict[str, Sequence[str | None]] = {
            name: [_read_attribute(name, value) for value in column] for name, column in part.attributes.items()
        }
        columns |= _read_classes(part, {name: column for name, column in columns.items() if name in self.names})
        columns |= _read_levels(part)
        codes = np.full((len(self.names), len(catalog)), -1, np.int32)
        codes[:, : self.codes.shape[1]] = self.codes
        for place, (name, values) in enumerate(zip(self.names, self.values, strict=True)):
            numbers = {value.casefold(): number for number, value in enumerate(values)}
            own = columns.get(name, (None,) * len(rows))
            codes[place, list(rows)] = [-1 if value is None else numbers.get(value.casefold(), -1) for value in own]
        return Traits(self.names, codes, self.values)


def read_class(name: str, text: str) -> str | None:
    """Return what a text says of a class of words; None where it says nothing, or two things.

    "Baby Girls" is a baby: the youngest age counts.
    """
    lowered = text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    table, pattern = _WORDS.get(name, {}), _PATTERNS.get(name)
    found = {table[word] for word in _list_words(lowered) if word in table}
    if pattern is not None:
        found |= {re.sub("[ -]+", " ", match[1]) for match in pattern.finditer(lowered)}
    if name == "age":
        return next((age for age in ("baby", "child", "adult") if age in found), None)
    return found.pop() if len(found) == 1 else None


def name_audience(shared: Mapping[str, str]) -> dict[str, str]:
    """Say a gender and an age that were read as shops do: for women, men, girls or boys; the rest stays as it is."""
    gender, young = shared.get("gender"), shared.get("age") in ("child", "baby")
    if gender not in ("female", "male"):
        return dict(shared)
    audience = {"female": ("women", "girls"), "male": ("men", "boys")}[gender][young]
    return {"for": audience, **{name: value for name, value in shared.items() if name not in ("gender", "age")}}


def _list_words(lowered: str) -> Iterable[str]:
    for word in _WORD.findall(lowered.replace("'s", "").replace("s'", "s")):
        yield {"womens": "women", "mens": "men", "childrens": "children", "ladie": "ladies"}.get(word, word)


def _read_attribute(name: str, value: str | None) -> str | None:
    """Return a value of a column; what goes with every season tells nothing about a bundle's."""
    if value is not None and name.casefold() == "season" and value.casefold() in ALL_SEASONS:
        return None
    return value


def _read_classes(catalog: Catalog, given: Mapping[str, object]) -> dict[str, list[str | None]]:
    taken = {name.casefold() for name in given}
    read: dict[str, list[str | None]] = {}
    for name in CLASSES:
        if taken & {name, *_SYNONYMS.get(name, ())}:
            continue
        of_level = {level: read_class(name, level) for path in set(catalog.categories) for level in path}
        # The first level that says something: below Women a leaf "Boy Shorts" is no gender.
        of_path = {
            path: next((of_level[level] for level in path if of_level[level]), None) for path in catalog.categories
        }
        read[name] = [
            of_path[path] or read_class(name, title)
            for path, title in zip(catalog.categories, catalog.titles, strict=True)
        ]
    return read


def _read_levels(catalog: Catalog) -> dict[str, list[str | None]]:
    """Return the upper levels of the category paths; a level that only names a gender or an age is one of these."""
    says_class: dict[str, bool] = {}

    def name_level(path: tuple[str, ...], depth: int) -> str | None:
        if len(path) < depth + 2:
            return None
        name = path[depth]
        if name not in says_class:
            words = [word for word in _list_words(name.casefold()) if word != "and"]
            says_class[name] = all(word in _WORDS["gender"] or word in _WORDS["age"] for word in words)
        return None if says_class[name] else name

    return {
        f"category level {depth + 1}": [name_level(path, depth) for path in catalog.categories]
        for depth in range(_LEVELS)
    }


def _encode(values: Sequence[str | None]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Number values without regard to case: (N,) -1 for none, and the first spelling of each."""
    numbers: dict[str, int] = {}
    spelled: list[str] = []
    codes = np.full(len(values), -1, np.int32)
    for row, value in enumerate(values):
        if value is None:
            continue
        key = value.casefold()
        if key not in numbers:
            numbers[key] = len(numbers)
            spelled.append(value)
        codes[row] = numbers[key]
    return codes, tuple(spelled)
