"""Adaptation to single sinusoids, as in Figures 2 and 7, compared with a plain gradient descent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.gridspec import SubplotSpec

from maml.errors import MamlError
from maml.paper.adaptation import panel_rows, plot_picture
from maml.paper.cells import Panel, Picture
from maml.paper.evidence import Evidence, find_evidence
from maml.record import checkpoint
from maml.record.contents import Source
from maml.record.index import find_runs
from tests.paper.fake_runs import SINUSOID, edit, make_run_with_checkpoint
from tests.paper.test_figures import evidence
from tests.runs import ROOT

PICTURE = Picture("figure2", "Figure 2", ())
PANEL = Panel("MAML", 0, False, SINUSOID)


def test_a_checkpoint_of_another_iteration_is_refused(tmp_path: Path) -> None:
    folder = make_run_with_checkpoint(tmp_path)
    earlier = checkpoint.load(folder / "checkpoint.pt") | {"iteration": 69_000}
    checkpoint.save(folder / "checkpoint.pt", earlier)
    with pytest.raises(MamlError, match=r"does not belong to the report\.json beside it"):
        panel_rows(PICTURE, PANEL, evidence(tmp_path))


@pytest.mark.parametrize("step_sizes", [None, [0.02] * 5 + [0.01] * 5])
def test_panel_rows_equal_plain_gradient_descent_on_the_support_points(
    tmp_path: Path, step_sizes: list[float] | None
) -> None:
    folder = make_run_with_checkpoint(tmp_path)
    if step_sizes:
        edit(folder / "report.json", step_sizes={"5": step_sizes, "10": None, "20": None})
    rows = panel_rows(PICTURE, PANEL, evidence(tmp_path))
    grid, support = ([row for row in rows if row["is_support"] == kind] for kind in (0, 1))
    assert [row["x"] for row in grid] == pytest.approx([-5 + 0.1 * number for number in range(101)], abs=1e-5)
    assert len(support) == 5

    theta = checkpoint.load(folder / "checkpoint.pt")["state"]["theta"]
    weights = [value.double().requires_grad_() for value in theta.values()]

    def network(x: torch.Tensor) -> torch.Tensor:
        for weight, bias in zip(weights[0::2], weights[1::2], strict=True):
            x = x @ weight.T + bias
            x = x.relu() if bias.numel() > 1 else x
        return x

    x, y = (torch.tensor([[row[name]] for row in support], dtype=torch.float64) for name in ("x", "truth"))
    every_x = torch.tensor([[row["x"]] for row in rows], dtype=torch.float64)
    for step in range(11):
        if f"step_{step}" in rows[0]:
            assert [row[f"step_{step}"] for row in rows] == pytest.approx(network(every_x).flatten().tolist(), abs=1e-4)
        gradients = torch.autograd.grad((network(x) - y).square().mean(), weights)
        size = step_sizes[min(step, 9)] if step_sizes else 0.001
        weights = [weight - size * gradient for weight, gradient in zip(weights, gradients, strict=True)]


def test_a_task_depends_on_the_figure_and_its_number_and_not_on_the_method(tmp_path: Path) -> None:
    make_run_with_checkpoint(tmp_path)
    found = evidence(tmp_path)

    def task(panel: Panel, name: str = "figure2") -> list[tuple[float, float]]:
        return [(row["x"], row["truth"]) for row in panel_rows(replace(PICTURE, name=name), panel, found)]

    first = task(PANEL)
    assert task(replace(PANEL, row="pretrained")) == first
    assert task(PANEL, "figure7") != first != task(replace(PANEL, task=1))
    half = task(replace(PANEL, one_half=True))
    assert half[:101] == first[:101]  # the same sinusoid
    assert [x for x, _ in half[101:]] == [abs(x) for x, _ in first[101:]] != [x for x, _ in first[101:]]


def test_the_trained_maml_comes_closer_to_every_kind_of_task_with_each_step_drawn() -> None:
    found = find_evidence(SINUSOID, find_runs(ROOT / "results" / "runs")[0])
    assert found.complete
    for num_shots, one_half in [(5, False), (5, True), (10, False)]:
        panels = [Panel("MAML", task, one_half, replace(SINUSOID, num_shots=num_shots)) for task in range(20)]
        rows = [row for panel in panels for row in panel_rows(PICTURE, panel, found)]
        errors = [sum((row[f"step_{step}"] - row["truth"]) ** 2 for row in rows) for step in (0, 1, 10)]
        assert errors[0] > errors[1] > errors[2]


def test_the_picture_has_a_column_for_each_method_and_k_and_names_only_what_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run_with_checkpoint(tmp_path)
    found = evidence(tmp_path)
    pretrained = Source("sinusoid_pretrain", "mse", 5)
    panels = []
    for task, num_shots in enumerate([5, 5, 10]):
        for row, source, runs in [("MAML", SINUSOID, found), ("pretrained", pretrained, Evidence())]:
            panel = Panel(row, task, False, replace(source, num_shots=num_shots))
            panels.append((panel, runs, panel_rows(PICTURE, panel, runs)))
    canvases: list[Canvas] = []
    monkeypatch.setattr(Canvas, "savefig", lambda self, *_, **__: canvases.append(self))
    plot_picture(PICTURE, panels, tmp_path / "unused.png")
    canvas, *_ = canvases
    shown = [axes for axes in canvas.axes if axes.get_visible()]
    assert len(canvas.axes) == 8 and len(shown) == 6, "two tasks at K=5 and one at K=10"
    assert [axes.get_title() for axes in canvas.axes[:4]] == ["MAML, K=5", "MAML, K=10", *PRETRAINED]
    for column in range(4):
        lowest = max(place(axes).rowspan.start for axes in shown if place(axes).colspan.start == column)
        for axes in (axes for axes in shown if place(axes).colspan.start == column):
            is_lowest = place(axes).rowspan.start == lowest
            assert axes.get_xlabel() == ("input x" if is_lowest else "")
            assert axes.get_ylabel() == ("output y" if column == 0 else "")
            assert len(axes.get_lines()) == (5 if column < 2 else 0)
            assert ["not run" in text.get_text() for text in axes.texts] == [True] * (column >= 2)
    (legend,) = canvas.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "ground truth",
        "pre-update",
        "1 gradient step",
        "10 gradient steps",
        "points used",
    ]


PRETRAINED = ["pretrained, K=5", "pretrained, K=10"]


def place(axes: Axes) -> SubplotSpec:
    found = axes.get_subplotspec()
    assert found is not None
    return found


def test_the_heading_names_the_step_size_that_was_chosen_for_meta_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run_with_checkpoint(tmp_path)
    edit(folder / "report.json", step_sizes={"5": [0.02] * 10, "10": None, "20": None})
    found = evidence(tmp_path)
    canvases: list[Canvas] = []
    monkeypatch.setattr(Canvas, "savefig", lambda self, *_, **__: canvases.append(self))
    panels = [(panel, found, panel_rows(PICTURE, panel, found)) for panel in [PANEL]]
    plot_picture(PICTURE, panels, tmp_path / "unused.png")
    assert canvases[0].axes[0].get_title() == "MAML, K=5\nstep size 0.02"
