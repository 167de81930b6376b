"""The accuracy of each class and the confusion of pairs, against dictionaries that count one example at a time."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from maml.config.schema import build
from maml.domain.base import Predictions
from maml.errors import MamlError
from maml.record.classes import confusion
from maml.record.run_files import read_json
from maml.seeding import Stream
from tests.runs import TinyRuns, assert_same_run, file_contents

NAMES = [f"class {number}" for number in range(9)]


def made_up(num_tasks: int = 40, ways: int = 4, per_class: int = 3) -> Predictions:
    """Returns predictions of which about two thirds are right."""
    stream = Stream(0)
    choices = stream.child("classes").choice((num_tasks,), len(NAMES), ways)
    labels = torch.arange(ways).repeat(per_class).expand(num_tasks, -1)
    guess = stream.child("guess").integers((num_tasks, ways * per_class), ways)
    is_right = stream.child("right").integers((num_tasks, ways * per_class), 3) > 0
    return Predictions(choices.gather(1, labels), choices.gather(1, torch.where(is_right, labels, guess)), choices)


def test_counts_equal_those_of_dictionaries() -> None:
    predictions = made_up()
    images, right, taken, together = Counter[str](), Counter[str](), Counter[Any](), Counter[Any]()
    for classes, predicted, choices in zip(*(part.tolist() for part in predictions), strict=True):
        for true, best in zip(classes, predicted, strict=True):
            images[NAMES[true]] += 1
            right[NAMES[true]] += true == best
            taken[NAMES[true], NAMES[best]] += 1
            for other in choices:
                together[NAMES[true], NAMES[other]] += 1
    counted = confusion(2, predictions, NAMES)
    rows = counted.class_rows()
    assert {row["class"]: row["examples"] for row in rows} == images
    assert all(row["accuracy"] == pytest.approx(right[row["class"]] / images[row["class"]]) for row in rows)
    pairs = counted.pair_rows()
    assert {(row["class"], row["taken_for"]): row["examples"] for row in pairs} == taken
    assert all(row["of"] == together[row["class"], row["taken_for"]] for row in pairs)
    assert {row["num_shots"] for row in (*rows, *pairs)} == {2}
    sums = Counter[str]()
    for row in pairs:
        sums[row["class"]] += row["examples"]
    assert sums == images


def test_summary_names_the_worst_class_and_the_most_confused_pair() -> None:
    predictions = Predictions(
        torch.tensor([[0, 1, 0, 1], [1, 2, 1, 2]]),
        torch.tensor([[0, 0, 0, 0], [1, 2, 2, 2]]),
        torch.tensor([[0, 1], [1, 2]]),
    )
    text = confusion(1, predictions, ["oak", "elm", "ash"]).summary()
    assert text == "K=1: lowest accuracy 0.25, elm (4 examples); most confused elm, taken for oak 2 of 2 times"
    right = predictions._replace(taken_for=predictions.classes)
    assert confusion(1, right, ["oak", "elm", "ash"]).summary().endswith("no class was taken for another")


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("ways", [None, 3])
def test_files_add_up_to_the_reported_accuracy(
    ways: int | None, tiny_images: TinyRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("num_iterations=1", "evaluation.num_shots=[1,2]", f"evaluation.num_ways={ways or 'null'}")
    folder = tiny_images.run(*own, "evaluation.per_class=true")
    report = read_json(folder / "report.json")
    assert report is not None and "evaluation.per_class" not in report["evaluation"]
    classes, pairs = read(folder / "classes.csv"), read(folder / "confusion.csv")
    reported = {
        curve["num_shots"]: curve["steps"][-1]["mean"]
        for curve in report["curves"]
        if curve["metric"] == report["headline_metric"]
    }
    for num_shots, accuracy in reported.items():
        mine = [row for row in classes if int(row["num_shots"]) == num_shots]
        assert sum(int(row["examples"]) for row in mine) == 5 * (ways or 5) * num_shots
        right = sum(round(int(row["examples"]) * float(row["accuracy"])) for row in mine)
        assert right / (5 * (ways or 5) * num_shots) == pytest.approx(accuracy, abs=1e-6)
        diagonal = [row for row in pairs if row["class"] == row["taken_for"] and int(row["num_shots"]) == num_shots]
        assert sum(int(row["examples"]) for row in diagonal) == right
    assert {row["class"] for row in classes} <= set(build(tiny_images.config().domain).class_names)
    assert "  classes, K=2: lowest accuracy " in capsys.readouterr().out


def test_files_are_added_to_a_finished_run_and_change_nothing(tiny_images: TinyRuns) -> None:
    folder = tiny_images.run("num_iterations=1")
    before = file_contents(folder, but=["run.json", "report.png"])
    assert tiny_images.run("num_iterations=1", "evaluation.per_class=true") == folder
    after = file_contents(folder, but=["run.json", "report.png"])
    assert after.keys() - before.keys() == {"classes.csv", "confusion.csv"}
    assert {name: after[name] for name in before} == before
    (folder / "confusion.csv").unlink()
    tiny_images.run("num_iterations=1", "evaluation.per_class=true")
    assert file_contents(folder, but=["run.json", "report.png"]) == after, "a lost file is made again"
    whole = tiny_images.in_folder("whole").run("num_iterations=1", "evaluation.per_class=true")
    assert_same_run(folder, whole)
    for file in folder.glob("checkpoint*"):
        file.unlink()
    (folder / "classes.csv").unlink()
    with pytest.raises(MamlError, match=r"classes\.csv is missing, and .* has no checkpoint to evaluate again"):
        tiny_images.run("num_iterations=1", "evaluation.per_class=true")
    assert not (folder / "classes.csv").exists()


def test_classes_of_a_meta_test_that_diverged_are_not_counted(
    tiny_images: TinyRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("num_iterations=1", "evaluation.per_class=true", "evaluation.step_size=1e37", "evaluation.num_steps=2")
    folder = tiny_images.run(*own)
    assert read(folder / "classes.csv") == read(folder / "confusion.csv") == []
    assert (folder / "classes.csv").read_text() == "num_shots,class,examples,accuracy\n"
    text = capsys.readouterr().out
    assert "classes are not counted at a K where adaptation diverged" in text and "lowest accuracy" not in text
    assert tiny_images.run(*own) == folder, "it is finished"


def test_classes_of_a_regression_are_refused_before_anything_is_written(tiny: TinyRuns) -> None:
    with pytest.raises(
        MamlError, match=r"evaluation\.per_class=true counts .* Sinusoid has none; set evaluation\.per_c"
    ):
        tiny.run("+evaluation.per_class=true")
    assert not tiny.runs_dir.exists()
