"""The plot of a report: the curves and points that it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from PIL import Image

from maml.record.plot import plot_report


def curve(num_shots: int, metric: str, means: list[float | None]) -> dict[str, Any]:
    steps = [
        {"step": step, "mean": mean, "ci95": None if mean is None else 0.25, "num_tasks": 600}
        for step, mean in enumerate(means)
    ]
    return {"num_shots": num_shots, "metric": metric, "steps": steps}


REPORT = {
    "experiment": "omniglot_5way_1shot",
    "headline_metric": "accuracy_transductive",
    "curves": [
        curve(1, "accuracy_transductive", [0.25, 0.5, 0.75]),
        curve(1, "accuracy_inductive", [0.125, 0.125, 0.125]),
        curve(5, "accuracy_transductive", [0.5, None, 1.0]),
    ],
}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """Collects the figures that are drawn."""
    made: list[matplotlib.figure.Figure] = []

    class Kept(matplotlib.figure.Figure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(matplotlib.figure, "Figure", Kept)
    return made


def test_picture_has_a_line_and_a_band_for_each_k_of_the_leading_metric(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    path = plot_report(REPORT, tmp_path / "report.png")
    ((axes,),) = (figure.axes for figure in figures)
    lines = {str(line.get_label()): line.get_xydata().tolist() for line in axes.get_lines()}  # type: ignore[union-attr]
    assert lines == {"K=1": [[0, 0.25], [1, 0.5], [2, 0.75]], "K=5": [[0, 0.5], [2, 1.0]]}, "one step diverged"
    band = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices.tolist()}  # type: ignore[union-attr]
    assert {(0, 0.0), (0, 0.5), (1, 0.25), (1, 0.75), (2, 0.5), (2, 1.0)} == band
    assert (axes.get_title(), axes.get_ylabel()) == ("omniglot_5way_1shot", "accuracy transductive")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (750, 540)


def test_curve_that_diverged_at_every_step_is_no_error(tmp_path: Path) -> None:
    diverged = REPORT | {"curves": [curve(1, "accuracy_transductive", [None, None])]}
    assert plot_report(diverged, tmp_path / "report.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
