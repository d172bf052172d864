"""Retuning from use: what is learned from, what is taken back, and that a clock may call it twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import find_parts, split_as
from peft_combo.data.use import LoggedList, UseBundle, read_log, write_bundles, write_log
from peft_combo.errors import DataError, PeftComboError
from peft_combo.evaluation.drift import check_drift
from peft_combo.evaluation.off_policy import judge_candidate
from peft_combo.evaluation.retune import JOURNAL, RetuneBusy, RetuneRule, Use, read_journal, retune
from peft_combo.files import lock_file
from peft_combo.metrics.drift import kolmogorov_smirnov, population_stability
from peft_combo.recipe.model import Recipe
from peft_combo.store.adapter_store import AdapterStore
from peft_combo.tuning.continual import Gate
from peft_combo.tuning.loop import tune

MakeRecipe = Callable[..., Recipe]
OPEN = Gate(gain=-1.0, p=1.1, forgetting=1.0)  # whatever comes is promoted


def make_use(folder: Path, recipe: Recipe, count: int = 60, start: float = 1000.0) -> Use:
    """Bundles of two items of one style by people that nobody knew."""
    dataset, rng = open_dataset(recipe.data), np.random.default_rng(3)
    bundles = []
    for number in range(count):
        rows = 6 * rng.choice(10, 2 + number % 2, replace=False) + number % 6
        items = tuple(dataset.catalog.item_ids[row] for row in rows)
        bundles.append(UseBundle(f"use-{number}", f"key{number % 30}", items, start + number))
    kept, _ = write_bundles(folder, bundles, dataset.catalog, {}, {}, recipe.data)
    return Use(folder, kept)


@pytest.fixture
def recipe(tiny_recipe: MakeRecipe, tmp_path: Path) -> Recipe:
    """A recipe whose adapter is stored and in use."""
    made = tiny_recipe(**{"training.epochs": 1})
    tune(made, run_folder=tmp_path / "first")
    AdapterStore(made.store).alias("tiny@v1", "prod")
    return made


# --- the order of things ----------------------------------------------------------------------------------------------


def test_a_clock_may_call_it_again_and_again(recipe: Recipe, tmp_path: Path) -> None:
    store, folder = AdapterStore(recipe.store), tmp_path / "retune"
    use, rule = make_use(tmp_path / "use", recipe), RetuneRule(fewest=20, gate=OPEN)
    first = retune(recipe, "prod", use, folder, rule=rule)
    assert (first.outcome, first.new) == ("promoted", 60)
    assert [one.of for one in first.drift] == ["category mix", "basket vectors"]
    assert store.alias_at("tiny@prod").version == 2
    assert store.open("tiny@v2").manifest.data.model_extra["continued"]["from"] == "tiny@v1"  # type: ignore[index]

    again = retune(recipe, "prod", use, folder, rule=rule)
    assert (again.outcome, again.new) == ("waiting", 0)
    assert "0 new bundles since the last tuning, and 20 are asked for" in again.told

    # Stopped after the alias had moved and before the journal knew: nothing is tuned a second time.
    journal = folder / JOURNAL
    lines = journal.read_text().splitlines()
    journal.write_text(lines[0] + "\n" + lines[1][:20])
    assert retune(recipe, "prod", use, folder, rule=rule).outcome == "promoted"
    assert [one["step"] for one in (json.loads(line) for line in journal.read_text().splitlines()[::2])] == [
        "begun", "done",
    ]  # fmt: skip
    assert store.versions("tiny") == (1, 2)


def test_what_is_not_better_is_stored_and_not_promoted_nor_tried_again(recipe: Recipe, tmp_path: Path) -> None:
    use, rule = make_use(tmp_path / "use", recipe), RetuneRule(fewest=20, gate=Gate(gain=0.9))
    done = retune(recipe, "prod", use, tmp_path / "retune", rule=rule)
    assert done.outcome == "not promoted"
    assert "still points to v1" in done.told
    assert AdapterStore(recipe.store).versions("tiny") == (1, 2)
    assert done.to_json()["continued"]["promoted"] is False
    assert retune(recipe, "prod", use, tmp_path / "retune", rule=rule).outcome == "waiting"


def test_a_regression_seen_in_feedback_is_taken_back(recipe: Recipe, tmp_path: Path) -> None:
    store, rng = AdapterStore(recipe.store), np.random.default_rng(0)
    with store.writing("tiny") as draft:  # a second version, the first one's twin
        for name in ("adapter_config.json", "adapter_model.safetensors", "head.safetensors"):
            (draft.path / name).write_bytes(store.open("tiny@v1").read(name))
        fields = store.open("tiny@v1").manifest.model_dump(mode="json")
        kept = ("method", "stored_as", "task", "backbone", "data", "metrics", "recipe", "versions")
        draft.commit({key: fields[key] for key in kept})
    store.alias("tiny@v2", "prod")

    def lists(rates: dict[str, float], count: int) -> list[LoggedList]:
        return [
            LoggedList(f"{version}{n}", f"{version}{n % 90}", version, "prod", ("i0",), ("i6",), (1.0,), (0.5,),
                       (float(rng.random() < rate),), 5.0)
            for version, rate in rates.items() for n in range(count)
        ]  # fmt: skip

    use = Use(tmp_path / "nothing", [])
    few = Use(use.new_data, [], lists({"tiny@v1": 0.9, "tiny@v2": 0.0}, 50))
    assert retune(recipe, "prod", few, tmp_path / "r").regression is None
    even = Use(use.new_data, [], lists({"tiny@v1": 0.3, "tiny@v2": 0.3}, 400))
    assert retune(recipe, "prod", even, tmp_path / "r").outcome == "waiting"
    worse = Use(use.new_data, [], lists({"tiny@v1": 0.3, "tiny@v2": 0.1}, 400))
    done = retune(recipe, "prod", worse, tmp_path / "r")
    assert done.outcome == "rolled back"
    assert "points to v1 again. Of 400 lists" in done.told
    assert store.alias_at("tiny@prod").version == 1
    assert retune(recipe, "prod", worse, tmp_path / "r").outcome == "waiting"  # v1 has nothing before it
    assert [one["step"] for one in read_journal(tmp_path / "r")] == ["rolled back"]


def test_two_at_once_do_not_meet_and_no_drift_may_be_reason_enough_to_wait(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "retune"
    folder.mkdir()
    use = make_use(tmp_path / "use", recipe)
    with lock_file(folder / ".lock"), pytest.raises(RetuneBusy, match="Another retuning works in"):
        retune(recipe, "prod", use, folder)
    calm = retune(recipe, "prod", use, folder, rule=RetuneRule(fewest=20, only_on_drift=True))
    assert calm.outcome == "no drift"
    assert not any(one.drifted for one in calm.drift)


# --- drift ------------------------------------------------------------------------------------------------------------


def test_drift_statistics_by_hand() -> None:
    value, chance = population_stability([99, 299], [299, 99])  # with half a count: .249 and .751 against each other
    assert value == pytest.approx(2 * 0.5012531 * np.log(299.5 / 99.5), rel=1e-5)
    assert chance == pytest.approx(2 / 398)
    assert kolmogorov_smirnov([1, 2, 3, 4], [3, 4, 5, 6])[0] == 0.5
    assert kolmogorov_smirnov([1.0] * 9, [1.0] * 4)[0] == 0
    rng = np.random.default_rng(0)
    over = [np.greater(*kolmogorov_smirnov(rng.normal(size=80), rng.normal(size=50))) for _ in range(300)]
    assert np.mean(over) < 0.03
    with pytest.raises(ValueError, match="counts"):
        population_stability([0, 0], [1, 2])
    with pytest.raises(ValueError, match="finite"):
        kolmogorov_smirnov([], [1.0])


def test_other_things_bought_and_other_scores_are_drift(tiny_recipe: MakeRecipe) -> None:
    config = tiny_recipe().data
    dataset = open_dataset(config)
    train, rng = split_as(dataset, config).train, np.random.default_rng(1)
    vectors = rng.normal(size=(60, 8)).astype(np.float32)
    vectors[::3] += 2  # style 0 lies elsewhere
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def bought(style: int | None) -> list[UseBundle]:
        rows = [3 * rng.choice(20, 2, replace=False) + (n % 3 if style is None else style) for n in range(80)]
        ids = dataset.catalog.item_ids
        return [UseBundle(f"b{n}", None, tuple(ids[row] for row in own), 5.0) for n, own in enumerate(rows)]

    def shown(shift: float) -> list[LoggedList]:
        scores = rng.normal(size=200) + np.repeat([0, shift], 100)
        return [LoggedList(f"r{n}", None, "v", "prod", (), ("i0",), None, (float(score),), (0.0,), float(n))
                for n, score in enumerate(scores)]  # fmt: skip

    calm = check_drift(dataset, train, bought(None), vectors, shown(0.0), since=99.5)
    assert [(one.of, one.drifted) for one in calm] == [
        ("category mix", False), ("basket vectors", False), ("scores of what is shown first", False),
    ]  # fmt: skip
    moved = check_drift(dataset, train, bought(0), vectors, shown(1.0), since=99.5)
    assert all(one.drifted for one in moved)
    assert "category mix: drift, " in str(moved[0])
    assert check_drift(dataset, train, bought(0)[:29], vectors) == ()


# --- what is learned from ---------------------------------------------------------------------------------------------


def test_people_who_would_be_on_both_sides_are_left_out(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    config = tiny_recipe(**{"data.split": "user"}).data
    dataset = open_dataset(config)
    known = {f"key-{owner}": owner for owner in set(dataset.bundles.owners) if owner}
    bundles = [UseBundle(f"n{n}", key, ("i1", "i7"), 1.0) for n, key in enumerate([*known, None, "somebody new"])]
    gone = UseBundle("gone", None, ("i1", "no longer there"), 1.0)
    late = UseBundle("late", None, ("i1", "n1"), 2.0)
    added = {"n1": {"title": "w9 w8", "category": "Style 1", "unknown column": 3}}
    kept, told = write_bundles(tmp_path / "use", [*bundles, gone, late], dataset.catalog, added, known, config)
    for one in kept:
        if one.user in known:
            first, second = find_parts([one.user or "", known[one.user or ""]], config)
            assert first == second
    assert len(kept) + 1 < len(bundles) + 2
    assert "hold items that are no longer there" in told[0]
    assert "people known before were left out" in told[1]
    again = open_dataset(config.model_copy(update={"path": str(tmp_path / "use")}))
    assert set(again.bundles.bundle_ids) == {one.bundle_id for one in kept}
    row = again.catalog.index["n1"]
    assert (again.catalog.titles[row], again.catalog.categories[row]) == ("w9 w8", ("Style 1",))
    assert again.catalog.titles[again.catalog.index["i7"]] == dataset.catalog.titles[dataset.catalog.index["i7"]]


def test_the_state_of_a_service_is_read_as_bundles_and_lists(tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy", reason="sqlalchemy is not installed; pip install 'peft-combo[serve]'")
    from peft_combo.serving.learning import GAP, gather_bundles, gather_items, gather_lists
    from peft_combo.serving.state import EventRow, ExposureRow, FeedbackRow, ItemRow, ShownItem, State

    state = State.open(tmp_path / "state")
    ann, bob = state.identify("ann"), state.identify("bob")
    moments = [
        (ann, "i1", 100.0),
        (bob, "i9", 101.0),
        (ann, "i7", 200.0),
        (ann, "i3", 300.0 + GAP),
        (ann, "i4", 310.0 + GAP),
    ]
    state.add_events([EventRow(user, item, "purchase", time=at) for user, item, at in moments])
    state.add_events([EventRow(bob, "i5", "view", time=102.0)])
    shown = [ShownItem("i2", 0.9, 0.5), ShownItem("i8", 0.4, 0.25)]
    common: dict[str, Any] = {"route": "complete", "alias": "tiny@prod", "version": "tiny@v1", "digest": "d"}
    state.add_exposures(
        [
            ExposureRow("r1", bob, arm="prod", context=["i1"], shown=shown, time=400.0, **common),
            ExposureRow("r1", bob, arm="shadow", context=["i1"], shown=shown, time=400.0, **common),
            ExposureRow("r2", None, arm="next", context=["i1"], shown=[ShownItem("i2")], time=500.0, **common),
        ]
    )
    state.add_feedback(
        [FeedbackRow("r1", "basket", "i8", time=401.0), FeedbackRow("r1", "rejected", "i2", time=402.0),
         FeedbackRow("r2", "click", None, time=501.0)]
    )  # fmt: skip
    state.put_items(
        [ItemRow("n1", {"title": "new"}), ItemRow("n2", {"title": "gone"}), ItemRow("n2", {}, deleted=True)]
    )

    bundles = gather_bundles(state)
    assert [(one.user, one.items, one.time) for one in bundles] == [
        (ann, ("i1", "i7"), 200.0), (bob, ("i1", "i8"), 400.0), (ann, ("i3", "i4"), 310.0 + GAP),
    ]  # fmt: skip
    first, second = gather_lists(state, "tiny@prod")
    assert (first.arm, first.items, first.propensities, first.rewards) == (
        "prod",
        ("i2", "i8"),
        (0.5, 0.25),
        (0.0, 1.0),
    )
    assert (second.propensities, second.rewards, second.group) == (None, (1.0,), "request r2")
    assert gather_lists(state, "other@prod") == []
    assert dict(gather_items(state)) == {"n1": {"title": "new"}}
    state.close()


# --- judging a candidate ----------------------------------------------------------------------------------------------


def test_a_candidate_is_judged_by_what_was_shown(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lists = []
    for n in range(1500):  # two items, either first with probability one half; "a" is clicked more
        items = ("a", "b") if rng.random() < 0.5 else ("b", "a")
        rewards = tuple(
            float(place == 0 and rng.random() < (0.6 if item == "a" else 0.2)) for place, item in enumerate(items)
        )
        lists.append(LoggedList(f"r{n}", f"u{n % 300}", "t@v1", "prod", ("x",), items, (0.5, 1.0), (1.0, 0.5), rewards))
    lists += [LoggedList("q", None, "t@v1", "prod", (), ("a",), (1.0,), None, (0.0,)),
              LoggedList("p", None, "t@v1", "prod", ("x",), ("a",), None, None, (0.0,))]  # fmt: skip
    write_log(tmp_path / "log.jsonl", lists)
    assert read_log(tmp_path / "log.jsonl") == lists

    def always(scores: Any, order: Any) -> Any:  # shows the better one first
        return np.array([float(scores[order[0]] == np.nanmax(scores)), 1.0][: len(order)])

    report = judge_candidate("good", lists, lambda context: {"a": 2.0, "b": 1.0}, always)
    best = report.estimates["SNIPS, cascade"]
    assert best.value == pytest.approx(0.6, abs=0.05)
    assert best.gain_interval[0] > 0.1
    assert (report.judged, dict(report.left_out)) == (1500, {"no propensities": 1, "no items given": 1})
    with pytest.raises(DataError, match="shows nothing of what was shown"):
        judge_candidate("other", lists, lambda context: {"c": 1.0}, lambda scores, order: np.zeros(len(order)))
    with pytest.raises(DataError, match="found none among 1"):
        judge_candidate("good", lists[-1:], lambda context: {}, always)
    (tmp_path / "bad.jsonl").write_text((tmp_path / "log.jsonl").read_text().split("\n")[0] + '\n{"request_id": 1}\n')
    with pytest.raises(DataError, match="line 2: expected one shown list"):
        read_log(tmp_path / "bad.jsonl")


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_commands_say_what_they_need_and_what_they_did(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Callable[..., tuple[int, str, str]]
) -> None:
    pytest.importorskip("sqlalchemy", reason="sqlalchemy is not installed; pip install 'peft-combo[serve]'")
    from peft_combo.recipe.files import write_recipe
    from peft_combo.serving.state import EventRow, State

    monkeypatch.chdir(tmp_path)
    write_recipe(recipe, tmp_path / "own.yaml")
    code, _, err = shell("retune", "--recipe", "own.yaml")
    assert (code, "Expected --state of the service, or --new-data" in err) == (1, True)
    code, _, err = shell("retune", "--recipe", "own.yaml", "--state", "nowhere")
    assert (code, "There is no state of a service in nowhere" in err) == (1, True)
    code, _, err = shell("retune", "--recipe", "own.yaml", "--state", "nowhere", "--alias", "none")
    assert (code, "none" in err) == (1, True)

    state = State.open(tmp_path / "state")
    rng = np.random.default_rng(5)
    for n in range(90):
        user = state.identify(f"person {n % 40}")
        rows = 6 * rng.choice(10, 2, replace=False) + n % 6
        state.add_events([EventRow(user, f"i{row}", "purchase", time=1e6 + 9000 * n) for row in rows])
    words = ("retune", "--recipe", "own.yaml", "--state", "state", "--min-new", "20", "--gate-gain", "-1",
             "--gate-p", "1.1", "--gate-forgetting", "1")  # fmt: skip
    code, out, err = shell(*words)
    assert code == 0, err
    assert "Promoted: tiny@prod points to v2 now." in out
    assert "category mix: no drift" in out
    assert state.deployments()["tiny@prod"]["prod"].version == "tiny@v2"
    code, out, _ = shell(*words, "--json")
    assert (code, json.loads(out)["outcome"]) == (0, "waiting")
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file() and b"person 3" in path.read_bytes()]
    state.close()

    log = [LoggedList(f"r{n}", f"u{n % 20}", "tiny@v1", "prod", (f"i{n % 6}",), (f"i{6 + n % 6}", f"i{12 + n % 5}"),
                      (0.3, 0.2), (0.9, 0.4), (float(n % 3 == 0), 0.0)) for n in range(60)]  # fmt: skip
    write_log(tmp_path / "log.jsonl", log)
    code, out, err = shell("evaluate", "--recipe", "own.yaml", "--adapter", "tiny@v1", "--log", "log.jsonl",
                           "--explore", "plackett-luce:5")  # fmt: skip
    assert code == 0, err
    assert "SNIPS, cascade" in out
    assert "What tiny@v1 would have earned per list, by 60 of 60 logged lists" in out
    code, _, err = shell("evaluate", "--recipe", "own.yaml", "--log", "log.jsonl", "--queries")
    assert (code, "--log prints a table of its own" in err) == (1, True)


def test_a_journal_that_is_broken_in_its_middle_is_told(tmp_path: Path) -> None:
    assert read_journal(tmp_path) == []
    (tmp_path / JOURNAL).write_text('{"step": "done"\n{"step": "begun"}\n')
    with pytest.raises(PeftComboError, match=r"Line 1 of .* is no JSON"):
        read_journal(tmp_path)
