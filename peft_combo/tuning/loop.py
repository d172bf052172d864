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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias, assert_never

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from peft_combo import methods
from peft_combo.adapters import AdapterRecord, AdapterStore
from peft_combo.architectures import bytes_of, set_dropout, set_training
from peft_combo.backbone import Backbone
from peft_combo.errors import TuningError
from peft_combo.item_encoder import ItemEncoder
from peft_combo.methods import AttachedAdapter
from peft_combo.recipe import Recipe, TrainingConfig
from peft_combo.tasks import task_of
from peft_combo.tasks.base import AnyTask, Evaluation, Table, TaskHead
from peft_combo.tuning.plan import (
    Plan,
    assembled,
    autocast_of,
    evaluation_interval,
    evaluations_of,
    heaviest_batch,
    measured,
    peak_mib,
    resident_mib,
)
from peft_combo.tuning.progress import Progress, RunLog, flat, forget_checkpoints
from peft_combo.tuning.starting import load_start
from peft_combo.tuning.storing import store_adapter
from peft_combo.tuning.trainee import Trainee, mixed, probe
from peft_combo.watch import Watch


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


Schedule: TypeAlias = Callable[[TrainingConfig, int, int], float]
"""Turns the recipe's section, an optimizer step from 0 and their total into the share of the peak learning rate."""


def tune(
    recipe: Recipe, *, resume: bool = False, run_folder: Path | None = None, watch: Watch | None = None,
    schedule: Schedule | None = None, task: AnyTask | None = None, start: AdapterRecord | None = None,
) -> TuneResult:  # fmt: skip
    """Run a recipe and store what comes out.

    Args:
        recipe: complete; `recipe_files.load_recipe` makes one of a name or file.
        resume: go on from the last checkpoint in the run folder.
        run_folder: checkpoints and the loss log; default ``runs/<recipe>``.
        watch: told of plan, steps and metrics, on the main process.
        schedule: course of the learning rate; default `learning_rate_factor`, the recipe's own.
        task: what is learned; default the recipe's task over the recipe's data.
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
    for note in task.notes:
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
        watch.stage("Encoding the texts", len(set(task.texts)))
        items = ItemEncoder(
            backbone, attached, task.texts, per_token=task.per_token,
            fast=recipe.training.fast_path, cache_limit_bytes=recipe.training.cache_limit_mib * 2**20,
            process=accelerator.process_index, processes=accelerator.num_processes, progress=watch.advance,
        )  # fmt: skip
        trainee = Trainee(task, items, attached, head)

        groups, rates = _parameter_groups(recipe.training, attached, head)

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
            seconds=total * step_seconds * recipe.training.accumulation
            + evaluations_of(recipe.training, steps_per_epoch) * evaluation_seconds + outcome_seconds,
        )  # fmt: skip
        watch.planned(plan)

        optimizer = _optimizer(recipe.training, groups)
        model, optimizer = accelerator.prepare(trainee, optimizer, device_placement=[False, False])
        parameters = [p for group in groups for p in group["params"]]

        progress = Progress()
        if resume:
            progress = Progress.restored(run_folder, recipe, task, attached, head, optimizer)
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
                    loss = model(batch, mixed(recipe.seed, step, part))
                    accelerator.backward(loss)
                    loss_sum += float(loss.detach())
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(parameters, recipe.training.max_grad_norm)
                        factor = schedule(recipe.training, step, total)
                        for group, rate in zip(optimizer.param_groups, rates, strict=True):
                            group["lr"] = rate * factor
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
                log.add(progress.step, loss=progress.losses[-1], lr=rates[0] * factor)
            accelerator.log({"loss": progress.losses[-1], "learning_rate": rates[0] * factor}, step=progress.step)
            watch.stepped(progress.step, progress.losses[-1])

            if progress.step % evaluate_every == 0 or progress.step == total:
                evaluation = _evaluate(accelerator, task, items, trainee, attached, recipe.metric)
                best = progress.keep_if_best(evaluation, recipe, attached, head)
                if log is not None:
                    log.add(progress.step, **evaluation.values)
                accelerator.log({f"valid/{name}": v for name, v in evaluation.values.items()}, step=progress.step)
                watch.evaluated(progress.step, evaluation.values, best)
            interrupted = _any(accelerator, stop.is_set())
            if main and (interrupted or progress.step % recipe.training.checkpoint_every == 0):
                progress.checkpoint(recipe, task, attached, head, optimizer).write(run_folder)
            if interrupted:
                accelerator.end_training()
                raise Interrupted(
                    f"Stopped after step {progress.step} of {total}; its state is in {run_folder}. "
                    "Go on with the same command and --resume."
                )

        if progress.best is None:  # without early stopping the last state is taken
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


def _parameter_groups(
    config: TrainingConfig, attached: AttachedAdapter, head: TaskHead
) -> tuple[list[dict[str, Any]], list[float]]:
    """Return the optimizer's groups and their peak learning rates; a head's vectors and scalars are not decayed."""
    head_rate = config.head_learning_rate if config.head_learning_rate is not None else config.learning_rate
    sides = [(group.parameters, config.learning_rate * group.rate, group.decayed) for group in attached.groups()]
    learning = [p for p in head.parameters() if p.requires_grad]
    sides += [([p for p in learning if (p.ndim >= 2) == decayed], head_rate, decayed) for decayed in (True, False)]
    groups, rates = [], []
    for parameters, rate, decayed in sides:
        if parameters:
            decay = config.weight_decay if decayed else 0.0
            groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
            rates.append(rate)
    if not groups:
        raise TuningError(
            "Nothing would learn: the method trains no weights and the head has none. Set task.projection: linear or "
            "use another adapter.method."
        )
    return groups, rates


def _optimizer(config: TrainingConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups)
        case "sgd":
            return torch.optim.SGD(groups, momentum=config.momentum)
        case "adafactor":
            return torch.optim.Adafactor(groups)
        case _:
            assert_never(config.optimizer)


def learning_rate_factor(config: TrainingConfig, step: int, total: int) -> float:
    """Return the share of the peak learning rate at optimizer step `step`, counted from 0."""
    warmup = config.warmup_fraction * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    course = (step - warmup) / max(1.0, total - warmup)
    match config.schedule:
        case "linear":
            return 1 - course
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * course))
        case "constant":
            return 1.0
        case _:
            assert_never(config.schedule)


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
