"""BIO tags: tokens with tags, texts with spans or CoNLL files read, or weak tags made of a catalogue.

Owns the three formats, their faults, the weak labeller, and what entities say of a catalogue's items. A tagged text
keeps the text itself and where its words stand in it, so that whoever cuts it otherwise (word pieces) can find them
again. Knows nothing of encoders.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from peft_combo.data.labels.texts import data_path, list_entries, text_key
from peft_combo.data.language.names import FASHION_NAMES, join_folded
from peft_combo.data.language.scripts import HAN_RANGES
from peft_combo.data.model import Catalog, Dataset
from peft_combo.data.readers.csv_table import SHOWN_FAULTS
from peft_combo.data.readers.encodings import decode
from peft_combo.data.readers.json_lines import holds_half, is_deep
from peft_combo.errors import DataError, Fault, did_you_mean

if TYPE_CHECKING:
    from peft_combo.recipe.model import DataConfig


OUTSIDE = "O"
TAG_SUFFIXES = (".jsonl", ".conll")
# A word is letters and digits, also around a hyphen or an apostrophe; any other mark stands for itself. A Han character
# is a word: where Chinese words end is for the tagger to say.
_LETTER = rf"[^\W{HAN_RANGES}]"
_WORD = re.compile(rf"[{HAN_RANGES}]|{_LETTER}+(?:[-'’&]{_LETTER}+)*|[^\w\s]")
# What follows one of these in a title is not the thing itself: "dress with belt", "case for phone".
_BESIDE = re.compile(r"\b(?:with|and|for|in|from|by)\b|\bw/|[&+]|搭配|[配送赠附]", re.IGNORECASE)
_TAG = re.compile(r"O|[BI]-\S+")


@dataclass(frozen=True)
class TaggedText:
    """One text.

    Attributes:
        words: where each word starts and ends in `text` (the end not included), ascending, without overlap.
        tags: one per word: O, B-Type (an entity begins) or I-Type (it goes on).
    """

    text: str
    words: tuple[tuple[int, int], ...]
    tags: tuple[str, ...]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The words themselves."""
        return tuple(self.text[start:end] for start, end in self.words)


@dataclass(frozen=True)
class Entity:
    """What a text names.

    Attributes:
        start, end: its characters in the text, `end` not included.
        score: how likely its tags are, the least sure of its words; 1 where a rule says so.
    """

    type: str
    text: str
    start: int
    end: int
    score: float


Tagger: TypeAlias = Callable[[Sequence[str]], Sequence[Sequence[Entity]]]
"""Finds the entities of texts, in order of their place: a stored tagging adapter, or `noun_entities`."""


@dataclass(frozen=True, eq=False)
class TaggedTexts:
    """Distinct tagged texts; `digest` is a sha256 over all of it, `notes` say what was dropped."""

    name: str
    texts: tuple[TaggedText, ...]
    digest: str
    notes: tuple[str, ...]

    @classmethod
    def build(cls, name: str, texts: Iterable[TaggedText], notes: Iterable[str]) -> TaggedTexts:
        """Take equal texts (but for case and spaces) for one: the first of them stands.

        Raises:
            DataError: no text names an entity.
        """
        first: dict[str, TaggedText] = {}
        count = 0
        for one in texts:
            if one.words:
                count += 1
                first.setdefault(text_key(one.text), one)
        if not any(tag != OUTSIDE for one in first.values() for tag in one.tags):
            raise DataError(f"None of the {count:,} texts of {name} has a tag other than {OUTSIDE}.")
        told = [*notes, *([f"{count:,} texts are {len(first):,} distinct ones"] if count > len(first) else [])]
        digest = hashlib.sha256(b"peft-combo tagged texts 1\n")
        digest.update(json.dumps([[one.text, one.words, one.tags] for one in first.values()]).encode())
        return cls(name, tuple(first.values()), digest.hexdigest(), tuple(told))


def words_of(text: str) -> tuple[tuple[int, int], ...]:
    """Return where each word of a text starts and ends (the end not included)."""
    return tuple(found.span() for found in _WORD.finditer(text))


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the entities of a tag sequence: type, first word, word after the last.

    An I that does not go on with an entity of its type begins one, as in the CoNLL-2000 evaluation script; a model may
    say so, and data written in the older IOB1 does.
    """
    found: list[tuple[str, int, int]] = []
    start, current = 0, ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, kind = tag.partition("-")
        if current and (prefix != "I" or kind != current):
            found.append((current, start, place))
            current = ""
        if prefix != OUTSIDE and not current:
            start, current = place, kind
    return found


def read_tags(config: DataConfig) -> TaggedTexts:
    """Read the tags table: ``tags.jsonl`` or ``tags.conll``.

    JSON Lines hold ``{"tokens": [...], "tags": [...]}``, or ``{"text": ..., "spans": [[start, end, "Type"], ...]}``
    with character offsets (or objects with start, end and label). CoNLL has one word a line, its tag in the last
    column, and an empty line between texts.

    Raises:
        DataError: it is not there, or has faults; all of them are in the message.
    """
    file = _tags_file(data_path(config, "tags"))
    try:
        decoded = decode(file.read_bytes(), file.name)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error
    if decoded.text is None:
        raise DataError(f"{file}:{decoded.line}: {decoded.problem} {decoded.remedy}".rstrip())
    lines = decoded.text.splitlines()
    faults: list[Fault] = []
    read = _json_lines if file.suffix == ".jsonl" else _conll
    texts = list(read(file, lines, faults))
    if faults:
        more = len(faults) - SHOWN_FAULTS
        told = [*faults[:SHOWN_FAULTS], *([Fault(file.name, f"{more:,} more faults.")] if more > 0 else [])]
        raise DataError.from_faults(f"The tags in {file} cannot be used:", told)
    return TaggedTexts.build(file.parent.resolve().name, texts, [decoded.note] if decoded.note else [])


def list_tag_files(folder: Path) -> list[Path]:
    """Return the tags tables in a folder; there should be one."""
    return [file for suffix in TAG_SUFFIXES if (file := folder / f"tags{suffix}").is_file()]


def _tags_file(path: Path) -> Path:
    if path.is_file() and path.suffix in TAG_SUFFIXES:
        return path
    found = list_tag_files(path)
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise DataError(f"{names} exist in {path}; expected one. Remove all but one.")
    if not found:
        wanted = " or ".join(f"tags{suffix}" for suffix in TAG_SUFFIXES)
        raise DataError(f"Expected {wanted} in {path}; found {list_entries(path)}.")
    return found[0]


def _json_lines(file: Path, lines: Sequence[str], faults: list[Fault]) -> Iterator[TaggedText]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file.name}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            faults.append(Fault(where, "is not valid JSON.", "Each line holds one object."))
            continue
        if is_deep(record) or holds_half(record):
            faults.append(Fault(where, "is nested too deeply, or holds half a character (a text cut within an emoji)."))
            continue
        match record:
            case {"tokens": list(tokens), "tags": list(tags)}:
                one = _of_tokens(tokens, tags, lambda _, where=where: where, faults)  # type: ignore[misc]
            case {"text": str(text), "spans": list(spans)}:
                one = _of_spans(text, spans, where, faults)
            case _:
                one = None
                held = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                faults.append(
                    Fault(
                        where,
                        f"expected the lists tokens and tags, or text and the list spans; found {held or 'nothing'}.",
                        'For example {"tokens": ["Red", "dress"], "tags": ["O", "B-Clo"]}.',
                    )
                )
        if one is not None:
            yield one


def _conll(file: Path, lines: Sequence[str], faults: list[Fault]) -> Iterator[TaggedText]:
    tokens: list[str] = []
    tags: list[str] = []
    places: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        cells = line.split()
        if cells and cells[0] != "-DOCSTART-":
            if len(cells) < 2:
                faults.append(
                    Fault(
                        f"{file.name}:{number}",
                        f"expected a word and its tag, found {line.strip()!r}.",
                        "Put a space between them; an empty line ends a text.",
                    )
                )
                continue
            tokens.append(cells[0])
            tags.append(cells[-1])
            places.append(f"{file.name}:{number}")
        elif tokens:
            one = _of_tokens(tokens, tags, places.__getitem__, faults)
            if one is not None:
                yield one
            tokens, tags, places = [], [], []


def _of_tokens(
    tokens: Sequence[Any], tags: Sequence[Any], where: Callable[[int], str], faults: list[Fault]
) -> TaggedText | None:
    """Check tokens and tags; `where` says in which line each token stands."""
    before = len(faults)
    if len(tokens) != len(tags):
        problem = f"tags: expected one for each of {len(tokens)} tokens, found {len(tags)}."
        faults.append(Fault(where(0), problem, "Write O for a token outside of all entities."))
        return None
    for place, (token, tag) in enumerate(zip(tokens, tags, strict=True)):
        if not isinstance(token, str) or not token.strip():
            faults.append(Fault(where(place), f"tokens: expected words, found {token!r}.", "Drop it, and its tag."))
        if not isinstance(tag, str) or not _TAG.fullmatch(tag):
            kind = str(tag).rpartition("-")[2] or "Type"
            remedy = f"Write B-{kind} where an entity begins and I-{kind} where it goes on."
            faults.append(Fault(where(place), f"tags: expected O, B-Type or I-Type, found {tag!r}.", remedy))
    if len(faults) > before:
        return None
    words = []
    start = 0
    for token in tokens:
        words.append((start, start + len(token)))
        start += len(token) + 1
    return TaggedText(" ".join(tokens), tuple(words), tuple(tags))


def _of_spans(text: str, spans: Sequence[Any], where: str, faults: list[Fault]) -> TaggedText | None:
    found: list[tuple[int, int, str]] = []
    for span in spans:
        match span:
            case [int(start), int(end), str(label)] | {"start": int(start), "end": int(end), "label": str(label)}:
                fits = 0 <= start < end <= len(text) and bool(text[start:end].strip())
            case _:
                fits = False
        if not fits or not re.fullmatch(r"\S+", label):
            faults.append(
                Fault(
                    where,
                    f"spans: expected [start, end, type] within {len(text)} characters, found {span!r}.",
                    "Characters count from 0 and the end is not included; a type is one word.",
                )
            )
            return None
        found.append((start, end, label))
    found.sort()
    for (_, end, _), (start, _, label) in pairwise(found):
        if start < end:
            problem = f"spans: expected spans apart, found one at {start} ({label}) within the one before."
            faults.append(Fault(where, problem, "A word has one tag: keep one of the two."))
            return None
    # A span may begin or end within a word: the word is parted there.
    edges = sorted({edge for start, end, _ in found for edge in (start, end)})
    words: list[tuple[int, int]] = []
    for start, end in words_of(text):
        inner = [start, *(edge for edge in edges if start < edge < end), end]
        words += list(pairwise(inner))
    tags = []
    begun: set[int] = set()
    for start, end in words:
        place = next((n for n, (first, last, _) in enumerate(found) if first <= start and end <= last), None)
        tags.append(OUTSIDE if place is None else f"{'I' if place in begun else 'B'}-{found[place][2]}")
        begun |= set() if place is None else {place}
    return TaggedText(text, tuple(words), tuple(tags))


def weak_tags(dataset: Dataset, types: Mapping[str, str]) -> TaggedTexts:
    """Tag the titles of a catalogue by what its slots say and a list of nouns.

    A title's entity is the longest run of nouns of the type that its slot stands for: in "zip top clutch" of slot bag
    the clutch, in "shirt dress" of slot dress both words. Nouns of other types stay outside, and a title without a noun
    of its own type is left out, since it is not known what names the item there. The tags are as good as that rule:
    they serve to start, and what a model adds to the rule shows only on texts that people tagged.

    Args:
        types: slot -> entity type (a key of `FASHION_NAMES`).
    Raises:
        DataError: no item has one of these slots, or no title a known noun.
    """
    catalog = dataset.catalog
    known = sorted({slot for slot in catalog.slots if slot})
    if not set(types) & set(known):
        raise DataError(
            f"task.types names {', '.join(types)}, but the items of {dataset.name} have the slots "
            f"{', '.join(known) or 'none'}. {did_you_mean(next(iter(types)), known)}".rstrip()
        )
    texts: list[TaggedText] = []
    without_slot = without_noun = 0
    for title, slot in zip(catalog.titles, catalog.slots, strict=True):
        if slot is None or slot not in types:
            without_slot += 1
            continue
        words = words_of(title)
        tags = _noun_tags([title[start:end] for start, end in words], types[slot])
        if tags is None:
            without_noun += 1
            continue
        texts.append(TaggedText(title, words, tags))
    notes = [
        f"{dataset.name}: {len(texts):,} titles tagged by slot and noun; {without_slot:,} items have another slot, "
        f"{without_noun:,} titles no noun of their slot's type"
    ]
    return TaggedTexts.build(dataset.name, texts, notes)


def _noun_tags(words: Sequence[str], kind: str) -> tuple[str, ...] | None:
    """Tag the nouns of one type in a title; None where there is none."""
    nouns = FASHION_NAMES[kind]
    folded = [word.casefold().replace("’", "'") for word in words]
    inside = [False] * len(words)
    for start in range(len(words)):
        for end in range(min(len(words), start + nouns.longest), start, -1):
            if join_folded(folded[start:end]) in nouns:
                inside[start:end] = [True] * (end - start)
                break
    if not any(inside):
        return None
    before = [False, *inside]
    return tuple(
        OUTSIDE if not here else f"I-{kind}" if went_on else f"B-{kind}"
        for here, went_on in zip(inside, before, strict=False)
    )


def noun_entities(texts: Sequence[str]) -> list[list[Entity]]:
    """Find the things to wear that texts name, by the list of nouns alone: of runs that overlap the longest.

    It serves where no tagging adapter is at hand, and knows what stands in `FASHION_NAMES` and nothing else.
    """
    return [list(_nouns_in(text)) for text in texts]


def _nouns_in(text: str) -> Iterator[Entity]:
    words = words_of(text)
    folded = [text[start:end].casefold().replace("’", "'") for start, end in words]
    place = 0
    while place < len(words):
        longest = 0
        for kind, nouns in FASHION_NAMES.items():
            for end in range(min(len(words), place + nouns.longest), place + longest, -1):
                if join_folded(folded[place:end]) in nouns:
                    longest, named = end - place, kind
                    break
        if longest:
            start, end = words[place][0], words[place + longest - 1][1]
            yield Entity(named, text[start:end], start, end, 1.0)
        place += longest or 1


def head_entity(title: str, found: Sequence[Entity]) -> Entity | None:
    """Return what a title is the title of: the last entity before "with", "for" and the like, else the first.

    Args:
        found: the entities of the title, in order.
    """
    beside = _BESIDE.search(title)
    before = [one for one in found if beside is None or one.end <= beside.start()]
    return before[-1] if before else found[0] if found else None


def with_slots(catalog: Catalog, tagger: Tagger) -> Catalog:
    """Give items without a slot the type of what their title names, and all items the attribute `entity`, its words.

    A slot that is known stays, and an item whose title names nothing stays without.
    """
    heads = [head_entity(title, own) for title, own in zip(catalog.titles, tagger(catalog.titles), strict=True)]
    slots = tuple(
        slot or (None if head is None else head.type) for slot, head in zip(catalog.slots, heads, strict=True)
    )
    named = tuple(None if head is None else head.text.casefold() for head in heads)
    return replace(catalog, slots=slots, attributes={**catalog.attributes, "entity": named})
