"""Continual tuning: starts where the stored adapter ended, learns from nothing held out; an alias moves on a win."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file

from peft_combo.callbacks import RunCallback
from peft_combo.data.join import join_datasets
from peft_combo.data.leakage import split_problem
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import split_as
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.heads.base import HEAD_FILE
from peft_combo.errors import DataError, StoreError, TuningError
from peft_combo.metrics.report import Gain, ResultRow
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.parse import parse_recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.continual import Gate, VersionComparison, continuation, continue_tuning, find_refusals
from peft_combo.tuning.loop import TuneResult, tune

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def later_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Later data of the tiny shop: 30 items in 3 new styles, 90 bundles of 25 users, 10 of them known before.

    One of the old items comes again under another title, one bundle under its old id.
    """
    dice = random.Random(7)
    folder = tmp_path_factory.mktemp("later-shop")
    titles = [f"w{24 + n % 3 * 2 + n // 3 % 2} w{100 + n % 20} w{150 + n}" for n in range(30)]
    rows = [f"n{n},{title},Style {n % 3}" for n, title in enumerate(titles)]
    (folder / "items.csv").write_text("item_id,title,category\ni0,w10 w40 w199,Style 0\n" + "\n".join(rows) + "\n")
    members, meta = ["b0,n0", "b0,n3"], ["b0,u0"]
    for bundle in range(90):
        style = dice.randrange(3)
        chosen = dice.sample([n for n in range(30) if n % 3 == style], dice.choice((2, 3, 4)))
        members += [f"c{bundle},n{n}" for n in chosen]
        meta.append(f"c{bundle},u{20 + bundle % 25}")
    (folder / "bundles.csv").write_text("bundle_id,item_id\n" + "\n".join(members) + "\n")
    (folder / "bundle_meta.csv").write_text("bundle_id,user_id\n" + "\n".join(meta) + "\n")
    return folder


def stored(recipe: Recipe, tmp_path: Path) -> TuneResult:
    return tune(recipe, run_folder=tmp_path / "first")


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {}),
        ("lora", {"adapter.pissa": True}),
        ("adalora", {}),
        ("prefix", {}),
        ("top-layers", {}),
        ("head", {}),
    ],
)
def test_a_continued_run_starts_where_the_stored_one_ended(
    method: str, changes: dict[str, Any], tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe(method, **changes)
    first = stored(recipe, tmp_path)
    still = tiny_recipe(method, **changes, **{"training.learning_rate": 1e-12, "training.epochs": 1})
    again = continue_tuning(still, "tiny", run_folder=tmp_path / "second")
    after = again.result.table.after.values
    assert after["mrr"] == pytest.approx(first.table.after.values["mrr"], abs=1e-3)
    assert again.validation[0].gain.value == pytest.approx(0, abs=1e-3)
    record = again.result.record
    assert record.version == 2
    assert record.manifest.data.model_extra is not None
    assert record.manifest.data.model_extra["continued"] == {"from": "tiny@v1", "digest": first.record.digest}
    # What is stored as plain LoRA goes on as that.
    assert record.manifest.method == ("lora" if method == "adalora" else method)


def test_what_does_not_fit_is_refused_with_what_would(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    stored(tiny_recipe(**{"training.epochs": 1}), tmp_path)
    with pytest.raises(TuningError, match=r"adapter.rank is 8 here and was 4. To go on from it: --set adapter.rank=4"):
        continuation(tiny_recipe(**{"adapter.rank": 8}), "tiny")
    with pytest.raises(TuningError, match=r"tuned by lora.* says prefix.*adapter.method: lora"):
        continuation(tiny_recipe("prefix"), "tiny")
    with pytest.raises(TuningError, match=r"task.projection is none here and was linear"):
        continue_tuning(tiny_recipe(**{"task.projection": "none"}), "tiny", run_folder=tmp_path / "run")
    with pytest.raises(DataError, match="may have learned from these"):
        continuation(tiny_recipe(**{"data.split_seed": 3}), "tiny")
    with pytest.raises(StoreError, match="No adapter for category"):
        continuation(tiny_recipe(), "tinny")
    with pytest.raises(TuningError, match="replay: expected a share"):
        continuation(tiny_recipe(), "tiny", replay=1.0)
    continuation(tiny_recipe(**{"adapter.dropout": 0.3}), "tiny")  # how it is trained may change


def test_weights_of_another_seed_are_not_taken_for_the_same(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    changes = {"adapter": {"method": "randlora", "rank": 8, "alpha": 160}, "training.learning_rate": 5e-2}
    stored(tiny_recipe(**changes), tmp_path)
    continuation(tiny_recipe(**changes, seed=1), "tiny")
    with pytest.raises(TuningError, match=r"gives other vectors.*the seed, which was 0"):
        continue_tuning(tiny_recipe(**changes, seed=1), "tiny", run_folder=tmp_path / "run")


# --- the data ---------------------------------------------------------------------------------------------------------


def test_two_datasets_are_joined_by_their_ids(tiny_recipe: MakeRecipe, later_shop: Path) -> None:
    config = tiny_recipe().data
    old = open_dataset(config)
    new = open_dataset(config.model_copy(update={"path": str(later_shop)}))
    whole, known = join_datasets(old, new)
    assert (known, len(whole.bundles), len(whole.catalog)) == (90, 180, 90)
    assert whole.catalog.item_ids[:60] == old.catalog.item_ids
    assert whole.catalog.titles[0] == "w10 w40 w199"  # the later title stands
    for row in range(90):
        np.testing.assert_array_equal(whole.bundles.items[row], old.bundles.items[row])
    for row, bundle_id in enumerate(whole.bundles.bundle_ids[90:], 90):
        there = new.bundles.items[new.bundles.bundle_ids.index(bundle_id)]
        assert [whole.catalog.item_ids[i] for i in whole.bundles.items[row]] == [new.catalog.item_ids[i] for i in there]
    assert any("1 bundles of" in note and "other items than before" in note for note in whole.notes)


def test_nothing_that_was_held_out_is_learned_from(tiny_recipe: MakeRecipe, later_shop: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(**{"training.epochs": 1})
    stored(recipe, tmp_path)
    old = open_dataset(recipe.data)
    parts = split_as(old, recipe.data)
    run = continuation(recipe, "tiny", new_data=later_shop, replay=0.5)
    bundles, split = run.dataset.bundles, run.task._parts

    def ids(rows: Any) -> set[str]:
        return {bundles.bundle_ids[row] for row in rows}

    # The old questions are the old questions, bundle by bundle.
    assert ids(run.queries["old validation"]) == {old.bundles.bundle_ids[row] for row in parts.valid}
    assert ids(run.queries["old test"]) == {old.bundles.bundle_ids[row] for row in parts.test}
    held_out = ids(np.concatenate([split.valid, split.test]))
    assert held_out >= ids(run.queries["old validation"]) | ids(run.queries["old test"])
    assert not ids(split.train) & held_out
    # No user is on both sides, whether his bundles came before or later; no learned item set is a question.
    owners = {bundles.owners[row] for row in split.train}
    assert not owners & {bundles.owners[row] for row in np.concatenate([split.valid, split.test])}
    learned = {frozenset(bundles.items[row].tolist()) for row in split.train}
    assert not learned & {frozenset(bundles.items[row].tolist()) for row in np.concatenate([split.valid, split.test])}
    assert {row for row in split.train if row < 90} <= set(parts.train.tolist())


def test_replay_is_the_share_it_says_and_the_same_every_time(
    tiny_recipe: MakeRecipe, later_shop: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(**{"training.epochs": 1})
    stored(recipe, tmp_path)

    def replayed(replay: float, **changes: Any) -> tuple[list[int], int]:
        run = continuation(tiny_recipe(**{"training.epochs": 1}, **changes), "tiny", new_data=later_shop, replay=replay)
        rows = run.task._parts.train
        assert run.task.data["continued"]["replayed"] == int((rows < 90).sum())
        return [int(row) for row in rows if row < 90], int((rows >= 90).sum())

    old, new = replayed(0.25)
    assert len(old) == round(new / 3)
    assert replayed(0.25) == (old, new)
    assert replayed(0.25, seed=5) != (old, new)
    assert replayed(0.0) == ([], new)
    everything, _ = replayed(0.9)  # more is asked than there is
    assert everything == split_as(open_dataset(recipe.data), recipe.data).train.tolist()


def test_new_data_without_news_is_refused(tiny_recipe: MakeRecipe, tiny_shop: Path, tmp_path: Path) -> None:
    stored(tiny_recipe(**{"training.epochs": 1}), tmp_path)
    with pytest.raises(DataError, match="found none whose id is not known already"):
        continuation(tiny_recipe(), "tiny", new_data=tiny_shop)


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_the_gate_says_all_that_speaks_against_a_version() -> None:
    row = ResultRow("x", {"ndcg@10": 0.5}, (0.4, 0.6))

    def compared(questions: str, gain: float, p: float) -> VersionComparison:
        return VersionComparison(questions, 10, 5, row, row, Gain(gain, (gain, gain), p))

    won, kept = compared("new validation", 0.02, 0.01), compared("old validation", -0.005, 0.5)
    assert find_refusals((won, kept), Gate()) == ()
    assert find_refusals((won,), Gate()) == ()
    (against,) = find_refusals((won, kept), Gate(gain=0.05))
    assert "gains +0.0200 NDCG@10, and more than +0.05 is asked" in against
    (against,) = find_refusals((replace(won, gain=Gain(0.02, (0, 0), 0.05)), kept), Gate())
    assert "p = 0.0500, and less than 0.05 is asked" in against
    (against,) = find_refusals((won, compared("old validation", -0.02, 0.9)), Gate())
    assert "forgets 0.0200 NDCG@10, and at most 0.01 is allowed" in against
    assert find_refusals((won, compared("old validation", -0.02, 0.9)), Gate(forgetting=0.02)) == ()
    assert (
        len(find_refusals((compared("new validation", 0.0, 1.0), compared("old validation", -1.0, 0.0)), Gate())) == 3
    )


def test_a_win_is_promoted_and_its_forgetting_is_told(
    tiny_recipe: MakeRecipe, later_shop: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(**{"training.epochs": 12})
    first = stored(recipe, tmp_path)
    store = AdapterStore(recipe.store)
    store.alias("tiny@v1", "prod")
    gate = Gate(p=0.2, forgetting=0.5)
    run = continue_tuning(
        recipe, "tiny@prod", new_data=later_shop, replay=0.5, promote="prod", gate=gate, run_folder=tmp_path / "run"
    )
    assert [one.questions for one in run.validation] == ["new validation", "old validation"]
    new, old = run.validation
    assert new.gain.value > 0.05
    assert (run.test.questions, run.test.before.name, run.test.after.name) == ("old test", "tiny@v1", "tiny@v2")
    assert run.refused == ()
    assert run.promoted
    assert run.promotion == "Promoted: tiny@prod points to v2 now."
    assert store.resolve("tiny@prod").version == 2
    assert store.verify() == []
    extra = run.result.record.manifest.data.model_extra
    assert extra is not None
    told = extra["continued"]
    assert (told["from"], told["digest"], told["replay"]) == ("tiny@v1", first.record.digest, 0.5)
    # It may be measured on the old test bundles: it has not learned from them either.
    parts = split_as(open_dataset(recipe.data), recipe.data)
    assert split_problem(run.result.record.manifest, parts, recipe.data) == ""
    # The figures come out of the stored files again.
    assert run.to_json()["validation"][1]["after"]["values"]["ndcg@10"] == old.after.values["ndcg@10"]


def test_a_loss_stays_stored_and_the_alias_where_it_was(
    tiny_recipe: MakeRecipe, later_shop: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(**{"training.epochs": 1, "training.learning_rate": 1e-9})
    stored(recipe, tmp_path)
    store = AdapterStore(recipe.store)
    run = continue_tuning(recipe, "tiny", new_data=later_shop, promote="prod", run_folder=tmp_path / "run")
    assert (run.promoted, run.alias) == (False, None)
    assert "Not promoted: tiny@prod was not made, since on new validation" in run.promotion
    assert run.promotion.endswith("tiny@v2 is stored.")
    assert store.versions("tiny") == (1, 2)
    store.alias("tiny@v1", "prod")
    again = continue_tuning(recipe, "tiny@prod", new_data=later_shop, promote="prod", run_folder=tmp_path / "run")
    assert again.alias is not None
    assert "tiny@prod still points to v1" in again.promotion
    assert store.resolve("tiny@prod").version == 1
    # A win over v3 says nothing of v1, which is in use: refused before anything is trained.
    with pytest.raises(StoreError, match=r"points to v1, and the run starts from tiny@v3.*--from tiny@prod"):
        continue_tuning(recipe, "tiny@v3", new_data=later_shop, promote="prod", run_folder=tmp_path / "run")


def test_a_checkpoint_of_another_continuation_is_refused(
    tiny_recipe: MakeRecipe, later_shop: Path, tmp_path: Path
) -> None:
    class Stop(RunCallback):
        def on_step_end(self, step: int, loss: float) -> None:
            if step == 4:
                raise KeyError

    recipe = tiny_recipe()
    stored(recipe, tmp_path)
    stored(recipe, tmp_path)
    with pytest.raises(KeyError):
        continue_tuning(recipe, "tiny@v1", run_folder=tmp_path / "run", callback=Stop())
    with pytest.raises(TuningError, match="goes on from another adapter"):
        continue_tuning(recipe, "tiny@v2", run_folder=tmp_path / "run", resume=True)
    straight = continue_tuning(recipe, "tiny@v1", run_folder=tmp_path / "straight").result
    resumed = continue_tuning(recipe, "tiny@v1", run_folder=tmp_path / "run", resume=True).result
    assert resumed.losses == straight.losses
    heads = [load_file(one.record.file(HEAD_FILE)) for one in (straight, resumed)]
    assert all(torch.equal(tensor, heads[1][name]) for name, tensor in heads[0].items())


def test_the_command_ends_with_4_where_it_is_told_to_and_nothing_was_promoted(
    tiny_recipe: MakeRecipe, later_shop: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from peft_combo.__main__ import main

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["peft-combo", "tune", "--recipe", "tiny.yaml", *words])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(**{"training.epochs": 1, "training.learning_rate": 1e-9})
    Path("tiny.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    stored(recipe, tmp_path)
    asked = ("--from", "tiny", "--new-data", str(later_shop), "--promote", "prod")
    code, out = run(*asked, "--replay", "0.5")
    assert code == 0
    assert "tiny@v2 went on from tiny@v1" in out
    assert "Not promoted: tiny@prod was not made" in out.splitlines()[-1]
    code, out = run(*asked, "--fail-on-no-promotion", "--json")
    assert code == 4
    told = json.loads(out)["continued"]
    assert (told["from"], told["promoted"], len(told["validation"])) == ("tiny@v2", False, 2)
    code, out = run(*asked[:4], "--dry-run")
    assert (code, "Fits." in out) == (0, True)
    assert run("--new-data", str(later_shop))[0] == 1


# --- killed at any moment ---------------------------------------------------------------------------------------------

# Runs once itself, so that everything is imported, then makes a child for every run it is asked for, kills it after so
# many seconds (0: never), and says how it ended.
SERVER = f"""
import json, os, signal, sys, time, warnings
sys.path[:0] = [{str(REPOSITORY)!r}]
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from peft_combo.tuning.continual import Gate, continue_tuning
from peft_combo.recipe.parse import parse_recipe
torch.set_num_threads(1)
recipe = parse_recipe(json.loads(sys.argv[1]))

def run():
    continue_tuning(recipe, "tiny@prod", new_data=Path(sys.argv[2]), promote="prod",
                    gate=Gate(gain=-1, p=1.1, forgetting=1), run_folder=Path(sys.argv[3]))

run()
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + float(line) if float(line) else float("inf")
    ended = (0, 0)
    while ended == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
        else:
            time.sleep(0.001)
            ended = os.waitpid(child, os.WNOHANG)
    print(ended[1], flush=True)
"""


def kill_often(recipe: Recipe, later: Path, tmp_path: Path, kills: int) -> int:
    """Kill continued runs at random moments and look at the store after each; return how many had promoted."""
    raw = json.dumps(recipe.model_dump(mode="json"))
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, raw, str(later), str(tmp_path / "run")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    store, dice = AdapterStore(recipe.store), random.Random(0)

    def run(after: float = 0.0) -> int:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(f"{after}\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    try:
        assert server.stdout.readline() == "ready\n"
        clock = time.perf_counter()
        assert run() == 0
        whole = time.perf_counter() - clock
        assert store.resolve("tiny@prod").version == 3
        pointed, killed = 3, 0
        while killed < kills:
            # Late rather than early: that is where it stores and promotes.
            clock = time.perf_counter()
            if run(whole * dice.triangular(0.05, 1.05, 0.9)) == signal.SIGKILL:
                killed += 1
            else:
                whole = time.perf_counter() - clock
            assert store.verify() == []
            prod = store.open("tiny@prod")
            assert pointed <= prod.version <= store.latest("tiny")
            assert all(prod.read(name) for name in prod.manifest.files)
            pointed = prod.version
        assert run() == 0
        assert store.open("tiny@prod").version == store.latest("tiny") > pointed
        Backbone.load(recipe.backbone.model, max_length=16).attach(store.open("tiny@prod"))
    finally:
        server.stdin.close()
        server.stdout.close()
        server.wait(timeout=60)
    return pointed - 3


@pytest.fixture
def in_use(tiny_recipe: MakeRecipe, tmp_path: Path) -> Recipe:
    recipe = tiny_recipe(**{"training.epochs": 1})
    stored(recipe, tmp_path)
    AdapterStore(recipe.store).alias("tiny@v1", "prod")
    return parse_recipe(recipe.model_dump(mode="json"))


def test_a_few_kills_leave_the_store_whole_and_the_alias_on_a_version(
    in_use: Recipe, later_shop: Path, tmp_path: Path
) -> None:
    kill_often(in_use, later_shop, tmp_path, 3)


@pytest.mark.slow
def test_many_kills_leave_the_store_whole_and_the_alias_on_a_version(
    in_use: Recipe, later_shop: Path, tmp_path: Path
) -> None:
    assert kill_often(in_use, later_shop, tmp_path, 100) > 0
