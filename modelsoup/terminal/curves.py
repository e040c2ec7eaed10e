"""Curves of a training as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from ..errors import printable
from .shown import Curves

_POINTS = 240  # that are drawn of a curve, evenly
_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 8, 26
LINES = 4
"""Curves in a chart, at most."""
_ALIKE = 8.0  # how many times as large one curve of a chart may be as another
_SMOOTHED = 20  # points from which on a curve is smoothed
_WINDOW = 25  # the smoothed curve forgets in so many parts of the whole
_HUGE = 1e100  # what is larger, or infinite, is not drawn
_OUTLIERS = 0.01  # of the points, those that may lie outside of a chart, at either end


def charts(curves: Curves, *, each: bool = False) -> list[list[str]]:
    """The names of curves that go into one chart: a few of about the same size.

    Args:
        curves: what is to be drawn.
        each: a chart for each.
    """
    found: list[tuple[list[str], float, float]] = []
    for name, values in curves.columns.items():
        finite = sorted(abs(value) for value in values if _can_be_drawn(value))
        if not finite:
            continue
        size = finite[len(finite) // 2] or 1e-12
        for place, (names, low, high) in enumerate(found):
            range_ = min(low, size), max(high, size)
            if not each and len(names) < LINES and range_[1] <= _ALIKE * range_[0]:
                found[place] = ([*names, name], *range_)
                break
        else:
            found.append(([name], size, size))
    return [names for names, _, _ in found]


def chart(curves: Curves, names: Sequence[str], *, smooth: bool = True) -> str:
    """An SVG picture of some curves: faint points, and a line over them.

    Args:
        curves: where they are.
        names: which.
        smooth: where there are many points, the line is their moving average.
    """
    raw = [_finite(curves.steps, curves.columns[name]) for name in names]
    lines = [_smoothed(points) if smooth else points for points in raw]
    ordinates = sorted(value for points in raw for _, value in points)
    cut = int(_OUTLIERS * len(ordinates))
    within = [*ordinates[cut : len(ordinates) - cut], *(y for line in lines for _, y in line)]
    ticks = _ticks(min(within), max(within))
    low, high = min(ticks[0], *within), max(ticks[-1], *within)
    first, last = curves.steps[0], curves.steps[-1]

    def x(step: float) -> float:
        share = (step - first) / ((last - first) or 1.0)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (value - low) / ((high - low) or 1.0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks:
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text class="y" x="{_LEFT - 6}" y="{y(tick) + 3.5:.1f}">{_short(tick)}</text>'
        )
    ends = [tick for tick in _ticks(first, last, most=4) if first <= tick <= last]
    for tick in ends or [first]:
        parts.append(f'<text class="x" x="{x(tick):.1f}" y="{_HEIGHT - 9}">{_short(tick)}</text>')
    for number, (points, line) in enumerate(zip(raw, lines, strict=True)):
        shown = [p for p in _thinned(points) if low <= p[1] <= high]
        dots = "".join(f"M{x(a):.1f} {y(b):.1f}h0" for a, b in shown)
        way = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in _thinned(line))
        parts.append(f'<path class="dots c{number}" d="{dots}"/>')
        parts.append(f'<polyline class="line c{number}" points="{way}"/>')
    told = escape(printable(f"{', '.join(names)} by step"), quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{told}">'
        + "".join(parts)
        + "</svg>"
    )


_Points = list[tuple[float, float]]


def _finite(steps: Sequence[float], values: Sequence[float]) -> _Points:
    return [(s, v) for s, v in zip(steps, values, strict=True) if _can_be_drawn(v)]


def _can_be_drawn(value: float) -> bool:
    return abs(value) < _HUGE  # which NaN is not, either


def _smoothed(points: _Points) -> _Points:
    """Their exponential moving average, without the pull of where it begins."""
    if len(points) < _SMOOTHED:
        return points
    kept = 1 - 1 / max(2.0, len(points) / _WINDOW)
    total, weight, smooth = 0.0, 0.0, []
    for step, value in points:
        total, weight = kept * total + value, kept * weight + 1
        smooth.append((step, total / weight))
    return smooth


def _thinned(points: _Points) -> _Points:
    if len(points) <= _POINTS:
        return points
    last = len(points) - 1
    return [points[round(number * last / (_POINTS - 1))] for number in range(_POINTS)]


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that span a range, the outer ones perhaps just outside or inside of it."""
    span = high - low
    if span < 1e-9 * abs(high) or span < 1 / _HUGE:
        span = max(abs(high), 1 / _HUGE)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * n for n in (1, 2, 5, 10, 20) if span / (power * n) <= most)
    begin, end = math.floor(low / step), math.ceil(high / step)
    if end - begin > most:  # an end that reaches little into the next step does without it
        begin, end = math.ceil(low / step), math.floor(high / step)
    return [number * step for number in range(begin, end + 1)] or [low]


def _short(number: float) -> str:
    """`0.25`, `1500`, `20k`, `3M`: a number on an axis."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            return f"{number / (1000.0 if letter == 'k' else size):.4g}{letter}"
    return f"{number:.4g}"
