"""The documentation: its pages build without a network, each room has one, the import order shown is the one held."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from test_structure import structure

ARCHITECTURE = (REPOSITORY / "docs" / "architecture.md").read_text()


def load_tool(name: str) -> Any:
    """Return a script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_the_import_order_on_the_page_is_the_one_held() -> None:
    block = re.search(r"```text\n(.*?)```", ARCHITECTURE, re.DOTALL)
    assert block is not None
    shown = [re.sub(r"^\d+\s+", "", line).split(", ") for line in block[1].strip().splitlines()]
    assert [sorted(line) for line in shown] == [sorted(line) for line in structure.ORDER]


def test_every_room_is_on_the_page_and_has_a_reference_page() -> None:
    for room in structure.FLOOR:
        assert f"`{room}`" in ARCHITECTURE or room.startswith("__")
    packages = {path.parent.name for path in structure.PACKAGE.glob("*/__init__.py")} - {"cli"}
    pages = {path.stem for path in (REPOSITORY / "docs" / "reference").glob("*.md")}
    assert pages == packages | {"peft_combo", "testing"}


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for page, name in (("recommender", "BundleRecommender"), ("store", "AdapterStore"), ("peft_combo", "load_recipe")):
        html = (tmp_path / "site" / "reference" / page / "index.html").read_text()
        assert f"peft_combo.{name}" in html or f".{name}" in html, f"{name} is not on the page of {page}"
        assert "fonts.googleapis" not in html
    commands = (tmp_path / "site" / "reference" / "cli" / "index.html").read_text()
    assert all(f"peft-combo {name}" in commands for name in ("tune", "retune", "adapters merge", "serve keys add"))
    routes = (tmp_path / "site" / "reference" / "http" / "index.html").read_text()
    assert all(name in routes for name in ("POST /v1/compose", "POST /v1/adapters/promote", "filter.must"))
    fields = (tmp_path / "site" / "reference" / "fields" / "index.html").read_text()
    assert all(name in fields for name in ("adapter.top_layers", "task.whitening", "training.early_stopping.patience"))


def test_the_figures_are_those_of_the_page() -> None:
    """Drawn by tools/figures.py; every bar's value stands in its SVG as in docs/quality.md."""
    tool = load_tool("figures")
    for name, title in tool.CHARTS.items():
        drawn = (REPOSITORY / "docs" / "pictures" / f"quality-{name}.svg").read_text()
        for bar in tool.make_chart(name, title).bars:
            assert f"{bar.value:.4f}" in drawn, f"{name}: {bar.name}. Run: python tools/figures.py"
