"""Times of repurchase: figures worked by hand, a model that finds the truth of made-up shoppers, and the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from peft_combo.data.model import Interactions
from peft_combo.errors import DataError
from peft_combo.evaluation.repurchase import BASE, LANDMARK, MEMORYLESS, STEP, measure_repurchase
from peft_combo.metrics.survival import average_brier, brier, concordance, kaplan_meier
from peft_combo.recommender.repurchase import PurchaseHistory, RepurchaseModel, measure_rates

DAY = 86_400.0


class TestFigures:
    def test_kaplan_meier_by_hand(self) -> None:
        """Of five, one event at 1; one lost at 2; events at 3 and 4 of three and two at risk; one lost at 5."""
        moments, share = kaplan_meier([1, 2, 3, 4, 5], [True, False, True, True, False])
        assert moments.tolist() == [1, 3, 4]
        np.testing.assert_allclose(share, [4 / 5, 4 / 5 * 2 / 3, 4 / 5 * 2 / 3 / 2])

    def test_concordance_counts_pairs_of_which_the_first_is_known(self) -> None:
        times, came = [1, 2, 3, 3], [True, False, True, False]
        # Comparable: 0 before 1, 2, 3, and 2 before 3, which was lost at the same moment. 1 was lost before 2 and 3.
        assert concordance(times, came, [4, 3, 2, 1]) == 1
        assert concordance(times, came, [1, 2, 3, 4]) == 0
        assert concordance(times, came, [4, 4, 2, 3]) == pytest.approx((0.5 + 1 + 1 + 0) / 4)
        assert concordance([1, 2], [False, False], [1, 2]) == 0.5

    def test_brier_is_the_mean_square_where_all_are_watched_long_enough(self) -> None:
        assert brier([1, 9, 9], [True, False, True], [0.8, 0.3, 0.1], 5) == pytest.approx((0.04 + 0.09 + 0.01) / 3)

    def test_who_is_lost_early_is_stood_for_by_who_is_not(self) -> None:
        """Half of those watched at 2 are lost there, so each later one counts twice: (0.25 + 2 * 0.25 * 2) / 5."""
        times, came = [1, 2, 2, 6, 6], [True, False, False, False, False]
        assert brier(times, came, [0.5] * 5, 5) == pytest.approx((0.25 + 2 * 2 * 0.25) / 5)

    def test_lost_at_random_leaves_the_score_where_it_was(self) -> None:
        rng = np.random.default_rng(0)
        waited = rng.exponential(10, 20_000)
        chance = rng.uniform(size=20_000)
        whole = brier(waited, waited > -1, chance, 8)
        lost = rng.exponential(15, 20_000)
        seen = brier(np.minimum(waited, lost), waited <= lost, chance, 8)
        assert seen == pytest.approx(whole, abs=0.01)
        both = np.column_stack([chance, chance])
        assert average_brier(waited, waited > -1, both, [8, 8.0001]) == pytest.approx(whole, abs=1e-4)

    @pytest.mark.parametrize(
        ("message", "call"),
        [
            ("not negative", lambda: kaplan_meier([-1.0], [True])),
            (r"found \(2,\) and \(1,\)", lambda: kaplan_meier([1, 2], [True])),
            (r"risks must be \(2,\), found \(3,\)", lambda: concordance([1, 2], [True, True], [1, 2, 3])),
            (r"in \[0, 1\]", lambda: brier([1, 2], [True, True], [0, 2], 1)),
            ("Nobody was watched for 9", lambda: brier([1, 2], [False, False], [0, 0.5], 9)),
            ("ascending", lambda: average_brier([1, 2], [True, True], [[0, 0], [0, 0]], [2, 1])),
        ],
    )
    def test_what_does_not_fit_is_refused(self, message: str, call: Any) -> None:
        with pytest.raises(ValueError, match=message):
            call()


def shop(gaps: NDArray[np.float64], first: NDArray[np.float64], end: float = 364) -> PurchaseHistory:
    """Pair p of user p takes its thing on day first[p] and after each of its gaps, until a day: (P, G), (P,)."""
    days = np.column_stack([first, first[:, None] + np.cumsum(gaps, axis=1)])
    pairs, places = np.nonzero(days < end)
    interactions = Interactions.build(
        [str(user) for user in range(len(first))], pairs, np.zeros(len(pairs), int), times=days[pairs, places] * DAY
    )
    return PurchaseHistory.of(interactions, np.zeros(1, np.int64))


@pytest.fixture(scope="module")
def poisson() -> tuple[PurchaseHistory, NDArray[np.float64]]:
    """3,000 users with rates of Gamma(2, 60 days), who take the thing at random: history and (P,) rates per day."""
    rng = np.random.default_rng(1)
    rates = rng.gamma(2, 1 / 60, 3_000)
    gaps = rng.exponential(1 / rates[:, None], (3_000, 60))
    return shop(gaps, rng.uniform(0, 120, 3_000)), rates


def test_rates_are_those_of_the_gamma_that_purchases_were_drawn_from(poisson: Any) -> None:
    history, rates = poisson
    shape, rate = measure_rates(history, 364, 7.0)
    posterior = shape / rate / 7
    repeats = np.diff(history.starts) - 1
    assert (shape - repeats).mean() == pytest.approx(2, rel=0.25)  # purchases of one day are one, so a little more
    assert posterior.mean() == pytest.approx(rates.mean(), rel=0.1)
    naive = repeats / (364 - history.days[history.starts[:-1]])
    assert np.square(posterior - rates).mean() < np.square(naive - rates).mean()


def test_chances_of_random_shoppers_are_theirs_by_their_rates(poisson: Any) -> None:
    """The truth of a pair is 1 - exp(-rate days); a pair that waited long for a reason is told by its counts alone."""
    history, rates = poisson
    model = RepurchaseModel.fit(history, 308)
    pairs = model.predict(history, 308)
    truth = -np.expm1(-rates[pairs.users] * 28)
    told = pairs.within(28)
    assert told.mean() == pytest.approx(truth.mean(), abs=0.02)
    assert np.abs(told - truth).mean() < 0.12  # the rate itself is not known better than by some five purchases
    assert np.corrcoef(told, truth)[0, 1] > 0.8
    for low, high in ((0, 0.4), (0.4, 0.6), (0.6, 1)):
        inside = (told >= low) & (told < high)
        assert truth[inside].mean() == pytest.approx(told[inside].mean(), abs=0.05)
    again = RepurchaseModel.from_state(json.loads(json.dumps(model.state()))).predict(history, 308)
    np.testing.assert_array_equal(again.hazards, pairs.hazards)


def test_regular_shoppers_are_due_when_their_gap_is_over() -> None:
    """Weibull gaps of shape 5 around 28 days: hardly after one week, nearly surely after four; the truth is known."""
    rng = np.random.default_rng(2)
    scale = 28.0
    history = shop(scale * rng.weibull(5, (3_000, 20)), rng.uniform(0, 60, 3_000))
    pairs = RepurchaseModel.fit(history, 308).predict(history, 308)
    elapsed = 308 - pairs.last
    truth = 1 - np.exp((elapsed / scale) ** 5 - ((elapsed + 7) / scale) ** 5)
    told = pairs.within(7)
    early, late = (elapsed < 10), (elapsed > 26)
    assert told[early].mean() == pytest.approx(truth[early].mean(), abs=0.05)
    assert told[late].mean() == pytest.approx(truth[late].mean(), abs=0.1)
    assert told[late].mean() > 5 * told[early].mean()
    assert pairs.median()[early].mean() == pytest.approx(scale - 5, abs=4)


def test_who_never_comes_back_is_not_forgotten() -> None:
    """Half of the users stop after the first purchase. By the gaps that were seen all would come back."""
    rng = np.random.default_rng(3)
    gaps = rng.exponential(30, (2_000, 30))
    gaps[:1000, 0] = 1e6
    report = measure_repurchase(shop(gaps, rng.uniform(0, 150, 2_000)))
    rows = {row.name: row for row in report.every}
    assert rows[LANDMARK].mean_chance == pytest.approx(report.share, abs=0.03)
    assert rows[MEMORYLESS].mean_chance > report.share + 0.1
    assert rows[LANDMARK].integrated_brier < 0.8 * min(
        rows[BASE].integrated_brier, rows[MEMORYLESS].integrated_brier, rows[STEP].integrated_brier
    )
    assert rows[LANDMARK].concordance > 0.7
    assert report.to_json()["pairs"] == report.pairs


def test_a_day_counts_once_and_unknown_users_and_times_do_not_count() -> None:
    interactions = Interactions.build(
        ["a", "b"], [0, 0, 0, 1, -1, 1], [0, 0, 1, 0, 0, 1], times=[10.2 * DAY, 10.9 * DAY, 3 * DAY, 4 * DAY, 5, np.nan]
    )
    history = PurchaseHistory.of(interactions, np.array([7, -1]))
    assert history.users.tolist() == [0, 1]
    assert history.things.tolist() == [7, 7]
    assert history.days.tolist() == [10, 4]
    assert history.before(8).users.tolist() == [1]
    waited, came = history.wait(history.before(5), 5, 20)
    assert (waited.tolist(), came.tolist()) == ([15], [False])
    with pytest.raises(DataError, match="user_id and timestamp; none of 6"):
        PurchaseHistory.of(interactions, np.array([-1, -1]))
    with pytest.raises(DataError, match="expected 20 such events, found 0"):
        RepurchaseModel.fit(history, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 users over 40 weeks: soap every four weeks or so, a lamp once."""
    rng = np.random.default_rng(4)
    made = tmp_path_factory.mktemp("shop")
    (made / "items.csv").write_text("item_id,title,category\ns,Soap,Bath > Soap\nl,Lamp,Home > Lamps\n")
    lines = ["user_id,basket_id,item_id,timestamp"]
    for user in range(60):
        day = rng.uniform(0, 28)
        lines.append(f"u{user},b{user}-0,l,{int((19_000 + day) * DAY)}")
        turn = 0
        while day < 280:
            turn += 1
            lines.append(f"u{user},b{user}-{turn},s,{int((19_000 + day) * DAY)}")
            day += rng.normal(28, 3)
    (made / "interactions.csv").write_text("\n".join(lines) + "\n")
    return made


def test_the_command_lists_who_is_due_and_writes_all_of_them(folder: Path, shell: Any, tmp_path: Path) -> None:
    target = tmp_path / "due.csv"
    words = ["due", "--recipe", "lora-home", "--data", str(folder), "-k", "3"]
    code, out, err = shell(*words, "--to", str(target))
    assert code == 0, err
    assert "expected: as likely by then as not" in out
    rows = list(csv.DictReader(target.read_text().splitlines()))
    assert len(rows) == 120
    chances = [float(row["chance"]) for row in rows]
    assert chances == sorted(chances, reverse=True)
    assert {row["what"] for row in rows[:40]} == {"s"}
    assert {row["last"] for row in rows if row["what"] == "l"} < {row["last"] for row in rows} | {""}
    soap = [row for row in rows if row["what"] == "s"]
    assert min(row["last"] for row in soap[:10]) < min(
        row["last"] for row in soap[-10:]
    )  # the longest ago is due first
    code, out, err = shell(
        *words, "--of", "category", "--user", "u5", "--least", "0.01", "--by", "2022-11-30", "--json"
    )
    assert code == 0, err
    assert json.loads(out)[0]["what"] == "Soap"
    code, out, err = shell(*words, "--check")
    assert code == 0, err
    assert "landmark hazards" in out
    assert "mean gap, memoryless" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--of", "brand"], 'expected item or category, found "brand"'),
        (["--by", "30.06.2024"], 'expected a day such as 2024-06-30, found "30.06.2024"'),
        (["--by", "2001-01-01"], "or later, found 2001-01-01"),
        (["--user", "u777"], "u777"),
    ],
)
def test_the_command_refuses_what_it_cannot_tell(folder: Path, shell: Any, words: list[str], message: str) -> None:
    code, out, err = shell("due", "--recipe", "lora-home", "--data", str(folder), *words)
    assert code == 1, out
    assert message in err
