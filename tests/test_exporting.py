"""Exports run without us and answer as the adapter does, or are not there."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_bank import store_adapter

import peft_combo.cli.export  # noqa: F401  (registers the command)
from peft_combo import __main__
from peft_combo.adapters import export as exporting
from peft_combo.adapters import onnx_graph as onnx_graphs
from peft_combo.adapters.export import Export, ExportError, export
from peft_combo.adapters.onnx_graph import Scheme
from peft_combo.adapters.parity import ParityGate
from peft_combo.data.queries import Queries
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank, LiveAdapter
from peft_combo.encoder.heads.completion import project_targets
from peft_combo.errors import BackboneError
from peft_combo.recipe.adapter import AdapterConfig, BottleneckAdapter, LoraAdapter, PrefixAdapter
from peft_combo.store.adapter_store import AdapterStore

Make = Callable[[AdapterConfig], LiveAdapter]
TEXTS = [" ".join(f"w{(11 * text + 5 * word) % 190}" for word in range(1 + text % 12)) for text in range(80)]
QUESTIONS = Queries.leave_one_out([np.array([row, row + 1, row + 30], np.int32) for row in range(20)], ["g"] * 20)


@pytest.fixture(scope="module")
def backbone(tiny_bert: Path) -> Backbone:
    return Backbone.load(str(tiny_bert), max_length=12)


@pytest.fixture(scope="module")
def adapter(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Make:
    store = AdapterStore(tmp_path_factory.mktemp("adapters"))
    bank = AdapterBank(backbone, store)

    def make(config: AdapterConfig) -> LiveAdapter:
        return bank.get(store_adapter(store, backbone, config.method, config).reference)

    return make


@pytest.fixture(scope="module")
def lora(adapter: Make) -> LiveAdapter:
    return adapter(LoraAdapter(rank=4))


@pytest.fixture(scope="module")
def merged(lora: LiveAdapter, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Export:
    folder = tmp_path_factory.mktemp("out") / "merged"
    return export(lora, backbone, folder, "merged", texts=TEXTS, questions=QUESTIONS)


@pytest.fixture(scope="module")
def onnx() -> Any:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; pip install 'peft-combo[onnx]'")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; pip install 'peft-combo[onnx]'")
    return pytest.importorskip("onnx", reason="onnx is not installed; pip install 'peft-combo[onnx]'")


@pytest.fixture(scope="module")
def small(onnx: Any, lora: LiveAdapter, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The 8-bit export, whose report has the graph in full precision too."""
    folder = tmp_path_factory.mktemp("out") / "small"
    return export(lora, backbone, folder, "onnx-int8", texts=TEXTS, questions=QUESTIONS, min_agreement=0.8)


def by_its_card(folder: Path, texts: list[str]) -> NDArray[np.float32]:
    """Run the program that the export's own README gives."""
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"folder": str(folder), "texts": texts}
    exec(program, names)
    vectors: NDArray[np.float32] = names["vectors"]
    return vectors


# --- merged -----------------------------------------------------------------------------------------------------------


def test_a_merged_export_gives_the_adapters_vectors_by_transformers_alone(
    merged: Export, lora: LiveAdapter, backbone: Backbone
) -> None:
    ours = backbone.encode(TEXTS, lora.attached)
    assert np.abs(ours - backbone.encode(TEXTS)).max() > 0.01  # the adapter does something
    np.testing.assert_allclose(by_its_card(merged.folder, TEXTS), ours, atol=1e-5)
    assert merged.written.distance_max < 1e-6
    assert merged.written.agreement == 1.0
    assert merged.written.ndcg == merged.rows[0].ndcg


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_sentence_transformers_opens_a_merged_export(merged: Export, lora: LiveAdapter, backbone: Backbone) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    model = library.SentenceTransformer(str(merged.folder), device="cpu")
    np.testing.assert_allclose(model.encode(TEXTS), backbone.encode(TEXTS, lora.attached), atol=1e-5)


def test_the_manifest_is_the_last_word_on_every_file(merged: Export) -> None:
    manifest = json.loads((merged.folder / "export.json").read_text())
    there = {path.relative_to(merged.folder).as_posix() for path in merged.folder.rglob("*") if path.is_file()}
    assert there == set(manifest["files"]) | {"export.json"}
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((merged.folder / name).read_bytes()).hexdigest() == entry["sha256"]
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in there)
    assert {(merged.folder / name).stat().st_mode & 0o777 for name in there} == {0o644}


def test_the_head_reads_with_numpy_alone(merged: Export, lora: LiveAdapter, backbone: Backbone) -> None:
    from safetensors.numpy import load_file

    vectors = backbone.encode(TEXTS, lora.attached)
    moved = vectors + vectors @ load_file(merged.folder / "head.safetensors")["target_projection.weight"].T
    targets = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    np.testing.assert_allclose(targets, project_targets(lora.head, vectors), atol=1e-5)
    assert json.loads((merged.folder / "head.json").read_text()) == lora.record.manifest.task


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_a_graph_takes_any_batch_of_any_length_and_reports_what_it_does(
    small: Export, lora: LiveAdapter, backbone: Backbone
) -> None:
    ours = backbone.encode(TEXTS, lora.attached).astype(np.float64)
    theirs = np.concatenate([by_its_card(small.folder, TEXTS[:1]), by_its_card(small.folder, TEXTS[1:])])
    np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-5)

    # The report, worked out by hand from the file that was written.
    distance = 1 - (ours * theirs).sum(1) / np.linalg.norm(theirs, axis=1) / np.linalg.norm(ours, axis=1)
    assert small.written.distance_max == pytest.approx(distance.max(), abs=1e-6)
    assert small.written.distance_mean == pytest.approx(distance.mean(), abs=1e-6)
    near = [np.argsort(-(vectors @ vectors.T) + 9 * np.eye(80), axis=1)[:, :10] for vectors in (ours, theirs)]
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(*near, strict=True)]
    assert small.written.agreement == pytest.approx(np.mean(shared), abs=2 / 800)
    assert small.written.nbytes == (small.folder / "model.onnx").stat().st_size


def test_full_precision_is_exact_and_blocks_beat_the_usual_int8(small: Export) -> None:
    ours, full, naive, blocks = small.rows
    assert full.distance_max < 1e-6
    assert full.agreement == 1.0
    assert full.ndcg == ours.ndcg
    assert blocks.distance_mean < naive.distance_mean
    assert blocks.agreement > naive.agreement
    assert blocks.nbytes < full.nbytes
    assert blocks.batch_difference < 1e-6  # a text's vector does not depend on what stands beside it
    assert all(set(row.p50_ms) == {1, 32} and min(row.p50_ms.values()) > 0 for row in small.rows)


def test_a_graph_says_what_it_needs_and_nothing_of_this_machine(onnx: Any, small: Export) -> None:
    told = json.loads((small.folder / "export.json").read_text())["graph"]
    assert told["opsets"] == {"ai.onnx": 18, "com.microsoft": 1}
    graph = onnx.load(small.folder / "model.onnx")
    assert {entry.domain or "ai.onnx": entry.version for entry in graph.opset_import} == told["opsets"]
    assert [value.name for value in graph.graph.input] == told["inputs"] == ["input_ids", "attention_mask"]
    axes = [[axis.dim_param for axis in value.type.tensor_type.shape.dim] for value in graph.graph.input]
    assert axes == [["batch", "tokens"]] * 2
    content = (small.folder / "model.onnx").read_bytes()
    assert not [word for word in (b"site-packages", b".py", str(Path.cwd()).encode()) if word in content]


@pytest.mark.parametrize("config", [PrefixAdapter(length=4), BottleneckAdapter(size=4)], ids=lambda c: c.method)
def test_what_cannot_be_merged_says_why_and_goes_into_a_graph(
    config: AdapterConfig,
    onnx: Any,
    adapter: Make,
    backbone: Backbone,
    tmp_path: Path,
) -> None:
    live = adapter(config)
    with pytest.raises(BackboneError, match=r"cannot be merged: it adds .*onnx takes it as it is"):
        export(live, backbone, tmp_path / "out", "merged", texts=TEXTS)
    assert not list(tmp_path.iterdir())
    done = export(live, backbone, tmp_path / "out", "onnx", texts=TEXTS)
    np.testing.assert_allclose(by_its_card(done.folder, TEXTS), backbone.encode(TEXTS, live.attached), atol=1e-5)


# --- 8 bits, by hand --------------------------------------------------------------------------------------------------


def product(onnx: Any, weight: NDArray[np.float32]) -> Any:
    """A graph of one product: x (rows, K) by a weight (K, N)."""
    inner, outer = weight.shape
    make = onnx.helper
    shapes = [make.make_tensor_value_info(n, 1, ["rows", w]) for n, w in (("x", inner), ("vector", outer))]
    node = make.make_node("MatMul", ["x", "w"], ["vector"], "product")
    body = make.make_graph([node], "g", shapes[:1], shapes[1:], [onnx.numpy_helper.from_array(weight, "w")])
    return make.make_model(body, opset_imports=[make.make_opsetid("", 18)], ir_version=10)


def run(graph: Any, x: NDArray[np.float32]) -> NDArray[np.float32]:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    vectors: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return vectors


def test_a_weight_is_rounded_by_the_largest_of_its_own_block(onnx: Any) -> None:
    weight = np.zeros((64, 1), np.float32)
    weight[:4, 0] = (-128.0, 63.4, 63.6, 127.0)  # scale 1: to -128, 63, 64, 127
    weight[32:35, 0] = (-1.28, 0.634, 0.01)  # scale 0.01: to -128, 63, 1
    kept = run(onnx_graphs.quantize_blocks(product(onnx, weight), Scheme(32, False)), np.eye(64, dtype=np.float32))
    np.testing.assert_allclose(kept[:5, 0], (-128, 63, 64, 127, 0), rtol=1e-5)
    np.testing.assert_allclose(kept[32:36, 0], (-1.28, 0.63, 0.01, 0), rtol=1e-5)


def test_an_outlier_beside_a_text_changes_nothing_in_blocks_and_much_in_the_usual_int8(onnx: Any) -> None:
    rng = np.random.default_rng(0)
    graph = product(onnx, rng.normal(size=(64, 8)).astype(np.float32))
    x = rng.normal(size=(2, 64)).astype(np.float32)
    x[1] *= 1000
    for small, bound in (
        (onnx_graphs.quantize_blocks(graph, Scheme(32, True)), 1e-6),
        (onnx_graphs.quantize_naively(graph), None),
    ):
        difference = float(np.abs(run(small, x)[:1] - run(small, x[:1])).max())
        assert difference > 0.5 if bound is None else difference < bound


def test_the_first_scheme_that_agrees_enough_is_taken(onnx: Any) -> None:
    class Told:
        """A trial whose answers are known: full precision, the usual int8, then our schemes in their order."""

        threads = 1
        rows = (SimpleNamespace(ndcg=None),)
        agreements = iter((1.0, 0.5, 0.9, 0.96, 0.99))

        def measure(self, name: str, run: Any, nbytes: int) -> Any:
            return SimpleNamespace(name=name, agreement=next(self.agreements), ndcg=None)

    graph = product(onnx, np.ones((64, 8), np.float32))
    scheme, small = exporting.choose_scheme(graph, Told(), ParityGate(0.95))  # type: ignore[arg-type]
    assert scheme == "blocks of 16, 8-bit products"
    assert [a.i for a in small.graph.node[0].attribute if a.name == "block_size"] == [16]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_export_that_lost_its_adapter_is_not_written(
    lora: LiveAdapter, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "merge_into_base", lambda attached: attached.base)
    with pytest.raises(ExportError, match=r"at least 0.99 of the 10 nearest .* found torch, merged 0\.\d+"):
        export(lora, backbone, tmp_path / "out", "merged", texts=TEXTS)
    assert not list(tmp_path.iterdir())


def test_what_is_asked_wrongly_is_refused_with_a_remedy_and_leaves_nothing(
    lora: LiveAdapter, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportError, match="at least 50 different texts, found 3"):
        export(lora, backbone, tmp_path / "out", "merged", texts=TEXTS[:3] * 30)
    with pytest.raises(ExportError, match="from 0 to 1, found 95"):
        export(lora, backbone, tmp_path / "out", "merged", texts=TEXTS, min_agreement=95)
    eight = Backbone(backbone.name, backbone.model, backbone.tokenizer, "mean", 12, "8bit", backbone.fingerprint)
    with pytest.raises(BackboneError, match="loaded in 8bit"):
        export(lora, eight, tmp_path / "out", "merged", texts=TEXTS)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(onnx_graphs.OnnxMissing, match=r"peft-combo\[onnx\]"):
        export(lora, backbone, tmp_path / "out", "onnx", texts=TEXTS)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ExportError, match="is there already"):
        export(lora, backbone, tmp_path / "out", "merged", texts=TEXTS)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_the_command_exports_by_the_adapters_own_recipe_and_names_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_recipe: Callable[..., Any]
) -> None:
    from peft_combo.tuning.loop import tune

    monkeypatch.chdir(tmp_path)
    tune(tiny_recipe(**{"training.epochs": 1}))

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peft-combo", "adapters", "export", *words])
        with pytest.raises(SystemExit) as stop:
            __main__.main()
        told = capsys.readouterr()
        return int(stop.value.code or 0), told.out, told.err

    capsys.readouterr()
    code, out, err = call("tiny", "--to", "out")
    assert code == 0, err
    assert re.search(r"^torch, merged .* 1\.0000 ", out, re.MULTILINE)
    assert "Wrote tiny@v1 as merged to" in out
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS))
    code, out, _ = call("tiny@v1", "--to", "again", "--texts", "lines.txt", "--json")
    report = json.loads(out)
    assert (code, report["texts"], report["questions"]) == (0, 80, None)
    for words, expected in (
        (("tiny", "--to", "out"), "is there already"),
        (("tiny", "--to", "x", "--data", "shop"), "go with --recipe"),
        (("tiny", "--to", "x", "--texts", "none.txt"), "none.txt cannot be read"),
        (("tinny", "--to", "x"), 'Did you mean "tiny"?'),
    ):
        code, out, err = call(*words)
        assert (code, out) == (1, "")
        assert expected in err
        assert "Traceback" not in err
    assert not (tmp_path / "x").exists()
