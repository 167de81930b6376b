"""Figure 4, bottom: the first rollout to one goal before and after adaptation, ours and the published one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from maml.config.compose import compose_experiment
from maml.config.schema import build
from maml.domain.point_navigation import PointNavigation
from maml.errors import MamlError
from maml.evaluation import Evaluation
from maml.paper.adaptation import load_trained
from maml.paper.cells import Panel, Picture
from maml.paper.evidence import Evidence
from maml.paper.figures import save
from maml.types import take

# The gradient steps that are drawn, with label, colour and line style.
STEPS = {0: ("pre-update", "0.6", ":"), 3: ("3 gradient steps", "C2", "-")}
_TOLERANCE = 0.01  # relative; rounding on another machine can end an episode one step earlier or later


@torch.no_grad()
def panel_rows(picture: Picture, panel: Panel, evidence: Evidence) -> list[dict[str, Any]]:
    """Repeats the evaluation of the first finished run and returns the first rollout to the goal.

    Args:
        picture: the figure, with the published trajectories.
        panel: one of the figure's panels.
        evidence: the runs of the panel's source.

    Returns:
        One row for each position before an action, at each of `STEPS`. The published rows come first. Our rows follow
        if a run is finished.

    Raises:
        MamlError: if the finished run's checkpoint or ``tasks.csv`` is missing, damaged, or belongs to another run, or
            if the repeated evaluation does not give the reported return.
    """
    settings, source = compose_experiment(panel.source.experiment, panel.source.overrides), panel.source
    evaluation: Evaluation = build(settings.evaluation)
    domain: PointNavigation = build(settings.domain)
    goal_x, goal_y = (round(value, 5) for value in domain.test_goals(evaluation.num_tasks)[panel.task].tolist())
    labels = {"method": panel.row, "goal": panel.task, "goal_x": goal_x, "goal_y": goal_y}
    columns = ("grad_step", "t", "x", "y")
    rows: list[dict[str, Any]] = [
        {"by": "paper"} | labels | {name: line[name] for name in columns}
        for line in picture.published
        if line["method"] == panel.row
    ]
    if not evidence.complete:
        return rows
    run, report = evidence.evaluated[0]
    algorithm = load_trained(source, evidence)
    theta = evaluation.choose_theta(algorithm)
    # The rollouts to a goal do not depend on the other goals of the bank.
    tasks = take(evaluation.bank(domain, source.num_shots), panel.task, panel.task + 1)
    step_sizes = report.step_sizes.get(str(source.num_shots))
    for step, _ in enumerate(algorithm.adapt(algorithm.params_per_task(1, theta), tasks, max(STEPS), step_sizes)):
        rollouts = domain.data(tasks, "query", step)
        ours, reported = rollouts.returns.item(), report.per_task(source, step)[panel.task]
        if not math.isclose(ours, reported, rel_tol=_TOLERANCE):
            raise MamlError(
                f"{run.path}: the return to goal {panel.task} after {step} gradient steps is {ours:.4g}, but "
                f"{reported:.4g} in tasks.csv; the checkpoint is not the one that was evaluated, so restore it"
            )
        if step in STEPS:
            starts = (rollouts.observations[0] == 0).all(-1).nonzero()  # every episode starts at the origin
            positions = rollouts.observations[0, : int(starts[1])].tolist()
            rows += [
                {"by": "ours"} | labels | dict(zip(columns, (step, t, f"{x:.6f}", f"{y:.6f}"), strict=True))
                for t, (x, y) in enumerate(positions)
            ]
    return rows


def plot_picture(picture: Picture, panels: Sequence[tuple[Panel, Evidence, list[dict[str, Any]]]], path: Path) -> Path:
    """Plots a column for each method: the published rollouts above, ours below. Returns the PNG.

    A panel without rollouts shows the reason and the command.

    Args:
        picture: the figure.
        panels: its panels, with the runs and the rows of each.
        path: path of the PNG.
    """
    from matplotlib.figure import Figure as Canvas  # imported here because it takes half a second

    canvas = Canvas(figsize=(4.2 * len(panels), 9.4), layout="constrained")
    grid = canvas.subplots(2, len(panels), squeeze=False, sharex=True, sharey=True)
    for column, (panel, evidence, rows) in zip(grid.T, panels, strict=True):
        for axes, by in zip(column, ("paper", "ours"), strict=True):
            axes.set_title(f"{panel.row}, {by}")
            axes.set_aspect("equal")
            shown = [row for row in rows if row["by"] == by]
            if not shown:
                why = "left out" if evidence.complete else evidence.state
                text = f"{why}\n\n{panel.source.command([])}"
                axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=8)
            for step, (label, colour, style) in STEPS.items():
                x, y = ([float(row[name]) for row in shown if int(row["grad_step"]) == step] for name in ("x", "y"))
                axes.plot(x, y, color=colour, ls=style, label=label)
            axes.plot(0, 0, "ko", markersize=4, label="start")
            axes.plot(rows[0]["goal_x"], rows[0]["goal_y"], "*", color="C3", markersize=12, label="goal")
    canvas.suptitle(picture.title)
    canvas.legend(handles=grid.flat[0].get_lines(), loc="outside lower center", ncols=4)
    return save(canvas, path)
