"""Adapter references, the names of what is stored: `fashion`, `fashion@v2`, `fashion@prod`.

Owns the grammar of categories, versions and aliases. Knows nothing of what is stored.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from peft_combo.errors import StoreError, shorten

CATEGORY = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
VERSION = re.compile(r"v([1-9][0-9]{0,8})")
# A letter first, so that a bare number is no alias, and nothing that could be taken for a version or for the latest.
ALIAS = re.compile(r"(?!(?:v[0-9]*|latest)\Z)[a-z][a-z0-9._-]{0,63}")
_REFERENCE = re.compile(rf"({CATEGORY.pattern})(?:@([a-z0-9][a-z0-9._-]{{0,63}}))?")


class Reference(NamedTuple):
    """A category and what is wanted of it: a version, what an alias points to, or (neither) the latest."""

    category: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        selector = self.alias if self.version is None else f"v{self.version}"
        return self.category if selector is None else f"{self.category}@{selector}"


class Version(NamedTuple):
    """The version that a reference meant when it was looked up."""

    category: str
    version: int

    def __str__(self) -> str:
        return f"{self.category}@v{self.version}"


def parse_reference(reference: str) -> Reference:
    """Read `fashion`, `fashion@v2` or `fashion@prod`.

    Raises:
        StoreError: it is none of them.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise StoreError(
            f'"{shorten(reference)}" does not name an adapter. Expected a category (fashion), one of its versions '
            "(fashion@v2) or an alias (fashion@prod), where a category has lower-case letters, digits, _ and -, at "
            "most 64."
        )
    category, selector = match[1], match[2]
    if selector is None:
        return Reference(category)
    if version := VERSION.fullmatch(selector):
        return Reference(category, int(version[1]))
    if not ALIAS.fullmatch(selector):
        raise StoreError(
            f'"{selector}" is neither a version nor an alias. Expected v1, v2, ... as in {category}@v1, or a word as '
            f"in {category}@prod."
        )
    return Reference(category, alias=selector)


def check_category(category: str) -> str:
    """Return a category's name as it is.

    Raises:
        StoreError: it cannot be one.
    """
    if not CATEGORY.fullmatch(category):
        raise StoreError(
            f'"{shorten(category)}" cannot be a category. Expected 1 to 64 lower-case letters, digits, _ and -, '
            "beginning with a letter or digit, such as home-kitchen."
        )
    return category


def check_alias(name: str) -> str:
    """Return the name of an alias as it is.

    Raises:
        StoreError: it cannot be one.
    """
    if name == "latest":
        raise StoreError('"latest" cannot be an alias: the category alone (fashion) always means its latest version.')
    if not ALIAS.fullmatch(name):
        raise StoreError(
            f'"{shorten(name)}" cannot be an alias. Expected 1 to 64 lower-case letters, digits, . _ and -, beginning '
            "with a letter, and no version, such as prod."
        )
    return name
