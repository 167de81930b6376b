"""The pictures that an algorithm makes: drawn beside the report, sent to the logger and shown with the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
import torch
from PIL import Image

from maml.algorithm.maml import MAML
from maml.logger.base import Logger
from maml.pictures import Images, Lines, Picture
from maml.record.gallery import draw, drawn_pictures, report_pictures
from maml.types import Params, Tasks, num_tasks
from tests.record.test_plot import figures as figures
from tests.runs import TinyRuns


def test_lines_are_drawn_with_their_names_and_positions(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    picture = Lines("gates", "step", "mean", {"forget": [0.9, 0.8], "input": [0.1, 0.2]}, x=[1, 2])
    path = draw("gates", picture, tmp_path)
    ((axes,),) = (figure.axes for figure in figures)
    lines = {str(line.get_label()): line.get_xydata().tolist() for line in axes.get_lines()}  # type: ignore[union-attr]
    assert lines == {"forget": [[1, 0.9], [2, 0.8]], "input": [[1, 0.1], [2, 0.2]]}
    assert (path.name, axes.get_xlabel(), axes.get_ylabel()) == ("picture_gates.png", "step", "mean")


def test_no_two_lines_look_alike_and_steps_are_whole(tmp_path: Path, figures: list[matplotlib.figure.Figure]) -> None:
    draw("many", Lines("many", "step", "mean", {f"line{i}": [0.1 * i, 0.2] for i in range(12)}, x=[1, 5]), tmp_path)
    ((axes,),) = (figure.axes for figure in figures)
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}) == 12
    assert all(tick.is_integer() for tick in axes.get_xticks())


def test_images_are_drawn_in_rows_of_any_length_with_ink_black(
    tmp_path: Path, figures: list[matplotlib.figure.Figure]
) -> None:
    rows = {"given": torch.eye(4).expand(5, 4, 4), "samples": torch.zeros(3, 4, 4)}
    path = draw("samples", Images("given and drawn", rows), tmp_path)
    (axes,) = (figure.axes for figure in figures)
    assert [len(each.images) for each in axes] == [1] * 5 + [1] * 3 + [0] * 2
    assert [axes[0].get_ylabel(), axes[5].get_ylabel()] == ["given", "samples"]
    with Image.open(path) as picture:
        darkness = 255 - torch.tensor(list(picture.convert("L").tobytes()))
    assert (darkness == 255).any()


def test_equal_pictures_give_equal_files(tmp_path: Path) -> None:
    picture = Lines("one", "x", "y", {"a": [1.0, 2.0]})
    first = draw("one", picture, tmp_path).read_bytes()
    assert draw("one", picture, tmp_path).read_bytes() == first


class Picturing(MAML):
    """An algorithm with a picture."""

    def pictures(self, params: Params, tasks: Tasks, num_steps: int) -> dict[str, Picture]:
        assert num_tasks(tasks) == len(next(iter(params.values()))) == 3, "no more tasks than the bank has"
        return {"steps": Lines("steps", "x", "y", {"numbers": list(range(num_steps))})}


class LargePictures(MAML):
    """An algorithm whose pictures need the memory of two tasks at most."""

    def pictures(self, params: Params, tasks: Tasks, num_steps: int) -> dict[str, Picture]:
        if (count := num_tasks(tasks)) > 2:
            raise torch.OutOfMemoryError("no memory is left")
        return {"count": Lines("count", "x", "y", {"tasks": [count]})}


class FailingPictures(MAML):
    """An algorithm whose pictures have a mistake."""

    def pictures(self, params: Params, tasks: Tasks, num_steps: int) -> dict[str, Picture]:
        raise ZeroDivisionError("a mistake")


def test_pictures_that_fail_are_a_warning_and_the_report_is_written(
    tiny: TinyRuns, caplog: pytest.LogCaptureFixture
) -> None:
    given = ("num_iterations=3", "evaluation.num_tasks=3")
    folder = tiny.run(f"algorithm._target_={__name__}.FailingPictures", *given)
    assert (folder / "report.json").exists() and not drawn_pictures(folder)
    assert "no pictures of the algorithm" in caplog.text


def test_validation_tasks_have_no_pictures(tiny: TinyRuns) -> None:
    given = ("num_iterations=3", "evaluation.num_tasks=3", "evaluation.split=val")
    assert not drawn_pictures(tiny.run(f"algorithm._target_={__name__}.Picturing", *given))


class Keeping(Logger):
    """A logger that keeps the pictures of each report."""

    pictures: list[dict[str, Path]] = []

    def report(self, report: dict[str, Any], pictures: Mapping[str, Path]) -> None:
        self.pictures.append(dict(pictures))


@pytest.mark.parametrize("lost", [False, True])
def test_algorithms_pictures_are_beside_the_report_and_reach_the_logger(tiny: TinyRuns, lost: bool) -> None:
    Keeping.pictures.clear()
    given = ("num_iterations=3", "evaluation.num_tasks=3", f"logger._target_={__name__}.Keeping")
    folder = tiny.run(f"algorithm._target_={__name__}.Picturing", *given)
    if lost:
        (folder / "report.png").unlink()
        tiny.run(f"algorithm._target_={__name__}.Picturing", *given)
        assert (folder / "report.png").exists()
    assert drawn_pictures(folder) == {"steps": folder / "picture_steps.png"}
    expected = {"adaptation": folder / "report.png", "steps": folder / "picture_steps.png"}
    assert report_pictures(folder) == expected
    assert Keeping.pictures == [expected]


def test_pictures_that_need_too_much_memory_have_fewer_tasks_and_the_report_is_written(tiny: TinyRuns) -> None:
    folder = tiny.run(f"algorithm._target_={__name__}.LargePictures", "num_iterations=3")
    assert (folder / "report.json").exists()
    assert list(drawn_pictures(folder)) == ["count"]
