"""The command line: quick to answer, one readable message for what a user can put right, and nothing undocumented."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main
from conftest import REPOSITORY
from made_up import build_priced_shop
from test_adapter_store import write
from test_importing import foreign
from typer.testing import CliRunner

from peft_combo.cli.app import app
from peft_combo.cli.output import print_table
from peft_combo.cli.recommend import _format_reason, _format_reasons, _print_suggestions
from peft_combo.data.labels.tags import Entity
from peft_combo.recommender.recommender import BundleRecommender
from peft_combo.recommender.results import Suggestion
from peft_combo.store.adapter_store import KEPT_VERSIONS, AdapterStore

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(shell: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return shell


def commands() -> Iterator[tuple[str, Any]]:
    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        inner = getattr(command, "commands", {})
        if not inner:
            yield name, command
        for word, child in inner.items():
            yield from walk(f"{name} {word}".strip(), child)

    yield from walk("", typer.main.get_command(app))


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_command_has_a_help_line_and_stands_in_the_overview(name: str) -> None:
    command = dict(commands())[name]
    assert command.help
    result = CliRunner().invoke(app, [*name.split(), "--help"])
    assert result.exit_code == 0
    overview = (REPOSITORY / "docs" / "commands.md").read_text()
    group, _, verb = name.partition(" ")
    lines = [line for line in overview.splitlines() if line.startswith(f"| `peft-combo {group}")]
    assert any(f"`peft-combo {name}`" in line or f"`{verb}`" in line for line in lines)


def test_the_list_of_commands_is_not_cut() -> None:
    told = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).stdout
    assert "..." not in told.split("Commands:")[1]


def test_every_option_and_argument_has_a_help_text_that_is_a_sentence() -> None:
    for name, command in commands():
        for parameter in command.params:
            text = getattr(parameter, "help", None)
            assert text, f"{name} {parameter.opts} has no help text"
            assert text.endswith("."), f"{name} {parameter.opts}: no full stop after {text!r}"


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], ("torch", "numpy", "transformers", "peft", "pydantic", "datasets")),
        (["recipes", "check", "lora-fashion"], ("torch", "numpy", "transformers", "peft", "datasets")),
    ],
)
def test_help_and_recipe_checks_import_nothing_heavy(arguments: list[str], heavy: tuple[str, ...]) -> None:
    program = (
        f"import sys; sys.argv = {['peft-combo', *arguments]!r}\n"
        "from peft_combo.__main__ import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_a_bundle_that_prices_make_impossible_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    """Bags cost 12.50 (p22, p44, p66), then 21.50; p0 costs 12.50. What is rejected or was taken is not counted on."""
    asked = {
        "--items p0 --budget 1": r"Budget 1\.00 allows no bundle of 3 to 4 items: .* Raise the budget to ",
        "--user u0 --budget 2": r"Budget 2\.00 allows no bundle of 3 to 4 items",
        "--items p0 --slots bag --size 2 --budget 30 --exclude p22,p44 --not-like p66": (
            r"costs 34\.00 \(context 12\.50 \+ bag 21\.50\)\. Raise the budget to 34\.00"
        ),
        "--items p0 --size 2 --category Shop --max-price 1": r"What binds: price_max \(rules out 96 of 96 items\)",
    }
    program = (
        "import json, sys\n"
        "from peft_combo.cli import app\n"
        "from peft_combo.errors import PeftComboError\n"
        "for words in json.load(sys.stdin):\n"
        "    try:\n"
        "        app(['recommend', '--recipe', 'lora-fashion', '--data', 'shop', '--frozen', *words.split()])\n"
        "    except PeftComboError as error:\n"
        "        print(json.dumps(str(error)))\n"
        "assert 'torch' not in sys.modules\n"
    )
    (tmp_path / "shop").mkdir()
    build_priced_shop(tmp_path / "shop")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False,
        input=json.dumps(list(asked)), env={"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for told, expected in zip(map(json.loads, done.stdout.splitlines()), asked.values(), strict=True):
        assert re.search(expected, told), told


def test_version(run: Run) -> None:
    from peft_combo import __version__

    assert run("--version") == (0, f"peft-combo {__version__}\n", "")


def test_five_faults_are_told_at_once_without_a_traceback(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "category: fashion\n"
        "data:\n  source: demo\n  vald_fraction: 0.2\n"
        "adapter:\n  method: lorra\n"
        "training:\n  epochs: ten\n  learning_rate: -1\n"
        "task:\n  temperature: hot\n"
    )
    code, out, err = run("tune", "--recipe", "mine.yaml")
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    for path in (
        "data.vald_fraction",
        "adapter.method",
        "training.epochs",
        "training.learning_rate",
        "task.temperature",
    ):
        assert path in err
    assert 'Did you mean "valid_fraction"?' in err
    assert 'Did you mean "lora"?' in err
    code, _, err = run("recipes", "check", "mine.yaml")
    assert code == 1
    assert "5 faults" in err


def shop(folder: Path, items: str = "", bundles: str = "") -> str:
    folder.mkdir()
    (folder / "items.csv").write_text(items or "item_id,title\n" + "".join(f"i{n},thing {n}\n" for n in range(9)))
    (folder / "bundles.csv").write_text(bundles)
    return str(folder)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"items": "item_id,name\ni1,x\n", "bundles": "bundle_id,item_id\nb,i1\n"},
            ["items.csv", "title", "data.columns"],
        ),
        ({"bundles": ""}, ["bundles.csv", "empty"]),
        ({"bundles": "bundle_id,item_id\nb,i1\nb,i99\nc,zzz\n"}, ["bundles.csv:3", "i99", "bundles.csv:4", "zzz"]),
        ({"bundles": "bundle_id,item_id\nb,i1\nb,i2\n"}, ["too few bundles", "1 bundles"]),
    ],
)
@pytest.mark.parametrize("command", ["tune", "data check"])
def test_faulty_data_is_told_with_file_line_and_remedy(
    command: str, files: dict[str, str], expected: list[str], run: Run, tmp_path: Path
) -> None:
    if command == "data check" and expected[0] == "too few bundles":
        pytest.skip("too little to split is no fault of the files")
    code, out, err = run(*command.split(), "--recipe", "lora-fashion", "--data", shop(tmp_path / "shop", **files))
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    for words in expected:
        assert words in err


def test_a_store_that_cannot_be_written_is_told_before_training(run: Run, tmp_path: Path) -> None:
    (tmp_path / "adapters").write_text("a file, not a folder")
    code, out, err = run("tune", "--recipe", "lora-fashion")
    assert (code, out) == (1, "")
    assert "adapters" in err
    assert "Plan:" not in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("tune", "--recipe", "lora-fashon"), 'Did you mean "lora-fashion"?'),
        (("tune", "--recipe", "lora-fashion", "--set", "training.epoch=2"), 'Did you mean "epochs"?'),
        (("tune", "--recipe", "lora-electronics"), "--data"),
        (("adapters", "show", "fashion"), "peft-combo tune --recipe lora-fashion"),
        (("adapters", "verify"), "No adapter store"),
        (("adapters", "remove", "../x"), "x"),
        (("adapters", "alias", "fashion@v1", "prod"), "No adapter for category"),
        (("adapters", "rollback", "fashion@v1"), "is not an alias"),
        (("adapters", "unalias", "fashion@prod"), "No adapter for category"),
        (("adapters", "aliases", "fashion@v1"), "is a version"),
        (("adapters", "gc", "--keep", "0"), "at least 1"),
        (("adapters", "gc", "--older-than", "nan"), "number of days"),
        (("adapters", "import", "nowhere", "--category", "fashion"), "adapter_config.json: is missing"),
        (("data", "get", "bundlerec-clothes"), "bundlerec-clothing"),
        (("data", "stats", "--data", "nowhere"), "nowhere"),
        (("recipes", "copy", "lora-fashon", "x.yaml"), "lora-fashion"),
    ],
)
def test_what_a_user_can_put_right_is_one_message(arguments: tuple[str, ...], expected: str, run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert expected in err
    assert "Traceback" not in err


def test_a_tune_from_start_to_shelf(run: Run, tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe(**{"training.epochs": 8})
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    code, out, err = run("tune", "--recipe", "./tiny.yaml")
    assert code == 0, err
    assert re.search(r"Plan: lora: [\d,]+ adapter \+ [\d,]+ head parameters train", err)
    for row in ("popularity", "item-kNN", "TF-IDF title", "frozen backbone", "tuned"):
        assert re.search(rf"^{row} +0\.\d+", out, re.MULTILINE)
    assert "better than the frozen one" in out
    assert "test bundles were not looked at" in out
    assert "Stored tiny@v1" in out
    assert out.endswith("Chart: runs/tiny-lora.tiny/quality.html\n")
    assert "<svg" in (tmp_path / "runs" / "tiny-lora.tiny" / "quality.html").read_text()

    code, out, _ = run("adapters", "verify")
    assert (code, out) == (0, "1 adapter: every file is as it was written.\n")
    code, out, _ = run("adapters", "list", "--json")
    assert [entry["category"] for entry in json.loads(out)] == ["tiny"]
    assert "tiny@v1" in run("adapters", "list")[1]
    assert "library_name: peft" in run("adapters", "show", "tiny")[1]
    (tmp_path / "adapters" / "tiny" / "v1" / "adapter_config.json").write_text("{}")
    code, out, err = run("adapters", "verify")
    assert (code, out) == (1, "")
    assert "adapter_config.json" in err
    assert run("adapters", "remove", "tiny@v1")[1] == "removed tiny@v1\n"


def test_aliases_and_garbage_from_the_command_line(run: Run, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    for _ in range(5):
        write(store)
    assert run("adapters", "alias", "fashion@v1", "prod") == (0, "fashion@prod -> v1\n", "")
    assert run("adapters", "alias", "fashion", "prod") == (0, "fashion@prod -> v5\n", "")
    assert run("adapters", "rollback", "fashion@prod") == (0, "fashion@prod -> v1, back from v5\n", "")
    assert re.search(r"^fashion@prod +v1 +20", run("adapters", "aliases")[1], re.MULTILINE)
    history = run("adapters", "aliases", "fashion@prod")[1].splitlines()
    assert [line.split()[0] for line in history] == ["fashion@prod", "v1", "v5", "v1"]
    assert "rolled back" in history[-1]
    assert json.loads(run("adapters", "aliases", "fashion", "--json")[1])[0]["moves"][1]["version"] == 5
    assert re.search(r"^fashion@v1 +prod +adalora", run("adapters", "list")[1], re.MULTILINE)
    assert run("adapters", "show", "fashion@prod")[1].startswith("---")
    assert run("adapters", "verify", "fashion@prod")[1] == "fashion@prod: every file is as it was written.\n"
    code, out, err = run("adapters", "remove", "fashion@v1")
    assert (code, out) == (1, "")
    assert "peft-combo adapters unalias fashion@prod" in err
    code, out, err = run("adapters", "gc", "--keep", "2", "--dry-run")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"(would remove fashion@v[32] \(0\.0 MiB\)\n){2}0\.0 MiB would be freed\n", out)
    assert run("adapters", "gc", "--older-than", "1") == (0, "Nothing to remove.\n", "")
    assert [one["name"] for one in json.loads(run("adapters", "gc", "--json")[1])] == ["fashion@v2"]
    assert f"default {KEPT_VERSIONS}" in " ".join(run("adapters", "gc", "--help")[1].split())
    assert run("adapters", "unalias", "fashion@prod") == (0, "removed fashion@prod, which pointed to v1\n", "")
    assert run("adapters", "aliases")[0] == 0
    (tmp_path / "adapters" / ".aliases" / "fashion@prod.json").write_text("{")
    code, out, err = run("adapters", "list")
    assert (code, out.count("fashion@v")) == (0, 4)
    assert "is not JSON" in err


def full_disk(path: Path) -> Any:
    raise OSError(28, "No space left on device", str(path))


def test_an_imported_adapter_is_recommended_with_embedded_and_evaluated(
    run: Run, tiny_recipe: Callable[..., Any], tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(tmp_path / "peft", tiny_bert)
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny_recipe().model_dump(mode="json")))
    take = ("adapters", "import", "peft", "--category", "tiny", "--backbone", str(tiny_bert), "--max-length", "16")
    code, out, err = run(*take)
    assert code == 0, err
    assert out.startswith("Stored tiny@v1 in adapters/tiny/v1; not measured.")
    assert "not measured" in run("adapters", "list")[1]
    assert "Not measured." in run("adapters", "show", "tiny")[1]
    run("adapters", "alias", "tiny", "prod")
    use = ("--recipe", "./tiny.yaml", "--adapter", "tiny@prod")
    assert "60 texts encoded now" in run("embed", *use)[1]
    assert run("recommend", *use, "--items", "i0,i6", "-k", "2")[0] == 0
    code, out, err = run("evaluate", *use)
    assert code == 0, err
    assert re.search(r"^tuned BERT tiny@prod +0\.\d+", out, re.MULTILINE)
    assert "whether it has learned from these test bundles is not known" in err
    for shown in ([], ["--json"]):  # the file fails at the end all the same: what was measured is printed first
        with monkeypatch.context() as patched:
            patched.setattr("peft_combo.metrics.charts.atomic_file", full_disk)
            code, out, err = run("evaluate", *use, "--plot", "chart.html", *shown)
        assert (code, err.splitlines()[-1]) == (1, "chart.html cannot be written: No space left on device.")
        assert "tuned BERT tiny@prod" in out
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "matplotlib", None)
        code, out, err = run("evaluate", *use, "--plot", "chart.html")
    assert code == 1
    assert "Traceback" not in err
    assert "matplotlib" in err.splitlines()[-1]


def test_json_is_all_that_reaches_stdout(run: Run, tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe(**{"training.epochs": 1})
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    code, out, err = run("tune", "--recipe", "./tiny.yaml", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["adapter"] == "tiny@v1"
    assert len(told["losses"]) == told["plan"]["steps"]


def test_data_and_recipes_answer_in_tables_and_json(run: Run) -> None:
    assert "lora-fashion" in run("recipes", "list")[1]
    assert {entry["name"] for entry in json.loads(run("recipes", "list", "--json")[1])} >= {"lora-fashion", "lora-food"}
    assert run("recipes", "show", "lora-fashion")[1].startswith("# LoRA")
    assert (
        json.loads(run("recipes", "show", "lora-fashion", "--set", "training.epochs=2")[1])["training"]["epochs"] == 2
    )
    assert json.loads(run("recipes", "schema")[1])["title"] == "peft-combo recipe"
    assert "demo" in run("data", "list")[1]
    assert {entry["name"] for entry in json.loads(run("data", "list", "--json")[1])} >= {"demo", "folder"}
    assert json.loads(run("data", "stats", "--json")[1])["items"] == 1000
    assert "nothing is wrong" in run("data", "check")[1]
    code, out, _ = run("recipes", "copy", "lora-fashion", "mine.yaml")
    assert (code, out.strip()) == (0, "mine.yaml")
    assert "valid recipe" in run("recipes", "check", "./mine.yaml")[1]


def test_embed_encodes_a_catalogue_once(run: Run, tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe(**{"training.epochs": 1})
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    assert run("tune", "--recipe", "./tiny.yaml")[0] == 0
    for adapter, texts in (((), 120), (("--adapter", "tiny"), 60)):  # titles, and titles with their category
        assert f" {texts} texts encoded now" in run("embed", "--recipe", "./tiny.yaml", *adapter)[1]
        assert " 0 texts encoded now" in run("embed", "--recipe", "./tiny.yaml", *adapter)[1]
    code, out, err = run("embed", "--recipe", "./tiny.yaml", "--adapter", "tinny")
    assert (code, out) == (1, "")
    assert 'Did you mean "tiny"?' in err


def test_reasons_come_in_words_first(capsys: pytest.CaptureFixture[str]) -> None:
    entry = {
        "relevance": 0.5, "compatibility": 0.25, "agreement": 1.0, "agrees": {"for": "women", "season": "summer"},
        "together": {"with": "F1", "bundles": 3}, "scorers": {"EASE": 0.5},
    }  # fmt: skip
    assert _format_reasons(entry) == (
        "both for women, season summer; in 3 bundles with F1; relevance +0.50, compatibility +0.25, agreement +1.00; "
        "EASE +0.50"
    )
    assert _format_reason(entry) == "with F1 in 3 bundles; same season; for women"
    one = Suggestion("F2", "Tee", "top", None, 1.0, {"text ranker": 1.0}, {"F1": 3}, {}, {"same category": 0.75})
    _print_suggestions([one], explain=True)
    assert "same category +0.75; 3 bundles with F1; text ranker +1.00" in " ".join(capsys.readouterr().out.split())


def test_the_best_row_is_bold_and_no_figure_is_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    rows = [("popularity", "0.123", "0.456"), ("a name of many more than twenty-eight letters", "0.789", "0.987")]
    print_table(("", "NDCG@10", "95 % interval"), rows, numbers=True, best=1)
    bold = capsys.readouterr().out
    plain = re.sub(r"\x1b\[[\d;]*m", "", bold)
    assert "\x1b[1m" in bold.splitlines()[2]
    assert "\x1b" not in bold.splitlines()[1]
    assert [line.split()[-2:] for line in plain.splitlines()[1:3]] == [["0.123", "0.456"], ["0.789", "0.987"]]
    monkeypatch.setenv("NO_COLOR", "1")
    print_table(("", "NDCG@10", "95 % interval"), rows, numbers=True, best=1)
    assert capsys.readouterr().out.split() == plain.split()


COMPLETED = [
    ("tune --recipe lora-fashion-", ["lora-fashion-pictures", "lora-fashion-zh"]),
    ("tune -r own", ["own.yaml"]),
    ("compare --recipe lora-fashion --method pre", ["prefix"]),
    ("evaluate --recipe lora-fashion --adapter sh", ["shoes", "shoes@prod", "shoes@v1"]),
    ("recommend --recipe own.yaml --adapter ", ["hats", "hats@v1"]),
    ("adapters show --store shelf ", ["hats", "hats@v1"]),
    ("adapters rollback sh", ["shoes@prod"]),
    ("retune --alias ", ["prod"]),
    ("adapters import folder --category sh", ["shoes"]),
    ("evaluate --recipe nowhere --adapter ", []),
    ("tune --set training.learn", ["training.learning_rate="]),
    ("tune --recipe lora-fashion --set adapter.r", ["adapter.rank=", "adapter.rslora="]),
    ("tune --recipe nowhere --set training.early_stopping.p", ["training.early_stopping.patience="]),
    ("compare --recipe classify-fashion --over task.mi", ["task.min_texts="]),
    ("search --recipe lora-fashion --over task.mi", []),
    ("recommend --recipe lora-fashion --category Cl", ["Clothing"]),
    ('recommend --recipe lora-fashion --category "Clothing > W', ["Clothing > Women"]),
    ("recommend --recipe lora-fashion --category Clothing", ["Clothing"]),  # a > outside quotes is no word's
    ("recommend --recipe lora-fashion --data big --category ", []),
]


def test_the_shell_completes_names_without_torch(tmp_path: Path) -> None:
    write(AdapterStore(tmp_path / "adapters"), "shoes")
    write(AdapterStore(tmp_path / "shelf"), "hats")
    AdapterStore(tmp_path / "adapters").alias("shoes", "prod")
    (tmp_path / "own.yaml").write_text("extends: lora-fashion\nname: own\nstore: shelf\n")
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "items.csv").write_bytes(b"item_id,title,category\n1,Shirt,Tops\n" + b"\n" * 2**22)
    program = (
        "import contextlib, io, json, os, re, sys\n"
        "from peft_combo.cli import app\n"
        "for line in json.load(sys.stdin):\n"
        "    words = ['peft-combo', *re.findall('\"[^\"]*|[^ ]+', line)] + [''] * line.endswith(' ')\n"
        "    os.environ |= {'_PEFT_COMBO_COMPLETE': 'complete_bash', 'COMP_CWORD': str(len(words) - 1),\n"
        "                   'COMP_WORDS': '\\n'.join(words)}\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):\n"
        "        app(prog_name='peft-combo')\n"
        "    print(json.dumps(out.getvalue().strip().splitlines()))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False,
        input=json.dumps([line for line, _ in COMPLETED]), env={"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(map(json.loads, done.stdout.splitlines())) == [names for _, names in COMPLETED]


def test_options_for_the_store_agree() -> None:
    for name, command in commands():
        options = {option.name: option for option in command.params}
        if "store" in options:
            assert options["store"].default in ((None,) if "recipe" in options else (None, Path("adapters"))), name


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        ("search --recipe lora-fashion --over adapter.rank=2,4", "search"),
        ("serve --recipe lora-fashion", "serve"),
        ("adapters export fashion --to x --format onnx", "onnx"),
        ("embed --recipe lora-fashion --on ray", "ray"),
        ("tune --recipe lora-fashion --each-category --on slurm", "slurm"),
        ("tune --recipe lora-fashion-zh", "multilingual"),
        ("tune --recipe lora-food", "completejourney"),
        ("tune --recipe classify-reviews-zh --set backbone.model=embedded", "reviews-zh"),
    ],
)
def test_a_missing_extra_is_named_before_anything_is_loaded(
    arguments: str, extra: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_combo.cli.extras.find_spec", lambda name: None)
    monkeypatch.setattr("peft_combo.cli.output.ConsoleWatch", None)
    code, out, err = run(*arguments.split())
    assert (code, out) == (1, "")
    assert err.endswith(f": pip install 'peft-combo[{extra}]'\n")


def test_recommend_prints_bundles_items_and_reasons(
    run: Run, tiny_recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(**{"training.epochs": 4})
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    assert run("tune", "--recipe", "./tiny.yaml")[0] == 0
    ask = ("recommend", "--recipe", "./tiny.yaml")
    code, out, err = run(*ask, "--items", "i0,i6", "-k", "2", "--explain")
    assert code == 0, err
    assert re.match(r"1\. \d items(, [\d,.]+ in all)?, score ", out)
    assert re.search(r"\n +slot +item +title +price +why\n", out)
    assert re.search(r"i0 .* given\n", out)
    assert "compatibility" in out
    plain = run(*ask, "--items", "i0,i6", "-k", "2")[1]
    assert not re.search(r"score|compatibility|[+-]\d", plain), "scores are for --explain"
    bundles = json.loads(run(*ask, "--items", "i0", "-k", "2", "--json")[1])
    assert len(bundles) == 2
    assert all("i0" in bundle["items"] and bundle["evidence"] for bundle in bundles)
    code, out, _ = run(*ask, "--items", "i0", "--single", "-k", "3", "--explain")
    assert code == 0
    assert len(out.splitlines()) == 4
    assert run(*ask, "--query", "w10 w40", "--frozen")[0] == 0
    (tmp_path / "asked.jsonl").write_text('{"id": 1, "items": ["i0"]}\n{"items": ["i99"]}\n')
    code, out, err = run(*ask, "--from", "asked.jsonl", "--to", "told.jsonl", "-k", "3")
    assert (code, out) == (1, "1 of 2 requests answered in told.jsonl\n")
    assert 'line 2: No item "i99"' in err
    told = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert [len(one["results"]) for one in told] == [3, 0]
    sizes: list[int] = []

    def note(made: BundleRecommender) -> BundleRecommender:
        sizes.append(len(made.dataset.catalog))
        return made

    monkeypatch.setattr(BundleRecommender, "with_retrieval", note)
    for many in (3, 2):  # candidates are found first where requests are many
        monkeypatch.setattr("peft_combo.cli.recommend._MANY_REQUESTS", many)
        assert run(*ask, "--from", "asked.jsonl", "--to", "told.jsonl", "-k", "3")[0] == 1
    assert sizes == [60]
    for wrong, expected in (
        (("--from", "asked.jsonl"), "--from FILE and --to FILE go together"),
        (("--items", "i99"), 'No item "i99"'),
        ((), "Nothing to go by"),
        (("--items", "i0", "--adapter", "tinny"), 'Did you mean "tiny"?'),
        (("--items", "i0", "--slots", "hat"), 'No slot is called "hat"'),
        (("--items", "i0", "--budget", "3"), "udget"),
    ):
        code, out, err = run(*ask, *wrong)
        assert (code, out) == (1, "")
        assert expected in err
        assert "Traceback" not in err


def test_a_query_is_taken_apart_and_what_was_understood_is_said(
    run: Run, tiny_recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_last_word(texts: Sequence[str]) -> list[list[Entity]]:
        named = [list(re.finditer(r"\bw12\d\b", text)) for text in texts]
        return [[Entity("Thing", word[0], *word.span(), 1.0) for word in words] for words in named]

    recipe = tiny_recipe(**{"training.epochs": 1})
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    assert run("tune", "--recipe", "./tiny.yaml")[0] == 0
    ask = ("recommend", "--recipe", "./tiny.yaml", "--frozen", "-k", "1")
    code, out, err = run(*ask, "--query", "w121", "--tagger", "tiny")
    assert (code, out) == (1, "")
    assert "tuned for bundle; expected one tuned for tagging" in err
    code, out, err = run(*ask, "--items", "i0", "--tagger", "tiny")
    assert (code, out) == (1, "")
    assert "--tagger takes a query apart" in err
    monkeypatch.setattr("peft_combo.cli.recommend.load_tagger", lambda reference, store: by_last_word)
    query = ("--query", "w10 w121 with w124", "--tagger", "words")
    code, out, err = run(*ask, *query, "--explain")
    assert code == 0, err
    assert "Understood: w121 (Thing), w124 (Thing)" in err
    assert "Nothing in the catalogue" not in err
    assert out.count("answers: w121; ") == out.count("answers: w124; ") == 1
    (told,) = json.loads(run(*ask, *query, "--json")[1])
    assert {one["wish"] for entry in told["evidence"] for one in entry.get("answers", ())} == {"w121", "w124"}
    (tmp_path / "asked.jsonl").write_text('{"query": "w122"}\n{"query": "w122 under 5"}\n')
    code, out, err = run(*ask, "--from", "asked.jsonl", "--to", "told.jsonl", "--tagger", "words")
    assert (code, out) == (1, "1 of 2 requests answered in told.jsonl\n")
    assert "line 2: None of the 9 items that answer 'w122' is allowed" in err  # no price is known


def test_the_titles_of_a_catalogue_give_its_items_their_slots(run: Run, tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "items.csv").write_text('item_id,title\na,"Boots, red"\nb,Wool coat with belt\nc,Mystery\n')
    code, out, err = run("tag", "--data", "shop", "--to", "shop/tagged.csv")
    assert (code, err) == (0, "")
    assert out.startswith("2 of 3 items got a slot (Shoe 1, Clo 1); 0 had one, 1 have none.\n")
    assert (tmp_path / "shop" / "tagged.csv").read_text().splitlines() == [
        "item_id,title,slot,entity", 'a,"Boots, red",Shoe,boots', "b,Wool coat with belt,Clo,coat", "c,Mystery,,",
    ]  # fmt: skip
    told = json.loads(run("tag", "--data", "shop", "--to", "again.csv", "--json")[1])
    assert told["slots_given"] == {"Shoe": 1, "Clo": 1}
    assert run("tag", "A wool coat")[1].splitlines()[0] == "A wool [coat](Clo)"
    for wrong in ((), ("text", "--data", "shop", "--to", "x.csv"), ("--data", "shop"), ("text", "--to", "x.csv")):
        code, out, err = run("tag", *wrong)
        assert (code, out) == (1, "")
        assert "Expected texts to tag, or --data FOLDER" in err
    assert "Try x.csv" in run("tag", "--data", "shop", "--to", "x.parquet")[2]


def test_labels_and_tags_are_checked_and_described_as_tables_are(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "labels.csv").write_text("text,label\na,x\nb,y\n,y\n")
    (tmp_path / "mine" / "tags.jsonl").write_text('{"tokens": ["Red", "hat"], "tags": ["O", "Acc"]}\n')
    code, out, err = run("data", "check", "--data", "mine")
    assert (code, out) == (1, "")
    assert "2 faults:\n  labels.csv:4: text is empty. Write it, or drop the row.\n  tags.jsonl:1: tags: " in err
    code, out, err = run("data", "check", "--data", "mine", "--recipe", "tag-texts")
    assert (code, err.count("fault")) == (1, 1)
    (tmp_path / "mine" / "labels.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "mine" / "tags.jsonl").write_text('{"tokens": ["Red", "hat"], "tags": ["O", "B-Acc"]}\n')
    assert "nothing is wrong" in run("data", "check", "--data", "mine")[1]
    out = run("data", "stats", "--data", "mine")[1]
    assert re.search(r"^texts per class +x 1, y 1", out, re.MULTILINE)
    assert re.search(r"^entities per type +Acc 1", out, re.MULTILINE)
    assert json.loads(run("data", "stats", "--data", "mine", "-r", "classify-texts", "--json")[1])["classes"] == 2
    code, out, err = run("data", "check", "--data", "mine", "--recipe", "lora-fashion")
    assert (code, out) == (1, "")
    assert "recipes that learn from them: classify-texts, tag-texts" in err


def test_evaluate_prints_every_row_and_guards_the_split(
    run: Run, tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = tiny_recipe(**{"training.epochs": 4})
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    assert run("tune", "--recipe", "./tiny.yaml")[0] == 0
    ask = ("evaluate", "--recipe", "./tiny.yaml", "--adapter", "tiny")
    code, out, err = run(*ask, "--plot", "chart.html")
    assert code == 0, err
    for row in ("random", "popularity", "item-kNN", "EASE", "CEASE-TFIDF", "frozen BERT", "tuned BERT tiny", "fusion"):
        assert re.search(rf"^{row} +0\.\d+", out, re.MULTILINE)
    assert "<svg" in (tmp_path / "chart.html").read_text()
    assert out.startswith("The fusion has the missing item among its first ten for ")
    assert max(map(len, out.splitlines()[2:])) <= 100
    assert "R@5" in out
    assert "Every item of every held-out bundle" not in out
    code, out, err = run(*ask, "--verbose", "--quiet")
    assert (code, err) == (0, "")
    assert "Every item of every held-out bundle" in out
    assert "warm target" in out
    assert out.endswith("Chart: runs/tiny-lora.tiny/test.html\n"), "a chart without being asked"
    assert "<svg" in (tmp_path / "runs" / "tiny-lora.tiny" / "test.html").read_text()
    report = json.loads(run(*ask, "--json")[1])
    assert {"split_digest", "protocol", "rows", "fusion"} <= report.keys()
    code, out, err = run(*ask, "--set", "data.split_seed=1")
    assert (code, out) == (1, "")
    assert "another split" in err


def test_evaluate_finds_bundles_by_their_intents(
    run: Run, tiny_recipe: Callable[..., Any], tiny_shop: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shop"
    shutil.copytree(tiny_shop, folder)
    recipe = tiny_recipe(**{"data.path": str(folder), "training.epochs": 1})
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    ask = ("evaluate", "--recipe", "./tiny.yaml", "--queries")
    code, out, err = run(*ask)
    assert (code, out) == (1, "")
    assert "says what it is for" in err
    assert "the column intent of bundle_meta" in err
    # Every bundle is asked for by the title of its first item.
    titles = dict(line.split(",")[:2] for line in (folder / "items.csv").read_text().splitlines()[1:])
    first = dict(reversed([line.split(",") for line in (folder / "bundles.csv").read_text().splitlines()[1:]]))
    header, *rows = (folder / "bundle_meta.csv").read_text().splitlines()
    lines = [f"{header},intent", *(f"{row},{titles[first[row.split(',')[0]]]}" for row in rows)]
    (folder / "bundle_meta.csv").write_text("\n".join(lines) + "\n")
    assert run("tune", "--recipe", "./tiny.yaml")[0] == 0
    code, out, err = run(*ask, "--adapter", "tiny")
    assert code == 0, err
    for row in (
        "TF-IDF title",
        "TF-IDF title and category",
        "frozen title",
        "tuned tiny",
        "frozen and words",
        "chosen",
    ):
        assert re.search(rf"^{row} +\d\.\d+", out, re.MULTILINE)
    told = json.loads(run(*ask, "--json")[1])
    assert {"split_digest", "protocol", "rows", "weights", "counts"} <= told.keys()
    assert told["rows"][0]["values"]["r@10"] > 0.5
    code, out, err = run(*ask, "--compose")
    assert (code, out) == (1, "")
    assert "--queries prints a table of its own" in err


def test_a_rating_adapter_rates_and_joins_the_comparison(
    run: Run, tiny_recipe: Callable[..., Any], tiny_shop: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shop"
    shutil.copytree(tiny_shop, folder)
    owners = dict(line.split(",") for line in (folder / "bundle_meta.csv").read_text().splitlines())
    lines = [line.split(",") for line in (folder / "bundles.csv").read_text().splitlines()[1:]]
    bought = [f"{owners[bundle]},{item},{time}" for time, (bundle, item) in enumerate(lines)]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *bought]) + "\n")
    same = {"data.path": str(folder), "training.epochs": 1}
    for name, changes in (("tiny", {}), ("rated", {"category": "rated", "task": {"kind": "rating"}})):
        recipe = tiny_recipe("head", **same, **changes)
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
        code, _, err = run("tune", "--recipe", f"./{name}.yaml")
        assert code == 0, err

    code, out, err = run("rate", "--adapter", "rated", "--user", "u3", "-k", "4")
    assert code == 0, err
    assert out.split()[:3] == ["item", "title", "probability"]
    told = json.loads(run("rate", "--adapter", "rated", "--user", "u3", "-k", "4", "--json")[1])
    assert [line.split()[0] for line in out.splitlines()[1:]] == [one["item_id"] for one in told]
    assert all(0 < one["probability"] < 1 for one in told)
    asked = [told[2]["item_id"], told[0]["title"]]
    again = json.loads(run("rate", *asked, "--adapter", "rated", "--user", "u3", "--data", str(folder), "--json")[1])
    assert again == [told[2], told[0]]
    assert len(json.loads(run("rate", "--adapter", "rated", "--liked", "i0", "--liked", "i6", "--json")[1])) == 10
    for wrong, expected in (
        (("--adapter", "rated"), "Nothing to go by"),
        (("--adapter", "rated", "--user", "u99"), 'No user "u99" among the 30'),
        (("--adapter", "rated", "--liked", "i99"), 'No item with the id or title "i99"'),
        (("--adapter", "tiny", "--liked", "i0"), "was tuned for bundle; expected one tuned for rating"),
        (("--adapter", "ratted", "--liked", "i0"), 'Did you mean "rated"?'),
    ):
        code, out, err = run("rate", *wrong)
        assert (code, out) == (1, "")
        assert expected in err
        assert "Traceback" not in err

    ask = ("evaluate", "--recipe", "./tiny.yaml", "--adapter", "tiny", "--adapter", "rated")
    code, out, err = run(*ask)
    assert code == 0, err
    assert re.search(r"^tuned BERT tiny +0\.\d+", out, re.MULTILINE)
    assert re.search(r"^rated rated +0\.\d+", out, re.MULTILINE)
    code, out, err = run(*ask[:3], "--adapter", "rated", "--set", "data.split_seed=1")
    assert (code, out) == (1, "")
    assert "it was tuned on users of another split" in err


def test_a_sequence_adapter_serves_and_is_compared_like_one_of_bundles(
    run: Run, tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    task = {"kind": "sequence", "width": 16}
    (tmp_path / "tiny.yaml").write_text(
        json.dumps(tiny_recipe("head", **{"task": task, "training.epochs": 2}).model_dump(mode="json"))
    )
    code, out, err = run("tune", "--recipe", "./tiny.yaml")
    assert code == 0, err
    assert re.search(r"^tuned +0\.\d+", out, re.MULTILINE)
    use = ("--recipe", "./tiny.yaml", "--adapter", "tiny")
    assert run("recommend", *use, "--items", "i0,i6", "-k", "2")[0] == 0
    code, out, err = run("evaluate", *use, "--compose")
    assert code == 0, err
    for row in (
        "tuned BERT tiny",
        "top-k, fusion",
        "composer, fusion",
        "beam, tuned BERT tiny",
        "beam to its end, tuned",
    ):
        assert re.search(rf"^{row}.* +\d\.\d+", out, re.MULTILINE)
    code, out, err = run("adapters", "export", "tiny", "--to", "merged")
    assert code == 0, err
    assert re.search(r"^torch, merged .* 1\.0000 ", out, re.MULTILINE)
