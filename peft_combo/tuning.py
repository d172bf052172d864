"""One tuning run, told from top to bottom: recipe in, stored adapter and honest numbers out.

Owns the loop (accelerate: processes, precision, accumulation), the plan and its probe, early stopping, checkpoints and
what is compared with what. Knows neither how a method works (`methods`) nor what a task measures (`tasks`).

Randomness has no state here: the order of bundles, the dropout masks and every draw are functions of seed and step, so
a run resumed from a checkpoint repeats the uninterrupted one bit for bit without storing a generator.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, assert_never

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_combo import methods, metrics
from peft_combo.adapters import AdapterRecord, AdapterStore
from peft_combo.architectures import set_dropout, set_training
from peft_combo.backbone import Backbone
from peft_combo.checkpoint import Checkpoint, optimizer_state, optimizer_tensors
from peft_combo.data import Dataset, Split, open_dataset, split_as
from peft_combo.errors import TuningError
from peft_combo.item_encoder import ItemEncoder
from peft_combo.methods import AttachedAdapter
from peft_combo.recipe import Recipe, TrainingConfig
from peft_combo.scoring import ItemKNN, Popularity, Scorer, TextCosine, tfidf_vectors
from peft_combo.tasks.bundle import (
    HEAD_FILE,
    BundleBatch,
    BundleBatches,
    BundleHead,
    Questions,
    bundle_loss,
    completion_ranks,
)
from peft_combo.watch import Watch

PROTOCOL = (
    "Validation bundles of held-out groups; every item of every bundle once the answer, ranked among the whole "
    "catalogue without the rest of its bundle, ties at mid-rank; 95 % interval by bootstrap over groups. The step was "
    "chosen on these bundles, so the tuned row is slightly flattered; the test bundles were not looked at."
)

_RELOAD_SAMPLE = 64
# A reloaded adapter gives the same vectors but for the order of additions; a folded AdaLoRA differs by about 1e-7.
_RELOAD_TOLERANCE = 1e-4
_SCORE_BLOCK = 256
# Questions asked while training; the table at the end asks all. At 2,000 the error of NDCG@10 is near 0.01.
_ASKED_WHILE_TRAINING = 2000


@dataclass(frozen=True)
class Plan:
    """What a run is going to do and need, known before its first step."""

    recipe: str
    category: str
    method: str
    device: str
    processes: int
    precision: str
    items: int
    bundles: dict[str, int]
    adapter_parameters: int
    head_parameters: int
    frozen_parameters: int
    epochs: int
    steps: int
    cached_mib: float
    memory_mib: float
    seconds: float

    def line(self) -> str:
        """Return the plan on one line."""
        share = self.adapter_parameters / max(1, self.frozen_parameters + self.adapter_parameters)
        return (
            f"{self.method}: {self.adapter_parameters:,} adapter + {self.head_parameters:,} head parameters train "
            f"({share:.2%} of the encoder beside {self.frozen_parameters:,} frozen), {self.steps:,} steps in "
            f"{self.epochs} epochs over {self.bundles['train']:,} bundles, about {self.memory_mib / 1024:.1f} GiB, "
            f"about {duration(self.seconds)} on {self.processes} x {self.device} ({self.precision})"
        )


@dataclass(frozen=True)
class Row:
    """One line of the table: how well somebody completes the validation bundles.

    Attributes:
        values: metric -> mean over the questions. interval: 95 % of ndcg@10.
    """

    name: str
    values: dict[str, float]
    interval: tuple[float, float]


@dataclass(frozen=True)
class Gain:
    """NDCG@10 of the tuned over the frozen encoder, question by question.

    Attributes:
        p: two-sided paired permutation test by group.
    """

    value: float
    interval: tuple[float, float]
    p: float


@dataclass(frozen=True)
class TuneResult:
    """What a finished run leaves.

    Attributes:
        record: the stored adapter.
        rows: baselines, the frozen encoder before, the tuned one after.
        losses: one per optimizer step.
        chosen: what validation or the method chose: best step, strength of the head, ranks of AdaLoRA.
    """

    record: AdapterRecord
    plan: Plan
    rows: tuple[Row, ...]
    gain: Gain
    questions: int
    groups: int
    losses: tuple[float, ...]
    chosen: dict[str, Any]
    stopped_early: bool
    seconds: float
    peak_mib: float
    run_folder: Path


class Interrupted(TuningError):
    """The run was stopped from outside; its state is saved."""


class _Trainee(nn.Module):
    """Encoder and head behind one forward, as data-parallel wrappers want it."""

    def __init__(self, items: ItemEncoder, attached: AttachedAdapter, head: BundleHead) -> None:
        super().__init__()
        self.encoder = items.encoder
        self.head = head
        self._items = items
        self._attached = [attached]  # in a list, so that its modules are not registered a second time

    def forward(self, batch: BundleBatch, seed: int) -> Tensor:
        torch.manual_seed(_mixed(seed, self._items.process + 1))  # other texts, other masks
        vectors = self._items.vectors(self.encoder, batch.items)
        torch.manual_seed(_mixed(seed, 0))  # the loss is the same on every process
        loss = bundle_loss(self.head, vectors, batch)
        extra = self._attached[0].regularizer()
        return loss if extra is None else loss + extra


def tune(
    recipe: Recipe, *, resume: bool = False, run_folder: Path | None = None, watch: Watch | None = None
) -> TuneResult:
    """Run a recipe and store what comes out.

    Args:
        recipe: complete; `recipe_files.load_recipe` makes one of a name or file.
        resume: go on from the last checkpoint in the run folder.
        run_folder: checkpoints and the loss log; default ``runs/<recipe>``.
        watch: told of plan, steps and metrics, on the main process.
    Returns:
        the stored adapter, already reloaded and compared, with the before/after table.
    Raises:
        PeftComboError: anything a user can put right; checkpoints stay.
        Interrupted: SIGINT came; a checkpoint of the last whole step was written first.
    """
    started = time.perf_counter()
    recipe.ready()
    run_folder = run_folder or Path("runs") / recipe.name
    accelerator = _accelerator(recipe, run_folder)
    main = accelerator.is_main_process
    watch = watch if watch is not None and main else Watch()
    store = AdapterStore(recipe.store)
    if main:
        with store.writing(recipe.category):
            pass  # a store that cannot be written is better known now than after the training

    dataset = open_dataset(recipe.data)
    parts = split_as(dataset, recipe.data)
    for note in dataset.notes:
        watch.note(f"{dataset.name}: {note}")
    texts = dataset.catalog.texts(recipe.data.text)
    backbone = Backbone.of(recipe.backbone, accelerator.device)

    with torch.random.fork_rng(), _stop_asked() as stop:
        batches = _batches(recipe, dataset, parts, texts)
        steps_per_epoch, total = batches.per_epoch, batches.per_epoch * recipe.training.epochs
        attached = methods.attach(
            backbone.model, recipe.adapter, max_length=backbone.max_length, total_steps=total, seed=recipe.seed
        )
        set_dropout(attached.inner, recipe.training.encoder_dropout)
        head = BundleHead(backbone.dim, recipe.task).to(accelerator.device)
        watch.stage("Encoding the catalogue", len(set(texts)))
        items = ItemEncoder(
            backbone, attached, texts,
            fast=recipe.training.fast_path, cache_limit_bytes=recipe.training.cache_limit_mib * 2**20,
            process=accelerator.process_index, processes=accelerator.num_processes, progress=watch.advance,
        )  # fmt: skip
        trainee = _Trainee(items, attached, head)

        groups, rates = _parameter_groups(recipe.training, attached, head)

        # How good is it without tuning? The untrained head scores like cosine, so this is the frozen encoder.
        questions = Questions.of(dataset.bundles, parts.valid)
        asked = questions.sample(_ASKED_WHILE_TRAINING, recipe.seed)
        clock = time.perf_counter()
        with accelerator.autocast():
            ranks_before = completion_ranks(head, items.catalogue(items.frozen), questions)
        evaluation_seconds = time.perf_counter() - clock

        step_seconds = _probe(trainee, attached, batches, recipe)
        evaluate_every = max(1, round(recipe.training.evaluate_every * steps_per_epoch))
        plan = _plan(
            recipe, accelerator, backbone, attached, head, items, dataset, parts, total,
            total * step_seconds * recipe.training.accumulation + total / evaluate_every * evaluation_seconds,
        )  # fmt: skip
        watch.planned(plan)

        optimizer = _optimizer(recipe.training, groups)
        model, optimizer = accelerator.prepare(trainee, optimizer, device_placement=[False, False])
        parameters = [p for group in groups for p in group["params"]]

        progress = _Progress()
        if resume:
            progress = _restored(run_folder, recipe, dataset, attached, head, optimizer)
            watch.note(f"Going on after step {progress.step} of {total}.")
        log = _Log(run_folder / "log.jsonl", progress.step) if main else None

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
                    batch = batches.batch(step, part, recipe.training.accumulation)
                    loss = model(batch, _mixed(recipe.seed, step, part))
                    accelerator.backward(loss)
                    loss_sum += float(loss.detach())
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(parameters, recipe.training.max_grad_norm)
                        factor = learning_rate_factor(recipe.training, step, total)
                        for group, rate in zip(optimizer.param_groups, rates, strict=True):
                            group["lr"] = rate * factor
                    optimizer.step()
                    if accelerator.sync_gradients:
                        attached.after_step(step + 1)  # AdaLoRA reads the gradients: after the step, before clearing
                    optimizer.zero_grad()
            progress.step += 1
            progress.losses.append(loss_sum / recipe.training.accumulation)
            if not math.isfinite(progress.losses[-1]):
                raise TuningError(
                    f"The loss is not a number after step {progress.step}. Lower training.learning_rate (it is "
                    f"{recipe.training.learning_rate:g}) or training.max_grad_norm, and start anew."
                )
            if log is not None:
                log.add(progress.step, loss=progress.losses[-1], lr=rates[0] * factor)
            accelerator.log({"loss": progress.losses[-1], "learning_rate": rates[0] * factor}, step=progress.step)
            watch.stepped(progress.step, progress.losses[-1])

            if progress.step % evaluate_every == 0 or progress.step == total:
                values, strength = _evaluate(accelerator, items, trainee, attached, asked, recipe)
                best = _keep_if_best(progress, values, strength, recipe.training, attached, head)
                if log is not None:
                    log.add(progress.step, **values)
                accelerator.log({f"valid/{name}": value for name, value in values.items()}, step=progress.step)
                watch.evaluated(progress.step, values, best)
            interrupted = _any(accelerator, stop.is_set())
            if main and (interrupted or progress.step % recipe.training.checkpoint_every == 0):
                _checkpoint(progress, recipe, dataset, attached, head, optimizer).write(run_folder)
            if interrupted:
                accelerator.end_training()
                raise Interrupted(
                    f"Stopped after step {progress.step} of {total}; its state is in {run_folder}. "
                    "Go on with the same command and --resume."
                )

        if progress.best is None:  # without early stopping the last state is taken
            _, strength = _evaluate(accelerator, items, trainee, attached, asked, recipe)
        else:
            attached.load_state(progress.best.adapter, progress.best.values)
            head.load_state_dict(progress.best.head)
            strength = progress.best.strength
        head.load_state_dict(head.at_strength(strength).state_dict())
        set_training(attached.inner, attached.cut, False)
        head.eval()
        with accelerator.autocast():
            ranks_after = completion_ranks(head, items.catalogue(trainee.encoder), questions)
        rows, gain = _table(dataset, parts, texts, questions, ranks_before, ranks_after)
        best_step = progress.best.step if progress.best is not None else progress.step
        chosen = {"best_step": best_step, "strength": strength, **attached.summary()}
        if main:
            record = _store(store, recipe, backbone, attached, head, dataset, parts, texts, rows, gain, chosen)
            _forget_checkpoints(run_folder)
        accelerator.wait_for_everyone()
        if not main:
            record = store.open(recipe.category)
        items.close()
        accelerator.end_training()
    return TuneResult(
        record, plan, rows, gain, len(questions), len(set(questions.clusters.tolist())), tuple(progress.losses),
        chosen, progress.stopped_early, time.perf_counter() - started, peak_mib(), run_folder,
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
        accelerator.init_trackers(recipe.name, config=_flat(recipe.model_dump(mode="json")))
    return accelerator


def _batches(recipe: Recipe, dataset: Dataset, parts: Split, texts: Sequence[str]) -> BundleBatches:
    _, duplicates = np.unique(np.array(texts), return_inverse=True)
    leaf_names = [dataset.catalog.leaf(row) or "" for row in range(len(texts))]
    _, leaves = np.unique(np.array(leaf_names), return_inverse=True)
    bundles = [dataset.bundles.items[row] for row in parts.train]
    return BundleBatches(bundles, duplicates, leaves, recipe.task, recipe.training.batch_size, recipe.seed)


def _probe(trainee: _Trainee, attached: AttachedAdapter, batches: BundleBatches, recipe: Recipe) -> float:
    """Make sure that every trained tensor gets a gradient, and return the seconds of a forward and backward pass.

    All trained tensors are moved off their start first: a LoRA whose B is zero gives A no gradient, and a method that
    the encoder silently ignores would look just like it.
    """
    trained = {**{f"adapter: {k}": p for k, p in attached.trainable().items()},
               **{f"head: {k}": p for k, p in trainee.head.named_parameters() if p.requires_grad}}  # fmt: skip
    start = {name: p.detach().clone() for name, p in trained.items()}
    set_training(attached.inner, attached.cut, False)
    trainee.head.eval()
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = batches.batch(0, 0, recipe.training.accumulation)
    seconds = 0.0
    for _ in range(2):  # the first pass also pays for memory that the second finds ready
        trainee.zero_grad(set_to_none=True)
        clock = time.perf_counter()
        trainee(batch, recipe.seed).backward()
        seconds = time.perf_counter() - clock
    silent = [name for name, p in trained.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
    trainee.zero_grad(set_to_none=True)
    if silent:
        raise TuningError(
            f"{len(silent)} of {len(trained)} trained tensors get no gradient, so they would be stored untrained: "
            f"{', '.join(silent[:3])}{' ...' if len(silent) > 3 else ''}. The method {recipe.adapter.method} does not "
            f"reach this encoder's output; use another method or other adapter.targets."
        )
    return seconds


def _plan(
    recipe: Recipe, accelerator: Accelerator, backbone: Backbone, attached: AttachedAdapter, head: BundleHead,
    items: ItemEncoder, dataset: Dataset, parts: Split, total: int, seconds: float,
) -> Plan:  # fmt: skip
    return Plan(
        recipe=recipe.name,
        category=recipe.category,
        method=recipe.adapter.method,
        device=accelerator.device.type,
        processes=accelerator.num_processes,
        precision={"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
        + (f", {backbone.quantization} frozen weights" if backbone.quantization != "none" else ""),
        items=len(dataset.catalog),
        bundles={"train": len(parts.train), "valid": len(parts.valid), "test": len(parts.test)},
        adapter_parameters=sum(p.numel() for p in attached.trainable().values()),
        head_parameters=sum(p.numel() for p in head.parameters() if p.requires_grad),
        frozen_parameters=sum(p.numel() for p in backbone.model.parameters()),
        epochs=recipe.training.epochs,
        steps=total,
        cached_mib=items.cached_bytes / 2**20,
        memory_mib=peak_mib(),  # the probe has gone through a whole step, so the peak so far is that of the run
        seconds=seconds,
    )


def _parameter_groups(
    config: TrainingConfig, attached: AttachedAdapter, head: BundleHead
) -> tuple[list[dict[str, Any]], list[float]]:
    """Return the optimizer's groups and their peak learning rates; vectors and scalars are not decayed."""
    groups, rates = [], []
    head_rate = config.head_learning_rate if config.head_learning_rate is not None else config.learning_rate
    sides = ((list(attached.trainable().values()), config.learning_rate), (list(head.parameters()), head_rate))
    for parameters, rate in sides:
        for decayed in (True, False):
            chosen = [p for p in parameters if p.requires_grad and (p.ndim >= 2) == decayed]
            if chosen:
                decay = config.weight_decay if decayed else 0.0
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
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


@dataclass
class _Best:
    step: int
    value: float
    strength: float
    adapter: dict[str, Tensor]
    values: dict[str, Any]
    head: dict[str, Tensor]


@dataclass
class _Progress:
    """Where a run is."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    best: _Best | None = None
    waited: int = 0
    stopped_early: bool = False


def _evaluate(
    accelerator: Accelerator,
    items: ItemEncoder,
    trainee: _Trainee,
    attached: AttachedAdapter,
    questions: Questions,
    recipe: Recipe,
) -> tuple[dict[str, float], float]:
    """Return the validation metrics of the weights as they are, at the best strength of the head, and that strength."""
    set_training(attached.inner, attached.cut, False)
    trainee.head.eval()
    metric = recipe.training.early_stopping.metric if recipe.training.early_stopping else "ndcg@10"
    with accelerator.autocast():
        vectors = items.catalogue(trainee.encoder)
        tried = {
            share: metrics.ranking_metrics(completion_ranks(trainee.head.at_strength(share), vectors, questions))
            for share in (recipe.task.strengths if trainee.head.query_projection is not None else (1.0,))
        }
    strength = max(tried, key=lambda share: tried[share][metric])
    return tried[strength], strength


def _keep_if_best(
    progress: _Progress,
    values: Mapping[str, float],
    strength: float,
    config: TrainingConfig,
    attached: AttachedAdapter,
    head: BundleHead,
) -> bool:
    """Keep the weights if they are the best so far, and note when it is time to stop."""
    stopping = config.early_stopping
    if stopping is None or not attached.settled(progress.step):
        return False
    value = values[stopping.metric]
    if progress.best is not None and value <= progress.best.value:
        progress.waited += 1
        progress.stopped_early = progress.waited >= stopping.patience
        return False
    tensors, extra = attached.state()
    weights = {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}
    progress.best = _Best(progress.step, value, strength, tensors, extra, weights)
    progress.waited = 0
    return True


def _checkpoint(
    progress: _Progress, recipe: Recipe, dataset: Dataset, attached: AttachedAdapter, head: BundleHead, optimizer: Any
) -> Checkpoint:
    tensors, values = attached.state()
    groups = {
        "adapter": tensors,
        "head": dict(head.state_dict()),
        "optimizer": optimizer_tensors(optimizer.state_dict()["state"]),
    }
    best: dict[str, Any] | None = None
    if progress.best is not None:
        groups |= {"best-adapter": progress.best.adapter, "best-head": progress.best.head}
        best = {
            "step": progress.best.step,
            "value": progress.best.value,
            "strength": progress.best.strength,
            "values": progress.best.values,
        }
    scaler = getattr(optimizer, "scaler", None)
    return Checkpoint(
        progress.step,
        groups,
        {
            "recipe": recipe.model_dump(mode="json"),
            "data": dataset.digest,
            "adapter": values,
            "best": best,
            "losses": progress.losses,
            "waited": progress.waited,
            "stopped_early": progress.stopped_early,
            "scaler": scaler.state_dict() if scaler is not None else None,
        },
    )


def _restored(
    run_folder: Path, recipe: Recipe, dataset: Dataset, attached: AttachedAdapter, head: BundleHead, optimizer: Any
) -> _Progress:
    checkpoint = Checkpoint.latest(run_folder)
    if checkpoint is None:
        raise TuningError(
            f"No checkpoint in {run_folder} to resume from. Start the run without --resume; checkpoints are written "
            f"every {recipe.training.checkpoint_every} steps and on Ctrl-C."
        )
    values = checkpoint.values
    then, now = _flat(values["recipe"]), _flat(recipe.model_dump(mode="json"))
    changed = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key) and key != "store"]
    if changed:
        shown = ", ".join(f"{key} {then.get(key)} -> {now.get(key)}" for key in changed[:5])
        raise TuningError(
            f"The checkpoint in {run_folder} is of another recipe ({shown}). Resume with the recipe it was made with, "
            "or start anew without --resume."
        )
    if values["data"] != dataset.digest:
        raise TuningError(
            f"The data has changed since the checkpoint in {run_folder} (digest {values['data'][:12]}, now "
            f"{dataset.digest[:12]}). Start anew without --resume."
        )
    tensors = checkpoint.tensors
    attached.load_state(tensors["adapter"], values["adapter"])
    head.load_state_dict(tensors["head"])
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "state": optimizer_state(tensors["optimizer"])})
    if values["scaler"] is not None and getattr(optimizer, "scaler", None) is not None:
        optimizer.scaler.load_state_dict(values["scaler"])
    best = values["best"]
    return _Progress(
        checkpoint.step,
        list(values["losses"]),
        None
        if best is None
        else _Best(
            best["step"],
            best["value"],
            best["strength"],
            tensors["best-adapter"],
            best["values"],
            tensors["best-head"],
        ),
        values["waited"],
        values["stopped_early"],
    )


def _forget_checkpoints(run_folder: Path) -> None:
    for folder in run_folder.glob("step-*"):
        shutil.rmtree(folder, ignore_errors=True)


class _Log:
    """The run's own record, one JSON object a line; a resumed run drops what came after its checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if step and path.exists():
                kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            path.write_text("".join(f"{line}\n" for line in kept))
        except OSError as error:
            raise TuningError(f"The run folder {path.parent} cannot be written: {error.strerror}.") from error

    def add(self, step: int, **values: float) -> None:
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise TuningError(
                f"{self._path} cannot be written: {error.strerror}. Free some space, then go on with --resume."
            ) from error


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line: the run was killed while it wrote


def _table(
    dataset: Dataset, parts: Split, texts: Sequence[str], questions: Questions,
    before: NDArray[np.float64], after: NDArray[np.float64],
) -> tuple[tuple[Row, ...], Gain]:  # fmt: skip
    history = dataset.bundles.to_csr(len(dataset.catalog), parts.train)
    tfidf = tfidf_vectors(texts)
    ranks = {
        "popularity": _scorer_ranks(Popularity().fit(history), questions, len(texts)),
        "item-kNN": _scorer_ranks(ItemKNN().fit(history), questions, len(texts)),
        "TF-IDF title": _scorer_ranks(TextCosine().fit(history, items=tfidf), questions, len(texts)),
        "frozen backbone": before,
        "tuned": after,
    }
    rows = []
    for name, values in ranks.items():
        ndcg = metrics.per_query(values, "ndcg@10")
        interval = metrics.bootstrap_interval(ndcg, questions.clusters)
        rows.append(Row(name, metrics.ranking_metrics(values), interval))
    old, new = metrics.per_query(before, "ndcg@10"), metrics.per_query(after, "ndcg@10")
    gain = Gain(
        float((new - old).mean()),
        metrics.bootstrap_interval(new - old, questions.clusters),
        metrics.paired_permutation(new, old, questions.clusters),
    )
    return tuple(rows), gain


def _scorer_ranks(scorer: Scorer, questions: Questions, n_items: int) -> NDArray[np.float64]:
    contexts, excluded = questions.to_csr(n_items), questions.excluded()
    ranks = []
    for start in range(0, len(questions), _SCORE_BLOCK):
        block = slice(start, start + _SCORE_BLOCK)
        ranks.append(metrics.midranks(scorer.score_baskets(contexts[block]), questions.targets[block], excluded[block]))
    return np.concatenate(ranks)


def _store(
    store: AdapterStore, recipe: Recipe, backbone: Backbone, attached: AttachedAdapter, head: BundleHead,
    dataset: Dataset, parts: Split, texts: Sequence[str], rows: Sequence[Row], gain: Gain, chosen: Mapping[str, Any],
) -> AdapterRecord:  # fmt: skip
    """Write adapter and head, read them back, compare, and only then make the version visible."""
    values = {row.name: {**row.values, "ndcg@10": _with_interval(row)} for row in rows}
    with store.writing(recipe.category) as draft:
        attached.save(draft.path, backbone.base_name)
        save_file({k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}, draft.path / HEAD_FILE)
        reloaded = methods.load(backbone.model, draft.path, attached.stored_as, backbone.max_length)
        sample = list(dict.fromkeys(texts))[:_RELOAD_SAMPLE]
        set_training(attached.inner, attached.cut, False)
        difference = float(np.abs(backbone.encode(sample, attached) - backbone.encode(sample, reloaded)).max())
        if not difference <= _RELOAD_TOLERANCE:
            raise TuningError(
                "The stored adapter, read back, gives other vectors than the trained one (difference "
                f"{difference:.1e}, allowed {_RELOAD_TOLERANCE:.0e}); nothing was stored. Please report it."
            )
        return draft.commit(
            {
                "method": recipe.adapter.method,
                "stored_as": attached.stored_as,
                "task": head.spec(),
                "backbone": backbone.stamp(),
                "recipe": recipe.model_dump(mode="json"),
                "data": {
                    "name": dataset.name,
                    "digest": dataset.digest,
                    "split_digest": parts.digest,
                    "items": len(dataset.catalog),
                    "bundles": {"train": len(parts.train), "valid": len(parts.valid), "test": len(parts.test)},
                },
                "metrics": {
                    "before": values["frozen backbone"],
                    "after": values["tuned"],
                    "baselines": {name: values[name] for name in ("popularity", "item-kNN", "TF-IDF title")},
                    "gain": {"value": gain.value, "low": gain.interval[0], "high": gain.interval[1], "p": gain.p},
                    "protocol": PROTOCOL,
                    **chosen,
                },
                "versions": _versions(),
            }
        )


def _with_interval(row: Row) -> dict[str, float]:
    return {"value": row.values["ndcg@10"], "low": row.interval[0], "high": row.interval[1]}


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("peft-combo", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout
            found[package] = "unknown"
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as dotted keys with printable values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else json.dumps(value)
    return flat


def _mixed(*numbers: int) -> int:
    """Return a 63-bit seed that any change of any number changes."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


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


def peak_mib() -> float:
    """Return the peak memory so far in MiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return 0.0
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def duration(seconds: float) -> str:
    """Return seconds the way people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
