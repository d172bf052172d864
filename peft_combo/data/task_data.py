"""Data of a task: a dataset, labelled texts or tagged texts; opened, checked and described.

Owns which of them a task needs, and what is looked at where no task is named. Knows nothing of encoders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, assert_never

import numpy as np

from peft_combo.data.assemble import Needs
from peft_combo.data.knowledge.broken import describe_broken
from peft_combo.data.labels.answers import AnswerPairs, read_answers, split_answers
from peft_combo.data.labels.tags import TaggedTexts, entities, list_tag_files, read_tags, weak_tags
from peft_combo.data.labels.texts import LabelledTexts, TextSplit, labels_of_catalogue, read_labels, split_texts
from peft_combo.data.labels.unlabelled import PlainTexts
from peft_combo.data.model import Dataset
from peft_combo.data.pictures import find_picture_faults
from peft_combo.data.readers.folder import TABLES
from peft_combo.data.readers.forms import holds_table
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import Split, split_as
from peft_combo.data.stats import describe, quantiles
from peft_combo.errors import DataError, Fault
from peft_combo.files import literal_path
from peft_combo.recipe.task import (
    BundleTask,
    ClassificationTask,
    MaskedTask,
    MatchingTask,
    RatingTask,
    SequenceTask,
    TaggingTask,
    TaskConfig,
)

if TYPE_CHECKING:
    from peft_combo.recipe.model import DataConfig


def needs_of(task: TaskConfig) -> Needs:
    """Return what a task needs beside the items where it learns from a catalogue."""
    match task:
        case BundleTask() | SequenceTask():
            return "bundles"
        case RatingTask():
            return "interactions"
        case ClassificationTask() | TaggingTask() | MaskedTask() | MatchingTask():
            return "items"
        case _:
            assert_never(task)


def read_labelled(data: DataConfig, task: ClassificationTask) -> LabelledTexts:
    """Read the labels table, or label the items of the catalogue, as the task says.

    Raises:
        DataError: what the labels come from is not there, or has faults.
    """
    if task.labels == "table":
        return read_labels(data, task.multi_label)
    dataset = open_dataset(data, needs_of(task))
    return labels_of_catalogue(dataset, task.labels, task.depth, task.multi_label)


def read_tagged(data: DataConfig, task: TaggingTask) -> TaggedTexts:
    """Read the tags table, or tag the titles of the catalogue, as the task says.

    Raises:
        DataError: what the tags come from is not there, or has faults.
    """
    if task.tags == "table":
        return read_tags(data)
    return weak_tags(open_dataset(data, needs_of(task)), task.types)


def texts_of(data: DataConfig, task: MaskedTask) -> PlainTexts:
    """Read the texts of the catalogue, whatever else is known of its items.

    Raises:
        DataError: there is no catalogue, or it has faults.
    """
    return PlainTexts.of_catalogue(open_dataset(data, needs_of(task)))


def check_data(data: DataConfig, task: TaskConfig | None = None) -> list[Fault]:
    """Return everything that is wrong with what a task learns from; an empty list where it can be opened.

    Args:
        task: None checks every table there is, and a catalogue for what bundles need.
    """
    return inspect_data(data, task)[0]


def inspect_data(data: DataConfig, task: TaskConfig | None = None) -> tuple[list[Fault], list[dict[str, Any]]]:
    """Return the faults of `check_data` and, of what can be opened, the figures of `describe_data`."""
    faults: list[Fault] = []
    figures: list[dict[str, Any]] = []
    for opened in _openers(data, task):
        try:
            found = opened()
        except DataError as error:
            faults += error.faults or [Fault(data.path or data.source, str(error))]
        else:
            figures.append(_figures(found, data))
            if isinstance(found, Dataset) and found.catalog.pictures:
                faults += find_picture_faults(found.catalog.pictures, found.catalog.item_ids)
    return faults, figures


def describe_data(data: DataConfig, task: TaskConfig | None = None) -> list[dict[str, Any]]:
    """Return figures of what a task learns from and how it would be split, as plain values that go into JSON.

    Args:
        task: None describes every table there is: a catalogue, labels and tags may lie in one folder.
    Raises:
        DataError: it cannot be opened.
    """
    return [_figures(opened(), data) for opened in _openers(data, task)]


_Data = Dataset | LabelledTexts | TaggedTexts | PlainTexts | AnswerPairs


def _openers(data: DataConfig, task: TaskConfig | None) -> list[Callable[[], _Data]]:
    match task:
        case None:
            every: dict[str, Callable[[], _Data]] = {
                "dataset": lambda: open_dataset(data),
                "labels": lambda: read_labelled(data, ClassificationTask(labels="table")),
                "tags": lambda: read_tagged(data, TaggingTask()),
            }
            return [every[kind] for kind in _kinds_in(data)]
        case ClassificationTask():
            return [lambda: read_labelled(data, task)]
        case TaggingTask():
            return [lambda: read_tagged(data, task)]
        case MaskedTask():
            return [lambda: texts_of(data, task)]
        case MatchingTask():
            return [lambda: read_answers(data)]
        case BundleTask() | SequenceTask() | RatingTask():
            return [lambda: open_dataset(data, needs_of(task))]
        case _:
            assert_never(task)


def _kinds_in(data: DataConfig) -> list[str]:
    """Return what lies in the folder; the dataset where nothing is known, since its reader says what is missing."""
    if data.source != "folder" or data.path is None:
        return ["dataset"]
    path = literal_path(data.path)
    if path.is_file():
        return ["tags" if path.suffix == ".conll" or path.stem == "tags" else "labels"]

    kinds = (("labels", holds_table(path, ["labels"])), ("tags", bool(list_tag_files(path))))
    beside = [kind for kind, there in kinds if there]
    return ["dataset", *beside] if holds_table(path, TABLES) or not beside else beside


def _figures(found: _Data, data: DataConfig) -> dict[str, Any]:
    match found:
        case Dataset():
            figures = {**describe(found), **_split(lambda: split_as(found, data), {"by": data.split})}
            return {**figures, "notes": [*figures["notes"], *describe_broken(found)]}
        case LabelledTexts():
            counts = Counter(label for own in found.labels for label in own)
            texts = list(found.texts)
            own: dict[str, Any] = {
                "classes": len(counts),
                "texts_per_class": _rank(counts),
                "classes_per_text": quantiles(np.array([len(labels) for labels in found.labels])),
            }
        case TaggedTexts():
            named = [entities(one.tags) for one in found.texts]
            texts = [one.text for one in found.texts]
            own = {
                "entities": sum(map(len, named)),
                "entities_per_type": _rank(Counter(kind for those in named for kind, _, _ in those)),
                "words_per_entity": quantiles(np.array([end - start for those in named for _, start, end in those])),
                "texts_without_entity": sum(not those for those in named),
            }
        case PlainTexts():
            texts, own = list(found.texts), {}
        case AnswerPairs():
            texts = list(found.questions)
            own = {"answers": len(found.answers)}
            return {
                **_describe_texts(found, texts, own),
                **_split(lambda: split_answers(found, data, "answers"), {"by": "answer"}),
            }
        case _:
            assert_never(found)
    return {**_describe_texts(found, texts, own), **_split(lambda: split_texts(texts, data), {"by": "text"})}


def _describe_texts(
    found: LabelledTexts | TaggedTexts | PlainTexts | AnswerPairs, texts: list[str], own: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": found.name,
        "digest": found.digest,
        "texts": len(texts),
        "words_per_text": quantiles(np.array([len(text.split()) for text in texts])),
        **own,
        "notes": list(found.notes),
    }


def _split(divided: Callable[[], Split | TextSplit], how: dict[str, str]) -> dict[str, Any]:
    """Return the sizes of the parts, or why there are none."""
    try:
        parts = divided()
    except DataError as error:
        return {"split": str(error)}
    dropped = {"dropped": len(parts.dropped)} if isinstance(parts, Split) else {}
    sizes = {"train": len(parts.train), "valid": len(parts.valid), "test": len(parts.test)}
    return {"split": {**how, **sizes, **dropped, "digest": parts.digest}}


def _rank(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda one: (-one[1], one[0])))
