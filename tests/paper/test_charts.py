"""SVG charts: positions of values, and values that are hard to draw."""

from __future__ import annotations

import re

import numpy as np
import pytest

from maml.paper.charts import histogram, line_chart


def test_charts_hold_extreme_values() -> None:
    curves = {"a": [(1.0, 1e-8), (2.0, 1e8)], "b": [(1.0, 3.0)]}
    assert "nan" not in line_chart(curves, "x", "y", log=True)
    assert "nan" not in line_chart({"a": [(1.0, 0.0), (1.0, 0.0)]}, "x", "y", log=True)
    assert histogram(np.array([1.0, np.nan, np.inf, 2.0]), {"paper": 5.0}, "x").count("<rect") == 2
    assert histogram(np.ones(3), {}, "x").count("<rect") == 1


def drawn_points(chart: str) -> list[list[float]]:
    """Returns the points of the only curve, in pixels."""
    (path,) = re.findall(r'd="M([^"]*)"', chart)
    return [[float(number) for number in point.split(",")] for point in path.split("L")]


def test_points_lie_where_their_values_say() -> None:
    (first, middle, last) = drawn_points(line_chart({"a": [(0.0, 0.0), (5.0, 1.0), (10.0, 4.0)]}, "x", "y", log=False))
    assert first[0] < middle[0] < last[0]
    assert middle[0] - first[0] == pytest.approx(last[0] - middle[0], abs=0.2)
    assert (first[1] - middle[1]) / (first[1] - last[1]) == pytest.approx(1 / 4, abs=0.01), "upwards is less in SVG"


def test_logarithmic_axis_has_equal_steps_for_equal_ratios() -> None:
    points = drawn_points(line_chart({"a": [(0.0, 1.0), (1.0, 10.0), (2.0, 100.0)]}, "x", "y", log=True))
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.2)
    with_zero = [(0.0, 0.0), (1.0, 10.0), (2.0, 100.0)]
    assert line_chart({"a": with_zero}, "x", "y", log=True) == line_chart({"a": with_zero}, "x", "y", log=False)


def test_bars_are_as_high_as_their_counts() -> None:
    chart = histogram(np.array([0.0] * 3 + [30.0]), {"paper": 15.0}, "x")
    heights = [float(height) for height in re.findall(r'height="([^"]*)"', chart)]
    assert heights[0] == pytest.approx(3 * heights[1], abs=0.3)
    assert chart.count('class="mark paper"') == 1


def labels(chart: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", chart)


def test_what_is_counted_has_whole_ticks() -> None:
    steps = line_chart({"a": [(0.0, 1.5), (3.0, 2.5)]}, "gradient steps", "y", log=False)
    places = re.findall(r'text-anchor="middle">([^<]*)<', steps)
    assert places[: places.index("gradient steps")] == ["0", "1", "2", "3"]
    assert {label for label in labels(histogram(np.array([1.0, 1.5, 1.5]), {}, "x")) if label.isdecimal()} >= {
        "0",
        "1",
        "2",
    }


def test_logarithmic_axis_says_so() -> None:
    points = {"a": [(0.0, 1.0), (1.0, 10.0)]}
    assert "loss (log axis)" in labels(line_chart(points, "x", "loss", log=True))
    assert "loss" in labels(line_chart(points, "x", "loss", log=False))
    assert "loss" in labels(line_chart({"a": [(0.0, 0.0), (1.0, 1.0)]}, "x", "loss", log=True)), "zero has no logarithm"
