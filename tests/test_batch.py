"""Requests as data: what they may say, files of them, and that one bad line costs one answer."""

from __future__ import annotations

import json
import os
import re
import threading
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
        b'{"items": ["i0"], "single": true, "slots": ["nowhere"]}',
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


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"id": "half \\ud83d", "items": ["i0"]}', "id: expected text, found half a character, \\ud83d"),
        (b'{"query": "linen \\udc57"}', "query: expected text, found half a character, \\udc57"),
        (b'{"items": ["i0", "\\ud83d"]}', "items: expected text, found half a character"),
        (b'{"\\ud83d": 1}', "found half a character"),
        (b'{"items": ["caf\xe9"]}', "Expected UTF-8, found 0xe9 at byte 16."),
        (b'{"items": ["i0"], "items": ["i1"]}', "items is given twice."),
        (b'{"items": "i0"}', 'items: Input should be a valid list, found "i0".'),
        (b'{"items": [[["i0"]]]}', "items.0: Input should be a valid string, found a list."),
        (b'{"items": [' + b"[" * 900 + b"]" * 900 + b"]}", "items.0: Input should be a valid string"),
        (b'{"a": ' * 100_000, "nested too deep"),
        (b'{"items": ["i0"], "budget": 1e999}', "finite number, found .inf"),
        (b'{"items": ["i0"], "budget": -Infinity}', "finite number, found -.inf"),
        (b'{"items": ["i0"], "k": 1' + b"0" * 400 + b"}", "found an integer of very many digits"),
        (b'{"items": ["i0"], "k": 1' + b"0" * 5000 + b"}", "a number of very many digits"),
        (b'{"id": 1.5, "items": ["i0"]}', "id: expected a text or an integer, found 1.5."),
        (b'{"items": ["' + b"x" * 900_000 + b'"]}', 'No item "xxx'),
        (b'{"query": " "}', "The query is empty"),
        (b"null", "found null"),
    ],
)
def test_what_a_bad_line_is_told(line: bytes, expected: str, shop: BundleRecommender, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(line + b'\n\n  \n{"id": "next", "items": ["i1"]}\n')
    done = answer_file(shop, source, target)
    assert (done.requests, list(done.errors), done.fault) == (2, [1], None)
    bad, good = lines(target)
    assert expected in bad["error"]
    assert len(bad["error"]) < 400
    json.dumps(bad, ensure_ascii=False).encode()  # an answer is text to whoever reads it
    assert (good["id"], good["line"], good["error"], len(good["results"])) == ("next", 4, None, 5)
    answer_file(shop, source, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").to_pylist()[0]["error"] == bad["error"]


def test_an_id_comes_back_with_an_error_too(shop: BundleRecommender, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": "a", "itmes": []}\n{"id": 7, "k": 0}\n{"id": "\\ud83d"}\n{"id": true}\n[]\n')
    answer_file(shop, source, target)
    assert [one["id"] for one in lines(target)] == ["a", 7, "\\ud83d", None, None]


def test_a_fault_of_ours_costs_one_answer_and_is_said(
    shop: BundleRecommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compose = shop.compose

    def fail_once(items: list[str], **options: Any) -> Any:
        if items == ["i1"]:
            raise IndexError("list index out of range")
        return compose(items, **options)

    monkeypatch.setattr(shop, "compose", fail_once)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"items": ["i{place}"]}}\n' for place in range(3)))
    done = answer_file(shop, source, target)
    assert isinstance(done.fault, IndexError)
    assert [bool(one["results"]) for one in lines(target)] == [True, False, True]
    assert lines(target)[1]["error"] == "A fault of peft-combo: IndexError: list index out of range"


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", b"\r\n \r\n"])
def test_a_byte_order_mark_and_empty_lines_are_no_requests(
    start: bytes, shop: BundleRecommender, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(start + b'{"items": ["i0"]}\r\n')
    done = answer_file(shop, source, tmp_path / "out.jsonl")
    assert (done.requests, done.errors) == (1, {})


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("in.csv", b"items\ni0\n", "Requests are read as .jsonl, a JSON object on each line; found .csv"),
        ("in.parquet", b"PAR1", "found .parquet"),
        ("in.jsonl.gz", b"\x1f\x8b\x08\x00", "found .gz"),
        ("in.jsonl", b"PAR1xxxx", "found a table or an archive"),
        ("in.jsonl", '{"items": ["i0"]}'.encode("utf-16"), "found UTF-16"),
    ],
)
def test_a_file_of_another_kind_is_refused_at_once(
    name: str, content: bytes, expected: str, shop: BundleRecommender, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    for act in (count_requests, lambda source: answer_file(shop, source, tmp_path / "out.jsonl")):
        with pytest.raises(DataError, match=re.escape(expected)):
            act(tmp_path / name)
    assert not (tmp_path / "out.jsonl").exists()


def test_answers_never_replace_their_requests(shop: BundleRecommender, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"items": ["i0"]}\n')
    (tmp_path / "link.jsonl").symlink_to(source)
    for target in (source, tmp_path / "link.jsonl", tmp_path / "." / "in.jsonl"):
        with pytest.raises(DataError, match="would replace the requests"):
            answer_file(shop, source, target)
    assert source.read_text() == '{"items": ["i0"]}\n'


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this machine")
def test_requests_of_a_pipe_are_answered_though_they_cannot_be_counted(shop: BundleRecommender, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert count_requests(pipe) == 0
    writer = threading.Thread(target=lambda: pipe.write_text('{"items": ["i0"]}\n{"items": ["i1"]}\n'))
    writer.start()
    assert answer_file(shop, pipe, tmp_path / "out.jsonl").requests == 2
    writer.join()


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
    # Said the other way round, or in other words, on a command line.
    called = {"categories": "category", "filter": "where", "exclude_seen": "seen"}
    assert not options["seen"].default
    for name, field in fields.items():
        option = options[called.get(name, name)]
        if name == "exclude_seen":
            continue
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
