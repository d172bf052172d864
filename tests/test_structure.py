"""The house: rooms stand on import floors, each third-party package has one owner, files and functions stay short."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "peft_combo"

# A room (a package or module directly under peft_combo) may import those on earlier lines. `ARCHITECTURE.md` says why.
ORDER = [
    ["errors", "callbacks", "machine"],
    ["files"],
    ["scoring", "metrics", "recipe", "store"],
    ["data"],
    ["encoder"],
    ["tuning", "adapters", "recommender"],
    ["evaluation"],
    ["cli"],
    ["__init__", "__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
HEAVY = ("torch", "transformers", "peft", "datasets", "pandas", "pyarrow")
LIGHT = [*(room for line in ORDER[:4] for room in line), "recommender.fusion", "recommender.composing", "cli"]
OWNERS: dict[str, str | tuple[str, ...]] = {
    "peft": "encoder.methods",
    "bitsandbytes": ("encoder", "cli.diagnostics"),
    "accelerate": "tuning",
    "datasets": "data",
    "optuna": "evaluation",
    "faiss": "encoder.index",
    "implicit": "scoring.factors",
    "matplotlib": "metrics.charts",
    "onnx": "adapters",
    "onnxruntime": "adapters",
    "typer": "cli",
    "rich": "cli",
}
"""Third-party package -> the only room, or part of one, that may import it."""

MOST_LINES, MOST_FUNCTION_LINES = 500, 80
# What is longer today. Entries go, none may come: split the file or function instead.
LONG_FILES = {}
LONG_FUNCTIONS: dict[str, int] = {}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def place_of(path: Path) -> str:
    """Name a module without the package: "encoder.heads.base"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path, everywhere: bool = False) -> set[str]:
    """Modules a file imports when it is loaded: not those under TYPE_CHECKING or in functions, unless `everywhere`."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif (
                isinstance(node, ast.Try)
                or (isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test))
                or (everywhere and hasattr(node, "body"))
            ):
                visit(node.body)

    visit(ast.parse(path.read_text()).body)
    return found


def rooms_of(path: Path) -> set[str]:
    """Rooms that a file imports from when it is loaded."""
    own = [name.split(".") for name in imports(path) if name.split(".")[0] == "peft_combo"]
    return {parts[1] if parts[1] in FLOOR else "__init__" for parts in own if parts[1] != "__version__"}


def functions() -> Iterator[tuple[str, int]]:
    """Every function of the package and its lines."""
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(PACKAGE)}:{node.name}", (node.end_lineno or 0) - node.lineno + 1


def test_every_file_is_in_a_room() -> None:
    assert {place_of(path).split(".")[0] for path in files()} == set(FLOOR)


def test_rooms_import_from_earlier_floors_only() -> None:
    for path in files():
        here = place_of(path).split(".")[0]
        wrong = [there for there in rooms_of(path) - {here} if FLOOR[there] >= FLOOR[here]]
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}, which is not below {here}"


@pytest.mark.parametrize("room", sorted(path.parent for path in PACKAGE.rglob("__init__.py")), ids=str)
def test_a_room_says_what_it_owns_and_lists_its_names(room: Path) -> None:
    name = ".".join(room.relative_to(REPOSITORY).parts)
    face = importlib.import_module(name)
    assert face.__doc__, f"{name} has no docstring"
    if name != "peft_combo.cli":
        for public in face.__all__:
            assert getattr(face, public) is not None


def test_every_module_opens_with_what_it_is_about() -> None:
    for path in files():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(PACKAGE)} has no docstring"


def test_floors_below_the_encoder_and_the_command_line_load_nothing_heavy() -> None:
    program = "import sys\n" + "".join(f"import peft_combo.{name}\n" for name in LIGHT)
    program += f"print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_third_party_package_has_one_owner() -> None:
    for path in files():
        for name in imports(path, everywhere=True):
            owner = OWNERS.get(name.split(".")[0], ())
            owners = [f"{one}." for one in ([owner] if isinstance(owner, str) else owner)]
            at_home = not owners or f"{place_of(path)}.".startswith(tuple(owners))
            assert at_home, f"{place_of(path)} imports {name}, which belongs to {owner}"


def test_no_file_and_no_function_grows_beyond_its_bound() -> None:
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in files()}
    long = {name: count for name, count in lines.items() if count > LONG_FILES.get(name, MOST_LINES)}
    assert not long, f"longer than {MOST_LINES} lines, or than they were: {long}"
    wide = {name: count for name, count in functions() if count > LONG_FUNCTIONS.get(name, MOST_FUNCTION_LINES)}
    assert not wide, f"longer than {MOST_FUNCTION_LINES} lines, or than they were: {wide}"


def test_the_lists_of_exceptions_only_shrink() -> None:
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in files()}
    assert [name for name in LONG_FILES if lines.get(name, 0) <= MOST_LINES] == []
    spans = dict(functions())
    assert [name for name in LONG_FUNCTIONS if spans.get(name, 0) <= MOST_FUNCTION_LINES] == []
    assert len(LONG_FILES) + len(LONG_FUNCTIONS) <= 12  # to come down to 10
