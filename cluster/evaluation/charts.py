"""Plots as plain SVG: a report needs no library, no script and no network to be read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#1f5fa8", "#c0392b", "#7f8c8d", "#27ae60", "#e67e22", "#8e44ad", "#16a085", "#2c3e50", "#d4ac0d")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 358, 240, 50, 36, 28
"""Of a chart without its legend, which stands below it: a phone shows it without making the text smaller."""
RIGHT = 8
LEGEND_ROW, LEGEND_COLUMNS = 16, 2


def line_chart(
    title: str,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float | None]],
    *,
    x_label: str = "",
    x_names: tuple[str, str] | None = None,
    diagonal: bool = False,
    colours: Mapping[str, str] | None = None,
) -> str:
    """One line a name over the same x. None is a gap. x_names: texts for the ends of the axis.

    colours: of every name; None: COLOURS in their order.
    """
    known = [value for values in lines.values() for value in values if value is not None and math.isfinite(value)]
    known += list(x) if diagonal else []
    if not known:
        return ""
    low, high = _padded(min(known), max(known))
    first, last = min(x), max(x)
    parts = _frame(title, low, high, x_names or (_number(first), _number(last)), x_label)
    if diagonal:
        parts.append(_path([(_x(v, first, last), _y(v, low, high)) for v in (first, last)], "#bbb", dashed=True))
    for number, (name, values) in enumerate(lines.items()):
        colour = colours[name] if colours is not None else COLOURS[number % len(COLOURS)]
        points = [
            (_x(at, first, last), _y(value, low, high))
            for at, value in zip(x, values, strict=True)
            if value is not None and math.isfinite(value)
        ]
        parts.append(_path(points, colour))
        row, column = divmod(number, LEGEND_COLUMNS)
        left, y = LEFT + column * (WIDTH - LEFT) // LEGEND_COLUMNS, HEIGHT + 8 + LEGEND_ROW * row
        parts.append(f'<rect x="{left}" y="{y - 5}" width="10" height="3" fill="{colour}"/>')
        parts.append(f'<text x="{left + 14}" y="{y}">{escape(name)}</text>')
    return _svg(title, parts, HEIGHT + LEGEND_ROW * -(-len(lines) // LEGEND_COLUMNS))


def bar_chart(title: str, values: Sequence[float], *, expected: float | None = None, x_label: str = "") -> str:
    """Bars of equal width over [0, 1]. expected: height of a dashed line."""
    high = max([*values, expected or 0.0]) * 1.1 or 1.0
    parts = _frame(title, 0.0, high, ("0", "1"), x_label)
    width = (WIDTH - RIGHT - LEFT) / len(values)
    for number, value in enumerate(values):
        top = _y(value, 0.0, high)
        parts.append(
            f'<rect x="{LEFT + number * width + 1:.1f}" y="{top:.1f}" width="{width - 2:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}" fill="{COLOURS[0]}"/>'
        )
    if expected is not None:
        y = _y(expected, 0.0, high)
        parts.append(_path([(LEFT, y), (WIDTH - RIGHT, y)], "#c0392b", dashed=True))
    return _svg(title, parts, HEIGHT)


def _frame(title: str, low: float, high: float, ends: tuple[str, str], x_label: str) -> list[str]:
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<text x="{LEFT}" y="16" font-weight="bold">{escape(title)}</text>']
    for value in _ticks(low, high):
        y = _y(value, low, high)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    parts.append(f'<text x="{LEFT}" y="{floor + 16}">{escape(ends[0])}</text>')
    parts.append(f'<text x="{right}" y="{floor + 16}" text-anchor="end">{escape(ends[1])}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{floor + 30}" text-anchor="middle">{escape(x_label)}</text>')
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Two to six multiples of 1, 2 or 5 × a power of ten inside [low, high]; low < high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9)) * power
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _svg(title: str, parts: Sequence[str], height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="11">{"".join(parts)}</svg>'
    )


def _path(points: Sequence[tuple[float, float]], colour: str, *, dashed: bool = False) -> str:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>'


def _x(value: float, first: float, last: float) -> float:
    return LEFT + (WIDTH - RIGHT - LEFT) * ((value - first) / (last - first) if last > first else 0.5)


def _y(value: float, low: float, high: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - low) / (high - low)


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or max(abs(high), 1.0) * 0.05
    return low - margin, high + margin


def _number(value: float) -> str:
    return f"{value:.4g}"
