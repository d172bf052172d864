"""Hyperparameter search: Optuna proposes values of recipe keys, `tuning` runs them, the worse are pruned.

Owns the space, the trials and the study file, which is Optuna's own journal: JSON lines that its dashboard reads too.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, assert_never

from peft_combo.callbacks import RunCallback
from peft_combo.distributed import Executor, LostShare
from peft_combo.errors import PeftComboError, RecipeError
from peft_combo.evaluation.comparison.variants import Over, over_of
from peft_combo.files import literal_path
from peft_combo.recipe.files import load_recipe
from peft_combo.recipe.model import Recipe
from peft_combo.tuning.loop import Interrupted, tune
from peft_combo.tuning.tasks import build_task

# Of the trials that reach a rung (1, 3, 9 ... evaluations) the best third goes on. Li et al. 2020, ASHA.
_KEPT_SHARE = 3
# Importances from fewer complete trials are noise.
_ENOUGH_TO_WEIGH = 5


@dataclass(frozen=True)
class Span:
    """A key and the numbers between two ends, both included."""

    key: str
    low: float
    high: float
    log: bool
    whole: bool


Axis: TypeAlias = Span | Over
"""A key with a span of numbers, or with values to choose from."""


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    Attributes:
        settings: as `--set` takes them. value: of the metric on validation; of a pruned trial, when it was cut off.
        evaluations: how often it was measured. reason: why it failed.
    """

    number: int
    settings: tuple[str, ...]
    state: Literal["complete", "pruned", "failed"]
    value: float | None
    evaluations: int
    seconds: float
    reason: str


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        trials: in the order they were run, those of earlier calls included. best: None where none was completed.
        recipe: the best trial's. importance: by key, shares of one; empty where it cannot be said.
    """

    metric: str
    trials: tuple[Trial, ...]
    best: Trial | None
    recipe: Recipe | None = field(repr=False)
    importance: Mapping[str, float]
    study: Path

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "metric": self.metric,
            "trials": [asdict(trial) for trial in self.trials],
            "best": None if self.best is None else self.best.number,
            "recipe": None if self.recipe is None else self.recipe.model_dump(mode="json"),
            "importance": dict(self.importance),
            "study": str(self.study),
        }


def axis_of(text: str) -> Axis:
    """Read ``adapter.rank=4,8,16``, ``adapter.top_layers=1..3`` or ``training.learning_rate=1e-4..1e-2:log``.

    Raises:
        RecipeError: it is none of them.
    """
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    found = re.fullmatch(rf"\s*([\w.@+-]+?)\s*=\s*({number})\.\.({number})(:log)?\s*", text)
    if found is None:
        if ".." in text:
            raise RecipeError(f"--over {text}: expected KEY=LOW..HIGH or KEY=LOW..HIGH:log, as in adapter.rank=4..16.")
        return over_of(text)
    key, low, high, log = found.groups()
    span = Span(key, float(low), float(high), log is not None, all(re.fullmatch(r"[-+]?\d+", n) for n in (low, high)))
    if span.low >= span.high or (span.log and span.low <= 0):
        raise RecipeError(
            f"--over {text}: expected a span that grows{', from above 0 where it is logarithmic' if log else ''}."
        )
    return span


class _Pruned(Exception):
    """The trial has fallen behind."""


class _Reporter(RunCallback):
    """Hands validation values to the trial, and ends the run that falls behind."""

    def __init__(self, trial: Any, metric: str, inner: RunCallback) -> None:
        self._trial, self._metric, self._inner = trial, metric, inner
        self.evaluations = 0
        self.last = -math.inf
        self.kept: float | None = None

    def on_stage(self, name: str, total: int) -> None:
        self._inner.on_stage(f"Trial {self._trial.number}: {name}", total)

    def on_advance(self, units: int) -> None:
        self._inner.on_advance(units)

    def on_step_end(self, step: int, loss: float) -> None:
        self._inner.on_step_end(step, loss)

    def on_evaluate(self, step: int, values: Mapping[str, float], best: bool) -> None:
        self.evaluations += 1
        self.last = values[self._metric]
        if best:
            self.kept = self.last
        self._trial.report(self.last, self.evaluations)
        if self._trial.should_prune():
            raise _Pruned


def search(
    recipe: str,
    axes: Sequence[Axis],
    *,
    trials: int,
    overrides: Sequence[str] = (),
    data: str | None = None,
    seed: int = 0,
    folder: Path = Path("runs/search"),
    callback: RunCallback | None = None,
    executor: Executor | None = None,
) -> Search:
    """Look for the values that are best on validation: a tree-structured Parzen estimator with successive halving.

    Args:
        recipe, overrides, data: as `load_recipe` takes them; what the axes do not name stays.
        trials: finished ones there are to be in the end, those of earlier calls with the same space included.
        seed: of the proposals; with it a search that was stopped proposes what it would have proposed.
        folder: keeps the study file. Adapters are not kept: tune the recipe that was found.
        executor: whose workers run trials side by side over the one study file, which all must see. Each proposes by
            what is finished when it starts, so two such searches may differ.
    Raises:
        RecipeError: the recipe, or an end of the space, does not hold together.
        PeftComboError: Optuna is not installed, or the study file cannot be read.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; the same call goes on.
    Source: Bergstra et al. 2011 (TPE); Li et al. 2020, "A system for massively parallel hyperparameter tuning" (ASHA).
    """
    optuna = _optuna()
    callback = callback or RunCallback()
    base = load_recipe(recipe, overrides, data).ready()
    for end in _ends(axes):
        load_recipe(recipe, (*overrides, *end), data)
    file = folder / f"{base.name}.jsonl"
    study = _open_study(file, _study_name(base, axes, seed))
    if before := len(_list_finished(study)):
        callback.on_note(f"Going on after {before} trials of {file}.")
    if executor is not None:
        share = {"recipe": str(Path(recipe).absolute()) if Path(recipe).is_file() else recipe, "overrides": overrides,
                 "data": None if data is None else str(literal_path(data).absolute()), "axes": _write_axes(axes),
                 "file": str(file.absolute()), "study": study.study_name, "seed": seed}  # fmt: skip
        _run_by_workers(executor, share, study, trials, callback)
    while (done := len(_list_finished(study))) < trials:
        # A sampler of its own for each trial: a study that is resumed draws what an unbroken one would have drawn.
        study.sampler = optuna.samplers.TPESampler(seed=seed * 1_000_003 + done)
        try:
            callback.on_note(_run_next(study, axes, recipe, overrides, data, callback))
        except Interrupted as error:
            raise Interrupted(f"{error} {done} trials are kept in {file}.", error.signal) from None
    found = tuple(_trial_of(one) for one in _list_finished(study))
    completed = [one for one in found if one.state == "complete" and one.value is not None]
    best = max(completed, key=lambda one: one.value or 0.0, default=None)
    return Search(
        metric=base.metric,
        trials=found,
        best=best,
        recipe=None if best is None else load_recipe(recipe, (*overrides, *best.settings), data),
        importance=_importance(study) if len(completed) >= _ENOUGH_TO_WEIGH and len(axes) > 1 else {},
        study=file,
    )


def run_trial(share: Mapping[str, Any]) -> str:
    """Run one trial of a study in the process of a worker, and say what came out.

    Args:
        share: ``recipe``, ``overrides``, ``data`` and ``axes`` as on a command line; ``file`` and ``study``, of the
            journal; ``seed`` of this proposal.
    """
    optuna = _optuna()
    study = _open_study(Path(share["file"]), share["study"], mend=False)
    # What others are at work on counts as bad as the worst so far, so that two do not try the same.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler = optuna.samplers.TPESampler(seed=share["seed"], constant_liar=True)
    axes = [axis_of(one) for one in share["axes"]]
    return _run_next(study, axes, share["recipe"], share["overrides"], share["data"], RunCallback())


def _run_by_workers(executor: Executor, share: dict[str, Any], study: Any, trials: int, callback: RunCallback) -> None:
    """Let workers run what is missing; who asks runs what they lost."""
    done = len(_list_finished(study))
    callback.on_stage("Trials", max(0, trials - done))
    shares = (
        {**share, "overrides": list(share["overrides"]), "seed": share["seed"] * 1_000_003 + number}
        for number in range(done, trials)
    )
    for _, told in executor.map_shares(run_trial, shares):
        callback.on_note(f"a trial is lost: {told.reason}" if isinstance(told, LostShare) else told)
        callback.on_advance(1)


def _run_next(
    study: Any, axes: Sequence[Axis], recipe: str, overrides: Sequence[str], data: str | None, callback: RunCallback
) -> str:
    """Ask the study for a trial, run it, and say in words what came out.

    Raises:
        Interrupted: a signal came; the trial counts as never begun.
    """
    import optuna

    trial = study.ask()
    settings = tuple(_propose(trial, axis) for axis in axes)
    trial.set_user_attr("settings", settings)
    try:
        told = _run(load_recipe(recipe, (*overrides, *settings), data), study, trial, callback)
    except Interrupted as error:
        raise Interrupted(f"Stopped in trial {trial.number}; the same command goes on.", error.signal) from None
    except PeftComboError as error:
        trial.set_user_attr("reason", str(error))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        told = f"failed: {error}"
    return f"trial {trial.number}, {' '.join(settings)}: {told}"


def _write_axes(axes: Sequence[Axis]) -> list[str]:
    """Write axes as `axis_of` reads them."""
    return [
        f"{axis.key}={','.join(axis.values)}"
        if isinstance(axis, Over)
        else f"{_setting(axis, axis.low)}..{_setting(axis, axis.high).partition('=')[2]}{':log' if axis.log else ''}"
        for axis in axes
    ]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise PeftComboError(
            'A search needs Optuna. Install it with: pip install "peft-combo[search]"; or compare a few values with: '
            "peft-combo compare --recipe NAME --over KEY=VALUES"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # its line a trial would come beside ours
    return optuna


def _ends(axes: Sequence[Axis]) -> Iterator[tuple[str, ...]]:
    """Return overrides that touch every value and both ends of every span, so that faults show before the first run."""
    choices = [
        [f"{axis.key}={value}" for value in axis.values]
        if isinstance(axis, Over)
        else [_setting(axis, axis.low), _setting(axis, axis.high)]
        for axis in axes
    ]
    for place in range(max((len(one) for one in choices), default=0)):
        yield tuple(one[min(place, len(one) - 1)] for one in choices)


def _setting(span: Span, value: float) -> str:
    return f"{span.key}={int(value) if span.whole else repr(value)}"


def _propose(trial: Any, axis: Axis) -> str:
    match axis:
        case Over():
            return f"{axis.key}={trial.suggest_categorical(axis.key, axis.values)}"
        case Span(whole=True):
            return _setting(axis, trial.suggest_int(axis.key, int(axis.low), int(axis.high), log=axis.log))
        case Span():
            return _setting(axis, trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log))
        case _:
            assert_never(axis)


def _study_name(base: Recipe, axes: Sequence[Axis], seed: int) -> str:
    """Return a name that another recipe, space, seed or data would not have: their trials must not be mixed."""
    data = build_task(base).data
    told = [base.digest(), data["digest"], data["split_digest"], [asdict(axis) for axis in axes], seed]
    return f"{base.name}-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]}"


def _open_study(file: Path, name: str, mend: bool = True) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if mend and file.exists():  # never while others write
            _drop_half_a_line(file)
        return optuna.create_study(
            study_name=name,
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(file))),
            direction="maximize",
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=_KEPT_SHARE),
            load_if_exists=True,
        )
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise PeftComboError(
            f"The study file {file} cannot be used ({type(error).__name__}: {str(error) or 'not what it should be'}). "
            "Move it away to start anew, or name another --folder."
        ) from error


def _drop_half_a_line(file: Path) -> None:
    """Cut off what a writer that was killed had begun: the next line would be joined to it, and neither be read."""
    content = file.read_bytes()
    if content and not content.endswith(b"\n"):
        with file.open("r+b") as stream:
            stream.truncate(content.rfind(b"\n") + 1)


def _list_finished(study: Any) -> list[Any]:
    # A trial whose process was killed stays "running" for ever; it is none of these.
    return [one for one in study.get_trials(deepcopy=False) if one.state.is_finished()]


def _run(recipe: Recipe, study: Any, trial: Any, callback: RunCallback) -> str:
    """Run one trial, tell the study, and say in words what came out. Nothing is left on the disk.

    Raises:
        PeftComboError: it cannot be tuned so.
    """
    import optuna

    reporter = _Reporter(trial, recipe.metric, callback)
    with tempfile.TemporaryDirectory() as scratch:
        # Trackers of a run that is cut off would never be closed; the study is the record.
        training = recipe.training.model_copy(update={"trackers": ()})
        run = recipe.model_copy(update={"store": f"{scratch}/adapters", "training": training})
        try:
            tune(run, run_folder=Path(scratch) / "run", callback=reporter)
        except _Pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return f"cut off at {recipe.metric} {reporter.last:.4f} after {reporter.evaluations} evaluations"
    value = reporter.last if reporter.kept is None else reporter.kept  # without early stopping the last state is kept
    study.tell(trial, value)
    return f"{recipe.metric} {value:.4f}"


def _trial_of(one: Any) -> Trial:
    states: dict[str, Literal["complete", "pruned", "failed"]] = {
        "COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed",
    }  # fmt: skip
    return Trial(
        number=one.number,
        settings=tuple(one.user_attrs["settings"]),
        state=states[one.state.name],
        value=one.value,
        evaluations=len(one.intermediate_values),
        seconds=one.duration.total_seconds(),
        reason=one.user_attrs.get("reason", ""),
    )


def _importance(study: Any) -> dict[str, float]:
    """Return the share of each key in how far complete trials differ; empty where they do not.

    Source: Watanabe et al. 2023, "PED-ANOVA: efficiently quantifying hyperparameter importance in arbitrary subspaces".
    """
    import optuna

    values = {one.value for one in _list_finished(study) if one.value is not None}
    if len(values) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # as versions below 5 call it
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    found: dict[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return found
