"""The fusion on scores whose worth is known: it finds it, it does no harm, and it can be taken apart again."""

from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from peft_combo import metrics
from peft_combo.machine import LIMITS
from peft_combo.recommender.evidence import Evidence
from peft_combo.recommender.fusion import BEST_SINGLE, Form, Fusion, make_comparable

QUESTIONS, ITEMS = 300, 120
FORMS = get_args(Form)


class World:
    """Questions with known answers, and scorers that see them through so much noise."""

    def __init__(self, seed: int, questions: int = QUESTIONS, items: int = ITEMS) -> None:
        self.rng = np.random.default_rng(seed)
        self.contexts = np.array([self.rng.choice(items, 3, replace=False) for _ in range(questions)])
        self.contexts[: questions // 3, 2] = -1
        self.targets = np.array(
            [self.rng.choice(np.setdiff1d(np.arange(items), context)) for context in self.contexts], np.int64
        )
        self.clusters = np.arange(questions) // 3
        self.support = self.rng.integers(0, 6, items)
        self.leaves = self.rng.integers(-1, 7, items)

    @property
    def evidence(self) -> Evidence:
        return Evidence(self.contexts, self.support, self.leaves)

    def scorer(self, signal: float | NDArray[np.float64]) -> NDArray[np.float32]:
        """Noise, with the answer raised by `signal`."""
        scores = self.rng.normal(size=(len(self.targets), len(self.support))).astype(np.float32)
        scores[np.arange(len(self.targets)), self.targets] += signal
        return scores

    def ndcg(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        excluded = [row[row >= 0] for row in self.contexts]
        return metrics.per_query(metrics.midranks(scores, self.targets, excluded), "ndcg@10")

    def fit(self, scores: dict[str, NDArray[np.float32]]) -> Fusion[str]:
        return Fusion.fit(scores, self.targets, self.evidence, self.clusters)


def some_fusion(form: Form) -> Fusion[str]:
    return Fusion(
        form,
        {"a": {"always": 0.5, "warm item": 0.3, "same leaf": 0.4}, "b": {"warm context": 0.7, "margin": 0.2}},
        {"b": -0.25},
        "by hand",
    )


def some_scores(world: World) -> dict[str, NDArray[np.float32]]:
    scores = {"a": world.scorer(1.0), "b": world.scorer(2.0)}
    scores["b"][:, ::4] = np.nan
    scores["b"][5] = np.nan
    return scores


def test_two_witnesses_know_more_than_either() -> None:
    train, fresh = World(0), World(1)
    fusion = train.fit({"left": train.scorer(2.0), "right": train.scorer(2.0)})
    scores = {"left": fresh.scorer(2.0), "right": fresh.scorer(2.0)}
    fused = fresh.ndcg(fusion.combine(scores, fresh.evidence)).mean()
    assert fused > 1.2 * max(fresh.ndcg(values).mean() for values in scores.values())


@pytest.mark.parametrize("seed", range(3))
def test_equal_witnesses_have_equal_weight_however_few_the_queries(seed: int) -> None:
    """Around one scorer alone the other would have next to no weight: few queries cannot tell which is better."""
    few = World(seed, questions=60)
    fusion = few.fit({"left": few.scorer(2.5), "right": few.scorer(2.5), "poor": few.scorer(0.3)})
    weights = {name: sum(gates.values()) for name, gates in fusion.weights.items()}
    assert 0.5 < weights["left"] / weights["right"] < 2.0
    assert weights.get("poor", 0.0) < 0.3 * weights["left"]


def test_a_scorer_that_knows_nothing_gets_hardly_a_say() -> None:
    train, fresh = World(0), World(1)
    fusion = train.fit({"good": train.scorer(2.5), **{f"noise {n}": train.scorer(0.0) for n in range(4)}})
    scores = {"good": fresh.scorer(2.5), **{f"noise {n}": fresh.scorer(0.0) for n in range(4)}}
    fused, alone = fresh.ndcg(fusion.combine(scores, fresh.evidence)), fresh.ndcg(scores["good"])
    assert fused.mean() > alone.mean() - 0.02


@pytest.mark.parametrize("seed", range(4))
def test_it_is_never_below_the_best_single_scorer_by_more_than_noise(seed: int) -> None:
    world = World(seed)
    fusion = world.fit({f"{signal}": world.scorer(signal) for signal in (0.0, 0.5, 1.5, 3.0)})
    (line,) = (line for line in fusion.table if line.name == fusion.chosen)
    assert line.gain >= -line.error


def test_a_scorer_that_knows_few_answers_and_those_well_is_heard() -> None:
    """Among the first items of all scorers most answers are below the others; among the whole catalogue not."""
    world = World(0, questions=400, items=3000)
    signal = np.where(world.rng.random(400) < 0.06, 9.0, 0.3)
    scores = {"knows few": world.scorer(signal), "knows little": world.scorer(0.5)}
    best = {name: world.ndcg(own).mean() for name, own in scores.items()}
    assert best["knows few"] > 4 * best["knows little"]
    fusion = world.fit(scores)
    assert world.ndcg(fusion.combine(scores, world.evidence)).mean() > 0.9 * best["knows few"]
    assert fusion.chosen.endswith("scores")
    assert fusion.weights["knows few"]["always"] > 1


def test_scorers_that_know_nothing_still_leave_one_to_answer() -> None:
    """A scorer that puts every answer last has no weight above 0, alone or in a sum."""
    world = World(0)
    wrong = {f"wrong {n}": -world.scorer(9.0) for n in range(2)}
    fusion = world.fit(wrong)
    assert fusion.chosen in wrong
    assert np.isfinite(fusion.combine(wrong, world.evidence)).any()


def test_a_long_tailed_scorer_does_not_outvote_the_others() -> None:
    train, fresh = World(0), World(1)

    def scores(world: World) -> dict[str, NDArray[np.float32]]:
        return {"wild": np.exp(4 * world.scorer(1.0)), "calm": world.scorer(2.0)}

    held = scores(fresh)
    fused = fresh.ndcg(train.fit(scores(train)).combine(held, fresh.evidence)).mean()
    assert fused > max(fresh.ndcg(values).mean() for values in held.values())


def test_counts_are_trusted_where_there_is_something_to_count() -> None:
    def scores(world: World) -> dict[str, NDArray[np.float32]]:
        world.support = np.where(np.arange(ITEMS) % 2, 50, 0)
        # The counting scorer is right about well known items and wild about the others; the text is fair everywhere.
        warm = world.support > 0
        counted = world.scorer(np.where(warm[world.targets], 4.0, 0.0))
        counted[:, ~warm] *= 3
        return {"counts": counted, "text": world.scorer(1.5)}

    train, fresh = World(0, 600), World(1, 600)
    fusion = train.fit(scores(train))
    assert fusion.chosen.startswith("gated")
    gates = fusion.weights["counts"]
    assert gates["warm item"] > 5 * max(gates.get(other, 0.0) for other in ("warm context", "same leaf", "margin"))
    held = scores(fresh)
    fused = fresh.ndcg(fusion.combine(held, fresh.evidence)).mean()
    assert fused > 1.1 * max(fresh.ndcg(values).mean() for values in held.values())


def test_being_unknown_is_no_merit() -> None:
    # Every answer is an item that no bundle holds, as where a catalogue was put together from its own bundles. A scorer
    # that is silent about just these would give them away, if silence or coldness could count in favour of an item.
    world = World(0)
    world.support = np.where(np.arange(ITEMS) < 60, 3, 0)
    world.contexts %= 60
    world.targets = world.rng.integers(60, ITEMS, QUESTIONS)
    counts = world.scorer(0.0)
    counts[:, 60:] = np.nan
    scores = {"counts": counts, "noise": world.scorer(0.0)}
    fusion = world.fit(scores)
    assert all(value <= 0 for value in fusion.silence.values())
    excluded = [row[row >= 0] for row in world.contexts]
    recall = np.mean(metrics.midranks(fusion.combine(scores, world.evidence), world.targets, excluded) <= 10)
    assert recall < 0.15  # 10 of 117 are 0.085 by chance


@pytest.mark.parametrize("form", FORMS)
def test_shares_add_up_to_the_fused_score(form: Form) -> None:
    world, fusion = World(0), some_fusion(form)
    scores = some_scores(world)
    fused = fusion.combine(scores, world.evidence)
    for query, item in [(0, 7), (5, 8), (17, 4), (200, 119)]:
        if not np.isnan(fused[query, item]):
            here = slice(query, query + 1)
            alone = {name: part[here] for name, part in scores.items()}
            _, own = fusion.explain(alone, world.evidence.take(here))
            shares = {name: float(part[0, item]) for name, part in own.items()}
            assert set(shares) == {"a", "b"}
            assert sum(shares.values()) == pytest.approx(fused[query, item], abs=1e-5)
            again, parts = fusion.explain(scores, world.evidence)
            np.testing.assert_array_equal(again, fused)
            assert {name: part[query, item] for name, part in parts.items()} == pytest.approx(shares, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_questions_do_not_see_each_other(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    world, fusion = World(0), some_fusion(form)
    scores = some_scores(world)
    whole = fusion.combine(scores, world.evidence)
    monkeypatch.setattr(LIMITS, "block_cells", 7 * ITEMS)
    np.testing.assert_allclose(fusion.combine(scores, world.evidence), whole, atol=1e-6)
    one = fusion.combine({name: part[9:10] for name, part in scores.items()}, world.evidence.take(slice(9, 10)))
    np.testing.assert_allclose(one[0], whole[9], atol=1e-6)


def test_what_nobody_can_say_is_nan_and_so_is_the_context() -> None:
    world = World(0)
    scores = some_scores(world)
    scores["a"][:, 8] = np.nan  # b is silent about it as well
    scores["a"][11] = scores["b"][11] = np.nan
    fused = some_fusion("damped").combine(scores, world.evidence)
    expected = np.zeros(fused.shape, bool)
    expected[:, 8] = expected[11] = True
    expected[world.evidence.find_context_cells()] = True
    np.testing.assert_array_equal(np.isnan(fused), expected)


@pytest.mark.parametrize("form", FORMS)
def test_forms_forget_where_a_scorer_has_its_zero_and_its_unit(form: Form) -> None:
    world = World(0)
    scores = world.scorer(1.0)
    scores[:, :9] = np.nan
    values, heard = make_comparable(scores, world.evidence, form)
    factor = world.rng.uniform(0.5, 20, (QUESTIONS, 1)).astype(np.float32)
    moved, _ = make_comparable(scores * factor + 3, world.evidence, form)
    np.testing.assert_allclose(moved, values, atol=2e-4)
    assert not values[~heard].any()
    # The middle is the middle of what was heard, and the order is kept.
    mine = np.where(heard[0])[0]
    np.testing.assert_array_equal(np.argsort(values[0, mine]), np.argsort(scores[0, mine]))
    if form != "damped":
        assert values[0, mine].mean() == pytest.approx(0, abs=1e-5)


def written_out(scores: NDArray[np.float32], context: NDArray[np.int64], form: Form) -> NDArray[np.float64]:
    """The forms as their definitions read, one question at a time and in float64."""
    values = scores.astype(np.float64)
    values[context[context >= 0]] = np.nan
    known = np.isfinite(values)
    own, found = values[known], np.zeros(len(values))
    if form == "normal":
        found[known] = special.ndtri((stats.rankdata(own) - 0.5) / len(own))
        return found
    z = (own - own.mean()) / own.std()
    found[known] = z if form == "z" else np.sign(z) * np.log1p(np.abs(z))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_what_their_definitions_say(form: Form) -> None:
    world = World(0, 40, 2_000)
    scores = world.scorer(1.0) * 3 + 20
    scores[::2] = np.round(scores[::2])  # many ties
    scores[:, ::3] = np.nan
    scores[:20, 1] = np.inf
    before = scores.copy()
    values, heard = make_comparable(scores, world.evidence, form)
    np.testing.assert_array_equal(scores, before)
    for row, context in enumerate(world.contexts):
        # float32 keeps 7 digits of scores around 20, whose deviation is 3.
        np.testing.assert_allclose(values[row], written_out(scores[row], context, form), atol=5e-6)
    expected = np.isfinite(scores)
    expected[world.evidence.find_context_cells()] = False
    np.testing.assert_array_equal(heard, expected)


@pytest.mark.parametrize("form", FORMS)
def test_one_known_score_and_none_at_all_say_nothing(form: Form) -> None:
    scores = np.full((2, 5), np.nan, np.float32)
    scores[0, 2] = 7
    values, heard = make_comparable(scores, Evidence(np.full((2, 1), -1), np.ones(5, np.int64)), form)
    assert not values.any()
    assert np.argwhere(heard).tolist() == [[0, 2]]


def test_equal_scores_are_no_opinion() -> None:
    world = World(0)
    alike = np.full((QUESTIONS, ITEMS), np.float32(0.1))
    alike[:, ::2] = np.nextafter(np.float32(0.1), np.float32(1))  # equal but for rounding
    for form in ("z", "damped"):
        assert not make_comparable(alike, world.evidence, form)[0].any()
    constant = np.full((QUESTIONS, ITEMS), np.float32(7))
    values, heard = make_comparable(constant, world.evidence, "normal")
    assert np.abs(values[heard]).max() < 1e-6
    silent = np.full((QUESTIONS, ITEMS), np.nan, np.float32)
    for form in FORMS:
        assert not make_comparable(silent, world.evidence, form)[0].any()


def test_the_table_holds_what_was_tried_with_its_plain_figures() -> None:
    world = World(0)
    scores = {"left": world.scorer(1.0), "right": world.scorer(2.0)}
    fusion = world.fit(scores)
    lines = {line.name: line for line in fusion.table}
    assert {"left", "right", BEST_SINGLE, "weights on damped scores", "weights on z scores", fusion.chosen} <= set(
        lines
    )
    for name, values in scores.items():
        assert lines[name].ndcg == pytest.approx(world.ndcg(values).mean())
    assert [line.ndcg for line in fusion.table] == sorted((line.ndcg for line in fusion.table), reverse=True)
    assert lines["right"].gain == 0  # it is what the others are compared with
    assert lines["left"].gain == pytest.approx(lines["left"].ndcg - lines["right"].ndcg)


def test_a_fusion_comes_back_from_json_as_it_was() -> None:
    world = World(0)
    scores = some_scores(world)
    for fusion in (world.fit(scores), some_fusion("normal")):
        again = Fusion.from_state(json.loads(json.dumps(fusion.state())), str)
        assert again == fusion
        np.testing.assert_array_equal(again.combine(scores, world.evidence), fusion.combine(scores, world.evidence))


@pytest.mark.parametrize(
    "change",
    [
        {"form": "percentile"},
        {"weights": {"a": {"cold item": 1.0}}},
        {"weights": {"a": {"always": -1.0}}},
        {"weights": {"a": {"always": float("nan")}}},
        {"silence": {"a": float("inf")}},
    ],
)
def test_a_state_that_is_none_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="fusion"):
        Fusion.from_state({**some_fusion("z").state(), **change}, str)


def test_fitting_is_a_function_of_its_arguments() -> None:
    world = World(0)
    scores = some_scores(world)
    before = {name: part.copy() for name, part in scores.items()}
    assert world.fit(scores) == world.fit(scores)
    for name, part in before.items():
        np.testing.assert_array_equal(scores[name], part)


def test_too_few_clusters_leave_the_best_single_scorer() -> None:
    world = World(0, questions=12)
    scores = {"poor": world.scorer(0.0), "rich": world.scorer(6.0)}
    fusion = world.fit(scores)
    assert fusion.chosen == "rich"
    assert fusion.needs == ("rich",)


def test_many_questions_are_sampled_by_whole_clusters() -> None:
    world = World(0)
    scores = {"a": world.scorer(1.0), "b": world.scorer(1.0)}
    fusion = Fusion.fit(scores, world.targets, world.evidence, world.clusters, max_queries=100)
    for line in fusion.table:
        assert line.recall * 99 == pytest.approx(round(line.recall * 99))  # 33 clusters of three


def test_shapes_that_do_not_fit_are_named() -> None:
    world = World(0)
    with pytest.raises(ValueError, match="same questions"):
        Fusion.fit({"a": world.scorer(1.0)}, world.targets[:-1], world.evidence, world.clusters[:-1])
    with pytest.raises(ValueError, match="'a': \\(300, 119\\)"):
        world.fit({"a": world.scorer(1.0)[:, 1:]})
    with pytest.raises(ValueError, match="must hold b"):
        some_fusion("z").combine({"a": world.scorer(1.0)}, world.evidence)


def test_evidence_counts_what_it_says() -> None:
    evidence = Evidence(np.array([[0, 1], [2, -1], [-1, -1]]), np.array([5, 2, 0, 9]), np.array([0, 1, -1, 1]))
    np.testing.assert_array_equal(evidence.find_least_support(), [2, 0, 0])
    np.testing.assert_array_equal(evidence.find_same_leaf(), [[True, True, False, True], [False] * 4, [False] * 4])
    assert not Evidence(evidence.contexts, evidence.item_support).find_same_leaf().any()
