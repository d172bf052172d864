"""Charts in a file, by matplotlib: PNG, SVG, or a page of HTML around an SVG that needs nothing from elsewhere.

Owns how bars, points and curves are drawn. Knows nothing of what they measure.
"""

from __future__ import annotations

import html
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias, assert_never

from peft_combo.errors import PeftComboError, make_printable
from peft_combo.files import atomic_file, check_file_target

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
        PeftComboError: another ending than .html, .svg and .png, matplotlib is missing, or the file cannot be written.
    """
    if path.suffix.lower() not in (".html", ".svg", ".png"):
        raise PeftComboError(f"A chart is written as .html, .svg or .png, found {path.suffix!r} in {path.name}.")
    if find_spec("matplotlib") is None:
        raise PeftComboError("A chart needs matplotlib. Install it with: pip install matplotlib")
    return check_file_target(path)


def draw(chart: Chart, path: Path) -> None:
    """Write a chart as ``.html``, ``.svg`` or ``.png``.

    Raises:
        PeftComboError: another ending, or the file cannot be written.
    """
    ending = check_ending(path).suffix.lower()
    try:
        content = (
            _render_page(chart).encode() if ending == ".html" else render(chart, "svg" if ending == ".svg" else "png")
        )
    except ImportError as error:
        raise PeftComboError(f"A chart needs matplotlib, which cannot be loaded: {error}.") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as stream:
            stream.write(content)
    except OSError as error:
        raise PeftComboError(f"{path} cannot be written: {error.strerror or error}.") from error


def _render_page(chart: Chart) -> str:
    """Return a page with the drawing and the notes below it; its words stay words, which a browser has fonts for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        svg = render(chart, "svg").decode()
    title = html.escape(chart.title)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        '<body style="font:14px system-ui,sans-serif">\n'
        + svg[svg.index("<svg") :]
        + "".join(f"<p>{html.escape(note)}</p>\n" for note in chart.notes)
        + "</body></html>\n"
    )


def render(chart: Chart, form: Literal["png", "svg"]) -> bytes:
    """Return the drawing of a chart; the words of an SVG stay words."""
    import matplotlib
    from matplotlib.figure import Figure

    match chart:
        case Bars():
            figure = Figure(figsize=(9, 1 + 0.35 * len(chart.bars)), layout="constrained")
            _draw_bars(chart, figure.subplots())
        case Plane():
            figure = Figure(figsize=(10, 5), layout="constrained")
            _draw_plane(chart, figure.subplots())
        case _:
            assert_never(chart)
    stream = io.BytesIO()
    # Text stays text, and the same chart gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "peft-combo"}):
        figure.savefig(stream, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return stream.getvalue()


def _draw_bars(chart: Bars, axes: Any) -> None:
    bars = chart.bars
    errors = [[max(0.0, bar.value - bar.low) for bar in bars], [max(0.0, bar.high - bar.value) for bar in bars]]
    drawn = axes.barh(
        range(len(bars)), [bar.value for bar in bars], xerr=errors, color=[_colour(b.marked) for b in bars]
    )
    axes.bar_label(drawn, [f"{bar.value:.4f}" for bar in bars], padding=4)
    axes.set_yticks(range(len(bars)), [_escape_math(bar.name) for bar in bars])
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_title(_escape_math(chart.title))


def _draw_plane(chart: Plane, axes: Any) -> None:
    for curve in chart.curves:
        axes.plot(curve.xs, curve.ys, color=_FAINT if curve.faint else _PLAIN, zorder=0 if curve.faint else 1)
    low, high = _y_range(chart)
    free = math.inf  # names stand right of the points, one a line, from the best down
    for point in sorted(chart.points, key=lambda one: -one.y):
        error = [[max(0.0, point.y - point.low)], [max(0.0, point.high - point.y)]]
        axes.errorbar(point.x, point.y, yerr=error, fmt="o", color=_colour(point.marked), capsize=3)
        free = min(free - 0.055, (point.y - low) / (high - low))
        axes.annotate(
            f"{_escape_math(point.name)} {point.y:.4f}", (point.x, point.y), xytext=(1.02, free),
            textcoords="axes fraction", va="center", arrowprops={"arrowstyle": "-", "color": "#cccccc"},
        )  # fmt: skip
    for name, x in chart.places:
        axes.axvline(x, color=_MARKED, linestyle="--")
        axes.annotate(
            _escape_math(name), (x, 1.0), xycoords=("data", "axes fraction"), color=_MARKED, ha="center", va="bottom"
        )
    axes.set_xscale("log")
    axes.set_ylim(low, high)
    axes.set_xlabel(_escape_math(chart.x_label))
    axes.set_ylabel(_escape_math(chart.y_label))
    axes.set_title(_escape_math(chart.title), pad=18 if chart.places else 6)


def _escape_math(text: str) -> str:
    """Keep what stands between two dollar signs from being read as a formula, and control characters out of the SVG."""
    return make_printable(text).replace("$", r"\$")


def _colour(marked: bool) -> str:
    return _MARKED if marked else _PLAIN


def _y_range(chart: Plane) -> tuple[float, float]:
    found = [y for point in chart.points for y in (point.low, point.high)]
    found += [y for curve in chart.curves if not curve.faint for y in curve.ys if math.isfinite(y)]
    low, high = min(found, default=0.0), max(found, default=1.0)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room
