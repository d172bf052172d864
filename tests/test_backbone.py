"""Encoders of every known architecture: loaded, cut in two, copied and fingerprinted without changing a result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import build_encoder

from peft_combo.encoder.architectures import (
    ARCHITECTURES,
    copy_sharing_weights,
    find_architecture,
    find_layers,
    find_target_modules,
    lower_view,
    upper_view,
)
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.libraries import _compile_later
from peft_combo.encoder.tokens import chunk_by_length
from peft_combo.errors import BackboneError

BUILT = ("bert", "roberta", "electra", "distilbert", "modernbert", "mpnet", "albert")
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w1 w2 w3", "w12 w13"]


@pytest.fixture(scope="module", params=BUILT)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = build_encoder(tmp_path_factory.mktemp(request.param), request.param)
    return Backbone.load(str(folder), max_length=16)


def test_encoding_in_chunks_equals_encoding_one_by_one(backbone: Backbone) -> None:
    alone = np.concatenate([backbone.encode([text]) for text in TEXTS])
    together = backbone.encode(TEXTS, chunk_tokens=16)
    np.testing.assert_allclose(together, alone, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together[0], together[3])


def test_no_pooler_and_nothing_trainable(backbone: Backbone) -> None:
    assert not any("pooler" in name for name, _ in backbone.model.named_parameters())
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_upper_over_lower_view_equals_the_whole(backbone: Backbone) -> None:
    if not find_architecture(backbone.model).splittable:
        pytest.skip(f"{backbone.model_type} shares its layers, so there is nothing to cut")
    ids, mask = backbone.tokenize(TEXTS).pad(np.arange(5), backbone.pad_id)
    with torch.no_grad():
        whole = backbone.model(input_ids=ids, attention_mask=mask).last_hidden_state
        for cut in range(len(find_layers(backbone.model)) + 1):
            states = lower_view(backbone.model, cut)(input_ids=ids, attention_mask=mask).last_hidden_state
            again = upper_view(backbone.model, cut)(inputs_embeds=states, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(again[mask.bool()], whole[mask.bool()], atol=1e-6, rtol=1e-5)


def test_every_target_is_a_linear_module_of_a_layer(backbone: Backbone) -> None:
    for group in ("query+value", "attention", "attention+ffn"):
        for name in find_target_modules(backbone.model, group, None):
            assert isinstance(backbone.model.get_submodule(name), torch.nn.Linear)
    with pytest.raises(BackboneError, match=r"Did you mean"):
        find_target_modules(backbone.model, [find_architecture(backbone.model).ffn[0] + "x"], None)


def test_top_layers_counts_from_the_output(backbone: Backbone) -> None:
    depth = len(find_layers(backbone.model))
    last = find_target_modules(backbone.model, "query+value", 1)
    assert all(f".{depth - 1}." in f".{name}" for name in last)
    with pytest.raises(BackboneError, match=rf"at most {depth}"):
        find_target_modules(backbone.model, "query+value", depth + 1)


def test_a_sharing_copy_shares_every_tensor_and_no_module(backbone: Backbone) -> None:
    twin = copy_sharing_weights(backbone.model)
    ours, theirs = dict(backbone.model.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert not {id(module) for module in twin.modules()} & {id(module) for module in backbone.model.modules()}


def test_every_architecture_of_the_map_is_built_here_or_named_as_missing() -> None:
    # Camembert and XLM-R are RoBERTa by another name; DeBERTa's tiny random build is left to users of its hub weights.
    assert set(ARCHITECTURES) - set(BUILT) == {"camembert", "xlm-roberta", "deberta-v2"}


def test_the_embedded_backbone_is_a_real_bert() -> None:
    backbone = Backbone.load()
    assert (backbone.model_type, backbone.dim, backbone.layers) == ("bert", 384, 6)
    vectors = backbone.encode(["red summer dress", "summer dress in red", "usb charging cable"])
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]


def test_one_changed_weight_changes_the_fingerprint(tiny_bert: Path, tmp_path: Path) -> None:
    first, again = Backbone.load(str(tiny_bert)), Backbone.load(str(tiny_bert))
    assert first.fingerprint == again.fingerprint
    changed = Backbone.load(str(tiny_bert))
    with torch.no_grad():
        next(changed.model.parameters()).view(-1)[3] += 1e-6
    assert changed.fingerprint != first.fingerprint
    assert Backbone.load(str(build_encoder(tmp_path, seed=1))).fingerprint != first.fingerprint


def test_quantised_weights_keep_the_fingerprint_and_encode_alike(tmp_path: Path) -> None:
    folder = str(build_encoder(tmp_path, hidden_size=64, intermediate_size=128))  # 4-bit blocks hold 64 weights
    whole = Backbone.load(folder)
    eight = Backbone.load(folder, quantization="8bit")
    four = Backbone.load(folder, quantization="4bit")
    assert eight.fingerprint == four.fingerprint == whole.fingerprint
    exact = whole.encode(TEXTS)
    assert (eight.encode(TEXTS) * exact).sum(1).min() > 0.99
    assert (four.encode(TEXTS) * exact).sum(1).min() > 0.9


def test_chunks_hold_every_text_once_and_little_padding() -> None:
    lengths = np.array([3, 60, 5, 5, 17, 4, 9, 30])
    chunks = list(chunk_by_length(lengths, chunk_tokens=64))
    assert sorted(np.concatenate(chunks).tolist()) == list(range(8))
    assert all(len(chunk) * lengths[chunk].max() <= 64 for chunk in chunks)
    assert [int(lengths[chunk].max()) for chunk in chunks] == sorted(
        (int(lengths[c].max()) for c in chunks), reverse=True
    )


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("./nowhere", "no folder"),
        ("/nowhere/at/all", "no folder"),
        ("no-such-org/no-such-model-xyz", "cannot be loaded"),
    ],
)
def test_what_is_not_there_is_said_in_one_message(model: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=expected):
        Backbone.load(model)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"config\.json"):
        Backbone.load(str(tmp_path))


def test_more_tokens_than_positions_are_refused(tiny_bert: Path) -> None:
    with pytest.raises(BackboneError, match="at most 64"):
        Backbone.load(str(tiny_bert), max_length=65)


def test_an_unknown_architecture_is_refused_with_those_known(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Model

    build_encoder(tmp_path)
    GPT2Model(GPT2Config(vocab_size=200, n_embd=32, n_layer=1, n_head=4)).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r'"gpt2" is not known.*bert'):
        Backbone.load(str(tmp_path))


def test_what_bitsandbytes_compiles_is_compiled_at_its_first_call() -> None:
    compiled: list[dict[str, object]] = []

    def compile_now(function: Callable[[int], int], **options: object) -> Callable[[int], int]:
        compiled.append(options)
        return lambda number: 10 * function(number)

    later = _compile_later(compile_now, lambda number: number + 1, dynamic=False)
    assert compiled == []
    assert (later(1), later(2), compiled) == (20, 30, [{"dynamic": False}])
