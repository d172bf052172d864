"""Lexicon of synonyms and attribute values: which phrases may stand for each other in a product text.

Owns the form of a lexicon file, its faults, and how phrases are found in a text and put into its case. Knows nothing of
catalogues or chances. The file that ships with the package is `lexicon.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from peft_combo.data.augmentation.wordnet import WORDNET, read_wordnet
from peft_combo.data.language.english_nouns import pluralize
from peft_combo.data.language.scripts import HAN_RANGES
from peft_combo.errors import DataError, Fault, did_you_mean, make_printable
from peft_combo.files import literal_path
from peft_combo.recipe.fields import format_step, format_value

SHIPPED = Path(__file__).with_name("lexicon.yaml")
_MAX_BYTES = 4 * 2**20
_SECTIONS = ("nouns", "words", "attributes", "keep")
# "women's", "ladies'", "R&B" as three words; a hyphen parts words, so that "v-neck" and "v neck" are one phrase. A Han
# character is a word of its own, so that a Chinese phrase is found wherever its characters stand together.
_LETTER = rf"[^\W_{HAN_RANGES}]"
_WORD = re.compile(rf"[{HAN_RANGES}]|{_LETTER}+(?:['’]{_LETTER}+)*(?:(?<=s)['’])?|&")
_JOINING = ("", " ", "-")


@dataclass(frozen=True)
class LexiconMatch:
    """A phrase of the lexicon in a text.

    Attributes:
        start, stop: its place, in characters.
        synonyms, attributes: what may stand for it, as the lexicon writes it; both empty where it is to be kept.
    """

    start: int
    stop: int
    synonyms: tuple[str, ...]
    attributes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Lexicon:
    """Groups of phrases, ready to be looked up.

    Attributes:
        synonyms, attributes: a phrase, as words in lower case -> what may stand for it.
        kept: phrases in which nothing is changed.
        spelt: phrases that the lexicon itself writes with capitals.
    """

    synonyms: Mapping[tuple[str, ...], tuple[str, ...]]
    attributes: Mapping[tuple[str, ...], tuple[str, ...]]
    kept: frozenset[tuple[str, ...]]
    spelt: frozenset[str]

    @cached_property
    def longest(self) -> int:
        """Words of the longest phrase."""
        return max(map(len, (*self.synonyms, *self.attributes, *self.kept)), default=0)

    def find(self, text: str) -> Iterator[LexiconMatch]:
        """Yield the phrases of a text from left to right, none inside another, the longest of those that start alike.

        A phrase is no part of a longer hyphenated word: "shirt" is not found in "sweat-shirt".
        """
        words = list(_WORD.finditer(text))
        keys = [_key(word.group()) for word in words]
        gaps = [text[left.end() : right.start()] for left, right in pairwise(words)]
        start = 0
        while start < len(words):
            length = 0 if start and gaps[start - 1] == "-" else self._length(keys, gaps, start)
            if length:
                phrase = tuple(keys[start : start + length])
                yield LexiconMatch(
                    words[start].start(), words[start + length - 1].end(),
                    self.synonyms.get(phrase, ()), self.attributes.get(phrase, ()),
                )  # fmt: skip
            start += length or 1

    def _length(self, keys: Sequence[str], gaps: Sequence[str], start: int) -> int:
        """Return the words of the longest phrase that starts here, 0 for none."""
        most = 1
        while most < self.longest and start + most < len(keys) and gaps[start + most - 1] in _JOINING:
            most += 1
        for length in range(most, 0, -1):
            phrase = tuple(keys[start : start + length])
            ends = start + length == len(keys) or gaps[start + length - 1] != "-"
            if ends and (phrase in self.synonyms or phrase in self.attributes or phrase in self.kept):
                return length
        return 0

    def in_case_of(self, phrase: str, model: str) -> str:
        """Write a phrase of the lexicon the way a text writes `model`: "tee" is "TEE" for "T-SHIRT", "Tee" for "Shirt".

        Capitals of the lexicon stay ("USB"), and a `model` that it writes with capitals itself says nothing.
        """
        words = [word for word in _WORD.findall(model) if word[0].isalpha()]
        if not words or model in self.spelt:
            return phrase
        if model.isupper() and sum(map(len, words)) > 1:
            return phrase.upper()
        if not words[0][0].isupper():
            return phrase
        # Titles write every word with a capital; a phrase with a capital only at its start begins a sentence.
        count = 0 if all(word[0].isupper() for word in words) else 1
        return _WORD.sub(lambda word: word.group()[0].upper() + word.group()[1:], phrase, count=count)


def read_lexicon(path: str | None) -> Lexicon:
    """Read a lexicon, or the one that ships with the package where `path` is None.

    ``wordnet`` adds the groups of WordNet to the one that ships, where the machine has it (`read_wordnet`); a name that
    stands in both is what ours says.

    The file is YAML with any of four keys. `nouns`: groups of synonyms in the singular; their plurals are known too.
    `words`: groups of synonyms as they stand. `attributes`: kind -> values, each of which may stand for the others.
    `keep`: phrases in which nothing is changed ("red wine", a brand "Black & Decker").

    Raises:
        DataError: the file is not there, or has faults; all of them are in the message.
    """
    if path == WORDNET:
        return _add_nouns(_read_shipped(), read_wordnet())
    return _read_shipped() if path is None else _parse(literal_path(path))


@lru_cache(maxsize=1)
def _read_shipped() -> Lexicon:
    return _parse(SHIPPED)


def _add_nouns(lexicon: Lexicon, groups: Sequence[Sequence[str]]) -> Lexicon:
    """Add groups of synonyms in the singular, and in the plural; phrases that are known stay as they are."""
    known = lexicon.synonyms.keys() | lexicon.attributes.keys() | lexicon.kept
    added: dict[tuple[str, ...], tuple[str, ...]] = {}
    for group in groups:
        for names in (group, [pluralize(name) for name in group]):
            fresh = [
                name for name in dict.fromkeys(names) if (words := _words(name)) not in known and words not in added
            ]
            if len(fresh) > 1:
                added |= {_words(name): tuple(other for other in fresh if other != name) for name in fresh}
    return replace(lexicon, synonyms={**lexicon.synonyms, **added})


def _parse(file: Path) -> Lexicon:
    raw = _read(file)
    faults = [
        Fault(format_step(key), "unknown key.", did_you_mean(key, _SECTIONS) or f"Known are {', '.join(_SECTIONS)}.")
        for key in raw
        if key not in _SECTIONS
    ]
    synonyms: dict[tuple[str, ...], tuple[str, ...]] = {}
    attributes: dict[tuple[str, ...], tuple[str, ...]] = {}
    kept: dict[tuple[str, ...], tuple[str, ...]] = {}
    places: dict[tuple[str, ...], str] = {}
    spelt: set[str] = set()

    def enter(table: dict[tuple[str, ...], tuple[str, ...]], where: str, group: Sequence[str]) -> None:
        for phrase in group:
            words = _words(phrase)
            # A word may have synonyms and be the value of an attribute ("grey"); what is kept has neither.
            if words in table or (table is kept and words in places):
                faults.append(
                    Fault(where, f"{format_value(phrase)} stands in {places[words]} already.", "Keep one of them.")
                )
            table.setdefault(words, tuple(other for other in group if other != phrase))
            places.setdefault(words, where)
            if phrase != phrase.lower():
                spelt.add(phrase)

    for where, group in _groups(raw, "nouns", faults):
        enter(synonyms, where, group)
        # A plural gives way to a plural; "hoodie" and "hoody" share theirs.
        enter(synonyms, where, list(dict.fromkeys(pluralize(phrase) for phrase in group)))
    for where, group in _groups(raw, "words", faults):
        enter(synonyms, where, group)
    for where, group in _attributes(raw, faults):
        enter(attributes, where, group)
    for where, phrase in _phrases(raw.get("keep", []), "keep", faults):
        enter(kept, where, [phrase])
    if not places and not faults:
        faults.append(Fault("the file", f"is empty; expected any of {', '.join(_SECTIONS)}."))
    if faults:
        raise DataError.from_faults(f"The lexicon {make_printable(str(file))} cannot be used:", faults)
    return Lexicon(synonyms, attributes, frozenset(kept), frozenset(spelt))


def _read(file: Path) -> dict[str, Any]:
    title = f"The lexicon {make_printable(str(file))} cannot be read:"
    try:
        with file.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{title} {error.strerror}.") from error
    if len(content) > _MAX_BYTES:
        raise DataError(f"{title} expected at most {_MAX_BYTES // 2**20} MiB, found more.")
    try:
        # Every value stays the text it is: `no`, `on` and `12` are words here.
        raw = yaml.load(content.decode("utf-8-sig"), Loader=yaml.BaseLoader)
    except UnicodeDecodeError as error:
        raise DataError(f"{title} expected UTF-8, found the byte 0x{content[error.start]:02x}.") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise DataError(f"{title} not valid YAML{line}: {error.problem}.") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = make_printable((str(error).splitlines() or [type(error).__name__])[0])
        raise DataError(f"{title} not valid YAML: {reason}.") from None
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise DataError(f"{title} expected keys ({', '.join(_SECTIONS)}), found {format_value(raw)}.")
    return raw


def _groups(raw: Mapping[str, Any], section: str, faults: list[Fault]) -> Iterator[tuple[str, list[str]]]:
    """Yield the groups of synonyms of a section, with their places."""
    groups = raw.get(section, [])
    if not isinstance(groups, list):
        faults.append(
            Fault(section, f"expected a list of groups, found {format_value(groups)}.", "Write - [couch, sofa].")
        )
        return
    for place, group in enumerate(groups):
        yield from _group(f"{section}[{place}]", group, faults)


def _attributes(raw: Mapping[str, Any], faults: list[Fault]) -> Iterator[tuple[str, list[str]]]:
    kinds = raw.get("attributes", {})
    if not isinstance(kinds, dict):
        remedy = "Write colour: [black, white]."
        faults.append(Fault("attributes", f"expected kinds with their values, found {format_value(kinds)}.", remedy))
        return
    for kind, values in kinds.items():
        yield from _group(f"attributes.{format_step(kind)}", values, faults)


def _group(where: str, group: Any, faults: list[Fault]) -> Iterator[tuple[str, list[str]]]:
    before = len(faults)
    phrases = [phrase for _, phrase in _phrases(group, where, faults)]
    if len(faults) == before:
        if len(phrases) < 2:
            faults.append(Fault(where, f"expected two phrases or more, found {len(phrases)}."))
        else:
            yield where, phrases


def _phrases(phrases: Any, where: str, faults: list[Fault]) -> Iterator[tuple[str, str]]:
    if not isinstance(phrases, list):
        faults.append(
            Fault(where, f"expected a list of phrases, found {format_value(phrases)}.", "Write [couch, sofa].")
        )
        return
    for place, phrase in enumerate(phrases):
        here = f"{where}[{place}]"
        if not isinstance(phrase, str):
            faults.append(Fault(here, f"expected a phrase, found {format_value(phrase)}."))
        elif not _findable(phrase):
            remedy = "Write words of letters and digits with one space or hyphen between them."
            faults.append(Fault(here, f"{format_value(phrase)} can be found in no text.", remedy))
        else:
            yield here, phrase


def _findable(phrase: str) -> bool:
    words = list(_WORD.finditer(phrase))
    whole = bool(words) and words[0].start() == 0 and words[-1].end() == len(phrase)
    return whole and all(phrase[left.end() : right.start()] in _JOINING for left, right in pairwise(words))


def _words(phrase: str) -> tuple[str, ...]:
    return tuple(map(_key, _WORD.findall(phrase)))


def _key(word: str) -> str:
    return word.casefold().replace("’", "'")
