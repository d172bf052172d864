"""WordNet's own database files as groups of names for products: read where they are on the machine, never fetched.

Owns where the files are sought and which synsets are trusted. Two names stand for each other only where the most
frequent sense of both is the same synset, and that synset is of artefacts, food or substances: WordNet also knows that
a "sneaker" may be one who sneaks, and a "couch" the first layer of paint.

Source: Miller 1995, "WordNet: a lexical database for English"; the format is that of wndb(5WN).
"""

from __future__ import annotations

import os
from pathlib import Path

from peft_combo.errors import DataError
from peft_combo.files import literal_path

WORDNET = "wordnet"
"""What `augmentation.lexicon` says for it."""

# Lexicographer files (lexnames): noun.artifact, noun.food, noun.substance.
_KINDS = frozenset({"06", "13", "27"})
_USUAL = ("/usr/share/wordnet", "/usr/share/wordnet-3.0", "/usr/local/WordNet-3.0/dict")
_SHORTEST, _MOST_WORDS = 3, 3


def read_wordnet() -> list[list[str]]:
    """Return groups of names in the singular, those of one synset together, in the order of the database.

    Raises:
        DataError: the files are not there, or are no WordNet database.
    """
    folder = _find()
    index, data = folder / "index.noun", folder / "data.noun"
    try:
        first = dict(map(_read_first_sense, _lines(index)))
        groups = [_read_names(line) for line in _lines(data)]
    except OSError as error:
        raise DataError(f"WordNet's {error.filename} cannot be read: {error.strerror}.") from error
    except (ValueError, IndexError):
        raise DataError(f"{folder} holds no WordNet 3 database: index.noun and data.noun have other lines.") from None
    trusted = ([name for name in names if first.get(name) == synset] for synset, names in groups)
    return [[name.replace("_", " ") for name in names] for names in trusted if len(names) > 1]


def _find() -> Path:
    told = [os.environ.get("WNSEARCHDIR", ""), os.path.join(os.environ.get("WNHOME", ""), "dict")]
    for folder in (*(literal_path(one) for one in told if one and one != "dict"), *map(Path, _USUAL)):
        if (folder / "index.noun").is_file() and (folder / "data.noun").is_file():
            return folder
    raise DataError(
        "augmentation.lexicon is wordnet, and WordNet's index.noun and data.noun are not on this machine. Install them "
        "(on Debian: apt install wordnet-base), or name their folder in WNSEARCHDIR."
    )


def _lines(file: Path) -> list[str]:
    """Return the lines of a database file; its licence stands in front, behind two spaces."""
    return [line for line in file.read_text(encoding="ascii", errors="replace").splitlines() if line[:2] != "  "]


def _read_first_sense(line: str) -> tuple[str, str]:
    """Read ``lemma pos synsets pointers [pointer...] senses tagged offset [offset...]``: lemma and first offset."""
    cells = line.split()
    return cells[0], cells[-int(cells[2])]


def _read_names(line: str) -> tuple[str, list[str]]:
    """Read ``offset file type count word id [word id...] ...``, count in hexadecimal: offset and the names in it.

    Names of people and makes, abbreviations, and synsets of other files have none.
    """
    cells = line.split(" ", 4)
    count = int(cells[3], 16)
    if cells[1] not in _KINDS or count < 2:
        return cells[0], []
    words = cells[4].split(" ", 2 * count)[: 2 * count : 2]
    return cells[0], [word for word in words if _is_name(word)]


def _is_name(word: str) -> bool:
    parts = word.split("_")
    plain = all(part.replace("-", "").isalpha() for part in parts)
    return plain and word.islower() and len(word) >= _SHORTEST and len(parts) <= _MOST_WORDS
