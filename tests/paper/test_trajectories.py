"""The lower half of Figure 4: rollouts of the evaluated policy beside the published ones."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure as Canvas

from maml.algorithm.base import Algorithm
from maml.config.compose import compose_experiment
from maml.config.schema import build
from maml.curve import per_task_rows
from maml.domain.point_navigation import PointNavigation
from maml.domain.reinforcement import Rollouts
from maml.errors import MamlError
from maml.evaluation import Evaluation
from maml.paper.adaptation import load_trained
from maml.paper.cells import Panel, load_pictures
from maml.paper.evidence import Evidence, find_evidence
from maml.paper.trajectories import first_path, panel_rows, plot_picture
from maml.record.index import find_runs
from tests.paper.fake_runs import POINT, edit, make_run_with_checkpoint

RESULTS = Path(__file__).parents[2] / "results"
(PICTURE,) = (picture for picture in load_pictures(RESULTS) if picture.published)
# As in meta-test, but with fewer and shorter rollouts.
SMALL = replace(
    POINT, num_shots=4, overrides=("domain.horizon=20", "evaluation.num_tasks=8", "evaluation.num_shots=[4]")
)
PANEL = Panel("MAML", 6, False, SMALL)
STEP_SIZES = [0.5, 0.25, 0.25, 0.25]


def evaluated_run(root: Path) -> tuple[Evidence, Evaluation, Algorithm]:
    """Makes a run whose report is the evaluation of its checkpoint."""
    folder = make_run_with_checkpoint(root, source=SMALL)
    found = find_evidence(SMALL, find_runs(root)[0])
    evaluation, algorithm = (
        build(compose_experiment(SMALL.experiment, SMALL.overrides).evaluation),
        load_trained(SMALL, found),
    )
    bank = evaluation.bank(algorithm.domain, SMALL.num_shots)
    curves = evaluation.curves(algorithm, SMALL.num_shots, bank, STEP_SIZES)
    edit(folder / "report.json", curves=[curve.summary() for curve in curves], step_sizes={"4": STEP_SIZES})
    with open(folder / "tasks.csv", "w", newline="") as file:
        rows = per_task_rows(curves)
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return find_evidence(SMALL, find_runs(root)[0]), evaluation, algorithm


def positions(rows: list[dict[str, Any]], by: str, step: int) -> np.ndarray:
    mine = [row for row in rows if (row["by"], int(row["grad_step"])) == (by, step)]
    assert [int(row["t"]) for row in mine] == list(range(len(mine)))
    return np.array([[float(row["x"]), float(row["y"])] for row in mine])


def test_without_runs_the_published_trajectories_are_there_to_the_last_digit() -> None:
    for row in ("MAML", "pretrained"):
        names = ("method", "grad_step", "t", "x", "y")
        rows = panel_rows(PICTURE, replace(PANEL, row=row), Evidence())
        assert [{name: line[name] for name in names} for line in rows] == [
            line for line in PICTURE.published if line["method"] == row
        ]
        assert {line["by"] for line in rows} == {"paper"}
        assert {(line["goal"], line["goal_x"], line["goal_y"]) for line in rows} == {(6, -0.29555, 0.37812)}


def test_ours_is_the_first_rollout_of_the_whole_banks_evaluation(tmp_path: Path) -> None:
    found, evaluation, algorithm = evaluated_run(tmp_path)
    rows = panel_rows(PICTURE, PANEL, found)
    bank = evaluation.bank(algorithm.domain, SMALL.num_shots)
    with torch.no_grad():
        theta = {name: algorithm.best[name] for name in algorithm.theta}
        for _ in algorithm.adapt(algorithm.params_per_task(len(bank["goals"]), theta), bank, 3, STEP_SIZES):
            pass
    goal = np.array([rows[0]["goal_x"], rows[0]["goal_y"]])
    for step in (0, 3):
        path, rollouts = positions(rows, "ours", step), bank[f"step_{step}.observations"][6].numpy()
        num_moves = len(path) - 1
        assert path[:-1] == pytest.approx(rollouts[:num_moves], abs=1e-5)
        assert path[0].tolist() == [0.0, 0.0] == rollouts[num_moves].tolist()  # where the second rollout begins
        moves = 0.1 * bank[f"step_{step}.actions"][6].clamp(-1, 1).numpy()[:num_moves]
        assert np.diff(path, axis=0) == pytest.approx(moves, abs=1e-5)
        assert num_moves == 20 or (abs(path[-1] - goal) < 0.01).all()


def test_a_rollout_that_arrives_ends_at_the_goal() -> None:
    goal, domain = torch.tensor([[0.15, 0.1]]), PointNavigation()
    observations = torch.tensor([[[0.0, 0.0], [0.1, 0.06], [0.0, 0.0]]])
    actions = torch.tensor([[[3.0, 0.6], [0.5, 0.35], [1.0, 1.0]]])
    empty = torch.zeros(1, 3)
    rollouts = Rollouts(observations, actions, empty, empty, empty, *torch.zeros(3, 1))
    path = first_path(rollouts, goal, domain)
    assert path.flatten().tolist() == pytest.approx([0.0, 0.0, 0.1, 0.06, 0.15, 0.095])
    assert bool((path[-1] - goal[0]).abs().max() < 0.01)


def test_a_checkpoint_that_does_not_reach_the_reported_return_is_refused(tmp_path: Path) -> None:
    make_run_with_checkpoint(tmp_path, source=SMALL, mean=-11.0)
    with pytest.raises(MamlError, match=r"the return to goal 6 after 0 gradient steps is .* restore it"):
        panel_rows(PICTURE, PANEL, find_evidence(SMALL, find_runs(tmp_path)[0]))


def test_the_picture_has_the_published_over_ours_and_says_what_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, *_ = evaluated_run(tmp_path)
    missing = replace(PANEL, row="pretrained")
    canvases: list[Canvas] = []
    monkeypatch.setattr(Canvas, "savefig", lambda self, *_, **__: canvases.append(self))
    panels = [
        (panel, runs, panel_rows(PICTURE, panel, runs)) for panel, runs in [(PANEL, found), (missing, Evidence())]
    ]
    plot_picture(PICTURE, panels, tmp_path / "unused.png")
    canvas, *_ = canvases  # as PNG, PDF and SVG
    titles = ["MAML, paper", "pretrained, paper", "MAML, ours", "pretrained, ours"]
    assert [axes.get_title() for axes in canvas.axes] == titles
    for axes, (_, _, rows), by in zip(canvas.axes, [*panels, *panels], ["paper"] * 2 + ["ours"] * 2, strict=True):
        *paths, start, goal = (np.array(line.get_xydata()).tolist() for line in axes.get_lines())
        is_missing = axes is canvas.axes[3]
        assert paths == ([] if is_missing else [positions(rows, by, step).tolist() for step in (0, 3)])
        assert (start, goal) == ([[0, 0]], [[-0.29555, 0.37812]])
        texts = [" ".join(text.get_text().split()) for text in axes.texts]
        assert texts == ([f"not run {SMALL.command([])}"] if is_missing else [])
    assert [axes.get_ylabel() for axes in canvas.axes] == ["position y", ""] * 2
    assert [axes.get_xlabel() for axes in canvas.axes] == [""] * 2 + ["position x"] * 2
    (legend,) = canvas.legends
    assert [text.get_text() for text in legend.get_texts()] == ["pre-update", "3 gradient steps", "start", "goal"]
