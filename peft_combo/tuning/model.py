"""Training model: encoder, adapter and head behind one forward pass that returns the loss.

Owns the randomness of a pass, which is a function of the seed it is given. Changes no weight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peft_combo.encoder.heads.base import TaskHead
from peft_combo.encoder.methods.attached import AttachedAdapter
from peft_combo.tuning.item_encoder import ItemEncoder, Selection
from peft_combo.tuning.seeds import mix_seed
from peft_combo.tuning.step import StepExtensions
from peft_combo.tuning.tasks.base import AnyTask, Batch, RetokenizedBatch

if TYPE_CHECKING:
    from peft_combo.tuning.item_pictures import ItemPictures


class TrainingModel(nn.Module):
    """Encoder and head behind one forward, as data-parallel wrappers want it.

    Args:
        extensions: what stands around a step; default nothing.
        pictures: encodes the pictures of items, which go beside their texts; None where the head reads none.
    """

    def __init__(
        self, task: AnyTask, items: ItemEncoder, attached: AttachedAdapter, head: TaskHead,
        extensions: StepExtensions | None = None, pictures: ItemPictures | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = items.encoder
        self.head = head
        self._task = task
        self._items = items
        self._attached = [attached]  # in a list, so that its modules are not registered a second time
        self._extensions = StepExtensions() if extensions is None else extensions
        self._pictures = pictures

    def forward(self, batch: Batch, seed: int, added: Tensor | None = None) -> Tensor:
        """Return the scalar loss of a batch.

        Args:
            seed: draws dropout masks and whatever the extensions draw.
            added: (S, D), goes onto the `entering_states` of the same batch and seed.
        """
        selection = replace(self._select(batch, seed), added=added)

        def predict(dropout: int) -> Tensor:
            torch.manual_seed(mix_seed(dropout, self._items.process + 1))  # other texts, other masks
            encoded = self._items.encode_selection(self.encoder, selection)
            if self._pictures is not None:
                encoded = torch.cat([encoded, self._pictures.encode(batch.items)], dim=1)
            torch.manual_seed(mix_seed(dropout, 0))  # the loss is the same on every process
            return self._task.logits(self.head, encoded, batch)

        loss = self._extensions.compute_loss(predict, lambda logits: self._task.loss(logits, batch), seed)
        extra = self._attached[0].regularizer()
        return loss if extra is None else loss + extra

    def entering_states(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
        """Return the states that enter the layers that learn, see `ItemEncoder.entering_states`."""
        return self._items.entering_states(self._select(batch, seed))

    def _select(self, batch: Batch, seed: int) -> Selection:
        tokens = batch.tokens if isinstance(batch, RetokenizedBatch) else None
        return self._extensions.choose_texts(self._items.select(batch.items, tokens), seed)


def collect_trained_parameters(attached: AttachedAdapter, head: TaskHead) -> dict[str, nn.Parameter]:
    """Return the parameters of adapter and head that learn, by name."""
    return {**{f"adapter: {k}": p for k, p in attached.trainable().items()},
            **{f"head: {k}": p for k, p in head.named_parameters() if p.requires_grad}}  # fmt: skip
