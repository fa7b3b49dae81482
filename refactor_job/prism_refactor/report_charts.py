"""Charts of the report as inline SVG: lines over two scales, and heat maps.

Knows numbers and geometry; must not know what they stand for. Colours are CSS classes, so the page
decides what they look like on light and on dark. The decision worth arguing about: cells of a heat
map are drawn as one path per shade, not one element per cell, because a model may have 100 000 of
them and a browser should still open the page.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_LEFT: Final = 58
_RIGHT: Final = 24
_TOP: Final = 12
_BOTTOM: Final = 46
SHADES: Final = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis: values of ``ticks`` are written; all values are clamped to the ends."""

    label: str
    ticks: tuple[float, ...]  # rising; the first and the last are the ends
    unit: str = ""
    log: bool = False
    low: float | None = None  # an end before the first tick

    def place(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        low = self.ticks[0] if self.low is None else self.low
        clamped = min(max(value, low), self.ticks[-1])
        ends = (low, clamped, self.ticks[-1])
        first, at, last = (math.log(v) for v in ends) if self.log else ends
        return (at - first) / (last - first)


@dataclass(frozen=True, slots=True)
class Line:
    """One series. ``kind`` is the CSS class of its colour; ``spans`` are error bars."""

    label: str
    kind: str
    points: Sequence[tuple[float, float]]
    spans: Sequence[tuple[float, float]] = ()
    names: Sequence[str] = ()  # written beside the points; "" for none
    below: bool = False  # names below the points
    dashed: bool = False
    dots: bool = True


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over two scales; ``title`` is for those who cannot see it."""

    title: str
    x: Scale
    y: Scale
    lines: Sequence[Line]
    width: int = 720
    height: int = 380

    def svg(self) -> str:
        """The chart, with its legend below."""
        parts = [*self._grid(), *(part for line in self.lines for part in self._line(line))]
        legend = "".join(
            f'<span><svg viewBox="0 0 28 10"><line class="line {line.kind}'
            f'{" dashed" if line.dashed else ""}" x1="1" x2="27" y1="5" y2="5"/></svg>'
            f"{escape(line.label)}</span>"
            for line in self.lines
        )
        return (
            f'<figure><svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(self.title)}">{"".join(parts)}</svg>'
            f"<figcaption>{legend}</figcaption></figure>"
        )

    def _x(self, value: float) -> float:
        return _LEFT + self.x.place(value) * (self.width - _LEFT - _RIGHT)

    def _y(self, value: float) -> float:
        return self.height - _BOTTOM - self.y.place(value) * (self.height - _TOP - _BOTTOM)

    def _grid(self) -> list[str]:
        right, floor = self.width - _RIGHT, self.height - _BOTTOM
        parts = []
        for tick in self.y.ticks:
            y = self._y(tick)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:g}'
                f"{self.y.unit}</text>"
            )
        for tick in self.x.ticks:
            x = self._x(tick)
            parts.append(
                f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>'
                f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{tick:g}'
                f"{self.x.unit}</text>"
            )
        parts.append(
            f'<text class="axis" x="{(_LEFT + right) / 2}" y="{self.height - 6}" '
            f'text-anchor="middle">{escape(self.x.label)}</text>'
            f'<text class="axis" transform="translate(13 {(_TOP + floor) / 2}) rotate(-90)" '
            f'text-anchor="middle">{escape(self.y.label)}</text>'
        )
        return parts

    def _line(self, line: Line) -> list[str]:
        places = [(self._x(x), self._y(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashed = " dashed" if line.dashed else ""
        parts = [f'<polyline class="line {line.kind}{dashed}" points="{path}"/>']
        for (x, _), (low, high) in zip(places, line.spans, strict=False):
            parts.append(
                f'<path class="error {line.kind}" d="M{x:.1f} {self._y(low):.1f}V'
                f'{self._y(high):.1f}m-3 0h6M{x - 3:.1f} {self._y(low):.1f}h6"/>'
            )
        if line.dots:
            parts += [
                f'<circle class="dot {line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
                for x, y in places
            ]
        for (x, y), name in zip(places, line.names, strict=False):
            room = y + 20 < self.height - _BOTTOM  # else the name would run into the axis
            dx, dy, anchor = (-8, 16, "end") if line.below and room else (8, -7, "start")
            parts.append(
                f'<text class="name {line.kind}" x="{x + dx:.1f}" y="{y + dy:.1f}" '
                f'text-anchor="{anchor}">{escape(name)}</text>'
            )
        return parts


def heat_map(title: str, rows: Sequence[Sequence[float]], cell: tuple[float, float]) -> str:
    """Values 0 to 1 as shades, one row above the other; ``cell`` is (width, height) of one."""
    across, down = cell
    width, height = across * len(rows[0]), down * len(rows)
    shades: dict[int, list[str]] = {}
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            shade = min(SHADES - 1, max(0, int(value * SHADES)))
            shades.setdefault(shade, []).append(f"M{j} {i}h1v1h-1z")
    paths = "".join(f'<path class="s{shade}" d="{"".join(d)}"/>' for shade, d in shades.items())
    return (
        f'<svg class="heat" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(title)}"><g transform="scale({across:g} {down:g})">{paths}</g></svg>'
    )


def percent_ticks(low: float, high: float, least: int = 3) -> tuple[float, ...]:
    """Round values that cover ``low`` to ``high``: at least ``least`` steps of 1, 2 or 5."""
    span = max(high - low, 1e-9)
    step = 10.0 ** math.floor(math.log10(span / least))
    for factor in (5, 2):
        if span / (factor * step) >= least:
            step *= factor
            break
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(i * step, 10) for i in range(first, last + 1))


def decades(low: float, high: float) -> tuple[float, ...]:
    """Powers of ten that cover ``low`` to ``high``, both positive."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return tuple(10.0**i for i in range(first, max(last, first + 1) + 1))
