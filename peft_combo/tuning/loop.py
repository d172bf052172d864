"""Tuning run: recipe in, stored adapter and honest numbers out.

Owns the life of a run (`Run`: prepare, loop, finish) and what stops it. Knows neither how a method works
(`encoder.methods`) nor what a task learns or measures (`tasks`), nor what a recipe adds around a step (`extensions`).

Randomness has no state here: the order of examples, the dropout masks and every draw are functions of seed and step, so
a run resumed from a checkpoint repeats the uninterrupted one bit for bit without storing a generator.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator

from peft_combo.callbacks import RunCallback
from peft_combo.data.augmentation.variants import Rewrite
from peft_combo.encoder.backbone import Backbone
from peft_combo.errors import TuningError
from peft_combo.metrics.report import ResultTable
from peft_combo.recipe.model import Recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.versions import AdapterRecord
from peft_combo.tuning.figures import Plan, compute_evaluation_interval
from peft_combo.tuning.optimizer import Group, Schedule, build_optimizer, build_parameter_groups, learning_rate_factor
from peft_combo.tuning.processes import (
    StopRequest,
    agree_on_signal,
    build_accelerator,
    catch_signals,
    is_first_process,
    name_signal,
)
from peft_combo.tuning.resources import peak_mib
from peft_combo.tuning.run_folder import (
    LOG,
    find_checkpoint,
    find_run_folder,
    forget_checkpoints,
    hold_run_folder,
    name_run_folder,
)
from peft_combo.tuning.run_state import CheckpointClock, Progress, RunLog
from peft_combo.tuning.save import store_adapter
from peft_combo.tuning.seeds import mix_seed
from peft_combo.tuning.setup import Setup
from peft_combo.tuning.step import ForwardPass, Passes
from peft_combo.tuning.tasks import build_task
from peft_combo.tuning.tasks.base import AnyTask, Evaluation


@dataclass(frozen=True)
class TuneResult:
    """What a finished run leaves.

    Attributes:
        record: the stored adapter.
        table: baselines, the frozen encoder before, the tuned one after.
        losses: one per optimizer step.
        chosen: what validation or the method chose: best step, settings of the head, ranks of AdaLoRA.
    """

    record: AdapterRecord
    plan: Plan
    table: ResultTable
    losses: tuple[float, ...]
    chosen: dict[str, Any]
    stopped_early: bool
    seconds: float
    peak_mib: float
    run_folder: Path


class Interrupted(TuningError):
    """The run was stopped from outside; its state is saved.

    Attributes:
        signal: number of the signal that stopped it.
        exit_code: what a program ended by it returns, 128 and the number.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal = int(number)
        self.exit_code = 128 + self.signal


class Diverged(TuningError):
    """The loss is no number any more."""


def tune(
    recipe: Recipe, *, resume: bool = False, run_folder: Path | None = None, callback: RunCallback | None = None,
    schedule: Schedule | None = None, task: AnyTask | None = None, start: AdapterRecord | None = None,
    rewrite: Rewrite | None = None,
) -> TuneResult:  # fmt: skip
    """Run a recipe and store what comes out.

    Args:
        recipe: complete; `load_recipe` makes one of a name or file.
        resume: go on from the last checkpoint in the run folder; start where none is there.
        run_folder: checkpoints and the loss log; default `name_run_folder`. One run at a time has it.
        callback: told of plan, steps and metrics, on the main process.
        schedule: course of the learning rate; default `learning_rate_factor`, the recipe's own.
        task: what is learned; default the recipe's task over the recipe's data.
        rewrite: says texts in other words, for `augmentation`: back-translation, for example. A resumed run must be
            given the same one, and it must answer the same.
        start: a stored adapter to go on from, as `warm_start.recipe_from` allows; default an untrained one.
    Returns:
        the stored adapter, already reloaded and compared, with the before/after table.
    Raises:
        PeftComboError: anything a user can put right; checkpoints stay.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; a checkpoint of the last whole step was written first.
    """
    started = time.perf_counter()
    if run_folder is None:
        run_folder = find_run_folder(recipe) if resume else name_run_folder(recipe)
    with ExitStack() as held:
        if is_first_process():
            held.enter_context(hold_run_folder(run_folder))
        held.enter_context(torch.random.fork_rng())
        stop = held.enter_context(catch_signals())
        try:
            with stop.interrupt():
                run = Run.prepare(
                    recipe, run_folder, resume=resume, callback=callback, schedule=schedule, task=task, start=start,
                    rewrite=rewrite,
                )  # fmt: skip
        except KeyboardInterrupt:
            raise Interrupted(
                f"Stopped by {name_signal(stop.number)} before the first step. Go on with the same command and "
                "--resume.",
                stop.number,
            ) from None
        run.loop(stop)
        record, table, chosen = run.finish(stop)
    return TuneResult(
        record, run.plan, table, tuple(run.progress.losses), chosen, run.progress.stopped_early,
        time.perf_counter() - started, peak_mib(), run.run_folder,
    )  # fmt: skip


@dataclass(eq=False)
class Run:
    """One run: `prepare` makes it, `loop` trains, `finish` chooses the weights and stores them.

    Attributes:
        setup: what learns. before: predictions of the frozen encoder, for the table.
        passes, groups, optimizer, schedule: what a step is made with.
        progress: where the run is. clock: when its next checkpoint is due.
        log: its own record; None beside the main process.
    """

    setup: Setup
    run_folder: Path
    store: AdapterStore
    callback: RunCallback
    before: Any
    plan: Plan
    passes: Passes
    groups: list[Group]
    optimizer: Any
    schedule: Schedule
    progress: Progress
    clock: CheckpointClock
    log: RunLog | None

    @classmethod
    def prepare(
        cls, recipe: Recipe, run_folder: Path, *, resume: bool = False, callback: RunCallback | None = None,
        schedule: Schedule | None = None, task: AnyTask | None = None, start: AdapterRecord | None = None,
        rewrite: Rewrite | None = None,
    ) -> Run:  # fmt: skip
        """Put together all that learns, measure the frozen encoder, and say what the run will need; see `tune`."""
        recipe.ready()
        Backbone.blueprint(recipe.backbone)  # a base that is not whole is told before the data is read
        accelerator = build_accelerator(recipe, run_folder)
        main = accelerator.is_main_process
        callback = callback if callback is not None and main else RunCallback()
        store = AdapterStore(recipe.store)
        if main:
            with store.writing(recipe.category):
                pass  # a store that cannot be written is better known now than after the training

        setup = Setup.build(recipe, accelerator, build_task(recipe) if task is None else task, callback, start, rewrite)
        groups = build_parameter_groups(recipe.training, setup.attached, setup.head)
        # How good is it without tuning? The same head over the frozen encoder, as good as it gets there.
        before, baseline_seconds = setup.measure_baseline()
        plan = setup.measure_plan(baseline_seconds)
        callback.on_plan(plan.line(), plan.metric)

        prepared, optimizer = accelerator.prepare(
            setup.model, build_optimizer(recipe.training, groups), device_placement=[False, False]
        )
        passes = Passes(cast(ForwardPass, setup.model), prepared, accelerator.backward)
        progress = Progress.restore(run_folder, setup, optimizer) if resume else Progress()
        for note in _explain_start(run_folder, resume, progress, setup.total):
            callback.on_note(note)
        log = RunLog(run_folder / LOG, progress.step) if main else None
        return cls(
            setup, run_folder, store, callback, before, plan, passes, groups, optimizer,
            schedule or learning_rate_factor, progress, CheckpointClock(recipe.training, progress.step), log,
        )  # fmt: skip

    def loop(self, stop: StopRequest) -> None:
        """Train until the last step, or until validation or `stop` says stop, in the order things happen.

        Raises:
            Diverged: the loss is no number any more.
            Interrupted: a signal came; a checkpoint of the last whole step was written first.
        """
        progress, training, weights = self.progress, self.setup.recipe.training, self.setup.extensions.weights
        total, evaluate_every = self.setup.total, compute_evaluation_interval(training, self.setup.task.per_epoch)
        self.callback.on_stage("Tuning", total)
        self.callback.on_advance(progress.step)
        while progress.due or (progress.step < total and not progress.stopped_early):
            if not progress.due:
                self.take_step()
                progress.due = progress.step % evaluate_every == 0 or progress.step == total
                weights.after_step(progress.step / total, progress.due)
            stopped = agree_on_signal(self.accelerator, stop.number)
            if progress.due and not stopped:
                self._evaluate(stop)
                stopped = agree_on_signal(self.accelerator, stop.number)
            if stopped or self.clock.is_due(progress.step):
                self._write_checkpoint()
            if stopped:
                self.accelerator.end_training()
                raise self._explain_stop(stopped)
        self._write_checkpoint()  # what comes now takes long, and may end before it is done

    def take_step(self) -> float:
        """Take one optimizer step, and return its loss.

        Raises:
            Diverged: the loss is no number any more.
        """
        setup, training, accelerator = self.setup, self.setup.recipe.training, self.accelerator
        step, total = self.progress.step, setup.total
        factor = self.schedule(training, step, total)
        setup.train()
        loss = 0.0
        for part in range(training.accumulation):
            with accelerator.accumulate(self.passes.prepared):
                batch = setup.task.batch(step, part, training.accumulation)
                seed = mix_seed(setup.recipe.seed, step, part)
                loss += setup.extensions.add_gradients(self.passes, batch, seed)
                if accelerator.sync_gradients:
                    parameters = [p for group in self.groups for p in group.parameters]
                    accelerator.clip_grad_norm_(parameters, training.max_grad_norm)
                    for moved, group in zip(self.optimizer.param_groups, self.groups, strict=True):
                        moved["lr"] = group.rate_at(factor, step, total)
                self.optimizer.step()
                if accelerator.sync_gradients:
                    setup.attached.after_step(step + 1)  # AdaLoRA reads the gradients: after the step, before clearing
                self.optimizer.zero_grad()
        loss /= training.accumulation
        self.progress.step += 1
        self.progress.losses.append(loss)
        if not math.isfinite(loss):
            raise Diverged(
                f"The loss is not a number after step {self.progress.step}. Lower training.learning_rate (it is "
                f"{training.learning_rate:g}) or training.max_grad_norm, and start anew."
            )
        rate = self.groups[0].rate * factor
        if self.log is not None:
            self.log.add(self.progress.step, loss=loss, lr=rate)
        accelerator.log({"loss": loss, "learning_rate": rate}, step=self.progress.step)
        self.callback.on_step_end(self.progress.step, loss)
        return loss

    def finish(self, stop: StopRequest) -> tuple[AdapterRecord, ResultTable, dict[str, Any]]:
        """Choose the weights, compare them with the frozen encoder, and store them.

        Returns:
            the stored adapter, the table, and what was chosen.
        Raises:
            Interrupted: a signal came before it was stored.
        """
        try:
            with stop.interrupt():
                table, chosen = self._choose()
        except KeyboardInterrupt:
            raise self._explain_stop(stop.number) from None
        if self.accelerator.is_main_process:
            record = store_adapter(self.store, self.setup, table, chosen)
            forget_checkpoints(self.run_folder)
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            record = self.store.open(self.setup.recipe.category)
        self.close()
        return record, table, chosen

    def _choose(self) -> tuple[ResultTable, dict[str, Any]]:
        """Put the chosen weights in place; return what they are worth and what was chosen."""
        setup, progress, best = self.setup, self.progress, self.progress.best
        if best is None:  # without early stopping the last state is taken
            setup.extensions.weights.keep()
            choice = setup.evaluate().choice
        else:
            setup.attached.load_state(best.adapter, best.values)
            setup.head.load_state_dict(best.head)
            choice = best.choice
        setup.task.apply_choice(setup.head, choice)
        table = setup.task.table(self.before, setup.predict())
        best_step = progress.step if best is None else best.step
        return table, {"best_step": best_step, **choice, **setup.attached.summary()}

    def close(self) -> None:
        """Give back the cache and whatever accelerate holds."""
        self.setup.items.close()
        self.accelerator.end_training()

    @property
    def accelerator(self) -> Accelerator:
        """Processes, precision and accumulation."""
        return self.setup.accelerator

    def _evaluate(self, stop: StopRequest) -> None:
        """Ask validation, and keep the weights if they are the best so far.

        A signal ends it at once, and it stays due: it may take longer than who sent the signal will wait. Several
        processes would wait for each other, so they go on to its end.
        """
        progress, setup = self.progress, self.setup
        with setup.extensions.weights.for_evaluation():
            try:
                with stop.interrupt() if self.accelerator.num_processes == 1 else nullcontext():
                    evaluation: Evaluation = setup.evaluate()
            except KeyboardInterrupt:
                return
            best = progress.keep_if_best(evaluation, setup.recipe, setup.attached, setup.head)
            progress.due = False
        if self.log is not None:
            self.log.add(progress.step, **evaluation.values)
        self.accelerator.log({f"valid/{name}": v for name, v in evaluation.values.items()}, step=progress.step)
        self.callback.on_evaluate(progress.step, evaluation.values, best)

    def _write_checkpoint(self) -> None:
        step = self.progress.step
        if self.accelerator.is_main_process and not self.clock.is_saved(step):
            with self.clock.writing(step):
                self.progress.checkpoint(self.setup, self.optimizer).write(self.run_folder)

    def _explain_stop(self, number: int) -> Interrupted:
        return Interrupted(
            f"Stopped by {name_signal(number)} after step {self.progress.step} of {self.setup.total}; its state is in "
            f"{self.run_folder}. Go on with the same command and --resume.",
            number,
        )


def _explain_start(run_folder: Path, resume: bool, progress: Progress, total: int) -> Iterator[str]:
    """Say where a run starts, where it could start elsewhere."""
    if progress.step:
        yield f"Going on after step {progress.step} of {total}, from {run_folder}."
    elif resume:
        yield f"Nothing is saved in {run_folder}: starting at the first step."
    elif (found := find_checkpoint(run_folder)) is not None:
        yield (
            f"{found} is of an earlier run that did not end, and goes with this run's first checkpoint. To go on from "
            "it, stop now and add --resume."
        )
