"""Labelled and tagged texts: what is read, what is refused, and that no text is on two sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_combo.data import open_dataset
from peft_combo.data.fashion_nouns import FASHION_NOUNS
from peft_combo.data.labelled import labels_of_catalogue, read_labels, split_texts, text_key
from peft_combo.data.tags import read_tags, weak_tags, words_of
from peft_combo.errors import DataError
from peft_combo.recipe import DataConfig


def config(folder: Path | None = None, **changes: Any) -> DataConfig:
    return DataConfig(source="folder" if folder else "demo", path=str(folder) if folder else None, **changes)


def shop(folder: Path, rows: list[str]) -> DataConfig:
    (folder / "items.csv").write_text("item_id,title,category,slot,mood\n" + "\n".join(rows) + "\n")
    (folder / "bundles.csv").write_text("bundle_id,item_id\nb,i0\nb,i1\n")
    return config(folder)


# Labels.


def test_equal_texts_are_one_and_the_most_frequent_label_stands(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(
        "text,label\nWhere is it,delay\nwhere  IS it,refund\nwhere is it,refund\nhello,greet\nbye,\n"
    )
    found = read_labels(config(tmp_path), multi_label=False)
    assert found.texts == ("Where is it", "hello")
    assert found.labels == (("refund",), ("greet",))
    assert any("1 texts occur under several labels" in note for note in found.notes)
    assert any("1 texts without a label" in note for note in found.notes)


def test_several_labels_are_parted_and_joined(tmp_path: Path) -> None:
    lines = [{"text": "a b", "label": ["x", "y"]}, {"text": "A b", "label": ["z"]}]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_labels(config(tmp_path), multi_label=True).labels == (("x", "y", "z"),)
    (tmp_path / "labels.jsonl").unlink()
    (tmp_path / "mine.csv").write_text("words,label\nhi,x|y\n")
    named = config(tmp_path / "mine.csv", columns={"labels": {"text": "words"}})
    assert read_labels(named, multi_label=True).labels == (("x", "y"),)
    assert read_labels(named, multi_label=False).labels == (("x|y",),)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"other.txt": ""}, r"Expected labels\.csv or .*found other\.txt"),
        ({"labels.csv": "text,class\na,b\n"}, r"labels\.csv:1: has no column 'label'"),
        ({"labels.csv": "text,label\n,b\n"}, r"labels\.csv:2: text is empty"),
        ({"labels.csv": "text,label\na,b\n", "labels.jsonl": "{}"}, "labels.csv and labels.jsonl exist"),
        ({"labels.csv": "text,label\na,\n"}, "None of the 1 texts"),
    ],
)
def test_a_faulty_labels_table_is_refused(files: dict[str, str], told: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=told):
        read_labels(config(tmp_path), multi_label=False)


def test_a_labels_table_needs_a_folder() -> None:
    with pytest.raises(DataError, match="--data PATH"):
        read_labels(config(), multi_label=False)


def test_the_catalogue_labels_its_items(tmp_path: Path) -> None:
    rows = ["i0,red top,A > B > C,top,calm", "i1,mug,A,home,", "i2,hat,A > D,acc,gay|calm"]
    dataset = open_dataset(shop(tmp_path, rows))

    def labels(column: str, depth: int | None = None, several: bool = False) -> dict[str, tuple[str, ...]]:
        found = labels_of_catalogue(dataset, "{title}", column, depth, several)
        return dict(zip(found.texts, found.labels, strict=True))

    assert labels("category") == {"red top": ("A > B > C",), "mug": ("A",), "hat": ("A > D",)}
    assert labels("category", 2) == {"red top": ("A > B",), "hat": ("A > D",)}
    assert labels("category", 2, several=True) == {"red top": ("A", "B"), "hat": ("A", "D")}
    assert labels("leaf")["red top"] == ("C",)
    assert labels("slot")["mug"] == ("home",)
    assert labels("mood", several=True) == {"red top": ("calm",), "hat": ("calm", "gay")}
    with pytest.raises(DataError, match=r"no 'moood'; .*Did you mean \"mood\""):
        labels("moood")


@pytest.mark.parametrize(("template", "column"), [("{title} {leaf}", "category"), ("{title} {mood}", "mood")])
def test_a_text_that_names_its_label_is_refused(template: str, column: str, tmp_path: Path) -> None:
    dataset = open_dataset(shop(tmp_path, ["i0,a,A,top,calm", "i1,b,B,top,calm"]))
    with pytest.raises(DataError, match=r"gives task\.labels"):
        labels_of_catalogue(dataset, template, column, None, False)


def test_no_text_is_in_two_parts_and_new_ones_move_none() -> None:
    texts = [f"text {number}" for number in range(400)]
    parts = split_texts(texts, config())
    every = [*parts.train.tolist(), *parts.valid.tolist(), *parts.test.tolist()]
    assert sorted(every) == list(range(400))
    assert 0.15 < len(parts.test) / 400 < 0.25
    more = split_texts([*texts, *(f"new {number}" for number in range(100))], config())
    assert set(parts.test.tolist()) <= set(more.test.tolist())
    # However they are written, two texts that are taken for one fall alike.
    shouted = split_texts([f"TEXT  {number}" for number in range(400)], config())
    assert shouted.test.tolist() == parts.test.tolist()
    assert text_key(" A  b ") == "a b"
    with pytest.raises(DataError, match="too few to divide"):
        split_texts(["one"], config())


# Tags.


def told(text: str, words: tuple[tuple[int, int], ...], tags: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(text[start:end], tag) for (start, end), tag in zip(words, tags, strict=True)]


def tags_in(folder: Path, name: str, content: str) -> list[list[tuple[str, str]]]:
    (folder / name).write_text(content)
    return [told(one.text, one.words, one.tags) for one in read_tags(config(folder)).texts]


def test_the_three_formats_say_the_same(tmp_path: Path) -> None:
    wanted = [[("Red", "O"), ("wrap", "B-Clo"), ("dress", "I-Clo")], [("hat", "B-Acc")]]
    tokens = (
        '{"tokens": ["Red", "wrap", "dress"], "tags": ["O", "B-Clo", "I-Clo"]}\n\n{"tokens":["hat"],"tags":["B-Acc"]}'
    )
    spans = (
        '{"text": "Red wrap dress", "spans": [[4, 14, "Clo"]]}\n'
        '{"text": "hat", "spans": [{"start": 0, "end": 3, "label": "Acc"}]}'
    )
    conll = "-DOCSTART- O\n\nRed JJ O\nwrap NN B-Clo\ndress NN I-Clo\n\nhat NN B-Acc"
    for name, content in (("tags.jsonl", tokens), ("tags.jsonl", spans), ("tags.conll", conll)):
        assert tags_in(tmp_path, name, content) == wanted
        (tmp_path / name).unlink()


def test_a_span_parts_the_word_it_begins_in(tmp_path: Path) -> None:
    content = '{"text": "T-shirtdress!", "spans": [[7, 12, "Clo"]]}'
    assert tags_in(tmp_path, "tags.jsonl", content) == [[("T-shirt", "O"), ("dress", "B-Clo"), ("!", "O")]]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tags.jsonl", '{"tokens": ["a"], "tags": ["O", "O"]}', r"tags\.jsonl:1: has 1 tokens but 2 tags"),
        ("tags.jsonl", '{"tokens": ["a"], "tags": ["C-lo"]}', r"the tag 'C-lo', expected O, B-Type or I-Type"),
        ("tags.jsonl", '{"tokens": [""], "tags": ["O"]}', "the token ''"),
        ("tags.jsonl", '{"text": "abc", "spans": [[2, 9, "X"]]}', "within 3 characters"),
        ("tags.jsonl", '{"text": "abc", "spans": [[0, 2, "X"], [1, 3, "Y"]]}', "overlapping spans"),
        ("tags.jsonl", '{"text": "abc", "spans": "X"}', 'expected "tokens" and "tags"'),
        ("tags.jsonl", "\n{", r"tags\.jsonl:2: is not valid JSON"),
        ("tags.conll", "a O\nb\n", r"tags\.conll:2: expected a word and its tag"),
        ("tags.conll", "a O\n", "no text|other than O"),
    ],
)
def test_faulty_tags_are_refused_with_their_line(name: str, content: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=expected):
        read_tags(config(tmp_path))


def test_words_are_parted_at_marks_but_not_within() -> None:
    text = "H&M T-Shirt, women's (blue)"
    assert [text[start:end] for start, end in words_of(text)] == [
        "H&M", "T-Shirt", ",", "women's", "(", "blue", ")",
    ]  # fmt: skip


def test_a_title_is_tagged_by_the_nouns_of_its_slot(tmp_path: Path) -> None:
    rows = [
        "i0,zip top clutch,,bag,", "i1,blue shirt dress,,dress,", "i2,Suede Belt Boots,,shoes,", "i3,Charm,,bag,",
        "i4,red vase,,home,",
    ]  # fmt: skip
    found = weak_tags(open_dataset(shop(tmp_path, rows)), {"bag": "Acc", "dress": "Clo", "shoes": "Shoe"})
    assert [told(one.text, one.words, one.tags) for one in found.texts] == [
        [("zip", "O"), ("top", "O"), ("clutch", "B-Acc")],
        [("blue", "O"), ("shirt", "B-Clo"), ("dress", "I-Clo")],
        [("Suede", "O"), ("Belt", "O"), ("Boots", "B-Shoe")],
    ]
    assert "1 items have another slot, 1 titles no noun" in found.notes[-1]
    with pytest.raises(DataError, match='Did you mean "shoes"'):
        weak_tags(open_dataset(shop(tmp_path, rows)), {"shoe": "Shoe"})


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        ("Clo", ["dress", "dresses", "trench coats", "jeans", "t-shirt"], ["boot", "dressy"]),
        ("Shoe", ["boots", "ankle bootie", "flip-flops"], ["lace-up", "belt"]),
        ("Acc", ["watches", "scarves", "tote bag", "jewelry"], ["shirt"]),
    ],
)
def test_nouns_come_in_singular_and_plural(kind: str, inside: list[str], outside: list[str]) -> None:
    assert all(name in FASHION_NOUNS[kind] for name in inside)
    assert not any(name in FASHION_NOUNS[kind] for name in outside)


def test_most_titles_of_the_demo_have_a_noun() -> None:
    types = {"top": "Clo", "bottom": "Clo", "dress": "Clo", "outerwear": "Clo", "shoes": "Shoe", "bag": "Acc"}
    dataset = open_dataset(config())
    there = sum(slot in types for slot in dataset.catalog.slots)
    assert len(weak_tags(dataset, types).texts) > 0.95 * there
