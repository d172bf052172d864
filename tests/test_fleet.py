"""A fleet of adapters: a category each where there are bundles enough, its parent's else; asked twice, tuned once."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from conftest import StopAt
from share_functions import Here

from peft_combo.distributed import LostShare, SlurmExecutor
from peft_combo.errors import RecipeError
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning import fleet
from peft_combo.tuning.fleet import Member, measure_share, plan_fleet, tune_fleet, tune_share

Run = Callable[..., tuple[int, str, str]]


class Measuring(Here):
    """Whose adapters are measured at 0.2 for whole catalogues and 0.3 for categories, unless told."""

    def __init__(self, told: dict[str, float | str]) -> None:
        super().__init__()
        self.told = told

    def map_shares(self, function: Any, shares: Any) -> Any:
        if function is not measure_share:
            yield from super().map_shares(function, shares)
            return
        for number, share in enumerate(shares):
            found = {one: self.told.get(one, 0.2 if one.startswith("tiny@") else 0.3) for one in share["adapters"]}
            lost = next((value for value in found.values() if isinstance(value, str)), None)
            yield number, {"failed": lost} if lost else found


@pytest.fixture
def deep_shop(tmp_path: Path) -> Path:
    """Sixty items on two levels: Home > Lamps has 20 bundles, Home > Rugs 3, Garden 4 and all of them in Tools."""
    folder = tmp_path / "deep"
    folder.mkdir()
    paths = ["Home > Lamps", "Home > Rugs", "Garden > Tools"]
    rows = [f"i{number},w{number} w{100 + number % 3},{paths[number % 3]}" for number in range(60)]
    (folder / "items.csv").write_text("item_id,title,category\n" + "\n".join(rows) + "\n")
    bundles = [(0, 20), (1, 3), (2, 4)]
    made = [(kind, place) for kind, count in bundles for place in range(count)]
    lines = [f"b{kind}-{place},i{kind + 3 * ((place + more) % 20)}" for kind, place in made for more in range(3)]
    (folder / "bundles.csv").write_text("bundle_id,item_id\n" + "\n".join(lines) + "\n")
    return folder


def test_a_category_with_few_bundles_falls_back_to_the_nearest_above(tiny_recipe: Any, deep_shop: Path) -> None:
    recipe = tiny_recipe(**{"data.path": str(deep_shop)})
    members = plan_fleet(recipe, least=10, depth=2)
    assert [(m.told, m.items, m.bundles, m.name, m.parent, m.status) for m in members] == [
        ("all", 60, 27, "tiny", None, "waiting"),
        ("Garden", 20, 4, "tiny-garden", "tiny", "falls back"),
        ("Home", 40, 23, "tiny-home", "tiny", "waiting"),
        ("Garden > Tools", 20, 4, "tiny-garden-tools", "tiny", "falls back"),
        ("Home > Lamps", 20, 20, "tiny-home-lamps", "tiny-home", "waiting"),
        ("Home > Rugs", 20, 3, "tiny-home-rugs", "tiny-home", "falls back"),
    ]
    assert members[-1].reason == "3 bundles, fewer than 10"
    assert [m.told for m in plan_fleet(recipe, least=10)] == ["all", "Garden", "Home"]
    with pytest.raises(RecipeError, match=r"--depth: expected 1 to 2, the levels that divide the catalogue, found 3"):
        plan_fleet(recipe, depth=3)


def test_who_cannot_be_a_fleet_is_told(tiny_recipe: Any, deep_shop: Path) -> None:
    (deep_shop / "items.csv").write_text("item_id,title\n" + "\n".join(f"i{n},w{n}" for n in range(60)) + "\n")
    with pytest.raises(RecipeError, match="have no categories to divide them by"):
        plan_fleet(tiny_recipe(**{"data.path": str(deep_shop)}))
    with pytest.raises(RecipeError, match=r"A fleet is of recipes for bundles, and recipe .* has task\.kind masked"):
        plan_fleet(tiny_recipe(**{"task.kind": "masked"}))


@pytest.mark.parametrize(
    ("path", "taken", "name"),
    [
        (("Clothing, Shoes & Jewelry", "Women"), set(), "f-clothing-shoes-jewelry-women"),
        (("Küche",), set(), "f-kuche"),
        (("女装",), set(), r"f-[0-9a-f]{8}"),
        (("Shoes",), {"f-shoes"}, r"f-shoes-[0-9a-f]{8}"),
        (("long" * 30,), set(), r"f-(long)+l?o?n?-[0-9a-f]{8}"),
    ],
)
def test_an_adapter_is_named_after_its_category(path: tuple[str, ...], taken: set[str], name: str) -> None:
    import re

    found = fleet._name("f", path, taken)
    assert re.fullmatch(name, found)
    assert len(found) <= 64


def test_a_fleet_is_tuned_once_and_what_is_missing_later(tiny_recipe: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe(**{"training.epochs": 1})
    planned = plan_fleet(recipe, least=20)
    assert [member.told for member in planned] == ["all", "Style 0", "Style 1", "Style 2"]
    told: list[Member] = []
    with pytest.raises(KeyboardInterrupt):  # whoever started it is gone after two of four
        tune_fleet(recipe, planned, Here(2), tmp_path / "fleet", told.append)
    assert [member.status for member in told] == ["tuned", "tuned"]
    done = tune_fleet(recipe, planned, Measuring({}), tmp_path / "fleet", told.append)
    assert [member.status for member in done] == ["kept", "kept", "tuned", "tuned"]
    assert [member.adapter for member in done] == ["tiny@v1", "tiny-style-0@v1", "tiny-style-1@v1", "tiny-style-2@v1"]
    store = AdapterStore(recipe.store)
    assert len(store.list()) == 4
    assert store.open("tiny-style-1").manifest.recipe["data"]["category_filter"] == "Style 1"  # type: ignore[index]
    figures = done[2].figures
    assert figures is not None
    assert figures["gain"] == pytest.approx(figures["after"] - figures["before"], abs=1e-6)
    # Its own validation bundles, by its own adapter: what the manifest says.
    own = {**recipe.model_dump(mode="json"), "category": "tiny-style-1"}
    own["data"] = {**own["data"], "category_filter": "Style 1"}
    measured = measure_share({"recipe": own, "adapters": ["tiny-style-1@v1", "tiny@v1"]})
    assert measured["tiny-style-1@v1"] == pytest.approx(figures["after"], abs=1e-6)
    worse = Measuring({"tiny-style-0@v1": 0.1, "tiny-style-1@v1": "no memory left"})
    found = tune_fleet(recipe, planned, worse, tmp_path / "fleet", told.append)
    assert [(one.status, one.adapter) for one in found] == [
        ("kept", "tiny@v1"), ("falls back", "tiny@v1"), ("kept", "tiny-style-1@v1"), ("kept", "tiny-style-2@v1"),
    ]  # fmt: skip
    assert found[1].reason == "tiny-style-0@v1 is no better on its validation bundles, NDCG@10 0.100 against 0.200"
    assert found[2].reason == "not compared with its parent: no memory left"
    changed = tiny_recipe(**{"training.epochs": 1, "seed": 1})
    (again,) = tune_fleet(changed, planned[:1], Here(), tmp_path / "fleet", told.append)
    assert (again.status, again.adapter) == ("tuned", "tiny@v2")


def test_a_run_whose_worker_died_goes_on_from_its_checkpoint(
    tiny_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(**{"training.epochs": 2})
    share = {"recipe": recipe.model_dump(mode="json"), "folder": str(tmp_path / "fleet" / "tiny")}
    steps: list[int] = []

    class Count(StopAt):
        def on_step_end(self, step: int, loss: float) -> None:
            steps.append(step)
            super().on_step_end(step, loss)

    tune = fleet.tune
    monkeypatch.setattr(fleet, "tune", lambda *args, **more: tune(*args, **more, callback=Count(4)))
    with pytest.raises(SystemExit):
        tune_share(share)
    monkeypatch.setattr(fleet, "tune", lambda *args, **more: tune(*args, **more, callback=Count(0)))
    assert tune_share(share)["adapter"] == "tiny@v1"
    assert steps[:5] == [1, 2, 3, 4, 4]  # a checkpoint every three steps


def test_one_that_fails_leaves_the_others_and_its_parent_serves_it(tiny_recipe: Any, tmp_path: Path) -> None:
    recipe = tiny_recipe(**{"training.epochs": 1})
    planned = plan_fleet(recipe, least=20)[:3]

    class Losing(Here):
        def map_shares(self, function: Any, shares: Any) -> Any:
            for number, share in enumerate(shares):
                lost = {1: {"failed": "The loss is not a number."}, 2: LostShare("3 workers ended over it")}
                yield number, lost.get(number) or function(share)

    told: list[Member] = []
    done = tune_fleet(recipe, planned, Losing(), tmp_path / "fleet", told.append)
    assert [(m.status, m.adapter) for m in done] == [("tuned", "tiny@v1"), ("failed", "tiny@v1"), ("failed", "tiny@v1")]
    assert [m.reason for m in done[1:]] == ["The loss is not a number.", "3 workers ended over it"]
    assert len(told) == 3


def test_the_command_prints_a_line_for_each_and_a_table_of_all(
    shell: Run, tiny_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_combo.cli import workers

    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(**{"training.epochs": 1})
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    monkeypatch.setattr(workers, "open_executor", lambda *_, **__: nullcontext(Here()))
    command = ("tune", "-r", "./tiny.yaml", "--each-category", "--min-bundles", 30)
    code, out, err = shell(*command)
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 1 + 4 + 2
    assert "falls back: " in out
    assert any("falls back to tiny@v1 (" in line for line in err.splitlines())
    assert "peft-combo recommend --recipe tiny-lora --adapter tiny" in lines[-1]
    rows = json.loads(shell(*command, "--json")[1])
    assert {row["status"] for row in rows} == {"kept", "falls back"}
    for options, told in (
        (("--depth", 1), "--depth means nothing without --each-category"),
        (("--each-category", "--dry-run"), "--dry-run is for one adapter"),
        (("--each-category", "--resume"), "goes on by itself"),
        (("--each-category", "--slurm", "a=1"), "--slurm means nothing without --on slurm"),
        (("--each-category", "--on", "slurm", "--slurm", "a"), "--slurm a: expected KEY=VALUE"),
    ):
        code, out, err = shell("tune", "-r", "./tiny.yaml", *options)
        assert (code, out) == (1, "")
        assert told in err


@pytest.mark.slow
def test_a_fleet_runs_as_jobs(tiny_recipe: Any, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    recipe = tiny_recipe(**{"training.epochs": 1})
    with SlurmExecutor(tmp_path / "slurm", cluster="local", poll_seconds=0.2) as executor:
        done = tune_fleet(recipe, plan_fleet(recipe, least=20)[:2], executor, tmp_path / "fleet", lambda member: None)
    assert [member.status for member in done] == ["tuned", "tuned"]
