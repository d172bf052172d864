"""Conformance of the adapter methods: the same claims for each, over tiny real encoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import build_encoder
from transformers import AutoModel

from peft_combo import methods
from peft_combo.architectures import lower_view, sharing_copy, upper_view
from peft_combo.backbone import Backbone
from peft_combo.errors import BackboneError, StoreError
from peft_combo.recipe import (
    AdaloraAdapter,
    AdapterConfig,
    FullTuning,
    HeadOnly,
    LoraAdapter,
    PrefixAdapter,
    TopLayers,
)

METHODS: dict[str, AdapterConfig] = {
    "lora": LoraAdapter(rank=4),
    "lora-top": LoraAdapter(rank=4, top_layers=1, targets="query+value"),
    "rslora": LoraAdapter(rank=4, rslora=True),
    "adalora": AdaloraAdapter(initial_rank=4, target_rank=2, allocate_every=1),
    "prefix": PrefixAdapter(length=4),
    "prefix-projection": PrefixAdapter(length=4, projection=True, projection_size=16),
    "top-layers": TopLayers(layers=1),
    "full": FullTuning(),
    "head": HeadOnly(),
}
PEFT_METHODS = [name for name in METHODS if name not in ("top-layers", "full", "head")]
IDENTITY_AT_START = [name for name in METHODS if not name.startswith("prefix")]
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w12 w13"]


@pytest.fixture(scope="module")
def backbone(tiny_bert: Path) -> Backbone:
    return Backbone.load(str(tiny_bert), max_length=16)


def attach(backbone: Backbone, method: str, seed: int = 0) -> methods.AttachedAdapter:
    attached = methods.attach(backbone.model, METHODS[method], max_length=16, total_steps=20, seed=seed)
    attached.encoder.eval()
    return attached


def train(backbone: Backbone, attached: methods.AttachedAdapter, steps: int = 20) -> None:
    """Pull the vectors of four texts towards fixed random directions."""
    wanted = torch.nn.functional.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    parameters = list(attached.trainable().values())
    if not parameters:
        return
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    ids, mask = backbone.tokenize(TEXTS).padded(np.arange(4), backbone.pad_id)
    for step in range(1, steps + 1):
        pooled = backbone.pool(attached.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
        loss = -(pooled * wanted).sum(1).mean()
        extra = attached.regularizer()
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        attached.after_step(step)
        optimizer.zero_grad()


@pytest.mark.parametrize("method", IDENTITY_AT_START)
def test_an_untrained_adapter_changes_nothing(backbone: Backbone, method: str) -> None:
    np.testing.assert_allclose(backbone.encode(TEXTS, attach(backbone, method)), backbone.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_adapter_and_leaves_the_backbone(backbone: Backbone, method: str) -> None:
    frozen, weights = backbone.encode(TEXTS), {k: v.clone() for k, v in backbone.model.state_dict().items()}
    attached = attach(backbone, method)
    before = backbone.encode(TEXTS, attached)
    train(backbone, attached)
    after = backbone.encode(TEXTS, attached)
    assert (np.abs(after - before).max() > 1e-3) == (method != "head")
    np.testing.assert_array_equal(backbone.encode(TEXTS), frozen)
    assert all(torch.equal(weights[name], tensor) for name, tensor in backbone.model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_it_encodes_the_same(backbone: Backbone, method: str, tmp_path: Path) -> None:
    attached = attach(backbone, method)
    train(backbone, attached)
    attached.save(tmp_path, "tiny")
    loaded = methods.load(backbone.model, tmp_path, attached.stored_as, 16)
    np.testing.assert_allclose(backbone.encode(TEXTS, loaded), backbone.encode(TEXTS, attached), atol=2e-6)
    assert not any(parameter.requires_grad for parameter in loaded.encoder.parameters())


# transformers' own attribute, which it deprecates, is read by peft when a prompt-learning model is made.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", PEFT_METHODS)
def test_plain_peft_opens_the_folder(backbone: Backbone, tiny_bert: Path, method: str, tmp_path: Path) -> None:
    attached = attach(backbone, method)
    train(backbone, attached)
    attached.save(tmp_path, str(tiny_bert))
    plain = peft.PeftModel.from_pretrained(
        AutoModel.from_pretrained(tiny_bert, add_pooling_layer=False), str(tmp_path)
    ).eval()
    ids, mask = backbone.tokenize(TEXTS).padded(np.arange(4), backbone.pad_id)
    with torch.no_grad():
        vectors = backbone.pool(plain(input_ids=ids, attention_mask=mask).last_hidden_state, mask).numpy()
    np.testing.assert_allclose(vectors, backbone.encode(TEXTS, attached), atol=2e-6)


def test_adapters_of_all_methods_live_side_by_side(backbone: Backbone) -> None:
    alone, attached = {}, {}
    for seed, method in enumerate(METHODS):
        attached[method] = attach(backbone, method, seed)
        train(backbone, attached[method], 5)
        alone[method] = backbone.encode(TEXTS, attached[method])
    for method in [*METHODS, *reversed(METHODS)]:
        np.testing.assert_array_equal(backbone.encode(TEXTS, attached[method]), alone[method])


@pytest.mark.parametrize("method", METHODS)
def test_state_goes_on_where_it_was(backbone: Backbone, method: str) -> None:
    straight, stopped, resumed = (attach(backbone, method) for _ in range(3))
    train(backbone, straight, 12)
    train(backbone, stopped, 12)
    resumed.load_state(*stopped.state())
    np.testing.assert_array_equal(backbone.encode(TEXTS, resumed), backbone.encode(TEXTS, straight))


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].method in ("lora", "adalora")])
def test_what_is_below_the_cut_is_the_frozen_encoder(backbone: Backbone, method: str) -> None:
    attached = attach(backbone, method)
    train(backbone, attached, 5)
    ids, mask = backbone.tokenize(TEXTS).padded(np.arange(4), backbone.pad_id)
    with torch.no_grad():
        states = lower_view(backbone.model, attached.cut)(input_ids=ids, attention_mask=mask).last_hidden_state
        upper = upper_view(attached.inner, attached.cut)(inputs_embeds=states, attention_mask=mask).last_hidden_state
        whole = attached.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(upper[mask.bool()], whole[mask.bool()], atol=1e-6, rtol=1e-5)


def test_adalora_meets_its_budget_and_folds_exactly_to_lora(backbone: Backbone, tmp_path: Path) -> None:
    attached = attach(backbone, "adalora")
    assert not attached.settled(5)
    train(backbone, attached)
    assert attached.settled(20)
    ranks = attached.summary()["ranks"]
    assert sum(ranks.values()) == 2 * len(ranks)
    attached.save(tmp_path, "tiny")
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert config.peft_type == "LORA"
    assert config.rank_pattern == {name: rank for name, rank in ranks.items() if rank}


def test_adaloras_orthogonality_term_is_the_papers(backbone: Backbone) -> None:
    attached = attach(backbone, "adalora")
    terms = []
    for name, parameter in attached.encoder.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            square = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            terms.append(torch.linalg.norm(square - torch.eye(len(square))))
    expected = 0.5 * torch.stack(terms).mean()
    regularizer = attached.regularizer()
    assert regularizer is not None
    torch.testing.assert_close(regularizer, expected)


def test_adalora_without_room_for_a_schedule_is_refused(backbone: Backbone) -> None:
    config = AdaloraAdapter(warmup_fraction=0.5, final_fraction=0.45)
    with pytest.raises(BackboneError, match="steps leave none"):
        methods.attach(backbone.model, config, max_length=16, total_steps=2, seed=0)


def test_a_prefix_takes_positions_from_the_text(tiny_bert: Path) -> None:
    backbone = Backbone.load(str(tiny_bert), max_length=64)
    attached = methods.attach(backbone.model, PrefixAdapter(length=8), max_length=64, total_steps=1, seed=0)
    assert attached.max_length == 64 - 8
    long = " ".join(f"w{number}" for number in range(80))
    assert backbone.encode([long], attached).shape == (1, 32)
    with pytest.raises(BackboneError, match="leave 4"):
        methods.attach(backbone.model, PrefixAdapter(length=60), max_length=64, total_steps=1, seed=0)


@pytest.mark.parametrize("architecture", ["distilbert", "modernbert", "mpnet", "albert"])
def test_a_prefix_is_refused_where_it_would_be_ignored(architecture: str, tmp_path: Path) -> None:
    backbone = Backbone.load(str(build_encoder(tmp_path, architecture)), max_length=16)
    with pytest.raises(BackboneError, match="the prefix would be ignored"):
        methods.attach(backbone.model, PrefixAdapter(length=4), max_length=16, total_steps=1, seed=0)


@pytest.mark.parametrize("method", ["lora", "adalora"])
@pytest.mark.parametrize("architecture", ["roberta", "electra", "distilbert", "modernbert", "mpnet", "albert"])
def test_lora_and_adalora_train_on_every_architecture(architecture: str, method: str, tmp_path: Path) -> None:
    backbone = Backbone.load(str(build_encoder(tmp_path, architecture)), max_length=16)
    attached = attach(backbone, method)
    before = backbone.encode(TEXTS, attached)
    train(backbone, attached)
    assert np.abs(backbone.encode(TEXTS, attached) - before).max() > 1e-3


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("method", ["lora", "adalora", "prefix"])
def test_quantised_backbones_train_and_reload(method: str, quantization: str, tmp_path: Path) -> None:
    folder = build_encoder(tmp_path / "model", hidden_size=64, intermediate_size=128)
    backbone = Backbone.load(str(folder), max_length=16, quantization=quantization)  # type: ignore[arg-type]
    attached = attach(backbone, method)
    ids, mask = backbone.tokenize(TEXTS).padded(np.arange(4), backbone.pad_id)
    optimizer = torch.optim.AdamW(attached.trainable().values(), lr=1e-2)
    before = backbone.encode(TEXTS, attached)
    for step in range(1, 6):
        (
            -backbone.pool(attached.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask)[:, 0].mean()
        ).backward()
        optimizer.step()
        attached.after_step(step)
        optimizer.zero_grad()
    after = backbone.encode(TEXTS, attached)
    assert np.abs(after - before).max() > 1e-3
    (tmp_path / "adapter").mkdir()
    attached.save(tmp_path / "adapter", "tiny")
    loaded = methods.load(backbone.model, tmp_path / "adapter", attached.stored_as, 16)
    np.testing.assert_allclose(backbone.encode(TEXTS, loaded), after, atol=1e-2 if quantization == "8bit" else 1e-4)


def test_files_of_another_encoder_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    attach(backbone, "lora").save(tmp_path, "tiny")
    deeper = Backbone.load(str(build_encoder(tmp_path / "deep", num_hidden_layers=4)), max_length=16)
    shallower = Backbone.load(str(build_encoder(tmp_path / "flat", num_hidden_layers=2)), max_length=16)
    wider = Backbone.load(str(build_encoder(tmp_path / "wide", hidden_size=64)), max_length=16)
    methods.load(deeper.model, tmp_path, "lora", 16)  # names fit; the fingerprint is what refuses it (see the store)
    for other in (shallower, wider):
        with pytest.raises(StoreError, match="does not fit the encoder"):
            methods.load(other.model, tmp_path, "lora", 16)


def test_quantised_weights_are_not_trained(tmp_path: Path) -> None:
    folder = build_encoder(tmp_path, hidden_size=64, intermediate_size=128)
    backbone = Backbone.load(str(folder), max_length=16, quantization="8bit")
    with pytest.raises(BackboneError, match="cannot be trained"):
        methods.attach(backbone.model, FullTuning(), max_length=16, total_steps=1, seed=0)


def test_a_copy_costs_no_weights(backbone: Backbone) -> None:
    pointers = {parameter.data_ptr() for parameter in backbone.model.parameters()}
    assert {parameter.data_ptr() for parameter in sharing_copy(backbone.model).parameters()} == pointers


@pytest.mark.parametrize("method", ["lora", "rslora", "adalora"])
def test_the_fused_layers_give_pefts_values_and_gradients(backbone: Backbone, method: str) -> None:
    attached = attach(backbone, method)
    train(backbone, attached, 3)
    ids, mask = backbone.tokenize(TEXTS).padded(np.arange(4), backbone.pad_id)

    def outcome() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        attached.encoder.zero_grad()
        hidden = attached.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        (hidden * torch.arange(32)).sum().backward()
        return hidden.detach(), {n: p.grad.clone() for n, p in attached.trainable().items() if p.grad is not None}

    fused_hidden, fused = outcome()
    replaced = 0
    for module in attached.inner.modules():
        if "forward" in vars(module):
            del module.forward
            replaced += 1
    hidden, plain = outcome()
    assert replaced == 18
    torch.testing.assert_close(fused_hidden, hidden, atol=1e-5, rtol=1e-5)
    assert fused.keys() == plain.keys() == attached.trainable().keys()
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], atol=1e-4, rtol=1e-4)


def test_dropout_is_still_dropout_while_training(backbone: Backbone) -> None:
    attached = methods.attach(backbone.model, LoraAdapter(dropout=0.5), max_length=16, total_steps=1, seed=0)
    train(backbone, attached, 3)
    ids, mask = backbone.tokenize(TEXTS).padded(np.arange(4), backbone.pad_id)
    with torch.no_grad():
        attached.encoder.train()
        first, second = (attached.encoder(input_ids=ids, attention_mask=mask).last_hidden_state for _ in range(2))
        assert not torch.equal(first, second)
        attached.encoder.eval()
        first, second = (attached.encoder(input_ids=ids, attention_mask=mask).last_hidden_state for _ in range(2))
        assert torch.equal(first, second)
