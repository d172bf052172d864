"""The encoder that answers queries: torch, or a smaller form of it that passed the gate of `adapters export`.

Owns which form an adapter has by now. Item vectors are torch's in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peft_combo.adapters.serving_encoder import EncoderKind, open_encoder
from peft_combo.data.model import Dataset
from peft_combo.data.queries import Queries
from peft_combo.data.splits import Split
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import LiveAdapter


class Encoders:
    """Encodes texts with an adapter: ``encoders(texts, adapter)``; by torch where no other form was opened.

    Args:
        folder: where other forms are kept, made at their first use.
    """

    def __init__(self, backbone: Backbone, kind: EncoderKind, dataset: Dataset, parts: Split, folder: Path) -> None:
        self._backbone, self._kind, self._dataset, self._parts, self._folder = backbone, kind, dataset, parts, folder
        self._opened: dict[str, Callable[[Sequence[str]], NDArray[np.float32]]] = {}

    def open(self, adapter: LiveAdapter | None) -> None:
        """Make sure that an adapter, None for the frozen encoder, is there in the form that was asked for.

        Raises:
            ExportError: the form loses more than the gate allows. PeftComboError: it cannot be made.
        """
        key = "" if adapter is None else adapter.digest
        if self._kind == "torch" or key in self._opened:
            return
        texts = self._dataset.plain if adapter is None else self._dataset.texts
        questions = Queries.of(self._dataset.bundles, self._parts.valid)
        self._opened[key] = open_encoder(
            self._kind, self._backbone, adapter, folder=self._folder, texts=texts, questions=questions
        )

    def close(self, digest: str) -> None:
        """Let the form of an adapter go."""
        self._opened.pop(digest, None)

    def __call__(self, texts: Sequence[str], adapter: LiveAdapter | None) -> NDArray[np.float32]:
        encode = self._opened.get("" if adapter is None else adapter.digest)
        if encode is not None:
            return encode(texts)
        return self._backbone.encode(texts, None if adapter is None else adapter.attached)
