"""Entry point of ``peft-combo``, ``python -m peft_combo`` and ``accelerate launch -m peft_combo``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from peft_combo.machine import count_usable_cpus


class _Ended(SystemExit):
    """A signal asked the program to end; what is half written is cleared away on the way out."""


def main() -> None:
    """Run the command line; whatever ends it is one message on stderr and an exit code (see `cli.guard`)."""
    settle_threads(os.environ)
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP
    for number in taken:
        signal.signal(number, _end)
    try:
        from peft_combo.cli import app
        from peft_combo.cli.guard import run

        code = run(app, sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    except _Ended as error:
        from peft_combo.cli.output import print_error

        with suppress(OSError):  # the terminal may be gone
            print_error(f"Ended by {signal.Signals(int(str(error.code)) - 128).name} before it was done.")
        raise
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
        _drop_dead_streams()
    sys.exit(code)


def settle_threads(environ: MutableMapping[str, str]) -> None:
    """Choose how OpenMP's threads wait and how many there are, before torch is loaded, unless a user has chosen.

    Threads that spin at a barrier take the processor from whoever they wait for, as soon as there are more of them than
    free cores. A quota of a control group is nothing that OpenMP knows.
    """
    if any(name.startswith("KMP_") for name in environ):
        return
    if "GOMP_SPINCOUNT" not in environ:
        environ.setdefault("OMP_WAIT_POLICY", "passive")
    usable = count_usable_cpus()
    if usable < (os.cpu_count() or 1):
        environ.setdefault("OMP_NUM_THREADS", str(usable))


def _end(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # who asks twice does not want to wait for the way out
    raise _Ended(128 + number)


def _drop_dead_streams() -> None:
    """Point a stream whose reader is gone elsewhere, or Python would end with an exit code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    main()
