"""Single sinusoids and a finished run's adaptation to them: Figures 2 and 7."""

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
from maml.paper.figures import save
from maml.record import checkpoint
from maml.record.index import Evidence
from maml.seeding import Stream

# The gradient steps drawn, and how: the paper's dotted, dashed and full line.
STEPS = {0: ("pre-update", "0.6", ":"), 1: ("1 gradient step", "C2", "--"), 10: ("10 gradient steps", "C2", "-")}
_NUM_INPUTS = 101


@torch.no_grad()
def panel_rows(picture: Picture, panel: Panel, evidence: Evidence) -> list[dict[str, Any]]:
    """Adapts to the panel's task from the theta of the lowest seed that was trained to the end.

    Args:
        picture: its name and the number of the task are all that the task depends on.
        panel: one of its panels.
        evidence: what has been run of the panel's source.

    Returns:
        One row for each input, first an even grid over the input range, then the support points: the truth, and the
        network's output after each of `STEPS`. Nothing if no run is finished.

    Raises:
        MamlError: if the finished run's checkpoint is missing, damaged or of another run.
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
    # Six digits: further ones may differ from machine to machine.
    values = zip(*([float(f"{v:.6g}") for v in column.flatten().tolist()] for column in columns.values()), strict=True)
    beside = {"method": panel.row, "num_shots": num_shots, "task": panel.task}
    return [
        beside | {"is_support": int(number >= _NUM_INPUTS)} | dict(zip(columns, point, strict=True))
        for number, point in enumerate(values)
    ]


def load_trained(source: Source, evidence: Evidence) -> Algorithm:
    """Returns the algorithm as the finished run of the lowest seed left it.

    Raises:
        MamlError: if its checkpoint is missing, damaged or of another run.
    """
    run, report = evidence.evaluated[0]
    saved = checkpoint.load(run.path / "checkpoint.pt")
    if (saved["run_id"], saved["iteration"]) != (report.run_id, report.iteration):
        raise MamlError(f"{run.path / 'checkpoint.pt'} is not what the report beside it is of; restore it")
    torch.set_num_threads(1)  # or the last digits would hang on the number of cores
    algorithm = build_algorithm(compose_experiment(source.experiment, source.overrides), Hardware("cpu"))
    algorithm.load_state_dict(saved["state"])
    return algorithm


def plot_picture(picture: Picture, found: Sequence[tuple[Panel, Evidence, list[dict[str, Any]]]], path: Path) -> Path:
    """Draws a panel for each task and method; one without rows says why, and the command. Returns the PNG."""
    from matplotlib.figure import Figure as Canvas  # here, because it takes half a second to import

    num_tasks = len({panel.task for panel in picture.panels})
    num_methods = len(picture.panels) // num_tasks
    canvas = Canvas(figsize=(4.2 * num_methods, 2.2 * num_tasks + 0.8), layout="constrained")
    grid = canvas.subplots(num_tasks, num_methods, squeeze=False, sharex=True, sharey="row")
    for axes, (panel, evidence, rows) in zip(grid.flat, found, strict=True):
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
