"""The package as it is released: a source archive from which a wheel is built, and a wheel that runs by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import REPOSITORY

from peft_combo import __version__

NAME = f"peft_combo-{__version__}"
LEFT_OUT = (".github/", ".gitignore")  # what only the repository on a server needs


def run(*words: str | Path, cwd: Path, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-P", *map(str, words)], cwd=cwd, capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], **environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def list_tracked() -> set[str]:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("this is no checkout: what belongs to it cannot be listed")
    done = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name for name in done.stdout.splitlines() if (REPOSITORY / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, and the wheel that is built from it and from nothing else."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the package, is not installed (extra test)")
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=REPOSITORY)
    with tarfile.open(folder / f"{NAME}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    run("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=folder / NAME)
    return folder


def test_the_source_archive_holds_what_is_tracked(built: Path) -> None:
    wanted = {name for name in list_tracked() if not name.startswith(LEFT_OUT)}
    assert wanted - {str(path.relative_to(built / NAME)) for path in (built / NAME).rglob("*")} == set()


def test_the_wheel_holds_the_package_its_recipes_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        found = {name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")}
        told = wheel.read(f"{NAME}.dist-info/METADATA").decode()
    tracked = list_tracked()
    package = {name for name in tracked if name.startswith("peft_combo/")}
    recipes = {f"peft_combo/_{name}" for name in tracked if name.startswith("recipes/")}
    assert found == package | recipes
    assert f"\nVersion: {__version__}\n" in told
    assert "\n# peft-combo\n" in told, "the README is its description"


def test_the_wheel_runs_without_the_checkout(built: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "installed"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", shelf,
        built / f"{NAME}-py3-none-any.whl", cwd=tmp_path)  # fmt: skip
    where = run("-c", "import peft_combo; print(peft_combo.__file__)", cwd=tmp_path, PYTHONPATH=str(shelf))
    assert Path(where.strip()) == shelf / "peft_combo" / "__init__.py"
    told = run("-m", "peft_combo", "--version", cwd=tmp_path, PYTHONPATH=str(shelf))
    assert told == f"peft-combo {__version__}\n"
    assert "lora-fashion" in run("-m", "peft_combo", "recipes", "list", cwd=tmp_path, PYTHONPATH=str(shelf))
    run("-m", "peft_combo", "data", "copy", "demo", "shop", cwd=tmp_path, PYTHONPATH=str(shelf))
    assert (tmp_path / "shop" / "items.csv").is_file()


def test_the_version_is_told_in_one_way() -> None:
    assert f"version: {__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()
    heading = next(line for line in (REPOSITORY / "CHANGELOG.md").read_text().splitlines() if line.startswith("## 0"))
    assert heading.startswith(f"## {__version__} (")
