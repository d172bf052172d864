"""Drawings of the demo's items: a silhouette by slot, filled with a colour and a pattern on white.

Owns how a thing is drawn; what is drawn is told by the demo's table. Nothing is stored: a drawing is made when it is
read, and the same on every machine with the same Pillow.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from peft_combo.data.pictures.decoding import require_pillow

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

EDGE = 96
"""Pixels a side."""

COLOURS = {
    "Black": "#1b1b1d", "White": "#f4f4f2", "Ivory": "#efe6cf", "Stone": "#b9b0a2", "Charcoal": "#45474b",
    "Navy": "#1f2c4d", "Rust": "#a4492a", "Olive": "#6b6b3a", "Ochre": "#c68a2b", "Terracotta": "#c2694a",
    "Sand": "#d3b98c", "Chestnut": "#6f3f2a", "Sage": "#a9bca0", "Blush": "#ecc3c1", "Lilac": "#c6b3df",
    "Powder Blue": "#b3cfe6", "Butter": "#f5e7a4", "Mint": "#b5e3cc", "Cobalt": "#1f4fd1", "Fuchsia": "#d81b87",
    "Scarlet": "#d8241f", "Tangerine": "#f58220", "Lime": "#a4d42a", "Turquoise": "#1fb8b4", "Burgundy": "#6a1a2f",
    "Forest Green": "#1f4d33", "Plum": "#58264f", "Ink": "#232a44", "Teal": "#155e63", "Aubergine": "#3d1f3a",
}  # fmt: skip
PATTERNS = ("plain", "stripes", "checks", "dots", "waves")

# Outlines in a square of side 1, from the top left.
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "top": [(0.3, 0.15), (0.7, 0.15), (0.95, 0.35), (0.83, 0.5), (0.72, 0.42), (0.72, 0.88), (0.28, 0.88),
            (0.28, 0.42), (0.17, 0.5), (0.05, 0.35)],
    "bottom": [(0.28, 0.08), (0.72, 0.08), (0.8, 0.95), (0.57, 0.95), (0.5, 0.35), (0.43, 0.95), (0.2, 0.95)],
    "dress": [(0.36, 0.06), (0.64, 0.06), (0.62, 0.38), (0.88, 0.94), (0.12, 0.94), (0.38, 0.38)],
    "outerwear": [(0.28, 0.06), (0.72, 0.06), (0.98, 0.7), (0.84, 0.76), (0.74, 0.46), (0.8, 0.96), (0.2, 0.96),
                  (0.26, 0.46), (0.16, 0.76), (0.02, 0.7)],
    "shoes": [(0.06, 0.3), (0.36, 0.3), (0.5, 0.52), (0.92, 0.62), (0.96, 0.8), (0.06, 0.8)],
    "bag": [(0.14, 0.4), (0.3, 0.4), (0.36, 0.14), (0.64, 0.14), (0.7, 0.4), (0.86, 0.4), (0.92, 0.92), (0.08, 0.92)],
    "accessory": [(0.5, 0.12), (0.82, 0.3), (0.88, 0.62), (0.66, 0.88), (0.34, 0.88), (0.12, 0.62), (0.18, 0.3)],
}  # fmt: skip


@dataclass(frozen=True)
class DrawnPicture:
    """A picture that is drawn when it is read.

    Attributes:
        slot: its silhouette. colour: of `COLOURS`. pattern: of `PATTERNS`. number: draws size, tilt and spacing.
    """

    slot: str
    colour: str
    pattern: str
    number: int

    @classmethod
    def parse(cls, told: str) -> DrawnPicture:
        """Read what `key` writes.

        Raises:
            ValueError: it is something else.
        """
        slot, colour, pattern, number = told.split("/")
        if slot not in _OUTLINES or colour not in COLOURS or pattern not in PATTERNS:
            raise ValueError(f"no drawing is called {told!r}")
        return cls(slot, colour, pattern, int(number))

    @property
    def name(self) -> str:
        return f"{self.slot} {self.number}"

    @property
    def key(self) -> str:
        return f"{self.slot}/{self.colour}/{self.pattern}/{self.number}"

    @cached_property
    def _png(self) -> bytes:
        require_pillow()
        file = io.BytesIO()
        draw_item(self).save(file, "PNG")
        return file.getvalue()

    def read(self) -> bytes:
        """Return it as PNG.

        Raises:
            DataError: Pillow is not installed.
        """
        return self._png


def draw_item(item: DrawnPicture) -> Image:
    """Draw an item: `EDGE` pixels a side, RGB."""
    from PIL import Image, ImageDraw

    dice = random.Random(item.number)
    scale, lean = 0.8 + 0.18 * dice.random(), 0.08 * (dice.random() - 0.5)
    left, top = ((1 - scale) * dice.random() for _ in range(2))
    outline = [
        (EDGE * (left + scale * (x + lean * (1 - y))), EDGE * (top + scale * y)) for x, y in _OUTLINES[item.slot]
    ]
    mask = Image.new("L", (EDGE, EDGE), 0)
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    cloth = Image.new("RGB", (EDGE, EDGE), COLOURS[item.colour])
    red, green, blue = (int(COLOURS[item.colour][place : place + 2], 16) for place in (1, 3, 5))
    other = -70 if red + green + blue > 380 else 80  # lighter on dark cloth, darker on light
    ink = tuple(min(255, max(0, part + other)) for part in (red, green, blue))
    _PATTERNS[item.pattern](ImageDraw.Draw(cloth), ink, 8 + dice.randrange(5))
    picture = Image.new("RGB", (EDGE, EDGE), "white")
    picture.paste(cloth, (0, 0), mask)
    ImageDraw.Draw(picture).polygon(outline, outline="#8a8a8a")
    return picture


def _leave_plain(draw: ImageDraw, ink: tuple[int, ...], step: int) -> None:
    pass


def _draw_stripes(draw: ImageDraw, ink: tuple[int, ...], step: int) -> None:
    for place in range(0, EDGE, step):
        draw.rectangle((0, place, EDGE, place + step // 3), fill=ink)


def _draw_checks(draw: ImageDraw, ink: tuple[int, ...], step: int) -> None:
    for row in range(0, EDGE, step):
        for column in range(row // step % 2 * step, EDGE, 2 * step):
            draw.rectangle((column, row, column + step - 1, row + step - 1), fill=ink)


def _draw_dots(draw: ImageDraw, ink: tuple[int, ...], step: int) -> None:
    for row in range(0, EDGE, step):
        for column in range(row // step % 2 * step // 2, EDGE, step):
            draw.ellipse((column, row, column + step // 2, row + step // 2), fill=ink)


def _draw_waves(draw: ImageDraw, ink: tuple[int, ...], step: int) -> None:
    for start in range(-EDGE, EDGE, step):
        line = [(start + x, x + (step // 2 if x // step % 2 else 0)) for x in range(0, 2 * EDGE, step // 2)]
        draw.line(line, fill=ink, width=2)


_PATTERNS: dict[str, Callable[[ImageDraw, tuple[int, ...], int], None]] = {
    "plain": _leave_plain, "stripes": _draw_stripes, "checks": _draw_checks, "dots": _draw_dots, "waves": _draw_waves,
}  # fmt: skip
