"""Figures 2 and 7: a finished run's adaptation to single sinusoids."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from maml.algorithm.base import Algorithm
from maml.config.compose import compose_experiment
from maml.errors import MamlError
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.paper.cells import Panel, Picture
from maml.paper.evidence import Evidence
from maml.paper.figures import save_figure
from maml.record import checkpoint
from maml.record.contents import Source
from maml.record.style import GRAY, PAGE, style
from maml.seeding import Stream

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The gradient steps that are drawn, with label, colour and line style (dotted, dashed and solid as in the paper).
STEPS = {0: ("pre-update", GRAY, ":"), 1: ("1 gradient step", "C2", "--"), 10: ("10 gradient steps", "C2", "-")}
_NUM_INPUTS = 101


@torch.no_grad()
def panel_rows(picture: Picture, panel: Panel, evidence: Evidence) -> list[dict[str, Any]]:
    """Adapts to the panel's task, from theta of the first finished run.

    Args:
        picture: the figure; the task depends on its name and on the panel's task number only.
        panel: one of the figure's panels.
        evidence: the runs of the panel's source.

    Returns:
        One row for each input, first an even grid over the input range, then the support points. A row has the true
        value and the network's output after each of `STEPS`. Empty if no run is finished.

    Raises:
        MamlError: if the finished run's checkpoint is missing, damaged, or belongs to another run.
    """
    if not evidence.complete:
        return []
    algorithm, num_shots = load_trained(panel.source, evidence), panel.source.num_shots
    domain, model = algorithm.domain, algorithm.model

    tasks = domain.sample_tasks(1, Stream(0).child(picture.name).child(panel.task), "test", num_shots)
    if panel.one_half:
        tasks["support_x"] = tasks["support_x"].abs()
    grid = torch.linspace(-5, 5, _NUM_INPUTS).reshape(1, -1, 1)
    tasks["query_x"] = torch.cat([grid, tasks["support_x"]], dim=1)
    step_sizes = evidence.evaluated[0][1].step_sizes.get(num_shots)
    adapted = list(algorithm.adapt(algorithm.params_per_task(1), tasks, max(STEPS), step_sizes))
    x, truth, _ = domain.data(tasks, "query")
    columns = {"x": x, "truth": truth} | {f"step_{step}": model(adapted[step], x) for step in STEPS}
    # Six digits: the digits after them can differ between machines.
    values = zip(*([float(f"{v:.6g}") for v in column.flatten().tolist()] for column in columns.values()), strict=True)
    labels = {"method": panel.row, "num_shots": num_shots, "task": panel.task}
    return [
        labels | {"is_support": int(number >= _NUM_INPUTS)} | dict(zip(columns, point, strict=True))
        for number, point in enumerate(values)
    ]


def load_trained(source: Source, evidence: Evidence) -> Algorithm:
    """Builds the algorithm and loads the checkpoint of the first finished run; a picture shows a single training.

    Raises:
        MamlError: if the checkpoint is missing, damaged, or belongs to another run.
    """
    run, report = evidence.evaluated[0]
    saved = checkpoint.load(run.path / "checkpoint.pt")
    if (saved["run_id"], saved["iteration"]) != (report.run_id, report.iteration):
        raise MamlError(f"{run.path / 'checkpoint.pt'} does not belong to the report.json beside it; restore it")
    torch.set_num_threads(1)  # because the last digits depend on the number of threads
    algorithm = build_algorithm(compose_experiment(source.experiment, source.overrides), Hardware("cpu"))
    algorithm.load_state_dict(saved["state"])
    return algorithm


@style()
def plot_picture(picture: Picture, panels: Sequence[tuple[Panel, Evidence, list[dict[str, Any]]]], path: Path) -> Path:
    """Plots a column for each method and K, with a panel for each task; returns the PNG.

    A panel without rows shows the reason and the command.

    Args:
        picture: the figure.
        panels: its panels, with the runs and the rows of each.
        path: path of the PNG; the PDF and the SVG are written beside it.
    """
    from matplotlib.figure import Figure as Canvas  # imported here because it takes half a second

    columns: dict[str, list[tuple[Panel, Evidence, list[dict[str, Any]]]]] = {}
    methods = list(dict.fromkeys(panel.row for panel, _, _ in panels))
    for item in sorted(panels, key=lambda item: methods.index(item[0].row)):  # the tasks of a method keep their order
        columns.setdefault(item[0].label, []).append(item)
    num_rows = max(map(len, columns.values()))
    canvas = Canvas(figsize=(PAGE, 1.35 * num_rows + 0.75), layout="constrained")
    grid = canvas.subplots(num_rows, len(columns), squeeze=False, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for column, items in zip(grid.T, columns.values(), strict=True):
        column[0].set_title(_heading(*items[0][:2]))
        for axes, item in zip(column, items, strict=False):
            _plot_panel(axes, *item)
            handles |= {str(line.get_label()): line for line in axes.get_lines()}
        for axes in column[len(items) :]:
            axes.set_visible(False)
        column[len(items) - 1].set_xlabel("input x")
    for axes in grid[:, 0]:
        axes.set_ylabel("output y")
    canvas.legend(handles=list(handles.values()), loc="outside lower center", ncols=5)
    save_figure(canvas, picture.title, path)
    return path


def _heading(panel: Panel, evidence: Evidence) -> str:
    """Returns a column's heading, with the step size if it was chosen for the evaluation, as in the paper."""
    sizes = evidence.evaluated[0][1].step_sizes.get(panel.source.num_shots) if evidence.evaluated else None
    return f"{panel.label}\nstep size {sizes[0]:g}" if sizes and len(set(sizes)) == 1 else panel.label


def _plot_panel(axes: Axes, panel: Panel, evidence: Evidence, rows: Sequence[dict[str, Any]]) -> None:
    axes.set_xlim(-5, 5)
    if not rows:
        say_why_empty(axes, panel, evidence)
        return
    lines, points = ([row for row in rows if row["is_support"] == kind] for kind in (0, 1))
    x = [row["x"] for row in lines]
    axes.plot(x, [row["truth"] for row in lines], color="C1", label="ground truth")
    for step, (label, colour, line) in STEPS.items():
        axes.plot(x, [row[f"step_{step}"] for row in lines], color=colour, ls=line, label=label)
    given = [row["x"] for row in points], [row["truth"] for row in points]
    axes.plot(*given, "^", color="C3", markersize=4.5, label="points used")


def say_why_empty(axes: Axes, panel: Panel, evidence: Evidence) -> None:
    """Writes into a panel without a picture why it has none, and the command that makes it."""
    why = "left out" if evidence.complete else evidence.state
    command = textwrap.fill(panel.source.command([]), 26, break_long_words=False)
    axes.text(0.5, 0.5, f"{why}\n\n{command}", transform=axes.transAxes, ha="center", va="center", fontsize=5.5)
