"""Every benchmark still runs: with --smoke, on tiny made-up data, to the end and with a table to show for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from conftest import REPOSITORY
from forked import run_script

SCRIPTS = sorted(file for file in (REPOSITORY / "benchmarks").glob("*.py") if not file.stem.startswith("_"))
NEEDED = {
    "tagging_crf": "pycrfsuite",
    "recommend_speed": "faiss",
    "search_scale": "faiss",
    "count_scale": "duckdb",
    "pictures": "PIL",
}
"""What is no dependency of the tests; `.ci/run` installs it."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_a_benchmark_runs_to_the_end_with_smoke(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = NEEDED.get(script.stem)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    written = {file: file.read_bytes() for file in (REPOSITORY / "docs").rglob("*.md")}
    folder, printed = tmp_path / "here", tmp_path / "printed"
    folder.mkdir()
    printed.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))  # for the processes a script starts
    code, out, err = run_script(script, ["--smoke"], folder, printed)
    assert code == 0, f"{out[-2000:]}\n{err[-3000:]}"
    assert out.count("\n") >= 2, out
    assert list(folder.iterdir()) == [], "a smoke run leaves nothing behind"
    assert written == {file: file.read_bytes() for file in written}, "a smoke run writes nothing into docs/"
