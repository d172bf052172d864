"""Continual tuning: a stored adapter learns from new data, remembers the old, and takes over only where it is better.

Owns what is learned anew and what is replayed, how forgetting is measured, and the gate before an alias moves. The
loop is `tuning`'s; what is stored is an adapter like any other, whose manifest says what it came from
(``data.continued``).

What was held out stays held out: users and bundles fall into parts by a hash of their ids, the old and the new data are
divided each by itself, and a bundle that equals a held-out one is not learned from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_combo import metrics
from peft_combo.callbacks import RunCallback
from peft_combo.data.join import join_datasets
from peft_combo.data.leakage import split_problem
from peft_combo.data.model import Dataset
from peft_combo.data.queries import Queries
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import Split, split_as
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank, LiveAdapter
from peft_combo.encoder.heads.completion import BundleHead, build_completion_row, rank_targets
from peft_combo.errors import DataError, StoreError, TuningError
from peft_combo.metrics.report import Gain, ResultRow
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import BundleTask
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.aliases import Alias
from peft_combo.store.references import check_alias
from peft_combo.store.versions import AdapterRecord
from peft_combo.tuning.loop import TuneResult, tune
from peft_combo.tuning.tasks import build_task
from peft_combo.tuning.tasks.base import AnyTask
from peft_combo.tuning.tasks.bundle import BundleCompletion
from peft_combo.tuning.warm_start import only_encoder, recipe_from

METRIC = "ndcg@10"


@dataclass(frozen=True)
class Gate:
    """What a new version has to show before an alias moves to it, all of it on validation queries.

    Attributes:
        gain: NDCG@10 it has to win on the new queries, over the version it came from: more than this.
        p: the paired test of that gain has to be below this.
        forgetting: NDCG@10 it may lose at most on the old queries.
    """

    gain: float = 0.0
    p: float = 0.05
    forgetting: float = 0.01


@dataclass(frozen=True)
class VersionComparison:
    """The version a run started from and the one it made, on the same queries.

    Attributes:
        questions: which: new validation, old validation, old test.
        asked, groups: how many, in so many independent groups.
        gain: of the new version over the old, query by query; below zero it is forgetting.
    """

    questions: str
    asked: int
    groups: int
    before: ResultRow
    after: ResultRow
    gain: Gain


@dataclass(frozen=True)
class Continued:
    """What a continued run leaves.

    Attributes:
        validation: what the gate looked at: the new queries first, then, where there is new data, the old ones.
        test: the final report on the old test queries, made after the gate had decided.
        refused: what the gate had against the new version; empty where nothing.
        alias: where the alias points now; None where none was to be moved.
        promoted: whether it points to the new version.
    """

    result: TuneResult
    start: AdapterRecord
    validation: tuple[VersionComparison, ...]
    test: VersionComparison
    refused: tuple[str, ...]
    alias: Alias | None
    promoted: bool
    promotion: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without the run itself."""
        return {
            "from": self.start.reference,
            "validation": [asdict(one) for one in self.validation],
            "test": asdict(self.test),
            "refused": list(self.refused),
            "promoted": self.promoted,
            "promotion": self.promotion,
        }


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A run that starts from an adapter pretrained on texts alone, before its first step.

    Attributes:
        recipe: the given one, its adapter shaped as the stored one is.
        task: the recipe's own, told where it comes from.
    """

    recipe: Recipe
    start: AdapterRecord
    task: AnyTask


def start_pretrained(recipe: Recipe, reference: str) -> Pretrained | None:
    """Return what `tuning.tune` needs to start a task from a pretrained adapter; None where it was not pretrained.

    What comes out is one adapter like any other: nothing is stacked on anything, and serving loads it alone.

    Args:
        reference: the stored adapter, in the recipe's store, of task masked: `fashion-text`, `fashion-text@v2`.
    Raises:
        PeftComboError: the adapter is not there or has another shape than the recipe's, or the data is not enough.
    """
    recipe.ready()
    record = AdapterStore(recipe.store).open(reference)
    if not only_encoder(record, recipe.task.kind):
        return None
    recipe = recipe_from(recipe, record)
    task: Any = build_task(recipe)  # each keeps `data` and `notes` as its own; the protocol only promises to show them
    task.data = {**task.data, "continued": {"from": record.reference, "digest": record.digest, "pretrained": True}}
    task.notes = [
        *task.notes,
        f"starts from {record.reference}, which read texts without labels, those of held-out items perhaps among them",
    ]
    return Pretrained(recipe, record, task)


@dataclass(frozen=True, eq=False)
class Continuation:
    """A continued run before its first step.

    Attributes:
        recipe: the given one, its adapter shaped as the stored one is.
        task: over both datasets: learns from the new bundles and the replayed old ones.
        queries: name -> rows of `dataset.bundles` that are asked: new validation, old validation, old test.
    """

    recipe: Recipe
    start: AdapterRecord
    task: BundleCompletion
    dataset: Dataset
    queries: Mapping[str, NDArray[np.int32]]


def continuation(recipe: Recipe, reference: str, *, new_data: Path | None = None, replay: float = 0.3) -> Continuation:
    """Read what a continued run will learn from, and refuse what cannot go on.

    Args:
        reference: the stored adapter, in the recipe's store: `fashion`, `fashion@v2`, `fashion@prod`.
        new_data: a folder of later data, joined with the recipe's own by ids (`data.joined`); None learns from the
            recipe's own data alone, and then nothing is replayed.
        replay: share of the training bundles that is drawn, once for the recipe's seed, from the old ones.
    Raises:
        PeftComboError: the adapter is not there or does not fit, or the data is not enough.
    Source: Rolnick et al. 2019, "Experience replay for continual learning": old examples are mixed with the new.
    """
    recipe.ready()
    config = recipe.task
    if not isinstance(config, BundleTask):
        raise TuningError(
            f"Expected a recipe of the bundle task to go on with --from, found {config.kind}. Tune it anew."
        )
    if not 0 <= replay < 1:
        raise TuningError(f"replay: expected a share from 0 and below 1, found {replay:g}.")
    record = AdapterStore(recipe.store).open(reference)
    recipe = recipe_from(recipe, record)
    old = open_dataset(recipe.data)
    parts = split_as(old, recipe.data)
    _refuse_other_split(record, recipe, old, parts)
    continued: dict[str, Any] = {"from": record.reference, "digest": record.digest}
    notes: list[str] = []
    if new_data is None:
        dataset, queries = old, {"new validation": parts.valid, "old test": parts.test}
    else:
        dataset, parts, queries, replayed = _join_new_data(recipe, old, parts, new_data, replay, notes)
        continued |= {"old_digest": old.digest, "replay": replay, "replayed": replayed}
    task = BundleCompletion(recipe, config, (dataset, parts))
    task.notes = [*task.notes, *notes]
    task.data = {**task.data, "continued": continued}
    return Continuation(recipe, record, task, dataset, queries)


def _refuse_other_split(record: AdapterRecord, recipe: Recipe, old: Dataset, parts: Split) -> None:
    """Refuse an adapter that may have learned from what is held out here: no comparison with it would be fair."""
    same_data = record.manifest.data.digest == old.digest
    then = record.manifest.recipe.get("data")
    rule = ("split", "valid_fraction", "test_fraction", "split_seed")
    now = recipe.data.model_dump(mode="json")
    grown = isinstance(then, dict) and recipe.data.split != "time" and all(then.get(key) == now[key] for key in rule)
    elsewhere = isinstance(then, dict) and any(then.get(key) != now[key] for key in ("source", "path"))
    if not (grown or (elsewhere and not same_data)) and (problem := split_problem(record.manifest, parts, recipe.data)):
        raise DataError(problem)


def _join_new_data(
    recipe: Recipe, old: Dataset, parts: Split, new_data: Path, replay: float, notes: list[str]
) -> tuple[Dataset, Split, dict[str, NDArray[np.int32]], int]:
    """Join old and new data; return it with what is learned from and what is asked, and how many are replayed."""
    later = open_dataset(recipe.data.model_copy(update={"source": "folder", "path": str(new_data)}))
    dataset, known = join_datasets(old, later)
    bundles = dataset.bundles
    fresh = np.arange(known, len(bundles), dtype=np.int32)
    if not len(fresh):
        raise DataError(f"Expected new bundles in {new_data}, found none whose id is not known already.")
    alone = Dataset.build(later.name, dataset.catalog, None, bundles.take(fresh))
    new = split_as(alone, recipe.data)
    sets = [frozenset(rows.tolist()) for rows in bundles.items]

    def sets_of(*rows: NDArray[np.int32]) -> set[frozenset[int]]:
        return {sets[row] for part in rows for row in part.tolist()}

    learned, held_out = sets_of(parts.train), sets_of(parts.valid, parts.test)
    train = np.array([row for row in fresh[new.train].tolist() if sets[row] not in held_out], np.int32)
    valid, test = (
        np.array([row for row in fresh[part].tolist() if sets[row] not in learned], np.int32)
        for part in (new.valid, new.test)
    )
    if not len(train) or not len(valid):
        raise DataError(
            f"{new_data}: {len(fresh):,} new bundles leave {len(train):,} to learn from and {len(valid):,} to validate "
            "on; at least one of each is needed. Wait for more of them."
        )
    wanted = round(replay / (1 - replay) * len(train))
    drawn = np.random.default_rng(recipe.seed).permutation(len(parts.train))[:wanted]
    replayed = np.sort(parts.train[drawn])
    notes.append(
        f"{len(train):,} new bundles and {len(replayed):,} of {len(parts.train):,} old ones are learned from "
        f"({len(replayed) / (len(train) + len(replayed)):.0%} replayed)"
    )
    digest = hashlib.sha256(f"peft-combo continued split 1\n{parts.digest}\n{new.digest}\n{replay!r}\n".encode())
    digest.update("\n".join(bundles.bundle_ids[row] for row in replayed).encode("utf-8", "surrogatepass"))
    whole = Split(
        train=np.sort(np.concatenate([train, replayed])), valid=np.concatenate([parts.valid, valid]),
        test=np.concatenate([parts.test, test]), dropped=np.empty(0, np.int32),
        train_interactions=np.empty(0, np.int64), digest=digest.hexdigest(),
    )  # fmt: skip
    queries = {"new validation": valid, "old validation": parts.valid, "old test": parts.test}
    return dataset, whole, queries, len(replayed)


def continue_tuning(
    recipe: Recipe,
    reference: str,
    *,
    new_data: Path | None = None,
    replay: float = 0.3,
    promote: str | None = None,
    gate: Gate | None = None,
    resume: bool = False,
    run_folder: Path | None = None,
    callback: RunCallback | None = None,
) -> Continued:
    """Go on tuning a stored adapter, compare the two versions, and move an alias to the new one if it wins.

    The new version is stored either way. The old test queries are asked once, at the end, for the report alone.

    Args:
        reference: the adapter to go on from, see `continuation`.
        new_data: a folder of new bundles.
        replay: the share of old bundles that are shown again.
        promote: an alias of the recipe's category, such as `prod`. Where it exists it has to point to the version
            started from, since that is what the new one is compared with.
        gate: what it takes to move the alias.
    Raises:
        PeftComboError: as `continuation` and `tuning.tune`.
    """
    callback = callback or RunCallback()
    gate = gate or Gate()
    store = AdapterStore(recipe.store)
    run = continuation(recipe, reference, new_data=new_data, replay=replay)
    if promote is not None:
        check_alias(promote)
        if problem := _find_mismatch(store, run.recipe.category, promote, run.start):
            raise StoreError(f"{problem} Start from it: --from {run.recipe.category}@{promote}")
    result = tune(run.recipe, resume=resume, run_folder=run_folder, callback=callback, task=run.task, start=run.start)

    callback.on_note(f"Comparing {result.record.reference} with {run.start.reference} ...")
    backbone = Backbone.of(run.recipe.backbone)
    bank = AdapterBank(backbone, store)
    pair = [bank.get(record.reference) for record in (run.start, result.record)]
    vectors = [backbone.encode(run.task.texts, live.attached) for live in pair]
    compared = partial(_compare_versions, run, pair, vectors)
    validation = tuple(compared(name) for name in run.queries if name != "old test")
    refused = find_refusals(validation, gate)
    alias, promoted, told = None, False, "No alias was to be moved."
    if promote is not None and os.environ.get("RANK", "0") == "0":
        alias, promoted, told = _promote(store, run.start, result.record, promote, refused)
    return Continued(result, run.start, validation, compared("old test"), refused, alias, promoted, told)


def find_refusals(validation: tuple[VersionComparison, ...], gate: Gate) -> tuple[str, ...]:
    """Return what speaks against the new version, each with its figure; nothing where it wins."""
    against = []
    for one in validation:
        gain = one.gain
        if one.questions == "new validation":
            if not gain.value > gate.gain:
                against.append(
                    f"on {one.questions} it gains {gain.value:+.4f} NDCG@10, and more than {gate.gain:+g} is asked"
                )
            if not gain.p < gate.p:
                against.append(f"on {one.questions} the gain has p = {gain.p:.4f}, and less than {gate.p:g} is asked")
        elif gain.value < -gate.forgetting:
            against.append(
                f"on {one.questions} it forgets {-gain.value:.4f} NDCG@10, and at most {gate.forgetting:g} is allowed"
            )
    return tuple(against)


def _find_mismatch(store: AdapterStore, category: str, alias: str, start: AdapterRecord) -> str:
    """Say why a win over `start` is none over what the alias points to; empty where it is one, or there is no alias."""
    pointing = next((one for one in store.aliases(category) if one.name == alias), None)
    if pointing is None or pointing.target == start.reference:
        return ""
    return (
        f"{pointing.reference} points to v{pointing.version}, and the run starts from {start.reference}: better than "
        "that says nothing of what is in use."
    )


def _promote(
    store: AdapterStore, start: AdapterRecord, made: AdapterRecord, name: str, refused: tuple[str, ...]
) -> tuple[Alias | None, bool, str]:
    """Move the alias if nothing speaks against it; return it, whether it moved, and what happened in words."""
    reference = f"{made.category}@{name}"
    against = list(refused)
    if problem := _find_mismatch(store, made.category, name, start):  # somebody moved it while this run was under way
        against.append(problem)
    if not against:
        return store.alias(made.reference, name), True, f"Promoted: {reference} points to v{made.version} now."
    alias = next((one for one in store.aliases(made.category) if one.name == name), None)
    stays = f"still points to v{alias.version}" if alias is not None else "was not made"
    return alias, False, f"Not promoted: {reference} {stays}, since {'; '.join(against)}. {made.reference} is stored."


def _compare_versions(
    run: Continuation, pair: list[LiveAdapter], vectors: list[NDArray[np.float32]], name: str
) -> VersionComparison:
    questions = Queries.of(run.dataset.bundles, run.queries[name])
    ndcg, rows = [], []
    for live, encoded in zip(pair, vectors, strict=True):
        assert isinstance(live.head, BundleHead)  # `load_start` has refused any other
        ranks = rank_targets(live.head, encoded, questions)
        ndcg.append(metrics.per_query(ranks, METRIC))
        rows.append(build_completion_row(live.reference, ranks, questions.groups))
    before, after = ndcg
    gain = Gain.between(before, after, questions.groups)
    return VersionComparison(name, len(questions), len(set(questions.groups.tolist())), rows[0], rows[1], gain)
