"""Fenced blocks of the README and the documentation: what they are, and what their titles say of running them.

A title that is a file's name has the block written there; one that begins with "Not run in CI" says why it is only
looked at; "Exit code 1" is what a command is expected to end with. Everything else is run as it stands.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from conftest import REPOSITORY

NOT_RUN = "Not run in CI: "
_FENCE = re.compile(
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"]*)")?\n(?P<text>.*?)^```$', re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    language: str
    title: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that the block is the content of."""
        return self.title if re.fullmatch(r"[\w./-]+\.\w+", self.title) else None

    @property
    def run(self) -> bool:
        return self.language in ("bash", "python") and not self.title.startswith(NOT_RUN)

    @property
    def code(self) -> int:
        found = re.match(r"Exit code (\d+)", self.title)
        return int(found[1]) if found else 0

    @property
    def commands(self) -> list[list[str]]:
        """The words of every command of a shell block, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        parts = [part for line in lines for part in line.split("&&")]
        return [words for part in parts if (words := shlex.split(part, comments=True))]


def read_blocks(page: Path) -> list[Block]:
    name = str(page.relative_to(REPOSITORY))
    found = _FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(name, one["language"], one["title"] or "", one["text"]) for one in found]


README = read_blocks(REPOSITORY / "README.md")
PAGES = {
    str(page.relative_to(REPOSITORY)): read_blocks(page) for page in sorted((REPOSITORY / "docs").rglob("*.md"))
}  # fmt: skip
