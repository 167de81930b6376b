"""Figures 2 and 7: a finished run's adaptation to single sinusoids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from maml.algorithm.base import Algorithm
from maml.config.compose import compose_experiment
from maml.errors import MamlError
from maml.experiment import build_algorithm
from maml.hardware.base import Hardware
from maml.paper.cells import Panel, Picture, Source
from maml.paper.evidence import Evidence
from maml.paper.figures import save
from maml.record import checkpoint
from maml.seeding import Stream

# The gradient steps that are drawn, with label, colour and line style (dotted, dashed and solid as in the paper).
STEPS = {0: ("pre-update", "0.6", ":"), 1: ("1 gradient step", "C2", "--"), 10: ("10 gradient steps", "C2", "-")}
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
    step_sizes = evidence.evaluated[0][1].step_sizes.get(str(num_shots))
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


def plot_picture(picture: Picture, panels: Sequence[tuple[Panel, Evidence, list[dict[str, Any]]]], path: Path) -> Path:
    """Plots a panel for each task and method; a panel without rows shows the reason and the command. Returns the PNG.

    Args:
        picture: the figure.
        panels: its panels, with the runs and the rows of each.
        path: path of the PNG.
    """
    from matplotlib.figure import Figure as Canvas  # imported here because it takes half a second

    num_tasks = len({panel.task for panel in picture.panels})
    num_methods = len(picture.panels) // num_tasks
    canvas = Canvas(figsize=(4.2 * num_methods, 2.2 * num_tasks + 0.8), layout="constrained")
    grid = canvas.subplots(num_tasks, num_methods, squeeze=False, sharex=True, sharey="row")
    for axes, (panel, evidence, rows) in zip(grid.flat, panels, strict=True):
        axes.set_title(f"{panel.row}, K={panel.source.num_shots}")
        axes.set_xlim(-5, 5)
        if not rows:
            why = "left out" if evidence.complete else evidence.state
            text = f"{why}\n\n{panel.source.command([])}"
            axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=8)
        lines, points = ([row for row in rows if row["is_support"] == kind] for kind in (0, 1))
        x = [row["x"] for row in lines]
        axes.plot(x, [row["truth"] for row in lines], color="C3", label="ground truth")
        for step, (label, colour, style) in STEPS.items():
            axes.plot(x, [row[f"step_{step}"] for row in lines], color=colour, ls=style, label=label)
        axes.plot([row["x"] for row in points], [row["truth"] for row in points], "^", color="C4", label="points used")
    canvas.suptitle(picture.title)
    canvas.legend(handles=grid.flat[0].get_lines(), loc="outside lower center", ncols=3)
    return save(canvas, path)
