"""Queries taken apart: what they name, which words go with what, and what it may cost."""

from __future__ import annotations

import pytest

from peft_combo.data.labels.tags import noun_entities
from peft_combo.data.language import is_same_noun
from peft_combo.recommender.query import parse_query


@pytest.mark.parametrize(
    ("query", "items", "text"),
    [
        (
            "black leather ankle boots with a wool coat under 200",
            [("ankle boots", "Shoe", "black leather ankle boots"), ("coat", "Clo", "a wool coat")],
            "black leather ankle boots with a wool coat",
        ),
        (
            "boots for hiking and a wool coat, plus a hat",
            [("boots", "Shoe", "boots for hiking"), ("coat", "Clo", "a wool coat"), ("hat", "Acc", "a hat")],
            "boots for hiking and a wool coat, plus a hat",
        ),
        ("white shirt black trousers", [("shirt", "Clo", "white shirt"), ("trousers", "Clo", "black trousers")], None),
        ("sandals under 50 and a Tote", [("sandals", "Shoe", "sandals"), ("tote", "Acc", "a Tote")], None),
        ("boots and red boots", [("boots", "Shoe", "boots")], None),
        ("something for the beach", [], "something for the beach"),
        ("", [], ""),
    ],
)
def test_each_thing_gets_its_own_words(query: str, items: list[tuple[str, str, str]], text: str | None) -> None:
    found = parse_query(query, noun_entities)
    assert [(item.name, item.type, item.text) for item in found.items] == items
    assert text is None or found.text == text


@pytest.mark.parametrize(
    ("query", "budget", "text"),
    [
        ("red dress under 200", 200.0, "red dress"),
        ("red dress for less than $1,200.50 in total", 1200.5, "red dress"),
        ("red dress (max 80€)", 80.0, "red dress"),
        ("up to 90 euros, a red dress", 90.0, ", a red dress"),
        ("red dress at most 75 with a hat", 75.0, "red dress with a hat"),
        # Not every number behind such a word is money.
        ("suitcase under 2 kg", None, "suitcase under 2 kg"),
        ("boots size 42", None, "boots size 42"),
        ("t-shirt up to size 12", None, "t-shirt up to size 12"),
    ],
)
def test_a_budget_is_read_and_taken_out(query: str, budget: float | None, text: str) -> None:
    found = parse_query(query, noun_entities)
    assert (found.budget, found.text) == (budget, text)


def test_what_was_understood_reads_as_one_line() -> None:
    assert str(parse_query("ankle boots with a coat under 200", noun_entities)) == (
        "ankle boots (Shoe), coat (Clo), budget 200"
    )
    assert str(parse_query("hello", noun_entities)) == "no thing that a tag names"


def test_names_are_the_same_by_their_last_noun_in_any_number() -> None:
    assert is_same_noun("ankle boots", "Boot")
    assert is_same_noun("silk blouse", "blouses")
    assert not is_same_noun("boot", "bootie")
    assert not is_same_noun("dress shirt", "dress")
    assert not is_same_noun("", "dress")
