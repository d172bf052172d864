"""Unlabelled texts of a catalogue, for masked language modelling.

Owns which texts of a catalogue count, once each. Knows nothing of tokens or encoders.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Self

from peft_combo.data.labels.tags import words_of
from peft_combo.data.labels.texts import text_key
from peft_combo.data.model import Dataset
from peft_combo.errors import DataError

# A text of one word has nothing around a masked word that it could be told by.
_FEWEST_WORDS = 2


@dataclass(frozen=True, eq=False)
class PlainTexts:
    """Distinct texts of two words or more.

    Attributes:
        digest: sha256 over the texts. notes: what was dropped or merged while reading.
    """

    name: str
    texts: tuple[str, ...]
    digest: str
    notes: tuple[str, ...]

    @classmethod
    def of_catalogue(cls, dataset: Dataset) -> Self:
        """Take the texts of all items; of equal ones (but for case and spaces) the first.

        Raises:
            DataError: no text has two words.
        """
        texts = dataset.texts
        first: dict[str, str] = {}
        for text in texts:
            first.setdefault(text_key(text), text)
        kept = [text for text in first.values() if len(words_of(text)) >= _FEWEST_WORDS]
        if not kept:
            raise DataError(
                f"None of the {len(texts):,} texts of {dataset.name} has {_FEWEST_WORDS} words. Put more into "
                "data.text."
            )
        notes = [f"{dataset.name}: {note}" for note in dataset.notes]
        if len(first) < len(texts):
            notes.append(f"{len(texts):,} texts are {len(first):,} distinct ones")
        if len(kept) < len(first):
            notes.append(f"{len(first) - len(kept):,} texts of a single word were left out")
        digest = hashlib.sha256(b"peft-combo plain texts 1\n" + json.dumps(kept).encode())
        return cls(dataset.name, tuple(kept), digest.hexdigest(), tuple(notes))
