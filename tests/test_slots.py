"""Slots and templates: what slot an item has, how usual a combination is, and what rules do to it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from peft_combo.data.model import Catalog
from peft_combo.data.readers.demo import demo_dataset
from peft_combo.errors import DataError
from peft_combo.recommender.composing.slots import OTHER, SlotTemplates

# One item per letter: t(op), b(ottom), s(hoes), d(ress), g (bag).
SLOTS = {"t": "top", "b": "bottom", "s": "shoes", "d": "dress", "g": "bag"}


def shop(letters: str = "tbsdg") -> Catalog:
    return Catalog.build(
        [f"{letter}{row}" for row, letter in enumerate(letters)],
        letters,
        slots=[SLOTS[letter] for letter in letters],
    )


def bundles(*words: str, letters: str = "tbsdg") -> list[np.ndarray]:
    return [np.array([letters.index(letter) for letter in word]) for word in words]


OUTFITS = ["tbs"] * 6 + ["tbsg"] * 3 + ["ds"] * 2 + ["dsg"]


@pytest.fixture
def outfits() -> SlotTemplates:
    return SlotTemplates.learn(shop(), bundles(*OUTFITS))


def numbers(templates: SlotTemplates, word: str) -> tuple[int, ...]:
    return tuple(sorted(templates.find_slot(SLOTS[letter]) for letter in word))


def log_conditional(templates: SlotTemplates, slot: str, given: str) -> float:
    return float(templates.conditionals[templates.find_slot(given), templates.find_slot(slot)])


def sub(path: str) -> tuple[str, ...]:
    return tuple(path.split("/"))


def shelf(*paths: str) -> Catalog:
    """A catalogue of items without slots, one for each path."""
    return Catalog.build(
        [str(row) for row in range(len(paths))], ["x"] * len(paths), [sub(path) if path else () for path in paths]
    )


def test_the_catalogues_slot_comes_before_the_category() -> None:
    catalog = Catalog.build(["a", "b"], ["x", "y"], [("Shoes", "Boots"), ("Shoes", "Boots")], ["footwear", None])
    templates = SlotTemplates.learn(catalog, [np.array([0, 1])], min_bundles=1)
    assert [templates.names[slot] for slot in templates.assign_slots(catalog)] == ["footwear", "Shoes > Boots"]


def test_a_rare_leaf_backs_off_to_the_nearest_category_with_enough_bundles() -> None:
    catalog = shelf("A/B/often", "A/B/rare", "A/C/rare", "Z/once", "")
    held = [np.array([0, 1])] * 3 + [np.array([0, 2])] * 2 + [np.array([0, 3])]
    templates = SlotTemplates.learn(catalog, held, min_bundles=4)
    # A/B/often is in 6 bundles; A/B in 6, A in 6, A/B/rare in 3, A/C in 2; a root is always a slot.
    named = [templates.names[slot] for slot in templates.assign_slots(catalog)]
    assert named == ["A > B > often", "A > B", "A", "Z", OTHER]


def test_what_training_never_met_falls_to_a_known_category() -> None:
    templates = SlotTemplates.learn(shelf("A/B", "A/C"), [np.array([0, 1])] * 10)
    later = shelf("A/B/new leaf", "A/new", "New/root")
    assert [templates.names[slot] for slot in templates.assign_slots(later)] == ["A > B", "A", OTHER]


def test_counts_are_those_of_the_bundles(outfits: SlotTemplates) -> None:
    assert outfits.bundles == 12
    assert dict(zip(outfits.names, outfits.support.tolist(), strict=True)) == {
        "bag": 4, "bottom": 9, "dress": 3, "shoes": 12, "top": 9, OTHER: 0
    }  # fmt: skip
    assert outfits.templates[numbers(outfits, "tbs")] == 6
    assert outfits.templates[numbers(outfits, "tbsg")] == 3
    assert outfits.find_typical_sizes(0, 1) == (2, 4)


def test_repeated_slots_are_counted() -> None:
    templates = SlotTemplates.learn(shop("tts"), [np.array([0, 1, 2]), np.array([0, 2])] * 5)
    assert sorted(template.count(templates.find_slot("top")) for template in templates.templates) == [1, 2]
    assert templates.most[templates.find_slot("top")] == 2
    assert templates.most[templates.find_slot("shoes")] == 2


def test_a_slot_holds_one_item_where_enough_bundles_tell_so() -> None:
    catalog = shop("ttsb")
    two_tops, plain, bottom = np.array([0, 1, 2]), np.array([0, 2]), np.array([0, 3])
    templates = SlotTemplates.learn(catalog, [two_tops] * 20 + [plain] * 20 + [bottom] * 2)
    # One slot in four has two items: ten of the 40 bundles should have had two pairs of shoes, none of two two bottoms.
    most = dict(zip(templates.names, templates.most.tolist(), strict=True))
    assert most == {"top": 2, "shoes": 1, "bottom": 2, OTHER: 1}
    # Where no bundle has two of anything, the rarest slot has room for one.
    single = SlotTemplates.learn(catalog, [plain] * 20 + [bottom])
    assert set(single.most.tolist()) == {1}


def test_a_rule_tells_support_confidence_and_lift(outfits: SlotTemplates) -> None:
    rule = outfits.find_rule(outfits.find_slot("top"), outfits.find_slot("bag"))
    assert rule is not None
    assert (rule.given, rule.slot, rule.support, rule.bundles) == ("top", "bag", 3, 12)
    assert rule.confidence == pytest.approx(3 / 9)
    assert rule.lift == pytest.approx((3 / 9) / (4 / 12))
    assert outfits.find_rule(outfits.find_slot("top"), outfits.find_slot("dress")) is None


def test_conditionals_are_counts_smoothed_by_the_number_of_kinds_seen(outfits: SlotTemplates) -> None:
    # Beside "top" three kinds were seen: bottom, shoes, bag. P(dress) = (3 + 1/2) / 13.
    assert log_conditional(outfits, "dress", "top") == pytest.approx(math.log((0 + 3 * 3.5 / 13) / (9 + 3)))
    assert log_conditional(outfits, "bag", "top") == pytest.approx(math.log((3 + 3 * 4.5 / 13) / (9 + 3)))
    proper = np.exp(outfits.conditionals)
    assert (proper > 0).all()
    assert (proper < 1).all()


def test_a_category_seldom_seen_with_another_borrows_from_the_category_above() -> None:
    catalog = shelf("Shoes/Boots", "Shoes/Sneakers", "Socks/Wool", "Hats/Caps")
    held = [np.array([1, 2])] * 30 + [np.array([3])] * 30 + [np.array([0])] * 2
    templates = SlotTemplates.learn(catalog, held, min_bundles=1)
    # Boots have 2 bundles and nothing beside them; shoes have 32, 30 of them with socks: (0 + 1 * P(above)) / (2 + 1).
    above = (30 + 1 * (30 + 0.5) / (62 + 1)) / (32 + 1)
    assert log_conditional(templates, "Wool", "Boots") == pytest.approx(math.log(above / 3))
    assert math.exp(log_conditional(templates, "Caps", "Boots")) < 0.01


def test_usual_templates_are_more_probable_than_unusual_ones(outfits: SlotTemplates) -> None:
    order = ["tbs", "tbsg", "ds", "dsg", "tdb"]
    logs = [outfits.log_probability(numbers(outfits, word)) for word in order]
    assert logs == sorted(logs, reverse=True)
    assert all(log <= 0 for log in logs)
    # Never seen as wholes: a top with a bag has been seen together, a top with a dress has not.
    assert outfits.log_probability(numbers(outfits, "tsg")) > outfits.log_probability(numbers(outfits, "tsd"))


def test_log_probability_is_the_formula_worked_by_hand() -> None:
    templates = SlotTemplates.learn(shop("ts"), [np.array([0, 1])] * 3 + [np.array([0])])
    # 4 bundles, 2 distinct templates; seen once; backed off to P(size 1) P(top) P(one | top).
    size = (1 + 0.5) / (4 + 0.5 * 4)
    pairs = size * (4 + 0.5) / (4 + 1) * (4 + 0.5) / (4 + 1)
    assert templates.log_probability((templates.find_slot("top"),)) == pytest.approx(
        math.log((1 + 2 * pairs) / (4 + 2))
    )


def test_an_optional_slot_makes_no_difference(outfits: SlotTemplates) -> None:
    free = outfits.with_rules(optional=["bag"])
    for word in ("tbs", "ds"):
        without, with_bag = (free.log_probability(numbers(free, one)) for one in (word, word + "g"))
        assert without == with_bag
    assert outfits.log_probability(numbers(outfits, "ds")) != outfits.log_probability(numbers(outfits, "dsg"))


def test_rules_are_edited_without_touching_the_original(outfits: SlotTemplates) -> None:
    edited = outfits.with_rules(required=["shoes"], forbidden=["bag"])
    assert {edited.names[slot] for slot in edited.required} == {"shoes"}
    assert {edited.names[slot] for slot in edited.forbidden} == {"bag"}
    assert not outfits.required
    assert edited.with_rules(optional=["top"]).required == edited.required


def test_an_unknown_slot_is_answered_with_the_nearest(outfits: SlotTemplates) -> None:
    with pytest.raises(DataError, match=r'No slot is called "shoe".*Did you mean "shoes"\?'):
        outfits.with_rules(required=["shoe"])


def test_one_slot_under_two_rules_is_refused(outfits: SlotTemplates) -> None:
    with pytest.raises(DataError, match='Slot "bag" is both required and forbidden'):
        outfits.with_rules(required=["bag"], forbidden=["bag"])


def test_a_slot_from_a_category_can_be_called_by_its_leaf_unless_two_end_so() -> None:
    catalog = shelf("Men/Shoes", "Women/Shoes", "Women/Bags")
    templates = SlotTemplates.learn(catalog, [np.array([0, 1, 2])], min_bundles=1)
    assert templates.find_slot("Bags") == templates.find_slot("Women > Bags")
    with pytest.raises(DataError, match='"Shoes" could be any of "Men > Shoes", "Women > Shoes"'):
        templates.find_slot("Shoes")


def test_nothing_is_learned_from_nothing() -> None:
    with pytest.raises(DataError, match="Give at least one bundle"):
        SlotTemplates.learn(shop(), [])


def test_plans_are_the_best_of_all_templates_that_fit(outfits: SlotTemplates) -> None:
    held = numbers(outfits, "s")
    plans = outfits.list_plans(held, outfits.most, (2, 4), limit=5)
    slots = range(len(outfits.names))
    every = [
        template for size in (2, 3, 4) for template in itertools.combinations(slots, size) if set(held) <= set(template)
    ]
    ranked = sorted(every, key=lambda template: -outfits.log_probability(template))
    assert [template for template, _ in plans] == ranked[:5]
    assert [log for _, log in plans] == [outfits.log_probability(template) for template in ranked[:5]]


def test_plans_have_required_slots_and_no_more_than_there_is_room_for(outfits: SlotTemplates) -> None:
    edited = outfits.with_rules(required=["bag"])
    room = outfits.most.copy()
    room[outfits.find_slot("dress")] = 0
    plans = edited.list_plans((), room, (2, 4))
    assert plans
    assert all(
        edited.find_slot("bag") in template and edited.find_slot("dress") not in template for template, _ in plans
    )
    room[outfits.find_slot("bag")] = 0
    assert edited.list_plans((), room, (2, 4)) == []


def test_slots_stand_in_the_order_bundles_list_them(outfits: SlotTemplates) -> None:
    assert [outfits.names[slot] for slot in outfits.order_slots(numbers(outfits, "gstb"))] == [
        "top", "bottom", "shoes", "bag"
    ]  # fmt: skip


def test_the_demo_shop_has_the_templates_it_was_drawn_from() -> None:
    demo = demo_dataset()
    templates = SlotTemplates.learn(demo.catalog, demo.bundles.items)
    assert sum(templates.templates.values()) == len(demo.bundles)
    for template in templates.templates:
        slots = {templates.names[slot] for slot in template}
        assert slots >= {"shoes"}
        assert len({"top", "dress"} & slots) == 1
    confident = templates.find_rule(templates.find_slot("top"), templates.find_slot("bottom"))
    assert confident is not None
    assert confident.confidence == 1.0
