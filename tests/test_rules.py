"""Rules of bundles and relations between items: read, mined, kept wherever bundles are made, and told as reasons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize, sparse

from peft_combo.data.knowledge.clashes import find_clashes, find_minimal_conflict
from peft_combo.data.knowledge.mining import mine_rules
from peft_combo.data.knowledge.relations import Relations
from peft_combo.data.knowledge.rule_set import Knowledge, RuleSet
from peft_combo.data.knowledge.rules import format_rules, parse_rules
from peft_combo.data.model import Bundles, Catalog, Dataset
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import split
from peft_combo.encoder.backbone import Backbone
from peft_combo.encoder.bank import AdapterBank
from peft_combo.errors import DataError
from peft_combo.metrics.regression import fit_logistic
from peft_combo.recipe.model import DataConfig, Recipe
from peft_combo.recommender import fit_state
from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.composing.options import Options
from peft_combo.recommender.live_catalog import VectorBuffers, extend_recommender
from peft_combo.recommender.model_selection import list_scorers
from peft_combo.recommender.persistence import load_recommender, save_recommender
from peft_combo.recommender.recommender import BundleRecommender
from peft_combo.recommender.relation_paths import describe_path, lay_edges
from peft_combo.recommender.scorer_id import GRAPH
from peft_combo.scoring import paths
from peft_combo.scoring.paths import PathRanking
from peft_combo.store.adapter_store import AdapterStore

SLOTS = ("camera", "lens", "tripod", "bag")


def shop(n: int = 40, seed: int = 0) -> Catalog:
    """Items of four slots, a brand and a gender each; some of neither."""
    rng = np.random.default_rng(seed)
    slots = [SLOTS[row % 4] for row in range(n)]
    return Catalog.build(
        [f"i{row}" for row in range(n)],
        [f"{slot} number {row}" for row, slot in enumerate(slots)],
        [("Photo", slot.title(), f"Kind {row % 3}") for row, slot in enumerate(slots)],
        slots,
        rng.integers(5, 50, n).astype(float),
        attributes={
            "brand": [["acme", "apex", None][rng.integers(3)] for _ in range(n)],
            "gender": [["female", "male", None][rng.integers(3)] for _ in range(n)],
        },
    )


RULES = """
rules:
  - matches: gender
  - name: tripods need a camera
    when: {slot: tripod}
    requires: {category: Photo > Camera}
  - when: {attributes: {brand: acme}}
    excludes: {attributes: {brand: apex}}
"""
RELATIONS = Relations((("Tripod", "is accessory of", "Camera"), ("i1", "same line as", "i2"), ("i1", "fits", "i4")))


def rule_set(text: str, catalog: Catalog, relations: Relations | None = None) -> RuleSet:
    return RuleSet.of(Knowledge(parse_rules(text), relations), catalog)


def composer(catalog: Catalog, rules: RuleSet, seed: int = 0) -> Composer:
    """Learned from random bundles of three to four slots, which keep no rule."""
    rng = np.random.default_rng(seed)
    bundles = [np.sort(rng.choice(len(catalog), rng.integers(3, 5), replace=False)) for _ in range(60)]
    return Composer.learn(catalog, bundles, rules=rules)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rules:\n - matchs: gender", 'rules.0.matchs: unknown key. Did you mean "matches"?'),
        (
            "rules:\n - matches: gender\n   weight: no",
            'weight: expected a number above 0 and at most 1000, or null; found "no"',
        ),
        ("rules:\n - weight: 1", "expected one of requires, excludes, matches; found none"),
        ("rules:\n - requires: {slot: bag}", "expected when beside requires"),
        ("rules:\n - when: {}\n   excludes: {slot: bag}", "expected at least one of category, slot, item"),
        ("rules:\n - matches: gender\n - matches: gender", 'found "matches gender" twice'),
        ("rules:\n  - [", "rules.yaml:2: not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_place_and_nearest_name(text: str, told: str) -> None:
    with pytest.raises(DataError) as refused:
        parse_rules(text)
    assert told in str(refused.value)


def test_written_rules_read_back_as_the_same() -> None:
    rules = parse_rules(RULES)
    assert parse_rules(format_rules(rules, ["one", "two", "three"])) == rules


def test_names_that_are_not_there_are_faults_of_the_data(tiny_shop: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    for file in tiny_shop.glob("*.csv"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "rules.yaml").write_text("rules:\n - matches: gendr\n - when: {item: i00}\n   excludes: {related: near}")
    (folder / "relations.csv").write_text("head,relation,tail\ni0,goes with,i1\ni0,goes with,nothing\n")
    with pytest.raises(DataError, match=r"relations.csv:3: 'nothing' is neither an item's id nor a category"):
        open_dataset(DataConfig(source="folder", path=str(folder)))
    (folder / "relations.csv").write_text("head,relation,tail\ni0,goes with,i1\n")
    with pytest.raises(DataError) as refused:
        open_dataset(DataConfig(source="folder", path=str(folder)))
    for told in ("no attribute 'gendr'. Did you mean \"gender\"?", "there is no item 'i00'", "no relation 'near'"):
        assert told in str(refused.value)


def test_what_bundles_break_by_hand() -> None:
    catalog = Catalog.build(
        ["c", "t", "b", "x"], ["Camera", "Tripod for men", "Bag for women", "Strap"],
        slots=["camera", "tripod", "bag", None], attributes={"brand": ["Acme", "Apex", None, "apex"]},
    )  # fmt: skip
    text = RULES.replace("category: Photo > Camera", "slot: camera")
    rules = rule_set(text, catalog)

    def broken(*rows: int) -> list[str]:
        return [str(one.rule) for one in rules.list_broken(rows)]

    excludes = "excludes (brand apex) when (brand acme)"
    assert broken(0, 2) == []
    assert broken(0, 1) == [excludes]
    assert broken(1, 2) == ["matches gender", "tripods need a camera"]  # of what titles say
    assert broken(0, 1, 2) == ["matches gender", excludes]
    assert broken(1, 3) == ["tripods need a camera"]


RELATED = (
    RULES
    + """
  - when: {slot: lens}
    requires: {related: fits, slot: camera}
  - excludes: {related: same line as}
"""
)


@pytest.mark.parametrize("seed", range(4))
def test_the_masks_say_what_the_bundles_say(seed: int) -> None:
    catalog, rng = shop(seed=seed), np.random.default_rng(seed)
    rules = rule_set(RELATED, catalog, RELATIONS)
    for _ in range(40):
        rows = rng.choice(len(catalog), rng.integers(1, 4), replace=False).tolist()
        allowed = np.logical_and.reduce([np.ones(len(catalog), bool), *rules.check_last(rows).values()])
        pairs = [one for one in rules.hard if one.rule.kind != "requires"]
        if any(one.is_broken(rows) for one in pairs):
            continue
        for row in set(range(len(catalog))) - {*rows}:
            assert allowed[row] == (not rules.list_broken([*rows, row])), (rows, row)
            own = [one for one in pairs if one.is_broken([*rows, row])]
            assert bool(own) == any(rules.find_conflicts(other)[row] for other in rows)


@pytest.mark.parametrize("options", [Options(k=4), Options(k=4, exact_limit=0), Options(k=3, mode="substitute")])
def test_no_composed_bundle_breaks_a_hard_rule(options: Options) -> None:
    made = without = 0
    refused: list[str] = []
    for seed in range(8):
        catalog, rng = shop(seed=seed), np.random.default_rng(seed)
        rules = rule_set(RELATED, catalog, RELATIONS)
        free, bound = composer(catalog, RuleSet((), len(catalog)), seed), composer(catalog, rules, seed)
        relevance = rng.normal(size=len(catalog))
        for given in ([int(rng.integers(40))], []) if options.mode == "complement" else ([int(rng.integers(40))],):
            size = Constraints(size=(3, 3))
            loose = free.compose(given, relevance=relevance, constraints=size, options=options)
            without += sum(bool(rules.list_broken(one.items)) for one in loose)
            try:
                found = bound.compose(given, relevance=relevance, constraints=size, options=options)
            except DataError as error:
                refused.append(str(error))
                continue
            made += len(found)
            for one in found:
                assert not rules.list_broken(one.items)
                assert set(given) <= set(one.items)
    assert all("clash" in told or "cannot be kept" in told for told in refused)
    assert made >= 7
    assert without >= 7  # without rules they would be broken


def test_a_requirement_of_what_was_given_is_met_first_and_told() -> None:
    catalog = shop()
    rules = rule_set(RULES, catalog, RELATIONS)
    relevance = np.where(np.array(catalog.slots) == "camera", -5.0, 1.0)  # nobody would take a camera
    tripod = 2
    for one in composer(catalog, rules).compose([tripod], relevance=relevance, options=Options(exact_limit=0)):
        cameras = [item for item in one.evidence if item.slot == "Camera" or catalog.slots[item.row] == "camera"]
        assert cameras[0].required == (("tripods need a camera", tripod),)
        assert [(told.relation, told.other, told.head) for told in cameras[0].related] == [
            ("is accessory of", tripod, False)
        ]


def test_a_soft_rule_costs_its_weight_and_may_be_outweighed() -> None:
    catalog = Catalog.build(
        ["a", "b", "c"], ["A", "B", "C"], slots=["top", "shoes", "shoes"],
        attributes={"gender": ["female", "male", "female"]},
    )  # fmt: skip
    relevance = np.array([0.0, 1.0, 0.5])
    for weight, best in ((0.01, 1), (100.0, 2)):
        rules = rule_set(f"rules:\n - {{matches: gender, weight: {weight}}}", catalog)
        bundles = [np.array([0, 1]), np.array([0, 2])] * 5
        found = Composer.learn(catalog, bundles, rules=rules).compose(
            [0], relevance=relevance, options=Options(k=2, diversity=0)
        )
        assert found[0].added == (best,)
        assert {one.added[0]: one.parts["rules"] for one in found} == {1: -weight, 2: 0}
        assert found[0].score == pytest.approx(sum(found[0].parts.values()))


def test_rules_that_clash_are_named_and_no_other() -> None:
    assert find_minimal_conflict("abcd", lambda kept: not {"b", "d"} <= set(kept)) == ["b", "d"]
    assert find_minimal_conflict("ab", lambda kept: True) == []
    text = RULES + "  - {name: no glass, when: {slot: camera}, excludes: {slot: lens}}\n"
    text += "  - {name: tripods need a lens, when: {slot: tripod}, requires: {slot: lens}}\n"
    assert find_clashes(rule_set(text, shop())) == {
        ("tripods need a camera", "no glass", "tripods need a lens"): 10
    }  # fmt: skip
    assert find_clashes(rule_set(RULES, shop())) == {}


def test_an_answer_that_rules_forbid_names_them() -> None:
    catalog = shop()
    own = composer(catalog, rule_set(RULES + "  - {name: plain, excludes: {slot: camera}}\n", catalog))
    with pytest.raises(DataError, match='These rules clash: "plain" and "tripods need a camera"') as refused:
        own.find_allowed(Constraints(), beside=np.array([2]))
    assert "matches" not in str(refused.value)
    with pytest.raises(DataError, match='"tripods need a camera" and "plain"'):
        own.compose([2], options=Options(exact_limit=0))
    female, male = (next(r for r in range(40) if catalog.attributes["gender"][r] == one) for one in ("female", "male"))
    with pytest.raises(DataError, match='break the hard rule "matches gender"'):
        own.compose([female, male])


def plant(n: int = 300, seed: int = 0, *, rule: bool) -> Dataset:
    """Bundles of two to four random slots; with `rule` every tripod stands beside a camera, none beside a bag."""
    catalog, rng = shop(80, seed), np.random.default_rng(seed)
    rows_of = {slot: np.flatnonzero(np.array(catalog.slots) == slot) for slot in SLOTS}
    bundles = []
    for _ in range(n):
        slots = set(rng.choice(SLOTS, rng.integers(2, 4), replace=False).tolist())
        if rule and "tripod" in slots:
            slots = (slots | {"camera"}) - {"bag"}
        bundles.append([rng.choice(rows_of[slot]) for slot in sorted(slots)])
    return Dataset.build("planted", catalog, None, Bundles.build([f"b{n}" for n in range(len(bundles))], bundles))


def test_mined_rules_are_those_that_were_planted_and_chance_makes_none() -> None:
    found = mine_rules(plant(rule=True), min_confidence=0.95)
    told = {str(one.rule): one for one in found}
    assert "requires (slot camera) when (slot tripod)" in told
    assert any(one.rule.kind == "excludes" and "bag" in str(one.rule).lower() for one in found)
    one = told["requires (slot camera) when (slot tripod)"]
    assert (one.kept, one.confidence, one.rule.hard) == (one.bundles, 1.0, True)
    assert one.low < 1 == one.high or one.low < one.confidence
    assert parse_rules(format_rules([own.rule for own in found])) == tuple(own.rule for own in found)
    chance = [mine_rules(plant(seed=seed, rule=False), min_confidence=0.01) for seed in range(2)]
    slots = [one for own in chance for one in own if one.rule.kind == "matches"]
    assert len(slots) == 0


def test_paths_rank_what_relations_lead_to() -> None:
    catalog = shop(120)
    relations = Relations((("Tripod", "is accessory of", "Camera"), ("Bag", "is sold near", "Lens")))
    names, edges = lay_edges(relations, catalog)
    rng = np.random.default_rng(0)
    cameras, tripods = (np.flatnonzero(np.array(catalog.slots) == slot) for slot in ("camera", "tripod"))
    pairs = [[rng.choice(cameras), rng.choice(tripods)] for _ in range(200)]
    history = sparse.csr_array(
        (np.ones(400, np.float32), (np.repeat(np.arange(200), 2), np.ravel(pairs))), shape=(200, 120)
    )
    scorer = PathRanking(names).fit(history, items=edges)
    one = sparse.csr_array(([1.0], ([0], [cameras[0]])), shape=(1, 120))
    scores = scorer.score_baskets(one)[0]
    others = [row for row in range(120) if catalog.slots[row] in ("bag", "lens")]
    assert np.nanmax(scores[others]) < np.nanmin(scores[tripods])
    reasons = {describe_path(path, "Camera X"): share for (_, path), share in scorer.explain(cameras[:1], 2).items()}
    assert reasons["is accessory of Camera X"] > 0


def test_paths_are_weighed_by_a_balanced_logistic_regression_of_columns_of_one_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights minimise the loss as the field writes it, here by another optimiser: to a thousandth."""
    rng = np.random.default_rng(0)
    edges = sparse.csr_array((rng.uniform(size=(50, 12)) < 0.2).astype(np.float32))
    history = sparse.csr_array((rng.uniform(size=(80, 50)) < 0.06).astype(np.float32))
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(paths, "fit_logistic", lambda *given: (asked.append(given), fit_logistic(*given))[1])
    PathRanking(["goes with"] * 4 + ["part of"] * 2).fit(history, items=edges)
    ((table, labels, penalty, counts),) = asked
    assert counts[labels].sum() == pytest.approx(counts[~labels].sum())
    np.testing.assert_allclose(table.std(axis=0), 1, atol=1e-6)
    sign = np.where(labels, 1, -1)

    def loss(theta: Any) -> tuple[float, Any]:
        margin = sign * (table @ theta[1:] + theta[0])
        slope = -sign * counts / (1 + np.exp(margin))
        value = counts @ np.logaddexp(0, -margin) + theta[1:] @ theta[1:] / 2
        return float(value), np.append(slope.sum(), slope @ table + theta[1:])

    least = optimize.minimize(loss, np.zeros(table.shape[1] + 1), jac=True, method="L-BFGS-B", options={"ftol": 1e-12})
    np.testing.assert_allclose(fit_logistic(table, labels, penalty, counts), least.x, atol=1e-3)


@pytest.fixture
def ruled(tiny_recipe: Callable[..., Recipe], tiny_shop: Path, tmp_path: Path) -> tuple[Dataset, AdapterBank]:
    """The tiny shop in a folder with rules and relations, and the encoder without adapters."""
    folder = tmp_path / "ruled"
    folder.mkdir()
    for file in tiny_shop.glob("*.csv"):
        (folder / file.name).write_bytes(file.read_bytes())
    style = "\n".join(f"i{row},same line as,i{row + 6}" for row in range(12))
    (folder / "relations.csv").write_text(f"head,relation,tail\n{style}\n")
    (folder / "rules.yaml").write_text("rules:\n  - {name: apart, when: {item: i0}, excludes: {item: i6}}\n")
    recipe = tiny_recipe()
    dataset = open_dataset(recipe.data.model_copy(update={"path": str(folder)}))
    return dataset, AdapterBank(Backbone.load(recipe.backbone.model, max_length=16), AdapterStore(recipe.store))


def test_rules_act_in_every_answer_and_relations_are_weighed_and_kept(
    ruled: tuple[Dataset, AdapterBank], tmp_path: Path, shell: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    dataset, bank = ruled

    def offer_graph(*given: Any) -> Any:
        return {scorer: choices for scorer, choices in list_scorers(*given).items() if scorer == GRAPH}

    monkeypatch.setattr(fit_state, "list_scorers", offer_graph)
    made = BundleRecommender.fit(dataset, split(dataset), bank, None)
    assert made.state.fusion.needs == (GRAPH,)

    def broken(items: Sequence[str]) -> bool:
        return {"i0", "i6"} <= set(items)

    plain = BundleRecommender(replace(dataset, knowledge=None), bank, made.state)
    assert any(one.item_id == "i6" for one in plain.complete(["i0"], k=50))
    assert not any(one.item_id == "i6" for one in made.complete(["i0"], k=50))
    assert not any(broken(one.items) for one in made.compose(["i0"], options=Options(k=20)))
    assert not any(one.item_id == "i6" for one in made.replace(["i0", "i12"], "i12", k=50))
    with pytest.raises(DataError, match='break the hard rule "apart"'):
        made.complete(["i0", "i6"])
    told = {reason for one in made.complete(["i1"], k=50, explain=True) for reason in one.reasons}
    assert f"{dataset.catalog.titles[1]} same line as it" in told
    evidence = [entry for one in made.compose(["i1"], options=Options(k=20)) for entry in one.evidence]
    assert {"relation": "same line as", "with": "i1", "head": False} in [
        own for entry in evidence for own in entry.get("related", ())
    ]
    later = extend_recommender(made, [], ["i12"], VectorBuffers())  # as the service does when an item goes
    assert not {"i6", "i12"} & {one.item_id for one in later.complete(["i0"], k=50)}
    save_recommender(made, tmp_path / "fitted")
    back = load_recommender(tmp_path / "fitted", dataset, bank)
    assert back.complete(["i0"], k=5) == made.complete(["i0"], k=5)
    assert dataset.knowledge is not None
    # Rules are read with the data and hold as they are there; relations are what a scorer was fitted on.
    softer = replace(dataset, knowledge=replace(dataset.knowledge, rules=()))
    assert any(
        one.item_id == "i6" for one in load_recommender(tmp_path / "fitted", softer, bank).complete(["i0"], k=50)
    )
    with pytest.raises(DataError, match="fitted on relations"):
        load_recommender(tmp_path / "fitted", replace(dataset, knowledge=None), bank)
    folder = tmp_path / "ruled"
    code, out, _ = shell("data", "check", "--data", folder)
    assert code == 0
    bundles: Any = [rows for rows in dataset.bundles.items if broken([dataset.catalog.item_ids[r] for r in rows])]
    assert (f'hard rule "apart" is broken by {len(bundles)} of' in out) == bool(bundles)
    assert shell("data", "rules", "--data", folder, "--to", tmp_path / "mined.yaml", "--min-confidence", 0.5)[0] == 0
    parse_rules((tmp_path / "mined.yaml").read_text())
