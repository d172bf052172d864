"""Runs of a comparison: every variant under every seed, one process after another, resumable.

Owns the folder of a comparison: a result is kept under a digest of all it depends on, so that a comparison that was
killed goes on where it stopped, and one that is widened runs what is new alone. Knows nothing of what a result says.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peft_combo import __version__
from peft_combo.callbacks import RunCallback
from peft_combo.errors import PeftComboError
from peft_combo.evaluation.comparison.result import BATCHES, FAILED, LOG, RECIPE, SAMPLE, Result, read_result
from peft_combo.evaluation.comparison.table import Comparison, Failed, comparison_of
from peft_combo.evaluation.comparison.variants import Variant
from peft_combo.files import write_text
from peft_combo.recipe.files import write_recipe
from peft_combo.recipe.model import Recipe
from peft_combo.tuning.tasks import build_task


class Stopped(PeftComboError):
    """The comparison was stopped from outside; what was finished is kept.

    Attributes:
        exit_code: what a program ended by that returns.
    """

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class _Asked:
    """The data a variant is measured on, and some of its texts to time the encoder with."""

    digests: tuple[str, str]
    sample: tuple[str, ...]


def compare(
    variants: Sequence[Variant], seeds: Sequence[int], folder: Path, callback: RunCallback | None = None
) -> Comparison:
    """Tune every variant under every seed, each in a process of its own, and compare them on validation.

    Args:
        variants: of the same data, asked the same questions.
        folder: keeps results and adapters; what is there already is not run again.
        callback: told of each finished run.
    Raises:
        PeftComboError: the variants ask different questions, or none of them could be tuned.
        Stopped: Ctrl-C, or a signal that ends the program; the same call goes on.
    """
    callback = callback or RunCallback()
    asked = _read_queries(variants)
    callback.on_stage("Comparing", len(variants) * len(seeds))
    results: dict[str, list[Result]] = {variant.label: [] for variant in variants}
    failed: dict[str, Failed] = {}
    # Seed by seed, so that whoever stops halfway has all variants under the first seeds.
    for seed in seeds:
        for variant, one in zip(variants, asked, strict=True):
            if variant.label not in failed:
                found = _run(variant, seed, one, folder, callback)
                if isinstance(found, Result):
                    results[variant.label].append(found)
                else:
                    failed[variant.label] = found
            callback.on_advance(1)
    if len(failed) == len(variants):
        reasons = "\n".join(f"  {one.label}: {one.reason}" for one in failed.values())
        raise PeftComboError(f"None of the variants could be tuned:\n{reasons}")
    whole = [variant for variant in variants if variant.label not in failed]
    return comparison_of(whole, results, tuple(failed.values()), tuple(seeds))


def _read_queries(variants: Sequence[Variant]) -> list[_Asked]:
    """Read the data of each variant, once where it is the same."""
    known: dict[str, _Asked] = {}
    found = []
    for variant in variants:
        recipe = variant.recipe
        key = json.dumps([recipe.data.model_dump(mode="json"), recipe.task.model_dump(mode="json")])
        if key not in known:
            task = build_task(recipe)
            distinct = list(dict.fromkeys(task.texts))
            places = np.linspace(0, len(distinct) - 1, min(len(distinct), max(BATCHES))).astype(int)
            digests = str(task.data["digest"]), str(task.data["split_digest"])
            known[key] = _Asked(digests, tuple(distinct[place] for place in places))
        found.append(known[key])
    for variant, one in zip(variants, found, strict=True):
        if one.digests != found[0].digests:
            raise PeftComboError(
                f'"{variants[0].label}" and "{variant.label}" are measured on different questions, since their data is '
                "divided or filtered in different ways. Compare variants that share the data section but for data.text."
            )
    return found


def _run(variant: Variant, seed: int, asked: _Asked, folder: Path, callback: RunCallback) -> Result | Failed:
    home = folder / _name(variant, seed, asked)
    told = f"{variant.label}, seed {seed}"
    if (found := read_result(home)) is not None:
        callback.on_note(f"{told}: {found.metric} {found.value:.4f}, kept from before")
        return found
    shutil.rmtree(home, ignore_errors=True)  # what a run that died left; its time would count from the middle
    recipe = variant.recipe.model_copy(update={"seed": seed, "store": str(home.absolute() / "adapters")})
    write_recipe(recipe, home / RECIPE)
    write_text(home / SAMPLE, json.dumps(asked.sample))
    with (home / LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "peft_combo.evaluation.comparison.worker", str(home)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
        try:
            code = process.wait()
        except (KeyboardInterrupt, SystemExit) as error:  # the latter where a signal ends the program
            code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 130
            raise Stopped(
                f"Stopped in {told}. The finished runs are in {folder}; the same command goes on.", code
            ) from None
        finally:
            process.stdin.close()  # type: ignore[union-attr]  # whatever happens here, the run does not outlive it
            process.wait()
    if (found := read_result(home)) is not None:
        callback.on_note(f"{told}: {found.metric} {found.value:.4f} after {found.seconds:.0f} s")
        return found
    reason = _reason(home, code)
    callback.on_note(f"{told}: failed: {reason}")
    return Failed(variant.label, f"seed {seed}: {reason}")


def _name(variant: Variant, seed: int, asked: _Asked) -> str:
    """Return the folder of a run: readable, and another one wherever anything that counts differs."""
    recipe: Recipe = variant.recipe.model_copy(update={"name": "", "category": "", "store": "", "seed": seed})
    digest = hashlib.sha256(json.dumps([recipe.digest(), *asked.digests, __version__]).encode()).hexdigest()
    words = re.sub(r"[^a-z0-9]+", "-", variant.label.lower()).strip("-")[:40]
    return f"{words}-seed{seed}-{digest[:12]}"


def _reason(home: Path, code: int) -> str:
    """Say why a run left no result."""
    if (home / FAILED).is_file():
        return (home / FAILED).read_text(encoding="utf-8")
    if code < 0:
        return f"ended by {signal.Signals(-code).name}; if it was not you, the memory may have run out"
    lines = (home / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else f'exit code {code}'} (all of it in {home / LOG})"
