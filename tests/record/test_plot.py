"""The plot of a report: the curves and points that it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from maml.record.plot import plot_report, training_curve


def curve(num_shots: int, metric: str, means: list[float | None]) -> dict[str, Any]:
    steps = [
        {"step": step, "mean": mean, "ci95": None if mean is None else 0.25, "num_tasks": 600}
        for step, mean in enumerate(means)
    ]
    return {"num_shots": num_shots, "metric": metric, "steps": steps}


REPORT = {
    "experiment": "omniglot_5way_1shot",
    "headline_metric": "accuracy_transductive",
    "iteration": 40,
    "num_iterations": 40,
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
    assert (figures[0].get_suptitle(), axes.get_ylabel()) == ("omniglot_5way_1shot", "accuracy transductive")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (650, 520)


def test_curve_that_diverged_at_every_step_is_no_error(tmp_path: Path) -> None:
    diverged = REPORT | {"curves": [curve(1, "accuracy_transductive", [None, None])]}
    assert plot_report(diverged, tmp_path / "report.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


METRICS: list[dict[str, Any]] = [
    {"iteration": 10 * number, "loss": 8 / number, "accuracy": 0.1 * number} for number in (1, 2, 4)
]


def test_training_stands_beside_adaptation_where_there_are_metrics(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    path = plot_report(REPORT, tmp_path / "report.png", METRICS)
    (figure,) = figures
    adaptation, training = figure.axes
    (line,) = training.get_lines()
    assert np.asarray(line.get_xydata()) == pytest.approx(np.array([[10, 0.1], [20, 0.2], [40, 0.4]]))
    assert (training.get_xlabel(), training.get_ylabel()) == ("iterations", "accuracy of the meta-batch")
    assert (adaptation.get_xlabel(), adaptation.get_ylabel()) == ("gradient steps", "accuracy transductive")
    assert all(float(tick).is_integer() for tick in adaptation.get_xticks())
    with Image.open(path) as image:
        assert image.size == (1200, 520)
    plot_report(REPORT, tmp_path / "report.png", METRICS[:1])
    assert len(figures[-1].axes) == 1, "one point is no curve"


def test_reduced_budget_is_dashed_and_said(tmp_path: Path, figures: list[matplotlib.figure.Figure]) -> None:
    plot_report(REPORT | {"iteration": 30}, tmp_path / "report.png")
    (figure,) = figures
    (axes,) = figure.axes
    assert [line.get_linestyle() for line in axes.get_lines()] == ["--", "--"]
    assert [line.get_label() for line in axes.get_lines()] == ["K=1, reduced budget", "K=5, reduced budget"]
    assert figure.get_suptitle() == "omniglot_5way_1shot, 30 of 40 iterations"


def test_training_curve_is_the_metric_closest_to_meta_test() -> None:
    assert training_curve(METRICS, "accuracy_inductive")[0] == "accuracy"
    assert training_curve(METRICS, "mse") == ("loss", [(10, 8.0), (20, 4.0), (40, 2.0)])
    assert training_curve([], "mse") == ("loss", [])
    with_gap: list[dict[str, Any]] = [*METRICS, {"iteration": 50, "loss": None, "accuracy": 1.0}]
    assert training_curve(with_gap, "mse")[1][-1] == (40, 2.0)
    many = [{"iteration": number, "return": number % 2} for number in range(1, 1001)]
    name, points = training_curve(many, "return")
    assert (name, len(points), points[0]) == ("return", 200, (3.0, pytest.approx(0.6)))


def test_loss_below_zero_has_no_logarithmic_axis(tmp_path: Path, figures: list[matplotlib.figure.Figure]) -> None:
    for losses, scale in [((4.0, 1.0), "log"), ((4.0, -1.0), "linear")]:
        metrics = [{"iteration": number, "loss": loss} for number, loss in enumerate(losses, 1)]
        plot_report(REPORT, tmp_path / "report.png", metrics)
        axes = figures[-1].axes[1]
        assert axes.get_yscale() == scale
        assert ("log axis" in axes.get_ylabel()) == (scale == "log")


def test_showings_are_drawn_from_the_first_on(tmp_path: Path, figures: list[matplotlib.figure.Figure]) -> None:
    report = REPORT | {"measured_by": "showing", "curves": [curve(10, "accuracy_transductive", [0.25, None, 0.75])]}
    plot_report(report, tmp_path / "report.png")
    ((axes,),) = (figure.axes for figure in figures)
    (line,) = axes.get_lines()
    assert line.get_xydata().tolist() == [[1, 0.25], [3, 0.75]], "no task has the second"  # type: ignore[union-attr]
    assert axes.get_xlabel() == "showing of a class"
