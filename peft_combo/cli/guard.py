"""The net around every command: one message and an exit code for whatever ends it, and never a bare traceback.

Exit codes: 0 done, 1 something a user can put right, 2 a wrong option or argument, 70 a fault of ours, 130 interrupted,
141 the reader of the output went away. `tune` adds 3 and 4. Knows no command.
"""

from __future__ import annotations

import errno
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import typer

from peft_combo import __version__
from peft_combo.cli.output import print_error
from peft_combo.errors import PeftComboError, shorten

FAULT, INTERRUPTED, READER_GONE = 70, 130, 141
"""Exit codes: EX_SOFTWARE of sysexits.h, and what a shell shows of SIGINT and SIGPIPE."""

_MEMORY_REMEDY = "Close other programs, or lower training.batch_size and training.cache_limit_mib."
_GLOBAL_FLAGS = ("--quiet", "--debug")
_PACKAGE = Path(__file__).resolve().parent.parent
# What a machine refuses without naming a file.
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO, errno.EAGAIN, errno.ENOMEM}


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    command = typer.main.get_command(app)
    context: Any = None
    code = 0
    with _guard_streams():
        try:
            try:
                if "_PEFT_COMBO_COMPLETE" in os.environ:  # the shell asks how a word goes on
                    app(prog_name="peft-combo")
                _check_arguments(arguments)
                context = command.make_context("peft-combo", put_globals_first(arguments))
                with context:
                    _check_working_folder()
                    command.invoke(context)
            except typer.Exit as end:
                code = end.exit_code
            if sys.stdout is not None:
                sys.stdout.flush()
        except SystemExit:
            raise
        except BaseException as error:
            code = _explain(error, arguments, debug=bool(context and context.params.get("debug")))
    return code


def put_globals_first(arguments: Sequence[str]) -> list[str]:
    """Return a command line with ``--quiet`` and ``--debug`` at its head, wherever they were typed before a ``--``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = [word for word in arguments[:end] if word in _GLOBAL_FLAGS]
    return [*flags, *(word for word in arguments[:end] if word not in _GLOBAL_FLAGS), *arguments[end:]]


def _explain(error: BaseException, arguments: Sequence[str], debug: bool) -> int:
    """Say what ended a command, in at most three lines where it is not a list of faults; return the exit code."""
    match error:
        case OutputRefusedError(refusal=BrokenPipeError()):
            return READER_GONE
        case OutputRefusedError():
            code, message = 1, f"The output cannot be written: {error.refusal.strerror or error.refusal}."
        case typer.Abort() | KeyboardInterrupt():
            code, message = INTERRUPTED, "Interrupted."
        case typer.TyperException():
            code, message = 2, _explain_usage(error)
        case PeftComboError():
            code, message = 1, str(error)
        case OSError() if (refused := _explain_machine(error)) is not None:
            code, message = 1, refused
        case _ if _is_out_of_memory(error):
            code, message = 1, f"There was not enough memory: {_first_line(error)}.\n{_MEMORY_REMEDY}"
        case _:
            code, message = FAULT, _explain_fault(error, arguments)
    print_error(message)
    if debug:
        print_error("".join(traceback.format_exception(error)).rstrip())
    return code


def _explain_usage(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    text = error.format_message()
    if context is None or "\n" in text:  # a group without a command: the text is its help
        return text
    return f"{text}\nSee: {context.command_path} --help"


def _explain_machine(error: OSError) -> str | None:
    """Return what to say of a file or machine that refuses; None where the fault is ours."""
    reason = error.strerror or _first_line(error)
    if error.filename is None:
        return f"The machine refuses: {reason}." if error.errno in _MACHINE else None
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    if Path(name).is_relative_to(_PACKAGE):
        return None
    return f'"{name}" cannot be read or written: {reason}.'


def _is_out_of_memory(error: BaseException) -> bool:
    # torch is not imported here: its errors are known by name (GPU) and by what its CPU allocator says.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _explain_fault(error: BaseException, arguments: Sequence[str]) -> str:
    """Write the traceback to a file of its own; return a message that names it."""
    told = f"This is a fault of peft-combo {__version__}, not of what you gave it: {_first_line(error)}"
    details = (
        f"peft-combo {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"arguments: {list(arguments)!a}\n\n" + "".join(traceback.format_exception(error))
    )
    try:
        descriptor, path = tempfile.mkstemp(".txt", "peft-combo-fault-")
        with open(descriptor, "wb") as file:
            file.write(details.encode("utf-8", "backslashreplace"))
    except OSError as refusal:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = refusal.strerror or refusal
        return f"{told}\nAt {place.filename}:{place.lineno}; the traceback cannot be written ({reason}): use --debug."
    return f"{told}\nThe traceback is in {path}. Please report it with that file."


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {shorten(lines[0], 300)}" if lines else "")


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse what a shell hands over that is no text: bytes in another encoding, half an emoji, a null character."""
    for before, text in zip(["", *arguments], arguments, strict=False):
        if "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text):
            continue
        # Python has bytes that it cannot decode as U+DC80 to U+DCFF; written as the bytes they are.
        shown = "".join(f"\\x{ord(char) - 0xDC00:02x}" if "\udc80" <= char <= "\udcff" else char for char in text)
        told = f'{f"{shorten(before)} " if before.startswith("-") else ""}"{shorten(shown)}"'
        if "\0" in text:
            raise PeftComboError(f"{told}: expected a text, found a null character in it. Take it out.")
        with suppress(UnicodeError):
            os.fsencode(text).decode()
            raise PeftComboError(f"{told}: this locale has no such characters. Set PYTHONUTF8=1, or LC_ALL=C.UTF-8.")
        raise PeftComboError(f"{told}: expected UTF-8. Convert the text with iconv; a file or folder, rename it.")


def _check_working_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        reason = error.strerror or error
        raise PeftComboError(
            f"The working folder is gone, or may not be read ({reason}). Change to another."
        ) from error


# Streams.


class OutputRefusedError(Exception):
    """Standard output takes nothing more. Not an OSError, so that no command takes it for a file of its own."""

    def __init__(self, refusal: OSError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class GuardedStream:
    """A standard stream that replaces what its encoding has no sign for.

    What stdout does not take ends the command (`OutputRefusedError`); what stderr does not take is dropped, for a note
    that nobody reads is no reason to lose a run.
    """

    def __init__(self, stream: TextIO, dropping: bool) -> None:
        self._stream = stream
        self._dropping = dropping
        self._refusal: OSError | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace" if dropping else "replace")

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            if self._refusal is None:
                act()
        except OSError as refusal:
            self._refusal = refusal
            with suppress(OSError):  # elsewhere with it, or Python speaks up when it flushes at its end
                elsewhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(elsewhere, self._stream.fileno())
                os.close(elsewhere)
        if self._refusal is not None and not self._dropping:
            raise OutputRefusedError(self._refusal) from self._refusal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _guard_streams() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    # Python has None in place of a stream that was closed before it started.
    guarded: list[Any] = [one and GuardedStream(one, dropping=one is before[1]) for one in before]
    sys.stdout, sys.stderr = guarded
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
