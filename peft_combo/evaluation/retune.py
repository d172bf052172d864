"""Retuning from use: take back what feedback shows to be worse, check drift, go on tuning, promote on a win.

Owns the order of a retuning and its journal, so that it can be run by a clock: two at once do not meet, one that was
stopped goes on, and what was learned from once is not learned from again as if it were new. How a version is tuned,
compared and promoted is `tuning.continual`'s; where use is kept is not known here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from peft_combo.callbacks import RunCallback
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import split_as
from peft_combo.data.use import LoggedList, UseBundle
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.errors import PeftComboError
from peft_combo.evaluation.drift import DriftCheck, check_drift
from peft_combo.files import check_folder_target, lock_file
from peft_combo.metrics.off_policy import ArmDifference, compare_arms
from peft_combo.recipe.model import Recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.continual import Continued, Gate, continue_tuning

JOURNAL = "retune.jsonl"
FEWEST_LISTS = 200
"""Lists of each version without which their feedback is not compared."""

Outcome = Literal["rolled back", "waiting", "no drift", "promoted", "not promoted"]


@dataclass(frozen=True)
class Use:
    """What was gathered to learn from.

    Attributes:
        new_data: a data folder with all bundles of use, old and new; `tune --new-data` takes the same.
        bundles: those bundles, with their times. lists: what was shown, with feedback; empty where nothing was logged.
    """

    new_data: Path
    bundles: Sequence[UseBundle]
    lists: Sequence[LoggedList] = ()


@dataclass(frozen=True)
class RetuneRule:
    """When a retuning does something.

    Attributes:
        fewest: new bundles without which it waits. only_on_drift: whether it also waits without drift.
        replay: share of old bundles that are shown again. gate: what a new version has to show.
    """

    fewest: int = 50
    only_on_drift: bool = False
    replay: float = 0.3
    gate: Gate = field(default_factory=Gate)


@dataclass(frozen=True)
class Retuned:
    """What a retuning did.

    Attributes:
        outcome: in a word. told: the same in a sentence.
        new: bundles since the last tuning. drift: the comparisons made.
        regression: the version in use beside the one before, by feedback; None where there is not enough of both.
    """

    outcome: Outcome
    told: str
    new: int
    drift: tuple[DriftCheck, ...] = ()
    regression: ArmDifference | None = None
    continued: Continued | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "outcome": self.outcome,
            "told": self.told,
            "new": self.new,
            "drift": [{**asdict(one), "drifted": one.drifted} for one in self.drift],
            "regression": None if self.regression is None else asdict(self.regression),
            "continued": None if self.continued is None else self.continued.to_json(),
        }


class RetuneBusy(PeftComboError):
    """Another retuning of the same alias is under way."""


def retune(
    recipe: Recipe, alias: str, use: Use, folder: Path, *, rule: RetuneRule | None = None,
    callback: RunCallback | None = None,
) -> Retuned:  # fmt: skip
    """Look after an alias once: roll back a regression, or learn from new use and promote on a win.

    Args:
        recipe: the one the adapter in use was tuned with.
        alias: of the recipe's category, such as ``prod``; it has to be there.
        folder: of the journal and of the tuning run; one for each alias.
    Raises:
        RetuneBusy: another one holds the folder.
        PeftComboError: as `continue_tuning`; the journal keeps that it was begun, and the next call goes on.
    """
    rule, callback = rule or RetuneRule(), callback or RunCallback()
    check_folder_target(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock_file(folder / ".lock"):
            return _retune(recipe, alias, use, folder, rule, callback)
    except TimeoutError as error:
        raise RetuneBusy(
            f"Another retuning works in {folder}. It ends by itself; run this one again afterwards."
        ) from error


def _retune(recipe: Recipe, alias: str, use: Use, folder: Path, rule: RetuneRule, callback: RunCallback) -> Retuned:
    store, reference = AdapterStore(recipe.store), f"{recipe.category}@{alias}"
    pointing = store.alias_at(reference)
    journal = read_journal(folder)
    since = max((float(one["until"]) for one in journal if one["step"] == "done"), default=0.0)
    begun = next((one for one in reversed(journal) if one["step"] != "rolled back"), None)
    new = [one for one in use.bundles if one.time > since]

    # What is in use is worse than what was before?
    regression = compare_versions_in_use(pointing.target, pointing.category, pointing.before, use.lists)
    if regression is not None and regression.interval[1] < 0:
        after = store.rollback(reference)
        told = f"Rolled back: {reference} points to v{after.version} again. {describe_regression(regression)}"
        _note(folder, {"step": "rolled back", "from": pointing.target, "to": after.target, "told": told})
        return Retuned("rolled back", told, len(new), (), regression)

    # A call that was stopped after the alias had moved: the move is what it was for.
    if begun is not None and begun["step"] == "begun" and _came_from(store, pointing.target) == begun["from"]:
        _note(folder, {"step": "done", "until": begun["until"], "outcome": "promoted", "version": pointing.target})
        told = f"Promoted: {reference} points to v{pointing.version} since a call that was stopped after it."
        return Retuned("promoted", told, len(new), (), regression)

    # Is there enough that is new, and is it different?
    if len(new) < rule.fewest:
        told = f"Waiting: {len(new):,} new bundles since the last tuning, and {rule.fewest:,} are asked for."
        return Retuned("waiting", told, len(new), (), regression)
    drift = _check(recipe, store, pointing.target, use, new, since, callback)
    for one in drift:
        callback.on_note(str(one))
    if rule.only_on_drift and not any(one.drifted for one in drift):
        told = f"Nothing tuned: {len(new):,} new bundles, and none of {len(drift)} comparisons shows drift."
        return Retuned("no drift", told, len(new), drift, regression)

    # Go on from the version in use, with all there is; a stopped call goes on from its checkpoint.
    until = max(one.time for one in new)
    if begun is not None and begun["step"] == "begun" and begun["from"] == pointing.target:
        run = str(begun["run"])
    else:
        run = f"{pointing.target.partition('@')[2]}-{int(until)}"
        _note(folder, {"step": "begun", "from": pointing.target, "until": until, "new": len(new), "run": run})
    continued = continue_tuning(
        recipe, reference, new_data=use.new_data, replay=rule.replay, promote=alias, gate=rule.gate, resume=True,
        run_folder=folder / run, callback=callback,
    )  # fmt: skip
    outcome: Outcome = "promoted" if continued.promoted else "not promoted"
    _note(
        folder,
        {"step": "done", "until": until, "outcome": outcome, "version": continued.result.record.reference,
         "told": continued.promotion},
    )  # fmt: skip
    return Retuned(outcome, continued.promotion, len(new), drift, regression, continued)


def compare_versions_in_use(
    target: str, category: str, before: int | None, lists: Sequence[LoggedList]
) -> ArmDifference | None:
    """Compare the version in use with the one before it by feedback; None where one of them has too few lists.

    A list earns 1 where anything of it was clicked or taken. Where both versions answered at the same time (a split) it
    is a comparison; one after the other it is an alarm, since the season changes too.
    """
    if before is None:
        return None
    earned = {
        version: [(float(any(one.rewards)), one.group) for one in lists if one.version == version]
        for version in (f"{category}@v{before}", target)
    }
    if min(map(len, earned.values())) < FEWEST_LISTS:
        return None
    (first, first_users), (second, second_users) = (zip(*part, strict=True) for part in earned.values())
    return compare_arms(np.array(first), np.array(first_users), np.array(second), np.array(second_users))


def describe_regression(found: ArmDifference) -> str:
    """Say in a sentence how the version in use does beside the one before."""
    return (
        f"Of {found.lists[1]:,} lists {found.second:.2%} were clicked or taken from, and {found.first:.2%} of "
        f"{found.lists[0]:,} under the version before: {found.difference:+.2%} "
        f"[{found.interval[0]:+.2%}, {found.interval[1]:+.2%}], by user."
    )


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """Return what retunings of a folder did, oldest first; a last line cut short by a crash is none."""
    try:
        lines = (folder / JOURNAL).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise PeftComboError(
                    f"Line {number} of {folder / JOURNAL} is no JSON. Put it right, or start anew with another folder."
                ) from error
    return found


def _note(folder: Path, entry: dict[str, Any]) -> None:
    """Add a line to the journal that outlives a crash."""
    path = folder / JOURNAL
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps({**entry, "time": round(time.time(), 3)}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _came_from(store: AdapterStore, reference: str) -> str | None:
    """Return the version that a version went on from."""
    continued = (store.open(reference).manifest.data.model_extra or {}).get("continued")
    return str(continued["from"]) if isinstance(continued, dict) and "from" in continued else None


def _check(
    recipe: Recipe, store: AdapterStore, target: str, use: Use, new: Sequence[UseBundle], since: float,
    callback: RunCallback,
) -> tuple[DriftCheck, ...]:  # fmt: skip
    """Compare new use with what the recipe's own data holds to learn from."""
    dataset = open_dataset(recipe.data)
    callback.on_note(f"Encoding {len(dataset.catalog):,} items with {target} to check drift ...")
    backbone = Backbone.of(recipe.backbone)
    vectors = backbone.encode(dataset.texts, AdapterBank(backbone, store).get(target).attached)
    return check_drift(dataset, split_as(dataset, recipe.data).train, new, vectors, use.lists, since)
