"""The style of pictures: its files, ticks, and independence of the user's own style."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from maml.record.style import count_steps, log_ticks, save, style, themed


@style()
def picture(path: Path) -> None:
    figure = Figure(figsize=(2, 1.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([1, 2, 3], label="a curve")
    axes.set_ylabel("level")
    axes.legend()
    save(figure, *(path.with_suffix(suffix) for suffix in (".png", ".pdf", ".svg")))


def test_equal_pictures_have_equal_bytes_whatever_the_users_style(tmp_path: Path) -> None:
    for name, size in (("a", 10.0), ("b", 40.0)):
        with matplotlib.rc_context({"font.size": size, "lines.linewidth": size, "text.color": "red"}):
            picture(tmp_path / f"{name}.png")
            assert matplotlib.rcParams["font.size"] == size, "it is not changed for good"
    for suffix in ("png", "pdf", "svg"):
        first, second = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("a", "b"))
        assert first == second
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".pdf", ".svg"}


def test_svg_takes_the_colour_of_the_page(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    svg = (tmp_path / "a.svg").read_text()
    with style():
        assert str(matplotlib.rcParams["text.color"]).lower() not in svg.lower()
    assert "currentColor" in svg and ">level</text>" in svg
    assert "<g id=" not in svg and "fill: #ffffff" not in svg
    assert "#2880c3" in svg, "colours of curves stay"


def test_themed_changes_ink_and_names_only() -> None:
    with style():
        assert themed('<g id="axes_1"><path id="m0" style="stroke: #1D2026; fill: #0072b2"/></g>') == (
            '<g><path id="m0" style="stroke: currentColor; fill: #0072b2"/></g>'
        )


def test_gradient_steps_have_whole_ticks() -> None:
    for last in (1, 3, 10):
        axes = Figure().subplots()
        axes.plot(range(last + 1))
        count_steps(axes)
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
        assert axes.get_xlabel() == "gradient steps"


def test_logarithmic_axis_has_numbers_between_powers_of_ten() -> None:
    for limits, expected in [((1, 80), [1, 2, 5, 10, 20, 50]), ((0.1, 1e5), [0.1, 1, 10, 100, 1000, 1e4, 1e5])]:
        figure = Figure()
        axes = figure.subplots()
        axes.set_yscale("log")
        axes.set_ylim(*limits)
        log_ticks(axes)
        shown = [tick for tick in axes.get_yticks() if limits[0] <= tick <= limits[1]]
        assert shown == expected
        figure.draw_without_rendering()
        labels = {text.get_text() for text in axes.get_yticklabels()}
        assert {f"{tick:g}" for tick in expected} <= labels


def test_axis_of_showings_is_labelled_as_such() -> None:
    axes = Figure().subplots()
    count_steps(axes, "showing")
    assert axes.get_xlabel() == "showing of a class"
