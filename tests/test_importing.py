"""PEFT adapters from elsewhere: what fits comes out as PEFT computes it, everything else is refused with its reason."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from conformance_cases import METHODS
from conftest import REPOSITORY
from made_up import build_encoder
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from test_bank import store_adapter

from peft_combo.adapters.export import export
from peft_combo.adapters.import_peft import import_adapter
from peft_combo.callbacks import RunCallback
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.errors import BackboneError, PeftComboError, StoreError
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.versions import AdapterRecord


class Notes(RunCallback):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w12 w13"]
SOME_LAYERS = r".*layer\.[02]\.attention\.self\.(query|value)"
KINDS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]),
    "by expression": peft.LoraConfig(r=4, lora_alpha=8, target_modules=SOME_LAYERS),
    "patterns": peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["query", "value"], rank_pattern={"layer.1.attention.self.query": 2},
        alpha_pattern={"value": 3}, layers_to_transform=[0, 1],
    ),
    "rslora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["dense"], use_rslora=True),
    "dora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["dense"], use_dora=True),
    "prefix": peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=5),
    "prompt": peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=5),
    "p-tuning": peft.PromptEncoderConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=5, encoder_hidden_size=16
    ),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["query", "value"]),
    "ia3": peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    "vera": peft.VeraConfig(r=8, target_modules=["query", "value"]),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=["query", "value"], alpha_pattern={"value": 5}),
    "lokr": peft.LoKrConfig(r=2, target_modules=["query", "value"]),
    "randlora": peft.RandLoraConfig(r=8, randlora_alpha=16, target_modules=["query", "value"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=16, target_modules=["query", "value"]),
    "layer-norm": peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="FEATURE_EXTRACTION"),
    "tokens": peft.TrainableTokensConfig(token_indices=[6, 10], target_modules=["word_embeddings"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def backbone(tiny_bert: Path) -> Backbone:
    return Backbone.load(str(tiny_bert), max_length=16)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


def foreign(folder: Path, tiny_bert: Path, kind: str = "lora") -> tuple[Path, NDArray[np.float32]]:
    """Save an adapter with plain PEFT, its weights moved well away from zero; return what it makes of the texts."""
    backbone = Backbone.load(str(tiny_bert), max_length=16)
    encoder = Backbone.load(str(tiny_bert)).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice and transformers' plans
        model = peft.get_peft_model(encoder, KINDS[kind]).eval()
    scatter(model)
    vectors = encode_by_peft(model, backbone)
    model.save_pretrained(folder)
    return folder, vectors


def scatter(model: torch.nn.Module) -> None:
    """Move what was trained well away from where it started."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def encode_by_peft(model: peft.PeftModel, backbone: Backbone) -> NDArray[np.float32]:
    with torch.no_grad():
        tokens = [backbone.tokenizer(text, return_tensors="pt") for text in TEXTS]
        states = [model(input_ids=t["input_ids"], attention_mask=t["attention_mask"]) for t in tokens]
    prompt = model.active_peft_config.peft_type in ("PROMPT_TUNING", "P_TUNING")
    first = model.active_peft_config.num_virtual_tokens if prompt else 0
    pooled = torch.cat([state.last_hidden_state[:, first:].mean(1) for state in states])
    return torch.nn.functional.normalize(pooled).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_adapter_encodes_as_plain_peft_does(
    kind: str, backbone: Backbone, store: AdapterStore, tiny_bert: Path, tmp_path: Path
) -> None:
    folder, expected = foreign(tmp_path / "peft", tiny_bert, kind)
    record = import_adapter(folder, "fashion", backbone, store)
    assert store.verify() == []
    assert store.open("fashion") == record
    bank = AdapterBank(backbone, store)
    np.testing.assert_allclose(bank.encode(TEXTS, "fashion"), expected, atol=2e-6)
    assert np.abs(backbone.encode(TEXTS) - expected).max() > 0.003
    assert record.manifest.method == ("lora" if kind in ("by expression", "patterns", "rslora") else kind)
    # What the store holds is a folder that PEFT opens by itself.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(Backbone.load(str(tiny_bert)).model, record.path).eval()
    np.testing.assert_allclose(encode_by_peft(again, backbone), expected, atol=2e-6)


def test_the_head_of_an_imported_adapter_scores_like_cosine(
    backbone: Backbone, store: AdapterStore, tiny_bert: Path, tmp_path: Path
) -> None:
    import_adapter(foreign(tmp_path / "peft", tiny_bert)[0], "fashion", backbone, store)
    head: BundleHead = AdapterBank(backbone, store).get("fashion").head
    items = torch.nn.functional.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(head.target(items), items)
    mean = torch.nn.functional.normalize(items[:2].mean(0, keepdim=True))
    torch.testing.assert_close(head.query(items, torch.tensor([[0, 1, -1]])), mean)


def test_what_was_tuned_here_can_be_imported_elsewhere(
    backbone: Backbone, store: AdapterStore, tiny_bert: Path, tmp_path: Path
) -> None:
    first = import_adapter(foreign(tmp_path / "peft", tiny_bert)[0], "fashion", backbone, store)
    other = AdapterStore(tmp_path / "other")
    second = import_adapter(first.path, "shoes", backbone, other)
    vectors = [AdapterBank(backbone, one).encode(TEXTS, name) for one, name in ((store, "fashion"), (other, "shoes"))]
    np.testing.assert_array_equal(*vectors)
    assert second.manifest.imported is not None
    assert second.manifest.imported.folder == "v1"


def test_the_card_and_the_manifest_say_that_it_was_imported_and_not_measured(
    backbone: Backbone, store: AdapterStore, tiny_bert: Path, tmp_path: Path
) -> None:
    record = import_adapter(foreign(tmp_path / "somebody", tiny_bert)[0], "fashion", backbone, store)
    stamp = record.manifest.imported
    assert stamp is not None
    assert (stamp.folder, stamp.base_model, stamp.peft_version) == ("somebody", str(tiny_bert), peft.__version__)
    assert (record.manifest.metrics, record.manifest.recipe, record.manifest.data.name) == ({}, {}, "not known")
    card = record.read("README.md").decode()
    for words in (
        "imported into peft-combo",
        "Not measured.",
        'pooling="mean"',
        "| Imported from | somebody",
        "is not known",
    ):
        assert words in card
    assert "No figures were recorded" not in card


def test_a_pruned_adalora_is_folded_as_peft_reads_it(
    backbone: Backbone, store: AdapterStore, tiny_bert: Path, tmp_path: Path
) -> None:
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, tinit=1, tfinal=2, deltaT=1, total_step=8, target_modules=["query", "value"]
    )
    torch.manual_seed(0)  # where it starts decides what is pruned
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Backbone.load(str(tiny_bert)).model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    tokens = backbone.tokenizer(TEXTS, return_tensors="pt", padding=True)
    for step in range(1, 9):
        states = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(step))).mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the ranks that were pruned to nothing
        model.save_pretrained(tmp_path / "peft")
    record = import_adapter(tmp_path / "peft", "fashion", backbone, store)
    ranks = json.loads(record.read("adapter_config.json"))["rank_pattern"]
    assert max(ranks.values()) > min(ranks.values())  # pruned unevenly
    np.testing.assert_allclose(
        AdapterBank(backbone, store).encode(TEXTS, "fashion"), encode_by_peft(model.eval(), backbone), atol=2e-6
    )


HEADED: dict[str, tuple[str, peft.PeftConfig]] = {
    "lora": ("SequenceClassification", peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")),
    "lora by token": ("TokenClassification", peft.LoraConfig(r=2, target_modules=["query"], task_type="TOKEN_CLS")),
    "lora with pooler": ("SequenceClassification", peft.LoraConfig(r=2, target_modules="all-linear",
                                                                   task_type="SEQ_CLS")),
    "lora of a word model": ("MaskedLM", peft.LoraConfig(r=2, target_modules=["query"])),
    "lora, patterns": ("SequenceClassification", peft.LoraConfig(
        r=2, target_modules=["query"], task_type="SEQ_CLS",
        rank_pattern={"bert.encoder.layer.1.attention.self.query": 3}, alpha_pattern={"query": 5})),
    "lora, own head": ("SequenceClassification", peft.LoraConfig(r=2, target_modules=["query"],
                                                                 modules_to_save=["classifier"])),
    "adalora": ("SequenceClassification", peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, task_type="SEQ_CLS")),
    "ia3": ("SequenceClassification", peft.IA3Config(task_type="SEQ_CLS")),
    "prefix": ("SequenceClassification", peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)),
    "prompt": ("SequenceClassification", peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADED)
def test_what_was_tuned_with_a_task_head_is_imported_without_it(
    name: str, backbone: Backbone, store: AdapterStore, tiny_bert: Path, tmp_path: Path
) -> None:
    head, config = HEADED[name]
    model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tiny_bert)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config).eval()
    scatter(wrapped)
    with torch.no_grad():
        tokens = [backbone.tokenizer(text, return_tensors="pt") for text in TEXTS]
        states = [
            wrapped(input_ids=t["input_ids"], attention_mask=t["attention_mask"], output_hidden_states=True)
            for t in tokens
        ]
    first = 5 if name == "prompt" else 0
    pooled = torch.cat([state.hidden_states[-1][:, first:].mean(1) for state in states])
    wrapped.save_pretrained(tmp_path / "peft")
    callback = Notes()
    import_adapter(tmp_path / "peft", "fashion", backbone, store, callback)
    found = AdapterBank(backbone, store).encode(TEXTS, "fashion")
    np.testing.assert_allclose(found, torch.nn.functional.normalize(pooled).numpy(), atol=2e-6)
    assert len(callback.notes) == (name != "lora of a word model")
    assert all("of its head were left out" in note for note in callback.notes)


def test_weights_of_the_encoder_that_were_trained_too_are_no_head(
    backbone: Backbone, store: AdapterStore, tiny_bert: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["LayerNorm"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "peft")
    with pytest.raises(StoreError, match="weights of the encoder that were trained too") as caught:
        import_adapter(tmp_path / "peft", "fashion", backbone, store)
    assert str(caught.value).count("\n") <= 2


# --- what was stored or exported here ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_version_of_another_store_is_imported_whole(
    method: str, backbone: Backbone, store: AdapterStore, tmp_path: Path
) -> None:
    first = store_adapter(AdapterStore(tmp_path / "first"), backbone, "shoes", METHODS[method])
    shutil.copytree(first.path, tmp_path / "copied")
    record = import_adapter(tmp_path / "copied", "fashion", backbone, store)
    assert store.verify() == []
    kept = ("method", "stored_as", "task", "backbone", "recipe", "data", "metrics", "versions")
    assert [getattr(record.manifest, one) for one in kept] == [getattr(first.manifest, one) for one in kept]
    assert record.read(HEAD_FILE) == first.read(HEAD_FILE)
    there = AdapterBank(backbone, AdapterStore(tmp_path / "first")).encode(TEXTS, "shoes")
    np.testing.assert_array_equal(AdapterBank(backbone, store).encode(TEXTS, "fashion"), there)


@pytest.mark.parametrize(
    "folder", sorted((REPOSITORY / "tests/stored/adapters").glob("*/v1")), ids=lambda f: f.parent.name
)
def test_what_an_earlier_version_stored_is_imported(folder: Path, store: AdapterStore) -> None:
    backbone = Backbone.load(str(REPOSITORY / "tests/stored/encoder"), max_length=16)
    record = import_adapter(folder, "fashion", backbone, store)
    assert record.read(HEAD_FILE) == (folder / HEAD_FILE).read_bytes()
    assert record.manifest.recipe["category"] == folder.parent.name


def test_a_version_that_was_altered_or_is_of_another_encoder_is_refused(
    backbone: Backbone, store: AdapterStore, tmp_path: Path
) -> None:
    first = store_adapter(AdapterStore(tmp_path / "first"), backbone, "shoes", METHODS["vera"])
    other = Backbone.load(str(build_encoder(tmp_path / "other", seed=1)), max_length=16)
    with pytest.raises(StoreError, match="was tuned on"):
        import_adapter(first.path, "fashion", other, store)
    shutil.copytree(first.path, tmp_path / "altered")
    with (tmp_path / "altered" / HEAD_FILE).open("ab") as file:
        file.write(b"x")
    with pytest.raises(StoreError, match=r"head.safetensors: was altered"):
        import_adapter(tmp_path / "altered", "fashion", backbone, store)
    shutil.copytree(first.path, tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").write_text("[]")
    callback = Notes()
    record = import_adapter(tmp_path / "foreign", "fashion", backbone, store, callback)
    assert "manifest.json is not one of a stored adapter" in callback.notes[0]
    assert record.manifest.method == "vera"


def test_a_version_s_configuration_is_believed_no_more_than_a_foreign_one(
    backbone: Backbone, store: AdapterStore, tmp_path: Path
) -> None:
    first = store_adapter(AdapterStore(tmp_path / "first"), backbone, "shoes", METHODS["lora"])
    folder = tmp_path / "hostile"
    shutil.copytree(first.path, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"megatron_config": {"x": 1}}
    content = json.dumps(config).encode()
    (folder / "adapter_config.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["adapter_config.json"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="megatron_config: is not known here"):
        import_adapter(folder, "fashion", backbone, store)


@pytest.mark.parametrize("method", ["lora", "ia3", "full"])
def test_a_merged_export_is_imported_as_the_weights_it_changes(
    method: str, backbone: Backbone, store: AdapterStore, tmp_path: Path
) -> None:
    there = AdapterStore(tmp_path / "first")
    store_adapter(there, backbone, "shoes", METHODS[method])
    live = AdapterBank(backbone, there).get("shoes")
    export(live, backbone, tmp_path / "merged", "merged", texts=[f"w{number} w{number + 1}" for number in range(60)])
    record = import_adapter(tmp_path / "merged", "fashion", backbone, store)
    assert (record.manifest.stored_as, record.manifest.task) == ("weights", live.record.manifest.task)
    found = AdapterBank(backbone, store).encode(TEXTS, "fashion")
    np.testing.assert_allclose(found, backbone.encode(TEXTS, live.attached), atol=2e-6)
    assert record.read(HEAD_FILE) == live.record.read(HEAD_FILE)
    other = Backbone.load(str(build_encoder(tmp_path / "other", seed=1)), max_length=16)
    with pytest.raises(StoreError, match="was made of"):
        import_adapter(tmp_path / "merged", "fashion", other, store)
    manifest = json.loads((tmp_path / "merged" / "export.json").read_text())
    (tmp_path / "merged" / "export.json").write_text(json.dumps(manifest | {"exported_as": "onnx"}))
    with pytest.raises(StoreError, match=r"is an export of shoes@v1 as onnx, a graph\. Import the stored adapter"):
        import_adapter(tmp_path / "merged", "fashion", backbone, store)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def genuine(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign(tmp_path_factory.mktemp("genuine") / "peft", tiny_bert)[0]


@pytest.fixture
def refused(genuine: Path, backbone: Backbone, store: AdapterStore, tmp_path: Path) -> Callable[..., str]:
    """Copy the genuine folder, spoil it, and return why it was refused; nothing may be stored then."""

    def act(spoil: Callable[[Path], Any] | None = None, **config: Any) -> str:
        folder = tmp_path / "spoiled"
        folder.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).write_bytes((genuine / name).read_bytes())
        changed = {**json.loads((folder / "adapter_config.json").read_text()), **config}
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        if spoil is not None:
            spoil(folder)
        with pytest.raises(StoreError) as caught:
            import_adapter(folder, "fashion", backbone, store)
        assert store.list() == []
        return str(caught.value)

    return act


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"peft_type": "LROA"}, 'Did you mean "LORA"?'),
        ({"peft_type": "IA3"}, "is not known here"),
        ({"peft_type": "POLY"}, "expected one of LORA, ADALORA, PREFIX_TUNING"),
        ({"peft_type": ["LORA"]}, "found a list"),
        ({"r": 5}, "expected the shape (5, 32), found (4, 32)"),
        ({"r": 10**9}, "r: expected a number from 1 to 1024"),
        ({"lora_alpha": -1}, "lora_alpha: expected a number from 0"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a number"),
        ({"use_dora": True}, "does not fit the encoder"),  # its magnitudes are missing
        ({"use_dora": 1}, "use_dora: expected true or false"),
        ({"init_lora_weights": "pissa"}, "changes the frozen weights too"),
        ({"bias": "all"}, "bias: expected none"),
        ({"rank_pattern": {"(a+)+$": 4}}, "expressions are not run"),
        ({"alpha_pattern": {"query": "many"}}, "alpha_pattern.query: expected a number"),
        ({"modules_to_save": ["query"]}, "weights of the encoder that were trained too"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: is not known here"),
        ({"layer_replication": [[0, 10**6]]}, "layer_replication: is not known here"),
        ({"megatron_config": {"x": 1}, "megatron_core": "os"}, "megatron_config: is not known here"),
        ({"from_the_future": "yes"}, "from_the_future: is not known here"),
    ],
)  # fmt: skip
def test_a_configuration_that_says_more_or_other_than_is_known_is_refused(
    config: dict[str, Any], told: str, refused: Callable[..., str]
) -> None:
    assert told in refused(**config)


def test_nothing_a_configuration_names_is_imported_opened_or_fetched(
    genuine: Path, backbone: Backbone, store: AdapterStore, tmp_path: Path
) -> None:
    config = json.loads((genuine / "adapter_config.json").read_text())
    hostile = {
        "auto_mapping": {"base_model_class": "System", "parent_library": "antigravity"},
        "base_model_name_or_path": "../../../etc/passwd", "revision": "evil", "megatron_core": "antigravity",
        "target_modules": "(a+)+$", "exclude_modules": "(.*)*x", "layers_pattern": "(x+x+)+y",
    }  # fmt: skip
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**config, **hostile}))
    (folder / "adapter_model.safetensors").write_bytes((genuine / "adapter_model.safetensors").read_bytes())
    record = import_adapter(folder, "fashion", backbone, store)
    stored = json.loads(record.read("adapter_config.json"))
    assert not set(map(str, hostile.values())) & set(map(str, stored.values()))
    assert stored["base_model_name_or_path"] == backbone.base_name
    assert stored["target_modules"] == [
        f"encoder.layer.{layer}.attention.self.{part}" for layer in range(3) for part in ("query", "value")
    ]


def rename(old: str, new: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({name.replace(old, new): t for name, t in tensors.items()}, folder / "adapter_model.safetensors")

    return spoil


def poison(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")


def claim(size: int) -> Callable[[Path], None]:
    """Write a header that speaks of a tensor much larger than the file."""

    def spoil(folder: Path) -> None:
        name = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
        header = json.dumps({name: {"dtype": "F32", "shape": [4, size], "data_offsets": [0, 16 * size]}}).encode()
        (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)

    return spoil


def as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def as_integers(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: t.to(torch.int8) for name, t in tensors.items()}, folder / "adapter_model.safetensors")


def linked(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (as_pickle, "adapter_model.bin is not read: it is a pickle, which runs code"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: is missing"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json: is missing"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text(" " * 2**21), "larger than"),
        (lambda folder: os.truncate(folder / "adapter_model.safetensors", 400), "cannot be read"),
        (claim(2**60), "cannot be read"),
        (claim(8), "cannot be read"),
        (linked("adapter_config.json"), "links are not followed"),
        (linked("adapter_model.safetensors"), "links are not followed"),
        (rename("encoder.layer", "encoder.blocks"), "has no linear layer encoder.blocks.0"),
        (rename("lora_A", "lora_C"), "is not a tensor of LoRA"),
        (rename("layer.0.", "layer.9."), "has no linear layer encoder.layer.9"),
        (rename("layer.0.attention.self.query.lora_B", "layer.0.attention.self.key.lora_B"), "does not fit"),
        (rename("attention.self.query", "../../x"), "no linear layer"),
        (poison, "not finite"),
        (as_integers, "of I8"),
    ],
)  # fmt: skip
def test_files_that_are_not_what_they_should_be_are_refused(
    spoil: Callable[[Path], Any], told: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    text = refused(spoil)
    assert told in text
    assert ".draft-" not in text


def test_a_prefix_of_another_encoder_is_refused(tiny_bert: Path, backbone: Backbone, store: AdapterStore) -> None:
    folder, _ = foreign(store.path.parent / "peft", tiny_bert, "prefix")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: t[:, :64].contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(StoreError, match=re.escape("expected prompt_embeddings (5, 192)")):
        import_adapter(folder, "fashion", backbone, store)
    short = Backbone(backbone.name, backbone.model, backbone.tokenizer, "mean", 16)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "num_virtual_tokens": 60}))
    save_file({"prompt_embeddings": torch.zeros(60, 192)}, folder / "adapter_model.safetensors")
    with pytest.raises(BackboneError, match="virtual tokens leave"):
        import_adapter(folder, "fashion", short, store)
    assert store.list() == []


@pytest.mark.parametrize("folder", ["nowhere", "a\0b", "x" * 300])
def test_a_folder_that_is_none_is_refused(folder: str, backbone: Backbone, store: AdapterStore) -> None:
    with pytest.raises(PeftComboError, match="cannot be imported"):
        import_adapter(folder, "fashion", backbone, store)


def test_an_import_is_a_version_like_any_other(genuine: Path, backbone: Backbone, store: AdapterStore) -> None:
    records: list[AdapterRecord] = [import_adapter(genuine, "fashion", backbone, store) for _ in range(2)]
    assert [record.reference for record in records] == ["fashion@v1", "fashion@v2"]
    store.alias("fashion@v1", "prod")
    bank = AdapterBank(backbone, store)
    assert bank.get("fashion@prod").reference == "fashion@v1"
