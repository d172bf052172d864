"""What messages propose works: commands and options that exist, recipes that are shipped, extras that can be had."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main
from conftest import REPOSITORY

from peft_combo.cli.app import app
from peft_combo.files import list_shipped_recipes
from peft_combo.recipe.files import load_recipe
from peft_combo.store.lookup import write_tune_command

PACKAGE = REPOSITORY / "peft_combo"
STORED = REPOSITORY / "tests" / "stored" / "adapters"


def texts_of(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the texts of a module, what is filled in shown as `x`; not its docstrings."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "x" for part in child.values)
            yield child.lineno, "".join(map(str, parts))
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.lineno, child.value
        elif not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
            yield from texts_of(child)


NOT_COMMANDS = re.compile(r"(dataset|split|continued|rating|text|labelled|tagged|plain|for|calls|recipe|x)\b")
"""What follows the package's name in digests, headings and the version."""


def proposals() -> list[tuple[str, str]]:
    """Return the place and the rest of the line of every `peft-combo ...` in the package's messages."""
    return [
        (f"{file.relative_to(PACKAGE)}:{number}", line)
        for file in sorted(PACKAGE.rglob("*.py"))
        for number, text in texts_of(ast.parse(file.read_text()))
        for line in re.findall(r"peft-combo ([a-z][^\n]*)", text)
        if not NOT_COMMANDS.match(line)
    ]


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """Follow words to a command; return it with the words that are left."""
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        if command.invoke_without_command and words[0].startswith("--"):
            break  # a group that is a command itself
        assert words[0].strip(".,;)") in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0].strip(".,;)")], words[1:]
    return command, words


@pytest.mark.parametrize(("place", "line"), proposals(), ids=lambda value: str(value)[:60])
def test_a_command_in_a_message_exists_and_has_the_options_named_with_it(place: str, line: str) -> None:
    command, rest = find_command(line.split())
    options = {name for option in command.params for name in option.opts}
    for word in rest:
        if word.startswith("--"):
            assert word.strip(".,;)") in options, place


ENDING = re.compile(r"(?:with|first|Run|it): +peft-combo ([^\n]*?)(?: \(|; |$)")


@pytest.mark.parametrize(
    ("place", "line"),
    [
        (f"{file.relative_to(PACKAGE)}:{number}", found)
        for file in sorted(PACKAGE.rglob("*.py"))
        for number, text in texts_of(ast.parse(file.read_text()))
        for found in ENDING.findall(text)
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_command_to_copy_from_a_message_can_be_run_as_it_is(place: str, line: str) -> None:
    words = shlex.split(line.replace("xx", "x"))
    command, rest = find_command(words)
    with command.make_context("peft-combo", rest):
        pass
    for option, value in pairwise(words):
        if option == "--recipe" and value not in ("NAME", "x"):
            load_recipe(value.replace("-x", "-fashion"))


@pytest.mark.parametrize(
    "category", ["fashion", "food", "shoes", "foods", "cosmetic", "home-2", "fashion_kids", "a" * 64]
)
def test_the_command_that_trains_a_category_is_a_recipe_for_it(category: str) -> None:
    words = shlex.split(write_tune_command(category))
    assert words[:3] == ["peft-combo", "tune", "--recipe"]
    assert words[3] in list_shipped_recipes()
    overrides = [value for option, value in pairwise(words) if option == "--set"]
    assert load_recipe(words[3], overrides).category == category


def test_an_extra_in_a_message_can_be_installed() -> None:
    known = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        name
        for file in PACKAGE.rglob("*.py")
        for _, text in texts_of(ast.parse(file.read_text()))
        for name in re.findall(r"peft-combo\[([a-z-]+)\]", text)
    }
    assert named - {"x"} <= set(known)


# Every command that is given an adapter, a recipe or a file to write, with one that cannot be.
REFUSED = [
    "tune --recipe lora-nope", "tune --recipe lora-fashion --from shoes@v2", "tune --recipe lora-fashion --store file",
    "tune --recipe lora-fashion --from shoes --dry-run", "tune --recipe lora-fashion --run-folder file/run",
    "embed --recipe nope", "embed --recipe lora-fashion --adapter shoes", "embed --recipe lora-fashion --cache file",
    "tune --recipe lora-fashion --data missing", "evaluate --recipe lora-fashion --data missing",
    "recommend --recipe lora-fashion --frozen --items i1 --set data.source=folder --set data.path=missing",
    "data get bundlerec-clothing --to file", "evaluate --recipe nope", "evaluate --recipe lora-fashion --adapter shoes",
    "evaluate --recipe lora-fashion --plot chart.pdf", "evaluate --recipe lora-fashion --plot folder.png",
    "evaluate --recipe lora-fashion --plot file/chart.png", "compare --recipe nope --method lora",
    "compare --recipe lora-fashion nope", "compare --recipe lora-fashion --method lora --plot chart.pdf",
    "compare --recipe lora-fashion --method lora --to file/best.yaml",
    "compare --recipe lora-fashion --method lora --folder file", "search --recipe nope --over adapter.rank=1,2",
    "search --recipe lora-fashion --over adapter.rank=1,2 --to best.txt",
    "search --recipe lora-fashion --over adapter.rank=1,2 --folder file", "lr-range --recipe nope",
    "lr-range --recipe lora-fashion --plot file/chart.html", "recommend --recipe nope --items F1",
    "recommend --recipe lora-fashion --items F1", "recommend --recipe lora-fashion --frozen --query x --tagger shoes",
    "recommend --recipe lora-fashion --frozen --from missing.jsonl --to answers.jsonl",
    "recommend --recipe lora-fashion --frozen --from file --to answers.csv",
    "recommend --recipe lora-fashion --frozen --from asked.jsonl --to asked.jsonl",
    "recommend --recipe lora-fashion --frozen --from asked.jsonl --to file/answers.jsonl",
    "recommend --recipe lora-fashion --frozen --items F1 --fitted file", "tag x --adapter shoes",
    "tag --data shop --to items.txt --adapter shoes", "classify x --adapter shoes", "rate --adapter shoes",
    "adapters import file --category Shoes", "adapters export shoes --to x", "adapters diff shoes hats",
    "adapters diff shoes hats --recipe nope", "adapters merge shoes hats --into caps", "adapters convert shoes",
    "adapters transfer --recipe nope", "adapters transfer shoes --recipe lora-fashion",
    "data suggest --recipe nope --adapter shoes", "data suggest --recipe lora-fashion --adapter shoes",
    # Ids, columns, values, bounds and keys that are not there.
    "recommend --recipe lora-fashion --frozen", "recommend --recipe lora-fashion --frozen --items NOPE",
    "recommend --recipe lora-fashion --frozen --user NOPE",
    "recommend --recipe lora-fashion --frozen --session F1,NOPE",
    "recommend --recipe lora-fashion --frozen --query x --exclude NOPE",
    "recommend --recipe lora-fashion --frozen --query x --where nocolumn<5",
    "recommend --recipe lora-fashion --frozen --query x --where brand=Nobody",
    "recommend --recipe lora-fashion --frozen --query x --slots hat",
    "recommend --recipe lora-fashion --frozen --query x --without-slots hat",
    "recommend --recipe lora-fashion --frozen --query x --category Nope",
    "recommend --recipe lora-fashion --frozen --query x --season never",
    "recommend --recipe lora-fashion --frozen --query x --budget 0",
    "recommend --recipe lora-fashion --frozen --query x --budget -5",
    *(f"{name} --recipe lora-fashion --set adapter.rnk=4" for name in
      ("tune", "evaluate", "recommend --frozen --query x", "embed", "serve")),
    "embed --recipe lora-fashion --data missing", "serve --recipe lora-fashion --data missing",
    "embed --recipe lora-fashion --texts missing.parquet --to shards", "serve --recipe lora-fashion --adapter shoes",
    # Adapters of another task, of the fixture of 0.1.0.
    "classify x --adapter bundle-lora --store STORED", "tag x --adapter bundle-lora --store STORED",
    "rate --adapter bundle-lora --store STORED", "rate --adapter rating-lora --store STORED --data missing",
]  # fmt: skip


def test_what_cannot_be_is_refused_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "asked.jsonl").write_text('{"items": ["F1"]}\n')
    program = (
        "import shlex, sys, time\n"
        "from peft_combo.cli import app\n"
        "from peft_combo.errors import PeftComboError\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    start = time.process_time()\n"
        "    try:\n"
        "        app(shlex.split(line), standalone_mode=False)\n"
        "        print('done', line)\n"
        "    except PeftComboError as error:\n"
        "        spent = time.process_time() - start\n"
        "        print('refused' if spent < 2 else f'{spent:.1f} s for {line}')\n"
        "    if 'torch' in sys.modules:\n"
        "        sys.exit(f'torch was loaded for: {line}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False,
        input="\n".join(REFUSED).replace("STORED", shlex.quote(str(STORED))),
        env={"PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["refused"] * len(REFUSED) + [""]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked.jsonl", "file", "folder.png"]
