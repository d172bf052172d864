"""Setup of a tuning run: encoder, adapter, head and training model, and what is measured on them before the first step.

Owns how a recipe becomes something that learns, and how the weights are judged as they are. Takes no step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from peft_combo.callbacks import RunCallback
from peft_combo.data.augmentation.variants import Rewrite
from peft_combo.data.pictures import read_pictures
from peft_combo.encoder import methods
from peft_combo.encoder.architectures import count_bytes, set_dropout, set_training
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.base import TaskHead
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.recipe.model import Recipe
from peft_combo.store.versions import AdapterRecord
from peft_combo.tuning.adversarial import count_passes
from peft_combo.tuning.augmentation import build_text_variants
from peft_combo.tuning.extensions import build_extensions
from peft_combo.tuning.figures import ComputeSetting, Costs, Plan, build_plan, count_evaluations
from peft_combo.tuning.item_encoder import ItemEncoder
from peft_combo.tuning.model import TrainingModel, collect_trained_parameters
from peft_combo.tuning.plan import build_autocast, find_heaviest_batch
from peft_combo.tuning.probe import probe
from peft_combo.tuning.resources import measure, measure_gpu_workspace, resident_mib
from peft_combo.tuning.step import StepExtensions
from peft_combo.tuning.tasks.base import AnyTask, Encode, Evaluation, PicturedTask
from peft_combo.tuning.warm_start import load_start

if TYPE_CHECKING:
    from peft_combo.tuning.item_pictures import ItemPictures


@dataclass(frozen=True, eq=False)
class Setup:
    """What a run works on. `attached` and `head` learn in place; nothing here is exchanged.

    Attributes:
        pictures: encodes pictures of items beside their texts; None where the head reads none.
        model: encoder and head behind one forward pass.
        extensions: what the recipe adds around a step.
        head_start: weights of a stored head to go on from; None where there is none.
        pretrained: whether the adapter starts from a stored one that has no head for this task.
        base_mib: memory of the process before the encoder was loaded.
    """

    recipe: Recipe
    accelerator: Accelerator
    task: AnyTask
    backbone: Backbone
    attached: AttachedAdapter
    head: TaskHead
    items: ItemEncoder
    pictures: ItemPictures | None
    model: TrainingModel
    extensions: StepExtensions
    head_start: dict[str, Tensor] | None
    pretrained: bool
    base_mib: float

    @classmethod
    def build(
        cls, recipe: Recipe, accelerator: Accelerator, task: AnyTask, callback: RunCallback,
        start: AdapterRecord | None = None, rewrite: Rewrite | None = None,
    ) -> Setup:  # fmt: skip
        """Load the encoder, put adapter and head on it, and encode what the frozen layers make of the texts.

        Args:
            start, rewrite: see `tune`.
        Raises:
            PeftComboError: whatever of this does not work.
        """
        variants, notes = build_text_variants(recipe, task, rewrite)
        for note in (*task.notes, *notes):
            callback.on_note(note)
        base_mib = resident_mib()
        backbone = Backbone.of(recipe.backbone, accelerator.device)
        for note in backbone.notes:
            callback.on_note(note)
        attached = methods.attach(
            backbone.model, recipe.adapter, max_length=backbone.max_length,
            total_steps=task.per_epoch * recipe.training.epochs, seed=recipe.seed, tokenizer=backbone.tokenizer,
        )  # fmt: skip
        set_dropout(attached.inner, recipe.training.encoder_dropout)
        head = task.head(backbone, attached.max_length).to(accelerator.device)
        head_start = None if start is None else load_start(start, backbone, attached, head, task.texts)
        extra_texts = () if variants is None else tuple(variants)
        callback.on_stage("Encoding the texts", len({*task.texts, *extra_texts}))
        items = ItemEncoder(
            backbone, attached, task.texts, per_token=task.per_token, retokenized=task.retokenized,
            extra_texts=extra_texts, fast=recipe.training.fast_path,
            cache_limit_bytes=recipe.training.cache_limit_mib * 2**20, process=accelerator.process_index,
            processes=accelerator.num_processes, progress=callback.on_advance,
        )  # fmt: skip
        pictures = _encode_pictures(recipe, task, backbone, head, callback)
        parameters = collect_trained_parameters(attached, head)
        extensions = build_extensions(recipe.training, items, parameters, variants, task.exclusive)
        return cls(
            recipe, accelerator, task, backbone, attached, head, items, pictures,
            TrainingModel(task, items, attached, head, extensions, pictures), extensions, head_start,
            pretrained=start is not None and head_start is None, base_mib=base_mib,
        )  # fmt: skip

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run."""
        return self.task.per_epoch * self.recipe.training.epochs

    def train(self) -> None:
        """Let dropout drop, in the layers that learn and the head."""
        set_training(self.attached.inner, self.attached.first_layer, True)
        self.head.train()

    def stop_training(self) -> None:
        """Let dropout rest."""
        set_training(self.attached.inner, self.attached.first_layer, False)
        self.head.eval()

    @property
    def encode(self) -> Encode:
        """Encodes texts with the adapter as it is, and the pictures beside them."""
        return self._add_pictures(partial(self.items.catalogue, self.model.encoder))

    def _add_pictures(self, encode: Encode) -> Encode:
        pictures = self.pictures
        return encode if pictures is None else lambda rows: np.hstack([encode(rows), pictures.catalogue(rows)])

    def evaluate(self) -> Evaluation:
        """Return the validation metrics of the weights as they are."""
        self.stop_training()
        with self.accelerator.autocast():
            return self.task.evaluate(self.head, self.encode, self.recipe.metric)

    def predict(self) -> Any:
        """Return the predictions for the table, with the weights as they are."""
        self.stop_training()
        with self.accelerator.autocast():
            return self.task.predict(self.head, self.encode)

    def measure_baseline(self) -> tuple[Any, float]:
        """Make the head as good as it gets over the frozen encoder, then give it the weights it starts from.

        Returns:
            predictions of the frozen encoder for the table, and the seconds they took.
        """
        frozen = self._add_pictures(partial(self.items.catalogue, self.items.frozen))
        self.stop_training()
        with self.accelerator.autocast():
            self.task.start(self.head, frozen)
            clock = time.perf_counter()
            before = self.task.predict(self.head, frozen)
            seconds = time.perf_counter() - clock
            if self.head_start is not None:
                self.head.load_state_dict(self.head_start)
            elif self.pretrained:  # its states are not the frozen encoder's, so the head suits them first
                self.task.start(self.head, self.encode)
        return before, seconds

    def measure_plan(self, baseline_seconds: float) -> Plan:
        """Take one evaluation and one step that changes nothing, and say what the run will do and need.

        Raises:
            TuningError: a trained tensor gets no gradient.
        """
        recipe, training, accelerator = self.recipe, self.recipe.training, self.accelerator
        evaluation_seconds, evaluation_mib = measure(self.evaluate)
        with build_autocast(accelerator.device.type, accelerator.mixed_precision):
            batch = find_heaviest_batch(self.task, training)
            found: list[tuple[float, int]] = []
            probed = measure(lambda: found.append(probe(self.model, self.attached, self.head, batch, recipe)))
        ((step_seconds, step_bytes),) = found
        on_gpu = accelerator.device.type != "cpu"
        weight_bytes = count_bytes(self.backbone.model)
        vectors_mib = 4 * self.backbone.dim * self.items.rows / 2**20
        if on_gpu:
            own = (self.backbone.model, self.attached.encoder, self.head)
            kept_mib = measure_gpu_workspace(*own) - self.items.cached_bytes / 2**20
        else:
            kept_mib = resident_mib() - self.base_mib - (weight_bytes + self.items.cached_bytes) / 2**20
        seconds = self.total * step_seconds * training.accumulation * count_passes(training)
        seconds += count_evaluations(training, self.task.per_epoch) * evaluation_seconds + baseline_seconds
        setting = ComputeSetting(
            device=accelerator.device.type,
            processes=accelerator.num_processes,
            precision=accelerator.mixed_precision,
            frozen_parameters=sum(p.numel() for p in self.backbone.model.parameters()),
            head_parameters=sum(p.numel() for p in self.head.parameters() if p.requires_grad),
        )
        costs = Costs(
            base=self.base_mib,
            frozen=weight_bytes / 2**20,
            loading=weight_bytes / 2**20,
            step=probed[1] if on_gpu else step_bytes / 2**20,  # a GPU's allocator counts temporary results too
            states=self.items.cached_bytes / 2**20,
            vectors=vectors_mib,
            evaluation=evaluation_mib if on_gpu else max(0.0, evaluation_mib - vectors_mib),
            allocator=max(0.0, kept_mib),
            seconds=seconds,
        )
        return build_plan(recipe, self.task, self.attached, setting, costs)


def _encode_pictures(
    recipe: Recipe, task: AnyTask, backbone: Backbone, head: TaskHead, callback: RunCallback
) -> ItemPictures | None:
    """Encode the pictures of a task's items where its head reads them."""
    view = head.picture if isinstance(head, BundleHead) else None
    if view is None or not isinstance(task, PicturedTask):
        return None
    from peft_combo.tuning.item_pictures import ItemPictures

    callback.on_stage("Encoding the pictures", sum(picture is not None for picture in task.pictures))
    contents = read_pictures(task.pictures, str(task.data["name"]))
    return ItemPictures(
        backbone.need_pictures(), view, contents, cache_limit_bytes=recipe.training.cache_limit_mib * 2**20,
        progress=callback.on_advance,
    )  # fmt: skip
