"""Functions that workers of the tests run: cheap to import, and some of them deadly."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from peft_combo.errors import PeftComboError


def double(share: dict[str, Any]) -> Any:
    """Return twice the numbers, and the words in capitals."""
    return np.asarray(share["numbers"]) * 2, [word.upper() for word in share["words"]]


def tell_process(share: int) -> int:
    """Return the process that did a share."""
    return os.getpid()


def die_once(share: dict[str, Any]) -> int:
    """Die of `kill -9` at the first share that has a mark nobody made yet."""
    mark = share.get("mark")
    if mark is not None and not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return int(share["number"]) ** 2


def die_of_two(share: dict[str, Any]) -> int:
    """Die of share number 2, whoever has it."""
    if share["number"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return int(share["number"])


def refuse(share: int) -> int:
    """Raise what a user can put right."""
    raise PeftComboError(f"No {share}. Take another.")


def break_down(share: int) -> int:
    """Raise what is a fault of ours."""
    return 1 // 0


class Holder:
    """An actor that holds what it was given."""

    def greet(self) -> int:
        """Say that it is there."""
        return 0
