"""The evaluation on a shop whose answers are known: nothing held out is learned, and shuffled titles tell nothing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from peft_combo import metrics
from peft_combo.data.model import Bundles, Catalog, Dataset, Interactions
from peft_combo.data.queries import Queries
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import Split, split
from peft_combo.encoder.heads.completion import BundleHead, project_targets, rank_targets
from peft_combo.encoder.heads.rating import RatingHead
from peft_combo.errors import PeftComboError
from peft_combo.evaluation.canary import run_canary
from peft_combo.evaluation.completion import evaluate
from peft_combo.evaluation.measures import UnseenFirst, find_unbundled, rank_among
from peft_combo.evaluation.report import Report, plot, write_verdict
from peft_combo.recipe.model import Recipe
from peft_combo.recipe.task import BundleTask, RatingTask
from peft_combo.recommender import model_selection
from peft_combo.recommender.fit_data import FitData
from peft_combo.recommender.fitted_scorers import FittedEnsemble, FittedHead
from peft_combo.recommender.model_selection import list_scorers
from peft_combo.recommender.rating import Rater
from peft_combo.recommender.scorer_id import ENSEMBLE, FUSION
from peft_combo.scoring.base import HistoryScorer
from peft_combo.scoring.popularity import Popularity


@pytest.fixture
def dataset(tiny_recipe: Callable[..., Recipe]) -> Dataset:
    return open_dataset(tiny_recipe().data)


@pytest.fixture
def parts(dataset: Dataset) -> Split:
    return split(dataset)


class Spy(Popularity):
    """Remembers what it was fitted on."""

    seen: list[Any] = []  # noqa: RUF012  (shared on purpose: the evaluation may copy the scorer)

    def fit(self, history: Any, **options: Any) -> Any:
        Spy.seen.append(history)
        return super().fit(history, **options)


def test_scorers_see_training_bundles_and_nothing_else(
    dataset: Dataset, parts: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    Spy.seen.clear()
    monkeypatch.setattr(model_selection, "Popularity", Spy)
    evaluate(dataset, parts)
    train = dataset.bundles.to_csr(len(dataset.catalog), parts.train).toarray()
    assert Spy.seen
    for history in Spy.seen:
        np.testing.assert_array_equal(history.toarray(), train)


def test_test_bundles_are_measured_and_choose_nothing(dataset: Dataset, parts: Split) -> None:
    report = evaluate(dataset, parts)
    items = list(dataset.bundles.items)
    for row in parts.test:
        items[row] = np.array([0, 1, 2], np.int32)
    changed = evaluate(replace(dataset, bundles=replace(dataset.bundles, items=tuple(items))), parts)
    assert changed.fusion.state() == report.fusion.state()
    assert [(row.name, row.setting, row.valid_ndcg) for row in changed.lines] == [
        (row.name, row.setting, row.valid_ndcg) for row in report.lines
    ]
    assert changed.row("item-kNN").values != report.row("item-kNN").values


def test_rows_slices_and_intervals_hang_together(dataset: Dataset, parts: Split) -> None:
    report = evaluate(dataset, parts)
    assert {"random", "popularity", "item-kNN", "EASE", "TF-IDF title", "CEASE-TFIDF", "fusion"} <= {
        row.name for row in report.lines
    }
    for row in report.lines:
        low, high = row.intervals["ndcg@10"]
        assert low <= row.values["ndcg@10"] <= high
        warm, cold = row.slices.get("warm target"), row.slices.get("cold target")
        if warm is not None and cold is not None and warm.questions + cold.questions == report.counts["test questions"]:
            whole = (warm.ndcg * warm.questions + cold.ndcg * cold.questions) / report.counts["test questions"]
            assert whole == pytest.approx(row.values["ndcg@10"], abs=1e-9)
        distractors = row.slices.get("among distractors")
        assert (distractors is None) == (find_unbundled(dataset).sum() < 10)
        assert distractors is None or distractors.questions == report.counts["test questions"]
    # Items of one style go together and a style shows in the titles: words must beat chance by far.
    assert report.row("TF-IDF title").values["ndcg@10"] > 3 * report.row("random").values["ndcg@10"]


def test_items_of_no_training_bundle_first_gain_what_the_catalogue_gives_away(dataset: Dataset, parts: Split) -> None:
    unseen = np.arange(len(dataset.catalog)) % 3 == 0
    scores = np.random.default_rng(0).normal(size=(4, len(unseen))).astype(np.float32)
    none = np.zeros(4, np.int64)
    queries = Queries(np.array([[1], [2], [4], [5]]), np.array([3, 6, 9, 12]), none.astype(np.str_), none)
    first = UnseenFirst(lambda part: scores, unseen)(queries)
    # Before all others, in the scorer's own order: the targets, all unseen, rise, and among unseen items nothing moves.
    assert first[:, unseen].min() > first[:, ~unseen].max()
    among = [rank_among(one, queries, unseen, unseen) for one in (first, scores)]
    np.testing.assert_array_equal(*among)
    before, after = (metrics.midranks(one, queries.targets, queries.excluded()) for one in (scores, first))
    assert (after <= before).all()
    assert after.sum() < before.sum()
    assert [row.name for row in evaluate(dataset, parts).lines][-2:] == ["TF-IDF, unseen first", "fusion"]


def test_the_same_seed_gives_the_same_report(dataset: Dataset, parts: Split) -> None:
    assert evaluate(dataset, parts, seed=3).to_json() == evaluate(dataset, parts, seed=3).to_json()


def test_shuffled_titles_tell_nothing(dataset: Dataset, parts: Split) -> None:
    found = run_canary(dataset, parts)
    assert found.alive
    assert found.right["TF-IDF title"] > 2 * found.chance


def with_marked_users(dataset: Dataset) -> Dataset:
    """Give every owner of a bundle an interaction with each of its items; the weight tells which owner it was."""
    owners = sorted({owner for owner in dataset.bundles.owners if owner is not None})
    rows = [
        (owners.index(owner), int(item))
        for owner, items in zip(dataset.bundles.owners, dataset.bundles.items, strict=True)
        if owner is not None
        for item in items
    ]
    users, items = zip(*sorted(set(rows)), strict=True)
    weights = [1.0 + user / 1000 for user in users]
    interactions = Interactions.build(owners, users, items, weights=weights)
    return Dataset.build(dataset.name, dataset.catalog, interactions, dataset.bundles)


def test_no_scorer_meets_anything_of_a_held_out_user(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = with_marked_users(dataset)
    parts = split(marked)
    fitted: list[Any] = []
    plain = HistoryScorer.fit

    def fit(self: Any, history: Any, **options: Any) -> Any:
        fitted.append(history)
        return plain(self, history, **options)

    monkeypatch.setattr(HistoryScorer, "fit", fit)
    evaluate(marked, parts)

    held_out = {marked.bundles.owners[row] for row in (*parts.valid, *parts.test, *parts.dropped)}
    assert marked.interactions is not None
    telling = {
        float(np.float32(1.0 + place / 1000))
        for place, user in enumerate(marked.interactions.user_ids)
        if user in held_out
    }
    training = {tuple(sorted(marked.bundles.items[row].tolist())) for row in parts.train}
    with_users = 0
    for history in fitted:
        whole = sparse.csr_array(history)
        with_users += whole.shape[0] > len(parts.train)
        assert not telling & {float(value) for value in whole.data} - {1.0}
        for row in range(len(parts.train)):
            assert tuple(sorted(whole.indices[whole.indptr[row] : whole.indptr[row + 1]].tolist())) in training
    assert len(fitted) > 20
    assert with_users >= 5  # training users do count, where it helps


def head_and_vectors(dataset: Dataset) -> tuple[np.ndarray[Any, Any], BundleHead]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(len(dataset.catalog), 16)).astype(np.float32), BundleHead(16, BundleTask()).eval()


def test_every_adapter_has_its_row_and_it_is_what_its_head_says(dataset: Dataset, parts: Split) -> None:
    vectors, head = head_and_vectors(dataset)
    report = evaluate(dataset, parts, frozen=vectors, tuned={"one": (vectors, head), "two": (vectors, head)})
    names = [row.name for row in report.lines]
    assert names[-7:-2] == ["frozen BERT", "tuned BERT one", "tuned BERT two", "ensemble", "CEASE-BERT"]
    questions = Queries.leave_one_out(
        [dataset.bundles.items[row] for row in parts.test], [dataset.bundles.groups[row] for row in parts.test]
    )
    expected = float((1 / rank_targets(head, vectors, questions)).mean())
    assert report.row("tuned BERT one").values["mrr"] == pytest.approx(expected, rel=1e-6)
    # An untrained head is the cosine to the mean, so it differs from the frozen row by the setting at most.
    assert report.row("tuned BERT one").values == report.row("tuned BERT two").values
    assert report.row("ensemble").values == report.row("tuned BERT one").values
    assert any("ensemble: encodes the catalogue 2 times" in note for note in report.notes)
    assert run_canary(dataset, parts, frozen=vectors, tuned={"one": (vectors, head)}).right["tuned BERT one"] < 0.5


def test_a_canary_dies_where_the_protocol_tells_the_answers(
    dataset: Dataset, parts: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_but_a_few(self: Queries) -> list[Any]:
        return [np.setdiff1d(np.arange(len(dataset.catalog)), [target, 0, 1, 2]) for target in self.targets]

    monkeypatch.setattr(Queries, "excluded", all_but_a_few)
    assert not run_canary(dataset, parts).alive


def test_a_canary_lives_where_a_head_prefers_items_whatever_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of forty items are all that is bought: one permutation in a few puts what the head prefers on them."""
    dice = np.random.default_rng(0)
    rows = np.arange(120, dtype=np.int32)
    sets = [dice.permutation(5)[:3] for _ in rows]
    bundles = Bundles.build([str(row) for row in rows], sets, owners=[f"u{row % 40}" for row in rows])
    catalog = Catalog.build([f"i{row}" for row in range(40)], [f"word{row}" for row in range(40)])
    shop = Dataset.build("few", catalog, None, bundles)
    preferred = dice.random((40, 1)).astype(np.float32)

    def prefer(vectors: np.ndarray[Any, Any], head: Any) -> Any:
        return lambda queries: np.tile(vectors[:, 0], (len(queries), 1))

    monkeypatch.setattr(FittedHead, "of", staticmethod(prefer))
    tuned = {"one": (preferred, BundleHead(1, BundleTask()))}
    parts = Split(rows[:20], rows[20:40], rows[40:], rows[:0], np.empty(0, np.int64), "")
    found = [run_canary(shop, parts, tuned=tuned, seed=seed) for seed in range(6)]
    assert all(one.alive for one in found)
    means = [one.shuffled["tuned BERT one"][0] for one in found]
    assert max(means) > found[0].chance  # so some were asked again


def test_lists_are_described(dataset: Dataset, parts: Split) -> None:
    vectors, _ = head_and_vectors(dataset)
    report = evaluate(dataset, parts, frozen=np.ones_like(vectors))
    random, popular = report.row("random").quality, report.row("popularity").quality
    assert random["coverage"] == 1
    assert popular["coverage"] < 0.4
    assert popular["popularity"] > 70 > random["popularity"] > 30
    assert random["diversity"] == pytest.approx(0, abs=1e-6)  # all vectors are alike
    assert random["near-duplicates"] == 1


def test_a_report_is_json_and_a_table(dataset: Dataset, parts: Split) -> None:
    report = evaluate(dataset, parts)
    again = json.loads(json.dumps(report.to_json()))
    assert [row["name"] for row in again["rows"]] == [row["name"] for row in report.rows()]
    assert again["split_digest"] == parts.digest
    assert again["composition"] is None  # it was not asked for
    first = report.rows()[-1]
    assert first["name"] == str(FUSION)
    assert first["ndcg@10 low"] <= first["ndcg@10"] <= first["ndcg@10 high"]


@pytest.fixture
def report(dataset: Dataset, parts: Split) -> Report:
    return evaluate(replace(dataset, name="<Shop> & Co"), parts)


def test_the_chart_needs_nothing_and_is_to_scale(report: Report, tmp_path: Path) -> None:
    verdict = write_verdict(report)
    assert verdict.startswith("The fusion has the missing item among its first ten for ")
    assert len(re.findall(r"p = [01]\.\d{4}", verdict)) == len(report.row("fusion").p)
    plot(report, tmp_path / "chart.html")
    text = (tmp_path / "chart.html").read_text()
    assert "&lt;Shop&gt; &amp; Co" in text
    assert re.findall(r'(?:src|href)="http', text) == []
    bars = re.findall(r'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*"[^>]*style="fill: (?:#4c78a8|#0b6e4f)', text)
    widths = np.array([float(end) - float(start) for start, end in bars])
    values = [row.values["ndcg@10"] for row in report.lines]
    assert len(widths) == len(values)
    np.testing.assert_allclose(widths, np.array(values) / max(values) * max(widths), atol=0.2)


def test_a_chart_of_another_ending_or_measure_is_refused(report: Report, tmp_path: Path) -> None:
    with pytest.raises(PeftComboError, match=r"\.html, \.svg or \.png"):
        plot(report, tmp_path / "chart.pdf")
    with pytest.raises(PeftComboError, match=r"ndcg@10 or r@10"):
        plot(report, tmp_path / "chart.html", "mrr")


def test_a_row_that_cannot_be_fitted_is_missing_with_its_reason(
    dataset: Dataset, parts: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "implicit", None)  # as if it were not there
    found = evaluate(dataset, parts)
    assert "ALS" not in [row.name for row in found.lines]
    assert any(note.startswith("ALS: left out.") and "implicit" in note for note in found.notes)


def test_without_held_out_bundles_there_is_nothing_to_evaluate(dataset: Dataset) -> None:
    with pytest.raises(PeftComboError, match="validation and test"):
        evaluate(dataset, split(dataset, valid_fraction=0.0))


def test_sampling_keeps_whole_bundles(dataset: Dataset, parts: Split) -> None:
    report = evaluate(dataset, parts, max_queries=12)
    assert 8 < report.counts["test questions"] <= 12
    assert any("test:" in note for note in report.notes)


def test_blind_guesses_fill_one_blank_in_four(dataset: Dataset, parts: Split) -> None:
    report = evaluate(dataset, parts, frozen=np.ones((len(dataset.catalog), 4), np.float32))
    assert report.row("frozen BERT").fill_in == pytest.approx(0.25)  # a tie of four counts a quarter
    words = report.row("TF-IDF title").fill_in
    assert words is not None
    assert words > 0.4
    for row in report.lines:
        answers = report.answers.fill_ins[row.name]
        assert len(answers) == report.counts["test questions"]
        assert row.fill_in == pytest.approx(np.nanmean(answers))


def test_what_a_user_did_before_counts_only_where_users_are_on_both_sides(dataset: Dataset) -> None:
    marked = with_marked_users(dataset)
    by_user, by_bundle = evaluate(marked, split(marked, "user")), evaluate(marked, split(marked, "bundle"))
    assert {"bought before", "users alike"}.isdisjoint(row.name for row in by_user.lines)
    assert {"bought before", "users alike"} <= {row.name for row in by_bundle.lines}
    # What a held-out bundle would give away of its owner was taken from the history: no answer was bought before.
    assert by_bundle.row("bought before").values["r@5"] < 0.05


def test_an_ensemble_is_the_mean_of_scores_or_of_vectors() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    turned = np.array([[0, 1], [1, 0], [0.8, 0.6]], np.float32)
    untrained = BundleHead(2, BundleTask(projection="none")).eval()
    one, two = FittedHead.of(vectors, untrained), FittedHead.of(turned, untrained)
    none = np.zeros(2, np.int64)
    questions = Queries(np.array([[0], [2]]), none, np.array(["a", "b"]), none)
    scores, means = (FittedEnsemble.of([one, two], vectors=joined) for joined in (False, True))
    np.testing.assert_allclose(scores(questions), (one(questions) + two(questions)) / 2, atol=1e-6)
    # Item 0 is (1, 0) to one and (0, 1) to the other: on average (0.5, 0.5), as item 1 is; item 2 is (0.7, 0.7).
    np.testing.assert_allclose(means(questions), [[0.5, 0.5, 0.7], [0.7, 0.7, 0.98]], atol=1e-6)
    for ensemble in (scores, means):
        np.testing.assert_allclose(
            ensemble.score_among(questions, np.array([2, 0])), ensemble(questions)[:, [2, 0]], atol=1e-6
        )
    # In one vector space the two settings are one.
    same = [FittedEnsemble.of([one, one, one], vectors=joined)(questions) for joined in (False, True)]
    np.testing.assert_allclose(same[0], same[1], atol=1e-6)
    np.testing.assert_allclose(same[0], vectors[[0, 2]] @ project_targets(untrained, vectors).T, atol=1e-6)


def test_only_adapters_of_all_items_form_an_ensemble(dataset: Dataset, parts: Split) -> None:
    vectors, head = head_and_vectors(dataset)
    for names, there in ((["one"], False), (["one", "two"], True)):
        known = FitData.of(dataset, parts.train, None, vectors, dict.fromkeys(names, (vectors, head)))
        assert (ENSEMBLE in list_scorers(known, set(), 0)) == there


def timed(dataset: Dataset) -> Dataset:
    interactions = dataset.interactions
    assert interactions is not None
    whole = replace(interactions, times=np.arange(len(interactions), dtype=np.float64))
    return Dataset.build(dataset.name, dataset.catalog, whole, dataset.bundles)


def test_a_rating_adapter_counts_training_users_alone(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = timed(with_marked_users(dataset))
    parts = split(marked)
    seen: list[Interactions] = []
    plain = Rater.of.__func__  # type: ignore[attr-defined]

    def of(cls: Any, vectors: Any, head: Any, interactions: Any) -> Any:
        seen.append(interactions)
        return plain(cls, vectors, head, interactions)

    monkeypatch.setattr(Rater, "of", classmethod(of))
    vectors, _ = head_and_vectors(dataset)
    rated = {"r": (vectors, RatingHead(16, RatingTask(neighbours=5)).eval())}
    report = evaluate(marked, parts, frozen=vectors, rated=rated)
    assert (report.row("rated r").setting, len(seen)) == ("bundle and past", 1)  # all owners are new to it
    held = {marked.bundles.owners[row] for row in (*parts.valid, *parts.test, *parts.dropped)}
    assert seen[0].user_ids
    assert not held & {seen[0].user_ids[user] for user in np.unique(seen[0].users)}
    # Where owners are met again, their past alone is tried too.
    again = evaluate(marked, split(marked, "bundle"), frozen=vectors, rated=rated)
    assert len(seen) == 3
    assert again.row("rated r").setting in ("bundle and past", "owner's past")
    # Without times nobody can say what was taken last: the row is missing, with its reason.
    told = evaluate(with_marked_users(dataset), parts, frozen=vectors, rated=rated)
    assert "rated r" not in [row.name for row in told.lines]
    assert any(note.startswith("rated r: left out. Ratings need a timestamp") for note in told.notes)
