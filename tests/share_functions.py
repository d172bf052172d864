"""Functions that workers of the tests run: cheap to import, and some of them deadly."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
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


class Here:
    """An executor of one worker, this process; it is interrupted after so many shares where it is told to be."""

    workers = 1

    def __init__(self, most: int = 1000) -> None:
        self.most, self.done = most, 0

    def map_shares(self, function: Callable[[Any], Any], shares: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Do share after share."""
        for number, share in enumerate(shares):
            if number == self.most:
                raise KeyboardInterrupt
            self.done += 1
            yield number, function(share)


class Holder:
    """An actor that holds what it was given."""

    def greet(self) -> int:
        """Say that it is there."""
        return 0
