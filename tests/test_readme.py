"""The README is true: every command in it runs, in the order a newcomer would type them.

They run as written, in a process each, on the recipe's own data and passes; the one thing that is not the reader's is
the number of threads (see conftest).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import REPOSITORY
from served_shop import read_url, start_service

README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every command, without what installs: an environment is made by the CI script, once, in the same way."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    words = [shlex.split(part) for part in parts]
    return [call for call in words if "pip" not in call[0] and "venv" not in call]


def call(words: list[str], folder: Path) -> str:
    if words[0] == "curl" and shutil.which("curl"):
        done = subprocess.run([*words, "--silent", "--fail"], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout
    if words[0] in ("curl", "xdg-open"):
        headers = {"Content-Type": "application/json"}
        body = words[2].encode() if words[1] == "--json" else None
        with urllib.request.urlopen(urllib.request.Request(words[-1], body, headers), timeout=120) as answer:
            return str(answer.read().decode())
    programs = {
        "peft-combo": [sys.executable, "-m", "peft_combo"],
        "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
    }
    program = programs[Path(words[0]).name]
    done = subprocess.run(
        [*program, *words[1:]], cwd=folder, capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


@contextmanager
def serve(words: list[str], folder: Path) -> Iterator[None]:
    """Start the service, wait until it can be asked, and end it as Ctrl-C does."""
    assert words[0] == "peft-combo"
    process = start_service([sys.executable, "-m", "peft_combo", *words[1:]], folder)
    try:
        assert read_url(process) == "http://127.0.0.1:8765"
        yield
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def background() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_the_commands_and_the_program_run_as_written(tmp_path: Path, tiny_shop: Path, background: ExitStack) -> None:
    shutil.copytree(tiny_shop, tmp_path / "my-shop")
    told = []
    for words in commands():
        if "pytest" in words:
            continue  # that is what is running
        if words[-1] == "&":
            background.enter_context(serve(words[:-1], tmp_path))
            continue
        told.append(call(words, tmp_path))
    answers = [json.loads(one) for one in told if one.startswith('{"request_id"') or '"arms"' in one]
    assert [len(answer.get("results", answer.get("arms"))) > 0 for answer in answers] == [True, True]
    assert "<html" in next(one for one in told if one.startswith("<!"))
    assert "The tuned encoder is better than the frozen one" in told[0]
    program = "\n".join(blocks("python")) + "\nprint(vectors.shape, vectors.dtype, len(outfits))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path,
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.stdout.startswith("NDCG@10 0."), done.stderr
    assert done.stdout.endswith("(2, 384) float32 5\n"), done.stderr


def test_loading_an_adapter_takes_five_lines() -> None:
    program = blocks("python")[0]
    assert len([line for line in program.splitlines() if line.strip()]) <= 5


@pytest.mark.parametrize("word", ["constraints.txt", "lora-fashion"])
def test_files_the_readme_names_exist(word: str) -> None:
    assert list(REPOSITORY.glob(word)) or list(REPOSITORY.glob(f"recipes/{word}.yaml"))
