"""Makes the demo with pictures, a synthetic fashion shop whose outfits match by looks: peft_combo/data/demo_pictures.

    python tools/make_demo_pictures.py

Owns what is hidden from texts: an item's pattern is told by no text, its colour by half of the titles alone, and
outfits keep to one pattern and one family of colours. The pictures, which show both, are not stored: the table names
what is drawn (`peft_combo.data.pictures.drawing`). Everything else is the shop of `make_demo`. Figures measured on it
say that the machinery reads pictures, never that pictures help on real data: here they do by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from make_demo import Dice, Item, draw_shop

from peft_combo.data.pictures.drawing import PATTERNS, DrawnPicture

FOLDER = Path(__file__).resolve().parent.parent / "peft_combo" / "data" / "demo_pictures"


@dataclass(frozen=True)
class _Look:
    pattern: str
    colour_told: bool


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, columns in make_tables().items():
        table, file = pa.table(columns), FOLDER / f"{name}.parquet"
        pq.write_table(table, file, compression="zstd", compression_level=19)
        print(f"{FOLDER.name}/{name}: {table.num_rows:,} rows, {file.stat().st_size:,} bytes")


def make_tables(seed: int = 0) -> dict[str, dict[str, list[Any]]]:
    """Return the shop as tables: as many items, users, outfits and purchases as `make_demo.make_tables`.

    `image` names what is drawn, `colour` is left out, and half of the titles name no colour.
    """
    dice = Dice(1_000_003 * (seed + 1))
    looks = [_Look(dice.pick(PATTERNS), dice.chance(0.5)) for _ in range(1000)]

    def weigh(items: Sequence[Item], row: int, style: str, palette: str, members: Sequence[int]) -> float:
        item, first = items[row], members[0] if members else row
        return (
            (1.0 if item.style == style else 0.15)
            * (1.0 if item.palette == items[first].palette else 0.02)
            * (1.0 if looks[row].pattern == looks[first].pattern else 0.02)
        )

    tables, items = draw_shop(seed, weigh=weigh)
    shown = tables["items"]
    shown["title"] = [
        (item.parts if look.colour_told else item.parts.without_colour()).write()
        for item, look in zip(items, looks, strict=True)
    ]
    del shown["colour"]
    shown["image"] = [
        DrawnPicture(item.slot, item.colour, look.pattern, row).key
        for row, (item, look) in enumerate(zip(items, looks, strict=True))
    ]
    return tables


if __name__ == "__main__":
    main()
