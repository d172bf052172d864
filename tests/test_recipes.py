"""Recipes: what is read, what is refused and in which words, what builds on what."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from peft_combo.errors import Fault, RecipeError, make_printable
from peft_combo.recipe.adapter import AdaloraAdapter, AdapterConfig, LoraAdapter, PrefixAdapter, TokensAdapter
from peft_combo.recipe.files import (
    build_file_schema,
    check,
    copy_recipe,
    list_recipes,
    load_recipe,
    read_recipe_text,
    recipes_folder,
)
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.parse import list_key_paths, parse_recipe, recipe_schema

SHIPPED = sorted(file.stem for file in recipes_folder().glob("*.yaml"))
SMALLEST: dict[str, Any] = {
    "name": "mine",
    "category": "toys",
    "data": {"source": "demo"},
    "adapter": {"method": "lora"},
}


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def faults_of(raw: dict[str, Any]) -> list[Fault]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw)
    return list(caught.value.faults)


def complaint(**changes: Any) -> str:
    """Return the one fault of the smallest recipe with these top-level keys changed."""
    (fault,) = faults_of({**SMALLEST, **changes})
    return str(fault)


def refusal(name_or_path: str | Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name_or_path, overrides)
    return str(caught.value)


# What ships.


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_loads_under_its_own_name_and_survives_json(name: str) -> None:
    recipe = load_recipe(name)
    again = Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json"))))
    assert recipe.name == name
    assert again == recipe
    assert again.digest() == recipe.digest()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_opens_with_what_it_does_and_the_command_that_runs_it(name: str) -> None:
    lines = read_recipe_text(name).splitlines()
    assert re.fullmatch(r"# [A-Z].{20,110}\.", lines[0])
    assert any(re.fullmatch(rf"# Run: +peft-combo tune --recipe {name}( --data PATH)?", line) for line in lines)
    assert any(line.startswith("# Data: ") for line in lines)
    asks_for_data = any("--data PATH" in line for line in lines if line.startswith("# Run:"))
    assert asks_for_data == (load_recipe(name).data.source in ("folder", "bundlerec"))


def test_the_list_names_every_shipped_recipe_with_category_method_and_summary() -> None:
    listed = list_recipes()
    assert [one.name for one in listed] == SHIPPED
    assert ("lora-fashion", "fashion", "lora") in {one[:3] for one in listed}
    assert {one.method for one in listed} == {"lora", "adalora", "prefix"}
    assert {one.category for one in listed} >= {"fashion", "electronics", "food", "cosmetics", "home"}
    assert all(one.summary and not one.summary.startswith("#") for one in listed)


def test_the_three_fashion_recipes_differ_in_method_but_not_in_data_or_task() -> None:
    lora, adalora, prefix = (load_recipe(f"{method}-fashion") for method in ("lora", "adalora", "prefix"))
    assert isinstance(lora.adapter, LoraAdapter)
    assert isinstance(adalora.adapter, AdaloraAdapter)
    assert isinstance(prefix.adapter, PrefixAdapter)
    assert lora.data == adalora.data == prefix.data
    assert lora.task == adalora.task == prefix.task
    assert adalora.adapter.target_rank == lora.adapter.rank


# Values.


def test_the_faults_of_a_recipe_are_all_reported_each_with_its_path() -> None:
    faults = faults_of(
        {
            "name": "Mine",
            "data": {"source": "dmo", "max_bundles": 2, "departments": ["x", 3], "valid_fraction": 0.9},
            "adapter": {"method": "adalora", "rank": 4, "initial_rank": 3.0, "targets": "atention", "beta1": "x"},
            "task": {"kind": "bundel"},
            "training": {"epochs": "ten", "early_stopping": {"patience": 0}, "trackers": ["wandbb"]},
            "backbone": 5,
            "sotre": "x",
        }
    )
    assert {fault.where for fault in faults} == {
        "name",
        "category",
        "backbone",
        "data.source",
        "data.max_bundles",
        "data.departments.1",
        "data.test_fraction",
        "adapter.initial_rank",
        "adapter.targets",
        "adapter.beta1",
        "adapter.rank",
        "task.kind",
        "training.epochs",
        "training.early_stopping.patience",
        "training.trackers.0",
        "sotre",
    }
    for fault in faults:
        assert "pydantic" not in str(fault)
        assert "http" not in str(fault)
        assert "Input should" not in str(fault)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training": {"epochs": "ten"}}, 'training.epochs: expected an integer from 1 to 1000, found "ten".'),
        ({"training": {"epochs": 0}}, "training.epochs: expected an integer from 1 to 1000, found 0."),
        ({"training": {"epochs": True}}, "training.epochs: expected an integer from 1 to 1000, found true."),
        ({"training": {"epochs": 3.0}}, "training.epochs: expected an integer from 1 to 1000, found 3.0."),
        ({"training": {"learning_rate": "1e-4"}}, 'expected a number above 0 and at most 10, found "1e-4".'),
        ({"training": {"learning_rate": True}}, "expected a number above 0 and at most 10, found true."),
        ({"training": {"weight_decay": float("nan")}}, "expected a number from 0 to 1, found .nan."),
        ({"training": {"weight_decay": float("inf")}}, "expected a number from 0 to 1, found .inf."),
        ({"training": {"weight_decay": float("-inf")}}, "expected a number from 0 to 1, found -.inf."),
        ({"training": {"fast_path": "yes"}}, 'training.fast_path: expected true or false, found "yes".'),
        ({"training": {"fast_path": 1}}, "training.fast_path: expected true or false, found 1."),
        ({"training": {"epoch": 1}}, 'training.epoch: unknown key. Did you mean "epochs"?'),
        ({"training": None}, "training: expected a mapping of keys to values, found null."),
        ({"training": []}, "training: expected a mapping of keys to values, found an empty list."),
        ({"data": {"source": "demo", "max_bundles": "x"}}, 'from 10 to 100000000, or null; found "x".'),
        ({"data": {"source": "demo", "columns": {"itms": {}}}}, "data.columns.itms: expected one of items, bundles,"),
        ({"data": {"source": "demo", "columns": {"items": {"id": 3}}}}, "data.columns.items.id: expected one line of"),
        ({"backbone": {"precision": False}}, "backbone.precision: expected one of no, bf16, fp16; found false."),
        ({"backbone": {"model": "a\0b"}}, r'backbone.model: expected one line of text, found "a\u0000b".'),
        ({"category": "Toys & Games"}, "category: expected a name of lower-case letters"),
        ({"category": "toys\n"}, "category: expected a name of lower-case letters"),
        ({"category": "../toys"}, "category: expected a name of lower-case letters"),
        ({"adapter": {}}, "bitfit, head, top-layers, full; found nothing."),
        ({"adapter": 3}, "adapter: expected a mapping of keys to values, found 3."),
        ({"adapter": {"method": ["lora"]}}, "adapter.method: expected one of lora, adalora,"),
        ({"adapter": {"method": "lora", "targets": [3]}}, "adapter.targets: expected one of attention,"),
        ({"adapter": {"method": "lora", "targets": []}}, "or a list of module names; found an empty list."),
        ({"adapter": {"method": "head", "rank": 4}}, "adapter.rank: unknown key for head. Known here: method."),
        ({"rank": 4}, "rank: unknown key here. It belongs elsewhere: adapter.rank."),
        ({"task": {"kind": "bundel"}}, 'classification, tagging, matching; found "bundel". Did you mean "bundle"?'),
    ],
)
def test_a_fault_says_what_was_expected_and_what_was_found(changes: dict[str, Any], told: str) -> None:
    assert told in complaint(**changes)


def test_a_wrong_method_is_answered_with_the_nearest() -> None:
    told = complaint(adapter={"method": "lorra"})
    assert told == (
        "adapter.method: expected one of lora, adalora, vera, loha, lokr, randlora, oft, miss, hira, shira, c3a, lily, "
        "ia3, bottleneck, prefix, prompt, p-tuning, tokens, layer-norm, bitfit, head, top-layers, full; "
        'found "lorra". Did you mean "lora"?'
    )


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"[key]": None}, ['"[key]"']),
        ({"lora": 1}, ["lora"]),
        ({"adapter": {"method": "lora", "[key]": "lora"}}, ['adapter."[key]"']),
        ({"adapter": {"method": "lora", "lora": 1}}, ["adapter.lora"]),
        ({"task": {"kind": "tagging", "types": {"[key]": 3}}}, ['task.types."[key]"']),
        ({"data": {"source": "demo", "columns": {"[key]": {}}}}, ['data.columns."[key]"']),
        ({"data": {"source": "demo", "columns": {"items": {"[key]": 3, "": "x"}}}},
         ['data.columns.items."[key]"', 'data.columns.items.""']),
    ],
)  # fmt: skip
def test_a_key_that_reads_like_a_mark_of_the_parser_is_a_key_like_any_other(
    changes: dict[str, Any], where: list[str]
) -> None:
    assert [fault.where for fault in faults_of({**SMALLEST, **changes})] == where


def test_a_whole_number_is_a_fine_real_number() -> None:
    recipe = parse_recipe({**SMALLEST, "adapter": {"method": "lora", "alpha": 8}})
    assert isinstance(recipe.adapter, LoraAdapter)
    assert (recipe.adapter.alpha, type(recipe.adapter.alpha)) == (8.0, float)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": {"source": "demo", "min_bundle_size": 5, "max_bundle_size": 4}}, "data.max_bundle_size: expected at"),
        (
            {"data": {"source": "demo", "min_bundle_size": 13}},
            "data.max_bundle_size: expected at least data.min_bundle",
        ),
        ({"data": {"source": "demo", "valid_fraction": 0.8}}, "data.test_fraction: expected less than 1 together with"),
        ({"data": {"source": "demo", "path": "x"}}, "data.path: source demo takes no path."),
        ({"data": {"source": "folder", "departments": ["x"]}}, "data.departments: source folder has no departments."),
        ({"training": {"batch_size": 10, "accumulation": 4}}, "training.accumulation: expected a divisor of training."),
        ({"adapter": {"method": "adalora", "warmup_fraction": 0.7}}, "adapter.final_fraction: expected less than 1 to"),
        (
            {"adapter": {"method": "adalora", "target_rank": 13}},
            "adapter.target_rank: expected at most adapter.initial",
        ),
        (
            {"adapter": {"method": "prefix", "length": 64}},
            "adapter.length: expected less than backbone.max_length, whi",
        ),
        (
            {"adapter": {"method": "full"}, "backbone": {"quantization": "8bit"}},
            "adapter.method: full trains the encod",
        ),
        (
            {"adapter": {"method": "p-tuning", "length": 64}},
            "adapter.length: expected less than backbone.max_length, whi",
        ),
        (
            {"adapter": {"method": "lora", "pissa": True}, "backbone": {"quantization": "4bit"}},
            "adapter.pissa: pissa starts from the singular vectors",
        ),
        (
            {"adapter": {"method": "lora", "dora": True}, "backbone": {"quantization": "8bit"}},
            "adapter.dora: dora reads the weights",
        ),
        (
            {"adapter": {"method": "loha"}, "backbone": {"quantization": "4bit"}},
            "adapter.method: loha takes its shape from the stored weights",
        ),
        ({"adapter": {"method": "lora", "pissa": True, "dora": True}}, "adapter.pissa: pissa and dora exclude each"),
        (
            {"adapter": {"method": "lora", "freeze_a": True, "plus_ratio": 2}},
            "adapter.freeze_a: freeze_a and plus_ratio exclude each",
        ),
        ({"adapter": {"method": "tokens"}}, "adapter.words: expected a list, each entry one line of text, found noth"),
    ],
)
def test_values_that_do_not_go_together_are_refused(changes: dict[str, Any], told: str) -> None:
    assert complaint(**changes).startswith(told)


def test_values_that_do_not_go_together_are_listed_beside_other_faults() -> None:
    faults = faults_of(
        {
            **SMALLEST,
            "seed": "x",
            "adapter": {"method": "prefix", "length": 64},
            "training": {"epochs": "ten", "batch_size": 10, "accumulation": 4},
        }
    )
    assert [fault.where for fault in faults] == ["seed", "adapter.length", "training.epochs", "training.accumulation"]


@pytest.mark.parametrize(
    "text", ["title", "{title", "{0}", "{}", "{title.__class__}", "{title[0]}", "{title!r}", "{title:9}"]
)
def test_a_text_template_reaches_for_columns_and_nothing_else(text: str) -> None:
    assert complaint(data={"source": "demo", "text": text}).startswith("data.text: expected a template such as")


def test_a_recipe_cannot_be_changed() -> None:
    recipe = parse_recipe(SMALLEST)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.training.epochs = 3
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3


def test_the_digest_depends_on_every_value_and_on_nothing_else() -> None:
    recipe = parse_recipe(SMALLEST)
    spelled_out = parse_recipe(dict(reversed(recipe.model_dump(mode="json").items())))
    assert recipe.digest() == spelled_out.digest()
    assert recipe.digest() != parse_recipe({**SMALLEST, "training": {"epochs": 11}}).digest()
    assert re.fullmatch("[0-9a-f]{64}", recipe.digest())


def test_a_source_in_a_folder_runs_once_the_folder_is_known() -> None:
    recipe = load_recipe("lora-electronics")
    with pytest.raises(
        RecipeError, match=r"data\.path: expected the folder of the bundlerec data, found none\. Give it"
    ):
        recipe.ready()
    given_path = load_recipe("lora-electronics", data="some/folder")
    assert given_path.ready() is given_path
    assert (given_path.data.source, given_path.data.path) == ("bundlerec", "some/folder")
    assert load_recipe("lora-fashion").ready().data.source == "demo"


def test_data_given_to_a_recipe_without_a_folder_makes_it_one_with_a_folder() -> None:
    food = load_recipe("lora-food", data="shop").ready()
    assert (food.data.source, food.data.path, food.data.departments) == ("folder", "shop", ())
    assert food.data.min_bundle_size == load_recipe("lora-food").data.min_bundle_size


METHOD_CLASSES = get_args(get_args(AdapterConfig)[0])


def test_a_method_takes_its_own_learning_rate_where_the_recipe_names_none() -> None:
    rates = {}
    for kind in METHOD_CLASSES:
        words = {"words": ["linen"]} if kind is TokensAdapter else {}
        method = kind.model_fields["method"].default
        recipe = parse_recipe({**SMALLEST, "adapter": {"method": method, **words}})
        rates[method] = recipe.training.learning_rate
        assert rates[method] == kind.default_learning_rate
        assert "Learning rate: " in kind.__doc__ or method == "head"
        assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    assert rates["full"] < rates["top-layers"] < rates["lora"] < rates["ia3"]
    given = parse_recipe({**SMALLEST, "adapter": {"method": "full"}, "training": {"learning_rate": 1e-3}})
    assert given.training.learning_rate == 1e-3
    assert load_recipe("lora-food").training.learning_rate == 1e-3


def test_every_method_has_a_page() -> None:
    pages = {path.stem for path in (REPOSITORY / "docs" / "methods").glob("*.md")}
    assert pages == {kind.model_fields["method"].default for kind in METHOD_CLASSES}


# YAML.


def test_yaml_values_are_what_they_look_like(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(
            tmp_path,
            """
            category: "2024"
            seed: 7
            backbone: {precision: no, model: 2024-01-01}
            data: {source: folder, columns: {items: {no: on, 1: yes}}, category_filter: null}
            adapter: {method: lora, targets: [query, off]}
            training: {learning_rate: 1e-4, weight_decay: .5, early_stopping: ~, fast_path: false, evaluate_every: 2}
            """,
        )
    )
    assert (recipe.category, recipe.seed, recipe.backbone.precision) == ("2024", 7, "no")
    assert recipe.backbone.model == "2024-01-01"
    assert recipe.data.columns == {"items": {"no": "on", "1": "yes"}}
    assert isinstance(recipe.adapter, LoraAdapter)
    assert recipe.adapter.targets == ("query", "off")
    assert (recipe.training.learning_rate, recipe.training.weight_decay) == (1e-4, 0.5)
    assert recipe.training.early_stopping is None
    assert recipe.training.fast_path is False
    assert recipe.name == "mine"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("category: a\ncategory: b\n", "mine.yaml:2: the key category is given twice."),
        ("category: a\ndata:\n  source: x\n  source: y\n", "mine.yaml:4: the key source is given twice."),
        ("category: a\n b: c\n", "mine.yaml:2: not valid YAML: "),
        ("category: [a\n", "not valid YAML: "),
        ("category: a\n\tb: c\n", "mine.yaml:2: not valid YAML: "),
        ("a: &x 1\nb: *x\n", "mine.yaml:1: anchors (&) and aliases (*) are not read"),
        ("category: *glob\n", "mine.yaml:1: anchors (&) and aliases (*) are not read"),
        ("seed: !!python/object/apply:os.getcwd []\n", 'mine.yaml:1: tags such as "tag:yaml.org,2002:python/object'),
        ("seed: !!int 3\n", "mine.yaml:1: tags such as"),
        ("a: 1\n---\nb: 2\n", "expected one document, found a second"),
        ("- a\n- b\n", "mine.yaml: expected keys such as category, data and adapter; found a list."),
        ("just text\n", 'mine.yaml: expected keys such as category, data and adapter; found "just text".'),
        ("", "mine.yaml: expected keys such as category, data and adapter; found nothing."),
        ("# only a comment\n", "expected keys such as category, data and adapter; found nothing."),
        ("? [a, b]\n: c\n", "mine.yaml:1: expected a plain key."),
        ("a: 1\nb: \0\n", "mine.yaml:2: expected printable text, found the character 0x0."),
        ('a: "\\UFFFFFFFF"\n', "not valid YAML"),
        (f"seed: {'9' * 5000}\n", "mine.yaml:1: expected a number, found very many digits."),
        ("[" * 1000, "mine.yaml:1: expected at most 16 levels, found more."),
        ("{a: " * 1000, "mine.yaml:1: expected at most 16 levels, found more."),
        ("".join(f"k{n}: 1\n" for n in range(600)), "mine.yaml:501: expected at most 500 keys together, found more."),
        ("# " + "x" * 70_000, "mine.yaml: expected at most 64 KiB, found more."),
        ('category: "\\ud800"\n', "category: expected a name"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal(write(tmp_path, text))


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes("category: a\nstore: caf\xe9\n".encode("latin-1"))
    assert "mine.yaml:2: expected UTF-8 text, found the byte 0xe9. Save the file as UTF-8." in refusal(file)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"\xef\xbb\xbfextends: lora-fashion\r\nseed: 3\r\n")
    assert load_recipe(file).seed == 3


def test_aliases_upon_aliases_cost_nothing(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert "aliases (*) are not read" in refusal(write(tmp_path, bomb))


# Inheritance.


def test_a_child_changes_what_it_says_and_keeps_the_rest(tmp_path: Path) -> None:
    parent = load_recipe("lora-fashion")
    child = load_recipe(write(tmp_path, "extends: lora-fashion\ntraining:\n  epochs: 2\nadapter:\n  rank: 4\n"))
    assert child.name == "mine"
    assert child.training == parent.training.model_copy(update={"epochs": 2})
    assert child.adapter == parent.adapter.model_copy(update={"rank": 4})
    assert child.category == parent.category


def test_another_method_leaves_the_keys_of_the_old_one_behind(tmp_path: Path) -> None:
    write(tmp_path, "extends: lora-fashion\nadapter: {rank: 4, dropout: 0.3, top_layers: 1}\n", "parent.yaml")
    child = load_recipe(write(tmp_path, "extends: parent.yaml\nadapter: {method: adalora, dropout: 0.2}\n"))
    assert child.adapter == AdaloraAdapter(dropout=0.2)
    same = load_recipe(write(tmp_path, "extends: parent.yaml\nadapter: {method: lora, dropout: 0.2}\n"))
    assert same.adapter == LoraAdapter(rank=4, dropout=0.2, top_layers=1)


def test_another_source_leaves_what_belonged_to_the_old_one_behind(tmp_path: Path) -> None:
    child = load_recipe(write(tmp_path, "extends: lora-food\ndata: {source: folder, path: shop}\n"))
    assert (child.data.path, child.data.departments) == ("shop", ())
    assert child.data.min_item_support == load_recipe("lora-food").data.min_item_support


def test_a_list_is_replaced_and_a_mapping_is_merged(tmp_path: Path) -> None:
    write(
        tmp_path,
        "category: a\ndata: {source: completejourney, departments: [A, B], columns: {items: {title: t, slot: s}}}\n"
        "adapter: {method: head}\n",
        "parent.yaml",
    )
    text = "extends: parent.yaml\ndata: {departments: [C], columns: {items: {title: x}}}\n"
    child = load_recipe(write(tmp_path, text))
    assert child.data.departments == ("C",)
    assert child.data.columns == {"items": {"title": "x", "slot": "s"}}


def test_a_name_is_the_files_own_and_never_the_parents(tmp_path: Path) -> None:
    write(tmp_path, "extends: lora-fashion\nname: given\n", "parent.yaml")
    assert load_recipe(tmp_path / "parent.yaml").name == "given"
    assert load_recipe(write(tmp_path, "extends: parent.yaml\n")).name == "mine"
    assert "name: expected a name of lower-case" in refusal(write(tmp_path, "extends: parent.yaml\n", "My Own.yaml"))


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    told = refusal(tmp_path / "a.yaml")
    assert "extends: expected a recipe that does not lead back here, found a.yaml -> b.yaml -> a.yaml." in told
    assert "does not lead back here" in refusal(write(tmp_path, "extends: mine.yaml\n"))


def test_a_long_row_of_recipes_is_refused(tmp_path: Path) -> None:
    for n in range(12):
        write(tmp_path, f"extends: r{n + 1}.yaml\n", f"r{n}.yaml")
    write(tmp_path, "extends: lora-fashion\n", "r12.yaml")
    assert "extends: expected at most 8 recipes in a row." in refusal(tmp_path / "r0.yaml")
    assert load_recipe(tmp_path / "r6.yaml").category == "fashion"


@pytest.mark.parametrize(
    ("extends", "told"),
    [
        ("lora-fashon", 'found "lora-fashon". Did you mean "lora-fashion"?'),
        ("zzz", 'found "zzz". A file is written with its ending: zzz.yaml'),
        ("basis.yaml", 'expected a file beside this recipe, found no "basis.yaml". Did you mean "base.yaml"?'),
        ("../base.yaml", 'expected a file beside or below this recipe, found "../base.yaml".'),
        ("below/../../base.yaml", "expected a file beside or below this recipe"),
        ("/etc/passwd", 'expected a file beside or below this recipe, found "/etc/passwd".'),
        ("linked.yaml", "expected a file beside or below this recipe"),
        ("loop.yaml", "extends: expected a file beside"),
        ('"a\\0b.yaml"', "extends: expected the name of a shipped recipe, or a file beside this one"),
        ("x" * 300 + ".yaml", "extends: expected the name of a shipped recipe, or a file beside this one"),
        ("[lora-fashion]", "extends: expected the name of a shipped recipe, or a file beside this one; found a list."),
        ("", "extends: expected the name of a shipped recipe, or a file beside this one; found null."),
    ],
)
def test_a_parent_must_be_shipped_or_lie_beside_its_child(tmp_path: Path, extends: str, told: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    write(tmp_path, "extends: lora-fashion\n", "base.yaml")
    write(home, "extends: lora-fashion\n", "base.yaml")
    (home / "linked.yaml").symlink_to(tmp_path / "base.yaml")
    (home / "loop.yaml").symlink_to(home / "loop.yaml")
    assert told in refusal(write(home, f"extends: {extends}\n"))


def test_a_parent_may_lie_below_its_child(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", "extends: lora-food\n", "base.yaml")
    assert load_recipe(write(tmp_path, "extends: below/base.yaml\n")).category == "food"


# Finding.


def test_a_name_means_a_shipped_recipe_and_a_path_means_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "extends: lora-fashion\nseed: 3\n", "lora-fashion.yaml")
    assert load_recipe("lora-fashion").seed == 0
    assert load_recipe("lora-fashion.yaml").seed == 3
    assert load_recipe("./lora-fashion.yaml").seed == 3


def test_an_unknown_name_is_answered_with_the_nearest_and_the_command_that_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = refusal("lora-fashon")
    assert 'No recipe "lora-fashon". Shipped: adalora-fashion, ' in told
    assert 'Did you mean "lora-fashion"?' in told
    assert "peft-combo recipes list" in told
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "extends: lora-fashion\n", "own.yaml")
    assert "To use the file of that name, write: --recipe own.yaml" in refusal("own")


@pytest.mark.parametrize("name", ["", ".", "..", "\0", "no/such/file", "missing.yaml", "x" * 5000, "a/" * 3000, "é\n"])
def test_a_recipe_that_is_not_there_is_an_error_of_ours(name: str) -> None:
    assert refusal(name).startswith("No recipe")


def test_an_installed_package_carries_its_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_recipes").mkdir()
    monkeypatch.setattr("peft_combo.files.__file__", str(tmp_path / "files.py"))
    assert recipes_folder() == tmp_path / "_recipes"


# Overrides.


def test_overrides_are_applied_last_and_read_as_yaml_scalars() -> None:
    recipe = load_recipe(
        "lora-food",
        [
            "training.epochs=2",
            "training.epochs=3",
            "training.learning_rate=1e-4",
            "training.early_stopping=null",
            "training.fast_path=false",
            "training.trackers=[tensorboard, wandb]",
            "data.text={title}: {category}",
            "data.departments=[MEAT, 'SALAD BAR']",
            "backbone.precision=no",
            'category="2024"',
            "store=a=b",
        ],
    )
    assert (recipe.training.epochs, recipe.training.learning_rate) == (3, 1e-4)
    assert (recipe.training.early_stopping, recipe.training.fast_path) == (None, False)
    assert recipe.training.trackers == ("tensorboard", "wandb")
    assert recipe.data.text == "{title}: {category}"
    assert recipe.data.departments == ("MEAT", "SALAD BAR")
    assert (recipe.category, recipe.store, recipe.backbone.precision) == ("2024", "a=b", "no")


def test_an_overridden_method_brings_its_own_defaults_in_any_order() -> None:
    for overrides in (["adapter.method=prefix", "adapter.length=4"], ["adapter.length=4", "adapter.method=prefix"]):
        assert load_recipe("lora-fashion", overrides).adapter == PrefixAdapter(length=4)


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["adapter={rank: 4}"], "adapter.rank", 4),
        (["adapter={rank: 4}"], "adapter.top_layers", 1),  # what it does not name stays
        (['adapter={"rank": 4, "alpha": 8}'], "adapter.alpha", 8.0),
        (["adapter={method: prefix, length: 6}"], "adapter.length", 6),
        (["adapter.rank=4", "adapter={alpha: 8}"], "adapter.rank", 4),
        (["adapter={rank: 8}", "adapter.rank=2"], "adapter.rank", 2),
        (["training.early_stopping={patience: 9}"], "training.early_stopping.patience", 9),
        (["data.columns={items: {item_id: sku}}"], "data.columns", {"items": {"item_id": "sku"}}),
        (["data.text={title} {category}"], "data.text", "{title} {category}"),
        (["data.text={title}: {category}"], "data.text", "{title}: {category}"),
        (["training.epochs=2", "training.epochs=3"], "training.epochs", 3),
    ],
)
def test_an_override_may_be_a_mapping_and_a_template_stays_text(overrides: list[str], key: str, value: Any) -> None:
    found: Any = load_recipe("lora-fashion", overrides)
    for step in key.split("."):
        found = getattr(found, step)
    assert found == value


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.epoch=2", 'training.epoch: unknown key. Did you mean "epochs"?'),
        ("trainin.epochs=2", 'trainin: unknown key. Did you mean "training"?'),
        ("epochs=2", "epochs: unknown key here. It belongs elsewhere: training.epochs."),
        ("training.epochs=ten", 'training.epochs: expected an integer from 1 to 1000, found "ten".'),
        ("training.epochs=null", "training.epochs: expected an integer from 1 to 1000, found null."),
        ("training.epochs=", "training.epochs: expected a value after =, found nothing. Write null for none."),
        ("training.early_stopping= ", "training.early_stopping: expected a value after ="),
        ("adapter={rnk: 4}", 'adapter.rnk: unknown key. Did you mean "rank"?'),
        ("adapter={rank:4}", "expected a blank after each colon, as in {rank: 4}."),
        ("adapter={rank: 4", 'adapter: expected a mapping of keys to values, found "{rank: 4".'),
        ("adapter={rank: 4, rank: 5}", "the key rank is given twice."),
        ("data.text={title: x}", "data.text: expected one line of text, found a mapping."),
        ("training.epochs.x=2", "training.epochs: expected an integer from 1 to 1000, found a mapping."),
        ("training=2", "training: expected a mapping of keys to values, found 2."),
        ("adapter.method=lorra", 'found "lorra". Did you mean "lora"?'),
        ("training.epochs", '--set "training.epochs": expected KEY=VALUE. As in training.epochs=2.'),
        ("=2", '--set "=2": expected KEY=VALUE.'),
        ("training..epochs=2", "expected KEY=VALUE."),
        ("training.trackers=[a", 'training.trackers: cannot read "[a": not valid YAML: '),
        ("seed=" + "9" * 5000, "seed: cannot read"),
        ("extends=lora-food", "extends: expected a key of the recipe."),
    ],
)
def test_an_override_that_does_not_fit_is_refused(override: str, told: str) -> None:
    assert told in refusal("lora-fashion", override)


# The library behind the verbs.


def test_check_returns_the_faults_and_nothing_for_a_sound_recipe(tmp_path: Path) -> None:
    assert check("lora-fashion") == []
    file = write(tmp_path, "extends: lora-fashion\ntraining: {epochs: ten, epoch: 3}\n")
    assert [fault.where for fault in check(file)] == ["training.epochs", "training.epoch"]
    assert [fault.where for fault in check(tmp_path / "none.yaml")] == [str(tmp_path / "none.yaml")]


def test_a_copy_is_byte_for_byte_and_loads_under_its_new_name(tmp_path: Path) -> None:
    file = copy_recipe("prefix-fashion", tmp_path / "new" / "my-prefix.yaml")
    assert file.read_bytes() == (recipes_folder() / "prefix-fashion.yaml").read_bytes()
    assert load_recipe(file).name == "my-prefix"
    assert load_recipe(file).adapter == load_recipe("prefix-fashion").adapter
    assert copy_recipe("lora-food", tmp_path) == tmp_path / "lora-food.yaml"


def test_a_copy_replaces_nothing_unless_told_to(tmp_path: Path) -> None:
    file = write(tmp_path, "mine\n")
    with pytest.raises(RecipeError, match=r"exists already\. Choose another name, or use --force"):
        copy_recipe("lora-fashion", file)
    assert file.read_text() == "mine\n"
    copy_recipe("lora-fashion", file, force=True)
    assert file.read_text() == read_recipe_text("lora-fashion")
    assert os.listdir(tmp_path) == ["mine.yaml"]
    with pytest.raises(RecipeError, match=r"ends in \.yaml, found .*Try .*other\.yaml"):
        copy_recipe("lora-fashion", tmp_path / "other.txt")
    with pytest.raises(RecipeError, match="Cannot write"):
        copy_recipe("lora-fashion", file / "below.yaml")


def test_every_field_is_described_and_every_number_bounded() -> None:
    for name, model in recipe_schema()["$defs"].items():
        assert model["description"], name
        for key, field in model["properties"].items():
            assert "const" in field or field["description"].endswith("."), f"{name}.{key}"
            number = next(iter(field.get("anyOf", [field])))
            if number.get("type") in ("integer", "number"):
                assert {"minimum", "exclusiveMinimum"} & set(number), f"{name}.{key}"
                assert {"maximum", "exclusiveMaximum"} & set(number), f"{name}.{key}"


def test_the_schema_covers_every_key_of_every_shipped_recipe() -> None:
    published = build_file_schema()
    assert json.loads(json.dumps(published)) == published
    assert '"required"' not in json.dumps(published)
    assert {"extends", "category", "adapter"} <= set(published["properties"])
    assert "extends" not in recipe_schema()["properties"]

    def paths(raw: dict[str, Any], above: str = "") -> set[str]:
        found = set()
        for key, value in raw.items():
            found |= {above + key} | (paths(value, f"{above}{key}.") if isinstance(value, dict) else set())
        return found

    free = ("data.columns.", "task.types.")  # what stands below is the user's own
    for name in SHIPPED:
        written = paths(yaml.safe_load(read_recipe_text(name))) - {"extends"}
        assert {path for path in written if not path.startswith(free)} <= set(list_key_paths())


def test_reading_a_recipe_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'datasets', 'numpy', 'scipy', 'pandas', 'accelerate'}"
    code = (
        "import sys; from peft_combo.recipe.files import load_recipe; load_recipe('lora-food'); "
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


# Whatever is thrown at it: a recipe or an error of ours, never a traceback.

FUZZ = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -1, 0, 1, 2, 64]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["lora", "prefix", "demo", "folder", "bundle", "no", "{title}", "\0", "\ud800"]),
    st.binary(max_size=4),
)
KEYS = st.one_of(st.sampled_from([key.rpartition(".")[2] for key in list_key_paths()]), st.text(max_size=8))
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=20,
)


def sound(recipe: Recipe) -> None:
    assert Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe
    assert len(recipe.digest()) == 64


def legible(error: RecipeError) -> None:
    assert error.faults or str(error).startswith("No recipe")
    text = str(error)
    text.encode("utf-8")
    assert all(make_printable(line) == line for line in text.split("\n"))
    assert "pydantic" not in text
    assert max(len(line) for line in text.splitlines()) < 1000


@FUZZ
@given(path=st.sampled_from(list_key_paths()), value=TREES)
def test_any_value_anywhere_gives_a_recipe_or_a_legible_error(path: str, value: object) -> None:
    raw: dict[str, Any] = json.loads(json.dumps({**SMALLEST, "training": {}, "backbone": {}, "task": {}}))
    *sections, key = path.split(".")
    node = raw
    for section in sections:
        node = node.setdefault(section, {})
    node[key] = value
    try:
        sound(parse_recipe(raw))
    except RecipeError as error:
        legible(error)


@FUZZ
@given(raw=st.dictionaries(KEYS, TREES, max_size=8))
def test_any_mapping_gives_a_recipe_or_a_legible_error(raw: dict[str, Any]) -> None:
    try:
        sound(parse_recipe(raw))
    except RecipeError as error:
        legible(error)


@FUZZ
@given(
    content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
)
def test_any_bytes_give_a_recipe_or_a_legible_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "fuzz.yaml"
    file.write_bytes(content)
    try:
        sound(load_recipe(file))
    except RecipeError as error:
        legible(error)


@FUZZ
@given(
    cut=st.integers(0, 3000),
    inserted=st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            ["\n- ", ": ", "&a ", "*a", "!!x ", "{", "[", "'", '"', "|\n", "<<: ", "? ", "%TAG", "---", "#"]
        ),
    ),
    name=st.sampled_from(SHIPPED),
)
def test_a_shipped_recipe_with_a_slip_gives_a_recipe_or_a_legible_error(
    tmp_path: Path, cut: int, inserted: str, name: str
) -> None:
    text = read_recipe_text(name)
    at = cut % len(text)
    file = tmp_path / "fuzz.yaml"
    file.write_bytes((text[:at] + inserted + text[at:]).encode("utf-8", "surrogatepass"))
    try:
        sound(load_recipe(file))
    except RecipeError as error:
        legible(error)


@FUZZ
@given(path=st.one_of(st.sampled_from(list_key_paths()), st.text(max_size=12)), value=st.text(max_size=30))
def test_any_override_gives_a_recipe_or_a_legible_error(path: str, value: str) -> None:
    try:
        sound(load_recipe("lora-fashion", [f"{path}={value}"]))
    except RecipeError as error:
        legible(error)


def test_what_is_set_for_the_data_of_the_command_line_stays(tmp_path: Path) -> None:
    """The demo's recipe turned to a folder of one's own: what was set with it is not taken for the demo's."""
    narrowed = load_recipe("lora-fashion", ("data.category_filter=Clothing > Women",), data=tmp_path)
    assert (narrowed.data.source, narrowed.data.path) == ("folder", str(tmp_path))
    assert narrowed.data.category_filter == "Clothing > Women"
    foreign = load_recipe("lora-fashion", ("data.source=bundlerec", "data.category_filter=A"), data=tmp_path)
    assert (foreign.data.source, foreign.data.category_filter) == ("bundlerec", "A")
    # What the recipe itself says of another source still goes.
    own = tmp_path / "own.yaml"
    own.write_text("extends: lora-food\ndata: {departments: [GROCERY]}\n")
    assert load_recipe(own, data=tmp_path).data.departments == ()
    assert load_recipe("lora-fashion", ("data.path=elsewhere",), data=tmp_path).data.path == str(tmp_path)
