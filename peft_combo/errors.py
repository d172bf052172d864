"""Exceptions a user can act on, faults with place and remedy, and the nearest valid name.

Owns the exception tree, the form of a message (expected, found, remedy, nearest valid name) and the printing of many
faults at once. Knows nothing of what goes wrong elsewhere.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

_NAME_LIMIT = 200  # characters; a longer text is no misspelt name


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with what a user gave us.

    Attributes:
        where: the place, most telling part first: ``training.epochs`` or ``items.csv:12``.
        problem: what was expected and what was found.
        remedy: what to do about it; empty where the problem says it already.
    """

    where: str
    problem: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}" + (f" {self.remedy}" if self.remedy else "")


class PeftComboError(Exception):
    """Something a user can put right; its text is the whole story, so the CLI prints it without a traceback.

    Attributes:
        faults: the separate faults behind this error, in the order they were found; empty for a single one.
    """

    def __init__(self, message: str, faults: Iterable[Fault] = ()) -> None:
        super().__init__(message)
        self.faults: tuple[Fault, ...] = tuple(faults)

    @classmethod
    def from_faults(cls, title: str, faults: Iterable[Fault], limit: int = 50) -> Self:
        """Build one error that lists every fault under `title`, the first `limit` of them in full."""
        found = tuple(faults)
        lines = [make_printable(title), *(f"  {make_printable(str(fault))}" for fault in found[:limit])]
        if len(found) > limit:
            lines.append(f"  ... and {len(found) - limit} more of the same kind.")
        return cls("\n".join(lines), found)


class RecipeError(PeftComboError):
    """A recipe cannot be read or does not hold together."""


class DataError(PeftComboError):
    """A dataset cannot be read, or is not enough for what was asked."""


class StoreError(PeftComboError):
    """An adapter store refused to read or write."""


class BackboneError(PeftComboError):
    """An encoder cannot be loaded, or an adapter does not fit it."""


class TuningError(PeftComboError):
    """A run cannot start or cannot go on."""


def nearest(name: str, options: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the option most like `name`, or None where none is as close as `cutoff` (a ratio of difflib)."""
    if len(name) > _NAME_LIMIT:  # comparing takes the square of it
        return None
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=cutoff)
    return close[0] if close else None


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ``Did you mean "x"?`` for the nearest option, or an empty string."""
    close = nearest(name, options)
    return f'Did you mean "{close}"?' if close else ""


def make_printable(text: str) -> str:
    """Make a text from outside, such as a path, fit for one line of a terminal, whole and otherwise as it is.

    Escaped are control characters and line ends, half characters (surrogates), and what is invisible and changes how
    its surroundings read, such as bidirectional overrides. Spaces of any width and the joiners of emoji stay.
    """
    if text.isprintable():
        return text
    return "".join(char if is_printable(char) else ascii(char)[1:-1] for char in text)


def is_printable(char: str) -> bool:
    """Say whether a character shows on a terminal and does nothing else there."""
    return char.isprintable() or char in _JOINERS or unicodedata.category(char) not in _UNSHOWN


_JOINERS = "\u200c\u200d"
_UNSHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format, half of a pair, line and paragraph separators


def shorten(text: str, limit: int = 80) -> str:
    """Make a text from outside printable, and cut it where it is too long for a message; a path is not cut."""
    line = make_printable(text)
    return line if len(line) <= limit else line[: limit - 3] + "..."
