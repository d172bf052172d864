"""Requests as data: what they may say, files of them, and that one bad line costs one answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import split_as
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.errors import DataError
from peft_combo.recipe.model import Recipe
from peft_combo.recommender.composing.options import Options
from peft_combo.recommender.recommender import BundleRecommender
from peft_combo.recommender.requests import Request, answer, answer_file, count_requests, parse_request
from peft_combo.store.adapter_store import AdapterStore


@pytest.fixture
def shop(tiny_recipe: Callable[..., Recipe]) -> BundleRecommender:
    recipe = tiny_recipe()
    dataset = open_dataset(recipe.data)
    bank = AdapterBank(Backbone.load(recipe.backbone.model, max_length=16), AdapterStore(recipe.store))
    return BundleRecommender.fit(dataset, split_as(dataset, recipe.data), bank, None)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_those_of_single_requests(shop: BundleRecommender, tmp_path: Path) -> None:
    asked = [{"id": "one", "items": ["i0"]}, {"id": 2, "items": ["i3"], "single": True, "k": 3}, {"query": "w10"}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps(one) for one in asked) + "\n\n")
    seen: list[int] = []
    done = answer_file(shop, source, target, Request(k=2), seen.append)
    assert done.requests == count_requests(source) == sum(seen) == 3
    assert done.errors == {}
    found = lines(target)
    assert [one["id"] for one in found] == ["one", 2, None]
    assert [one["line"] for one in found] == [1, 2, 3]
    assert [len(one["results"]) for one in found] == [2, 3, 2]
    (direct, *_) = answer(shop, Request(items=["i3"], single=True, k=3))
    assert found[1]["results"][0]["score"] == pytest.approx(direct.score)


def test_a_bad_line_costs_its_own_answer_only(shop: BundleRecommender, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = [
        b'{"items": ["i0"]',
        b"[1]",
        b'{"itmes": ["i0"]}',
        b'{"items": ["i999"]}',
        b'{"items": ["i0"], "k": 0}',
        b'{"items": ["i0"], "k": true}',
        b'{"items": ["i0"], "budget": NaN}',
        b'{"items": ["i0"], "single": true, "query": "x"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"query": "' + b"x" * (2 << 20) + b'"}',
    ]
    source.write_bytes(b"\n".join([b'{"items": ["i0"]}', *bad, b'{"items": ["i1"]}']))
    done = answer_file(shop, source, target)
    assert done.requests == len(bad) + 2
    assert sorted(done.errors) == list(range(2, len(bad) + 2))
    found = lines(target)
    assert found[0]["results"]
    assert found[-1]["results"]
    assert all(one["error"] and not one["results"] for one in found[1:-1])
    assert 'no field "itmes". Did you mean "items"' in found[3]["error"]
    assert 'No item "i999"' in found[4]["error"]


def test_parquet_has_a_row_for_each_answer(shop: BundleRecommender, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text('{"id": 7, "items": ["i0"]}\n{"items": ["nothing"]}\n{"items": ["i1"], "single": true}\n')
    answer_file(shop, source, target, Request(k=2))
    rows = pq.read_table(target).to_pylist()
    assert [(row["line"], row["id"], row["rank"]) for row in rows] == [
        (1, "7", 1), (1, "7", 2), (2, None, None), (3, None, 1), (3, None, 2),
    ]  # fmt: skip
    assert "i0" in rows[0]["items"]
    assert "i0" not in rows[0]["added"]
    assert rows[2]["error"].startswith('No item "nothing"')
    assert json.loads(rows[3]["details"])["item_id"] == rows[3]["items"][0]
    assert np.isfinite(rows[0]["score"])


def test_nothing_is_left_behind_where_a_file_cannot_be_had(shop: BundleRecommender, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    with pytest.raises(DataError, match="cannot be read"):
        answer_file(shop, source, tmp_path / "out.jsonl")
    source.write_text('{"items": ["i0"]}\n')
    with pytest.raises(DataError, match=r"\.jsonl or \.parquet, found '\.csv'"):
        answer_file(shop, source, tmp_path / "out.csv")
    with pytest.raises(DataError, match="cannot be written"):
        answer_file(shop, source, source / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))] == []


def test_options_of_the_command_line_are_fields_of_a_request_and_their_help_has_its_defaults() -> None:
    import typer

    from peft_combo.cli import app

    command = typer.main.get_command(app).commands["recommend"]  # type: ignore[attr-defined]
    options = {option.name: option for option in command.params}
    fields = {name: field for name, field in Request.model_fields.items() if name != "id"}
    for name, field in fields.items():
        option = options["category" if name == "categories" else name]
        if field.default not in (None, False, []):
            assert option.default is None
            assert option.help.endswith(f"default {field.default}.")
    assert (Options().k, Options().diversity) == (Request().k, Request().diversity)


def test_a_value_no_request_may_have_is_refused_in_one_line() -> None:
    for values, expected in (
        ({"size": 0}, "size: Input should be greater than or equal to 1, found 0"),
        ({"k": 1001}, "k: Input should be less than or equal to 1000, found 1001"),
        ({"diversity": 1.5}, "diversity: "),
        ({"budgets": 3.0}, 'no field "budgets". Did you mean "budget"'),
    ):
        with pytest.raises(DataError, match=expected):
            parse_request(values)
