"""Base models that are not whole: each refused in one message by every command, and nothing ever made up."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import build_encoder
from safetensors.torch import load_file, save_file
from test_importing import foreign
from torch import Tensor

from peft_combo import __main__
from peft_combo.cli import diagnostics
from peft_combo.encoder.architectures import ARCHITECTURES
from peft_combo.encoder.backbone import Backbone
from peft_combo.errors import BackboneError
from peft_combo.recipe.model import BackboneConfig

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 267967963\n"
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8"]
Spoil = Callable[[Path], Any]


def change(**fields: Any) -> Spoil:
    """Change fields of config.json."""

    def spoil(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return spoil


def write(name: str, text: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return spoil


def remove(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name: str, share: float) -> Spoil:
    return lambda folder: os.truncate(folder / name, int(share * (folder / name).stat().st_size))


def weights(edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Spoil:
    """Rewrite model.safetensors."""

    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file({name: t.clone() for name, t in edit(load_file(file)).items()}, file, metadata={"format": "pt"})

    return spoil


def rename(new: Callable[[str], str]) -> Spoil:
    return weights(lambda tensors: {new(name): tensor for name, tensor in tensors.items()})


def tokenizer(edit: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Rewrite tokenizer.json."""

    def spoil(folder: Path) -> None:
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        edit(content)
        file.write_text(json.dumps(content))

    return spoil


def more_words(content: dict[str, Any]) -> None:
    content["model"]["vocab"] |= {f"brand{number}": 200 + number for number in range(10)}


def no_words(content: dict[str, Any]) -> None:
    content["model"]["vocab"] = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}


def slow_tokenizer(vocabulary: str) -> Spoil:
    def spoil(folder: Path) -> None:
        remove("tokenizer.json", "tokenizer_config.json")(folder)
        write("vocab.txt", vocabulary)(folder)

    return spoil


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    remove("model.safetensors")(folder)


def pickle_renamed(folder: Path) -> None:
    pickled(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")


def a_shard_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    remove("model.safetensors")(folder)
    index = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(tensors)}
    write("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": index}))(folder)
    save_file(
        {name: tensors[name] for name in tensors if "00001" in index[name]}, folder / "model-00001-of-00002.safetensors"
    )


def custom_tokenizer(folder: Path) -> None:
    config = {"tokenizer_class": "ShopTokenizer", "auto_map": {"AutoTokenizer": ["shop.ShopTokenizer", None]}}
    write("tokenizer_config.json", json.dumps(config))(folder)
    write("shop.py", "raise SystemExit('this code was run')")(folder)


def custom_code(folder: Path) -> None:
    change(model_type="shopbert", auto_map={"AutoConfig": "shop.Config", "AutoModel": "shop.Model"})(folder)
    write("shop.py", "raise SystemExit('this code was run')")(folder)


def adapter_in_it(name: str) -> str:
    return name.replace(".query.", ".query.base_layer.")


def adapter_beside(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "encoder.layer.0.attention.self.query.lora_A.default.weight": torch.ones(2, 32)}


def integers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (t * 50).to(torch.int8) if "query.weight" in name else t for name, t in tensors.items()}


def two_encoders(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{side}.{name}": tensor for side in ("query_tower", "item_tower") for name, tensor in tensors.items()}


def into_a_folder(folder: Path) -> None:
    (folder / "checkpoint-500").mkdir()
    for file in [file for file in folder.iterdir() if file.is_file()]:
        shutil.move(file, folder / "checkpoint-500" / file.name)


BROKEN: dict[str, tuple[Spoil, str]] = {
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "expected tokenizer.json (or vocab.txt"),
    "settings of a tokenizer alone": (remove("tokenizer.json"), "expected tokenizer.json (or vocab.txt"),
    "pointer for weights": (write("model.safetensors", POINTER), "model.safetensors: is a Git LFS pointer"),
    "pointer for tokenizer.json": (write("tokenizer.json", POINTER), "tokenizer.json: is a Git LFS pointer"),
    "pointer for vocab.txt": (slow_tokenizer(POINTER), "vocab.txt: is a Git LFS pointer"),
    "web page for weights": (write("model.safetensors", "<!DOCTYPE html><html>"), "is a web page"),
    "half of the weights": (cut("model.safetensors", 0.5), "it was cut short"),
    "a few bytes of the weights": (cut("model.safetensors", 0.001), "is no whole safetensors file"),
    "no bytes of the weights": (cut("model.safetensors", 0), "model.safetensors: is empty"),
    "half of tokenizer.json": (cut("tokenizer.json", 0.5), "tokenizer.json: is not JSON"),
    "half of config.json": (cut("config.json", 0.5), "config.json: is not JSON"),
    "a model of tokenizers to come": (tokenizer(lambda t: t["model"].update(type="SuperPiece")), "pip install"),
    "a part of tokenizers to come": (tokenizer(lambda t: t["normalizer"].update(type="Quantum")), "pip install"),
    "more tokens than embeddings": (tokenizer(more_words), "210 tokens (the last: brand9), the model has 200"),
    "no words": (tokenizer(no_words), "knows no word"),
    "an empty vocab.txt": (slow_tokenizer(""), "vocab.txt: is empty"),
    "fewer layers in the config": (change(num_hidden_layers=2), "fewer or other layers than the weights hold"),
    "more layers in the config": (change(num_hidden_layers=4), "lack 16 of the encoder's 69 tensors"),
    "wider layers in the config": (change(hidden_size=64), "speaks of another encoder than the weights hold"),
    "no layers in the config": (change(num_hidden_layers=0), "fewer or other layers than the weights hold"),
    "fewer words in the config": (change(vocab_size=100), "speaks of another encoder than the weights hold"),
    "heads that do not divide": (change(num_attention_heads=5), "config.json:"),
    "a config without a kind": (change(model_type=None), "names no model_type"),
    "a kind that is not known": (change(model_type="gpt2"), '"gpt2" is not known here. Known: albert, bert'),
    "code of its own": (custom_code, "code of a model is never run"),
    "a tokenizer of its own": (custom_tokenizer, "code of a model is never run"),
    "a pickle": (pickled, 'pytorch_model.bin: is a pickle, which is not read: it may run code. Expected model.safet'),
    "a pickle by another name": (pickle_renamed, "is a pickle under another name"),
    "a shard missing": (a_shard_missing, "1 of them not there: model-00002-of-00002.safetensors"),
    "other names": (rename(lambda name: name.replace("encoder.layer", "blocks")), "lack 48 of the encoder's 53"),
    "an adapter in it": (rename(adapter_in_it), "Merge the adapter that is in them"),
    "an adapter beside it": (weights(adapter_beside), "hold an adapter that would not be used"),
    "8-bit weights": (weights(integers), "of I8"),
    "stored quantised": (change(quantization_config={"load_in_4bit": True}), "were stored quantised"),
    "two encoders": (weights(two_encoders), "hold 2 encoders, named"),
    "weights for TensorFlow": (
        lambda folder: (folder / "model.safetensors").rename(folder / "tf_model.h5"), "tf_model.h5, which is of another"
    ),
    "a pointer for the pooling": (write("1_Pooling/config.json", POINTER), "1_Pooling/config.json: is a Git LFS"),
    "one folder down": (into_a_folder, "checkpoint-500?"),
    "no config": (remove("config.json"), "no config.json in base"),
    "an adapter": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "adapter and no encoder"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Callable[[str], Path]:
    """Return a working folder in which `base` is broken in the named way."""
    made: dict[str, Path] = {}
    lora, _ = foreign(tmp_path_factory.mktemp("sound") / "lora", tiny_bert)

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("broken")
            shutil.copytree(tiny_bert, made[name] / "base")
            BROKEN[name][0](made[name] / "base")
            shutil.copytree(lora, made[name] / "lora")
        return made[name]

    return get


COMMANDS = {
    "tune": ("tune", "--recipe", "lora-fashion", "--set", "backbone.model=base"),
    "tune --dry-run": ("tune", "--recipe", "lora-fashion", "--set", "backbone.model=base", "--dry-run"),
    "embed": ("embed", "--recipe", "lora-fashion", "--set", "backbone.model=base"),
    "adapters import": ("adapters", "import", "lora", "--category", "shoes", "--backbone", "base"),
    "doctor": ("doctor", "--backbone", "base", "--json"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", BROKEN)
def test_every_command_refuses_a_base_that_is_not_whole_in_one_message(
    name: str, command: str, bases: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(bases(name))
    monkeypatch.setattr(sys, "argv", ["peft-combo", *COMMANDS[command]])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr(diagnostics, "CHECKS", {})
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 1
    if command == "doctor":
        (found,) = json.loads(out)
        assert found["status"] == "problem"
        err = f"{found['found']} {found['remedy']}"
        assert "Traceback" not in out
    assert BROKEN[name][1] in err
    assert "Traceback" not in err
    assert err.strip().count("\n") <= 2
    assert sys.stdin.read(2) == "y\n"  # nobody was asked


def test_the_doctor_s_table_has_a_long_remedy_below_it_in_one_line(
    bases: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bases("a pickle"))
    monkeypatch.setattr(sys, "argv", ["peft-combo", "doctor", "--backbone", "base"])
    monkeypatch.setattr(diagnostics, "CHECKS", {})
    with pytest.raises(SystemExit):
        __main__.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:-1]] == [["!!", "base", "backbone"]]
    assert lines[-1].startswith("base backbone: pytorch_model.bin: is a pickle")


def test_nothing_of_a_refused_base_was_left_behind(bases: Callable[[str], Path]) -> None:
    assert not (bases("a pickle") / "base" / "model.safetensors").exists()
    assert not list(bases("code of its own").glob("adapters/*/v*"))


def test_the_conversion_of_a_pickle_is_a_command_that_works(
    bases: Callable[[str], Path], tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bases("a pickle") / "base", tmp_path / "base")
    with pytest.raises(BackboneError) as caught:
        Backbone.load(str(tmp_path / "base"))
    program = str(caught.value).split('python -c "')[1].split('")')[0]
    monkeypatch.chdir(tmp_path / "base")
    exec(program, {})
    assert Backbone.load(str(tmp_path / "base")).fingerprint == Backbone.load(str(tiny_bert)).fingerprint


def test_weights_that_are_not_numbers_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "base")
    weights(lambda tensors: {name: t * float("nan") for name, t in tensors.items()})(tmp_path / "base")
    with pytest.raises(BackboneError, match="not finite, as in embeddings"):
        Backbone.load(str(tmp_path / "base"))


# --- what is understood -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("bert.", False), ("module.", True), ("_orig_mod.", True), ("model.", True), ("encoder.", True),
        ("0.auto_model.", True), ("_orig_mod.module.bert.", True), ("module._orig_mod.", True), ("student.bert.", True),
    ],
)  # fmt: skip
def test_a_wrapper_s_prefix_is_understood_and_said(prefix: str, said: bool, tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "base")
    rename(lambda name: prefix + name)(tmp_path / "base")
    real, found = Backbone.load(str(tiny_bert)), Backbone.load(str(tmp_path / "base"))
    assert found.fingerprint == real.fingerprint
    np.testing.assert_array_equal(found.encode(TEXTS), real.encode(TEXTS))
    assert [f'start with "{prefix}"' in note for note in found.notes] == [True] * said
    assert Backbone.blueprint(BackboneConfig(model=str(tmp_path / "base"))).notes == found.notes


def test_a_prefix_is_understood_in_8_bits_too(tmp_path: Path) -> None:
    real = build_encoder(tmp_path / "real", hidden_size=64, intermediate_size=128)
    shutil.copytree(real, tmp_path / "base")
    rename(lambda name: f"_orig_mod.{name}")(tmp_path / "base")
    one, other = (Backbone.load(str(folder), quantization="8bit") for folder in (real, tmp_path / "base"))
    assert one.fingerprint == other.fingerprint
    np.testing.assert_array_equal(one.encode(TEXTS), other.encode(TEXTS))


@pytest.mark.parametrize("prefix", ["", "bert.", "module.bert."])
def test_names_of_old_are_understood(prefix: str, tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "base")

    def old(name: str) -> str:
        return prefix + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    rename(old)(tmp_path / "base")
    found = Backbone.load(str(tmp_path / "base"))
    assert found.fingerprint == Backbone.load(str(tiny_bert)).fingerprint
    assert len(found.notes) == (prefix == "module.bert.")


@pytest.mark.parametrize(
    "kind", ["AutoModelForSequenceClassification", "AutoModelForMaskedLM", "AutoModelForTokenClassification"]
)
def test_a_task_head_or_a_pooler_that_is_left_over_is_fine(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    import transformers

    shutil.copytree(tiny_bert, tmp_path / "base")
    getattr(transformers, kind).from_pretrained(tiny_bert).save_pretrained(tmp_path / "base")
    found = Backbone.load(str(tmp_path / "base"))
    assert (found.fingerprint, found.notes) == (Backbone.load(str(tiny_bert)).fingerprint, ())


@pytest.mark.parametrize("prefix", ["", "_orig_mod.bert."])
def test_shards_are_read_as_one_file(prefix: str, tiny_bert: Path, tmp_path: Path) -> None:
    import transformers

    shutil.copytree(tiny_bert, tmp_path / "base")
    transformers.AutoModel.from_pretrained(tiny_bert).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    remove("model.safetensors")(tmp_path / "base")
    shards = sorted((tmp_path / "base").glob("model-*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        tensors = {prefix + name: t.clone() for name, t in load_file(shard).items()}
        save_file(tensors, shard, metadata={"format": "pt"})
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    index["weight_map"] = {prefix + name: file for name, file in index["weight_map"].items()}
    write("model.safetensors.index.json", json.dumps(index))(tmp_path / "base")
    assert Backbone.load(str(tmp_path / "base")).fingerprint == Backbone.load(str(tiny_bert)).fingerprint


def test_a_missing_pooler_is_fine(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "base")
    weights(lambda tensors: {name: t for name, t in tensors.items() if "pooler" not in name})(tmp_path / "base")
    assert Backbone.load(str(tmp_path / "base")).fingerprint == Backbone.load(str(tiny_bert)).fingerprint


def test_code_that_is_not_needed_is_not_run_and_said(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "base")
    change(auto_map={"AutoModel": "shop.Model"})(tmp_path / "base")
    write("shop.py", "raise SystemExit('this code was run')")(tmp_path / "base")
    (note,) = Backbone.load(str(tmp_path / "base")).notes
    assert "is not run: it is read as a plain bert" in note


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_two_loads_are_one_whatever_the_dice(architecture: str, tmp_path: Path) -> None:
    folder = build_encoder(tmp_path, "roberta" if architecture in ("camembert", "xlm-roberta") else architecture)
    change(model_type=architecture)(folder)
    fingerprints = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        fingerprints.append(Backbone.load(str(folder), max_length=16).fingerprint)
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (slow_tokenizer("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nw1\nw2"), "knows 7 tokens, the model has 200 embeddings"),
        (change(model_type="roberta"), "has the model_type roberta, and BertModel is a bert"),
        (change(architectures=["ShopModel"]), ""),
    ],
)
def test_what_hardly_belongs_together_is_said(spoil: Spoil, told: str, tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "base")
    spoil(tmp_path / "base")
    notes = Backbone.load(str(tmp_path / "base"), max_length=16).notes
    assert len(notes) == bool(told)
    assert told in "".join(notes)


# --- where it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("./bsae", 'Did you mean "base"?'), ("bsae", 'Did you mean "base"?'), ("models/bsae/x/y", "no folder models"),
        ("a model", "no folder a model"), ("base/config.json", "it is a file. Expected the folder it lies in: base"),
        ("a\0b", "no folder"), ("x" * 300, "no folder"), ("a\nb\x1b[31m", "no folder a\\nb\\x1b[31m"),
        ("embeded", 'Did you mean "embedded"?'),
    ],
)  # fmt: skip
def test_a_name_that_is_none_is_refused_with_the_nearest(
    model: str, told: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    shutil.copytree(tiny_bert, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackboneError) as caught:
        Backbone.load(model)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_network_the_hub_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(BackboneError, match="the hub cannot be reached"):
        Backbone.load("no-such-org/no-such-model")
    assert time.monotonic() - started < 5


def test_a_download_of_before_opens_without_a_network(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--shop--tiny"
    repository.mkdir()
    write("refs/main", "0" * 40)(repository)
    shutil.copytree(tiny_bert, repository / "snapshots" / ("0" * 40))
    found = Backbone.load("shop/tiny")
    assert (found.fingerprint, found.base_name) == (Backbone.load(str(tiny_bert)).fingerprint, "shop/tiny")


# --- what it says of itself -------------------------------------------------------------------------------------------

SETTINGS = "config_sentence_transformers"
MODULES = [
    {"idx": n, "name": str(n), "path": f"{n}_{kind}" if n else "", "type": f"sentence_transformers.models.{kind}"}
    for n, kind in enumerate(("Transformer", "Pooling", "Normalize"))
]


@pytest.fixture
def saying(tiny_bert: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a base with files of sentence-transformers."""

    def make(pooling: Any = None, modules: Any = MODULES, **files: Any) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(tiny_bert, folder)
        if pooling is not None:
            write("1_Pooling/config.json", json.dumps(pooling))(folder)
        if modules is not None:
            write("modules.json", json.dumps(modules))(folder)
        for name, content in files.items():
            write(f"{name}.json", json.dumps(content))(folder)
        return folder

    return make


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        {"pooling_mode": "cls", "embedding_dimension": 32},
        {"pooling_mode": ["cls"]},
    ],
)
@pytest.mark.parametrize("modules", [MODULES, None])
def test_the_pooling_of_a_base_is_taken_where_none_is_named(
    pooling: Any, modules: Any, saying: Callable[..., Path]
) -> None:
    folder = str(saying(pooling, modules))
    own, cls, mean = (Backbone.load(folder, pooling=asked) for asked in (None, "cls", "mean"))  # type: ignore[arg-type]
    np.testing.assert_array_equal(own.encode(TEXTS), cls.encode(TEXTS))
    assert (own.stamp()["pooling"], mean.stamp()["pooling"]) == ("cls", "mean")
    assert [len(backbone.notes) for backbone in (own, cls, mean)] == [1, 0, 1]
    assert "--set backbone.pooling=cls" in mean.notes[0]


@pytest.mark.parametrize(
    ("pooling", "taken", "told"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean", ""), ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean", ""),
        ({"pooling_mode_max_tokens": True}, "mean", "pools by max_tokens"), ({}, "mean", ""),
        ({"pooling_mode": "lasttoken"}, "mean", "pools by lasttoken"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "mean", "cls_token and mean_tokens"),
    ],
)  # fmt: skip
def test_a_pooling_that_cannot_be_followed_is_said(
    pooling: Any, taken: str, told: str, saying: Callable[..., Path]
) -> None:
    backbone = Backbone.load(str(saying(pooling)))
    assert backbone.pooling == taken
    assert len(backbone.notes) == bool(told)
    assert told in "".join(backbone.notes)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({SETTINGS: {"prompts": {"query": "query: ", "document": "passage: "}}}, "'backbone.text_prefix=passage: '"),
        ({SETTINGS: {"prompts": {"query": "", "document": ""}}}, ""),
        ({SETTINGS: {"prompts": {"a": "Say: "}, "default_prompt_name": "a"}}, ""),
        ({SETTINGS: {"similarity_fn_name": "dot"}}, "compares vectors by dot"),
        ({"modules": MODULES[:2]}, "leaves vectors at their own length"),
        ({"modules": [*MODULES, {"type": "sentence_transformers.models.Dense", "path": "3_Dense"}]}, "models.Dense"),
        ({"modules": [{"type": "custom_st.Transformer", "path": ""}, *MODULES[1:]]}, "custom_st.Transformer"),
        ({"sentence_bert_config": {"max_seq_length": 32}}, "--set backbone.max_length=32"),
        ({"sentence_bert_config": {"max_seq_length": 512}}, ""),
    ],
)  # fmt: skip
def test_what_else_a_base_says_and_is_not_done_is_said(
    files: dict[str, Any], told: str, saying: Callable[..., Path]
) -> None:
    notes = Backbone.load(str(saying({"pooling_mode": "mean"}, **files))).notes
    assert len(notes) == bool(told)
    assert told in "".join(notes)


def test_a_base_of_modules_may_keep_its_encoder_in_a_folder(saying: Callable[..., Path], tiny_bert: Path) -> None:
    modules = [{**MODULES[0], "path": "0_Transformer"}, *MODULES[1:]]
    folder = saying({"pooling_mode": "cls"}, modules)
    (folder / "0_Transformer").mkdir()
    for file in tiny_bert.iterdir():
        shutil.move(folder / file.name, folder / "0_Transformer" / file.name)
    assert Backbone.load(str(folder)).fingerprint == Backbone.load(str(tiny_bert)).fingerprint
    assert Backbone.load(str(folder)).pooling == "cls"


def test_the_embedded_base_needs_no_words() -> None:
    assert Backbone.blueprint(BackboneConfig(max_length=256)).notes == ()


def test_a_stored_adapter_names_a_base_that_opens_from_anywhere(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_bert.parent)
    backbone = Backbone.load(tiny_bert.name)
    assert backbone.base_name == backbone.stamp()["model"] == str(tiny_bert.resolve())
    assert Backbone.blueprint(BackboneConfig()).base_name == "sentence-transformers/all-MiniLM-L6-v2"
