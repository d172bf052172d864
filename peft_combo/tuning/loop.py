"""One tuning run, told from top to bottom: recipe in, stored adapter and honest numbers out.

Owns the loop (accelerate: processes, precision, accumulation) and what stops it. Knows neither how a method works
(`methods`) nor what a task learns or measures (`tasks`).

Randomness has no state here: the order of examples, the dropout masks and every draw are functions of seed and step, so
a run resumed from a checkpoint repeats the uninterrupted one bit for bit without storing a generator.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from peft_combo.callbacks import Watch
from peft_combo.data.augmentation.variants import Rewrite
from peft_combo.encoder import methods
from peft_combo.encoder.architectures import bytes_of, set_dropout, set_training
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.errors import TuningError
from peft_combo.metrics.report import Table
from peft_combo.recipe.model import Recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.versions import AdapterRecord
from peft_combo.tuning.adversarial import Objective, passes_of
from peft_combo.tuning.augmentation import wordings_of
from peft_combo.tuning.averaging import WeightAverage
from peft_combo.tuning.item_encoder import ItemEncoder
from peft_combo.tuning.model import Trainee, learning, mixed
from peft_combo.tuning.optimizer import Schedule, groups_of, learning_rate_factor, optimizer_of
from peft_combo.tuning.plan import Plan, assembled, autocast_of, evaluation_interval, evaluations_of, heaviest_batch
from peft_combo.tuning.probe import probe
from peft_combo.tuning.resources import measured, peak_mib, resident_mib
from peft_combo.tuning.run_state import Progress, RunLog, flat, forget_checkpoints
from peft_combo.tuning.save import store_adapter
from peft_combo.tuning.tasks import task_of
from peft_combo.tuning.tasks.base import AnyTask, Evaluation
from peft_combo.tuning.warm_start import load_start


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
    table: Table
    losses: tuple[float, ...]
    chosen: dict[str, Any]
    stopped_early: bool
    seconds: float
    peak_mib: float
    run_folder: Path


class Interrupted(TuningError):
    """The run was stopped from outside; its state is saved."""


class Diverged(TuningError):
    """The loss is no number any more."""


def tune(
    recipe: Recipe, *, resume: bool = False, run_folder: Path | None = None, watch: Watch | None = None,
    schedule: Schedule | None = None, task: AnyTask | None = None, start: AdapterRecord | None = None,
    rewrite: Rewrite | None = None,
) -> TuneResult:  # fmt: skip
    """Run a recipe and store what comes out.

    Args:
        recipe: complete; `recipe_files.load_recipe` makes one of a name or file.
        resume: go on from the last checkpoint in the run folder.
        run_folder: checkpoints and the loss log; default ``runs/<recipe>``.
        watch: told of plan, steps and metrics, on the main process.
        schedule: course of the learning rate; default `learning_rate_factor`, the recipe's own.
        task: what is learned; default the recipe's task over the recipe's data.
        rewrite: says texts in other words, for `augmentation`: back-translation, for example. A resumed run must be
            given the same one, and it must answer the same.
        start: a stored adapter to go on from, as `starting.recipe_from` allows; default an untrained one.
    Returns:
        the stored adapter, already reloaded and compared, with the before/after table.
    Raises:
        PeftComboError: anything a user can put right; checkpoints stay.
        Interrupted: SIGINT came; a checkpoint of the last whole step was written first.
    """
    started = time.perf_counter()
    schedule = schedule or learning_rate_factor
    recipe.ready()
    run_folder = run_folder or Path("runs") / recipe.name
    accelerator = _accelerator(recipe, run_folder)
    main = accelerator.is_main_process
    watch = watch if watch is not None and main else Watch()
    store = AdapterStore(recipe.store)
    if main:
        with store.writing(recipe.category):
            pass  # a store that cannot be written is better known now than after the training

    task = task_of(recipe) if task is None else task
    wordings, said = wordings_of(recipe, task, rewrite)
    for note in (*task.notes, *said):
        watch.note(note)
    base = resident_mib()
    backbone = Backbone.of(recipe.backbone, accelerator.device)

    with torch.random.fork_rng(), _stop_asked() as stop:
        steps_per_epoch, total = task.per_epoch, task.per_epoch * recipe.training.epochs
        attached = methods.attach(
            backbone.model, recipe.adapter, max_length=backbone.max_length, total_steps=total, seed=recipe.seed,
            tokenizer=backbone.tokenizer,
        )  # fmt: skip
        set_dropout(attached.inner, recipe.training.encoder_dropout)
        head = task.head(backbone, attached.max_length).to(accelerator.device)
        head_start = None if start is None else load_start(start, backbone, attached, head, task.texts)
        others = () if wordings is None else wordings.texts
        watch.stage("Encoding the texts", len({*task.texts, *(text for own in others for text in own)}))
        items = ItemEncoder(
            backbone, attached, task.texts, per_token=task.per_token, retokenized=task.retokenized, variants=wordings,
            fast=recipe.training.fast_path, cache_limit_bytes=recipe.training.cache_limit_mib * 2**20,
            process=accelerator.process_index, processes=accelerator.num_processes, progress=watch.advance,
        )  # fmt: skip
        trainee = Trainee(task, items, attached, head, recipe.training.r_drop)

        groups = groups_of(recipe.training, attached, head)

        # How good is it without tuning? The same head over the frozen encoder, as good as it gets there.
        frozen = partial(items.catalogue, items.frozen)
        _stop_training(trainee, attached)
        with accelerator.autocast():
            task.start(head, frozen)
            clock = time.perf_counter()
            before = task.outcome(head, frozen)
            outcome_seconds = time.perf_counter() - clock
            if head_start is not None:
                head.load_state_dict(head_start)
            elif start is not None:  # pretrained: its states are not the frozen encoder's, so the head suits them first
                task.start(head, partial(items.catalogue, trainee.encoder))
        evaluation_seconds, evaluation_mib = measured(
            lambda: _evaluate(accelerator, task, items, trainee, attached, recipe.metric)
        )

        with autocast_of(accelerator.device.type, accelerator.mixed_precision):
            step_seconds, step_bytes = probe(trainee, attached, head, heaviest_batch(task, recipe.training), recipe)
        evaluate_every = evaluation_interval(recipe.training, steps_per_epoch)
        vectors_mib = 4 * backbone.dim * items.rows / 2**20
        plan = assembled(
            recipe, task, attached, head,
            device=accelerator.device.type, processes=accelerator.num_processes, precision=accelerator.mixed_precision,
            frozen_parameters=sum(p.numel() for p in backbone.model.parameters()), total=total, base=base,
            frozen=bytes_of(backbone.model) / 2**20, loading=bytes_of(backbone.model) / 2**20, step=step_bytes / 2**20,
            states=items.cached_bytes / 2**20, vectors=vectors_mib, evaluation=max(0.0, evaluation_mib - vectors_mib),
            allocator=max(0.0, resident_mib() - base - (bytes_of(backbone.model) + items.cached_bytes) / 2**20),
            seconds=total * step_seconds * recipe.training.accumulation * passes_of(recipe.training)
            + evaluations_of(recipe.training, steps_per_epoch) * evaluation_seconds + outcome_seconds,
        )  # fmt: skip
        watch.planned(plan.line(), plan.metric)

        optimizer = optimizer_of(recipe.training, groups)
        model, optimizer = accelerator.prepare(trainee, optimizer, device_placement=[False, False])
        objective = Objective(recipe.training, trainee, model, accelerator.backward)
        parameters = [p for group in groups for p in group.parameters]
        average = None
        if recipe.training.averaging is not None:
            average = WeightAverage(recipe.training.averaging, learning(attached, head))
        averaged = nullcontext if average is None else average.applied

        progress = Progress()
        if resume:
            progress = Progress.restored(run_folder, recipe, task, attached, head, optimizer, average)
            watch.note(f"Going on after step {progress.step} of {total}.")
        log = RunLog(run_folder / "log.jsonl", progress.step) if main else None

        # The loop, in the order things happen.
        watch.stage("Tuning", total)
        watch.advance(progress.step)
        while progress.step < total and not progress.stopped_early:
            step = progress.step
            set_training(attached.inner, attached.cut, True)
            head.train()
            loss_sum = 0.0
            for part in range(recipe.training.accumulation):
                with accelerator.accumulate(model):
                    batch = task.batch(step, part, recipe.training.accumulation)
                    loss_sum += objective.add_gradients(batch, mixed(recipe.seed, step, part))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(parameters, recipe.training.max_grad_norm)
                        factor = schedule(recipe.training, step, total)
                        for moved, group in zip(optimizer.param_groups, groups, strict=True):
                            moved["lr"] = group.rate_at(factor, step, total)
                    optimizer.step()
                    if accelerator.sync_gradients:
                        attached.after_step(step + 1)  # AdaLoRA reads the gradients: after the step, before clearing
                    optimizer.zero_grad()
            progress.step += 1
            progress.losses.append(loss_sum / recipe.training.accumulation)
            if not math.isfinite(progress.losses[-1]):
                raise Diverged(
                    f"The loss is not a number after step {progress.step}. Lower training.learning_rate (it is "
                    f"{recipe.training.learning_rate:g}) or training.max_grad_norm, and start anew."
                )
            if log is not None:
                log.add(progress.step, loss=progress.losses[-1], lr=groups[0].rate * factor)
            accelerator.log({"loss": progress.losses[-1], "learning_rate": groups[0].rate * factor}, step=progress.step)
            watch.stepped(progress.step, progress.losses[-1])

            evaluated = progress.step % evaluate_every == 0 or progress.step == total
            if average is not None:
                average.step(progress.step / total, evaluated)
            if evaluated:
                with averaged():
                    evaluation = _evaluate(accelerator, task, items, trainee, attached, recipe.metric)
                    best = progress.keep_if_best(evaluation, recipe, attached, head)
                if log is not None:
                    log.add(progress.step, **evaluation.values)
                accelerator.log({f"valid/{name}": v for name, v in evaluation.values.items()}, step=progress.step)
                watch.evaluated(progress.step, evaluation.values, best)
            interrupted = _any(accelerator, stop.is_set())
            if main and (interrupted or progress.step % recipe.training.checkpoint_every == 0):
                progress.checkpoint(recipe, task, attached, head, optimizer, average).write(run_folder)
            if interrupted:
                accelerator.end_training()
                raise Interrupted(
                    f"Stopped after step {progress.step} of {total}; its state is in {run_folder}. "
                    "Go on with the same command and --resume."
                )

        if progress.best is None:  # without early stopping the last state is taken
            if average is not None:
                average.keep()
            choice = _evaluate(accelerator, task, items, trainee, attached, recipe.metric).choice
        else:
            attached.load_state(progress.best.adapter, progress.best.values)
            head.load_state_dict(progress.best.head)
            choice = progress.best.choice
        task.settle(head, choice)
        _stop_training(trainee, attached)
        with accelerator.autocast():
            after = task.outcome(head, partial(items.catalogue, trainee.encoder))
        table = task.table(before, after)
        best_step = progress.best.step if progress.best is not None else progress.step
        chosen = {"best_step": best_step, **choice, **attached.summary()}
        if main:
            record = store_adapter(store, recipe, backbone, attached, head, task, table, chosen)
            forget_checkpoints(run_folder)
        accelerator.wait_for_everyone()
        if not main:
            record = store.open(recipe.category)
        items.close()
        accelerator.end_training()
    return TuneResult(
        record, plan, table, tuple(progress.losses), chosen, progress.stopped_early, time.perf_counter() - started,
        peak_mib(), run_folder,
    )  # fmt: skip


def _accelerator(recipe: Recipe, run_folder: Path) -> Accelerator:
    # "no" is the recipe's way of not asking, and leaves the choice to `accelerate launch`.
    precision = None if recipe.backbone.precision == "no" else recipe.backbone.precision
    trackers = list(recipe.training.trackers)
    for tracker in trackers:
        try:
            metadata.version(tracker)
        except metadata.PackageNotFoundError:
            raise TuningError(
                f'training.trackers: {tracker} is not installed. Install it with: pip install "peft-combo[{tracker}]"'
            ) from None
    # Without a GPU accelerate joins the processes it launched only where it is told that they compute on the CPU.
    several_on_cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    # accelerate keeps the precision of a process's first run for all others, and refuses another one.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    try:
        accelerator = Accelerator(
            cpu=several_on_cpu,
            mixed_precision=precision,
            gradient_accumulation_steps=recipe.training.accumulation,
            log_with=trackers or None,
            project_dir=str(run_folder) if trackers else None,
        )
    except (ValueError, RuntimeError) as error:
        raise TuningError(f"accelerate cannot start with this configuration: {error}") from error
    if trackers:
        accelerator.init_trackers(recipe.name, config=flat(recipe.model_dump(mode="json")))
    return accelerator


def _evaluate(
    accelerator: Accelerator, task: AnyTask, items: ItemEncoder, trainee: Trainee, attached: AttachedAdapter,
    metric: str,
) -> Evaluation:  # fmt: skip
    """Return the validation metrics of the weights as they are."""
    _stop_training(trainee, attached)
    with accelerator.autocast():
        return task.evaluate(trainee.head, partial(items.catalogue, trainee.encoder), metric)


def _stop_training(trainee: Trainee, attached: AttachedAdapter) -> None:
    set_training(attached.inner, attached.cut, False)
    trainee.head.eval()


def _any(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether any process has the flag, so that all stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.gather(torch.tensor([flag], device=accelerator.device)).any())


@contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a request to stop after the current step; the second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)
