"""Every benchmark still runs: with --smoke, on tiny made-up data, to the end and with a table to show for it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

SCRIPTS = sorted(file for file in (REPOSITORY / "benchmarks").glob("*.py") if not file.stem.startswith("_"))
NEEDED = {"tagging_crf": "pycrfsuite", "recommend_speed": "faiss"}
"""What is no dependency of the tests; `.ci/run` installs it."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_a_benchmark_runs_to_the_end_with_smoke(script: Path, tmp_path: Path) -> None:
    needed = NEEDED.get(script.stem)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    written = {file: file.read_bytes() for file in (REPOSITORY / "docs").rglob("*.md")}
    done = subprocess.run(
        [sys.executable, str(script), "--smoke"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert done.stdout.count("\n") >= 2, done.stdout
    assert list(tmp_path.iterdir()) == [], "a smoke run leaves nothing behind"
    assert written == {file: file.read_bytes() for file in written}, "a smoke run writes nothing into docs/"
