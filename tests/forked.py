"""Programs that run in a process of their own without importing torch anew: forked from one that has it already.

Twenty scripts that import transformers for four seconds each are more than a minute of a suite's time. What is forked
has run no thread yet, so a program finds the world as a fresh interpreter would, but for modules being there.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import traceback
from pathlib import Path

_LOADED = ["torch", "transformers", "transformers.models.bert.modeling_bert", "peft", "accelerate", "scipy.optimize",
           "pandas", "pyarrow.parquet", "peft_combo.tuning.loop", "peft_combo.recommender.recommender",
           "peft_combo.evaluation.completion", "matplotlib.figure"]  # fmt: skip


def run_script(script: Path, arguments: list[str], cwd: Path, out: Path) -> tuple[int, str, str]:
    """Run a Python file as ``python script arguments`` does; return exit code, standard output and standard error.

    Args:
        out: an empty folder outside `cwd` for what it prints.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    process = context.Process(target=_run, args=(str(script), arguments, str(cwd), str(out)))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, (out / "out").read_text(), (out / "err").read_text()


def _run(script: str, arguments: list[str], cwd: str, out: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{out}/{name}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    code: int | str | None = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
