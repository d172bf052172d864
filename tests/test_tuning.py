"""The loop: it learns, it goes on exactly after a kill, it says what is wrong, and processes agree."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, StopAt
from safetensors.torch import load_file

from peft_combo.callbacks import RunCallback
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.encoder.heads.completion import BundleHead
from peft_combo.errors import DataError, PeftComboError, StoreError, TuningError
from peft_combo.recipe.model import Recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.loop import Interrupted, TuneResult, tune
from peft_combo.tuning.optimizer import learning_rate_factor

ALL_METHODS = ["lora", "adalora", "prefix", "head", "top-layers", "full"]
RESUMABLE = ["lora", "adalora", "prefix"]

# transformers' own attribute, which it deprecates, is read by peft when a prompt-learning model is made.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MakeRecipe = Callable[..., Recipe]


def run(recipe: Recipe, tmp_path: Path, **options: Any) -> TuneResult:
    return tune(recipe, run_folder=tmp_path / "run", **options)


def weights_of(result: TuneResult) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}:{name}": tensor
        for file in sorted(result.record.path.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("method", ALL_METHODS)
def test_every_method_learns_and_is_stored(
    method: str, tiny_recipe: MakeRecipe, tiny_bert: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(method, **{"training.epochs": 8})
    result = run(recipe, tmp_path)
    assert result.table.gain.value > 0.02
    assert np.mean(result.losses[-3:]) < np.mean(result.losses[:3])
    store = AdapterStore(recipe.store)
    assert store.verify() == []
    record = store.open("tiny")
    manifest = record.manifest
    assert manifest.method == method
    assert manifest.recipe == recipe.model_dump(mode="json")
    assert [row.name for row in result.table.rows] == [
        "popularity", "item-kNN", "TF-IDF title", "frozen backbone", "tuned",
    ]  # fmt: skip
    # What was measured is what is stored: the tuned row comes out of the files again.
    backbone = Backbone.load(str(tiny_bert), max_length=16)
    attached = backbone.attach(record)
    head = BundleHead.from_spec(manifest.task, load_file(record.file(HEAD_FILE)))
    assert np.isclose(_ndcg_again(recipe, backbone, attached, head), result.table.rows[-1].values["ndcg@10"], atol=1e-6)


def _ndcg_again(recipe: Recipe, backbone: Backbone, attached: Any, head: BundleHead) -> float:
    from peft_combo import metrics
    from peft_combo.data.queries import Queries
    from peft_combo.data.sources import open_dataset
    from peft_combo.data.splits import split
    from peft_combo.encoder.heads.completion import rank_targets

    dataset = open_dataset(recipe.data)
    rows = split(dataset, "user", recipe.data.valid_fraction, recipe.data.test_fraction).valid
    questions = Queries.leave_one_out(
        [dataset.bundles.items[row] for row in rows], [dataset.bundles.groups[row] for row in rows]
    )
    vectors = backbone.encode(dataset.catalog.texts("{title}"), attached)
    return metrics.ranking_metrics(rank_targets(head, vectors, questions))["ndcg@10"]


@pytest.mark.parametrize("method", ["lora", "adalora", "prefix", "head", "top-layers"])
def test_the_fast_path_leaves_the_result_what_it_would_have_been(
    method: str, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    same = {"training.epochs": 2, **({"adapter.dropout": 0.0} if method in ("lora", "adalora") else {})}
    fast = run(tiny_recipe(method, **same), tmp_path / "fast")
    plain = run(tiny_recipe(method, **same, **{"training.fast_path": False}), tmp_path / "plain")
    np.testing.assert_allclose(fast.losses, plain.losses, rtol=1e-4)
    for name, tensor in weights_of(plain).items():
        torch.testing.assert_close(weights_of(fast)[name], tensor, atol=2e-3, rtol=1e-2)


def test_a_cache_on_disk_gives_the_same_as_one_in_memory(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    from peft_combo.encoder import methods
    from peft_combo.tuning.item_encoder import ItemEncoder

    recipe = tiny_recipe()
    backbone = Backbone.load(recipe.backbone.model, max_length=16)
    attached = methods.attach(backbone.model, recipe.adapter, max_length=16, total_steps=5, seed=0)
    texts = [f"w{i} w{i + 1}" for i in range(30)]
    memory = ItemEncoder(backbone, attached, texts)
    disk = ItemEncoder(backbone, attached, texts, cache_limit_bytes=1, scratch=tmp_path)
    assert memory.cached_bytes == disk.cached_bytes > 0
    assert list(tmp_path.glob("layer-cache-*/*"))
    np.testing.assert_array_equal(disk.catalogue(disk.encoder), memory.catalogue(memory.encoder))
    np.testing.assert_allclose(memory.catalogue(memory.encoder), backbone.encode(texts), atol=1e-6)
    disk.close()
    assert not list(tmp_path.glob("layer-cache-*"))


@pytest.mark.parametrize("method", RESUMABLE)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_a_run_that_died_goes_on_to_the_same_end(
    method: str, optimizer: str, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    if optimizer != "adamw" and method != "lora":
        pytest.skip("optimizer state is the same business for every method")
    recipe = tiny_recipe(method, **{"training.optimizer": optimizer})
    straight = run(recipe, tmp_path / "straight")
    for death in (4, 8):
        with pytest.raises(SystemExit):
            tune(recipe, run_folder=tmp_path / "run", resume=death > 4, callback=StopAt(death))
    resumed = run(recipe, tmp_path, resume=True)
    assert resumed.losses == straight.losses
    theirs = weights_of(straight)
    assert weights_of(resumed).keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights_of(resumed).items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == [
        json.loads(x)["step"] for x in (tmp_path / "straight" / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert not list((tmp_path / "run").glob("step-*"))


def test_checkpoints_hold_the_adapter_and_not_the_encoder(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        tune(tiny_recipe(**{"training.checkpoint_every": 2}), run_folder=tmp_path, callback=StopAt(5))
    (folder,) = tmp_path.glob("step-*")
    assert folder.name == "step-00000004"
    names = {name for file in folder.glob("*adapter.safetensors") for name in load_file(file)}
    assert names
    assert all("lora_" in name for name in names)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training.learning_rate": 1e-4}, r"another recipe \(training.learning_rate 0.005 -> 0.0001\)"),
        ({"data.split_seed": 3}, "another recipe"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(
    changes: Mapping[str, Any], expected: str, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        tune(tiny_recipe(), run_folder=tmp_path, callback=StopAt(4))
    with pytest.raises(TuningError, match=expected):
        tune(tiny_recipe(**changes), run_folder=tmp_path, resume=True)
    (state,) = tmp_path.glob("step-*/state.json")
    state.write_text("{")
    with pytest.raises(TuningError, match="cannot be read"):
        tune(tiny_recipe(), run_folder=tmp_path, resume=True)


def test_ctrl_c_saves_and_says_how_to_go_on(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    class Interrupt(RunCallback):
        def on_step_end(self, step: int, loss: float) -> None:
            if step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    recipe = tiny_recipe()
    straight = run(recipe, tmp_path / "straight")
    with pytest.raises(Interrupted, match=r"after step 5 of .*--resume"):
        tune(recipe, run_folder=tmp_path / "run", callback=Interrupt())
    assert run(recipe, tmp_path, resume=True).losses == straight.losses


@pytest.mark.parametrize("method", ["lora", *(pytest.param(one, marks=pytest.mark.slow) for one in RESUMABLE[1:])])
def test_kill_9_at_any_step_then_resume(method: str, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(method, **{"training.checkpoint_every": 1, "training.epochs": 6})
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.model_dump(mode="json")))
    straight = run(recipe, tmp_path / "straight")
    program = (
        "import json, sys; from pathlib import Path; from peft_combo.recipe import parse_recipe; "
        "from peft_combo.tuning import tune; "
        f"tune(parse_recipe(json.loads(Path({str(file)!r}).read_text())), run_folder=Path({str(tmp_path / 'run')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program], cwd=REPOSITORY)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("step-0000001[0-9]/state.json")) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    resumed = run(recipe, tmp_path, resume=True)
    assert resumed.losses == straight.losses
    theirs = weights_of(straight)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights_of(resumed).items())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --multi_gpu is accelerate's word for several processes on one machine; without a GPU they compute on the CPU (gloo).
@pytest.mark.parametrize(
    ("method", "task"),
    [
        ("lora", "bundle"),
        pytest.param("adalora", "bundle", marks=pytest.mark.slow),
        pytest.param("prefix", "bundle", marks=pytest.mark.slow),
        pytest.param("lora", "tagging", marks=pytest.mark.slow),
    ],
)
def test_two_processes_learn_what_one_does(method: str, task: str, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"training.accumulation": 2}
    if method != "prefix":
        changes["adapter.dropout"] = 0.0
    if method == "lora":
        changes["training.adversarial"] = {"kind": "fgm"}  # each looks for the worst push of its own texts
    if task == "tagging":
        words = [[f"w{10 + (7 * row) % 60 + place}" for place in range(2 + row % 4)] for row in range(60)]
        lines = [{"tokens": own, "tags": ["O", *["B-X"] * (len(own) - 1)]} for own in words]
        (tmp_path / "tags.jsonl").write_text("\n".join(map(json.dumps, lines)))
        changes |= {"task": {"kind": "tagging"}, "data.path": str(tmp_path), "training.epochs": 2}
    recipe = tiny_recipe(method, **changes)
    one = run(recipe, tmp_path / "one")
    file = tmp_path / "recipe.json"
    raw = {**recipe.model_dump(mode="json"), "store": str(tmp_path / "two-store")}
    file.write_text(json.dumps(raw))
    (tmp_path / "tiny.yaml").write_text(json.dumps(raw))  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port",
         str(_free_port()), "-m", "peft_combo", "tune",
         "--recipe", str(tmp_path / "tiny.yaml"), "--run-folder", str(tmp_path / "two-run"), "--json"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)  # one process printed, and nothing but the result
    assert told["plan"]["processes"] == 2
    # Tagging starts from a minimum over states that differ in their last bits: the same within its tolerance.
    np.testing.assert_allclose(told["losses"], one.losses, rtol=2e-4 if task == "bundle" else 5e-3)
    (record,) = AdapterStore(tmp_path / "two-store").list()
    theirs = weights_of(one)
    for name, tensor in load_file(record.path / HEAD_FILE).items():
        torch.testing.assert_close(tensor, theirs[f"{HEAD_FILE}:{name}"], atol=2e-3, rtol=1e-2)


def test_accumulation_splits_a_batch(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    result = run(tiny_recipe(**{"training.accumulation": 4, "training.epochs": 2}), tmp_path)
    assert len(result.losses) == result.plan.steps


def test_bf16_runs_and_comes_out_close(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    same = {"adapter.dropout": 0.0, "training.epochs": 2}
    exact = run(tiny_recipe(**same), tmp_path / "fp32")
    short = run(tiny_recipe(**same, **{"backbone.precision": "bf16"}), tmp_path / "bf16")
    assert short.plan.precision == "bf16"
    np.testing.assert_allclose(short.losses, exact.losses, rtol=0.05)


def test_early_stopping_keeps_the_best_step(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    seen: dict[int, float] = {}

    class See(RunCallback):
        def on_evaluate(self, step: int, values: Mapping[str, float], best: bool) -> None:
            seen[step] = values["mrr"]

    recipe = tiny_recipe(
        **{
            "training.epochs": 60,
            "training.learning_rate": 0.1,
            "training.early_stopping": {"metric": "mrr", "patience": 2},
        }
    )
    result = run(recipe, tmp_path, callback=See())
    assert result.stopped_early
    after = result.table.after.values["mrr"]
    assert seen[result.chosen["best_step"]] == max(seen.values()) == pytest.approx(after, abs=1e-9)
    assert result.plan.steps > max(seen)


def test_the_plan_counts_every_scoring_of_an_evaluation(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_combo.tuning.tasks import bundle

    honest, calls = bundle.rank_targets, []

    def slow(*args: Any) -> Any:
        calls.append(args)
        time.sleep(0.05)
        return honest(*args)

    monkeypatch.setattr(bundle, "rank_targets", slow)
    result = run(tiny_recipe(**{"training.epochs": 2, "task.strengths": [0.1, 0.25, 0.5, 1.0]}), tmp_path)
    # Before and after the whole, four strengths in each of two evaluations, and four to know how long that takes.
    assert len(calls) == 2 + 2 * 4 + 4
    assert result.plan.seconds > 0.05 * (2 * 4 + 1)


def test_what_it_is_compared_with_does_not_depend_on_dropout(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    calm = run(tiny_recipe(**{"training.epochs": 1}), tmp_path / "calm").table
    wild = run(tiny_recipe(**{"training.epochs": 1, "task.head_dropout": 0.9}), tmp_path / "wild").table
    assert wild.before == calm.before


def test_learning_rates_follow_their_schedules(tiny_recipe: MakeRecipe) -> None:
    def factors(schedule: str) -> list[float]:
        training = tiny_recipe(**{"training.schedule": schedule, "training.warmup_fraction": 0.2}).training
        return [round(learning_rate_factor(training, step, 10), 3) for step in range(10)]

    assert factors("constant") == [0.333, 0.667, 1, 1, 1, 1, 1, 1, 1, 1]
    assert factors("linear") == [0.333, 0.667, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert factors("cosine")[2:] == [1, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038]


def test_a_loss_that_is_no_number_stops_the_run(tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: Any) -> None:
    from peft_combo.tuning.tasks import bundle

    recipe = tiny_recipe()
    honest = bundle.compute_bundle_loss
    calls = iter(range(100))
    monkeypatch.setattr(bundle, "compute_bundle_loss", lambda *a: honest(*a) * (float("nan") if next(calls) > 4 else 1))
    with pytest.raises(TuningError, match=r"not a number after step 4.*learning_rate"):
        run(recipe, tmp_path)


def test_a_method_that_reaches_nothing_is_refused(tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: Any) -> None:
    from peft_combo.encoder import methods

    honest = methods.attach

    def deaf(*args: Any, **options: Any) -> Any:
        attached = honest(*args, **options)
        module = next(m for m in attached.inner.modules() if hasattr(m, "lora_B"))
        module.forward = module.get_base_layer().forward
        return attached

    monkeypatch.setattr(methods, "attach", deaf)
    with pytest.raises(TuningError, match=r"2 of \d+ trained tensors get no gradient"):
        run(tiny_recipe(), tmp_path)


def test_nothing_to_learn_is_said(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="Nothing would learn"):
        run(tiny_recipe("head", **{"task.projection": "none", "task.learn_temperature": False}), tmp_path)


def test_a_store_that_is_a_file_is_said_before_training(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StoreError, match="taken"):
        run(tiny_recipe(store=str(tmp_path / "taken")), tmp_path)


def test_a_full_disk_keeps_the_last_checkpoint(tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: Any) -> None:
    from peft_combo.tuning import checkpoint

    honest = checkpoint.save_file

    def full(*args: Any) -> None:
        if list((tmp_path / "run").glob("step-*")):
            raise OSError(28, "No space left on device")
        honest(*args)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TuningError, match=r"No space left on device.*--resume"):
        run(tiny_recipe(), tmp_path)
    monkeypatch.undo()
    assert [folder.name for folder in (tmp_path / "run").iterdir() if folder.is_dir()] == ["step-00000003"]
    assert run(tiny_recipe(), tmp_path, resume=True).record.version == 1


def test_an_adapter_of_other_weights_is_refused(tiny_recipe: MakeRecipe, tiny_bert: Path, tmp_path: Path) -> None:
    record = run(tiny_recipe(**{"training.epochs": 1}), tmp_path).record
    other = Backbone.load(str(tiny_bert), max_length=16)
    with torch.no_grad():
        next(other.model.parameters()).add_(1e-3)
    with pytest.raises(StoreError, match="was tuned on"):
        other.attach(record)
    with pytest.raises(StoreError, match="pooling"):
        Backbone.load(str(tiny_bert), max_length=16, pooling="cls").attach(record)
    with pytest.warns(UserWarning, match="quantization none"):
        Backbone.load(str(tiny_bert), max_length=16, quantization="8bit").attach(record)


def test_too_few_bundles_is_said(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "items.csv").write_text("item_id,title\na,w1\nb,w2\n")
    (shop / "bundles.csv").write_text("bundle_id,item_id\n1,a\n1,b\n")
    with pytest.raises(DataError, match="too few bundles"):
        run(tiny_recipe(**{"data.path": str(shop)}), tmp_path)


def test_a_missing_tracker_is_named_with_its_install_command(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    recipe = tiny_recipe(**{"training.trackers": ["wandb"]})
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(PeftComboError, match=r'pip install "peft-combo\[wandb\]"'):
            run(recipe, tmp_path)
    else:
        pytest.skip("wandb is installed")


def test_curves_reach_tensorboard(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra peft-combo[tensorboard] is not installed")
    run(tiny_recipe(**{"training.trackers": ["tensorboard"], "training.epochs": 1}), tmp_path)
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
