"""The net around every command: one message and an exit code for whatever ends it, literal output, any encoding."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from test_cli import Run, commands, run  # noqa: F401  (a fixture)

from peft_combo import __version__
from peft_combo.cli import output
from peft_combo.errors import DataError, PeftComboError, make_printable

NAMES = ("[/5m]", "a\\[b]", ":smile:", "[red]x", "[link=file:///]y[/]", "\\[bold]z")
CONTROL = "esc\x1b[31m bidi\u202e bell\x07 csi\x9b31m line\nend"


@pytest.fixture
def failing(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:  # noqa: F811
    """Run `recipes list` where the library raises an error."""

    def call(error: BaseException, *options: str) -> tuple[int, str, str]:
        def fail() -> None:
            raise error

        monkeypatch.setattr("peft_combo.recipe.files.list_recipes", fail)
        return run(*options, "recipes", "list")

    return call


def start(*arguments: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run a command as a process of its own; `env` adds to the environment."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **options.pop("env", {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, "-m", "peft_combo", *arguments], env=env, check=False, **options)


# --- whatever ends a command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        ValueError("[/5m]\nsecond line"),
        RecursionError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
        TypeError("\x1b[31m"),
        OSError(errno.EBADF, "no file is named"),
    ],
)
def test_a_fault_of_ours_is_said_to_be_one_and_its_traceback_lies_in_a_file(
    error: Exception, failing: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, out, err = failing(error)
    assert (code, out) == (70, "")
    assert err.startswith(
        f"This is a fault of peft-combo {__version__}, not of what you gave it: {type(error).__name__}"
    )
    assert len(err.splitlines()) == 2
    assert "Traceback" not in err
    assert "\x1b" not in err
    path = re.findall(r"in (\S+\.txt)\.", err)[0]
    told = Path(path).read_text()
    assert "Traceback" in told
    assert "arguments: ['recipes', 'list']" in told
    assert __version__ in told
    assert Path(path).stat().st_mode & 0o077 == 0


def test_without_a_place_for_its_traceback_a_fault_says_where_it_was(
    failing: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere/at/all")
    code, _, err = failing(KeyError("x"))
    assert code == 70
    assert "KeyError: 'x'" in err
    assert re.search(r"At .*test_guard\.py:\d+; the traceback cannot be written \(No such file", err)
    assert "Traceback (most" in failing(KeyError("x"), "--debug")[2]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (DataError("Expected a, found b."), 1, "Expected a, found b.\n"),
        (FileNotFoundError(errno.ENOENT, "Gone", "a\x1bb"), 1, '"a\\x1bb" cannot be read or written: Gone.\n'),
        (PermissionError(errno.EACCES, "Denied", b"\xe9"), 1, '"\\udce9" cannot be read or written: Denied.\n'),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "The machine refuses: No space left on device.\n"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "The machine refuses: Too many open files.\n"),
    ],
)  # fmt: skip
def test_what_a_user_can_put_right_is_one_line(
    error: BaseException, code: int, message: str, failing: Callable[..., tuple[int, str, str]]
) -> None:
    assert failing(error) == (code, "", message)


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 3.64 TiB for an array with shape (1000000, 1000000)"),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: can't allocate memory: you tried 4 bytes"
        ),
    ],
)
def test_too_little_memory_is_no_fault_of_ours(
    error: BaseException, failing: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = failing(error)
    assert (code, out) == (1, "")
    assert err.startswith("There was not enough memory: ")
    assert "training.batch_size" in err
    assert len(err.splitlines()) == 2


def test_debug_shows_the_traceback_of_what_was_behind_a_message(failing: Callable[..., tuple[int, str, str]]) -> None:
    error = DataError("Expected a, found b.")
    error.__cause__ = KeyError("behind")
    code, out, err = failing(error, "--debug")
    assert (code, out) == (1, "")
    assert err.startswith("Expected a, found b.\nKeyError: 'behind'\n")
    assert "Traceback (most recent call last):" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("recipes", "lisst"), "No such command 'lisst'. Did you mean 'list'?\nSee: peft-combo recipes --help\n"),
        (("recipes", "list", "--[/5m]"), "No such option: --[/5m]"),
        (("rate", "--adapter", "x", "-k", "many"), "Invalid value for '-k'"),
        (("recipes", "show"), "Missing argument"),
    ],
)
def test_a_wrong_option_or_argument_is_exit_code_2_and_two_lines(
    arguments: tuple[str, ...], expected: str, run: Run  # noqa: F811
) -> None:  # fmt: skip
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert expected in err
    assert len(err.splitlines()) == 2


# --- what reads the output, and where ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ["--help", "recipes show lora-fashion", "data stats --json"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_went_away_ends_a_command_quietly(arguments: str, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = start(*arguments.split(), stdout=writer, env={"PYTHONUNBUFFERED": unbuffered})
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this machine")
@pytest.mark.parametrize("arguments", ["--version", "recipes list", "data stats --json"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_the_output_is_said(arguments: str, unbuffered: str) -> None:
    with open("/dev/full", "wb") as full:
        done = start(*arguments.split(), stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 1
    assert done.stderr == b"The output cannot be written: No space left on device.\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this machine")
def test_notes_that_nobody_can_read_end_nothing() -> None:
    with open("/dev/full", "wb") as full:
        done = start("data", "stats", "--json", stderr=full)
        refused = start("recipes", "show", "nothing", stderr=full)
    assert (done.returncode, json.loads(done.stdout)["items"]) == (0, 1000)
    assert (refused.returncode, refused.stdout) == (1, b"")


@pytest.mark.skipif(os.name == "nt", reason="a folder in use cannot be removed there")
def test_a_working_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    program = (
        "import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')\n"
        "from peft_combo.__main__ import main; main()"
    )
    for arguments in (["data", "stats"], ["recipes", "copy", "lora-fashion"], ["adapters", "list"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            "The working folder is gone, or may not be read (No such file or directory). Change to another.\n"
        )


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_an_answer_is_printed_in_any_encoding_and_json_stays_json(encoding: str) -> None:
    text = "wool coat 👗 café 🔴"
    env = {"PYTHONIOENCODING": encoding}
    done = start("tag", text, env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = text.replace("coat", "[coat](Clo)").encode(encoding, "replace").decode(encoding)
    assert done.stdout.decode(encoding).splitlines()[0] == shown
    done = start("tag", text, "--json", env=env)
    assert done.returncode == 0
    assert json.loads(done.stdout.decode(encoding))[0]["text"] == text
    wrong = start("recipes", "show", text, env=env)
    assert wrong.returncode == 1
    assert b"Traceback" not in wrong.stderr


# --- what is given ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="arguments are UTF-16 there")
@pytest.mark.parametrize("option", [name for name, _ in commands()])
def test_an_argument_that_is_not_utf_8_is_refused_before_any_command_runs(option: str, run: Run) -> None:  # noqa: F811
    for place in (("--query", "robe d\udce9t\udce9"), ("robe d\udce9t\udce9",), ("--size=robe d\udce9t\udce9",)):
        code, out, err = run(*option.split(), *place)
        assert (code, out) == (1, "")
        assert err.startswith(f'{"--query " if len(place) == 2 else ""}"')
        assert 'robe d\\xe9t\\xe9": expected UTF-8. Convert' in err
    assert "null character" in run(*option.split(), "a\0b")[2]
    assert '"\\ud83d": expected UTF-8' in run(*option.split(), "\ud83d")[2]


# --- literal output ---------------------------------------------------------------------------------------------------


def test_only_one_module_writes_to_the_terminal() -> None:
    for path in sorted((REPOSITORY / "peft_combo").rglob("*.py")):
        if path.name in ("output.py", "guard.py") and path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(REPOSITORY)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "typer.echo", "typer.secho", "sys.stdout.write"), where
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "rich" not in ast.unparse(node).replace(".", " ").split(), where
    source = (REPOSITORY / "peft_combo" / "cli" / "output.py").read_text()
    assert source.count(" Console(") == 1
    assert "Console(markup=False, emoji=False, highlight=False" in source
    assert source.count("TextColumn(") == source.count("markup=False)")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_as_they_are_wherever_text_goes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    output.print_line(name)
    output.print_text(f"{name}\n\t{name}\n")
    output.print_error(PeftComboError(f"one {name}\ntwo {name}"))
    output.print_table((name, "b"), [(name, f"{name} and {name}")])
    output.print_marked([(name, None), (name, "bold red")])
    output.print_json({name: name})
    with output.console_watch() as callback:
        callback.on_note(name)
        callback.on_stage(name, 3)
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == name
    plain = out.partition("{")[0]
    assert plain.count(name) == 9
    assert json.loads(out[out.index("{\n") :]) == {name: name}
    assert err.count(name) == 3


def test_a_progress_bar_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", screen := io.StringIO())
    with output.console_watch() as callback:
        for name in (*NAMES, CONTROL):
            callback.on_stage(name, 3)
            callback.on_advance(1)
            callback._bar.refresh()
    for name in NAMES:
        assert name in screen.getvalue()
    assert "\\x1b[31m bidi\\u202e bell\\x07 csi\\x9b31m line\\nend" in screen.getvalue()


def test_control_characters_never_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    escaped = "esc\\x1b[31m bidi\\u202e bell\\x07 csi\\x9b31m line\\nend"
    output.print_line(CONTROL)
    output.print_table((CONTROL,), [(CONTROL,)])
    output.print_marked([(CONTROL, None)])
    output.print_json(CONTROL)
    with output.console_watch() as callback:
        callback.on_note(CONTROL)
    output.print_error(DataError.from_faults(CONTROL, []))
    out, err = capsys.readouterr()
    assert out.count(escaped) == 4
    assert err == f"{escaped}\n{escaped}\n"
    assert json.loads(out.splitlines()[-1]) == CONTROL
    for text in (out, err):
        assert all(make_printable(line).rstrip() == line.rstrip() for line in text.split("\n"))
    output.print_text("a\r\nb\tc\rd\x1b[2J\n")
    assert capsys.readouterr().out == "a\r\nb\tc\\rd\\x1b[2J\n"


@pytest.mark.parametrize("text", ["👩\u200d💻", "a\u00a0b", "全角\u3000", "می\u200cروم", "e\u0301", "🏳\ufe0f\u200d🌈"])
def test_text_of_any_script_is_printed_as_it_is(text: str) -> None:
    assert make_printable(text) == text


def test_json_has_null_where_there_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"a": [float("nan"), {"b": float("-inf")}], "c": (1.5, "\ud83d")})
    out = capsys.readouterr().out
    assert json.loads(out, parse_constant=pytest.fail) == {"a": [None, {"b": None}], "c": [1.5, "\ud83d"]}


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_command_says_a_users_names_as_they_are(name: str, run: Run) -> None:  # noqa: F811
    """In whatever message: no traceback, no control character, at most a handful of lines."""
    for text in (" ".join(NAMES), CONTROL):
        for arguments in ((text,), (text, text, text), ("--recipe", text), (f"--{text}",), ("--adapter", text, text)):
            code, out, err = run(*name.split(), *arguments)
            if name == "tag" and code == 0:
                assert make_printable(text).replace("\\n", "") in out.replace("\\n", "")
                continue
            assert code in (0, 1, 2), err
            assert len(err.splitlines()) < 8
            assert "Traceback" not in err
            assert all(make_printable(line) == line for line in (out + err).split("\n"))
