"""Questions with the answer template of each, and their split: no answer, or no wording, stands on two sides.

Owns what a table of answers must look like, and the built-in demo. Knows nothing of tasks or encoders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import NDArray

from peft_combo.data.labels.texts import TextSplit, data_path, list_entries, split_texts, text_key
from peft_combo.data.readers.forms import READ, find_table, table_at
from peft_combo.data.readers.tables import name_columns, read_table
from peft_combo.errors import DataError, Fault

if TYPE_CHECKING:
    from peft_combo.recipe.model import DataConfig

_DEMO = Path(__file__).resolve().with_name("demo_answers.txt")
_FILLED = {
    "{item}": ("coat", "pair of boots", "handbag", "lamp", "kettle", "jumper"),
    "{days}": ("two", "five", "ten", "12"),
    "{city}": ("Porto", "Lyon", "Graz", "Turku"),
}
_VARIANTS = 2  # of each question with something to fill in


@dataclass(frozen=True, eq=False)
class AnswerPairs:
    """Distinct questions, and the answer template of each.

    Attributes:
        questions: distinct but for case and spaces. answers: distinct templates. of: (Q,) the answer of each question.
        groups: (Q,) wording of each question; one that differs in a filled-in word alone is of the same.
        digest: sha256 over both. notes: what was dropped or merged while reading.
    """

    name: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    of: NDArray[np.int64]
    groups: tuple[str, ...]
    digest: str
    notes: tuple[str, ...]

    @classmethod
    def build(cls, name: str, pairs: Iterable[tuple[str, str, str]], notes: Sequence[str] = ()) -> Self:
        """Take question, answer and wording ("" for one of its own); a question with several answers keeps the first.

        Raises:
            DataError: there are fewer than two answers.
        """
        told = list(notes)
        answers: dict[str, str] = {}
        first: dict[str, tuple[str, str, str]] = {}
        count = several = 0
        for question, answer, group in pairs:
            count += 1
            answers.setdefault(text_key(answer), answer)
            kept = first.setdefault(text_key(question), (question, text_key(answer), group or text_key(question)))
            several += kept[1] != text_key(answer)
        if len(answers) < 2:
            raise DataError(f"Questions are matched with answers, and {name} has {len(answers)}. Give two at least.")
        if count > len(first):
            told.append(f"{count:,} questions are {len(first):,} distinct ones")
        if several:
            told.append(f"{several:,} questions have another answer before; the first one stands")
        place = {key: row for row, key in enumerate(answers)}
        of = [place[key] for _, key, _ in first.values()]
        groups = tuple(group for *_, group in first.values())
        texts = [[question for question, *_ in first.values()], list(answers.values()), of, groups]
        digest = hashlib.sha256(b"peft-combo answers 1\n" + json.dumps(texts).encode()).hexdigest()
        return cls(
            name, tuple(q for q, *_ in first.values()), tuple(answers.values()), np.array(of, np.int64), groups, digest,
            tuple(told),
        )  # fmt: skip


def read_answers(config: DataConfig) -> AnswerPairs:
    """Read the answers table, as CSV, Parquet or JSON Lines, or the built-in demo.

    Its columns are question, answer and, where several questions are of one wording, wording.

    Raises:
        DataError: it is not there, or has faults; all of them are in the message.
    """
    if config.source == "demo-answers":
        return read_demo_answers()
    faults: list[Fault] = []
    notes: list[str] = []
    path = data_path(config, "answers")
    files = table_at(path, "answers", faults) if path.is_file() else find_table(path, "answers", faults)
    if files is None and not faults:
        raise DataError(f"Expected answers.csv (or {READ}) in {path}; found {list_entries(path)}.")
    read = None if files is None else read_table(files, faults, notes)
    table = None if read is None else name_columns(read, "answers", {}, ("question", "answer"), ("wording",))
    pairs: list[tuple[str, str, str]] = []
    if table is not None:
        columns = [[" ".join(cell.split()) for cell in table.strings(name)] for name in ("question", "answer")]
        for name, cells in zip(("question", "answer"), columns, strict=True):
            table.blame(
                [row for row, cell in enumerate(cells) if not cell], f"{name} is empty.", "Every row needs one."
            )
        pairs = list(zip(*columns, table.strings("wording"), strict=True))
    if faults:
        raise DataError.from_faults(f"The answers in {path} cannot be used:", faults)
    folder = path.parent if path.is_file() else path
    return AnswerPairs.build(folder.resolve().name, pairs, notes)


def read_demo_answers() -> AnswerPairs:
    """Return the questions of the demo: every one that is written down, with words filled in by the place it has.

    Questions and answers are invented; few share a word, so that words alone do not tell which belong together.
    """
    pairs = []
    lines = [line for line in _DEMO.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    for row, line in enumerate(lines):
        answer, *questions = (part.strip() for part in line.split("|"))
        for place, question in enumerate(questions):
            for variant in range(_VARIANTS):
                filled = question
                for slot, words in _FILLED.items():
                    filled = filled.replace(slot, words[(row + place + variant) % len(words)])
                pairs.append((filled, answer, question))
    distinct = dict.fromkeys(pairs)
    return AnswerPairs.build("demo-answers", distinct, ["made-up questions of a shop's customers"])


def split_answers(pairs: AnswerPairs, config: DataConfig, unseen: Literal["answers", "questions"]) -> TextSplit:
    """Divide questions so that no answer, or no wording of a question, stands on two sides.

    Args:
        unseen: what test questions have that training does not: an answer of their own, or a wording of their own.
    Raises:
        DataError: there are too few answers or questions.
    """
    if unseen == "answers":
        names, of = list(pairs.answers), pairs.of
    else:
        place = {group: row for row, group in enumerate(dict.fromkeys(pairs.groups))}
        names, of = list(place), np.array([place[group] for group in pairs.groups], np.int64)
    parts = split_texts(names, config)
    rows = [np.flatnonzero(np.isin(of, own)) for own in (parts.train, parts.valid, parts.test)]
    if any(not len(own) for own in rows):
        raise DataError(f"{pairs.name} has a part without a question. Give more questions and answers.")
    return TextSplit(rows[0], rows[1], rows[2], parts.digest)
