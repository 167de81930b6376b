"""Figure 4, bottom: the first rollout to one goal before and after adaptation, ours and the published one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maml.config.compose import compose_experiment
from maml.config.schema import build
from maml.domain.point_navigation import PointNavigation
from maml.domain.reinforcement import Rollouts
from maml.environment.point import move
from maml.errors import MamlError
from maml.evaluation import Evaluation
from maml.paper.adaptation import load_trained, say_why_empty
from maml.paper.cells import Panel, Picture
from maml.paper.evidence import Evidence
from maml.paper.figures import save_figure
from maml.record.style import COLUMN, GRAY, style
from maml.types import take

# The gradient steps that are drawn, with label, colour and line style.
STEPS = {0: ("pre-update", GRAY, ":"), 3: ("3 gradient steps", "C2", "-")}
_TOLERANCE = 0.01  # relative; rounding on another machine can end an episode one step earlier or later


@torch.no_grad()
def panel_rows(picture: Picture, panel: Panel, evidence: Evidence) -> list[dict[str, Any]]:
    """Repeats the evaluation of the first finished run and returns the first rollout to the goal.

    Args:
        picture: the figure, with the published trajectories.
        panel: one of the figure's panels.
        evidence: the runs of the panel's source.

    Returns:
        One row for each position, at each of `STEPS`. The published rows come first; they lack the position after the
        last action. Our rows follow if a run is finished, from the start to the position after the last action.

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
    step_sizes = report.step_sizes.get(source.num_shots)
    for step, _ in enumerate(algorithm.adapt(algorithm.params_per_task(1, theta), tasks, max(STEPS), step_sizes)):
        rollouts = domain.data(tasks, "query", step)
        ours, reported = rollouts.returns.item(), report.per_task(source, step)[panel.task]
        if not math.isclose(ours, reported, rel_tol=_TOLERANCE):
            raise MamlError(
                f"{run.path}: the return to goal {panel.task} after {step} gradient steps is {ours:.4g}, but "
                f"{reported:.4g} in tasks.csv; the checkpoint is not the one that was evaluated, so restore it"
            )
        if step in STEPS:
            rows += [
                {"by": "ours"} | labels | dict(zip(columns, (step, t, f"{x:.6f}", f"{y:.6f}"), strict=True))
                for t, (x, y) in enumerate(first_path(rollouts, tasks["goals"], domain).tolist())
            ]
    return rows


def first_path(rollouts: Rollouts, goals: Tensor, domain: PointNavigation) -> Tensor:
    """Returns all positions of the first episode of the only task, ``(steps + 1, 2)``.

    Rollouts hold the position before each action, so the environment makes the last move once more.
    """
    starts = (rollouts.observations[0] == 0).all(-1).nonzero()  # every episode starts at the origin
    before, actions = (values[0, : int(starts[1])] for values in (rollouts.observations, rollouts.actions))
    last, _, _ = move(before[-1:], actions[-1:], goals, domain.reward, domain.arrival)
    return torch.cat([before, last])


@style()
def plot_picture(picture: Picture, panels: Sequence[tuple[Panel, Evidence, list[dict[str, Any]]]], path: Path) -> Path:
    """Plots a column for each method: the published rollouts above, ours below. Returns the PNG.

    A panel without rollouts shows the reason and the command.

    Args:
        picture: the figure.
        panels: its panels, with the runs and the rows of each.
        path: path of the PNG; the PDF and the SVG are written beside it.
    """
    import matplotlib  # imported here because it takes half a second
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(COLUMN, 3.85), layout="constrained")
    grid = canvas.subplots(2, len(panels), squeeze=False, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for column, (panel, evidence, rows) in zip(grid.T, panels, strict=True):
        for axes, by in zip(column, ("paper", "ours"), strict=True):
            axes.set_title(f"{panel.name}, {by}")
            axes.set_aspect("equal")
            shown = [row for row in rows if row["by"] == by]
            if not shown:
                say_why_empty(axes, panel, evidence)
            for step, (label, colour, line) in STEPS.items():
                x, y = ([float(row[name]) for row in shown if int(row["grad_step"]) == step] for name in ("x", "y"))
                if x:
                    axes.plot(x, y, color=colour, ls=line, lw=0.9, label=label)
            ink = matplotlib.rcParams["text.color"]
            axes.plot(0, 0, "o", color=ink, label="start", zorder=3)
            goal = rows[0]["goal_x"], rows[0]["goal_y"]
            axes.plot(*goal, "*", color="C1", markersize=8, markeredgecolor=ink, mew=0.4, label="goal", zorder=3)
            handles |= {str(mark.get_label()): mark for mark in axes.get_lines()}
        column[-1].set_xlabel("position x")
    for axes in grid[:, 0]:
        axes.set_ylabel("position y")
    order = [*(label for label, *_ in STEPS.values()), "start", "goal"]
    canvas.legend(handles=[handles[name] for name in order if name in handles], loc="outside lower center", ncols=2)
    save_figure(canvas, picture.title, path)
    return path
