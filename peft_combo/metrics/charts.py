"""Charts in a file: HTML that needs nothing, or PNG by matplotlib (extra `plot`).

Owns how bars, points and curves are drawn. Knows nothing of what they measure.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, assert_never

from peft_combo.errors import PeftComboError
from peft_combo.files import write_text

_PLAIN, _MARKED, _FAINT = "#4c78a8", "#0b6e4f", "#b8c4d6"


@dataclass(frozen=True)
class Bar:
    """One bar with its interval."""

    name: str
    value: float
    low: float
    high: float
    marked: bool = False


@dataclass(frozen=True)
class Bars:
    """Bars from zero, the first on top."""

    title: str
    bars: Sequence[Bar]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Point:
    """One named point; `low` and `high` are the ends of its interval in y, equal to `y` where there is none."""

    name: str
    x: float
    y: float
    low: float
    high: float
    marked: bool = False


@dataclass(frozen=True)
class Curve:
    """A line through points in order of x; a `faint` one lies behind and does not set the scale."""

    xs: Sequence[float]
    ys: Sequence[float]
    faint: bool = False


@dataclass(frozen=True)
class Plane:
    """Points, curves and named places of a logarithmic x axis; every x is above zero."""

    title: str
    x_label: str
    y_label: str
    points: Sequence[Point] = ()
    curves: Sequence[Curve] = ()
    places: Sequence[tuple[str, float]] = ()
    notes: Sequence[str] = ()


Chart: TypeAlias = Bars | Plane


def check_ending(path: Path) -> Path:
    """Return a path that `draw` can write to; ask before a long job, not after it.

    Raises:
        PeftComboError: another ending than .html and .png, or .png without matplotlib.
    """
    match path.suffix.lower():
        case ".html":
            return path
        case ".png":
            try:
                import matplotlib.figure  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
            except ImportError as error:
                raise PeftComboError(
                    f'Writing {path.name} needs matplotlib. Install it with: pip install "peft-combo[plot]", or write '
                    ".html, which needs nothing."
                ) from error
            return path
        case other:
            raise PeftComboError(f"A chart is written as .html or .png, found {other!r} in {path.name}.")


def draw(chart: Chart, path: Path) -> None:
    """Write a chart: ``.html`` (nothing needed) or ``.png`` (extra `plot`).

    Raises:
        PeftComboError: see `check_ending`; or the file cannot be written.
    """
    check_ending(path)
    if path.suffix.lower() == ".html":
        write_text(path, _html(chart))
    else:
        _png(chart, path)


# HTML: one SVG and the notes below it.


def _html(chart: Chart) -> str:
    match chart:
        case Bars():
            drawing = _bars_svg(chart)
        case Plane():
            drawing = _plane_svg(chart)
        case _:
            assert_never(chart)
    title = html.escape(chart.title)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f'<body style="font:14px system-ui,sans-serif">\n<h1 style="font-size:18px">{title}</h1>\n'
        + drawing
        + "".join(f"<p>{html.escape(note)}</p>\n" for note in chart.notes)
        + "</body></html>\n"
    )


def _svg(width: int, height: int, drawn: Iterable[str]) -> str:
    head = f'<svg width="{width}" height="{height}" role="img" font-size="13" fill="#222">\n'
    return head + "\n".join(drawn) + "\n</svg>\n"


def _bars_svg(chart: Bars) -> str:
    top = max((bar.high for bar in chart.bars), default=0.0) or 1.0
    left, width, step = 190, 520, 26
    drawn = []
    for place, bar in enumerate(chart.bars):
        y = 12 + place * step
        end, first, last = (left + width * number / top for number in (bar.value, bar.low, bar.high))
        drawn.append(
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{html.escape(bar.name)}</text>'
            f'<rect x="{left}" y="{y}" width="{max(0.0, end - left):.1f}" height="16" fill="{_colour(bar.marked)}"/>'
            f'<path d="M{first:.1f} {y + 8}H{last:.1f}M{first:.1f} {y + 4}v8M{last:.1f} {y + 4}v8" stroke="#222"/>'
            f'<text x="{last + 6:.1f}" y="{y + 13}">{bar.value:.4f}</text>'
        )
    return _svg(left + width + 90, 24 + step * len(chart.bars), drawn)


def _plane_svg(chart: Plane) -> str:
    left, top, width, height = 80, 24, 560, 340
    (x_low, x_high), (y_low, y_high) = _x_range(chart), _y_range(chart)

    def across(x: float) -> float:
        return left + width * (math.log10(x) - x_low) / (x_high - x_low)

    def down(y: float) -> float:
        held = min(max(y, y_low), y_high) if math.isfinite(y) else y_high
        return top + height * (y_high - held) / (y_high - y_low)

    drawn = [f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>']
    for exponent in range(math.ceil(x_low), math.floor(x_high) + 1):
        x = across(10.0**exponent)
        drawn.append(
            f'<path d="M{x:.1f} {top}v{height}" stroke="#e6e6e6"/>'
            f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{10.0**exponent:,.6g}</text>'
        )
    for value in _ticks(y_low, y_high):
        y = down(value)
        drawn.append(
            f'<path d="M{left} {y:.1f}h{width}" stroke="#e6e6e6"/>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        )
    for name, x in chart.places:
        drawn.append(
            f'<path d="M{across(x):.1f} {top}v{height}" stroke="{_MARKED}" stroke-dasharray="5 4"/>'
            f'<text x="{across(x):.1f}" y="{top - 8}" text-anchor="middle" fill="{_MARKED}">{html.escape(name)}</text>'
        )
    for curve in sorted(chart.curves, key=lambda one: not one.faint):
        path = "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in zip(curve.xs, curve.ys, strict=True))
        colour = _FAINT if curve.faint else _PLAIN
        drawn.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{1 if curve.faint else 2}"/>')
    free = -math.inf  # the lowest line that is already written on, going down
    for point in sorted(chart.points, key=lambda one: -one.y):
        x, y = across(point.x), down(point.y)
        first, last = down(point.high), down(point.low)
        free = max(free + 15, y + 4)
        drawn.append(
            f'<path d="M{x:.1f} {first:.1f}V{last:.1f}M{x - 4:.1f} {first:.1f}h8M{x - 4:.1f} {last:.1f}h8" '
            f'stroke="#222"/><circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{_colour(point.marked)}"/>'
            f'<path d="M{x + 6:.1f} {y:.1f}L{left + width + 10} {free - 4:.1f}" stroke="#ccc"/>'
            f'<text x="{left + width + 14}" y="{free:.1f}">{html.escape(point.name)} {point.y:.4f}</text>'
        )
    bottom = top + height + 42
    drawn.append(f'<text x="{left + width / 2}" y="{bottom}" text-anchor="middle">{html.escape(chart.x_label)}</text>')
    drawn.append(
        f'<text x="18" y="{top + height / 2}" text-anchor="middle" transform="rotate(-90 18 {top + height / 2})">'
        f"{html.escape(chart.y_label)}</text>"
    )
    room = 9 * max((len(point.name) + 8 for point in chart.points), default=2)
    return _svg(left + width + 20 + room, max(bottom + 14, math.ceil(max(free, 0)) + 14), drawn)


def _colour(marked: bool) -> str:
    return _MARKED if marked else _PLAIN


def _x_range(chart: Plane) -> tuple[float, float]:
    """Return the exponents of ten between which everything lies, with a little room."""
    found = [point.x for point in chart.points] + [x for curve in chart.curves for x in curve.xs]
    exponents = [math.log10(x) for x in (*found, *(x for _, x in chart.places))] or [0.0]
    room = 0.05 * (max(exponents) - min(exponents)) or 0.5
    return min(exponents) - room, max(exponents) + room


def _y_range(chart: Plane) -> tuple[float, float]:
    found = [y for point in chart.points for y in (point.low, point.high)]
    found += [y for curve in chart.curves if not curve.faint for y in curve.ys if math.isfinite(y)]
    low, high = min(found, default=0.0), max(found, default=1.0)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Return some five round numbers between the ends."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * min((1, 2, 5, 10), key=lambda factor: abs(factor * unit - rough))
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


# PNG.


def _png(chart: Chart, path: Path) -> None:
    from matplotlib.figure import Figure

    match chart:
        case Bars():
            figure = Figure(figsize=(9, 1 + 0.35 * len(chart.bars)), layout="constrained")
            _bars_axes(chart, figure.subplots())
        case Plane():
            figure = Figure(figsize=(9, 5), layout="constrained")
            _plane_axes(chart, figure.subplots())
        case _:
            assert_never(chart)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise PeftComboError(f"{path} cannot be written: {error.strerror or error}.") from error


def _bars_axes(chart: Bars, axes: Any) -> None:
    bars = chart.bars
    errors = [[max(0.0, bar.value - bar.low) for bar in bars], [max(0.0, bar.high - bar.value) for bar in bars]]
    colours = [_colour(bar.marked) for bar in bars]
    axes.barh([bar.name for bar in bars], [bar.value for bar in bars], xerr=errors, color=colours)
    axes.invert_yaxis()
    axes.set_title(chart.title)


def _plane_axes(chart: Plane, axes: Any) -> None:
    for curve in chart.curves:
        axes.plot(curve.xs, curve.ys, color=_FAINT if curve.faint else _PLAIN, zorder=0 if curve.faint else 1)
    for point in chart.points:
        error = [[max(0.0, point.y - point.low)], [max(0.0, point.high - point.y)]]
        axes.errorbar(point.x, point.y, yerr=error, fmt="o", color=_colour(point.marked), capsize=3)
        axes.annotate(f" {point.name}", (point.x, point.y), textcoords="offset points", xytext=(6, 4))
    for name, x in chart.places:
        axes.axvline(x, color=_MARKED, linestyle="--")
        axes.annotate(name, (x, 1.0), xycoords=("data", "axes fraction"), color=_MARKED, ha="center", va="bottom")
    axes.set_xscale("log")
    axes.set_ylim(*_y_range(chart))
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.set_title(chart.title, pad=18 if chart.places else 6)
