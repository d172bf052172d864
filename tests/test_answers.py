"""Answers to questions: read, divided without leaks, tuned by contrast, and found by the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from peft_combo.data.labels.answers import AnswerPairs, read_answers, read_demo_answers, split_answers
from peft_combo.data.language import split_words
from peft_combo.data.task_data import check_data, describe_data
from peft_combo.encoder.heads.matching import MatchingHead
from peft_combo.errors import DataError
from peft_combo.recipe.files import load_recipe
from peft_combo.recipe.model import DataConfig, Recipe
from peft_combo.recipe.task import MatchingTask
from peft_combo.tuning.loop import tune


@pytest.mark.parametrize("unseen", ["answers", "questions"])
def test_no_answer_or_no_wording_of_the_demo_stands_on_two_sides(unseen: Literal["answers", "questions"]) -> None:
    pairs, config = read_demo_answers(), load_recipe("match-answers").data
    parts = split_answers(pairs, config, unseen)
    names = [pairs.answers[own] for own in pairs.of] if unseen == "answers" else list(pairs.groups)
    sides = [{names[row] for row in own} for own in (parts.train, parts.valid, parts.test)]
    assert sum(map(len, sides)) == len(set().union(*sides)) == len(set(names))
    assert len(set(names)) == (49 if unseen == "answers" else 294)
    assert sum(len(own) for own in (parts.train, parts.valid, parts.test)) == len(pairs.questions)
    assert len(sides[2]) >= 8
    assert read_demo_answers().digest == pairs.digest
    assert not any(mark in text for text in (*pairs.questions, *pairs.answers) for mark in "{}|")


def test_words_alone_do_not_answer_the_demo() -> None:
    pairs = read_demo_answers()
    told = [set(split_words(answer.casefold()).split()) for answer in pairs.answers]
    shared = [
        max(range(len(told)), key=lambda place: len(told[place] & set(question.casefold().split()))) == own
        for question, own in zip(pairs.questions, pairs.of, strict=True)
    ]
    assert np.mean(shared) < 0.35


def test_a_table_is_checked_and_a_question_has_one_answer(tmp_path: Path) -> None:
    config = DataConfig(source="folder", path=str(tmp_path))
    with pytest.raises(DataError, match=r"Expected answers.csv"):
        read_answers(config)
    file = tmp_path / "answers.csv"
    file.write_text("question,answer\nWhere?,Here.\nwhere?,There.\n,Nowhere.\n")
    with pytest.raises(DataError, match=r"answers.csv:4: question is empty"):
        read_answers(config)
    file.write_text("question,answer\nWhere?,Here.\nwhere?,There.\nWhen?,Now.\n")
    pairs = read_answers(config)
    assert [pairs.answers[own] for own in pairs.of] == ["Here.", "Now."]
    assert "have another answer before" in " ".join(pairs.notes)
    with pytest.raises(DataError, match="Give two at least"):
        AnswerPairs.build("one", [("Where?", "Here.", "")])
    data = load_recipe("match-answers").data
    assert check_data(data, MatchingTask()) == []
    (figures,) = describe_data(data, MatchingTask())
    assert figures["answers"] == 49
    assert figures["split"]["by"] == "answer"


def test_a_temperature_changes_no_order() -> None:
    head = MatchingHead(3, MatchingTask())
    questions, answers = torch.eye(3), torch.eye(3)
    assert head(questions, answers).argmax(dim=1).tolist() == [0, 1, 2]
    assert float(head(questions, answers)[0, 0].detach()) == pytest.approx(1 / 0.05, rel=1e-5)


@pytest.mark.slow
def test_contrast_learns_which_words_answer_which_and_the_command_finds_it(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, shell: Callable[..., tuple[int, str, str]]
) -> None:
    """Questions and answers share no word: "w10 .." is answered by "w50 ..", which tuning alone can know."""
    folder = tmp_path / "asked"
    folder.mkdir()
    rows = [
        f"w{10 + topic} w{100 + place} w{130 + copy},w{50 + topic} w{70 + place}"
        for topic in range(4) for place in range(15) for copy in range(4)
    ]  # fmt: skip
    (folder / "answers.csv").write_text("question,answer\n" + "\n".join(rows) + "\n")
    recipe = tiny_recipe(
        **{
            "task": {"kind": "matching"}, "category": "tiny-answers", "data.path": str(folder), "training.epochs": 6,
            "data.valid_fraction": 0.2, "data.test_fraction": 0.3,
        }
    )  # fmt: skip
    result = tune(recipe, run_folder=tmp_path / "run")
    names = [row.name for row in result.table.rows]
    assert names == ["TF-IDF cosine", "frozen backbone", "tuned"]
    assert result.table.gain.value > 0.05
    templates = tmp_path / "templates.txt"
    templates.write_text("w50 w70\nw51 w71\nw52 w72\n")
    code, out, _ = shell(
        "match", "w11 w101", "--adapter", "tiny-answers", "--templates", templates, "--store", recipe.store, "--json"
    )
    assert code == 0
    (told,) = json.loads(out)
    assert len(told["templates"]) == 3
    assert [one["score"] for one in told["templates"]] == sorted((o["score"] for o in told["templates"]), reverse=True)
    code, out, _ = shell("match", "w11", "--adapter", "tiny-answers", "--store", recipe.store, "-k", 1)
    assert code == 0
