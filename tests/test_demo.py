"""The synthetic shop is the same everywhere, obeys its own rules and hides its style."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from peft_combo.data.readers.demo import demo_dataset
from peft_combo.data.sources import open_dataset
from peft_combo.data.splits import split
from peft_combo.data.stats import describe
from peft_combo.recipe.model import DataConfig

# Changes only when the generator's rules or words change; say so in the changelog, for figures on the demo change too.
DIGEST = "d8af0e3f79495e15edc5620cbb52c543e1e168c3dc8565be40f442de15871b81"


def test_digest_is_pinned() -> None:
    assert demo_dataset().digest == DIGEST
    assert open_dataset(DataConfig(source="demo")).digest == DIGEST


def test_digest_does_not_depend_on_the_process() -> None:
    code = "from peft_combo.data import demo_dataset; print(demo_dataset().digest)"
    environment = {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == DIGEST


def test_another_seed_is_another_shop() -> None:
    other = demo_dataset(seed=1)
    assert other.digest != DIGEST
    assert len(other.catalog) == len(demo_dataset().catalog) == 1000


def test_shape() -> None:
    figures = describe(demo_dataset())
    assert figures["items"] == 1000
    assert figures["bundles"] == 600
    assert 11_000 < figures["interactions"] < 13_000
    assert figures["users"] == 400
    assert figures["price_known"] == 1.0
    assert figures["items_in_no_bundle"] > 0.1
    assert figures["time_range"][0].startswith("2022-01-01")
    assert figures["time_range"][1].startswith("2023-12-31")


def test_outfits_keep_their_slots_and_gender() -> None:
    demo = demo_dataset()
    for items in demo.bundles.items:
        slots = Counter(demo.catalog.slots[row] for row in items)
        assert max(slots.values()) == 1
        assert slots["shoes"] == 1
        assert ("dress" in slots) != ("top" in slots and "bottom" in slots)
        assert len({demo.catalog.categories[row][1] for row in items}) == 1


def test_style_stays_hidden() -> None:
    catalog = demo_dataset().catalog
    assert set(catalog.attributes) == {"brand", "colour", "fabric", "season", "stock"}
    shown = " ".join(catalog.titles).casefold()
    for style in ("minimal", "boho", "street", "romantic", "workwear"):
        assert style not in shown


def test_titles_of_one_outfit_share_few_words() -> None:
    demo = demo_dataset()
    words = [set(title.casefold().replace(",", "").split()) for title in demo.catalog.titles]
    shared = [
        len(words[a] & words[b]) / min(len(words[a]), len(words[b]))
        for items in demo.bundles.items
        for a in items
        for b in items
        if a < b
    ]
    assert np.mean(shared) < 0.25


def test_brands_tell_style_through_outfits_only() -> None:
    """Brands of one style meet in train outfits far more often than chance: that is what tuning can learn."""
    demo = demo_dataset()
    train = split(demo, "user").train
    brands = demo.catalog.attributes["brand"]
    together = Counter(
        frozenset((brands[a], brands[b]))
        for row in train
        for a in demo.bundles.items[row]
        for b in demo.bundles.items[row]
        if a < b
    )
    same_style = together[frozenset(("Fernmoor", "Mirabon"))] + together[frozenset(("Runmark", "Skarsted"))]
    other_style = together[frozenset(("Fernmoor", "Skarsted"))] + together[frozenset(("Runmark", "Mirabon"))]
    assert same_style >= 5 * max(other_style, 1)


def test_owners_buy_their_outfits() -> None:
    demo = demo_dataset()
    interactions = demo.interactions
    assert interactions is not None
    for row in range(0, 600, 50):
        bought = interactions.baskets == demo.bundles.baskets[row]
        assert set(interactions.items[bought]) == set(demo.bundles.items[row])
        assert {interactions.user_ids[user] for user in interactions.users[bought]} == {demo.bundles.owners[row]}


@pytest.mark.parametrize("by", ["user", "bundle", "time", "cold-item"])
def test_it_can_be_split(by: str) -> None:
    parts = split(demo_dataset(), by)  # type: ignore[arg-type]
    assert len(parts.train) > 300
    assert min(len(parts.valid), len(parts.test)) > 30
