"""What a store of adapters promises when nothing goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load, save_file

from peft_combo.errors import StoreError
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.manifest import BackboneStamp
from peft_combo.store.model_card import render_model_card
from peft_combo.store.references import parse_reference
from peft_combo.store.versions import AdapterRecord

FIELDS: dict[str, Any] = {
    "method": "adalora",
    "stored_as": "lora",
    "task": {"kind": "bundle", "temperature": 0.05},
    "backbone": {
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "fingerprint": "ab" * 32,
        "model_type": "bert",
        "dim": 384,
        "layers": 6,
        "pooling": "mean",
        "max_length": 64,
        "quantization": "none",
    },
    "recipe": {"name": "adalora-fashion", "data": {"path": "/home/someone/private"}},
    "data": {"name": "demo", "digest": "d1" * 32, "split_digest": "5e" * 32, "bundles": 120},
    "metrics": {
        "before": {"r@10": 0.1, "mrr": 0.05},
        "after": {"r@10": {"value": 0.3125, "low": 0.25, "high": 0.375}},
        "baselines": {"popularity": {"r@10": 0.02}, "TF-IDF | title": {"r@10": 0.2}},
        "protocol": "full ranking, split by user, seed 0",
    },
    "versions": {"peft": "0.19.0", "torch": "2.8.0"},
}


def write(store: AdapterStore, category: str = "fashion", value: float = 1.0, **changes: Any) -> AdapterRecord:
    with store.writing(category) as draft:
        save_file({"weight": np.full(4, value, np.float32)}, draft.path / "adapter_model.safetensors")
        (draft.path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        return draft.commit({**FIELDS, **changes})


def hidden(store: AdapterStore, prefix: str) -> list[str]:
    return [name for name in os.listdir(store.path) if name.startswith(prefix)]


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


def test_what_was_committed_is_what_opens(store: AdapterStore) -> None:
    written = write(store, value=7.0)
    read = store.open("fashion")
    assert (read.category, read.version, read.reference) == ("fashion", 1, "fashion@v1")
    assert read == written
    assert read.path == store.path / "fashion" / "v1"
    assert load(read.read("adapter_model.safetensors"))["weight"].tolist() == [7.0] * 4
    assert read.file("adapter_config.json").read_text() == '{"peft_type": "LORA"}'
    assert store.verify() == []


def test_the_manifest_lists_every_file_with_size_and_sha256(store: AdapterStore) -> None:
    record = write(store)
    raw = json.loads((record.path / "manifest.json").read_bytes())
    assert set(raw["files"]) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    for name, entry in raw["files"].items():
        content = (record.path / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert (raw["format"], raw["category"], raw["version"]) == (1, "fashion", 1)
    assert raw["data"]["bundles"] == 120


def test_versions_count_up_per_category_and_a_bare_name_is_the_latest(store: AdapterStore) -> None:
    for value in (1.0, 2.0, 3.0):
        write(store, value=value)
    write(store, "electronics")
    assert store.categories() == ("electronics", "fashion")
    assert store.versions("fashion") == (1, 2, 3)
    assert store.latest("fashion") == 3
    assert store.open("fashion").version == 3
    assert store.open("fashion@v2").version == 2
    assert [r.reference for r in store.list()] == ["electronics@v1", "fashion@v1", "fashion@v2", "fashion@v3"]


def test_version_ten_is_later_than_version_nine(store: AdapterStore) -> None:
    for _ in range(10):
        write(store)
    assert store.latest("fashion") == 10


def test_an_empty_or_absent_store_lists_nothing_and_makes_nothing(store: AdapterStore) -> None:
    assert (store.list(), store.categories(), store.versions("fashion"), store.verify()) == ([], (), (), [])
    assert store.clean() == 0
    assert not store.path.exists()


def test_the_number_of_a_removed_version_is_not_used_again(store: AdapterStore) -> None:
    for _ in range(3):
        write(store)
    assert store.remove("fashion@v3") == ("fashion@v3",)
    assert store.latest("fashion") == 2
    assert write(store).version == 4


def test_numbers_survive_the_removal_of_a_whole_category(store: AdapterStore) -> None:
    write(store)
    write(store)
    assert store.remove("fashion", all=True) == ("fashion@v1", "fashion@v2")
    assert store.categories() == ()
    assert not (store.path / "fashion").exists()
    assert write(store).version == 3


def test_where_the_record_of_numbers_is_lost_the_highest_that_exists_counts(store: AdapterStore) -> None:
    for _ in range(3):
        write(store)
    for claim in (store.path / ".taken").iterdir():
        claim.unlink()
    (store.path / ".taken").rmdir()
    assert write(store).version == 4


def test_a_version_copied_in_by_hand_keeps_its_number_after_removal(store: AdapterStore, tmp_path: Path) -> None:
    write(store)
    other = AdapterStore(tmp_path / "copy")
    (tmp_path / "copy").mkdir()
    (store.path / "fashion").rename(tmp_path / "copy" / "fashion")
    assert other.verify() == []
    other.remove("fashion@v1")
    assert write(other).version == 2


def test_removing_says_how_much_is_meant(store: AdapterStore) -> None:
    write(store)
    with pytest.raises(StoreError, match="--all"):
        store.remove("fashion")
    with pytest.raises(StoreError, match="names one version"):
        store.remove("fashion@v1", all=True)
    assert store.versions("fashion") == (1,)


def test_a_block_left_without_a_commit_leaves_nothing(store: AdapterStore) -> None:
    with store.writing("fashion") as draft:
        (draft.path / "head.safetensors").write_bytes(b"half")
        assert draft.path.parent == store.path
        assert draft.path.name.startswith(".")
        assert store.list() == []
    assert os.listdir(store.path) == []


def test_a_block_left_by_an_exception_leaves_nothing_and_hides_nothing(store: AdapterStore) -> None:
    def fail() -> None:
        with store.writing("fashion") as draft:
            (draft.path / "head.safetensors").write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(store.path) == []


def test_a_draft_commits_once_and_inside_its_block(store: AdapterStore) -> None:
    with store.writing("fashion") as draft:
        (draft.path / "notes.txt").write_text("x")
        draft.commit(FIELDS)
        with pytest.raises(StoreError, match="stored already, as fashion@v1"):
            draft.commit(FIELDS)
    with store.writing("fashion") as late:
        (late.path / "notes.txt").write_text("x")
    with pytest.raises(StoreError, match="inside the"):
        late.commit(FIELDS)
    assert store.versions("fashion") == (1,)


def test_numbers_of_numpy_and_models_are_stored_as_plain_values(store: AdapterStore) -> None:
    metrics = {"after": {"r@10": np.float32(0.5), "n": np.int64(3), "mrr": float("nan"), "ndcg@10": np.float64("inf")}}
    record = write(store, metrics=metrics, backbone=BackboneStamp(**FIELDS["backbone"]))
    assert store.open("fashion").manifest.metrics == {"after": {"r@10": 0.5, "n": 3, "mrr": None, "ndcg@10": None}}
    assert record.manifest.backbone.dim == 384


def test_the_digest_follows_the_files(store: AdapterStore) -> None:
    one, two = write(store, value=1.0), write(store, value=2.0)
    assert one.digest != two.digest
    assert store.open("fashion@v1").digest == one.digest
    assert len(one.digest) == 64


def test_artefacts_that_encode_differently_have_different_digests_even_with_equal_weights(tmp_path: Path) -> None:
    digests = set()
    for name, pooling in (("a", "mean"), ("b", "cls")):
        record = write(AdapterStore(tmp_path / name), backbone={**FIELDS["backbone"], "pooling": pooling})
        digests.add(record.digest)
    assert len(digests) == 2


def test_another_backbone_is_refused_in_one_line_that_names_both(store: AdapterStore) -> None:
    record = write(store)
    record.check_backbone("ab" * 32, "whatever it is called today")
    with pytest.raises(StoreError) as refusal:
        record.check_backbone("cd" * 32, "bert-base-uncased")
    text = str(refusal.value)
    assert text.startswith(
        "Adapter fashion@v1 was tuned on sentence-transformers/all-MiniLM-L6-v2 (fingerprint abababababab…), "
        "the loaded backbone is bert-base-uncased (fingerprint cdcdcdcdcdcd…)."
    )
    assert "\n" not in text


def test_files_are_readable_by_whoever_may_read_the_folder(store: AdapterStore) -> None:
    old = os.umask(0o022)
    try:
        record = write(store)
    finally:
        os.umask(old)
    assert {oct(path.stat().st_mode & 0o777) for path in record.path.iterdir()} == {"0o644"}


def test_the_card_of_a_library_is_replaced_by_ours(store: AdapterStore) -> None:
    with store.writing("fashion") as draft:
        (draft.path / "README.md").write_text("a template with [More Information Needed]")
        (draft.path / "head.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
        record = draft.commit(FIELDS)
    assert record.read("README.md").decode() == render_model_card(record.manifest)


def test_the_card_tells_what_how_and_how_good(store: AdapterStore) -> None:
    card = write(store).read("README.md").decode()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "pipeline_tag": "feature-extraction",
        "tags": ["peft-combo", "adalora", "lora"],
    }
    for expected in (
        "# fashion@v1",
        "| Data digest | " + "d1" * 32 + " |",
        "| | r@10 | mrr |",
        "| popularity (baseline) | 0.020 |  |",
        "| TF-IDF \\| title (baseline) | 0.200 |  |",
        "| backbone before tuning | 0.100 | 0.050 |",
        "| **this adapter** | 0.312 (0.250 to 0.375) |  |",
        "Protocol: full ranking, split by user, seed 0",
        "PeftModel.from_pretrained",
        'AdapterStore("adapters").open("fashion@v1")',
    ):
        assert expected in body
    assert "/home/someone" not in card


def test_the_card_of_an_adapter_without_peft_files_does_not_promise_peft(store: AdapterStore) -> None:
    with store.writing("fashion") as draft:
        save_file({"w": np.zeros(1, np.float32)}, draft.path / "head.safetensors")
        backbone = {**FIELDS["backbone"], "model": "embedded"}
        record = draft.commit({**FIELDS, "method": "head", "stored_as": "head", "metrics": {}, "backbone": backbone})
    card = record.read("README.md").decode()
    assert "library_name: peft-combo" in card
    assert "base_model" not in card
    assert "PeftModel" not in card
    assert "No figures were recorded." in card


def test_references_are_read_or_refused() -> None:
    assert parse_reference("home_kitchen-2") == ("home_kitchen-2", None, None)
    assert parse_reference("fashion@v12") == ("fashion", 12, None)
    assert parse_reference("fashion@prod.2-b") == ("fashion", None, "prod.2-b")
    for text in ("home_kitchen-2", "fashion@v12", "fashion@prod"):
        assert str(parse_reference(text)) == text
    for wrong in ("", "Fashion", "fashion@", "@v1", "fashion@v0", "fashion@v01", "fashion@2", "a/b", "..", "fashion\n",
                  "-x", ".x", "fashion@v١", "x" * 65, "fashion@v1@v2", "a\0b", "fashion@latest",
                  "fashion@v", "fashion@.prod", "fashion@Prod", "fashion@p/q", "fashion@" + "x" * 65):  # fmt: skip
        with pytest.raises(StoreError):
            parse_reference(wrong)


def test_importing_the_store_stays_light() -> None:
    heavy = "{'torch', 'peft', 'transformers', 'numpy', 'safetensors', 'datasets'}"
    code = f"import sys, peft_combo.store.adapter_store; sys.exit(repr(h) if (h := {heavy} & set(sys.modules)) else 0)"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
