"""README and documentation are true: every command and program in them runs, in the order a newcomer would type them.

They run as written, in a process each, on the recipe's own data and passes; the one thing that is not the reader's is
the number of threads (see conftest). What cannot run here says so, and names commands and options that exist.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import REPOSITORY
from doc_blocks import NOT_RUN, PAGES, README, Block
from forked import run_script
from served_shop import read_url, start_service
from test_remedies import find_command

OPENED_FIRST = ("docs/start.md", "docs/catalogue.md")
"""Pages that are run before the others."""


@dataclass
class Reader:
    """Types what stands in blocks, in one folder, each command once."""

    folder: Path
    background: ExitStack
    script: Path
    told: dict[str, str] = field(default_factory=dict)

    def read(self, blocks: list[Block]) -> None:
        program = "\n".join(block.text for block in blocks if block.language == "python" and block.run)
        for place, block in enumerate(blocks):
            if block.file is not None:
                (self.folder / block.file).parent.mkdir(exist_ok=True)
                (self.folder / block.file).write_text(block.text)
            elif block.run and block.language == "bash":
                for words in block.commands:
                    self.type(words, block.code)
                if block.code:
                    assert blocks[place + 1].text.strip() in self.told[shlex.join(block.commands[-1])]
        if program:
            file = self.script.with_name(f"program{len(self.told)}.py")
            file.write_text(program)
            self.told[blocks[0].page] = self.fork(file, [], 0)

    def type(self, words: list[str], code: int) -> None:
        name, known = Path(words[0]).name, shlex.join([Path(words[0]).name, *words[1:]])
        if name == "python3" or name == "pip" or known in self.told:
            return  # an environment is made by the CI script, once, in the same way
        if name in ("curl", "xdg-open"):
            self.told[known] = ask(words)
        elif words[-1] == "&":
            self.background.enter_context(serve(words[:-1], self.folder))
            self.told[known] = ""
        else:
            assert name == "peft-combo", words
            self.told[known] = self.fork(self.script, words[1:], code)

    def fork(self, script: Path, arguments: list[str], code: int) -> str:
        out = self.script.parent / f"out{len(list(self.script.parent.iterdir()))}"
        out.mkdir()
        found, told, errors = run_script(script, arguments, self.folder, out)
        assert found == code, f"{script.name} {shlex.join(arguments)}\n{told}\n{errors[-3000:]}"
        return told + errors * bool(code)


def ask(words: list[str]) -> str:
    body = words[2].encode() if words[1] == "--json" else None
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(words[-1], body, headers), timeout=120) as answer:
        return str(answer.read().decode())


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


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, tiny_shop: Path) -> Iterator[dict[str, str]]:
    """What every command and program printed, by the command, the page of the program."""
    folder, notes = tmp_path_factory.mktemp("newcomer"), tmp_path_factory.mktemp("notes")
    shutil.copytree(tiny_shop, folder / "my-shop")
    (notes / "peft-combo.py").write_text("from peft_combo.__main__ import main\nmain()\n")
    with ExitStack() as background:
        reader = Reader(folder, background, notes / "peft-combo.py")
        reader.read(README)
        for page in (*OPENED_FIRST, *(name for name in PAGES if name not in OPENED_FIRST)):
            reader.read(PAGES[page])
        yield reader.told


def test_the_commands_of_the_readme_do_what_it_says(told: dict[str, str]) -> None:
    first = told["peft-combo tune --recipe lora-fashion"]
    assert "The tuned encoder is better than the frozen one" in first
    answers = [json.loads(one) for one in told.values() if one.startswith('{"request_id"') or '"arms"' in one]
    assert [len(answer.get("results", answer.get("arms"))) > 0 for answer in answers] == [True, True]
    assert "<html" in next(one for one in told.values() if one.startswith("<!"))
    asked = 'peft-combo recommend --recipe lora-fashion --query "linen outfit for a beach wedding" --budget 250'
    bundles = re.split(r"^\d\. ", told[shlex.join(shlex.split(asked))], flags=re.MULTILINE)[1:]
    items = [frozenset(re.findall(r"\bF\d{4}\b(?=  )", one)) for one in bundles]
    assert len(set(items)) == 5, "five different bundles"
    assert all(len(one) >= 3 for one in items)
    assert "score" not in "".join(bundles)
    assert sum("linen" in one.lower() for one in bundles) >= 3
    prices = [float(re.search(r"([\d,.]+) in all", one)[1]) for one in bundles]  # type: ignore[index]
    assert max(prices) <= 250


def test_the_programs_of_readme_and_pages_run(told: dict[str, str]) -> None:
    assert re.match(r"[1-9] [\[(].*[\])]\nNDCG@10 0\.\d{3} in \(", told["docs/python.md"])
    assert {"README.md", "docs/howto/scorer.md", "docs/howto/hot-swap.md"} <= set(told)


def test_what_is_not_run_says_why_and_names_what_exists() -> None:
    left_out = [block for blocks in (README, *PAGES.values()) for block in blocks if block.title.startswith(NOT_RUN)]
    assert left_out
    for block in left_out:
        assert len(block.title) > len(NOT_RUN) + 3, block
        for words in block.commands if block.language == "bash" else ():
            if "peft_combo" in words:  # accelerate launch -m peft_combo
                words = ["peft-combo", *words[words.index("peft_combo") + 1 :]]
            if words[0] == "peft-combo":
                command, rest = find_command(words[1:])
                with command.make_context("peft-combo", rest):
                    pass


def test_loading_an_adapter_takes_five_lines() -> None:
    program = next(block.text for block in README if block.language == "python")
    assert len([line for line in program.splitlines() if line.strip()]) <= 5


def test_files_that_the_readme_links_to_exist() -> None:
    text = (REPOSITORY / "README.md").read_text()
    links = [one for one in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', text) for one in one if one]
    assert len(links) > 20
    missing = [one for one in links if not one.startswith("http") and not (REPOSITORY / one).exists()]
    assert missing == [], "not there"
    pictures = [REPOSITORY / one for one in links if "pictures" in one]
    assert pictures
    assert all(one.stat().st_size < 200_000 for one in pictures)
