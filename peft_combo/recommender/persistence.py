"""Persistence of a fitted recommender: a JSON manifest, scorer states as safetensors, digests of data and adapters.

Owns the folder and the checks that it is read for the data and adapters it was made of. Item vectors stay in the vector
cache, adapters in their store, items and bundles in the data; a folder names all of them by digest.

    fitted/
      recommender.json      everything but arrays; written last
      scorer-0.safetensors  what a scorer learned
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from peft_combo.data.model import Dataset
from peft_combo.data.splits import Split
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.vectors import VectorCache
from peft_combo.errors import DataError
from peft_combo.files import stage_folder
from peft_combo.recommender.category_calibration import Calibration
from peft_combo.recommender.composing.options import ModeWeights, ObjectiveWeights
from peft_combo.recommender.fit_data import encode_catalog
from peft_combo.recommender.fit_state import FitState
from peft_combo.recommender.fitted_scorers import (
    Fitted,
    FittedCategories,
    FittedHead,
    FittedScorer,
    build_ensemble,
    build_next_basket,
    build_past,
    build_rating,
)
from peft_combo.recommender.fusion import Fusion
from peft_combo.recommender.recommender import BundleRecommender
from peft_combo.recommender.scorer_id import Kind, ScorerId
from peft_combo.recommender.text_ranking import TextRanker
from peft_combo.recommender.text_search import FROZEN_TITLE, TextSearch, VectorView, build_views
from peft_combo.recommender.user_habits import UserHabits
from peft_combo.scoring import Scorer, load_scorer

FORMAT = 4
# Format 2 knew of no text search: a query was compared with titles by the frozen encoder alone. Up to format 3 one set
# of weights served all kinds of request, without agreement.
_READ = (2, 3, FORMAT)
_MANIFEST = "recommender.json"
_MANIFEST_LIMIT = 16 * 2**20


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _ScorerFile(_Stored):
    """Attributes:
    parameters: the second half of `Scorer.state`.
    """

    file: str = Field(pattern=r"\Ascorer-[0-9]{1,3}\.safetensors\z")
    sha256: str
    parameters: dict[str, JsonValue]


class _RecommenderManifest(_Stored):
    format: int
    data: str
    split: str
    backbone: str
    text: str
    adapters: dict[str, str]
    settings: dict[str, str]
    fusion: dict[str, JsonValue]
    calibration: dict[str, JsonValue] | None
    text_side: str
    weights: dict[str, float] | dict[str, dict[str, float]]
    search: dict[str, float] | None = None
    weighed_past: bool
    scorers: dict[str, _ScorerFile]
    notes: tuple[str, ...]
    habits: tuple[str, float] | None = None  # setting and weight


def save_recommender(recommender: BundleRecommender, folder: str | Path) -> None:
    """Write a fitted recommender; a folder that is there already is replaced by the whole new one.

    Raises:
        DataError: the folder cannot be written, or holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / _MANIFEST).is_file():
        raise DataError(f"{folder} is there and holds no recommender. Name another folder.")
    try:
        with stage_folder(folder, replace=True) as staged:
            files: dict[str, _ScorerFile] = {}
            for scorer, fitted in recommender.state.serving.items():
                if isinstance(fitted, FittedScorer | TextRanker):
                    arrays, parameters = (fitted.scorer if isinstance(fitted, FittedScorer) else fitted).state()
                    path = staged.path / f"scorer-{len(files)}.safetensors"
                    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, path)
                    files[str(scorer)] = _ScorerFile(file=path.name, sha256=_sha256(path), parameters=parameters)
            content = _build_manifest(recommender, files).model_dump(mode="json")
            staged.manifest = (_MANIFEST, json.dumps(content, indent=1).encode() + b"\n")
    except OSError as error:
        raise DataError(f"The recommender cannot be written to {folder}: {error.strerror or error}.") from error


def _build_manifest(recommender: BundleRecommender, files: dict[str, _ScorerFile]) -> _RecommenderManifest:
    state = recommender.state
    calibrations = [
        one.calibration.state()
        for one in (*state.serving.values(), state.text_side)
        if isinstance(one, FittedCategories)
    ]
    return _RecommenderManifest(
        format=FORMAT, data=recommender.dataset.digest, split=state.split_digest,
        backbone=recommender.bank.backbone.fingerprint, text=recommender.dataset.text_template,
        adapters={one.reference: one.digest for one in state.adapters},
        settings={str(scorer): setting for scorer, setting in state.settings.items()},
        fusion=state.fusion.state(), calibration=calibrations[0] if calibrations else None,
        text_side=str(state.text_scorer or ""), weights=asdict(state.weights), search=dict(state.search.weights),
        weighed_past=state.neighbours is None, scorers=files, notes=state.notes,
        habits=None if state.habits is None else (state.habits.setting, state.habits.weight),
    )  # fmt: skip


def load_recommender(
    folder: str | Path,
    dataset: Dataset,
    bank: AdapterBank,
    *,
    cache: VectorCache | None = None,
    progress: Callable[[int], None] | None = None,
) -> BundleRecommender:
    """Read a recommender that `save_recommender` wrote; its answers are those of the one that was saved.

    Raises:
        DataError: there is none, it is damaged, or it was fitted on other data, adapters or another backbone.
        StoreError: an adapter cannot be had.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if manifest.data != dataset.digest:
        raise _make_mismatch(folder, "data", manifest.data, dataset.digest)
    if manifest.backbone != bank.backbone.fingerprint:
        raise _make_mismatch(folder, "a backbone", manifest.backbone, bank.backbone.fingerprint)
    for reference, digest in manifest.adapters.items():
        found = bank.get(reference).digest
        if found != digest:
            raise _make_mismatch(folder, f"an adapter {reference}", digest, found)
    try:
        return BundleRecommender(dataset, bank, _rebuild(folder, manifest, dataset, bank, cache, progress))
    except (KeyError, ValueError, TypeError, OSError, SafetensorError) as error:
        raise _make_damaged(folder, str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def load_or_fit(
    folder: Path,
    dataset: Dataset,
    parts: Split,
    bank: AdapterBank,
    adapters: Sequence[str],
    *,
    seed: int = 0,
    cache: VectorCache | None = None,
    progress: Callable[[int], None] | None = None,
    done: Callable[[str], None] | None = None,
) -> BundleRecommender:
    """Return a recommender of these data and adapters: the one kept in `folder`, or a new one that is then kept.

    Args:
        folder: holds any number of recommenders, each under a name made of what it was fitted on.
    Raises:
        PeftComboError: see `BundleRecommender.fit`; the folder cannot be written.
    """
    digests = [bank.get(reference).digest for reference in adapters]
    key = [FORMAT, dataset.digest, parts.digest, bank.backbone.fingerprint, dataset.text_template, seed, digests]
    own = folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    if (own / _MANIFEST).is_file():
        with suppress(DataError):  # damaged: fit it anew
            return load_recommender(own, dataset, bank, cache=cache, progress=progress)
    made = BundleRecommender.fit(dataset, parts, bank, adapters, seed=seed, cache=cache, progress=progress, done=done)
    save_recommender(made, own)
    return made


def _read_manifest(folder: Path) -> _RecommenderManifest:
    path = folder / _MANIFEST
    try:
        with path.open("rb") as file:
            content = file.read(_MANIFEST_LIMIT + 1)
    except OSError as error:
        raise DataError(f"No recommender in {folder}: {error.strerror or error}.") from error
    if len(content) > _MANIFEST_LIMIT:
        raise _make_damaged(folder, f"{_MANIFEST} is larger than {_MANIFEST_LIMIT // 2**20} MiB")
    try:
        values = json.loads(content)
        found = values.get("format") if isinstance(values, dict) else None
        if found not in _READ:
            raise DataError(f"The recommender in {folder} has format {found}, expected {FORMAT}. Fit it anew.")
        return _RecommenderManifest.model_validate(values)
    except (ValueError, ValidationError, RecursionError) as error:
        raise _make_damaged(folder, str(error).splitlines()[0]) from error


def _parse_label(label: str) -> ScorerId:
    """Return the scorer that a stored label names, as `ScorerId.__str__` wrote it.

    The one place where a label is read, and for stored files only: the format tells scorers by their labels.

    Raises:
        ValueError: no scorer is called so.
    """
    kinds: tuple[Kind, ...] = get_args(Kind)
    for kind in kinds:
        if label == kind:
            return ScorerId(kind)
    for kind in kinds:
        if kind in ("tuned BERT", "rated") and label.startswith(f"{kind} "):
            return ScorerId(kind, label.removeprefix(f"{kind} "))
    raise ValueError(f"no scorer is called {label!r}")


def _rebuild(
    folder: Path, manifest: _RecommenderManifest, dataset: Dataset, bank: AdapterBank, cache: VectorCache | None,
    progress: Callable[[int], None] | None,
) -> FitState:  # fmt: skip
    dataset = replace(dataset, text_template=manifest.text)  # its scorers read texts as they did when fitted
    side = encode_catalog(dataset, bank, tuple(manifest.adapters), cache, progress)
    known = side.gather(dataset)
    heads = {name: FittedHead.of(vectors, head) for name, (vectors, head) in side.tuned.items()}
    settings = {_parse_label(label): setting for label, setting in manifest.settings.items()}
    files = {_parse_label(label): file for label, file in manifest.scorers.items()}

    def rebuild_scorer(scorer: ScorerId) -> Fitted:
        match scorer:
            case ScorerId("tuned BERT", str(adapter)):
                return heads[adapter]
            case ScorerId("tuned by category"):
                if side.coverage is None or manifest.calibration is None:
                    raise ValueError(f"{scorer} needs adapters of categories and their calibration")
                return FittedCategories(heads, side.coverage, Calibration.from_state(manifest.calibration))
            case ScorerId("ensemble"):
                return build_ensemble(known, settings[scorer])
            case ScorerId("rated", str(adapter)):
                return build_rating(known, adapter, settings[scorer])
            case ScorerId("text ranker"):
                return TextRanker.from_state(known.text_views, *_read_state(folder, files[scorer]))
            case ScorerId("next basket"):
                return build_next_basket(known, settings[scorer])
            case ScorerId("bought before" | "users alike"):
                return build_past(known, neighbours=scorer.kind == "users alike", setting=settings[scorer])
            case _:
                return FittedScorer(_load_scorer(folder, files[scorer], len(dataset.catalog)))

    fusion = Fusion.from_state(manifest.fusion, _parse_label)
    serving = {scorer: rebuild_scorer(scorer) for scorer in fusion.needs}
    text_scorer = _parse_label(manifest.text_side) if manifest.text_side else None
    text_side: Fitted = FittedHead.of_frozen(side.frozen)
    if text_scorer is not None:
        text_side = serving[text_scorer] if text_scorer in serving else rebuild_scorer(text_scorer)
    neighbours = None if manifest.weighed_past or not known.user_rows else build_past(known, neighbours=True)
    if manifest.search is None:
        search = TextSearch.of({FROZEN_TITLE: VectorView(side.frozen, lambda texts: bank.encode(list(texts), None))})
    else:
        tuned = {name: own for name, (own, _) in side.tuned.items()}
        search = TextSearch.of(build_views(dataset, bank, side.frozen, side.described, tuned), manifest.search)
    return FitState(
        side.live, known, fusion, settings, serving, text_scorer, text_side, neighbours,
        _parse_weights(manifest.weights), search.with_indexes(), manifest.split, manifest.notes,
        None if manifest.habits is None else UserHabits.of(known, *manifest.habits),
    )  # fmt: skip


def _parse_weights(stored: Mapping[str, float | Mapping[str, float]]) -> ModeWeights:
    """Return stored weights, by kind of request or, as up to format 3, one set for all."""
    kinds = {kind: own for kind, own in stored.items() if isinstance(own, Mapping)}
    if kinds:
        return ModeWeights(**{kind: ObjectiveWeights(**own) for kind, own in kinds.items()})
    own = {name: value for name, value in stored.items() if not isinstance(value, Mapping)}
    return ModeWeights(*(ObjectiveWeights(**{"agreement": 0.0, **own}) for _ in fields(ModeWeights)))


def _load_scorer(folder: Path, stored: _ScorerFile, n_items: int) -> Scorer:
    scorer = load_scorer(*_read_state(folder, stored))
    if len(scorer.support) != n_items:
        raise ValueError(f"{stored.file} knows {len(scorer.support)} items, the catalogue has {n_items}")
    return scorer


def _read_state(folder: Path, stored: _ScorerFile) -> tuple[dict[str, NDArray[Any]], dict[str, JsonValue]]:
    """Return arrays and parameters as they were written."""
    path = folder / stored.file
    if path.is_symlink() or _sha256(path) != stored.sha256:
        raise ValueError(f"{stored.file} was altered since it was written")
    return load_file(path), stored.parameters


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_mismatch(folder: Path, what: str, then: str, now: str) -> DataError:
    return DataError(
        f"The recommender in {folder} was fitted on {what} with digest {then[:12]}, found {now[:12]}. Fit it anew."
    )


def _make_damaged(folder: Path, reason: str) -> DataError:
    return DataError(f"The recommender in {folder} is damaged: {reason}. Delete the folder and fit it anew.")
