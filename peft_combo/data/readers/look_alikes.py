"""Ids that look alike and are not the same: composed and decomposed accents, zero-width and full-width characters.

Owns when two ids look alike (Unicode NFKC, without format characters). Ids are never changed: that is for their owner.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable


def canonical(text: str) -> str:
    """Return what look-alikes have in common; ASCII is itself."""
    if text.isascii():
        return text
    composed = unicodedata.normalize("NFKC", text)
    return "".join(char for char in composed if unicodedata.category(char) != "Cf").strip()


def find_look_alikes(ids: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of distinct ids that look alike, the earlier one first."""
    every = list(ids)
    seen = {one: one for one in every if one.isascii()}
    pairs = []
    for one in every:
        if not one.isascii():
            other = seen.setdefault(canonical(one), one)
            if other != one:
                pairs.append((other, one))
    return pairs


def note_look_alikes(ids: Iterable[str], column: str, name: str, notes: list[str]) -> None:
    """Note how many ids of a column look like another one, with the first pair."""
    pairs = find_look_alikes(ids)
    if pairs:
        one, other = pairs[0]
        count = "one pair" if len(pairs) == 1 else f"{len(pairs):,} pairs"
        notes.append(
            f"{count} of {column} in {name} look alike and count as different, such as {one!a} and {other!a}: "
            "normalise them (NFC, no zero-width characters) if they are the same"
        )


def explain_look_alike(unknown: str, known: Iterable[str]) -> str:
    """Return a remedy where an unknown id looks like a known one, or differs in case alone; else ""."""
    folded = canonical(unknown).casefold()
    for one in known:
        if canonical(one).casefold() == folded:
            if canonical(one) == canonical(unknown):
                return f"It looks like {one!a} and is {unknown!a}: normalise both (NFC, no zero-width characters)."
            return f"It is {one!r} but for upper and lower case."
    return ""
