"""What bundles agree on: traits read off the catalogue, their worth learned from bundles, and bundles of one kind."""

from __future__ import annotations

import numpy as np
import pytest

from peft_combo.data.model import Catalog
from peft_combo.data.traits import Traits, read_class
from peft_combo.recommender.composing.agreement import Agreement
from peft_combo.recommender.composing.composer import Composer
from peft_combo.recommender.composing.constraints import Constraints
from peft_combo.recommender.composing.options import ObjectiveWeights, Options
from peft_combo.recommender.composing.slots import SlotTemplates


def shelf(
    titles: list[str], slots: list[str] | None = None, paths: list[str] | None = None, **columns: list[str | None]
) -> Catalog:
    """A catalogue of these titles."""
    return Catalog.build(
        [f"i{row}" for row in range(len(titles))], titles,
        [tuple(path.split(" > ")) if path else () for path in paths] if paths else None, slots, attributes=columns,
    )  # fmt: skip


def told(catalog: Catalog, name: str) -> list[str | None]:
    """The value of a trait for each item."""
    traits = Traits.of(catalog)
    place = traits.names.index(name)
    return [None if code < 0 else traits.values[place][code] for code in traits.codes[place].tolist()]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("gender", "Women's Linen Tee", "female"),
        ("gender", "Womens Sandals", "female"),
        ("gender", "Ladies\N{RIGHT SINGLE QUOTATION MARK} Watch", "female"),
        ("gender", "Boys' School Shoes", "male"),
        ("gender", "Tee for Men and Women", None),
        ("gender", "Linen Tee", None),
        ("gender", "Mentholated Romance", None),
        ("age", "Women's Linen Tee", "adult"),
        ("age", "Big Girls' Dress", "child"),
        ("age", "Baby Girls Romper", "baby"),
        ("season", "Winter Coat", "winter"),
        ("size system", "Plus-Size Wrap Dress", "plus size"),
        ("size", "Chinos, Size XS", "xs"),
        ("skin type", "Cream for Dry to Very dry Skin", "dry"),
        ("skin type", "Cream for sensitive skin", "sensitive"),
        ("voltage", "Cordless Drill 18V", "18v"),
        ("voltage", "Drill, 18 volt", "18 v"),
        ("voltage", "Model 18Vx", None),
    ],
)
def test_a_title_says_a_class_or_nothing(name: str, text: str, value: str | None) -> None:
    assert read_class(name, text) == value


def test_a_category_says_it_before_a_title_and_an_attribute_before_both() -> None:
    titles = ["Men's Boots", "Shorts", "Men's Tee", "Girls Tee"]
    paths = ["Clothing > Women > Boots", "Clothing > Women > Lingerie > Boy Shorts", "", "Clothing > Tops > Tees"]
    assert told(shelf(titles, paths=paths), "gender") == ["female", "female", "male", "female"]
    catalog = shelf(titles, paths=paths, sex=["F", None, "M", "F"])
    assert "gender" not in Traits.of(catalog).names
    assert told(catalog, "sex") == ["F", None, "M", "F"]


def test_levels_of_categories_are_traits_where_they_are_no_class_and_no_leaf() -> None:
    catalog = shelf(["a", "b", "c"], paths=["Shop > Women > Tops", "Shop > Garden > Tools", "Shop > Kitchen > Pans"])
    assert told(catalog, "category level 2") == [None, "Garden", "Kitchen"]
    assert "category level 1" not in Traits.of(catalog).names  # all of one: it tells nothing apart


def test_what_goes_with_every_season_says_nothing() -> None:
    catalog = shelf(["a", "b", "c"], season=["Summer", "All-Year", "winter"], stock=["1", "2", "3"])
    assert told(catalog, "season") == ["Summer", None, "winter"]
    assert "stock" not in Traits.of(catalog).names


def test_the_worth_of_a_trait_is_its_smoothed_log_odds_against_chance() -> None:
    # 30 bundles of two of one colour, 10 of two colours; both colours equally frequent.
    catalog = shelf(["a", "b", "c", "d"], colour=["red", "red", "blue", "blue"], brand=["x", "y", "x", None])
    bundles = [np.array([0, 1])] * 15 + [np.array([2, 3])] * 15 + [np.array([0, 2])] * 5 + [np.array([1, 3])] * 5
    learned = Agreement.learn(catalog, bundles)
    place = learned.traits.names.index("colour")
    agreed = (30 + 20 * 0.5) / (40 + 20)
    assert learned.same[place] == pytest.approx(np.log(agreed / 0.5))
    assert learned.other[place] == pytest.approx(np.log((1 - agreed) / 0.5))
    # No bundle at all: chance is all there is.
    blank = Agreement.learn(catalog, [])
    assert not blank.same.any()
    assert not blank.other.any()


def test_a_large_bundle_does_not_outvote_all_others() -> None:
    colours = ["red"] * 10 + ["blue"] * 10
    catalog = shelf([str(row) for row in range(20)], colour=colours)
    mixed = [np.array([row, row + 10]) for row in range(10)]
    one, many = (Agreement.learn(catalog, [*mixed, np.arange(10)][:stop]).same[0] for stop in (10, 11))
    assert one < many < 0  # ten pairs that differ beside 45 that agree, which count as five


def test_scores_are_means_over_the_set_and_nothing_where_a_value_is_not_known() -> None:
    catalog = shelf(["a", "b", "c", "d"], colour=["red", "red", "blue", None])
    learned = Agreement(Traits.of(catalog), np.array([0.5]), np.array([-2.0]))
    found = learned.score_beside([(0,), (0, 2), (0, 3), ()], np.arange(4))
    expected = [[0.5, 0.5, -2, 0], [-0.75, -0.75, -0.75, 0], [0.25, 0.25, -1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(found, expected)
    assert learned.find_shared(1, [0, 2]) == (("colour", "red"),)
    assert learned.find_shared(2, [0, 3]) == ()
    assert learned.find_shared(3, [0, 1]) == ()


def outfits(n: int) -> tuple[Catalog, list[np.ndarray]]:
    """Tops and shoes of women and men in turn; bundles are of one of the two, the last two words say nothing."""
    whose = ["Women's", "Men's"]
    titles = [f"{whose[row % 2]} {what} {row}" for what in ("Top", "Shoes") for row in range(n)]
    catalog = shelf(titles, slots=["top"] * n + ["shoes"] * n)
    return catalog, [np.array([row, n + row]) for row in range(n)]


def test_bundles_are_of_one_gender_where_bundles_were_and_say_so() -> None:
    catalog, bundles = outfits(40)
    templates = SlotTemplates.learn(catalog, bundles)
    rng = np.random.default_rng(0)
    relevance = rng.random(len(catalog)).astype(np.float32)
    mixed = 0
    for agreement in (None, Agreement.learn(catalog, bundles)):
        composer = Composer(catalog, templates, agreement=agreement, weights=ObjectiveWeights(agreement=1.0))
        found = composer.compose(relevance=relevance, constraints=Constraints(size=(2, 2)), options=Options(k=10))
        mixed = sum((one.items[0] - one.items[1]) % 2 for one in found)
        if agreement is None:
            assert mixed > 0
    assert mixed == 0
    for one in found:
        whose = "women" if one.items[0] % 2 == 0 else "men"
        assert all(item.shared == (("for", whose),) for item in one.evidence)
        assert one.parts["agreement"] > 0
        assert sum(item.agreement for item in one.evidence) == pytest.approx(one.parts["agreement"])
