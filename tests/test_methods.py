"""What is special to each adapter method; what all must do is in test_conformance.py."""

from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import peft
import pytest
import torch
from conformance_cases import METHODS, TEXTS
from conftest import REPOSITORY
from made_up import build_encoder
from torch import nn
from transformers import AutoModel

from peft_combo.adapters.deltas import read_changes
from peft_combo.encoder import methods
from peft_combo.encoder.architectures import copy_sharing_weights, find_layers, lower_view, set_dropout, upper_view
from peft_combo.encoder.backbone import Backbone
from peft_combo.errors import BackboneError, StoreError
from peft_combo.recipe.adapter import (
    AdaloraAdapter,
    AdapterConfig,
    BitfitTuning,
    BottleneckAdapter,
    FullTuning,
    HeadOnly,
    LayerNormTuning,
    LohaAdapter,
    LokrAdapter,
    LoraAdapter,
    OftAdapter,
    PrefixAdapter,
    PromptAdapter,
    RandloraAdapter,
    TokensAdapter,
    TopLayers,
    VeraAdapter,
)
from peft_combo.recipe.fields import format_value

PROMPTED = [name for name in METHODS if name.startswith(("prefix", "prompt", "p-tuning"))]
WITHOUT_FILES_OF_PEFT = ["bottleneck: houlsby", "bottleneck: pfeiffer", "bottleneck: parallel", "bitfit", "head",
                         "top-layers", "full"]  # fmt: skip
IN_TOP_LAYERS = [name for name, config in METHODS.items() if hasattr(config, "top_layers")]
MERGED = [name for name in METHODS if name not in PROMPTED and not name.startswith(("bottleneck", "lily"))]


@pytest.fixture(scope="module")
def backbone(tiny_bert: Path) -> Backbone:
    return Backbone.load(str(tiny_bert), max_length=16)


@pytest.fixture(scope="module")
def modernbert(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return Backbone.load(str(build_encoder(tmp_path_factory.mktemp("modern"), "modernbert")), max_length=16)


def attach(backbone: Backbone, config: AdapterConfig | str, seed: int = 0) -> methods.AttachedAdapter:
    config = METHODS[config] if isinstance(config, str) else config
    attached = methods.attach(
        backbone.model, config, max_length=16, total_steps=20, seed=seed, tokenizer=backbone.tokenizer
    )
    attached.encoder.eval()
    return attached


def train(backbone: Backbone, attached: methods.AttachedAdapter, steps: int = 3, rate: float = 1e-2) -> None:
    """Pull the vectors of four texts towards fixed random directions."""
    wanted = nn.functional.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    groups = [{"params": g.parameters, "lr": rate * g.rate} for g in attached.groups()]
    if not groups:
        return
    optimizer = torch.optim.AdamW(groups)
    ids, mask = backbone.tokenize(TEXTS).pad(np.arange(4), backbone.pad_id)
    for step in range(1, steps + 1):
        pooled = backbone.pool(attached.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
        loss = -(pooled * wanted).sum(1).mean()
        extra = attached.regularizer()
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        attached.after_step(step)
        optimizer.zero_grad()


def saved(attached: methods.AttachedAdapter, folder: Path) -> Any:
    """The PEFT config and tensors an adapter is stored as."""
    attached.save(folder, "tiny")
    from safetensors.torch import load_file

    return json.loads((folder / methods.CONFIG_FILE).read_text()), load_file(folder / methods.WEIGHTS_FILE)


def layer(attached: methods.AttachedAdapter, name: str = "encoder.layer.2.attention.self.query") -> Any:
    return attached.inner.get_submodule(name)


# The pages.


@pytest.fixture(scope="module")
def embedded() -> Backbone:
    return Backbone.load()


@pytest.mark.parametrize("kind", get_args(get_args(AdapterConfig)[0]))
def test_the_page_of_a_method_tells_its_fields_defaults_and_cost(embedded: Backbone, kind: Any) -> None:
    config = kind(words=("denim",)) if kind is TokensAdapter else kind()
    page = (REPOSITORY / "docs" / "methods" / f"{config.method}.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) < 60
    assert page.count("<!-- measured -->") == 1
    rows = dict(re.findall(r"^\| `([\w ]+)` \| ([^|]*) \|", page, re.MULTILINE))
    assert float(rows.pop("learning rate")) == kind.default_learning_rate
    assert set(rows) == set(kind.model_fields) - {"method"}
    for name, told in rows.items():
        default = kind.model_fields[name].default
        assert told == "required" or told == format_value(default).strip('"') or float(told) == default, name
    attached = methods.attach(
        embedded.model, config, max_length=64, total_steps=100, seed=0, tokenizer=embedded.tokenizer
    )
    trained = sum(p.numel() for p in attached.trainable().values())
    assert f"**{trained:,}**" in page


# Of all methods.


@pytest.mark.parametrize("method", [name for name in METHODS if name not in PROMPTED])
def test_an_untrained_adapter_changes_nothing(backbone: Backbone, method: str) -> None:
    np.testing.assert_allclose(backbone.encode(TEXTS, attach(backbone, method)), backbone.encode(TEXTS), atol=1e-6)


# transformers' own attribute, which it deprecates, is read by peft when a prompt-learning model is made.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# PEFT warns of norms although it is its own method, and of bases listed for the model but not again for every layer.
@pytest.mark.filterwarnings("ignore:Unsupported layer type .*LayerNorm:UserWarning")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys .*randlora_A:UserWarning")
@pytest.mark.parametrize("method", [name for name in METHODS if name not in WITHOUT_FILES_OF_PEFT])
def test_plain_peft_opens_the_folder(backbone: Backbone, tiny_bert: Path, method: str, tmp_path: Path) -> None:
    attached = attach(backbone, method)
    train(backbone, attached)
    attached.save(tmp_path, str(tiny_bert))
    plain = peft.PeftModel.from_pretrained(
        AutoModel.from_pretrained(tiny_bert, add_pooling_layer=False), str(tmp_path)
    ).eval()
    ids, mask = backbone.tokenize(TEXTS).pad(np.arange(4), backbone.pad_id)
    with torch.no_grad():
        hidden = plain(input_ids=ids, attention_mask=mask).last_hidden_state[:, -ids.shape[1] :]
        vectors = backbone.pool(hidden, mask).numpy()
    np.testing.assert_allclose(vectors, backbone.encode(TEXTS, attached), atol=5e-6)


@pytest.mark.parametrize("encoder", ["backbone", "modernbert"])
@pytest.mark.parametrize("method", IN_TOP_LAYERS)
def test_what_is_below_the_cut_is_the_frozen_encoder(request: pytest.FixtureRequest, encoder: str, method: str) -> None:
    backbone: Backbone = request.getfixturevalue(encoder)
    if (encoder, method) == ("modernbert", "bitfit"):
        return  # it has no biases
    attached = attach(backbone, METHODS[method].model_copy(update={"top_layers": 1}))
    assert attached.first_layer == 2
    train(backbone, attached)
    ids, mask = backbone.tokenize(TEXTS).pad(np.arange(4), backbone.pad_id)
    with torch.no_grad():
        states = lower_view(backbone.model, attached.first_layer)(input_ids=ids, attention_mask=mask).last_hidden_state
        upper = upper_view(attached.inner, attached.first_layer)(
            inputs_embeds=states, attention_mask=mask
        ).last_hidden_state
        whole = attached.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        frozen = backbone.model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(upper[mask.bool()], whole[mask.bool()], atol=1e-6, rtol=1e-5)
    assert (whole - frozen).abs().max() > 1e-5


@pytest.mark.parametrize("method", IN_TOP_LAYERS)
def test_more_top_layers_than_there_are_are_refused(backbone: Backbone, method: str) -> None:
    with pytest.raises(BackboneError, match=r"adapter\.top_layers: expected at most 3"):
        attach(backbone, METHODS[method].model_copy(update={"top_layers": 4}))


@pytest.mark.parametrize("encoder", ["backbone", "modernbert"])
@pytest.mark.parametrize("method", MERGED)
def test_merged_it_is_a_plain_encoder_that_does_the_same(
    request: pytest.FixtureRequest, encoder: str, method: str
) -> None:
    backbone: Backbone = request.getfixturevalue(encoder)
    if (encoder, method) == ("modernbert", "bitfit"):
        return
    frozen = backbone.encode(TEXTS)
    attached = attach(backbone, method)
    train(backbone, attached)
    plain = methods.merge_into_base(attached)
    assert {type(module) for module in plain.modules()} == {type(module) for module in backbone.model.modules()}
    alone = methods.AttachedAdapter(plain, plain, plain, first_layer=0, max_length=16, stored_as="weights")
    np.testing.assert_allclose(backbone.encode(TEXTS, alone), backbone.encode(TEXTS, attached), atol=5e-6)
    np.testing.assert_array_equal(backbone.encode(TEXTS), frozen)
    changed = [n for n, p in plain.named_parameters() if p is not backbone.model.get_parameter(n)]
    assert bool(changed) == (method != "head")


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("prefix", "keys and values before the text's own"),
        ("prompt", "positions before the text"),
        ("p-tuning", "positions before the text"),
        ("bottleneck: parallel", "layers with a bend"),
    ],
)
def test_what_no_weight_can_stand_for_is_not_merged(backbone: Backbone, method: str, told: str) -> None:
    with pytest.raises(BackboneError, match=told):
        methods.merge_into_base(attach(backbone, method))


def test_quantised_weights_are_not_merged_into(tmp_path: Path) -> None:
    folder = build_encoder(tmp_path, hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    for quantization in ("8bit", "4bit"):
        backbone = Backbone.load(str(folder), max_length=16, quantization=quantization)  # type: ignore[arg-type]
        vectors = backbone.encode(TEXTS)
        with pytest.raises(BackboneError, match="cannot be merged into quantised weights"):
            methods.merge_into_base(attach(backbone, "lora"))
        np.testing.assert_array_equal(backbone.encode(TEXTS), vectors)


def test_files_of_another_encoder_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    attach(backbone, "lora").save(tmp_path, "tiny")
    deeper = Backbone.load(str(build_encoder(tmp_path / "deep", num_hidden_layers=4)), max_length=16)
    shallower = Backbone.load(str(build_encoder(tmp_path / "flat", num_hidden_layers=2)), max_length=16)
    wider = Backbone.load(str(build_encoder(tmp_path / "wide", hidden_size=64)), max_length=16)
    methods.load(deeper.model, tmp_path, "lora", 16)  # names fit; the fingerprint is what refuses it (see the store)
    for other in (shallower, wider):
        with pytest.raises(StoreError, match="does not fit the encoder"):
            methods.load(other.model, tmp_path, "lora", 16)


def test_files_that_are_not_what_the_manifest_says_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    attach(backbone, "lora").save(tmp_path, "tiny")
    with pytest.raises(StoreError, match="said to be ia3 and is lora"):
        methods.load(backbone.model, tmp_path, "ia3", 16)
    for stored_as in ("bottleneck", "weights"):
        with pytest.raises(StoreError, match="does not fit the encoder"):
            methods.load(backbone.model, tmp_path, stored_as, 16)


def test_a_copy_costs_no_weights(backbone: Backbone) -> None:
    pointers = {parameter.data_ptr() for parameter in backbone.model.parameters()}
    assert {parameter.data_ptr() for parameter in copy_sharing_weights(backbone.model).parameters()} == pointers


@pytest.mark.parametrize("config", [LoraAdapter(dropout=0.5), VeraAdapter(dropout=0.5), RandloraAdapter(dropout=0.5)])
def test_the_encoders_dropout_and_the_adapters_are_apart(backbone: Backbone, config: AdapterConfig) -> None:
    attached = attach(backbone, config)
    train(backbone, attached)
    set_dropout(attached.inner, 0.0)
    ids, mask = backbone.tokenize(TEXTS).pad(np.arange(4), backbone.pad_id)
    with torch.no_grad():
        attached.encoder.train()
        first, second = (attached.encoder(input_ids=ids, attention_mask=mask).last_hidden_state for _ in range(2))
        assert not torch.equal(first, second)
        attached.encoder.eval()
        first, second = (attached.encoder(input_ids=ids, attention_mask=mask).last_hidden_state for _ in range(2))
        assert torch.equal(first, second)


# LoRA and its switches.


@pytest.mark.parametrize("method", ["lora", "lora: rslora", "lora: pissa", "lora: freeze_a", "adalora"])
def test_the_fused_layers_give_pefts_values_and_gradients(backbone: Backbone, method: str) -> None:
    attached = attach(backbone, method)
    train(backbone, attached)
    ids, mask = backbone.tokenize(TEXTS).pad(np.arange(4), backbone.pad_id)

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


def test_lora_plus_gives_b_a_rate_of_its_own(backbone: Backbone) -> None:
    attached = attach(backbone, LoraAdapter(plus_ratio=16))
    names = {id(parameter): name for name, parameter in attached.trainable().items()}
    rates = {names[id(p)]: group.rate for group in attached.groups() for p in group.parameters}
    assert len(rates) == len(names) == 36
    assert all(rate == (16.0 if ".lora_B." in name else 1.0) for name, rate in rates.items())


def test_lora_fa_trains_b_alone_and_keeps_rank_numbers_a_token(backbone: Backbone) -> None:
    def kept(config: LoraAdapter) -> int:
        x = torch.randn(1, 50, 32, requires_grad=True)
        module = layer(attach(backbone, config))
        frozen = {p.data_ptr() for p in module.parameters()} | {module.get_base_layer().weight.data_ptr()}
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape[:2] == (1, 50):  # what grows with the text
                sizes[tensor.data_ptr()] = tensor.numel() // 50
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(x)
        assert frozen
        return sum(sizes.values())

    assert kept(LoraAdapter(rank=4)) == 32
    assert kept(LoraAdapter(rank=4, freeze_a=True)) == 4
    attached = attach(backbone, "lora: freeze_a")
    before = layer(attached).lora_A["default"].weight.clone()
    train(backbone, attached)
    assert all(".lora_B." in name for name in attached.trainable())
    assert torch.equal(layer(attached).lora_A["default"].weight, before)


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_moves_the_principal_part_into_a_copy_and_is_stored_as_plain_lora(
    backbone: Backbone, rslora: bool, tmp_path: Path
) -> None:
    name = "encoder.layer.2.attention.self.query"
    frozen = backbone.model.get_submodule(name).weight.clone()
    attached = attach(backbone, LoraAdapter(rank=4, pissa=True, rslora=rslora))
    residual = layer(attached).get_base_layer().weight
    torch.testing.assert_close(residual + layer(attached).get_delta_weight("default"), frozen, atol=1e-6, rtol=0)
    best = torch.linalg.svdvals(frozen)[:4].norm()
    assert (frozen - residual).norm() > 0.999 * best  # no four directions hold more of the weight
    assert torch.equal(backbone.model.get_submodule(name).weight, frozen)
    shared = {p.data_ptr() for p in backbone.model.parameters()}
    own = {n for n, p in attached.inner.named_parameters() if "base_layer" in n and p.data_ptr() not in shared}
    assert len(own) == 18
    assert all(not group.decayed for group in attached.groups())
    train(backbone, attached)
    config, tensors = saved(attached, tmp_path)
    assert (config["peft_type"], config["r"]) == ("LORA", 8)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if rslora else config["r"])
    assert scale == pytest.approx(16 / (math.sqrt(4) if rslora else 4))
    whole = scale * (
        tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
    )
    torch.testing.assert_close(whole, read_changes(attached).linear[name], atol=1e-6, rtol=1e-5)


def test_dora_starts_from_the_lengths_of_the_rows(backbone: Backbone) -> None:
    module = layer(attach(backbone, "lora: dora"))
    lengths = torch.linalg.norm(module.get_base_layer().weight, dim=1)
    torch.testing.assert_close(module.lora_magnitude_vector["default"].weight, lengths)


# AdaLoRA.


def test_adalora_meets_its_budget_and_folds_exactly_to_lora(backbone: Backbone, tmp_path: Path) -> None:
    attached = attach(backbone, AdaloraAdapter(initial_rank=4, target_rank=2, allocate_every=1))
    assert not attached.is_final(5)
    train(backbone, attached, 20)
    assert attached.is_final(20)
    ranks = attached.summary()["ranks"]
    assert sum(ranks.values()) == 2 * len(ranks)
    config, _ = saved(attached, tmp_path)
    assert config["peft_type"] == "LORA"
    assert config["rank_pattern"] == {name: rank for name, rank in ranks.items() if rank}


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


# Other updates.


def trained_delta(backbone: Backbone, config: AdapterConfig) -> tuple[Any, torch.Tensor]:
    attached = attach(backbone, config)
    train(backbone, attached)
    name = "encoder.layer.2.attention.self.query"
    return layer(attached, name), read_changes(attached).linear[name]


def test_vera_scales_shared_matrices_by_two_vectors(backbone: Backbone) -> None:
    module, delta = trained_delta(backbone, VeraAdapter(rank=16))
    b, d = module.vera_lambda_b["default"], module.vera_lambda_d["default"]
    right, left = module.vera_A["default"][:, :32], module.vera_B["default"][:32]
    torch.testing.assert_close(delta, b.diag() @ left @ d.diag() @ right, atol=1e-6, rtol=1e-5)  # the paper's eq. 2
    attached = attach(backbone, VeraAdapter(rank=16))
    outputs = 3 * (4 * 32 + 48 + 32)
    assert sum(p.numel() for p in attached.trainable().values()) == outputs + 18 * 16
    other = layer(attach(backbone, VeraAdapter(rank=16), seed=1))
    assert not torch.equal(other.vera_A["default"], module.vera_A["default"])


def test_loha_reaches_beyond_its_rank(backbone: Backbone) -> None:
    module, delta = trained_delta(backbone, LohaAdapter(rank=2))
    first = module.hada_w1_a["default"] @ module.hada_w1_b["default"]
    second = module.hada_w2_a["default"] @ module.hada_w2_b["default"]
    torch.testing.assert_close(delta, 8 * first * second, atol=1e-6, rtol=1e-5)  # alpha 16 over rank 2
    assert torch.linalg.matrix_rank(delta, rtol=1e-4) == 4


def test_lokr_is_a_kronecker_product(backbone: Backbone) -> None:
    module, delta = trained_delta(backbone, LokrAdapter(rank=1, factor=4))
    small = module.lokr_w1["default"]
    assert small.shape == (4, 4)
    large = module.lokr_w2_a["default"] @ module.lokr_w2_b["default"]
    torch.testing.assert_close(delta, 16 * torch.kron(small, large), atol=1e-6, rtol=1e-5)


def test_randlora_is_of_full_rank_and_stores_its_bases_once(backbone: Backbone, tmp_path: Path) -> None:
    _, delta = trained_delta(backbone, RandloraAdapter(rank=8, alpha=160))
    assert torch.linalg.matrix_rank(delta, rtol=1e-6) == 32
    _, tensors = saved(attach(backbone, "randlora"), tmp_path)
    bases = [name for name in tensors if name.endswith(("randlora_A", "randlora_B"))]
    assert bases == ["base_model.randlora_A", "base_model.randlora_B"]


def test_oft_only_rotates(backbone: Backbone) -> None:
    module, delta = trained_delta(backbone, OftAdapter(block_size=16))
    weight = module.get_base_layer().weight
    assert delta.abs().max() > 1e-4
    torch.testing.assert_close((weight + delta) @ (weight + delta).T, weight @ weight.T, atol=1e-6, rtol=1e-4)


def test_oft_refuses_a_block_that_does_not_divide(backbone: Backbone) -> None:
    with pytest.raises(BackboneError, match=r"32 does not divide the width 48 of .*output\.dense.* that does: 24"):
        attach(backbone, OftAdapter(block_size=32))


def test_ia3_scales_keys_values_and_the_inside_of_the_ffn(backbone: Backbone) -> None:
    attached = attach(backbone, "ia3")
    keys = layer(attached, "encoder.layer.0.attention.self.key")
    out = layer(attached, "encoder.layer.0.output.dense")
    with torch.no_grad():
        keys.ia3_l["default"].fill_(3.0)
        out.ia3_l["default"].fill_(0.0)
    x, inside = torch.randn(2, 5, 32), torch.randn(2, 5, 48)
    torch.testing.assert_close(keys(x), 3 * keys.get_base_layer()(x))
    torch.testing.assert_close(out(inside), out.get_base_layer().bias.expand(2, 5, 32))
    assert len(attached.trainable()) == 9
    assert not any(group.decayed for group in attached.groups())  # decay pulls to zero, not to one


def test_layer_norm_trains_norms_and_nothing_else(backbone: Backbone, modernbert: Backbone) -> None:
    def norms(backbone: Backbone, top: int | None) -> set[str]:
        names = attach(backbone, LayerNormTuning(top_layers=top)).trainable()
        return {name.removeprefix("base_model.model.").partition(".ln_tuning")[0] for name in names}

    inside = {f"encoder.layer.{n}.{part}.LayerNorm" for n in range(3) for part in ("attention.output", "output")}
    assert norms(backbone, None) == inside | {"embeddings.LayerNorm"}
    assert norms(backbone, 1) == {name for name in inside if ".2." in name}
    assert norms(modernbert, 1) == {"layers.2.attn_norm", "layers.2.mlp_norm", "final_norm"}


def test_bitfit_trains_biases_but_those_softmax_is_blind_to(backbone: Backbone) -> None:
    names = set(attach(backbone, BitfitTuning()).trainable())
    every = {name for name, _ in backbone.model.named_parameters() if name.endswith(".bias")}
    assert every - names == {f"encoder.layer.{n}.attention.self.key.bias" for n in range(3)}
    assert names < every


# Bottlenecks.


@pytest.mark.parametrize(("placement", "number"), [("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)])
def test_a_bottleneck_costs_what_the_papers_say(backbone: Backbone, placement: Any, number: int) -> None:
    attached = attach(backbone, BottleneckAdapter(size=8, placement=placement))
    one = 2 * 32 * 8 + 8 + 32  # 2 m d + d + m, Houlsby et al. 2019, section 2.1
    assert sum(p.numel() for p in attached.trainable().values()) == 3 * number * one


def test_a_bottleneck_sits_where_its_placement_says(tmp_path: Path) -> None:
    backbone = Backbone.load(str(build_encoder(tmp_path, "distilbert")), max_length=16)
    x = torch.randn(2, 5, 32)
    ffn = backbone.model.get_submodule("transformer.layer.0.ffn")
    for placement in ("pfeiffer", "parallel"):
        attached = attach(backbone, BottleneckAdapter(size=8, placement=placement, scale=4))
        own = attached.inner.get_submodule("transformer.layer.0.ffn")
        narrow = own.get_submodule("lin2.narrow")
        nn.init.normal_(narrow.up.weight)
        seen = x if placement == "parallel" else ffn(x)
        by_hand = 4 * narrow.up(torch.relu(narrow.down(seen)))
        torch.testing.assert_close(own(x), ffn(x) + by_hand)


def test_threads_do_not_see_each_others_texts_through_a_parallel_bottleneck(backbone: Backbone) -> None:
    attached = attach(backbone, "bottleneck: parallel")
    train(backbone, attached)
    texts = [f"w{number} w{number + 1}" for number in range(1, 60)]
    alone = [backbone.encode([text], attached) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        for expected, found in zip(alone, pool.map(lambda text: backbone.encode([text], attached), texts), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"placement": "inside"}, "not a bottleneck's config"),
        ({"size": "../8"}, "not a bottleneck's config"),
        ({"module": "os"}, "not a bottleneck's config"),
        ({"size": 16}, "not those the encoder takes"),
        ({"placement": "houlsby"}, "not those the encoder takes"),
    ],
)
def test_a_bottlenecks_files_are_checked(backbone: Backbone, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    attach(backbone, "bottleneck: pfeiffer").save(tmp_path, "tiny")
    file = tmp_path / "bottleneck_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(StoreError, match=told):
        methods.load(backbone.model, tmp_path, "bottleneck", 16)


# Positions before the text.


@pytest.mark.parametrize("method", PROMPTED)
def test_virtual_tokens_take_positions_from_the_text(tiny_bert: Path, method: str) -> None:
    backbone = Backbone.load(str(tiny_bert), max_length=64)
    config = METHODS[method]

    def attached(length: int) -> methods.AttachedAdapter:
        changed = config.model_copy(update={"length": length})
        return methods.attach(backbone.model, changed, max_length=64, total_steps=1, seed=0)

    assert attached(8).max_length == 64 - 8
    long = " ".join(f"w{number}" for number in range(80))
    assert backbone.encode([long], attached(8)).shape == (1, 32)
    with pytest.raises(BackboneError, match="leave 4"):
        attached(60)


@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_only_the_texts_states_leave_a_prompted_encoder(backbone: Backbone, method: str) -> None:
    attached = attach(backbone, method)
    ids, mask = backbone.tokenize(TEXTS).pad(np.arange(4), backbone.pad_id)
    with torch.no_grad():
        states = attached.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        words = backbone.model.embeddings.word_embeddings(ids)
        prompt = attached.wrapped.get_prompt(4)  # type: ignore[attr-defined]
        by_hand = backbone.model(
            inputs_embeds=torch.cat([prompt, words], 1), attention_mask=torch.cat([torch.ones(4, 4), mask], 1).long()
        ).last_hidden_state
    assert states.shape == (*ids.shape, 32)
    torch.testing.assert_close(states[mask.bool()], by_hand[:, 4:][mask.bool()])


def test_a_prompt_starts_from_words(backbone: Backbone) -> None:
    attached = attach(backbone, PromptAdapter(length=4))
    (prompt,) = attached.trainable().values()
    words = backbone.model.embeddings.word_embeddings.weight
    assert all((words == row).all(1).any() for row in prompt)


# Words of one's own.


def test_only_texts_with_a_trained_word_change(backbone: Backbone) -> None:
    attached = attach(backbone, TokensAdapter(words=("w5",)))
    train(backbone, attached)
    before, after = backbone.encode(TEXTS), backbone.encode(TEXTS, attached)
    assert [bool((a != b).any()) for a, b in zip(after, before, strict=True)] == ["w5" in t.split() for t in TEXTS]


def test_the_short_way_through_trained_words_is_pefts(backbone: Backbone) -> None:
    attached = attach(backbone, "tokens")
    train(backbone, attached)
    short = backbone.encode(TEXTS, attached)
    table = layer(attached, "embeddings.word_embeddings")
    del table.forward
    np.testing.assert_array_equal(backbone.encode(TEXTS, attached), short)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("w1999", 'the tokenizer knows, found "w1999". Did you mean "w99"?'),
        ("w1 w2", 'one token each, found "w1 w2", which is 2: w1, w2. Name the pieces'),
        (" ", 'the tokenizer knows, found " "'),
    ],
)
def test_a_word_that_is_not_one_token_is_refused(backbone: Backbone, word: str, told: str) -> None:
    with pytest.raises(BackboneError) as refused:
        attach(backbone, TokensAdapter(words=("w1", word)))
    assert told in str(refused.value)


def test_words_are_read_as_the_tokenizer_reads_texts(backbone: Backbone) -> None:
    attached = attach(backbone, TokensAdapter(words=("W7", "w7", "[MASK]")))
    assert [tuple(p.shape) for p in attached.trainable().values()] == [(2, 32)]


# The encoder's own weights.


def test_top_layers_and_full_tuning_own_what_they_train(backbone: Backbone) -> None:
    shared = {p.data_ptr() for p in backbone.model.parameters()}
    top = attach(backbone, TopLayers(layers=1))
    assert {name.rpartition("encoder.layer.")[2].split(".")[0] for name in top.trainable()} == {"2"}
    assert len(top.trainable()) == len(list(find_layers(backbone.model)[2].parameters()))
    for attached in (top, attach(backbone, FullTuning())):
        assert not shared & {p.data_ptr() for p in attached.trainable().values()}
    with pytest.raises(BackboneError, match=r"adapter\.layers: expected at most 3, found 4"):
        attach(backbone, TopLayers(layers=4))


def test_a_head_alone_trains_nothing_of_the_encoder(backbone: Backbone) -> None:
    attached = attach(backbone, HeadOnly())
    assert attached.trainable() == {}
    assert attached.groups() == []
    assert attached.first_layer == 3
    assert read_changes(attached).linear == {}


def test_a_prefix_is_not_shortened_silently(backbone: Backbone) -> None:
    assert attach(backbone, PrefixAdapter(length=4)).max_length == 16


def test_cells_of_shira_outside_a_weight_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    _, tensors = saved(attach(backbone, "shira"), tmp_path)
    name = next(name for name in tensors if name.endswith("shira_indices"))
    tensors[name][1, 3] = 10**6
    save_file(tensors, tmp_path / methods.WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(StoreError, match="lie outside its 32 x 32 weight"):
        methods.load(backbone.model, tmp_path, "shira", 16)
