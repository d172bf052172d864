"""Pruned encoders answer for what they keep as before, or say what they lost; a service opens no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_bank import store_adapter
from test_exporting import QUESTIONS, TEXTS, by_its_card

from peft_combo.adapters import serving_encoder
from peft_combo.adapters.export import ExportError, export
from peft_combo.adapters.parity import ParityGate, ParityRow
from peft_combo.adapters.pruning import Pruning, prune
from peft_combo.adapters.serving_encoder import open_encoder
from peft_combo.encoder.architectures import count_bytes, find_layers
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank, LiveAdapter
from peft_combo.errors import BackboneError
from peft_combo.recipe.adapter import LoraAdapter, PrefixAdapter
from peft_combo.store.adapter_store import AdapterStore


@pytest.fixture(scope="module")
def backbone(tiny_bert: Path) -> Backbone:
    return Backbone.load(str(tiny_bert), max_length=12)


@pytest.fixture(scope="module")
def bank(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> AdapterBank:
    return AdapterBank(backbone, AdapterStore(tmp_path_factory.mktemp("adapters")))


@pytest.fixture(scope="module")
def lora(bank: AdapterBank) -> LiveAdapter:
    return bank.get(store_adapter(bank.store, bank.backbone, "lora", LoraAdapter(rank=4)).reference)


@pytest.fixture(scope="module")
def onnx() -> Any:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install 'peft-combo[onnx]'")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; pip install 'peft-combo[onnx]'")
    return pytest.importorskip("onnx", reason="onnx is not installed; pip install 'peft-combo[onnx]'")


# --- what is taken out ------------------------------------------------------------------------------------------------


def test_a_cut_vocabulary_changes_no_vector_of_the_catalogue_and_still_reads_any_word(backbone: Backbone) -> None:
    small, (note,) = prune(backbone, backbone.model, TEXTS[:20], 12, Pruning(vocabulary=True))
    np.testing.assert_array_equal(small.encode(TEXTS[:20]), backbone.encode(TEXTS[:20]))
    kept, before = small.model.config.vocab_size, backbone.model.config.vocab_size  # type: ignore[union-attr]
    assert kept < before
    assert re.fullmatch(rf"kept {kept} of {before} tokens", note)
    assert small.model.get_input_embeddings().num_embeddings == kept == len(small.tokenizer)  # type: ignore[operator]
    assert count_bytes(small.model) < count_bytes(backbone.model)
    assert backbone.model.config.vocab_size == before  # type: ignore[union-attr]
    assert np.isfinite(small.encode(["never seen"])).all()


def test_a_head_that_is_cut_out_is_a_head_that_says_nothing(backbone: Backbone) -> None:
    small, (note,) = prune(backbone, backbone.model, TEXTS, 12, Pruning(heads=1))
    layers, before = find_layers(small.model), find_layers(backbone.model)
    (number,) = [n for n, layer in enumerate(layers) if layer.attention.self.num_attention_heads == 3]  # type: ignore[union-attr]
    assert "took out 1 of 12 heads" in note
    distances = []
    for layer in before:
        out, width = layer.attention.output.dense, layer.attention.self.attention_head_size  # type: ignore[union-attr]
        for head in range(4):
            kept = out.weight.clone()
            with torch.no_grad():
                out.weight[:, head * width : (head + 1) * width] = 0
            distances.append((backbone.encode(TEXTS), layer))
            with torch.no_grad():
                out.weight.copy_(kept)
    ours, whole = small.encode(TEXTS), backbone.encode(TEXTS)
    nearest = min(distances, key=lambda one: np.abs(one[0] - ours).max())
    np.testing.assert_allclose(ours, nearest[0], atol=1e-5)
    assert nearest[1] is before[number]
    least = min(float((1 - (vectors * whole).sum(1)).mean()) for vectors, _ in distances)
    assert float((1 - (ours * whole).sum(1)).mean()) == pytest.approx(least, rel=0.2)  # weighed on a sample


def test_the_layer_that_matters_least_goes(backbone: Backbone) -> None:
    small, (note,) = prune(backbone, backbone.model, TEXTS, 12, Pruning(layers=1))
    assert len(find_layers(small.model)) == small.layers == backbone.layers - 1
    gone = int(re.search(r"took out layers (\d)", note)[1])  # type: ignore[index]
    left = [layer for number, layer in enumerate(find_layers(backbone.model)) if number != gone]
    assert torch.equal(left[0].output.dense.weight, find_layers(small.model)[0].output.dense.weight)  # type: ignore


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (Pruning(layers=3), "has 3 layers, and at least one has to stay"),
        (Pruning(heads=10), "has 12 heads in 3 layers, .* at most 9"),
    ],
)
def test_something_has_to_stay(pruning: Pruning, message: str, backbone: Backbone) -> None:
    with pytest.raises(BackboneError, match=message):
        prune(backbone, backbone.model, TEXTS, 12, pruning)


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_the_gate_tells_each_loss_with_its_figure() -> None:
    def row(name: str, agreement: float, ndcg: float | None) -> ParityRow:
        return ParityRow(name, 0.0, 0.0, agreement, agreement, ndcg, 0.0, 1, {})

    ours, gate = row("torch", 1.0, 0.3), ParityGate(0.95, 0.01)
    assert gate.find_losses(row("x", 0.95, 0.291), ours) == []
    assert gate.find_losses(row("x", 0.96, None), ours) == []
    near, ndcg = gate.find_losses(row("x", 0.90, 0.28), ours)
    assert near == "at least 0.95 of the 10 nearest neighbours of a text to stay, found x 0.9000"
    assert ndcg == "at most 0.01 NDCG@10 to be lost, found x 0.2800 after 0.3000"
    with pytest.raises(ExportError, match="max_ndcg_loss: expected a loss from 0 to 1, found 2"):
        ParityGate(0.9, 2)


def test_a_pruned_export_runs_without_us_and_says_what_is_missing(
    lora: LiveAdapter, backbone: Backbone, tmp_path: Path
) -> None:
    cut = Pruning(vocabulary=True)
    done = export(lora, backbone, tmp_path / "a", "merged", texts=TEXTS, questions=QUESTIONS, pruning=cut)
    np.testing.assert_allclose(by_its_card(done.folder, TEXTS), backbone.encode(TEXTS, lora.attached), atol=1e-5)
    assert (done.pruned, done.written.agreement, done.written.ndcg) == ("vocabulary", 1.0, done.rows[0].ndcg)
    assert done.written.nbytes < done.rows[0].nbytes
    with pytest.raises(
        ExportError, match=r"(?s)0.95 of the 10 nearest.*Pruned: took out layers \d.*Nothing was written.*prune less"
    ):
        export(lora, backbone, tmp_path / "b", "merged", texts=TEXTS, pruning=Pruning(layers=1))
    with pytest.raises(ExportError, match="different numbers of heads"):
        export(lora, backbone, tmp_path / "b", "merged", texts=TEXTS, pruning=Pruning(heads=1))
    assert not (tmp_path / "b").exists()
    cut = Pruning(layers=1)
    loose = export(
        lora, backbone, tmp_path / "b", "merged", texts=TEXTS, pruning=cut, min_agreement=0.0, max_ndcg_loss=1.0
    )
    assert by_its_card(loose.folder, TEXTS).shape == (80, backbone.dim)


def test_what_cannot_be_merged_is_not_pruned(bank: AdapterBank, tmp_path: Path) -> None:
    live = bank.get(store_adapter(bank.store, bank.backbone, "prefix", PrefixAdapter(length=4)).reference)
    with pytest.raises(BackboneError, match="cannot be merged"):
        export(live, bank.backbone, tmp_path / "a", "onnx", texts=TEXTS, pruning=Pruning(vocabulary=True))


# --- serving ----------------------------------------------------------------------------------------------------------


def test_a_service_opens_every_kind_and_gets_the_same_vectors(
    onnx: Any, lora: LiveAdapter, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = backbone.encode(TEXTS, lora.attached)
    asked = [*TEXTS[5:9], TEXTS[5]]
    plain = open_encoder("torch", backbone, lora)
    np.testing.assert_allclose(plain(asked), [*ours[5:9], ours[5]], atol=1e-6)
    for kind in ("onnx", "pruned"):
        opened = open_encoder(kind, backbone, lora, folder=tmp_path, texts=TEXTS, questions=QUESTIONS)  # type: ignore
        vectors: NDArray[np.float32] = opened(TEXTS)
        np.testing.assert_allclose(vectors, ours, atol=1e-5)
        assert opened(TEXTS[:1]).dtype == np.float32
        assert opened.rows[-1].agreement == 1.0
    assert opened.folder is not None
    assert opened.rows[-1].nbytes < next(tmp_path.glob("onnx-*/model.onnx")).stat().st_size

    # A second start reads what is there; a damaged file is made anew.
    graph = opened.folder / "model.onnx"
    content, made = graph.read_bytes(), graph.stat().st_mtime_ns
    open_encoder("pruned", backbone, lora, folder=tmp_path, texts=TEXTS)
    assert graph.stat().st_mtime_ns == made
    graph.write_bytes(content[:-1] + b"x")
    monkeypatch.setattr(serving_encoder, "export", lambda *_, **__: pytest.fail("made anew"))
    with pytest.raises(pytest.fail.Exception, match="made anew"):
        open_encoder("pruned", backbone, lora, folder=tmp_path, texts=TEXTS)


def test_the_frozen_encoder_is_exported_without_a_head(backbone: Backbone, tmp_path: Path) -> None:
    done = export(None, backbone, tmp_path / "a", "merged", texts=TEXTS, questions=QUESTIONS)
    np.testing.assert_allclose(by_its_card(done.folder, TEXTS), backbone.encode(TEXTS), atol=1e-5)
    assert done.written.ndcg == done.rows[0].ndcg is not None
    assert not list(done.folder.glob("head*"))
    with pytest.raises(ValueError, match="folder: expected"):
        open_encoder("int8", backbone, None)
