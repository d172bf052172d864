"""Fleet of adapters: one for each category of a catalogue that has bundles enough, by any executor; the others lean on
their parent's.

Owns which categories there are, which of them are tuned, and what was tuned already: the store says that, so a fleet
that was stopped, or is asked for again, runs what is missing and nothing else. How an adapter is tuned is `loop`'s.

A category falls back to the adapter of the nearest category above it that has one, in the end to that of the whole
catalogue, which is always tuned: where its bundles are fewer than a bound, and where its own adapter does not complete
its own validation bundles better than that one does.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from peft_combo import metrics
from peft_combo.data.model import CATEGORY_SEPARATOR, Catalog, Dataset
from peft_combo.data.sources import open_dataset
from peft_combo.distributed import Executor, LostShare
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads.completion import CompletionHead
from peft_combo.errors import PeftComboError, RecipeError
from peft_combo.files import literal_path
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.parse import parse_recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.versions import AdapterRecord
from peft_combo.tuning.loop import Interrupted, tune
from peft_combo.tuning.tasks import build_task

FEWEST_BUNDLES = 100
"""Bundles below which a category falls back to its parent's adapter, unless told: a fifth to a third of them are held
out, and what is left would be learned by heart."""

_LONGEST_NAME = 64

Status = Literal["waiting", "tuned", "kept", "falls back", "failed"]


@dataclass(frozen=True)
class Member:
    """One category of a fleet, and what became of it.

    Attributes:
        path: of the category; () is the whole catalogue. items, bundles: that it has.
        name: of its adapter in the store. parent: name of the adapter it falls back to; None for the whole catalogue.
        adapter: the version that serves it, once it is known: its own or its parent's.
        figures: ``before``, ``after``, ``gain``, ``low``, ``high``, ``p`` of `metric` on validation, of the
            adapter that was tuned for it; None where there is none.
        reason: why it falls back or failed, or why it could not be compared with its parent.
    """

    path: tuple[str, ...]
    items: int
    bundles: int
    name: str
    parent: str | None
    status: Status = "waiting"
    adapter: str | None = None
    metric: str = ""
    figures: Mapping[str, float] | None = None
    seconds: float = 0.0
    reason: str = ""

    @property
    def told(self) -> str:
        """The category in words."""
        return CATEGORY_SEPARATOR.join(self.path) or "all"


def plan_fleet(recipe: Recipe, least: int = FEWEST_BUNDLES, depth: int | None = None) -> list[Member]:
    """List the categories of a recipe's catalogue, parents first; those with too few bundles fall back.

    Args:
        least: bundles a category must have for an adapter of its own.
        depth: levels of the category path that count; None takes the first that divides the catalogue.
    Raises:
        DataError: the data cannot be read. RecipeError: there are no categories to divide by, or it is no recipe for
            bundles.
    """
    if recipe.task.kind not in ("bundle", "sequence"):
        raise RecipeError(
            f'A fleet is of recipes for bundles, and recipe "{recipe.name}" has task.kind {recipe.task.kind}. Take one '
            "for bundles, such as lora-fashion, or tune the categories one by one with data.category_filter."
        )
    dataset = open_dataset(recipe.data)
    catalog = dataset.catalog
    levels = _choose_levels(catalog, recipe, depth)
    whole = Member((), len(catalog), len(dataset.bundles), recipe.category, None)
    members = [whole]
    names: dict[tuple[str, ...], str] = {(): recipe.category}
    own: dict[tuple[str, ...], str] = {(): recipe.category}  # those that are tuned
    for level in levels:
        for path in sorted({path[:level] for path in catalog.categories if len(path) >= level}):
            parent = next(own[path[:short]] for short in range(level - 1, -1, -1) if path[:short] in own)
            items, bundles = _count(dataset, path)
            names[path] = _name(recipe.category, path[levels[0] - 1 :], set(names.values()))
            member = Member(path, items, bundles, names[path], parent)
            if bundles < least:
                few = f"{bundles:,} bundle{'s' if bundles != 1 else ''}, fewer than {least:,}"
                member = replace(member, status="falls back", reason=few)
            else:
                own[path] = member.name
            members.append(member)
    return members


def tune_fleet(
    recipe: Recipe, members: Sequence[Member], executor: Executor, folder: Path, on_member: Callable[[Member], None]
) -> list[Member]:
    """Tune the members that do not fall back, and return all with what became of them.

    Args:
        members: of `plan_fleet`.
        executor: who tunes; its workers need the store, the data and the encoder under the same paths.
        folder: of checkpoints, so that a run whose worker died goes on.
        on_member: told of each as soon as it is done.
    Raises:
        PeftComboError: no worker could be started.
    """
    jobs = [member for member in members if member.status == "waiting"]
    recipes = [_narrow(recipe, member).model_dump(mode="json") for member in jobs]
    shares = [
        {"recipe": own, "folder": str(folder.absolute() / member.name)}
        for own, member in zip(recipes, jobs, strict=True)
    ]
    done: dict[str, Member] = {}
    for number, answer in executor.map_shares(tune_share, shares):
        member = _close(jobs[number], answer)
        done[member.name] = member
        if member.status != "failed":
            on_member(member)
    compared: list[dict[str, Any]] = [
        {"recipe": own, "adapters": rivals}
        for own, member in zip(recipes, jobs, strict=True)
        if done[member.name].adapter and len(rivals := list(_list_own(member.name, done, members))) > 1
    ]
    values: dict[tuple[str, str], float | str] = {}  # per category and adapter, or why it is not known
    for number, answer in executor.map_shares(measure_share, compared):
        share = compared[number]
        found: Mapping[str, Any] = {"failed": answer.reason} if isinstance(answer, LostShare) else answer
        for reference in share["adapters"]:
            values[share["recipe"]["category"], reference] = found.get("failed") or found[reference]
    settled: dict[str, Member] = {}
    for member in members:  # parents first, so what serves a parent is known
        own = done.get(member.name, member)
        above = None if member.parent is None else settled[member.parent].adapter
        settled[member.name] = _settle(own, above, values)
        if settled[member.name] is not own:
            on_member(settled[member.name])
    return list(settled.values())


def tune_share(share: Mapping[str, Any]) -> dict[str, Any]:
    """Tune one category's adapter, in the process of a worker, unless the store has it; go on from a checkpoint.

    Args:
        share: ``recipe``, as JSON values, and ``folder``, of its checkpoints.
    Returns:
        what `Member` says, as JSON values; ``failed`` with the reason where a user can put it right.
    """
    started = time.perf_counter()
    try:
        recipe = parse_recipe(dict(share["recipe"]))
        task = build_task(recipe)
        record = _find_tuned(recipe, task.data)
        kept = record is not None
        if record is None:
            # Another recipe or other data have other checkpoints.
            told = json.dumps([recipe.digest(), task.data["digest"], task.data["split_digest"]])
            folder = Path(share["folder"]) / hashlib.sha256(told.encode()).hexdigest()[:8]
            record = tune(recipe, resume=True, run_folder=folder, task=task).record
    except Interrupted:
        raise
    except PeftComboError as error:
        return {"failed": str(error)}
    return _describe(record) | {"kept": kept, "seconds": time.perf_counter() - started}


def measure_share(share: Mapping[str, Any]) -> dict[str, Any]:
    """Measure adapters on the validation queries of one category: NDCG@10 by reference.

    Args:
        share: ``recipe`` of the category, as JSON values, and ``adapters``, references of its store.
    Returns:
        ``failed`` with the reason where a user can put it right.
    """
    try:
        recipe = parse_recipe(dict(share["recipe"]))
        task: Any = build_task(recipe)
        bank = AdapterBank(Backbone.of(recipe.backbone), AdapterStore(recipe.store))
        found = {}
        for reference in share["adapters"]:
            vectors = bank.encode(task.texts, reference)
            ranks = task.predict(bank.get(reference).head_as(CompletionHead), lambda _, own=vectors: own)
            found[reference] = float(metrics.per_query(ranks, "ndcg@10").mean())
    except PeftComboError as error:
        return {"failed": str(error)}
    return found


# --- planning ---------------------------------------------------------------------------------------------------------


def _choose_levels(catalog: Catalog, recipe: Recipe, depth: int | None) -> range:
    """Return the levels that get adapters: from the first that divides the catalogue to the last that counts."""
    deepest = max(map(len, catalog.categories), default=0)
    widths = [len({path[:level] for path in catalog.categories if len(path) >= level}) for level in range(deepest + 1)]
    first = next((level for level, width in enumerate(widths) if width > 1), None)
    if first is None:
        raise RecipeError(
            f'The items of recipe "{recipe.name}" have no categories to divide them by. Give items.csv a column '
            'category, with levels as in "Clothing > Women", or tune one adapter: leave --each-category away.'
        )
    if depth is not None and not first <= depth <= deepest:
        raise RecipeError(
            f"--depth: expected {first} to {deepest}, the levels that divide the catalogue, found {depth}."
        )
    return range(first, (first if depth is None else depth) + 1)


def _count(dataset: Dataset, path: tuple[str, ...]) -> tuple[int, int]:
    """Return the items under a category, and the bundles that keep two of them or more."""
    under = np.array([own[: len(path)] == path for own in dataset.catalog.categories])
    return int(under.sum()), sum(int(under[items].sum()) >= 2 for items in dataset.bundles.items)


def _name(category: str, path: Sequence[str], taken: set[str]) -> str:
    """Return the name of a category's adapter: ``fashion-clothing-women``; with a digest where that would not do."""
    plain = unicodedata.normalize("NFKD", " ".join(path)).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    name = f"{category}-{words}"
    if not words or len(name) > _LONGEST_NAME or name in taken:
        digest = hashlib.sha256(CATEGORY_SEPARATOR.join(path).encode()).hexdigest()[:8]
        name = f"{name[: _LONGEST_NAME - 9].rstrip('-')}-{digest}"
    return name


# --- what came of it --------------------------------------------------------------------------------------------------


def _with_path(recipe: Recipe) -> Any:
    """Return the recipe's data with a path that holds in any working folder."""
    return recipe.data.model_copy(update={"path": str(literal_path(str(recipe.data.path)).absolute())})


def _with_folder(recipe: Recipe) -> Any:
    """Return the recipe's backbone; one in a folder by its whole path."""
    folder = literal_path(recipe.backbone.model)
    return recipe.backbone.model_copy(update={"model": str(folder.absolute())}) if folder.is_dir() else recipe.backbone


def _find_tuned(recipe: Recipe, data: Mapping[str, Any]) -> AdapterRecord | None:
    """Return the newest version that was tuned by this recipe on this data; None where there is none."""
    store, wanted = AdapterStore(recipe.store), recipe.model_dump(mode="json")
    records = [record for record in store.list() if record.category == recipe.category]
    for record in sorted(records, key=lambda record: record.version, reverse=True):
        stamp = record.manifest.data
        same = (stamp.digest, stamp.split_digest) == (data["digest"], data["split_digest"])
        if same and record.manifest.recipe == wanted:
            return record
    return None


def _describe(record: AdapterRecord) -> dict[str, Any]:
    """Return an adapter and what it is worth, as its manifest says."""
    told: Any = record.manifest.metrics
    metric = next(name for name, value in told["after"].items() if isinstance(value, Mapping))
    figures = {when: told[when][metric]["value"] for when in ("before", "after")}
    gain = told["gain"]
    figures |= {"gain": gain["value"], **{name: gain[name] for name in ("low", "high", "p")}}
    return {"adapter": record.reference, "metric": metric, "figures": figures}


def _close(member: Member, answer: Any) -> Member:
    if isinstance(answer, LostShare):
        return replace(member, status="failed", reason=answer.reason)
    if "failed" in answer:
        return replace(member, status="failed", reason=answer["failed"])
    return replace(
        member, status="kept" if answer["kept"] else "tuned", adapter=answer["adapter"], metric=answer["metric"],
        figures=answer["figures"], seconds=answer["seconds"],
    )  # fmt: skip


def _settle(own: Member, above: str | None, values: Mapping[tuple[str, str], float | str]) -> Member:
    """Give a member that has no adapter of its own, or one that is no better, what serves its parent; else leave it."""
    if own.adapter is None:
        return replace(own, adapter=above)
    mine, other = values.get((own.name, own.adapter)), values.get((own.name, str(above)))
    if isinstance(mine, str):
        return replace(own, reason=f"not compared with its parent: {mine}")
    if not isinstance(mine, float) or not isinstance(other, float) or mine > other:
        return own
    reason = f"{own.adapter} is no better on its validation bundles, NDCG@10 {mine:.3f} against {other:.3f}"
    return replace(own, status="falls back", adapter=above, reason=reason)


def _list_own(name: str, done: Mapping[str, Member], members: Sequence[Member]) -> Iterator[str]:
    """List the adapters that were tuned for a category and for those above it, nearest first."""
    parents = {one.name: one.parent for one in members}
    above: str | None = name
    while above is not None:
        if (found := done.get(above)) is not None and found.adapter is not None:
            yield found.adapter
        above = parents[above]


def _narrow(recipe: Recipe, member: Member) -> Recipe:
    """Return the recipe of one category, with paths that hold in any working folder."""
    data = recipe.data if recipe.data.path is None else _with_path(recipe)
    if member.path:
        data = data.model_copy(update={"category_filter": CATEGORY_SEPARATOR.join(member.path)})
    store = str(Path(recipe.store).absolute())
    return recipe.model_copy(
        update={"category": member.name, "store": store, "data": data, "backbone": _with_folder(recipe)}
    )
