"""The notebook of the examples runs, and what it shows is what it says."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "examples" / "first-adapter.ipynb"
# nbclient and what it starts warn of themselves; in a process of its own that is not our error.
PROGRAM = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
nbformat.write(notebook, "done.ipynb")
"""


def test_the_notebook_runs_and_draws_its_charts(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the extra test is not installed")
    pytest.importorskip("ipykernel", reason="the extra test is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(NOTEBOOK)], cwd=tmp_path, capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for file in (tmp_path / "done.ipynb", NOTEBOOK):  # what it gives now, and what it shows to who only looks at it
        cells = [cell for cell in nbformat.read(file, 4).cells if cell.cell_type == "code"]
        outputs = [output for cell in cells for output in cell.outputs]
        assert not [one for one in outputs if one.get("name") == "stderr"]
        charts = [one.data["image/svg+xml"] for one in outputs if "image/svg+xml" in one.get("data", {})]
        assert len(charts) == 2
        assert "tuned" in charts[0]
        printed = "".join(one.text for one in outputs if one.output_type == "stream")
        assert printed.startswith("fashion@v1: NDCG@10 +")
        assert printed.count("beach-shoes-1") == 3
        prices = ast.literal_eval(outputs[-1].data["text/plain"])  # a list of tuples, as the cell shows it
        assert all(price <= 100 and any("shoes" in item for item in items) for price, items in prices)
