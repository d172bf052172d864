"""Makes the demo, a synthetic fashion shop, and writes it where the package ships it: peft_combo/data/demo and demo_zh.

    python tools/make_demo.py

Owns the rules by which its items, users, outfits and purchases are drawn; the words lie in `demo_words`. Everything in
it is invented: brands, items, people's tastes. It is made to be learnable: outfits follow a hidden style that titles
show only in part (a brand leans to a style, and nothing but the outfits says which), besides season, palette, price
tier and slots. So text similarity alone finds little, and tuning on bundles can find more. Figures measured on it say
that the machinery works, never that a method is good on real data.

In Chinese it is the same shop: items, users, outfits and purchases are the same rows, words and titles are those of
`demo_words_zh`. So only items and the names of outfits are written a second time.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import demo_words_zh
import pyarrow as pa
import pyarrow.parquet as pq
from demo_words import (
    BRANDS,
    CARE,
    COLOURS,
    CUTS,
    DEPARTMENTS,
    FABRICS,
    KINDS,
    LINES,
    OCCASIONS,
    PALETTES,
    SLOT_PRICES,
    STYLES,
    Brand,
    Kind,
)

FOLDER = Path(__file__).resolve().parent.parent / "peft_combo" / "data" / "demo"
FOLDER_ZH, TABLES_ZH = FOLDER.with_name("demo_zh"), ("items", "bundle_meta")

_T = TypeVar("_T")

_ITEMS_PER_SLOT = {
    "Women": {"top": 135, "bottom": 100, "dress": 85, "outerwear": 65, "shoes": 105, "bag": 70, "accessory": 70},
    "Men": {"top": 105, "bottom": 80, "outerwear": 55, "shoes": 75, "bag": 25, "accessory": 30},
}
_USERS = 400
_OUTFITS = 600
_PURCHASES = 9_600  # rows besides the bought outfits
_START = 1_640_995_200  # 2022-01-01 UTC
_DAYS = 730


@dataclass(frozen=True)
class _Title:
    """The parts of a title; "" for one that it does not tell."""

    form: int
    brand: str
    whose: str
    line: str
    cloth: str
    cut: str
    noun: str
    colour: str
    size: str

    def write(self) -> str:
        """Return it as shops write it."""
        cut, cloth, line = (f"{one} " if one else "" for one in (self.cut, self.cloth, self.line))
        whose = f"{self.whose}'s " if self.whose else ""
        size = f", Size {self.size}" if self.size else ""
        match self.form:
            case 0:
                title = f"{self.brand} {whose}{line}{cloth}{cut}{self.noun}, {self.colour}{size}"
            case 1:
                title = f"{self.brand} {line}{cut}{self.noun} in {self.colour} {cloth}"
                title = title.rstrip() + (f" for {self.whose}" if whose else "") + size
            case 2:
                title = f"{whose}{cut}{cloth}{self.noun} by {self.brand}{f' - {line}'.rstrip() if line else ''}, "
                title += self.colour
            case _:
                title = f"{self.brand} {line}{self.noun} - {cloth}{cut}{whose}{self.colour}{size}"
        if not self.colour:  # nothing stands before or behind it that it left over
            title = re.sub(r"[ ,]*,", ",", title).replace(" in for ", " for ").replace(" in, ", ", ").strip(" ,-")
            title = title.removesuffix(" in")
        return " ".join(title.split())

    def without_colour(self) -> _Title:
        """Return a title that does not tell the colour."""
        return replace(self, colour="")

    def write_zh(self) -> str:
        """Return it as Chinese shops write it."""
        return " ".join(demo_words_zh.write_title(**vars(self)).split())


@dataclass(frozen=True)
class Item:
    """What the shop knows of an item; style and tier are hidden from the dataset."""

    parts: _Title
    category: tuple[str, ...]
    slot: str
    gender: str
    style: str
    tier: int
    season: str
    colour: str
    palette: str
    brand: str
    fabric: str | None
    cents: int
    description: tuple[str, ...]
    stock: int
    appeal: float
    arrival: bool  # not yet in any outfit


@dataclass(frozen=True)
class User:
    gender: str
    styles: tuple[str, str]
    tier: int


Weigh: TypeAlias = Callable[[Sequence[Item], int, str, str, Sequence[int]], float]
"""How much a row of some items suits a style, a palette, and the rows that an outfit has already."""


class Dice:
    """Draws that are the same on every platform and Python: all of them go through `random.Random.random`."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def pick(self, options: Sequence[_T]) -> _T:
        return options[self.below(len(options))]

    def weigh(self, options: Sequence[_T], weights: Sequence[float]) -> _T:
        total = 0.0
        sums = []
        for weight in weights:
            total += weight
            sums.append(total)
        mark = self._random() * total
        for option, reached in zip(options, sums, strict=True):
            if mark < reached:
                return option
        return options[-1]


def main() -> None:
    made = [(FOLDER, name, columns) for name, columns in make_tables().items()]
    made += [(FOLDER_ZH, name, columns) for name, columns in make_tables(language="zh").items() if name in TABLES_ZH]
    for folder, name, columns in made:
        folder.mkdir(exist_ok=True)
        table, file = pa.table(columns), folder / f"{name}.parquet"
        pq.write_table(table, file, compression="zstd", compression_level=19)
        print(f"{folder.name}/{name}: {table.num_rows:,} rows, {file.stat().st_size:,} bytes")


def make_tables(seed: int = 0, language: Literal["en", "zh"] = "en") -> dict[str, dict[str, list[Any]]]:
    """Return the shop as the tables of a data folder: about 1,000 items, 400 users, 600 outfits, 12,000 purchases.

    Args:
        seed: the same seed gives the same tables on every platform; the package ships that of 0.
        language: of the words; everything else is the same.
    """
    return draw_shop(seed, language)[0]


def draw_shop(
    seed: int = 0, language: Literal["en", "zh"] = "en", weigh: Weigh | None = None
) -> tuple[dict[str, dict[str, list[Any]]], list[Item]]:
    """Return the tables of a shop and its items; see `make_tables`.

    Args:
        weigh: how much an item suits the style and palette of an outfit and the rows in it; None is the demo's way.
    """

    def tell(word: str | None) -> str | None:
        return demo_words_zh.WORDS[word] if word and language == "zh" else word

    dice = Dice(seed)
    items = _stock_shelves(dice)
    users = [_invent_user(dice) for _ in range(_USERS)]
    shelves: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, item in enumerate(items):
        shelves[item.gender, item.slot].append(row)

    outfits: list[list[int]] = []
    owners: list[int] = []
    names: list[tuple[str, str, str]] = []
    days: list[int] = []
    for _ in range(_OUTFITS):
        owner = dice.below(_USERS)
        day = dice.below(_DAYS)
        members, name = _put_together(dice, users[owner], _season_of(day), items, shelves, weigh or _suit)
        outfits.append(members)
        owners.append(owner)
        names.append(name)
        days.append(day)

    rows = _purchases(dice, items, users, outfits, owners, days)
    item_ids = [f"F{row + 1:04d}" for row in range(len(items))]
    user_ids = [f"U{row + 1:03d}" for row in range(_USERS)]
    bundle_ids = [f"O{row + 1:03d}" for row in range(_OUTFITS)]
    tables: dict[str, dict[str, list[Any]]] = {
        "items": {
            "item_id": item_ids,
            "title": [item.parts.write_zh() if language == "zh" else item.parts.write() for item in items],
            "category": [" > ".join(str(tell(part)) for part in item.category) for item in items],
            "slot": [item.slot for item in items],
            "price": [item.cents / 100 for item in items],
            "description": [
                ("。" if language == "zh" else ". ").join(str(tell(part)) for part in item.description) or None
                for item in items
            ],
            "brand": [tell(item.brand) for item in items],
            "colour": [tell(item.colour) for item in items],
            "fabric": [tell(item.fabric) for item in items],
            "season": [tell(item.season) for item in items],
            "stock": [item.stock for item in items],
        },
        "bundles": {
            "bundle_id": [bundle_ids[row] for row, members in enumerate(outfits) for _ in members],
            "item_id": [item_ids[item] for members in outfits for item in members],
        },
        "bundle_meta": {
            "bundle_id": bundle_ids,
            "name": [
                demo_words_zh.write_bundle(*name) if language == "zh" else "{} {} for {}".format(*name)
                for name in names
            ],
            "user_id": [user_ids[owner] for owner in owners],
            "timestamp": [_moment(_START + day * 86_400 + 43_200) for day in days],
            "basket_id": [f"B{row:05d}" for row in range(_OUTFITS)],
        },
        "interactions": {
            "user_id": [user_ids[user] if user >= 0 else None for user, _, _, _ in rows],
            "basket_id": [f"B{basket:05d}" for _, _, _, basket in rows],
            "item_id": [item_ids[item] for _, item, _, _ in rows],
            "timestamp": [_moment(time) for _, _, time, _ in rows],
        },
    }
    return tables, items


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)


def _stock_shelves(dice: Dice) -> list[Item]:
    items = [
        _make_item(dice, gender, slot)
        for gender, slots in _ITEMS_PER_SLOT.items()
        for slot, count in slots.items()
        for _ in range(count)
    ]
    # Mixed, so that a row number says nothing of what an item is.
    order = sorted((dice.below(1 << 30), row) for row in range(len(items)))
    return [items[row] for _, row in order]


def _make_item(dice: Dice, gender: str, slot: str) -> Item:
    department = DEPARTMENTS[slot]
    brand = dice.pick(BRANDS[department])
    style = brand.styles[0] if dice.chance(0.85) else brand.styles[1]
    fitting = [kind for kind in KINDS[slot] if gender in kind.genders]
    in_style = [kind for kind in fitting if style in kind.styles]
    kind = dice.pick(in_style if in_style and dice.chance(0.8) else fitting)
    season = kind.season if kind.season != "any" else dice.pick(("spring-summer", "autumn-winter", "all-year"))
    palette = "neutral" if dice.chance(0.4) else dice.weigh(*PALETTES[style])
    colour = dice.pick(COLOURS[palette])
    summer = season == "spring-summer" or (season == "all-year" and dice.chance(0.5))
    fabric = dice.pick(FABRICS[department][style][0 if summer else 1])
    cents = _price(dice, slot, brand.tier)
    title = _title(dice, gender, style, brand, kind, colour, fabric)
    return Item(
        parts=title,
        category=(department, gender, kind.group, kind.leaf),
        slot=slot,
        gender=gender,
        style=style,
        tier=brand.tier,
        season=season,
        colour=colour,
        palette=palette,
        brand=brand.name,
        fabric=title.cloth or None,
        cents=cents,
        description=(fabric, dice.pick(CARE)) if dice.chance(0.5) else (),
        stock=0 if dice.chance(0.04) else 3 + dice.below(80),
        appeal=(0.7, 0.85, 1.0, 1.2, 1.4)[dice.below(5)],
        arrival=dice.chance(0.12),
    )


def _price(dice: Dice, slot: str, tier: int) -> int:
    """Return cents that end in 0 or 95, around the slot's price, doubled with each tier."""
    whole = SLOT_PRICES[slot] * (5, 10, 20)[tier] * (80 + dice.below(60)) // 1000
    return whole * 100 + (95 if dice.chance(0.6) else 0)


def _title(dice: Dice, gender: str, style: str, brand: Brand, kind: Kind, colour: str, fabric: str) -> _Title:
    """Draw what a title tells."""
    cut = dice.pick(CUTS[DEPARTMENTS[kind.slot]][style]) if dice.chance(0.45) else ""
    cloth = fabric if dice.chance(0.7) else ""
    whose = gender if dice.chance(0.75) else ""
    line = dice.pick(LINES[style]) if dice.chance(0.45) else ""
    size = dice.pick(kind.sizes) if kind.sizes and dice.chance(0.3) else ""
    return _Title(dice.below(4), brand.name, whose, line, cloth, cut, kind.noun, colour, size)


def _invent_user(dice: Dice) -> User:
    gender = "Women" if dice.chance(0.64) else "Men"
    first = dice.pick(STYLES)
    return User(gender, (first, dice.pick([style for style in STYLES if style != first])), dice.below(3))


def _season_of(day: int) -> str:
    return "spring-summer" if 75 <= day % 365 < 260 else "autumn-winter"


def _suit(items: Sequence[Item], row: int, style: str, palette: str, members: Sequence[int]) -> float:
    item = items[row]
    suits = 1.0 if item.palette == palette else 0.7 if item.palette == "neutral" else 0.1
    return (1.0 if item.style == style else 0.004) * suits


def _put_together(
    dice: Dice, user: User, season: str, items: list[Item], shelves: dict[tuple[str, str], list[int]], weigh: Weigh
) -> tuple[list[int], tuple[str, str, str]]:
    """Return the rows of one outfit and its name: what it leads with, what it is, what for."""
    style = user.styles[0] if dice.chance(0.75) else user.styles[1]
    palette = dice.weigh(*PALETTES[style])
    slots = ["dress", "shoes"] if user.gender == "Women" and dice.chance(0.35) else ["top", "bottom", "shoes"]
    if dice.chance(0.55):
        slots.append("bag")
    if dice.chance(0.8 if season == "autumn-winter" else 0.2):
        slots.append("outerwear")
    if dice.chance(0.45) or len(slots) == 2:
        slots.append("accessory")

    members: list[int] = []
    for slot in slots:
        rows = [row for row in shelves[user.gender, slot] if not items[row].arrival]
        used = {items[row].brand for row in members}
        weights = [
            items[row].appeal
            * weigh(items, row, style, palette, members)
            * (1.0 if items[row].season in (season, "all-year") else 0.01)
            * (1.0, 0.6, 0.15)[abs(items[row].tier - user.tier)]
            * (0.25 if items[row].brand in used else 1.0)
            for row in rows
        ]
        members.append(dice.weigh(rows, weights))

    lead = next((fabric for row in members if (fabric := items[row].fabric)), items[members[0]].colour)
    occasion = dice.pick(OCCASIONS[style][0 if season == "spring-summer" else 1])
    return members, (lead, dice.pick(("look", "outfit", "set")), occasion)


def _purchases(
    dice: Dice,
    items: list[Item],
    users: list[User],
    outfits: list[list[int]],
    owners: list[int],
    days: list[int],
) -> list[tuple[int, int, float, int]]:
    """Return (user, item, time, basket) rows in time order: each outfit bought by its owner, and much besides."""
    by_taste: dict[tuple[str, str], list[int]] = defaultdict(list)
    by_gender: dict[str, list[int]] = defaultdict(list)
    for row, item in enumerate(items):
        by_taste[item.gender, item.style].append(row)
        by_gender[item.gender].append(row)

    rows: list[tuple[int, int, float, int]] = []
    for basket, (members, owner, day) in enumerate(zip(outfits, owners, days, strict=True)):
        moment = float(_START + day * 86_400 + 43_200)
        rows.extend((owner, row, moment, basket) for row in members)
    basket = len(outfits)
    bought = 0
    while bought < _PURCHASES:
        person = dice.below(len(users))
        user = users[person]
        # One basket in fifty is a guest's: nobody knows whose.
        shown = -1 if dice.chance(0.02) else person
        moment = float(_START + dice.below(_DAYS) * 86_400 + 28_800 + dice.below(43_200))
        for _ in range(1 + dice.below(4)):
            taste = user.styles[0] if dice.chance(0.7) else user.styles[1]
            row = dice.pick(by_taste[user.gender, taste] if dice.chance(0.75) else by_gender[user.gender])
            rows.append((shown, row, moment, basket))
            bought += 1
        basket += 1
    return sorted(rows, key=lambda one: (one[2], one[3], one[1]))


if __name__ == "__main__":
    main()
