"""Scorers are told apart by value; a label is only printed, and read back from stored files alone."""

from __future__ import annotations

from typing import get_args

import pytest

from peft_combo.recommender.persistence import _parse_label
from peft_combo.recommender.scorer_id import Kind, ScorerId

EVERY = [
    *(ScorerId(kind) for kind in get_args(Kind)),
    ScorerId("tuned BERT", "fashion@v1"),
    ScorerId("rated", "tuned BERT@v2"),
    ScorerId("tuned BERT", "by category"),
]


@pytest.mark.parametrize("scorer", EVERY, ids=str)
def test_a_stored_label_reads_back_to_its_scorer(scorer: ScorerId) -> None:
    assert _parse_label(str(scorer)) == scorer


def test_the_label_of_an_adapter_is_that_of_earlier_versions() -> None:
    assert str(ScorerId("tuned BERT", "fashion@v1")) == "tuned BERT fashion@v1"
    assert str(ScorerId("rated", "fashion@v1")) == "rated fashion@v1"


@pytest.mark.parametrize("label", ["", "tuned", "tuned BERTfashion", "ensemble a"])
def test_a_label_of_no_scorer_is_refused(label: str) -> None:
    with pytest.raises(ValueError, match="no scorer is called"):
        _parse_label(label)
