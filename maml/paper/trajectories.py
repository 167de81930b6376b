"""The first rollout to one goal before and after adaptation, ours beside the published one: Figure 4, bottom."""

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
from maml.paper.figures import save
from maml.record.index import Evidence
from maml.types import take

# The gradient steps drawn, and how.
STEPS = {0: ("pre-update", "0.6", ":"), 3: ("3 gradient steps", "C2", "-")}
_TOLERANCE = 0.01  # of a return: another machine's rounding may end an episode a step earlier or later


@torch.no_grad()
def panel_rows(picture: Picture, panel: Panel, evidence: Evidence) -> list[dict[str, Any]]:
    """Repeats the evaluation of the lowest seed that was trained to the end, and picks the first rollout to the goal.

    Args:
        picture: holds the published trajectories.
        panel: one of its panels.
        evidence: what has been run of the panel's source.

    Returns:
        One row for each position in front of an action, at each of `STEPS`: first the published, then, if a run is
        finished, ours.

    Raises:
        MamlError: if the finished run's checkpoint or values per task are missing, damaged or of another run, or it
            does not reach the goal's return that was reported.
    """
    config, source = compose_experiment(panel.source.experiment, panel.source.overrides), panel.source
    evaluation: Evaluation = build(config.evaluation)
    domain: PointNavigation = build(config.domain)
    goal_x, goal_y = (round(value, 5) for value in domain.test_goals(evaluation.num_tasks)[panel.task].tolist())
    beside = {"method": panel.row, "goal": panel.task, "goal_x": goal_x, "goal_y": goal_y}
    places = ("grad_step", "t", "x", "y")
    rows: list[dict[str, Any]] = [
        {"by": "paper"} | beside | {name: line[name] for name in places}
        for line in picture.published
        if line["method"] == panel.row
    ]
    if not evidence.complete:
        return rows
    run, report = evidence.evaluated[0]
    algorithm = load_trained(source, evidence)
    theta = evaluation.choose_theta(algorithm)
    # A goal's rollouts do not depend on the goals beside it.
    tasks = take(evaluation.bank(domain, source.num_shots), panel.task, panel.task + 1)
    step_sizes = report.step_sizes.get(str(source.num_shots))
    for step, _ in enumerate(algorithm.adapt(algorithm.params_per_task(1, theta), tasks, max(STEPS), step_sizes)):
        rollouts = domain.data(tasks, "query", step)
        ours, reported = rollouts.returns.item(), report.per_task(source, step)[panel.task]
        if not math.isclose(ours, reported, rel_tol=_TOLERANCE):
            raise MamlError(
                f"{run.path}: the return to goal {panel.task} after {step} gradient steps is {ours:.4g}, but "
                f"{reported:.4g} in tasks.csv; the checkpoint is not what was evaluated, restore it"
            )
        if step in STEPS:
            begins = (rollouts.observations[0] == 0).all(-1).nonzero()  # every episode at the origin
            positions = rollouts.observations[0, : int(begins[1])].tolist()
            rows += [
                {"by": "ours"} | beside | dict(zip(places, (step, t, f"{x:.6f}", f"{y:.6f}"), strict=True))
                for t, (x, y) in enumerate(positions)
            ]
    return rows


def plot_picture(picture: Picture, found: Sequence[tuple[Panel, Evidence, list[dict[str, Any]]]], path: Path) -> Path:
    """Draws a column for each method, in it the published rollouts over ours; what is missing says why."""
    from matplotlib.figure import Figure as Canvas  # here, because it takes half a second to import

    canvas = Canvas(figsize=(4.2 * len(found), 9.4), layout="constrained")
    grid = canvas.subplots(2, len(found), squeeze=False, sharex=True, sharey=True)
    for column, (panel, evidence, rows) in zip(grid.T, found, strict=True):
        for axes, by in zip(column, ("paper", "ours"), strict=True):
            axes.set_title(f"{panel.row}, {by}")
            axes.set_aspect("equal")
            mine = [row for row in rows if row["by"] == by]
            if not mine:
                why = "left out" if evidence.complete else evidence.state
                text = f"{why}\n\n{panel.source.command([])}"
                axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=8)
            for step, (label, colour, style) in STEPS.items():
                x, y = ([float(row[name]) for row in mine if int(row["grad_step"]) == step] for name in ("x", "y"))
                axes.plot(x, y, color=colour, ls=style, label=label)
            axes.plot(0, 0, "ko", markersize=4, label="start")
            axes.plot(rows[0]["goal_x"], rows[0]["goal_y"], "*", color="C3", markersize=12, label="goal")
    canvas.suptitle(picture.title)
    canvas.legend(handles=grid.flat[0].get_lines(), loc="outside lower center", ncols=4)
    return save(canvas, path)
