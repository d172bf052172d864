"""Counts of the structure: rooms, import floors, cycles, upward imports, long files and functions, names.

    python tools/structure.py

Prints what it counts and ends with exit code 1 where a bound is broken. `tests/test_structure.py` holds the same bounds
by these functions.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "peft_combo"

# A room (a package or module directly under peft_combo) may import those on earlier lines: see docs/architecture.md.
ORDER = [
    ["errors", "callbacks", "machine"],
    ["files", "distributed"],
    ["metrics", "recipe", "store"],
    ["data", "scoring"],
    ["encoder"],
    ["tuning", "adapters", "recommender"],
    ["evaluation", "testing", "serving"],
    ["cli"],
    ["__init__", "__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
MOST_ROOMS, MOST_FLOORS, MOST_LINES, MOST_FUNCTION_LINES = 20, 9, 500, 80

# What is longer today. Entries go, none may come: split the file or function instead.
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}

# Words that end in "ed" and are verbs all the same, and participles that do not.
_VERBS = {"embed", "feed", "need", "seed", "proceed", "speed"}
_PARTICIPLES = {
    "beside", "chosen", "drawn", "found", "given", "held", "kept", "known", "made", "meant", "said", "shown", "taken",
    "told", "worn", "written",
}  # fmt: skip


def list_files() -> list[Path]:
    """Return every module of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def name_place(path: Path) -> str:
    """Name a module without the package: "encoder.heads.base", "encoder.heads" for its `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@cache
def parse(path: Path) -> ast.Module:
    """Parse a module, once."""
    return ast.parse(path.read_text(encoding="utf-8"))


def list_imports(path: Path, everywhere: bool = False) -> set[str]:
    """Return what a file imports when it is loaded: not under TYPE_CHECKING or in functions, unless `everywhere`."""
    names: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif _loads_with_module(node) or (everywhere and hasattr(node, "body")):
                visit(node.body)  # type: ignore[attr-defined]

    visit(parse(path).body)
    return names


def _loads_with_module(node: ast.stmt) -> bool:
    return isinstance(node, ast.Try) or (isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test))


def list_imported_rooms(path: Path) -> set[str]:
    """Return the rooms a file imports from when it is loaded, its own among them."""
    own = [name.split(".") for name in list_imports(path) if name.split(".")[0] == "peft_combo"]
    return {parts[1] if parts[1] in FLOOR else "__init__" for parts in own if parts[1] != "__version__"}


def find_upward_imports() -> list[str]:
    """Return every import of a room that is not below the importing one."""
    upward = []
    for path in list_files():
        here = name_place(path).split(".")[0]
        wrong = [there for there in list_imported_rooms(path) - {here} if FLOOR[there] >= FLOOR.get(here, -1)]
        upward += [f"{name_place(path)} imports {there}, which is not below {here}" for there in wrong]
    return upward


def find_import_cycles() -> list[list[str]]:
    """Return groups of modules that import each other when they are loaded."""
    modules = {name_place(path): path for path in list_files()}
    graph = {place: {_find_module(name, modules) for name in list_imports(path)} - {"", place}
             for place, path in modules.items()}  # fmt: skip
    return [group for group in _strong_components(graph) if len(group) > 1]


def _find_module(name: str, modules: Mapping[str, Path]) -> str:
    """Return the module of the package that an imported name is, or is in; "" for none."""
    parts = name.split(".")[1:] if name.startswith("peft_combo.") else []
    places = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((place for place in places if place in modules), "")


def _strong_components(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Tarjan 1972, "Depth-first search and linear graph algorithms"."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            cut = stack.index(node)
            components.append(stack[cut:])
            del stack[cut:]

    for node in graph:
        if node not in index:
            visit(node)
    return components


def count_lines() -> dict[str, int]:
    """Return the lines of every file."""
    return {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in list_files()}


def count_function_lines() -> dict[str, int]:
    """Return the lines of every function; of those that share a name in a file, the most."""
    lines: dict[str, int] = {}
    for path in list_files():
        for node in _functions(path):
            key = f"{path.relative_to(PACKAGE)}:{node.name}"
            lines[key] = max(lines.get(key, 0), (node.end_lineno or 0) - node.lineno + 1)
    return lines


def find_participles() -> list[str]:
    """Return functions and methods, properties aside, whose name begins with a participle: "merged", "_kept"."""
    return [
        f"{path.relative_to(PACKAGE)}:{node.name}"
        for path in list_files()
        for node in _functions(path)
        if not any("property" in ast.dump(decorator) for decorator in node.decorator_list)
        and _is_participle(node.name.strip("_").split("_")[0])
    ]


def _is_participle(word: str) -> bool:
    return word in _PARTICIPLES or (word.endswith("ed") and len(word) > 3 and word not in _VERBS)


def find_repeated_classes() -> dict[str, list[str]]:
    """Return public class names that occur in more than one module."""
    places = defaultdict(list)
    for path in list_files():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(PACKAGE)))
    return {name: where for name, where in places.items() if len(where) > 1}


def _functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef))


def main() -> int:
    """Print the counts; return 1 where a bound is broken."""
    rooms = sorted({name_place(path).split(".")[0] for path in list_files()})
    upward, cycles = find_upward_imports(), find_import_cycles()
    counts = count_lines()
    files = {name: count for name, count in counts.items() if count > MOST_LINES}
    functions = {name: count for name, count in count_function_lines().items() if count > MOST_FUNCTION_LINES}
    lines = dict.fromkeys(rooms, 0)
    for name, count in counts.items():
        lines[name_place(PACKAGE / name).split(".")[0]] += count
    for floor, names in enumerate(ORDER, start=1):
        print(f"floor {floor}: " + ", ".join(f"{room} ({lines.get(room, 0):,} lines)" for room in names))
    print(f"{len(rooms)} rooms, {len(ORDER)} floors, {sum(lines.values()):,} lines in {len(counts)} files")
    print(f"{len(cycles)} import cycles, {len(upward)} upward imports")
    print(f"{len(files)} files over {MOST_LINES} lines, {len(functions)} functions over {MOST_FUNCTION_LINES}")
    print(f"{len(find_participles())} functions named by a participle, {len(find_repeated_classes())} repeated classes")
    for line in (*upward, *(" <-> ".join(group) for group in cycles), *files, *functions):
        print(f"  {line}")
    broken = upward or cycles or len(rooms) > MOST_ROOMS or len(ORDER) > MOST_FLOORS
    return int(bool(broken or set(files) - set(LONG_FILES) or set(functions) - set(LONG_FUNCTIONS)))


if __name__ == "__main__":
    sys.exit(main())
