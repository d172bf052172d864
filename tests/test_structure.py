"""Imports point one way: no module reaches for one to its right, and nothing left of the encoder needs torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

PACKAGE = REPOSITORY / "peft_combo"

# Each group may import from those above it and, within itself, from the left. A package counts as one module.
ORDER = [
    ["errors", "machine"],
    ["recipe_fields", "written"],
    ["adapter_configs", "augmentation_config", "task_configs"],
    ["metrics", "recipe", "watch", "charts"],
    ["recipe_files", "manifest"],
    ["references", "recipe_writing"],
    ["store_files"],
    ["aliases", "versions"],
    ["drafts"],
    ["data", "adapters"],
    ["scoring", "doctor"],
    ["fusion"],
    ["categories"],
    ["slots", "constraints", "wishes"],
    ["composing"],
    # From here on torch.
    ["architectures"],
    ["methods", "onnx_graphs"],
    ["backbone"],
    ["tasks", "item_encoder", "checkpoint"],
    ["bank", "generating"],
    ["vectors", "rated"],
    ["tuning", "contenders", "importing", "exporting"],
    ["weighing"],
    ["composition"],
    ["recommender", "evaluation", "arithmetic", "comparing", "rate_range", "continuing", "suggesting"],
    ["recommender_files", "batch", "searching"],
    ["cli"],
    ["__init__"],
    ["__main__"],
]
LIGHT = [
    "errors",
    "machine",
    "metrics",
    "recipe_fields",
    "adapter_configs",
    "augmentation_config",
    "task_configs",
    "recipe",
    "watch",
    "recipe_files",
    "recipe_writing",
    "written",
    "charts",
    "manifest",
    "references",
    "store_files",
    "aliases",
    "versions",
    "drafts",
    "data",
    "adapters",
    "doctor",
    "scoring",
    "slots",
    "wishes",
    "constraints",
    "composing",
    "cli",
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports when it is loaded: not those under TYPE_CHECKING or in functions."""
    found = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "peft_combo":
                rest = node.module.split(".")[1:]
                found.update([rest[0]] if rest else [alias.name for alias in node.names])
            elif isinstance(node, ast.Import):
                found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("peft_combo."))
            elif isinstance(node, ast.Try) or (isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test)):
                visit(node.body)

    visit(ast.parse(path.read_text()).body)
    return found


def test_every_module_has_a_place() -> None:
    assert {module_of(path) for path in PACKAGE.rglob("*.py")} == set(RANK)


def test_no_import_points_upwards() -> None:
    for path in PACKAGE.rglob("*.py"):
        here = module_of(path)
        upwards = [there for there in imports(path) - {here, "__version__"} if RANK[there] >= RANK[here]]
        assert not upwards, f"{path.relative_to(PACKAGE)} imports {upwards}"


def test_what_is_left_of_the_encoder_needs_no_torch() -> None:
    program = "import sys\n" + "".join(f"import peft_combo.{name}\n" for name in LIGHT)
    program += (
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'pandas', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_methods_imports_peft_and_only_tuning_imports_accelerate() -> None:
    owners = {"peft": {"methods"}, "accelerate": {"tuning"}, "datasets": {"data"}, "optuna": {"searching"}}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                owner = owners.get(name.split(".")[0])
                assert owner is None or module_of(path) in owner, f"{path} imports {name}"
