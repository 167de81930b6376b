"""Small SVG charts; the style sheet of the page sets their colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from maml.paper.markup import Markup, element

_WIDTH, _HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 38  # margins
_NUM_BINS = 30

Scale = Callable[[float], float]


def line_chart(curves: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, log: bool) -> Markup:
    """Draws several curves into one chart.

    Args:
        curves: points (x, y) by label; at least one curve has points.
        xlabel: label of the horizontal axis, which counts something: its ticks are whole numbers.
        ylabel: label of the vertical axis.
        log: whether the vertical axis is logarithmic; ignored if a value is not positive.
    """
    points = np.array([point for curve in curves.values() for point in curve])
    (left, low), (right, high) = points.min(0), points.max(0)
    log = log and low > 0
    x, y = _scale(left, right, _LEFT, _WIDTH - _RIGHT), _scale(low, high, _HEIGHT - _BOTTOM, _TOP, log)
    lines = [
        element(
            "path",
            d="M" + "L".join(f"{x(at):.1f},{y(value):.1f}" for at, value in curve),
            class_=f"curve curve-{number % 4}",
        )
        for number, (_, curve) in enumerate(curves.items())
    ]
    label = f"{ylabel} (log axis)" if log else ylabel
    return _chart(lines, x, y, _ticks(left, right, whole=True), _ticks(low, high, log), xlabel, label)


def histogram(values: np.ndarray, marks: Mapping[str, float], xlabel: str) -> Markup:
    """Draws a histogram of the finite values, with a vertical line at each mark.

    Args:
        values: the values, ``(N,)``; at least one is finite.
        marks: positions of the lines, by CSS class.
        xlabel: label of the horizontal axis.
    """
    values = values[np.isfinite(values)]
    numbers = [values.min(), values.max(), *marks.values()]
    counts, edges = np.histogram(values, _NUM_BINS, (min(numbers), max(numbers)))
    x, y = _scale(edges[0], edges[-1], _LEFT, _WIDTH - _RIGHT), _scale(0, counts.max(), _HEIGHT - _BOTTOM, _TOP)
    bars = [
        element(
            "rect",
            x=f"{x(start):.1f}",
            y=f"{y(count):.1f}",
            width=f"{x(end) - x(start) - 0.6:.1f}",
            height=f"{y(0) - y(count):.1f}",
            class_="bar",
        )
        for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True)
        if count
    ]
    bars += [
        element("line", x1=f"{x(at):.1f}", x2=f"{x(at):.1f}", y1=_TOP, y2=_HEIGHT - _BOTTOM, class_=f"mark {name}")
        for name, at in marks.items()
    ]
    return _chart(bars, x, y, _ticks(edges[0], edges[-1]), _ticks(0, counts.max(), whole=True), xlabel, "test tasks")


def _scale(low: float, high: float, start: float, end: float, log: bool = False) -> Scale:
    """Returns the map from values to pixels that takes ``low`` to ``start`` and ``high`` to ``end``."""
    transform = math.log if log else float
    span = transform(high) - transform(low) or 1.0
    return lambda value: start + (transform(value) - transform(low)) / span * (end - start)


def _ticks(low: float, high: float, log: bool = False, whole: bool = False) -> list[float]:
    from matplotlib.ticker import LogLocator, MaxNLocator  # imported here because it is slow to import

    values: list[float] = []
    if log:
        few = math.log10(high / low) > 2
        values = [*LogLocator(10, (1.0,) if few else (1.0, 2.0, 5.0)).tick_values(low, high)]
        values = [value for value in values if low <= value <= high]
    if len(values) < 2:
        values = [value for value in MaxNLocator(4, integer=whole).tick_values(low, high) if low <= value <= high]
    return values


def _chart(
    content: Sequence[Markup],
    x: Scale,
    y: Scale,
    xticks: Sequence[float],
    yticks: Sequence[float],
    xlabel: str,
    ylabel: str,
) -> Markup:
    bottom, middle = _HEIGHT - _BOTTOM, (_TOP + _HEIGHT - _BOTTOM) / 2
    grid = [
        element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{y(value):.1f}", y2=f"{y(value):.1f}", class_="grid")
        for value in yticks
    ]
    labels = [
        element("text", _tick_label(value), x=_LEFT - 6, y=f"{y(value) + 3.5:.1f}", text_anchor="end")
        for value in yticks
    ]
    labels += [
        element("text", _tick_label(value), x=f"{x(value):.1f}", y=bottom + 14, text_anchor="middle")
        for value in xticks
    ]
    labels += [
        element("text", xlabel, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 6, text_anchor="middle"),
        element("text", ylabel, transform=f"translate(11 {middle:.1f}) rotate(-90)", text_anchor="middle"),
    ]
    return element(
        "svg",
        grid,
        content,
        element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=bottom, y2=bottom, class_="axis"),
        labels,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{ylabel} against {xlabel}",
    )


def _tick_label(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:.6g}"
