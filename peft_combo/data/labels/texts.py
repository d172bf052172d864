"""Labelled texts, of a table or made of a catalogue, and their split without a text on both sides.

Owns what a labels table must look like and what becomes of texts that occur twice. Knows nothing of tasks or encoders.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.model import CATEGORY_SEPARATOR, Dataset
from peft_combo.data.readers.cells import Table
from peft_combo.data.readers.forms import READ, find_table, table_at
from peft_combo.data.readers.reviews_en import ARCHIVE, read_snippets
from peft_combo.data.readers.reviews_zh import read_reviews
from peft_combo.data.readers.tables import name_columns, read_table
from peft_combo.errors import DataError, Fault, did_you_mean, make_printable
from peft_combo.files import literal_path

if TYPE_CHECKING:
    from peft_combo.recipe.model import DataConfig


SEVERAL = "|"
"""Between the labels of one text."""


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Distinct texts, each with at least one label.

    Attributes:
        labels: of each text; one where a text has one class.
        digest: sha256 over texts and labels.
        notes: what was dropped or merged while reading.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    digest: str
    notes: tuple[str, ...]

    @classmethod
    def build(
        cls, name: str, texts: Iterable[str], labels: Iterable[tuple[str, ...]], multi_label: bool, notes: Iterable[str]
    ) -> LabelledTexts:
        """Take equal texts (but for case and spaces) for one, under all its labels or under the most frequent.

        Raises:
            DataError: no text has a label.
        """
        told = list(notes)
        first: dict[str, str] = {}
        seen: dict[str, Counter[str]] = {}
        count = unlabelled = 0
        for text, own in zip(texts, labels, strict=True):
            key = text_key(text)
            if not own or not key:
                unlabelled += 1
                continue
            count += 1
            first.setdefault(key, text)
            seen.setdefault(key, Counter()).update(own)
        if not first:
            raise DataError(f"None of the {unlabelled:,} texts of {name} has a label.")
        if unlabelled:
            told.append(f"{unlabelled:,} texts without a label were left out")
        if count > len(first):
            told.append(f"{count:,} texts are {len(first):,} distinct ones")
        undecided = sum(len(votes) > 1 for votes in seen.values())
        if undecided and not multi_label:
            told.append(f"{undecided:,} texts occur under several labels; the most frequent one stands")
        kept = [
            tuple(sorted(votes)) if multi_label else (min(votes, key=lambda label: (-votes[label], label)),)
            for votes in seen.values()
        ]
        return cls(name, tuple(first.values()), tuple(kept), _digest(list(first.values()), kept), tuple(told))

    def sample(self, most: int | None) -> LabelledTexts:
        """Keep the `most` texts whose hashes are lowest: which ones does not depend on their order; None keeps all."""
        if most is None or len(self.texts) <= most:
            return self
        ranks = [hashlib.sha256(text_key(text).encode("utf-8", "surrogatepass")).digest() for text in self.texts]
        rows = sorted(sorted(range(len(ranks)), key=ranks.__getitem__)[:most])
        texts, labels = [self.texts[row] for row in rows], [self.labels[row] for row in rows]
        note = f"{most:,} of {len(self.texts):,} texts sampled by a hash of each"
        return LabelledTexts(self.name, tuple(texts), tuple(labels), _digest(texts, labels), (*self.notes, note))


def _digest(texts: Sequence[str], labels: Sequence[tuple[str, ...]]) -> str:
    digest = hashlib.sha256(b"peft-combo labelled texts 1\n")
    digest.update(json.dumps([list(texts), list(labels)]).encode())
    return digest.hexdigest()


def text_key(text: str) -> str:
    """Return what two texts share that may not stand on both sides of a split."""
    return " ".join(text.casefold().split())


@dataclass(frozen=True, eq=False)
class TextSplit:
    """Places of texts per part, ascending, and the sha256 over the texts of each part."""

    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    test: NDArray[np.int64]
    digest: str


def split_texts(texts: Sequence[str], config: DataConfig) -> TextSplit:
    """Divide distinct texts by a hash of the seed and each text: adding texts never moves those that were there.

    Raises:
        DataError: a part would be empty.
    """
    valid, test = config.valid_fraction, config.test_fraction
    parts: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for place, text in enumerate(texts):
        hashed = hashlib.sha256(f"{config.split_seed}:{text_key(text)}".encode("utf-8", "surrogatepass")).digest()
        position = int.from_bytes(hashed[:8], "big") / 2**64
        parts["test" if position < test else "valid" if position < test + valid else "train"].append(place)
    if short := [name for name, places in parts.items() if not places]:
        raise DataError(
            f"{len(texts):,} distinct texts are too few to divide: none is left for {' and '.join(short)}. Give more, "
            "or larger data.valid_fraction and data.test_fraction."
        )
    digest = hashlib.sha256(f"peft-combo text split 1\n{valid!r} {test!r} {config.split_seed}\n".encode())
    for name, places in parts.items():
        digest.update(f"{name}\n".encode())
        digest.update("\n".join(sorted(texts[place] for place in places)).encode("utf-8", "surrogatepass"))
    train, held, asked = (np.array(parts[name], np.int64) for name in ("train", "valid", "test"))
    return TextSplit(train, held, asked, digest.hexdigest())


def read_labels(config: DataConfig, multi_label: bool) -> LabelledTexts:
    """Read the labels table: text and label, as CSV, Parquet or JSON Lines; a label may be a list where several apply.

    Raises:
        DataError: it is not there, or has faults; all of them are in the message.
    """
    if config.source == "reviews-zh":
        return LabelledTexts.build(config.source, *read_reviews(), multi_label, []).sample(config.max_texts)
    faults: list[Fault] = []
    notes: list[str] = []
    path = data_path(config, "labels")
    if (path / ARCHIVE).is_file():
        snippets, said, left_out = read_snippets(path / ARCHIVE)
        return LabelledTexts.build("reviews-en", snippets, said, multi_label, left_out).sample(config.max_texts)
    table = find_labels(path, config, ("text", "label"), (), faults, notes)
    if table is None and not faults:
        raise DataError(f"Expected labels.csv (or {READ}) in {path}; found {list_entries(path)}.")
    if table is not None:
        table.doubt_words("label")
        table.note_missing_words(["text"])
        texts = table.strings("text")
        single = [(one,) if one else () for one in table.strings("label")]
        labels = table.lists("label", SEVERAL) if multi_label else single
        table.blame([row for row, text in enumerate(texts) if not text], "text is empty.", "Write it, or drop the row.")
    if faults:
        raise DataError.from_faults(f"The labels in {path} cannot be used:", faults)
    folder = path.parent if path.is_file() else path
    return LabelledTexts.build(folder.resolve().name, texts, labels, multi_label, notes).sample(config.max_texts)


def find_labels(
    path: Path, config: DataConfig, required: Sequence[str], optional: Sequence[str], faults: list[Fault],
    notes: list[str],
) -> Table | None:  # fmt: skip
    """Return the labels table that `path` is or holds; None where there is none, or with faults where it is faulty."""
    files = table_at(path, "labels", faults) if path.is_file() else find_table(path, "labels", faults)
    read = None if files is None else read_table(files, faults, notes)
    return None if read is None else name_columns(read, "labels", config.columns.get("labels", {}), required, optional)


def data_path(config: DataConfig, name: str) -> Path:
    """Return the file or folder that a table beside the catalogue is read from.

    Raises:
        DataError: the data are no folder.
    """
    if config.source != "folder" or config.path is None:
        raise DataError(
            f"A {name} table lies in a folder of yours, but data.source is {config.source}. Use --data PATH."
        )
    return literal_path(config.path)


def list_entries(folder: Path) -> str:
    """Return the first names in a folder, for a message."""
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(make_printable(one.name) for one in sorted(folder.iterdir())[:10]) or "nothing"


def labels_of_catalogue(dataset: Dataset, labels: str, depth: int | None, multi_label: bool) -> LabelledTexts:
    """Label the text of every item by what the catalogue says of it.

    Args:
        labels: category, leaf, slot or an attribute.
        depth: levels of the category path that make the class; items of a shorter path are left out.
        multi_label: every name of the path is a label; other columns are parted at "|".
    Raises:
        DataError: the catalogue has no such column, or the text itself would give the label away.
    """
    catalog = dataset.catalog
    columns = ("category", "leaf", "slot", *catalog.attributes)
    if labels not in columns:
        raise DataError(
            f"task.labels: the items of {dataset.name} have no {labels!r}; expected one of {', '.join(columns)}. "
            f"{did_you_mean(labels, columns)}".rstrip()
        )
    template = dataset.text_template
    telling = {"category", "leaf"} if labels in ("category", "leaf") else {labels}
    if given_away := [name for name in sorted(telling) if f"{{{name}}}" in template]:
        raise DataError(
            f"data.text: {template!r} names {given_away[0]}, which gives task.labels: {labels} away. Take it out."
        )
    found: list[tuple[str, ...]]
    if labels == "category":
        paths = [path[:depth] if len(path) >= (depth or 1) else () for path in catalog.categories]
        found = [path if multi_label or not path else (CATEGORY_SEPARATOR.join(path),) for path in paths]
    else:
        cells = (
            [catalog.leaf(row) for row in range(len(catalog))]
            if labels == "leaf"
            else (catalog.slots if labels == "slot" else catalog.attributes[labels])
        )
        parted = [(cell or "").split(SEVERAL) if multi_label else [cell or ""] for cell in cells]
        found = [tuple(name for part in parts if (name := part.strip())) for parts in parted]
    notes = [f"{dataset.name}: {note}" for note in dataset.notes]
    return LabelledTexts.build(dataset.name, dataset.texts, found, multi_label, notes)
