"""Frozen weights in fewer bits: what learns stays in float32, and weights of other bits are told apart."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.recipe.model import Recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.loop import tune


def test_only_frozen_weights_are_quantised_and_another_quantisation_is_told_once(
    tiny_recipe: Callable[..., Recipe], tiny_bert: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(**{"training.epochs": 1, "backbone.quantization": "8bit", "adapter.dropout": 0.0})
    record = tune(recipe, run_folder=tmp_path / "run").record
    tune(recipe, run_folder=tmp_path / "run")
    assert record.manifest.backbone.quantization == "8bit"
    tensors = {**load_file(record.file(HEAD_FILE)), **load_file(record.file("adapter_model.safetensors"))}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}

    store, texts = AdapterStore(recipe.store), ["w10 w41 w121", "w12 w50"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = Backbone.load(str(tiny_bert), max_length=16, quantization="8bit")
        as_tuned = AdapterBank(same, store).encode(texts, "tiny@v1")
    assert same.fingerprint == Backbone.load(str(tiny_bert)).fingerprint  # of the weights as published
    whole = Backbone.load(str(tiny_bert), max_length=16)
    bank = AdapterBank(whole, store)
    with pytest.warns(UserWarning, match=r"quantization 8bit.*learns to make up for the rounding"):
        drifted = bank.encode(texts, "tiny@v1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank.encode(texts, "tiny@v2")
    drift = float(np.abs(drifted - as_tuned).max())
    assert 0 < drift < 0.05

    def quantised(model: Any) -> int:
        return sum(type(module).__module__.startswith("bitsandbytes") for module in model.modules())

    assert quantised(same.model) == 3 * 6
    assert quantised(bank.get("tiny@v1").head) == 0
