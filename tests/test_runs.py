"""Runs that end from outside, collide and go on: signals, the run folder, restart loops, and a recipe's store."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, StopAt
from safetensors.torch import load_file

from peft_combo.callbacks import RunCallback
from peft_combo.errors import TuningError
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.parse import parse_recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.store.versions import AdapterRecord
from peft_combo.tuning import run_state
from peft_combo.tuning.loop import Interrupted, tune
from peft_combo.tuning.processes import StopRequest, catch_signals
from peft_combo.tuning.run_folder import find_checkpoint, find_run_folder, hold_run_folder, name_run_folder
from peft_combo.tuning.run_state import CheckpointClock, RunLog

MakeRecipe = Callable[..., Recipe]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture(autouse=True)
def _signals_are_heard() -> Iterator[None]:
    """Under nohup the tests start with SIGHUP ignored, which is respected, and is not what they are about."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Notes(RunCallback):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


class Send(RunCallback):
    """Sends the process a signal after a step."""

    def __init__(self, number: int, step: int) -> None:
        self._number, self._step = number, step

    def on_step_end(self, step: int, loss: float) -> None:
        if step == self._step:
            os.kill(os.getpid(), self._number)


def weights_of(record: AdapterRecord) -> dict[str, torch.Tensor]:
    files = sorted(record.path.glob("*.safetensors"))
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_weights(ours: AdapterRecord, theirs: AdapterRecord) -> None:
    found, expected = weights_of(ours), weights_of(theirs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


# --- the folder of a run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "category", "seed", "folder"),
    [
        ("lora-fashion", "fashion", 0, "lora-fashion"),
        ("lora-fashion", "shoes", 0, "lora-fashion.shoes"),
        ("lora-fashion", "fashion", 3, "lora-fashion.fashion.seed3"),
        ("lora-fashion", "shoes", 3, "lora-fashion.shoes.seed3"),
        ("fashion", "fashion", 0, "fashion"),
        ("lorafashion", "fashion", 0, "lorafashion.fashion"),
    ],
)
def test_a_run_folder_belongs_to_recipe_category_and_seed(
    name: str, category: str, seed: int, folder: str, tiny_recipe: MakeRecipe
) -> None:
    assert name_run_folder(tiny_recipe(name=name, category=category, seed=seed)) == Path("runs") / folder


def test_a_checkpoint_in_a_folder_of_the_former_name_is_found(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, other = tiny_recipe(category="shoes"), tiny_recipe(category="hats")
    with pytest.raises(SystemExit):
        tune(recipe, run_folder=Path("runs") / recipe.name, callback=StopAt(4))
    assert find_run_folder(recipe) == Path("runs") / recipe.name
    assert find_run_folder(other) == name_run_folder(other)
    watch = Notes()
    assert tune(recipe, resume=True, callback=watch).run_folder == Path("runs") / recipe.name
    assert any("Going on after step 3" in note and f"runs/{recipe.name}" in note for note in watch.notes)
    assert find_run_folder(recipe) == name_run_folder(recipe), "what is done is not found again"


def test_a_folder_in_use_is_refused_and_says_by_whom(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, folder = tiny_recipe(), tmp_path / "run"
    with hold_run_folder(folder), pytest.raises(TuningError, match=rf"in use by process {os.getpid()} on .*--run-fold"):
        tune(recipe, run_folder=folder)
    with hold_run_folder(folder):
        (folder / "owner.json").write_text('{"process"')  # half written
        with pytest.raises(TuningError, match="in use by another process"), hold_run_folder(folder):
            pass
    with pytest.raises(OSError, match="of the run"), hold_run_folder(folder):
        raise OSError("of the run itself")
    tune(recipe, run_folder=folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningError, match="cannot be written"), hold_run_folder(tmp_path / "file"):
        pass


def test_a_second_tune_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from peft_combo.cli import app\n"
        "from peft_combo.errors import PeftComboError\n"
        "try:\n"
        "    app(['tune', '--recipe', 'lora-fashion', *sys.argv[1:]])\n"
        "except PeftComboError as error:\n"
        "    print(error, 'torch' in sys.modules)\n"
    )

    def ask(*words: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True, check=True, env=ALONE
        ).stdout

    with hold_run_folder(tmp_path / "runs" / "lora-fashion"):
        assert f"in use by process {os.getpid()}" in ask()
        assert ask().endswith("False\n")
    with hold_run_folder(tmp_path / "mine"):
        assert "mine is in use" in ask("--set", "category=shoes", "--run-folder", "mine")
    assert ask("--from", "shoes@v2").endswith("False\n")


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143), (signal.SIGHUP, "SIGHUP", 129)],
)
def test_a_signal_saves_and_says_how_to_go_on(
    number: int, name: str, code: int, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe()
    straight = tune(recipe, run_folder=tmp_path / "straight")
    with pytest.raises(Interrupted, match=rf"by {name} after step 5 of .*--resume") as caught:
        tune(recipe, run_folder=tmp_path / "run", callback=Send(number, 5))
    assert caught.value.exit_code == code
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run" / "step-00000005"
    rest = tune(recipe, run_folder=tmp_path / "run", resume=True)
    assert rest.losses == straight.losses
    assert_same_weights(rest.record, straight.record)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_while_loading_ends_at_once_and_keeps_what_was_saved(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    class OnNote(RunCallback):
        def on_plan(self, summary: str, metric: str) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = tiny_recipe()
    with pytest.raises(Interrupted, match="before the first step"):
        tune(recipe, run_folder=tmp_path, callback=OnNote())
    with pytest.raises(SystemExit):
        tune(recipe, run_folder=tmp_path, resume=True, callback=StopAt(5))
    with pytest.raises(Interrupted, match="before the first step"):
        tune(recipe, run_folder=tmp_path, resume=True, callback=OnNote())
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000003"


@pytest.mark.parametrize("changes", [{}, {"training.averaging": {"kind": "swa", "start": 0.2}}])
def test_a_signal_in_an_evaluation_leaves_it_to_the_resumed_run(
    changes: dict[str, Any], tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value is as good as the best so far, so an evaluation counted twice would show in `waited`."""
    from peft_combo.tuning.setup import Setup

    recipe = tiny_recipe(**changes)
    straight = tune(recipe, run_folder=tmp_path / "straight")
    honest, calls = Setup.evaluate, []

    def evaluate(setup: Setup) -> Any:
        found = honest(setup)
        calls.append(found)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        return found

    monkeypatch.setattr(Setup, "evaluate", evaluate)
    with pytest.raises(Interrupted, match="SIGTERM after step"):
        tune(recipe, run_folder=tmp_path / "run")
    found = find_checkpoint(tmp_path / "run")
    assert found is not None
    assert json.loads((found / "state.json").read_text())["values"]["due"] is True
    monkeypatch.undo()
    rest = tune(recipe, run_folder=tmp_path / "run", resume=True)
    assert rest.losses == straight.losses
    assert rest.chosen == straight.chosen
    assert_same_weights(rest.record, straight.record)


def test_a_signal_after_the_last_step_keeps_the_whole_run(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_combo.tuning.setup import Setup

    recipe = tiny_recipe(**{"training.checkpoint_every": 1000})
    straight = tune(recipe, run_folder=tmp_path / "straight")
    with monkeypatch.context() as patched:
        patched.setattr(Setup, "predict", lambda setup: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match=rf"after step {len(straight.losses)} of"):
            tune(recipe, run_folder=tmp_path / "run")
    steps: list[int] = []

    class Count(RunCallback):
        def on_step_end(self, step: int, loss: float) -> None:
            steps.append(step)

    assert_same_weights(
        tune(recipe, run_folder=tmp_path / "run", resume=True, callback=Count()).record, straight.record
    )
    assert steps == []


def test_what_is_ignored_stays_so_and_a_second_signal_says_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with catch_signals() as stop:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                stop.take(signal.SIGINT, None)
    finally:
        signal.signal(signal.SIGHUP, previous)
    monkeypatch.setenv("LOCAL_RANK", "0")  # the launcher sends what the terminal has sent already
    launched = StopRequest()
    for _ in range(2):
        launched.take(signal.SIGINT, None)
    assert launched.number == signal.SIGINT


@pytest.mark.parametrize(("number", "name", "code"), [("TERM", "SIGTERM", 143), ("HUP", "SIGHUP", 129)])
def test_a_command_that_saves_nothing_ends_with_one_line(number: str, name: str, code: int) -> None:
    program = (
        "import os, signal, sys\n"
        "from peft_combo import __main__\n"
        "from peft_combo.recipe import files\n"
        f"files.list_recipes = lambda: os.kill(os.getpid(), signal.SIG{number})\n"
        "sys.argv = ['peft-combo', 'recipes', 'list']\n"
        "__main__.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=ALONE)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"Ended by {name} before it was done.\n")


# --- a job that is started again until it is done ---------------------------------------------------------------------


def test_resume_starts_where_nothing_is_saved_and_says_so(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    watch = Notes()
    first = tune(tiny_recipe(), run_folder=tmp_path / "none" / "yet", resume=True, callback=watch)
    assert any(note.startswith("Nothing is saved in") and "starting" in note for note in watch.notes)
    assert first.record.version == 1


def test_a_start_over_a_checkpoint_says_what_becomes_of_it(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        tune(tiny_recipe(), run_folder=tmp_path, callback=StopAt(4))
    watch = Notes()
    tune(tiny_recipe(), run_folder=tmp_path, callback=watch)
    assert any("step-00000003" in note and "add --resume" in note for note in watch.notes)


def test_checkpoints_may_come_otherwise_in_the_second_stretch(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        tune(tiny_recipe(), run_folder=tmp_path, callback=StopAt(4))
    (state,) = tmp_path.glob("step-*/state.json")
    told = json.loads(state.read_text())
    del told["values"]["recipe"]["training"]["checkpoint_seconds"]  # of an earlier version
    state.write_text(json.dumps(told))
    changes = {"training.checkpoint_every": 7, "training.checkpoint_seconds": 1.0}
    tune(tiny_recipe(**changes), run_folder=tmp_path, resume=True)


def test_checkpoints_come_by_steps_and_by_time(tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(run_state.time, "monotonic", lambda: now[0])
    changes = {"training.checkpoint_every": 10, "training.checkpoint_seconds": 60.0}
    clock = CheckpointClock(tiny_recipe(**changes).training, 0)
    assert [step for step in range(1, 31) if clock.is_due(step)] == [10, 20, 30]
    now[0] = 60.0
    assert clock.is_due(1)
    with clock.writing(1):
        now[0] = 70.0
    assert not clock.is_due(1)
    now[0] = 190.0
    assert not clock.is_due(2), "it took 10 s to write, so the next one by time comes after 200 s"
    now[0] = 270.0
    assert clock.is_due(2)


@pytest.mark.parametrize(
    "torn", [b'{"step": 4, "lo', b'{"step": 4, "loss": 1.0}', b"\x00\x00\x00", b"\xff\xfe{", b"7", b'{"step": null}']
)
def test_a_log_line_that_a_kill_cut_goes(torn: bytes, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 3.0}\n{"step": 3, "loss": 2.0}\n' + torn)
    log = RunLog(file, 3)
    log.add(4, loss=1.5)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 1, "loss": 3.0}, {"step": 3, "loss": 2.0}, {"step": 4, "loss": 1.5},
    ]  # fmt: skip


# Runs once itself, so that everything is imported, then makes a child for every run it is asked for, sends it a signal
# after so many seconds, and says how it ended.
SERVER = """
import json, os, sys, time, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from peft_combo.recipe.parse import parse_recipe
from peft_combo.tuning.loop import Interrupted, tune
torch.set_num_threads(1)
recipe = parse_recipe(json.loads(sys.argv[1]))
folder = Path(sys.argv[2])
tune(recipe.model_copy(update={"store": str(folder / "straight")}), run_folder=folder / "undisturbed")
print("ready", flush=True)
for line in sys.stdin:
    number, seconds = line.split()
    child = os.fork()
    if not child:
        code = 1
        try:
            tune(recipe, run_folder=folder / "run", resume=True)
            code = 0
        except Interrupted as error:
            code = error.exit_code
        finally:
            os._exit(code)
    deadline, ended = time.monotonic() + float(seconds), (0, 0)
    while ended == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, int(number))
            deadline = float("inf")
        time.sleep(0.001)
        ended = os.waitpid(child, os.WNOHANG)
    print(os.waitstatus_to_exitcode(ended[1]), flush=True)
"""


@contextmanager
def start_server(recipe: Recipe, folder: Path) -> Iterator[Callable[[int, float], int]]:
    raw = json.dumps(recipe.model_dump(mode="json"))
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, raw, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ALONE,
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    stdin, stdout = server.stdin, server.stdout

    def run(number: int, seconds: float) -> int:
        stdin.write(f"{number} {seconds}\n")
        stdin.flush()
        return int(stdout.readline())

    try:
        assert stdout.readline() == "ready\n"
        yield run
    finally:
        stdin.close()
        stdout.close()
        server.wait(timeout=60)


# AdaLoRA has the most to remember: masks, importances and a schedule beside the weights.
@pytest.mark.parametrize("method", ["lora", "adalora"] if "PEFT_COMBO_KILLS" in os.environ else ["adalora"])
def test_a_loop_of_kills_ends_with_the_weights_of_an_undisturbed_run(
    method: str, tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """PEFT_COMBO_KILLS=200 asks for that many kills of either method, in place of the usual six of one."""
    kills, dice = int(os.environ.get("PEFT_COMBO_KILLS", "6")), random.Random(0)
    changes = {"training.epochs": 12, "training.checkpoint_every": 9, "training.checkpoint_seconds": 0.02}
    recipe = tiny_recipe(method, **changes)
    with start_server(recipe, tmp_path) as run:
        straight = AdapterStore(tmp_path / "straight").open("tiny")
        store, killed, last = AdapterStore(recipe.store), 0, 0
        while killed < kills:
            number = dice.choice([signal.SIGKILL, signal.SIGTERM])
            code = run(number, dice.uniform(0.02, 1.0))
            assert code in (0, -signal.SIGKILL, 128 + signal.SIGTERM)
            if code:
                killed += 1
                found = find_checkpoint(tmp_path / "run")
                step = 0 if found is None else int(found.name.removeprefix("step-"))
                last = max(last, step)
            else:  # it came to its end: the loop begins anew
                assert_same_weights(store.open("tiny"), straight)
                shutil.rmtree(tmp_path / "run")
        assert last > 0, "no run came to a checkpoint"
        assert run(signal.SIGTERM, 1e6) == 0
        assert_same_weights(store.open("tiny"), straight)
        lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
        steps = [told["step"] for told in map(json.loads, lines) if "loss" in told]
        assert steps == sorted(set(steps)), "every step stands in the log once"


@pytest.mark.slow
def test_several_processes_save_together_and_go_on(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(**{"adapter.dropout": 0.0, "training.epochs": 400, "training.checkpoint_every": 1000})
    raw = recipe.model_dump(mode="json")
    raw["training"]["early_stopping"] = None
    (tmp_path / "tiny.yaml").write_text(json.dumps(raw))  # JSON is YAML
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "run"
    with (tmp_path / "said.txt").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
             "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port",
             str(port), "-m", "peft_combo", "tune", "--recipe", str(tmp_path / "tiny.yaml"), "--run-folder",
             str(folder)],
            cwd=REPOSITORY, stdout=said, stderr=said, env=ALONE,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not (folder / "log.jsonl").exists() or len((folder / "log.jsonl").read_text().splitlines()) < 5:
            assert process.poll() is None, (tmp_path / "said.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()  # the launcher: it hands the signal on
        process.wait(timeout=60)
    text = (tmp_path / "said.txt").read_text()
    found = find_checkpoint(folder)
    assert found is not None, text
    step = int(found.name.removeprefix("step-"))
    assert f"Stopped by SIGTERM after step {step} of " in text
    assert text.count("Stopped by SIGTERM") == 1, "the main process speaks for all"
    with pytest.raises(SystemExit):
        tune(parse_recipe(raw), run_folder=folder, resume=True, callback=StopAt(step + 1))


# --- the store of a recipe --------------------------------------------------------------------------------------------


@pytest.fixture
def call(
    shell: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], tuple[int, str, str]]:
    """Run a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda line: shell(*shlex.split(line))


def test_every_command_with_a_recipe_looks_in_its_store_and_store_goes_before_it(
    call: Callable[[str], tuple[int, str, str]], tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe(name="own", store="my-store", **{"training.epochs": 1})
    (tmp_path / "own.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    for line in ("tune --recipe own.yaml", "tune --recipe own.yaml --set seed=1"):
        code, out, err = call(line)
        assert code == 0, err
    assert AdapterStore("my-store").versions("tiny") == (1, 2)
    asked = [
        "evaluate --recipe own.yaml --adapter tiny", "embed --recipe own.yaml --adapter tiny",
        "recommend --recipe own.yaml --items i0", "adapters diff tiny@v1 tiny@v2 --recipe own.yaml",
        "adapters transfer tiny --recipe own.yaml", "adapters merge tiny@v1 tiny@v2 --into both --recipe own.yaml",
        "adapters export tiny --to out --recipe own.yaml", "data suggest --recipe own.yaml --adapter tiny -n 3",
        "tune --recipe own.yaml --from tiny --dry-run",
    ]  # fmt: skip
    for line in asked:
        code, out, err = call(line)
        assert code == 0, f"{line}: {out} {err}"
        code, out, err = call(f"{line.replace('--to out', '--to other')} --store elsewhere")
        assert (code, "in elsewhere/. Stored: nothing yet." in err) == (1, True), line
    assert call("tune --recipe own.yaml --store elsewhere")[0] == 0
    assert AdapterStore("elsewhere").versions("tiny") == (1,)
    assert call("evaluate --recipe own.yaml --adapter tiny --store elsewhere")[0] == 0
    assert not (tmp_path / "adapters").exists()


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("recommend --recipe own.yaml --items i0", "tune --recipe own.yaml"),
        (
            "evaluate --recipe own.yaml --adapter shoes --data 'my shop' --store s",
            "tune --recipe own.yaml --data 'my shop' --store s --set category=shoes",
        ),
        (
            "embed --recipe lora-fashion --adapter shoes --set seed=3",
            "tune --recipe lora-fashion --set seed=3 --set category=shoes",
        ),
        ("rate --adapter shoes", "tune --recipe lora-home --set category=shoes"),
        ("tag x --adapter food", "tune --recipe lora-food"),
    ],
)
def test_the_remedy_trains_by_the_recipe_that_was_given(
    line: str, remedy: str, call: Callable[[str], tuple[int, str, str]], tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_text(json.dumps(tiny_recipe(name="own", store="none").model_dump(mode="json")))
    (tmp_path / "my shop").mkdir()
    code, _, err = call(line)
    assert (code, err.splitlines()[-1]) == (1, f"Train one with: peft-combo {remedy}")
