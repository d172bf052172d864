"""torch, bitsandbytes, transformers and peft imported in the order and the way that costs a command the least.

Most of what a short command takes is these imports, and two parts of that are nobody's gain: the garbage collector
looks through a million new objects again and again, of which none is garbage, and bitsandbytes hands four functions to
`torch.compile`, which loads torch's inductor for devices without kernels of their own.
"""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable
from typing import Any


def import_libraries() -> None:
    """Import them, once. What bitsandbytes compiles is compiled when it is first called.

    The collector rests meanwhile and then leaves alone what is there (`gc.freeze`): modules, for the most part.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        import torch

        # SHiRA's updates are sparse tensors. Their checks are off by default; said, so that torch does not warn of it.
        torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
        # bitsandbytes warns on processors for which it looks for faster 4-bit kernels on a hub.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        compile_now = torch.compile
        torch.compile = functools.partial(_compile_later, compile_now)
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            pass  # peft says what is missing where it is wanted
        finally:
            torch.compile = compile_now
        import peft  # noqa: F401
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def _compile_later(compile_now: Callable[..., Any], function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if not compiled:
            compiled.append(compile_now(function, **options))
        return compiled[0](*arguments, **named)

    return call
