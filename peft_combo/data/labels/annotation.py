"""Annotation: texts nobody has labelled yet, and the files in which a person labels them.

Owns which texts have no label where a task looks for one, and the form of a file to fill in: the tables the package
reads, with further columns that help and are not read. Knows nothing of who chose what is worth labelling.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_combo.data.labels.tags import list_tag_files, read_tags
from peft_combo.data.labels.texts import find_labels, text_key
from peft_combo.data.model import Catalog
from peft_combo.data.readers.forms import holds_table
from peft_combo.data.sources import open_dataset
from peft_combo.errors import DataError, Fault
from peft_combo.files import check_file_target, literal_path, write_text
from peft_combo.recipe.task import ClassificationTask, TaggingTask

if TYPE_CHECKING:
    from peft_combo.recipe.model import DataConfig


@dataclass(frozen=True)
class Pool:
    """Distinct texts (but for case and spaces) without a label, in the order of the data.

    Attributes:
        labelled: how many others have one.
    """

    name: str
    texts: tuple[str, ...]
    labelled: int


def find_unlabelled(data: DataConfig, task: ClassificationTask | TaggingTask) -> Pool:
    """Find the texts that `task` could learn from if somebody labelled them.

    These are the items of the catalogue, and the rows of a labels table whose label is empty, without those that have a
    label: in the labels or tags table, or in the column that the task takes labels from. Tags that a rule makes of the
    catalogue are no labels.

    Raises:
        DataError: the data cannot be read, or every text has a label.
    """
    folder = literal_path(data.path) if data.source == "folder" and data.path is not None else None
    name = folder.resolve().name if folder is not None else data.source
    found: list[tuple[str, bool]] = []
    if _from_table(task) and folder is not None:
        found += _of_table(folder, data, task)
    if not _from_table(task) or folder is None or holds_table(folder, ["items"]):
        dataset = open_dataset(data, "items")
        name = dataset.name
        found += zip(dataset.texts, _has_label(dataset.catalog, task), strict=True)
    labelled = {text_key(text) for text, has in found if has}
    waiting: dict[str, str] = {}
    for text, _ in found:
        if (key := text_key(text)) and key not in labelled:
            waiting.setdefault(key, text)
    if not waiting:
        raise DataError(
            f"Nothing in {name} waits for a label: {len(labelled):,} texts have one, and there are no others. "
            "Give items without labels with --data PATH: a folder with items.csv (item_id, title)."
        )
    return Pool(name, tuple(waiting.values()), len(labelled))


def check_label_file(path: Path, *, lists: bool) -> Path:
    """Return a path that `write_to_label` can write to; ask before a long job, not after it.

    Args:
        lists: whether rows hold lists, as tags do: CSV takes none.
    Raises:
        DataError: another suffix, or lists in a CSV. PeftComboError: the file cannot be written.
    """
    if path.suffix not in ((".jsonl",) if lists else (".csv", ".jsonl")):
        expected = ".jsonl" if lists else ".csv or .jsonl"
        raise DataError(f"{path}: expected a file that ends in {expected}, found {path.suffix or 'no suffix'}.")
    return check_file_target(path)


def write_to_label(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV or JSON Lines, as the suffix says; lists only go into the latter.

    Raises:
        DataError: another suffix, or lists in a CSV.
        PeftComboError: the file cannot be written.
    """
    check_label_file(path, lists=any(isinstance(value, list) for row in rows for value in row.values()))
    if path.suffix == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _from_table(task: ClassificationTask | TaggingTask) -> bool:
    return (task.labels if isinstance(task, ClassificationTask) else task.tags) == "table"


def _of_table(folder: Path, data: DataConfig, task: ClassificationTask | TaggingTask) -> Iterable[tuple[str, bool]]:
    """Return the texts of the labels or tags table, where there is one, and whether each has a label."""
    if isinstance(task, TaggingTask):
        there = folder.is_file() or bool(list_tag_files(folder))
        return [(one.text, True) for one in read_tags(data).texts] if there else []
    faults: list[Fault] = []
    table = find_labels(folder, data, ("text",), ("label",), faults, [])
    if faults:
        raise DataError.from_faults(f"The labels in {folder} cannot be used:", faults)
    if table is None:
        return []
    labels = table.strings("label") if "label" in table.columns else [""] * table.rows
    return [(text, bool(label)) for text, label in zip(table.strings("text"), labels, strict=True) if text]


def _has_label(catalog: Catalog, task: ClassificationTask | TaggingTask) -> list[bool]:
    if _from_table(task) or isinstance(task, TaggingTask):
        return [False] * len(catalog)
    match task.labels:
        case "category" | "leaf":
            return [len(path) >= (task.depth or 1) for path in catalog.categories]
        case "slot":
            return [bool(slot) for slot in catalog.slots]
        case column:
            return [bool(value and value.strip()) for value in catalog.attributes.get(column, (None,) * len(catalog))]
